"""AIM's first half (arXiv 2412.03248): similar tokens merge before the language model. Its second half is the policy ``aim``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.vision.base import FeatureReducer, Reduced, Visual, budget, check_budget
from dyrate_kernels.vision.matching import match, room


@dataclass(frozen=True)
class AIMTokens(FeatureReducer):
    """Rounds of bipartite merging of the projected tokens of each crop or frame, until ``keep`` of them are left (section 3).

    A round matches even places with odd ones by cosine similarity and merges the best pairs, at most all of them: the odd token becomes
    the mean of itself and of the even ones that came to it, all counted alike, whatever they hold already [code]. A merged token keeps the
    odd one's place, and tokens stand in the order of their places (the code moves even tokens that are left over to the front, best match
    first; with its own budgets none are left over) [choice].

    Attributes:
        keep: share of a crop's patches that stays; 25 % in the code.
        tokens: how many of each crop or frame instead.
    """

    keep: float = 0.25
    tokens: int | None = None

    name: ClassVar[str] = "aim"

    def __post_init__(self) -> None:
        check_budget(self.keep, self.tokens)

    @property
    def drops(self) -> bool:
        return self.tokens is not None or self.keep < 1

    def reduce(self, visual: Visual) -> Reduced:
        values, keep = visual.values.clone(), torch.ones_like(visual.patch)
        for crop in visual.crop[visual.patch].unique().tolist():
            patches = (visual.patch & (visual.crop == crop)).nonzero()[:, 0]
            merged, left = merge_rounds(values[patches], budget(patches.shape[0], self.keep, self.tokens))
            values[patches[left]] = merged
            keep[patches] = False
            keep[patches[left]] = True
        return Reduced(values, keep)


def merge_rounds(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merges ``[t, d]`` down to ``count`` tokens. Returns the values left, in order, and their indices int64 ``[count]``."""
    index = torch.arange(values.shape[0], device=values.device)
    while values.shape[0] > count:
        source, target = match(values, min(values.shape[0] - count, room(values.shape[0])))
        total = values.float().index_add(0, target, values[source].float())
        parts = torch.ones(values.shape[0], device=values.device).index_add(0, target, torch.ones_like(target, dtype=torch.float32))
        left = torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
        left[source] = False
        values, index = torch.where(parts[:, None] > 1, (total / parts[:, None]).to(values.dtype), values)[left], index[left]
    return values, index
