"""Control: the grid of patches at a lower resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.vision.base import FeatureReducer, Reduced, Visual, check_share


@dataclass(frozen=True)
class Downsample(FeatureReducer):
    """Averages the projected tokens over the cells of a coarser grid: ``round(side * sqrt(keep))`` cells on each side, at least one.

    The grid is that of a crop or frame, and of all tiles joined, whose rows each keep one newline. A cell spans the patches from
    ``floor(i n / m)`` to ``ceil((i + 1) n / m)``, as in adaptive pooling, and stands where its first patch stood.

    Attributes:
        keep: share of the tokens that stays, but for rounding.
    """

    keep: float = 0.25

    name: ClassVar[str] = "downsample"
    first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("keep", self.keep, "the share of the visual tokens that stays")

    @property
    def drops(self) -> bool:
        return self.keep < 1

    def reduce(self, visual: Visual) -> Reduced:
        values, keep = visual.values.clone(), torch.ones_like(visual.patch)
        for segment in visual.segment[visual.patch].unique().tolist():
            inside = visual.segment == segment
            patches = (inside & visual.patch).nonzero()[:, 0]
            height, width = int(visual.y[patches].max()) + 1, int(visual.x[patches].max()) + 1
            smaller = [max(int(side * math.sqrt(self.keep) + 0.5), 1) for side in (height, width)]
            pooled, first = pool(values[patches].view(height, width, -1), smaller[0], smaller[1])
            keep[patches] = False
            keep[patches[first]] = True
            values[patches[first]] = pooled.to(values.dtype)
            row_starts = torch.zeros(height, dtype=torch.bool, device=values.device)
            row_starts[first // width] = True
            newline = inside & (visual.crop < 0) & (visual.y >= 0)
            keep[newline] = row_starts[visual.y[newline]]
        return Reduced(values, keep)


def pool(grid: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Averages ``[h, w, d]`` over ``height x width`` cells: values ``[height * width, d]``, and the index of each cell's first, int64."""
    h, w, _ = grid.shape
    if (height, width) == (h, w):
        return grid.flatten(0, 1), torch.arange(h * w, device=grid.device)
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid.permute(2, 0, 1).float(), (height, width))
    first = torch.tensor([y * h // height * w + x * w // width for y in range(height) for x in range(width)], device=grid.device)
    return pooled.flatten(1).T, first
