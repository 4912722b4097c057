"""Control: evenly spaced visual tokens at a constant rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.policies.base import Decision, View
from dyrate_kernels.policies.fixed import Fixed
from dyrate_kernels.spacing import evenly_spaced


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
        decision.score = evenly_spaced(decision.count, able_tokens(view)).to(torch.float32)
        return decision


def able_tokens(view: View) -> Tensor:
    """bool ``[B, N]``: the tokens that can be chosen."""
    able = torch.arange(view.importance.shape[1], device=view.n_visual.device) < view.n_visual[:, None]
    return able if view.alive is None else able & view.alive[:, : able.shape[1]]
