"""Recycling: while the generation is uncertain, pruned tokens are brought back (docs/methods/recycle.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.policies.base import check_fraction, check_positive
from dyrate_kernels.policies.wrapper import Wrapper


@dataclass(frozen=True)
class Recycle(Wrapper):
    """After a step whose next-token distribution has an entropy above ``entropy`` (nats), the next step brings back ``share`` of the
    tokens that the wrapped policy drops there, the highest ranked ones. The numbers are [choice].

    Attributes:
        k: first pruned layer; None: the wrapped policy's.
        policy: the wrapped policy, or its registry name.
        entropy: in nats, 0 or more.
        share: in [0, 1]; 1 brings all of them back.
    """

    entropy: float = 0.5
    share: float = 0.5

    name: ClassVar[str] = "recycle"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("entropy", self.entropy, "nats above which a step is uncertain")
        check_fraction("share", self.share, "of the dropped tokens that come back")

    @property
    def reads_logits(self) -> bool:
        return True

    def see_logits(self, logits: Tensor, state: dict[str, Tensor]) -> None:
        likely = logits.detach().float().log_softmax(-1)
        entropy = -(likely.exp() * likely.masked_fill(likely == float("-inf"), 0.0)).sum(-1)
        unsure = ~(entropy <= self.entropy)  # NaN is unsure
        state["relief"].copy_(torch.where(unsure.to(state["relief"].device), float(self.share), 0.0))
