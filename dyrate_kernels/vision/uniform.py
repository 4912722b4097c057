"""Control: evenly spaced tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.spacing import evenly_spaced
from dyrate_kernels.vision.base import Crop, Selector, budget


@dataclass(frozen=True)
class UniformTokens(Selector):
    """Evenly spaced tokens of every crop, in raster order."""

    name: ClassVar[str] = "uniform"

    def choose(self, crops: Sequence[Crop], tiles: tuple[int, int] | None, unit: int) -> list[Tensor]:
        chosen = []
        for crop in crops:
            every = torch.ones(1, len(crop), dtype=torch.bool, device=crop.y.device)
            count = torch.tensor([budget(len(crop), self.keep, self.tokens)], device=every.device)
            chosen.append(evenly_spaced(count, every)[0])
        return chosen
