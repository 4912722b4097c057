"""Depth-based prune (DP): the deeper the layer, the fewer visual tokens it keeps; decided at prefill."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels import ops
from dyrate_kernels.policies.base import Decision, ModelShape, Policy, View, bound_for_rate, check_fraction


@dataclass(frozen=True)
class Depth(Policy):
    """Layer l keeps the fraction ``1 - H(l-k) P4 - H(l-k) R'(l)``, H the Heaviside step with H(0) = 1, clamped to
    [0, 1].

    The source leaves P4 and R' open. Here [choice] P4 is ``prune`` and R' grows linearly with depth, from
    0 at layer k to ``growth`` at the last layer, so a deeper layer never keeps a token that a shallower one dropped.

    Attributes:
        k: first pruned layer (4 in the source).
        prune: fraction removed at layer k, in [0, 1].
        growth: fraction removed in addition at the last layer, in [0, 1].
        num_layers: L, filled by ``bind``.
    """

    k: int = 4
    prune: float = 0.5
    growth: float = 0.25
    num_layers: int | None = field(default=None, repr=False, metadata={"bound": True})

    name: ClassVar[str] = "depth"
    at_decode: ClassVar[bool] = False
    constant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("prune", self.prune, "the fraction removed at layer k")
        check_fraction("growth", self.growth, "the fraction removed in addition at the last layer")

    def bind(self, shape: ModelShape) -> Self:
        super().bind(shape)
        return replace(self, num_layers=shape.num_layers)

    @property
    def drops(self) -> bool:
        return self.prune > 0 or self.growth > 0

    def rates(self, num_layers: int) -> list[float]:
        """Fraction removed in each of the ``num_layers`` layers."""
        deeper = max(num_layers - 1 - self.k, 1)
        pruned = [min(self.prune + self.growth * step / deeper, 1.0) for step in range(num_layers - self.k)]
        return [0.0] * min(self.k, num_layers) + pruned

    def at_strength(self, strength: float, num_layers: int) -> Self:
        check_fraction("strength", strength, "how much to prune")
        return replace(self, prune=float(strength), growth=min(self.growth, 1.0 - strength))

    def layer_groups(self, num_layers: int) -> list[int]:
        rates = self.rates(num_layers)
        rest = range(self.k + 1, num_layers)
        return [self.k, *(layer for layer in rest if rates[layer] != rates[layer - 1])]

    def kept_bound(self, n_visual: int) -> int:
        return bound_for_rate(n_visual, self.prune)

    def start(self, n_visual: Tensor) -> dict[str, Tensor]:
        layers = self.num_layers
        if layers is None:
            raise RuntimeError("Depth must be bound to a model first: policy.bind(shape)")
        rates = self.rates(layers)
        groups = torch.tensor([rates[first] for first in self.layer_groups(layers)], dtype=torch.float64)
        mean = torch.tensor(sum(rates[self.k :]) / (layers - self.k), dtype=torch.float64)
        batch = n_visual.shape[0]
        return {
            "rates": groups.to(n_visual.device).repeat(batch, 1),
            "mean_rate": mean.to(n_visual.device).repeat(batch),
        }

    def decide(self, view: View) -> Decision:
        rates = view.state["rates"].t()  # [G, B]
        count = ops.keep_count(view.n_visual.repeat(rates.shape[0]), rates.flatten())
        return Decision(view.state["mean_rate"].clone(), count.view(rates.shape))
