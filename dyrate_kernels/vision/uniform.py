"""Control: evenly spaced tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dyrate_kernels.vision.base import Crop, Selector, budget, evenly


@dataclass(frozen=True)
class UniformTokens(Selector):
    """Evenly spaced tokens of every crop, in raster order."""

    name: ClassVar[str] = "uniform"

    def choose(self, crops: Sequence[Crop], tiles: tuple[int, int] | None, unit: int) -> list[Tensor]:
        return [evenly(len(crop), budget(len(crop), self.keep, self.tokens), crop.y.device) for crop in crops]
