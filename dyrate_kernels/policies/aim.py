"""AIM's second half (arXiv 2412.03248): visual tokens leave step by step over the middle layers, ranked by PageRank on attention. Its first
half merges tokens before the language model: the reducer ``aim`` of ``dyrate_kernels.vision``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from typing_extensions import Self

from dyrate_kernels import ops
from dyrate_kernels.policies.base import (
    Decision,
    ModelShape,
    Policy,
    View,
    bound_for_rate,
    check_fraction,
    check_k,
    check_k_range,
    check_positive,
)

_FIRST, _END, _LAYERS = 15, 22, 28  # of the model it was published for: layers 14 to 21 rank, so layers 15 to 22 hold fewer each


@dataclass(frozen=True)
class AIM(Policy):
    """Layer l holds the share ``max(least, 1 - (l - k + 1) / (end - k + 1))`` of the visual tokens, decided once, at prefill (section 3).

    With 28 layers that is .875 from layer 15 on and an eighth less in each layer, none from layer 22 on: ``max(0, 1 - .125 (l - 13))`` of
    what layer l hands on. Other depths scale k and end [choice]. Tokens are ranked anew in the layer before each, by PageRank: all rows of
    the prompt start alike and hand their weight on by their attention, sharpened by a temperature, ``iterations`` times; importance is the
    root of the mean over heads of the square [code]. Rows of earlier turns of a chat receive and hand on nothing [choice].

    Attributes:
        k: first layer that holds fewer; None: 15 of 28, scaled.
        end: first layer that holds none (or ``least``); None: 22 of 28, scaled.
        least: never fewer than this share.
        temperature: of the attention that weight is handed on by, > 0; iterations: how often.
        num_layers: L, filled by ``bind``.
    """

    k: int | None = None  # type: ignore[assignment]  # an int once bound
    end: int | None = None
    least: float = 0.0
    temperature: float = 0.1
    iterations: int = 5
    num_layers: int | None = field(default=None, repr=False, metadata={"bound": True})

    name: ClassVar[str] = "aim"
    at_decode: ClassVar[bool] = False
    constant: ClassVar[bool] = True
    rescores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k is not None:
            check_k(self.k)
        for name in ("end", "iterations"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if self.end is not None and self.end < (self.k or 1):
            raise ValueError(f"end must not be below k, {self.k or 1}, got {self.end}; it is the first layer that holds none")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        check_fraction("least", self.least, "the share of the visual tokens that every layer holds")
        check_positive("temperature", self.temperature, "of the attention that is ranked by")
        if self.temperature == 0:
            raise ValueError("temperature must be above 0, got 0")

    def bind(self, shape: ModelShape) -> Self:
        first, end = self._range(shape.num_layers)
        check_k_range(first, shape.num_layers)
        if end < first:
            raise ValueError(f"end must be in [k, L], here [{first}, {shape.num_layers}], got {end}; k is the first layer that holds fewer")
        return replace(self, k=first, end=end, num_layers=shape.num_layers)

    def at_strength(self, strength: float, num_layers: int) -> Self:
        """``least = 1 - s``."""
        check_fraction("strength", strength, "how much to prune")
        return replace(self, least=1.0 - strength)

    def layer_groups(self, num_layers: int) -> list[int]:
        first, end = self._range(num_layers)
        starts = [first]
        for layer in range(first + 1, min(end, num_layers - 1) + 1):
            if self._share(layer, first, end) != self._share(layer - 1, first, end):
                starts.append(layer)
        return starts

    @property
    def query_rows(self) -> Literal["pagerank"]:
        return "pagerank"

    @property
    def drops(self) -> bool:
        return self.least < 1

    def kept_bound(self, n_visual: int) -> int:
        if self.num_layers is None:
            return n_visual
        first, end = self._range(self.num_layers)
        return bound_for_rate(n_visual, 1.0 - self._share(first, first, end))

    def decide(self, view: View) -> Decision:
        if self.num_layers is None:
            raise RuntimeError("AIM must be bound to a model first: policy.bind(shape)")
        start = self.layer_groups(self.num_layers)[view.group]
        share = self._share(start, *self._range(self.num_layers))
        rate = torch.full(view.n_visual.shape, 1.0 - share, dtype=torch.float64, device=view.n_visual.device)
        return Decision(rate, ops.keep_count(view.n_visual, rate))

    def _range(self, num_layers: int) -> tuple[int, int]:
        first = max(min(num_layers * _FIRST // _LAYERS, num_layers - 1), 1) if self.k is None else self.k
        return first, max(-(-num_layers * _END // _LAYERS), first) if self.end is None else self.end

    def _share(self, layer: int, first: int, end: int) -> float:
        return max(self.least, 1.0 - (layer - first + 1) / (end - first + 1), 0.0)
