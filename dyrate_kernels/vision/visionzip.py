"""VisionZip (arXiv 2412.04467): the tokens that [CLS] attends to most stay; the others are merged into a few contextual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.vision.base import ATTENTION, KEYS, Merged, TowerFeatures, TowerMerger, budget, check_share


@dataclass(frozen=True)
class VisionZip(TowerMerger):
    """Per crop: of a budget of n tokens, ``round(dominant * n)`` are dominant ([CLS] among them), the rest contextual.

    Dominant: most [CLS] attention (sum over heads) in the layer that makes the features, and [CLS] itself where the tower has one.
    Contextual: of the other tokens every ``m // contextual``-th is a target; each of the rest goes to the target of highest cosine
    similarity of keys (mean over heads); a contextual token is the target plus the mean of what came to it [code]. In the language model
    [CLS] comes first, then the dominant ones, then the contextual ones [code]. A tower without [CLS] (SigLIP): attention received from all
    tokens, mean, and no [CLS] (paper, section 3).

    Attributes:
        keep: share of a crop's patches, [CLS] counted; 64 of 576 in the paper (also 128 and 192).
        dominant: share of dominant tokens: 54 of 64.
    """

    keep: float = 64 / 576
    dominant: float = 54 / 64

    name: ClassVar[str] = "visionzip"
    needs: ClassVar[tuple[str, ...]] = (ATTENTION, KEYS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("dominant", self.dominant, "the share of the budget that is dominant tokens")

    def merge(self, tower: TowerFeatures) -> Merged:
        features, attention, keys = tower.features, tower.scores[ATTENTION], tower.scores[KEYS]
        crops, tokens, _ = features.shape
        device = features.device
        total = budget(tokens, self.keep, self.tokens)
        keep = torch.ones(crops, tokens, dtype=torch.bool, device=device)
        if total >= tokens:
            return Merged(features, keep)
        has_cls = tower.cls is not None
        dominant = min(max(int(self.dominant * total + 0.5), 1), total)
        contextual = total - dominant
        patches = dominant - has_cls  # [CLS] is one of the dominant tokens
        order = attention.float().argsort(dim=1, descending=True, stable=True)
        keep = torch.zeros_like(keep).scatter_(1, order[:, :patches], True)
        order_key = torch.zeros(crops, tokens, dtype=torch.int64, device=device)
        rest = (~keep).nonzero()[:, 1].view(crops, tokens - patches)
        features = features.clone()
        is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=device)
        if contextual:
            is_target[torch.arange(0, rest.shape[1], max(rest.shape[1] // contextual, 1), device=device)[:contextual]] = True
            target, other = rest[:, is_target], rest[:, ~is_target]
            values = _contextual(features, keys, target, other)
            features.scatter_(1, target[..., None].expand_as(values), values)
            keep.scatter_(1, target, True)
            order_key.scatter_(1, target, 1)
        if tower.cls is not None:  # it takes the place of a token that goes
            spare = rest[:, ~is_target][:, :1]
            features.scatter_(1, spare[..., None].expand(-1, -1, features.shape[2]), tower.cls[:, None].to(features.dtype))
            keep.scatter_(1, spare, True)
            order_key.scatter_(1, spare, -1)
        return Merged(features, keep, order_key)


def _contextual(features: Tensor, keys: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """``[C, targets, D]``: each target plus the mean of the other tokens whose keys are nearest to its own."""

    def pick(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2])).float()

    keys = torch.nn.functional.normalize(keys.float(), dim=-1)
    nearest = (pick(keys, other) @ pick(keys, target).transpose(1, 2)).argmax(2)
    one_hot = torch.nn.functional.one_hot(nearest, target.shape[1]).float()
    mean = one_hot.transpose(1, 2) @ pick(features, other) / one_hot.sum(1).clamp(min=1)[..., None]
    return (pick(features, target) + mean).to(features.dtype)
