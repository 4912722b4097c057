"""Control: random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.vision.base import Crop, Selector, budget, check_count, top


@dataclass(frozen=True)
class RandomTokens(Selector):
    """A random choice in every crop; the same for the same seed, place in the prompt and size, on every device.

    Attributes:
        seed: of the draw.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("seed", self.seed, "of the draw", least=0)

    def choose(self, crops: Sequence[Crop], tiles: tuple[int, int] | None, unit: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + unit)
        return [
            top(torch.rand(len(crop), generator=generator).to(crop.y.device), budget(len(crop), self.keep, self.tokens)) for crop in crops
        ]
