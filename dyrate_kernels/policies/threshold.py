"""As many visual tokens as it takes to hold a share of their attention (VisionPulse, arXiv 2605.31457), or those above a quantile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels.policies.base import Decision, Policy, View, bound_for_rate, check_fraction


@dataclass(frozen=True)
class Threshold(Policy):
    """Keeps the smallest set of most attended tokens that holds ``share`` of the visual attention of the step's own row.

    Attributes:
        k: first pruned layer.
        share: of the visual attention mass, in [0, 1]; 0 keeps nothing, 1 all that get any attention.
        quantile: where given, instead: tokens stay whose importance exceeds this quantile of their sequence's (0: all but the least
            attended one where ranks are distinct; ``Fixed`` at nearly the same rate, but fewer stay where many tie).
    """

    share: float = 0.9
    quantile: float | None = None

    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("share", self.share, "the share of the visual attention that is kept")
        if self.quantile is not None:
            check_fraction("quantile", self.quantile, "the quantile of importance that tokens must exceed")

    def at_strength(self, strength: float, num_layers: int) -> Self:
        check_fraction("strength", strength, "how much to prune")
        return replace(self, share=1.0 - strength) if self.quantile is None else replace(self, quantile=float(strength))

    def kept_bound(self, n_visual: int) -> int:
        return n_visual if self.quantile is None else bound_for_rate(n_visual, 0.0)

    def decide(self, view: View) -> Decision:
        real = torch.arange(view.importance.shape[1], device=view.importance.device) < view.n_visual[:, None]
        if view.alive is not None:
            real = real & view.alive[:, : real.shape[1]]
        importance = view.importance.detach().double().nan_to_num(0.0).masked_fill(~real, 0.0)
        count = (_above(importance, real, self.quantile) if self.quantile is not None else _holding(importance, self.share)).to(torch.int32)
        rate = 1.0 - count.double() / view.n_visual.clamp(min=1)
        return Decision(torch.where(view.n_visual > 0, rate, 0.0), count)


def _holding(importance: Tensor, share: float) -> Tensor:
    """The size of the smallest set of highest values whose sum reaches ``share`` of the total: int64 ``[B]``."""
    running = importance.sort(dim=1, descending=True).values.cumsum(1)
    wanted = share * importance.sum(1, keepdim=True) * (1 - 1e-9)  # sums in another order differ in the last digits
    return ((running < wanted).sum(1) + (wanted[:, 0] > 0)).clamp(max=importance.shape[1])


def _above(importance: Tensor, real: Tensor, quantile: float) -> Tensor:
    """Returns how many of the real values exceed their ``quantile`` (the value of rank ``ceil(q n)``): int64 ``[B]``."""
    number = real.sum(1)
    ascending = importance.masked_fill(~real, float("inf")).sort(dim=1).values
    rank = ((number * quantile).ceil().long() - 1).clamp(min=0)
    if importance.shape[1] == 0:
        return number
    limit = ascending.gather(1, rank[:, None])
    return (real & (importance > limit)).sum(1)
