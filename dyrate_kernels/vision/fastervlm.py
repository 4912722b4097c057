"""FasterVLM (arXiv 2412.01818): the tokens that the tower's [CLS] attends to most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dyrate_kernels.vision.base import ATTENTION, Crop, Selector, budget, top


@dataclass(frozen=True)
class FasterVLM(Selector):
    """Top tokens of every crop by [CLS] attention (mean over heads) in the layer that makes the features.

    A tower without [CLS] (SigLIP): by the attention that a token receives from all tokens, mean over rows and heads, which is what
    VisionZip does there [choice].

    Attributes:
        keep: the paper removes 75, 90 or 95 %.
        tokens: the code's ``visual_token_num``.
    """

    keep: float = 0.25

    name: ClassVar[str] = "fastervlm"
    needs: ClassVar[tuple[str, ...]] = (ATTENTION,)

    def choose(self, crops: Sequence[Crop], tiles: tuple[int, int] | None, unit: int) -> list[Tensor]:
        return [top(crop.scores[ATTENTION], budget(len(crop), self.keep, self.tokens)) for crop in crops]
