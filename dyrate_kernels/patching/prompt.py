"""The end of a prompt: what the policy decides by its last row, and what each pruned group keeps of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.patching.columns import place_rows
from dyrate_kernels.patching.stages import Noted
from dyrate_kernels.patching.wide import KeyRows, sum_of_all_rows
from dyrate_kernels.policies.base import View
from dyrate_kernels.stats import Record

if TYPE_CHECKING:
    from dyrate_kernels.cache import RowGroup
    from dyrate_kernels.patching.session import Session


class Prompt:
    """The decisions of one session at its prompts' ends.

    Args:
        session: whose.

    Attributes:
        column_sum: ``[B, N]``, attention received from all rows of this prompt so far (``Policy.query_rows == "mean"``); None: from none.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.column_sum: Tensor | None = None

    def forget(self) -> None:
        """Another prompt begins."""
        self.column_sum = None

    def add(self, query: Tensor, rows: KeyRows, mask: Tensor, scale: float) -> None:
        """The rows of a chunk vote: query ``[B, Hq, q, D]``, mask bool ``[B, q, R]`` of the pass under way."""
        session, forward = self.session, self.session.forward
        prompt = slice(0, forward.width - forward.drafted)
        real = forward.slots[0].stored[:, prompt].to(query.device)
        added = sum_of_all_rows(query[:, :, prompt], rows, mask[:, prompt], real, scale, session.cache.full.capacity)
        added = (added if session.heads is None else session.heads.mean(added)).to(session.cache.n_text.device)
        self.column_sum = added if self.column_sum is None else _resize_like(self.column_sum, added) + added

    def decide(self, mass: Tensor, importance: Tensor, hidden: Tensor | None) -> None:
        """Step 0: the last prompt row's statistics, the policy's first decision, and what follows from it for the pruned layers."""
        session, cache, policy = self.session, self.session.cache, self.session.policy
        batch = mass.shape[0]
        n_visual = cache.full.n_visual
        session.record = Record(session, batch)
        keep_all = torch.zeros(batch, dtype=torch.float64, device=n_visual.device)
        session.last_rate = keep_all
        if session.decides_at_prefill and cache.full.bound > 0:
            if self.column_sum is not None:
                importance = self.column_sum
            alive = None
            if session.evict:
                alive = self.candidates(cache.groups[1])
            if not session.state or session.new_images:
                session.state = policy.start(n_visual)
            step = torch.zeros(batch, dtype=torch.int64, device=n_visual.device)
            view = View(step, mass, importance, n_visual, alive, session.state, hidden)
            if session.raters is not None:
                session.raters.show(session.score_layer, view)
            decision = policy.decide(view)
            score = importance if decision.score is None else decision.score
            groups = cache.groups[1:] if session.stages is None else cache.groups[1:2]
            counts = decision.count if decision.count.dim() == 2 else decision.count[None].expand(len(groups), -1)
            if session.evict or not policy.at_decode:
                session.last_rate = decision.rate
            if session.stages is not None:
                session.forward.noted = Noted(mass, importance, [decision.rate])
            session.had_decided = session.decided
            self.choose(groups, score, counts, merge=decision.merge)
            session.decided, session.decided_in = True, session.turn
        elif session.prunes_prompt:
            self._shrink(cache.groups[1:], importance, n_visual[None].expand(len(cache.groups) - 1, -1))
        if session.forward.noted is None:  # else more groups decide first
            session.write_record(mass, importance, step=0)

    def choose(
        self, groups: list[RowGroup], score: Tensor, counts: Tensor, within: Tensor | None = None, merge: Tensor | None = None
    ) -> None:  # fmt: skip
        """What these groups keep of the prompt: rows under ``evict``, else a list, if nothing is decided again.

        Args:
            score: ``[B, N]``.
            counts: ``[len(groups), B]``.
            within: bool ``[B, N]``, what can be chosen; None: all.
            merge: ``Decision.merge``, for the first of the groups.
        """
        session, cache = self.session, self.session.cache
        if session.evict:
            if merge is not None:
                session.forward.merge[cache.groups.index(groups[0])] = merge
            self._shrink(groups, score, counts, within)
            return
        if session.policy.at_decode:
            return
        for group, count in zip(groups, counts, strict=True):
            kept, n_kept = ops.select_tokens(score, count, cache.full.n_visual, alive=within, backend=session.backend)
            kept = kept[:, : session.policy.kept_bound(cache.full.bound)]
            if group.kept is not None and session.had_decided:  # sequences without new images keep their old choice
                kept, n_kept = self._keep_old_choice(group, kept, n_kept)
            group.kept, group.n_kept = kept, n_kept

    def _keep_old_choice(self, group: RowGroup, kept: Tensor, n_kept: Tensor) -> tuple[Tensor, Tensor]:
        fresh = (self.session.forward.slots[0].token >= 0).any(1)
        width = max(kept.shape[1], group.kept.shape[1])
        old = torch.full((kept.shape[0], width), -1, dtype=torch.int32, device=kept.device)
        new = old.clone()
        old[:, : group.kept.shape[1]], new[:, : kept.shape[1]] = group.kept, kept
        return torch.where(fresh[:, None], new, old), torch.where(fresh, n_kept, group.n_kept)

    def candidates(self, group: RowGroup) -> Tensor:
        """bool ``[B, N]``: tokens a pruned group holds already or would receive in this turn."""
        session, cache = self.session, self.session.cache
        columns = cache.token_column[:, : cache.full.capacity]
        token = torch.arange(columns.shape[1], device=columns.device)
        live = token < cache.full.n_visual[:, None]
        new = token >= session.cached[0][:, None] if session.reduced else columns >= session.turn_start
        return (session.alive_of(group) | new) & live

    def _shrink(self, groups: list[RowGroup], score: Tensor, counts: Tensor, within: Tensor | None = None) -> None:
        """Evict at prefill: each of these groups keeps ``counts`` of its candidates; old rows are compacted, new columns get slots."""
        session, cache, forward = self.session, self.session.cache, self.session.forward
        if forward.joined is None:
            slots = [waiting.slot for waiting in session.waiting] + [forward.slots[0]]
            forward.joined = tuple(
                torch.cat([getattr(slot, name) for slot in slots], dim=1) for name in ("column", "stored", "token", "text", "type")
            )
        column, stored, token, text, kind = forward.joined
        visual = stored & (token >= 0)
        tokens = cache.token_column.shape[1]
        batch, width = column.shape
        chosen, keeps = [], []
        for group, count in zip(groups, counts, strict=True):
            able = self.candidates(group)
            able = able if within is None else able & within
            kept, n_kept = ops.select_tokens(score, count, cache.full.n_visual, alive=able, backend=session.backend)
            chosen.append((kept, n_kept))
            mark = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=column.device)
            mark.scatter_(1, torch.where(kept < 0, tokens, kept).long(), True)
            keeps.append(torch.where(visual, mark.gather(1, token.clamp(min=0)), stored))
        # the last prompt column's hidden state gives the next token, so it stays even where its own key is dropped
        stays = []
        for keep in keeps:
            stay = keep.clone()
            stay[:, width - forward.drafted - 1] = True
            stays.append(stay)
        sizes = torch.stack(
            [torch.stack([s.sum(1).max(), s.sum(1).min(), k.sum(1).min()]) for s, k in zip(stays, keeps, strict=True)]
        ).tolist()
        for group, (kept, n_kept), keep, stay, (size, least, real) in zip(groups, chosen, keeps, stays, sizes, strict=True):
            index = cache.groups.index(group)
            if session.turn_start > 0:
                cache.evict(group, kept, n_kept, session.backend)
            place = stay.cumsum(1) - 1 + (size - stay.sum(1, keepdim=True))
            source = torch.zeros(batch, size + 1, dtype=torch.int64, device=column.device)
            source.scatter_(1, torch.where(stay, place, size), torch.arange(width, device=column.device).expand(batch, -1))
            source = source[:, :-1]
            filled = torch.arange(size, device=column.device) >= size - stay.sum(1, keepdim=True)
            here = keep.gather(1, source) & filled
            got = token.gather(1, source)
            fresh = session.turn_start == 0
            place_rows(
                session, forward, index, group, column.gather(1, source), here, got, text.gather(1, source), kind.gather(1, source),
                here & (got >= 0), fresh, fresh and session.blocks is None and least == size == real,
            )  # fmt: skip
            forward.source[index], forward.filled[index] = source, filled
        forward.shrunk, forward.joined_length = True, width


def _resize_like(tensor: Tensor, like: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    out[:, : tensor.shape[1]] = tensor
    return out
