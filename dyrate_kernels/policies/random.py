"""Control: random visual tokens at a constant rate, as many as the method it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.policies.base import Decision, View
from dyrate_kernels.policies.fixed import Fixed


@dataclass(frozen=True)
class Random(Fixed):
    """Scores are a hash of (seed, step, token index): no generator, the same in every run and for every row of a
    batch, new at each step.

    Attributes:
        k: first pruned layer.
        rate: fraction removed, in [0, 1].
        seed: integer in [0, 2**32).
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, Integral):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")

    def decide(self, view: View) -> Decision:
        decision = super().decide(view)
        decision.score = self.scores(view.step, view.importance.shape[1])
        return decision

    def scores(self, step: Tensor, tokens: int) -> Tensor:
        """Scores float32 ``[B, tokens]`` of a step int64 ``[B]``."""
        token = torch.arange(tokens, device=step.device)
        stream = mix(mix(step + int(self.seed)) ^ int(self.seed))
        return (mix(stream[:, None] + token) >> 8).to(torch.float32)  # 24 bits: exactly what a float32 holds


def mix(value: Tensor) -> Tensor:
    """A bijective hash of 32-bit words held in int64 (no product here leaves 63 bits, so no backend's overflow
    matters).
    """
    value = value & 0xFFFFFFFF
    for _ in range(2):
        value = ((value ^ (value >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return value ^ (value >> 16)
