"""KL guard: now and then a pruned step is compared with the unpruned one, and the rate follows (docs/methods/klguard.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels.policies.base import check_count, check_fraction, check_positive
from dyrate_kernels.policies.wrapper import Wrapper


@dataclass(frozen=True)
class KLGuard(Wrapper):
    """Every ``every``-th decode step runs once more with all visual tokens. Where KL(unpruned, pruned) of the next token exceeds ``limit``
    nats, the rate is multiplied by ``1 - back`` from the next step on; where it does not, a share ``regain`` of what was taken off the
    wrapped policy's rate is put on again: little, since a check that passes says nothing about a higher rate.

    The unpruned distribution, which is at hand then, is the step's result. Such a step costs an unpruned one on top of the pruned one;
    ``stats()`` counts both. The numbers are [choice].

    Attributes:
        k: first pruned layer; None: the wrapped policy's.
        policy: the wrapped policy, or its registry name.
        every: decode steps from one check to the next; at least 1.
        limit: nats, 0 or more.
        back: in [0, 1]: the share of the dropped tokens that a failed check brings back.
        regain: in [0, 1]: the share of the relief that a passed check takes back.
    """

    every: int = 8
    limit: float = 0.05
    back: float = 0.5
    regain: float = 0.1

    name: ClassVar[str] = "klguard"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("every", self.every, "decode steps from one check to the next")
        check_positive("limit", self.limit, "nats above which the rate is lowered")
        check_fraction("back", self.back, "the share of the dropped tokens that a failed check brings back")
        check_fraction("regain", self.regain, "the share of the relief that a passed check takes back")

    @property
    def reads_logits(self) -> bool:
        return True

    def at_strength(self, strength: float, num_layers: int) -> Self:
        """The wrapped policy at this strength, and ``limit * s / (1 - s)``: the guard gives way, or it would undo the stronger pruning."""
        looser = strength / (1.0 - strength) if strength < 1 else math.inf
        return replace(super().at_strength(strength, num_layers), limit=self.limit * looser if self.limit else 0.0)

    def checks(self, step: int) -> bool:
        return step % self.every == 0

    def see_unpruned(self, pruned: Tensor, unpruned: Tensor, state: dict[str, Tensor]) -> None:
        q, p = pruned.detach().double().log_softmax(-1), unpruned.detach().double().log_softmax(-1)
        divergence = torch.where(p == float("-inf"), 0.0, p.exp() * (p - q)).sum(-1).to(state["relief"].device)
        relief = state["relief"]
        more, less = relief + (1.0 - relief) * self.back, relief * (1.0 - self.regain)
        relief.copy_(torch.where(divergence <= self.limit, less, more))  # NaN is no pass
