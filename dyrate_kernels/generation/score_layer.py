"""Score layers: they measure, the policy decides stage by stage, the decision takes effect, and the step is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.generation import apply
from dyrate_kernels.generation.apply import Effects
from dyrate_kernels.generation.aside import Branch
from dyrate_kernels.generation.attend import OperatorStep, Seen, last_row_statistics, row_statistics
from dyrate_kernels.generation.decide import Choice, Decider, Measured, Pending, Stage, importance_by_token
from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.layout import SlotMapping
from dyrate_kernels.generation.passes import DecodePass, MultiTokenPass
from dyrate_kernels.generation.ranking import Ranker
from dyrate_kernels.generation.record import Record
from dyrate_kernels.generation.turn import Reduction, Turn
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.retention import Retention


class Scoring:
    """The score layers of one conversation.

    Args:
        policy: bound to the model.
        shape: the text model's shape.
        retention: what becomes of tokens that are not kept.
        record_importance: keep importance and kept tokens of every step.
        heads: the processes among which the model's heads are shared out; None: all are here.
        store, decider, ranker, branch: the conversation's.

    Attributes:
        effects: of the decisions of the newest multi-token pass.
        hidden: ``[B, q, d]`` of this pass at the score layer, for policies that read it.
        record: of the turn's steps; None before the first.
    """

    def __init__(
        self, policy: Policy, shape: ModelShape, retention: Retention, record_importance: bool, heads: HeadShards | None, store: RowStore,
        decider: Decider, ranker: Ranker, branch: Branch,
    ) -> None:  # fmt: skip
        self.policy, self.shape, self.retention, self.record_importance, self.heads = policy, shape, retention, record_importance, heads
        self.store, self.decider, self.ranker, self.branch = store, decider, ranker, branch
        self.forget()

    def forget(self) -> None:
        """Forgets the conversation."""
        self.effects = Effects()
        self.hidden: Tensor | None = None
        self.record: Record | None = None
        self._first: Pending | None = None  # what this pass decided so far: at the prompt's end, or as a decode step
        self._drafts: Pending | None = None  # and for its draft tokens

    def begin_turn(self) -> None:
        """Begins a record of its own for the turn that comes."""
        self.record = None

    def begin_pass(self, decodes: bool) -> None:
        """Nothing is decided in the pass that comes; what the last one did lasts while decoding."""
        self.decider.begin_pass()
        self._first = self._drafts = None
        if not decodes:
            self.effects = Effects()

    # ---- a decode step ------------------------------------------------------------------------------------------------------------

    def step(
        self, passing: DecodePass, stage: Stage, query: Tensor, new: tuple[Tensor, Tensor], scale: float, window: int | None, turn: Turn,
        counters: tuple[Tensor, Tensor], unpruned: bool,
    ) -> Tensor:  # fmt: skip
        """Returns the attention of a score layer in a decode step, ``[B, 1, Hq, D]``; the policy decides.

        Args:
            query: ``[B, Hq, 1, D]``.
            new: key and value of the new row, ``[B, Hkv, 1, D]``.
            counters: step and column of the new token, int64 and int32 ``[1]``.
            unpruned: all visual tokens are read, nothing is decided.
        """
        store, decider, attention, layer = self.store, self.decider, passing.attention, stage.layer
        number = turn.step_of(passing.start)
        if unpruned or store.full.bound == 0 or not decider.at_decode(turn.frozen):
            if stage.index:
                return attention.attend(layer, query, *new, scale, window)
            output, mass, importance = attention.score(layer, query, *new, scale, window, self.record_importance)
            mass, importance = self._of_all_heads(mass, importance)
            with self.branch.fork(None, mass, importance):
                self._recording(turn).write(store, number, mass, importance, decider.rate, counters=counters, unpruned=unpruned)
            return output[:, None]
        hidden = self._hidden(slice(-1, None))
        hidden = None if hidden is None else hidden[:, 0]
        linear = decider.linear(hidden) if self.heads is None and not self.branch.apart else None
        if linear is not None:
            scope = decider.scope_of_step(store, stage)
            output, measured, choice = decider.decide_linear(attention, layer, query, new, scale, window, linear, scope)
            self._take_effect(passing, stage, measured, choice, turn, counters)
            return output[:, None]
        output, mass, importance = attention.score(layer, query, *new, scale, window, True)
        mass, importance = (each.to(store.device) for each in self._of_all_heads(mass, importance))
        before = store.groups[stage.groups[0]].first if stage.groups else None
        with self.branch.fork(before, mass, importance, hidden, *(() if self._first is None else self._first.measured)):
            measured, choice = self._decide_step(attention, stage, Measured(mass, importance, hidden), counters)
            self._take_effect(passing, stage, measured, choice, turn, counters)
        return output[:, None]

    def _decide_step(
        self, attention: OperatorStep, stage: Stage, measured: Measured, counters: tuple[Tensor, Tensor]
    ) -> tuple[Measured, Choice]:  # fmt: skip
        """A decision of a decode step by what an attention measured, which may be of rows; returns it of tokens, too."""
        store, decider = self.store, self.decider
        scope, n_visual = decider.scope_of_step(store, stage), store.full.n_visual
        linear = decider.linear(measured.hidden) if self.heads is None else None
        if linear is not None:
            return measured, decider.select_linear(measured, n_visual, linear, scope)
        if stage.index:
            measured = measured._replace(importance=importance_by_token(store, store.groups[stage.index], measured.importance))
        step = counters[0].expand(store.batch)
        return measured, decider.decide(stage, step, measured, n_visual, scope, attention=attention)

    def _take_effect(
        self, passing: DecodePass, stage: Stage, measured: Measured, choice: Choice, turn: Turn, counters: tuple[Tensor, Tensor]
    ) -> None:  # fmt: skip
        """Makes a stage's choice of a decode step true, and writes the record after the last."""
        store, decider = self.store, self.decider
        width = 0 if self.retention.moves else self.policy.kept_bound(store.full.bound)  # of lists to read through
        apply.of_step(store, stage, choice, width, self.branch.apart, passing.attention.on_host)
        if self.retention.moves:
            turn.evict()
        passing.attention.changed()
        if self._first is None:
            self._first = Pending(measured)
        self._first.rates.append(choice.rate)
        if stage.last:
            decider.finish(decider.mean_rate(self._first.rates))
            mass, importance, _ = self._first.measured
            number = turn.step_of(passing.start)
            self._recording(turn).write(store, number, mass, importance, decider.rate, counters=counters)

    def _of_all_heads(self, mass: Tensor, importance: Tensor) -> tuple[Tensor, Any]:
        """Statistics of the heads of this process -> of all."""
        return (mass, importance) if self.heads is None else self.heads.statistics(mass, importance)

    def _hidden(self, rows: slice) -> Tensor | None:
        """``[B, r, d]`` of these rows of the pass, where the text's metadata are."""
        return None if self.hidden is None else self.hidden[:, rows].detach().to(self.store.device)

    # ---- a pass of several tokens ---------------------------------------------------------------------------------------------------

    def many(self, passing: MultiTokenPass, stage: Stage, slots: SlotMapping, seen: Seen, turn: Turn, reduction: Reduction) -> None:
        """Lets the last prompt row decide, then each draft row for itself. There may be fewer columns than the pass has (the prompt was
        shrunk).
        """
        ranker, tokens = self.ranker, self.store.full.capacity
        if passing.reads_prompt:
            if ranker.query_rows == "mean" and not stage.index and self.decider.at_prefill(turn):
                ranker.add(stage.layer, passing, seen, tokens)
            ranker.note(stage.layer, slots, seen.query, self.hidden if ranker.merges else None)
        end = seen.query.shape[2] - passing.drafted
        if passing.ends_prompt:
            self._score_prompt(passing, stage, seen, end - 1, turn, reduction)
        if passing.drafted:
            self._score_drafts(passing, stage, seen, slice(end, None), turn)
        if stage.last:
            self._write_many(passing, turn)

    def _statistics(self, seen: Seen, of: slice) -> tuple[Tensor, Tensor]:
        """Mass and importance of these rows of the pass, of all heads."""
        mass, importance = self._of_all_heads(*row_statistics(seen, of, self.store.full.capacity))
        return mass.to(self.store.device), importance.to(self.store.device)

    def _score_prompt(
        self, passing: MultiTokenPass, stage: Stage, seen: Seen, last: int, turn: Turn, reduction: Reduction
    ) -> None:  # fmt: skip
        """Step 0: the last prompt row's statistics, a stage of the policy's decision, and what follows from it for the pruned layers."""
        store, decider, ranker = self.store, self.decider, self.ranker
        if stage.index and (self._first is None or not self._first.rates):
            return  # the first stage had nothing to decide
        if stage.index or passing.drafted or seen.window is not None:
            mass, importance = (each[:, 0] for each in self._statistics(seen, slice(last, last + 1)))
        else:
            found = self._of_all_heads(*last_row_statistics(store, stage.layer, seen.query[:, :, last], seen.scale))
            mass, importance = (each.to(store.device) for each in found)
        importance = ranker.importance(stage.layer, seen, turn, importance)
        hidden = self._hidden(slice(last, last + 1))
        measured = Measured(mass, importance, None if hidden is None else hidden[:, 0])
        if self._first is None:
            self._first, self.record = Pending(measured), None
            decider.finish(torch.zeros(store.batch, dtype=torch.float64, device=store.device))  # nothing is removed so far
            if not decider.at_prefill(turn) or store.full.bound == 0:
                if passing.joined is not None:
                    nothing = torch.full((store.batch, 1), -1, device=store.device)
                    self.effects.shrink(store, turn, passing, range(1, len(store.groups)), [nothing] * (len(store.groups) - 1), None)
                return
            decider.begin_prompt(store.full.n_visual, turn)
        scope = decider.scope_of_prompt(store, stage, turn, reduction)
        step = torch.zeros(store.batch, dtype=torch.int64, device=store.device)
        states = ranker.states(stage.layer, importance.shape[1], store.device)
        choice = decider.decide(stage, step, measured, store.full.n_visual, scope, states)
        pooled = stage.index > 0 and self.retention.pool is not None  # the first stage has chosen for all
        self._first.rates.append(self._first.rates[0] if pooled else choice.rate)
        if self.retention.shrinks:
            if choice.lists:
                groups = range(stage.groups.start, stage.groups.start + len(choice.lists))
                self.effects.shrink(store, turn, passing, groups, [kept for kept, _ in choice.lists], choice.merge)
        elif choice.lists:
            fresh = (passing.slots[0].token >= 0).any(1) if decider.had_decided else None
            apply.list_of_prompt(store, stage, choice, self.policy.kept_bound(store.full.bound), fresh)

    def _score_drafts(self, passing: MultiTokenPass, stage: Stage, seen: Seen, of: slice, turn: Turn) -> None:
        """Draft tokens: each decides for itself; where rows move the kept set stays as it is (compaction is frozen)."""
        store = self.store
        decides = not self.retention.moves and self.policy.at_decode and store.full.bound > 0
        if decides or not stage.index:
            measured = Measured(*self._statistics(seen, of), self._hidden(of))
            if self._drafts is None:
                self._drafts = Pending(measured)
        if decides and self._drafts is not None:
            first = turn.step_of(passing.start + passing.length - passing.drafted)
            alive = self.decider.pool(store)
            alive = None if alive is None else alive[:, None].expand(-1, passing.drafted, -1)
            alive = self.effects.allowed[stage.index] if stage.index else alive
            choice = self.decider.decide_drafts(stage, first, measured, store.full.n_visual, alive)
            self._drafts.rates.append(choice.rate)
            self._drafts.kept += [n_kept for _, n_kept in choice.lists]
            self.effects.allow(store, stage, choice, self.policy.kept_bound(store.full.bound))
        elif not self.retention.moves and store.full.bound > 0:
            self.effects.allow_kept(store, stage, passing.drafted)

    def _write_many(self, passing: MultiTokenPass, turn: Turn) -> None:
        store, decider = self.store, self.decider
        if self._first is not None:
            measured, rates = self._first.measured, self._first.rates
            if rates and (self.retention.shrinks or not self.policy.at_decode):
                decider.finish(decider.mean_rate(rates))
            computed = self.effects.computed(store, turn) if self.retention.shrinks else None
            self._recording(turn).write(store, 0, measured.mass, measured.importance, decider.rate, computed=computed)
        if self._drafts is not None:
            measured, rates = self._drafts.measured, self._drafts.rates
            rate = decider.mean_rate(rates) if rates else None
            if rate is not None:
                decider.finish(rate[:, -1].contiguous())
            first = turn.step_of(passing.start + passing.length - passing.drafted)
            kept = torch.stack(self._drafts.kept) if self._drafts.kept else None
            for row in range(passing.drafted):
                self._recording(turn).write(
                    store, first + row, measured.mass[:, row], measured.importance[:, row], decider.rate if rate is None else rate[:, row],
                    kept=None if kept is None else kept[:, :, row],
                    allowed={group: marks[:, row] for group, marks in self.effects.allowed.items()},
                )  # fmt: skip

    def _recording(self, turn: Turn) -> Record:
        if self.record is None:
            assert turn.before is not None, "a turn begins with a prompt"
            self.record = Record(
                self.store, turn.before, turn.end, turn.max_length, self.shape.windows, self.record_importance, self.policy.reads_logits
            )
        return self.record
