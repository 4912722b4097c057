"""A kept count by generation step, e.g. 288, 144 and 72 of 576 from steps 0, 5 and 10 on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyrate_kernels.policies.base import Decision, Policy, View

_ALL = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Schedule(Policy):
    """The count at step t is that of the last pair whose step is <= t; before the first pair everything stays.

    Attributes:
        k: first pruned layer.
        kept: pairs (step, how many stay), steps ascending, step 0 = prefill. Sequences with fewer visual tokens keep
            all they have.
    """

    kept: Sequence[tuple[int, int]] = ((0, 288), (5, 144), (10, 72))

    name: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "kept", _checked(self.kept))

    @property
    def constant(self) -> bool:  # type: ignore[override]  # read on instances alone
        """One pair from the prompt on: nothing changes while decoding."""
        return len(self.kept) == 1 and self.kept[0][0] == 0

    def kept_bound(self, n_visual: int) -> int:
        if self.kept[0][0] > 0:
            return n_visual
        return min(max(1, *(count for _, count in self.kept)), n_visual)

    def start(self, n_visual: Tensor) -> dict[str, Tensor]:
        batch, device = n_visual.shape[0], n_visual.device
        steps = torch.tensor([step for step, _ in self.kept], dtype=torch.int64)
        counts = torch.tensor([_ALL, *(count for _, count in self.kept)], dtype=torch.int32)
        return {"steps": steps.to(device).repeat(batch, 1), "counts": counts.to(device).repeat(batch, 1)}

    def decide(self, view: View) -> Decision:
        index = torch.searchsorted(view.state["steps"], view.step[:, None].contiguous(), right=True)
        count = torch.minimum(view.state["counts"].gather(1, index)[:, 0], view.n_visual)
        rate = 1.0 - count.double() / view.n_visual.clamp(min=1)
        return Decision(torch.where(view.n_visual > 0, rate, 0.0), count)


def _checked(kept: Any) -> tuple[tuple[int, int], ...]:
    wanted = "kept must be a list of (step, count) pairs of non-negative integers with ascending steps"
    try:
        pairs = tuple((step, count) for step, count in kept)
    except (TypeError, ValueError):
        raise TypeError(f"{wanted}, got {kept!r}") from None
    if not pairs:
        raise ValueError(f"{wanted}, got none")
    for pair in pairs:
        if any(isinstance(number, bool) or not isinstance(number, Integral) for number in pair):
            raise TypeError(f"{wanted}, got {pair!r}")
        if min(pair) < 0 or max(pair) > _ALL:
            raise ValueError(f"{wanted} below 2**31, got {pair!r}")
    if any(later[0] <= earlier[0] for earlier, later in zip(pairs, pairs[1:], strict=False)):
        raise ValueError(f"{wanted}, got steps {[step for step, _ in pairs]}")
    return tuple((int(step), int(count)) for step, count in pairs)
