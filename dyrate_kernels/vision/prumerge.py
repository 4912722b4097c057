"""LLaVA-PruMerge (arXiv 2403.15388): as many tokens as [CLS] attends to unusually much, each with its nearest neighbours merged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels.vision.base import WHOLE_ATTENTION, WHOLE_KEYS, Merged, TowerFeatures, TowerMerger, budget, check_count, check_share


@dataclass(frozen=True)
class PruMerge(TowerMerger):
    """Per crop, with [CLS] attention and keys of the layer that reads the features (the last one), all heads taken as one [code]:

    - How many stay (section 3): those above ``Q3 + 1.5 (Q3 - Q1)`` of the attention, at least one; or ``keep`` of them.
    - PruMerge+ (``plus``): besides, evenly spaced tokens, every third of ``int(1 / ratio)``, as in the code.
    - Merging (section 3): a token that stays becomes itself plus the attention-weighted sum of its ``neighbours`` nearest tokens by
      cosine similarity of keys; what stays and what goes are both candidates [code].
    - One more token: the attention-weighted sum of all that go [code].

    Tokens stand in raster order, the one more token last; the code sorts them by attention [choice]. Where nothing goes, nothing is
    merged. A tower without [CLS] (SigLIP): attention received from all tokens, mean [choice].

    Attributes:
        keep: None: by the outliers; a number: this share.
        plus: PruMerge+.
        neighbours: tokens merged into each one.
    """

    keep: float | None = None  # type: ignore[assignment]  # None: the method finds its own
    plus: bool = False
    neighbours: int = 32

    name: ClassVar[str] = "prumerge"
    needs: ClassVar[tuple[str, ...]] = (WHOLE_ATTENTION, WHOLE_KEYS)

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_share("keep", self.keep, "the share of the visual tokens that stays; None: by the outliers")
        if self.tokens is not None:
            check_count("tokens", self.tokens, "how many visual tokens of each crop or frame stay")
        if not isinstance(self.plus, bool):
            raise TypeError(f"plus must be True or False, got {self.plus!r}")
        check_count("neighbours", self.neighbours, "tokens merged into each one")

    @property
    def drops(self) -> bool:
        return self.tokens is not None or self.keep is None or self.keep < 1

    def merge(self, tower: TowerFeatures) -> Merged:
        features = tower.features.clone()
        keep = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        order = torch.zeros(features.shape[:2], dtype=torch.int64, device=features.device)
        for crop in range(features.shape[0]):
            attention, keys = tower.scores[WHOLE_ATTENTION][crop].float(), tower.scores[WHOLE_KEYS][crop].float()
            keep[crop] = self._chosen(attention)
            if bool(keep[crop].all()):
                continue
            self._merge_one(features[crop], attention, keys, keep[crop], order[crop])
        return Merged(features, keep, order)

    def _chosen(self, attention: Tensor) -> Tensor:
        tokens = attention.shape[0]
        if self.keep is None and self.tokens is None:
            low, high = (torch.quantile(attention.double(), share) for share in (0.25, 0.75))
            count = max(int((attention.double() > high + 1.5 * (high - low)).sum()), 1)
        else:
            count = budget(tokens, 1.0 if self.keep is None else self.keep, self.tokens)
        chosen = torch.zeros(tokens, dtype=torch.bool, device=attention.device)
        chosen[attention.argsort(descending=True, stable=True)[:count]] = True
        if self.plus:
            chosen[:: max(int(tokens / count) // 3, 1)] = True
        return chosen

    def _merge_one(self, features: Tensor, attention: Tensor, keys: Tensor, keep: Tensor, order: Tensor) -> None:
        """Writes one crop's merged tokens into ``features`` ``[T, D]``, and the one more token into the place of the last that goes."""
        kept, gone = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
        values = features.float()
        unit = torch.nn.functional.normalize(keys, dim=-1)
        similarity = unit[kept] @ unit.T
        similarity[torch.arange(kept.shape[0], device=kept.device), kept] = float("-inf")  # not itself
        nearest = similarity.topk(min(self.neighbours, features.shape[0] - 1), dim=1).indices
        merged = values[kept] + (values[nearest] * attention[nearest][..., None]).sum(1)
        rest = (values[gone] * attention[gone][:, None]).sum(0)
        features[kept], features[gone[-1]] = merged.to(features.dtype), rest.to(features.dtype)
        keep[gone[-1]], order[gone[-1]] = True, 1
