"""DyCoke's decode stage (arXiv 2411.15024): the selection is reused until attention to the picture has moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.policies.base import Decision, View, check_fraction
from dyrate_kernels.policies.fixed import Fixed


@dataclass(frozen=True)
class DyCoke(Fixed):
    """Keeps the ``1 - rate`` most attended tokens of the step that selected last; selects anew where the cosine similarity of the
    step's image attention with that step's is below ``similarity``.

    Its released code reads the full cache in a step that does not select (a slip, by the paper); here the selection is reused.
    Its other stage, merging tokens of neighbouring video frames before the language model, is not part of this.

    Attributes:
        k: first pruned layer (the paper's L; 3).
        rate: fraction removed (the paper's p; .7).
        similarity: below this a step selects anew (.9).
    """

    rate: float = 0.7
    similarity: float = 0.9

    name: ClassVar[str] = "dycoke"
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("similarity", self.similarity, "the cosine similarity below which a step selects anew")

    def start(self, n_visual: Tensor) -> dict[str, Tensor]:
        return {"reference": torch.zeros(n_visual.shape[0], 0, dtype=torch.float32, device=n_visual.device)}

    def decide(self, view: View) -> Decision:
        now, state = view.importance.detach().float(), view.state
        if state["reference"].shape != now.shape:  # the first step, on the host's side of a capture
            with torch.inference_mode(False):
                state["reference"] = torch.zeros(now.shape, dtype=now.dtype, device=now.device)
        before = state["reference"]
        dot, norm = (now.double() * before).sum(1), now.double().norm(dim=1) * before.double().norm(dim=1)
        anew = (view.step == 0) | ~(dot >= self.similarity * norm)  # NaN selects anew
        before.copy_(torch.where(anew[:, None], now, before))
        rate = torch.full(view.n_visual.shape, float(self.rate), dtype=torch.float64, device=now.device)
        return Decision(rate, ops.keep_count(view.n_visual, rate), before.clone())
