"""Drafted tokens of assisted decoding: each decides for itself, exactly as if it had come alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.patching.stages import Noted
from dyrate_kernels.patching.wide import KeyRows
from dyrate_kernels.policies.base import View
from dyrate_kernels.stats import Record

if TYPE_CHECKING:
    from dyrate_kernels.patching.session import Session


class Drafts:
    """The decisions of one session about drafted rows, the last ones of a wide pass.

    Args:
        session: whose.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def decide(self, mass: Tensor, importance: Tensor) -> None:
        """Drafted rows: each decides for itself (recoverable); under evict the kept set stays as it is (compaction is frozen)."""
        session, cache = self.session, self.session.cache
        policy, forward = session.policy, session.forward
        drafted = mass.shape[1]
        forward.drafts = Noted(mass, importance)
        if not session.evict and cache.full.bound > 0:
            if policy.at_decode:
                hidden = session.hidden_of(slice(forward.length - drafted, forward.length))
                indices = range(1, len(cache.groups)) if session.stages is None else range(1, 2)
                self.choose(indices, mass, importance, hidden)
            else:
                for index, group in enumerate(cache.groups[1:], 1):
                    if group.kept is not None:
                        forward.allowed[index] = session.mark(group.kept)[:, None].expand(-1, drafted, -1)
        if session.stages is None:
            kept = forward.drafts.kept
            self.write(mass, importance, torch.stack(kept) if kept else None)

    def choose(
        self, indices: Sequence[int], mass: Tensor, importance: Tensor, hidden: Tensor | None, within: Tensor | None = None, stage: int = 0
    ) -> None:  # fmt: skip
        """What each drafted row may read in these groups: one decision, for all of them.

        Args:
            indices: of the groups.
            mass: ``[B, d, Hq, 4]``, importance: ``[B, d, N]``, hidden: ``[B, d, D]`` or None.
            within: bool ``[B * d, N]``, what can be chosen; None: all.
            stage: ``View.group``.
        """
        session, cache = self.session, self.session.cache
        policy, forward = session.policy, session.forward
        batch, drafted = mass.shape[:2]
        first = self._first_step(drafted)
        each = cache.full.n_visual.repeat_interleave(drafted)
        steps = torch.arange(first, first + drafted, device=each.device)
        state = {name: tensor.repeat_interleave(drafted, 0) for name, tensor in session.state.items()}
        hidden = None if hidden is None else hidden.flatten(0, 1)
        view = View(steps.repeat(batch), mass.flatten(0, 1), importance.flatten(0, 1), each, within, state, hidden, stage)
        decision = policy.decide(view)
        score = view.importance if decision.score is None else decision.score
        counts = decision.count if decision.count.dim() == 2 else decision.count[None].expand(len(indices), -1)
        rate = decision.rate.view(batch, drafted)
        session.last_rate = rate[:, -1].contiguous()
        forward.drafts.rates.append(rate)
        width = policy.kept_bound(cache.full.bound)
        for index, count in zip(indices, counts, strict=True):
            kept, n_kept = ops.select_tokens(score, count, each, alive=within, backend=session.backend)
            forward.allowed[index] = session.mark(kept).view(batch, drafted, -1)
            forward.drafts.kept.append(n_kept.view(batch, drafted))
            cache.groups[index].kept = kept.view(batch, drafted, -1)[:, -1, :width].contiguous()
            cache.groups[index].n_kept = n_kept.view(batch, drafted)[:, -1].contiguous()

    def _first_step(self, drafted: int) -> int:
        """Step of the first drafted row of this pass."""
        forward = self.session.forward
        return forward.start + forward.length - drafted - self.session.turn_end + 1

    def write(self, mass: Tensor, importance: Tensor, kept: Tensor | None) -> None:
        """Notes drafted rows: ``[B, d, ..]`` each; kept ``[G, B, d]`` or None."""
        session = self.session
        if session.record is None:
            session.record = Record(session, mass.shape[0])
        first = self._first_step(mass.shape[1])
        for row in range(mass.shape[1]):
            session.record.write(session, first + row, mass[:, row], importance[:, row], None if kept is None else kept[:, :, row])

    @staticmethod
    def restrict(mask: Tensor, rows: KeyRows, allowed: Tensor) -> Tensor:
        """The last ``d`` rows of this pass may read only the visual tokens ``allowed`` ``[B, d, N]``."""
        drafted = allowed.shape[1]
        token = rows.token[:, None].expand(-1, drafted, -1)
        may = allowed.gather(2, token.clamp(min=0)) | (token < 0)
        mask = mask.clone()
        mask[:, -drafted:] &= may
        return mask
