"""Control: evenly spaced visual tokens at a constant rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dyrate_kernels.policies.base import Decision, View
from dyrate_kernels.policies.fixed import Fixed


@dataclass(frozen=True)
class Uniform(Fixed):
    """Keeps n of the M tokens that can be chosen: the i-th of them iff floor((i+1) n / M) > floor(i n / M).

    Attributes:
        k: first pruned layer.
        rate: fraction removed, in [0, 1].
    """

    name: ClassVar[str] = "uniform"

    def decide(self, view: View) -> Decision:
        decision = super().decide(view)
        token = torch.arange(view.importance.shape[1], device=view.n_visual.device)
        able = token < view.n_visual[:, None]
        if view.alive is not None:  # spread over the survivors: what a constant rate left is kept whole
            able = able & view.alive
        rank = able.cumsum(1)  # 1-based among those that can be chosen
        able_count = rank[:, -1:] if rank.shape[1] else rank.new_zeros(rank.shape[0], 1)
        count = torch.minimum(decision.count[:, None].long(), able_count)
        total = able_count.clamp(min=1)
        chosen = (rank * count).div(total, rounding_mode="floor") > ((rank - 1) * count).div(total, rounding_mode="floor")
        decision.score = (chosen & able).to(torch.float32)
        return decision
