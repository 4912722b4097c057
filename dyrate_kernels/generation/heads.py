"""Tensor parallelism: each process attends with a share of the heads, and all of them keep the same visual tokens.

What decides, mass and importance, is of all heads: it is gathered from all processes at each layer that decides, in one collective, and
summed in the same order everywhere. So every process decides on the same numbers, bit for bit, and no decision needs to be sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class HeadShards:
    """The processes that share a model's heads, in the order of their heads.

    Attributes:
        group: their process group.
        size: how many they are.
    """

    group: Any
    size: int

    def statistics(self, mass: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Of all heads: mass ``[.., Hq / size, 4]`` -> ``[.., Hq, 4]``; importance ``[.., N]``, the mean over these heads -> over all."""
        parts = self._gather(mass if importance is None else torch.cat([mass.flatten(), importance.flatten().to(mass.dtype)]))
        masses = torch.cat([part[: mass.numel()].view_as(mass) for part in parts], dim=-2)
        if importance is None:
            return masses, None
        return masses, self._mean([part[mass.numel() :].view_as(importance) for part in parts]).to(importance.dtype)

    def mean(self, importance: Tensor) -> Tensor:
        """The mean over this process's heads -> over all."""
        return self._mean([part.view_as(importance) for part in self._gather(importance)])

    def root_mean_square(self, importance: Tensor) -> Tensor:
        """Likewise of a root of a mean of squares."""
        return self.mean(importance.square()).sqrt()

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """``tensor``, flat, of every process, in their order."""
        flat = tensor.contiguous().view(-1)
        out = flat.new_empty(self.size * flat.numel())
        dist.all_gather_into_tensor(out, flat, group=self.group)
        return list(out.view(self.size, -1))

    def _mean(self, parts: list[Tensor]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total / self.size
