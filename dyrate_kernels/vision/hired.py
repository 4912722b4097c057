"""HiRED (arXiv 2408.10945): one budget for a picture and its tiles, shared out by where the tower's [CLS] looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.vision.base import ATTENTION, ATTENTION_FIRST, Crop, Selector, check_share, top


@dataclass(frozen=True)
class HiRED(Selector):
    """Total budget ``int(crops * T * keep)``; the whole picture gets ``int(alpha * total)`` (at most T) of it, the tiles share the rest.

    A tile's share is the part of the whole picture's ``int((1 - alpha) T)`` tokens with most [CLS] attention in layer 0 that lies in it
    (paper, section 4; rounded down). In each crop the tokens with most [CLS] attention in the layer that makes the features stay (22 of
    24 in the paper). A picture without tiles keeps ``int(T * keep)``.

    The code counts a tile's tokens in runs of the flattened picture rather than in the tile's quadrant; here it is the quadrant, as in the
    paper. A tower without [CLS] (SigLIP): attention received from all tokens [choice].

    Attributes:
        keep: the paper's token budget, .2 (or .1, .4).
        tokens: must be None; the budget is that of all crops together.
        alpha: share of the whole picture.
    """

    keep: float = 0.2
    alpha: float = 0.5

    name: ClassVar[str] = "hired"
    needs: ClassVar[tuple[str, ...]] = (ATTENTION, ATTENTION_FIRST)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None:
            raise ValueError(f"tokens must be None: hired shares one budget among the crops, which keep says; got {self.tokens!r}")
        check_share("alpha", self.alpha, "the whole picture's share of the budget")

    def choose(self, crops: Sequence[Crop], tiles: tuple[int, int] | None, unit: int) -> list[Tensor]:
        if self.keep == 1:
            return [torch.ones(len(crop), dtype=torch.bool, device=crop.y.device) for crop in crops]
        base = crops[0]
        total = int(sum(len(crop) for crop in crops) * self.keep + 1e-6)
        if tiles is None or len(crops) == 1:
            return [top(crop.scores[ATTENTION], max(int(len(crop) * self.keep + 1e-6), 1)) for crop in crops]
        whole = min(max(int(total * self.alpha + 1e-6), 1), len(base))
        rest = max(total - whole, 0)
        chosen = [top(base.scores[ATTENTION], whole)]
        looked_at = top(base.scores[ATTENTION_FIRST], int(len(base) * (1 - self.alpha) + 1e-6))
        down, across = tiles
        tile = (base.y * down // base.height) * across + base.x * across // base.width
        share = torch.bincount(tile[looked_at], minlength=down * across).tolist()
        for crop, part in zip(crops[1:], share, strict=True):
            count = int(part / max(sum(share), 1) * rest + 1e-6)
            chosen.append(top(crop.scores[ATTENTION], min(count, len(crop))))
        return chosen
