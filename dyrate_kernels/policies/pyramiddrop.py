"""PyramidDrop (arXiv 2410.17247): at the end of each stage of layers a fixed share of the visual tokens goes, ranked anew."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from typing_extensions import Self

from dyrate_kernels import ops
from dyrate_kernels.policies.base import (
    Decision,
    ModelShape,
    Policy,
    View,
    bound_for_rate,
    check_count,
    check_fraction,
    check_k,
    check_k_range,
)


@dataclass(frozen=True)
class PyramidDrop(Policy):
    """Stage s of S keeps ``keep^s`` of the visual tokens: by default .5, .25 and .125 from layers L/4, L/2 and 3L/4 on.

    The ranking is the last prompt row's attention in the layer before the stage. The source computes it once more in the stage's first
    layer, for all tokens, before it drops them; here it falls off from the attention that ran [choice].

    Attributes:
        k: first pruned layer; None: a quarter of the layers.
        keep: share of its tokens that a stage hands on.
        stages: S; the layers from k on are divided among them.
        num_layers: L, filled by ``bind``.
    """

    k: int | None = None  # type: ignore[assignment]  # an int once bound
    keep: float = 0.5
    stages: int = 3
    num_layers: int | None = field(default=None, repr=False, metadata={"bound": True})

    name: ClassVar[str] = "pyramiddrop"
    at_decode: ClassVar[bool] = False
    constant: ClassVar[bool] = True
    rescores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k is not None:
            check_k(self.k)
        check_fraction("keep", self.keep, "the share of its visual tokens that a stage hands on")
        check_count("stages", self.stages, "groups of layers, each with fewer tokens than the one before")

    def bind(self, shape: ModelShape) -> Self:
        first = self._first(shape.num_layers)
        bound = replace(self, k=first, num_layers=shape.num_layers)
        check_k_range(first, shape.num_layers)
        return bound

    def at_strength(self, strength: float, num_layers: int) -> Self:
        check_fraction("strength", strength, "how much to prune")
        return replace(self, keep=1.0 - strength)

    def layer_groups(self, num_layers: int) -> list[int]:
        first = self._first(num_layers)
        stages = min(self.stages, num_layers - first)
        return [first + (num_layers - first) * stage // stages for stage in range(stages)]

    @property
    def drops(self) -> bool:
        return self.keep < 1

    def kept_bound(self, n_visual: int) -> int:
        return bound_for_rate(n_visual, 1.0 - self.keep)

    def decide(self, view: View) -> Decision:
        rate = torch.full(view.n_visual.shape, 1.0 - self.keep ** (view.group + 1), dtype=torch.float64, device=view.n_visual.device)
        return Decision(rate, ops.keep_count(view.n_visual, rate))

    def _first(self, num_layers: int) -> int:
        return max(num_layers // 4, 1) if self.k is None else self.k
