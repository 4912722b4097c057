"""ST3 (arXiv 2412.20105): visual tokens shrink with depth and with the number of generated tokens, along a hand-made curve."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels import ops
from dyrate_kernels.policies.base import Decision, ModelShape, Policy, View, bound_for_rate, check_count, check_fraction, check_rate


@dataclass(frozen=True)
class ST3(Policy):
    """Retained fraction of layer l at step t: ``(1 - rate - growth d(l)) * max(least, 1 - (1 - least) t / horizon)``.

    ``d(l)`` grows linearly from 0 at layer k to 1 at the last layer, in ``stages`` equal steps. The source anneals both ways by hand; the
    shape of the curve and its numbers are options here [choice].

    Attributes:
        k: first pruned layer.
        rate: fraction removed at layer k in the first step.
        growth: fraction removed in addition at the last layer.
        least: what is left, after ``horizon`` steps, of the fraction that the first step retains.
        horizon: steps until then.
        stages: groups of layers that share one kept set.
        num_layers: L, filled by ``bind``.
    """

    rate: float = 0.25
    growth: float = 0.25
    least: float = 0.25
    horizon: int = 64
    stages: int = 3
    num_layers: int | None = field(default=None, repr=False, metadata={"bound": True})

    name: ClassVar[str] = "st3"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self.rate)
        check_fraction("growth", self.growth, "the fraction removed in addition at the last layer")
        check_fraction("least", self.least, "what is left after horizon steps")
        check_count("horizon", self.horizon, "steps until least is reached")
        check_count("stages", self.stages, "groups of layers that share one kept set")

    def bind(self, shape: ModelShape) -> Self:
        super().bind(shape)
        return replace(self, num_layers=shape.num_layers)

    @property
    def drops(self) -> bool:
        return self.rate > 0 or self.growth > 0 or self.least < 1

    def at_strength(self, strength: float, num_layers: int) -> Self:
        check_fraction("strength", strength, "how much to prune")
        return replace(self, rate=float(strength), growth=min(self.growth, 1.0 - strength))

    def layer_groups(self, num_layers: int) -> list[int]:
        depth = num_layers - self.k
        stages = min(self.stages, depth)
        return [self.k + depth * stage // stages for stage in range(stages)]

    def retained(self, num_layers: int) -> list[float]:
        """Fraction that each group of layers retains in the first step."""
        stages = len(self.layer_groups(num_layers))
        return [max(1.0 - self.rate - self.growth * stage / max(stages - 1, 1), 0.0) for stage in range(stages)]

    def kept_bound(self, n_visual: int) -> int:
        return bound_for_rate(n_visual, self.rate)

    def start(self, n_visual: Tensor) -> dict[str, Tensor]:
        layers = self.num_layers
        if layers is None:
            raise RuntimeError("ST3 must be bound to a model first: policy.bind(shape)")
        firsts = [*self.layer_groups(layers), layers]
        sizes = [(after - first) / (layers - self.k) for first, after in zip(firsts, firsts[1:], strict=False)]
        batch, device = n_visual.shape[0], n_visual.device
        retained, sizes_ = (torch.tensor(values, dtype=torch.float64) for values in (self.retained(layers), sizes))
        return {"retained": retained.to(device).repeat(batch, 1), "sizes": sizes_.to(device).repeat(batch, 1)}

    def decide(self, view: View) -> Decision:
        passed = (view.step.double() / self.horizon).clamp(max=1.0)
        retained = view.state["retained"] * (1.0 - (1.0 - self.least) * passed)[:, None]  # [B, G]
        count = ops.keep_count(view.n_visual.repeat(retained.shape[1]), (1.0 - retained).t().flatten())
        rate = ((1.0 - retained) * view.state["sizes"]).sum(1).clamp(0.0, 1.0)
        return Decision(rate, count.view(retained.shape[1], -1))
