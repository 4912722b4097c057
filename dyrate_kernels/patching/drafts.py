"""Drafted tokens of assisted decoding: each decides for itself, exactly as if it had come alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.patching.stages import Noted
from dyrate_kernels.patching.wide import KeyRows
from dyrate_kernels.policies.base import Decision, Policy, View
from dyrate_kernels.stats import Record

if TYPE_CHECKING:
    from dyrate_kernels.patching.session import Session


def one_at_a_time(policy: Policy) -> bool:
    """Whether no token can be drafted for this policy: it decides a step by the logits of the one before (``reads_logits``), which are not
    known yet, or by a state that every layer of the one before has changed (``remembers`` and ``rescores``).
    """
    return policy.reads_logits or (policy.remembers and policy.rescores)


def of_this_turn(session: Session, columns: int, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``prepare_inputs_for_generation`` for ``columns`` ids, as plain decoding gives them. In a chat, assisted decoding gives
    the whole conversation to its first pass, whatever the cache holds; where it was given new ids alone, it cuts the mask to their number.
    """
    held, new = session.cache.length, given.get("next_sequence_length")
    if new is None:
        new = columns - held if 0 < held < session.turn_end <= columns else columns
        given = given | {"next_sequence_length": new}
    mask, whole = given.get("attention_mask"), session.turn_mask
    if mask is None or whole is None or mask.dim() != 2 or not 0 < session.turn_start < whole.shape[1]:
        return given  # no later turn, or one whose caller gave no mask of the whole conversation
    if mask.shape[1] < held + new:
        ones = mask.new_ones(mask.shape[0], max(held + new - whole.shape[1], 0))
        given = given | {"attention_mask": torch.cat([whole.to(mask), ones], dim=1)[:, : held + new]}
    return given


class NoDrafts:
    """A candidate generator of transformers that drafts nothing, so that assisted decoding goes token by token, as plain decoding does."""

    requires_model_outputs = False

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """The sequence so far, int64 ``[1, S]``, and no logits."""
        return input_ids, None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """There is none."""


class Drafts:
    """The decisions of one session about drafted rows, the last ones of a wide pass.

    Args:
        session: whose.

    Attributes:
        after: of a policy that remembers: its state before the last pass's drafted rows and after each of them.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.after: list[dict[str, Tensor]] = []

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
        if policy.remembers and session.stages is None:
            decision = self._one_after_the_other(first, mass, importance, hidden)
        else:
            steps = torch.arange(first, first + drafted, device=each.device)
            state = {name: tensor.repeat_interleave(drafted, 0) for name, tensor in session.state.items()}
            hidden = None if hidden is None else hidden.flatten(0, 1)
            view = View(steps.repeat(batch), mass.flatten(0, 1), importance.flatten(0, 1), each, within, state, hidden, stage)
            decision = policy.decide(view)
        score = importance.flatten(0, 1) if decision.score is None else decision.score
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

    def _one_after_the_other(self, first: int, mass: Tensor, importance: Tensor, hidden: Tensor | None) -> Decision:
        """A policy that remembers: each row changes the state for the next one. What it was after each is kept, for ``rewind``."""
        session, policy = self.session, self.session.policy
        batch, drafted = mass.shape[:2]
        n_visual = session.cache.full.n_visual
        self.after = [_copy(session.state)]
        found = []
        for row in range(drafted):
            step = torch.full((batch,), first + row, dtype=torch.int64, device=n_visual.device)
            row_hidden = None if hidden is None else hidden[:, row]
            view = View(step, mass[:, row], importance[:, row], n_visual, None, session.state, row_hidden)
            decision = policy.decide(view)
            found.append(replace(decision, score=view.importance if decision.score is None else decision.score))
            self.after.append(_copy(session.state))
        rate, count, score = ([getattr(decision, name) for decision in found] for name in ("rate", "count", "score"))
        return Decision(torch.stack(rate, 1).flatten(), torch.stack(count, -1).flatten(-2), torch.stack(score, 1).flatten(0, 1))

    def rewind(self, columns: int) -> None:
        """The newest ``columns`` of the drafted ones were refused: the policy's state is what it was before them."""
        if 0 < columns < len(self.after):
            self.session.state = _copy(self.after[-1 - columns])
            del self.after[-columns:]

    def forget(self) -> None:
        """Another pass begins."""
        self.after = []

    def _first_step(self, drafted: int) -> int:
        """Step of the first drafted row of this pass."""
        forward = self.session.forward
        return forward.start + forward.length - drafted - self.session.turn_end + 1

    def write(self, mass: Tensor, importance: Tensor, kept: Tensor | None) -> None:
        """Notes drafted rows: ``[B, d, ..]`` each; kept ``[G, B, d]`` or None."""
        session = self.session
        if session.record is None:
            session.record = Record(session, mass.shape[0])
        first, rates = self._first_step(mass.shape[1]), session.forward.drafts.rates
        rate = None if not rates else rates[0] if session.stages is None else session.stages.mean_rate(rates)
        chosen = session.forward.allowed.get(1)
        for row in range(mass.shape[1]):
            of_row = [None if each is None else each[:, row] for each in (rate, chosen)]
            of_row.append({group: marks[:, row] for group, marks in session.forward.allowed.items()})
            session.record.write(session, first + row, mass[:, row], importance[:, row], None if kept is None else kept[:, :, row], *of_row)

    @staticmethod
    def restrict(mask: Tensor, rows: KeyRows, allowed: Tensor) -> Tensor:
        """The last ``d`` rows of this pass may read only the visual tokens ``allowed`` ``[B, d, N]``."""
        drafted = allowed.shape[1]
        token = rows.token[:, None].expand(-1, drafted, -1)
        may = allowed.gather(2, token.clamp(min=0)) | (token < 0)
        mask = mask.clone()
        mask[:, -drafted:] &= may
        return mask


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
