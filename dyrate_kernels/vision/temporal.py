"""Merging over time, for videos: what does not change from frame to frame is told once.

``method="dycoke"`` is the first stage of DyCoke (arXiv 2411.15024, section 3); ``"mean"`` is what remains of PVC's shape (4608 tokens
become 1152, then fewer while generating) without its training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dyrate_kernels.vision.base import FeatureReducer, Reduced, Visual, budget, check_count, check_share

METHODS = ("dycoke", "mean")


@dataclass(frozen=True)
class Temporal(FeatureReducer):
    """Frames in groups of ``group``; tokens are compared with those at the same place of another frame. Pictures stay as they are.

    ``dycoke``: of a group's frames, every second one keeps the ``keep`` of its tokens that are least like those of the frame before it;
    then every other one but the first, those least like the group's first frame. (The code leaves out the last group's second comparison;
    here every group has it [choice].) ``mean``: the group's first frame holds the mean over the group, the others go.

    Attributes:
        group: frames in a group; 4 in DyCoke.
        keep: share of a compared frame's tokens that stays: ``1 - p``, with DyCoke's p = .7. Not used by ``mean``.
        method: ``"dycoke"`` or ``"mean"``.
    """

    group: int = 4
    keep: float = 0.3
    method: str = "dycoke"

    name: ClassVar[str] = "temporal"
    first: ClassVar[bool] = True
    videos_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("group", self.group, "frames in a group")
        check_share("keep", self.keep, "the share of a compared frame's tokens that stays")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {self.method!r}")

    @property
    def drops(self) -> bool:
        return self.group > 1 and (self.method == "mean" or self.keep < 1)

    def reduce(self, visual: Visual) -> Reduced:
        values, keep = visual.values.clone(), torch.ones_like(visual.patch)
        if not visual.video or not self.drops:
            return Reduced(values, keep)
        index = (visual.crop >= 0).nonzero()[:, 0]
        frames = int(visual.crop[index].max()) + 1
        index = index.view(frames, -1)  # frames are all of one size, and follow each other
        tokens = index.shape[1]
        for start in range(0, frames, self.group):
            group = index[start : start + self.group]
            if self.method == "mean":
                values[group[0]] = visual.values[group].float().mean(0).to(values.dtype)
                keep[group[1:].flatten()] = False
                continue
            count = budget(tokens, self.keep)
            for number in range(1, group.shape[0]):
                before = group[number - 1] if number % 2 else group[0]
                alike = torch.nn.functional.cosine_similarity(visual.values[before].float(), visual.values[group[number]].float(), dim=-1)
                gone = torch.ones(tokens, dtype=torch.bool, device=values.device)
                gone[alike.argsort(stable=True)[:count]] = False
                keep[group[number][gone]] = False
        return Reduced(values, keep)
