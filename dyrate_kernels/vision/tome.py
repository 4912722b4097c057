"""ToMe (arXiv 2210.09461): tokens merge inside the tower, a few in every layer. From the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.vision.base import Reducer, budget, check_budget
from dyrate_kernels.vision.matching import match, room


@dataclass(frozen=True)
class ToMe(Reducer):
    """In each layer, between attention and MLP, r pairs of tokens merge (section 3): those whose keys, mean over heads, are most alike by
    bipartite soft matching. A merged token is the mean of its patches (weighted by how many each part stands for), and attention adds
    ``log(size)`` to the logits of its keys (proportional attention). [CLS] never merges.

    r is constant over the layers that the features come from, but for rounding (earlier layers merge one more). A merged token stands
    where the first of its patches stood; ``source`` in :class:`Merging` tells which patches it holds.

    Attributes:
        keep: share of a crop's patches that comes out of the tower [choice]; the paper gives r.
        tokens: how many of each crop or frame instead.
    """

    keep: float = 0.5
    tokens: int | None = None

    name: ClassVar[str] = "tome"
    first: ClassVar[bool] = True
    in_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_budget(self.keep, self.tokens)

    @property
    def drops(self) -> bool:
        return self.tokens is not None or self.keep < 1

    @property
    def reads_tower(self) -> bool:
        return True

    def plan(self, patches: int, layers: int) -> list[int]:
        """Pairs to merge in each of ``layers`` layers; never more than half of what is left (section 3)."""
        left, plan = patches, []
        target = budget(patches, self.keep, self.tokens)
        for layer in range(layers):
            share = -(-(left - target) // (layers - layer))
            plan.append(max(min(share, left // 2), 0))
            left -= plan[-1]
        return plan


class Merging:
    """The tokens of one pass of a tower.

    Args:
        crops, tokens: the size of the pass, with [CLS] where there is one.
        protected: 1 with [CLS] in front, else 0.
        device: of the tower.

    Attributes:
        size: float32 ``[C, t]``, how many tokens each one stands for.
        first: int64 ``[C, t]``, the first original token of each one, ascending.
        source: int64 ``[C, tokens]``, which present token (0..t-1) each original one is part of.
    """

    def __init__(self, crops: int, tokens: int, protected: int, device: torch.device) -> None:
        self.protected = protected
        self.size = torch.ones(crops, tokens, device=device)
        self.first = torch.arange(tokens, device=device).repeat(crops, 1)
        self.source = self.first.clone()

    def bias(self, dtype: torch.dtype) -> Tensor:
        """``[C, 1, 1, t]``, what proportional attention adds to the logits."""
        return self.size.log().to(dtype)[:, None, None]

    def merge(self, hidden: Tensor, keys: Tensor, r: int) -> Tensor:
        """Merges ``r`` pairs: hidden ``[C, t, D]`` -> ``[C, t - r, D]``, by keys ``[C, t, E]``."""
        crops, tokens, width = hidden.shape
        r = min(r, room(tokens, self.protected))
        if r <= 0:
            return hidden
        source, target = match(keys, r, self.protected)
        to = torch.arange(tokens, device=hidden.device).repeat(crops, 1).scatter(1, source, target)
        size = torch.zeros_like(self.size).scatter_add(1, to, self.size)
        weighted = hidden.float() * self.size[..., None]
        total = torch.zeros_like(weighted).scatter_add(1, to[..., None].expand_as(weighted), weighted)
        mean = torch.where(size[..., None] == self.size[..., None], hidden, (total / size.clamp(min=1)[..., None]).to(hidden.dtype))
        first = torch.full_like(self.first, self.source.shape[1]).scatter_reduce(1, to, self.first, "amin")
        stays = torch.ones_like(to, dtype=torch.bool).scatter(1, source, False)
        # by the first patch, so that set A and B alternate over the picture and [CLS] stays in front
        order = first.masked_fill(~stays, self.source.shape[1] + 1).argsort(dim=1, stable=True)[:, : tokens - r]
        new = torch.empty_like(to).scatter_(1, order, torch.arange(tokens - r, device=hidden.device).expand(crops, -1))
        self.source = new.gather(1, to).gather(1, self.source)
        self.size, self.first = size.gather(1, order), first.gather(1, order)
        return mean.gather(1, order[..., None].expand(-1, -1, width))
