"""DivPrune (arXiv 2503.02175): the most diverse subset. From the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.vision.base import FeatureReducer, Reduced, Visual, budget, check_budget


@dataclass(frozen=True)
class DivPrune(FeatureReducer):
    """Greedy max-min diversity of a picture's or video's projected tokens, with cosine distance (section 3).

    The first token is the one whose nearest neighbour is farthest; then, again and again, the one farthest from its nearest chosen token.
    Ties go to the smaller index.

    Attributes:
        keep: share that stays; 9.8 % in the paper.
        tokens: how many of each picture or video instead.
    """

    keep: float = 0.098
    tokens: int | None = None

    name: ClassVar[str] = "divprune"

    def __post_init__(self) -> None:
        check_budget(self.keep, self.tokens)

    @property
    def drops(self) -> bool:
        return self.tokens is not None or self.keep < 1

    def reduce(self, visual: Visual) -> Reduced:
        patches = visual.patch.nonzero()[:, 0]
        count = budget(patches.shape[0], self.keep, self.tokens)
        keep = torch.ones_like(visual.patch)
        if count < patches.shape[0]:
            keep[patches] = False
            keep[patches[most_diverse(visual.values[patches], count)]] = True
        return Reduced(visual.values, keep)


def most_diverse(values: Tensor, count: int) -> Tensor:
    """int64 ``[count]``: indices of the chosen ones of ``values`` ``[n, d]``, in the order of the choice. Nothing is read on the host."""
    unit = torch.nn.functional.normalize(values.float(), dim=-1)
    distance = 1 - unit @ unit.T
    to_others = distance.clone()
    to_others.fill_diagonal_(float("inf"))
    chosen = [to_others.amin(1).argmax()]
    nearest = torch.full((values.shape[0],), float("inf"), device=values.device)
    taken = torch.zeros(values.shape[0], dtype=torch.bool, device=values.device)
    for _ in range(count - 1):
        taken = taken.index_fill(0, chosen[-1][None], True)
        nearest = torch.minimum(nearest, distance.index_select(0, chosen[-1][None])[0])
        chosen.append(nearest.masked_fill(taken, float("-inf")).argmax())
    return torch.stack(chosen)
