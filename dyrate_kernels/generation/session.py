"""One conversation with a model, pass by pass: the order of events. What happens in them is the business of the modules above.

The flow of one forward pass (docs/design.md, section 5):

1. ``stage`` (hook on the base model) learns which columns are visual tokens, from the token ids.
2. ``begin_forward`` (hook on the text model) plans the pass: every column has its row, and there is room for it.
3. each attention module calls ``write`` and then ``attend``; at a score layer ``attend`` also lets the policy decide.
4. ``finish_forward`` (hook on the text model) closes the pass.

A pass of one token after the prompt is a *decode step* and reads no value of another device on the host. Every other one is a *pass of
several tokens*: prompts, chunks of prompts, the next turn of a chat, draft tokens. In it each draft token decides for itself, exactly as if
it had come alone, so assisted decoding gives the tokens of plain decoding, but for retention ``evict``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyrate_kernels import specs
from dyrate_kernels.generation import passes
from dyrate_kernels.generation.apply import Effects
from dyrate_kernels.generation.aside import Aside, Branch
from dyrate_kernels.generation.attend import Seen, attend_many
from dyrate_kernels.generation.decide import Decider, Stage
from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.generation.inference import make_writable
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.layout import Blocks, look, restrict, rows_of, visibility
from dyrate_kernels.generation.passes import DecodePass, MultiTokenPass
from dyrate_kernels.generation.ranking import Ranker
from dyrate_kernels.generation.record import Record, Roster, Snapshot
from dyrate_kernels.generation.score_layer import Scoring
from dyrate_kernels.generation.turn import EarlyChunk, Reduction, Turn
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.retention import Retention


class Staged(NamedTuple):
    """Facts that the ids of the next pass give.

    Attributes:
        visual: bool ``[B, q]``: which columns are visual tokens.
        blocks: int64 ``[B, columns so far]``: ``layout.Blocks.note``.
        mask: ``[B, columns so far]``, for models whose text model is not shown it.
    """

    visual: Tensor | None
    blocks: Tensor | None
    mask: Tensor | None


class StepState(NamedTuple):
    """The state that a decode step depends on, for those who capture one.

    Attributes:
        sizes: host numbers that are baked in: the batch, capacities and bounds, which sliding windows are full, the policy's state's names.
        lasting: addresses of the tensors that last from step to step and are written in place.
        made: tensors that a step reads, or makes anew where the policy decides in it.
    """

    sizes: tuple
    lasting: tuple[int | None, ...]
    made: tuple[Tensor | None, ...]


class Session:
    """Carries policy, state and rows through one conversation.

    Args:
        policy: a policy bound to the model (``Policy.bind``).
        shape: the text model's shape.
        retention: what becomes of tokens that are not kept; a text as ``specs.retention`` reads it, or what it gives.
        backend: name of the operator backend.
        record_importance: keep importance and kept tokens of every step for ``stats()``.
        heads: the processes among which the model's heads are shared out; None: all are here.

    Attributes:
        bounds_at_capacity: decode steps tell the operators no bound of the text rows, which changes from step to step.
        store, decider, ranker, scoring, turn, reduction, blocks, branch: what it owns.
        passing: the newest pass.
        step, column: int64 and int32 ``[1]``, step and column of the next token.
        in_forward: a pass is under way.
        windows: sliding windows of the layers seen so far.
        roster: the sequences of the turn that are still in its passes.
    """

    bounds_at_capacity: bool = False
    step: Tensor
    column: Tensor

    def __init__(
        self, policy: Policy, shape: ModelShape, retention: str | Retention, backend: str, record_importance: bool = False,
        heads: HeadShards | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.shape, self.backend, self.heads = policy, shape, backend, heads
        self.retention = specs.retention(retention)
        merges = self.retention.shrinks and policy.merges
        self.keeps_hidden = policy.reads_hidden or merges
        self.decider = Decider(policy, shape.num_layers, self.retention, backend)
        self.ranker = Ranker(policy, merges, heads)
        shared, moves = not self.retention.shrinks, self.retention.moves
        self.store = RowStore(shape.num_layers, self.decider.starts, shared, backend, moves)
        self.branch = Branch()
        self.scoring = Scoring(policy, shape, self.retention, record_importance, heads, self.store, self.decider, self.ranker, self.branch)
        self._begin_conversation()

    def _begin_conversation(self) -> None:
        self.turn, self.reduction, self.blocks = Turn(), Reduction(), Blocks()
        self.passing: DecodePass | MultiTokenPass | None = None
        self.in_forward = self.unpruned = False
        self.windows: set[int] = set()
        self.roster = Roster()
        self._staged = Staged(None, None, None)
        self._unread: int | None = None  # layer whose rows no attention has read yet

    def reset(self) -> None:
        """Forgets the conversation; buffers stay for the next one."""
        if self.store.started:
            self._make_writable()
            self.store.reset()
            self.step.zero_()
            self.column.zero_()
            self.decider.forget()
            self.ranker.forget()
            self.scoring.forget()
            self._begin_conversation()

    # ---- turns and passes -------------------------------------------------------------------------------------------------------

    def begin_turn(
        self, prompt_length: int | None, max_length: int, frozen: bool, assistant: bool = False, mask: Tensor | None = None
    ) -> None:  # fmt: skip
        """A ``generate()`` call begins.

        Args:
            prompt_length: the column at which its prompt ends; None: where its first forward pass ends.
            max_length: columns it may reach.
            frozen: rows are not compacted while decoding (assisted decoding rolls the cache back).
            assistant: this model drafts for another one.
            mask: ``Turn.mask``.
        """
        self._check_whole()
        self._make_writable()
        turn, length = self.turn, self.store.length
        # the drafting model of assisted decoding goes on with the same turn; so does a call that brings nothing new to read
        if turn.number >= 0 and (assistant or (prompt_length is not None and length >= prompt_length)):
            turn.go_on(max_length, frozen, mask)
            return
        end = -1 if prompt_length is None else prompt_length
        self.turn = Turn(turn.number + 1, length, end, max_length, frozen, mask, before=turn.before)
        self.roster = Roster()
        self.ranker.forget()
        self.scoring.begin_turn()

    def reduced_by(self, names: str, active: bool, keeps_width: bool) -> None:
        """Reducers work in this conversation: ``turn.Reduction``. ``active``: the prompt that comes is one that they have shortened."""
        self.reduction.begin(names, active, keeps_width)

    def stage(self, visual: Tensor | None, blocks: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Tells of the pass that comes: ``Staged``."""
        self._staged = Staged(visual, blocks, mask)

    def is_decode(self, length: int) -> bool:
        """A pass of ``length`` columns would be a decode step."""
        return length == 1 and self.turn.number >= 0 and self.store.started and 0 <= self.turn.end <= self.store.length

    def begin_forward(self, batch: int, length: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Plans a pass of ``length`` new columns. Checks everything before it changes anything."""
        store = self.store
        staged, self._staged = self._staged, Staged(None, None, None)
        self._check_whole()
        if store.started and store.batch != batch:
            raise ValueError(f"the cache holds {store.batch} sequences, input_ids has {batch}; pass a cache of the same batch")
        if self.turn.number < 0:  # a plain forward on a fresh cache: its columns are the prompt
            self.begin_turn(length, length, frozen=False)
        decodes = self.is_decode(length)
        self.scoring.begin_pass(decodes)
        if not store.started:
            store.start(batch, device)
            self.step = torch.zeros(1, dtype=torch.int64, device=device)
            self.column = torch.zeros(1, dtype=torch.int32, device=device)
        if decodes:
            self.reserve_step(self.branch.apart)
            later = self._moves_later(self.branch.apart)
            if not later:
                store.settle()
            self.passing = passes.decode(store, self.column, self.unpruned, self.bounds_at_capacity)
            if later:
                with self.branch.fork(store.groups[1].first):
                    store.settle()
        else:
            store.settle()
            turn = self.turn
            end = turn.end if turn.end >= 0 else store.length + length
            mask = staged.mask if attention_mask is None else attention_mask
            new = look(store, store.length, length, end, mask, staged.visual, device, turn.frozen)
            turn.note(new, store, self.reduction)
            prunes = self.retention.shrinks and self.decider.at_prefill(turn) and store.length < turn.end
            self.passing = passes.many(store, turn, self.reduction, self.blocks, new, staged.blocks, prunes)
            if self.passing.moved is not None:
                self.ranker.move(self.passing.moved)
        self.in_forward = True

    def finish_forward(self) -> None:
        """The pass came to its end: the new columns count from now on."""
        passing, store = self.passing, self.store
        assert passing is not None, "no forward pass is under way on this cache"
        self.branch.join()
        store.length += passing.length
        if passing.decodes:
            self.step.add_(1)
            self.column.add_(1)
        else:
            self.step.fill_(max(self.turn.step_of(store.length), 0))
            self.column.fill_(store.length)
        if isinstance(passing, MultiTokenPass) and passing.ends_prompt:
            self.ranker.forget()
            self.turn.waiting.clear()
        self.in_forward = False
        self.passing = self.scoring.hidden = None

    def _check_whole(self) -> None:
        if self.in_forward:
            raise RuntimeError(
                "the last forward pass on this cache did not finish (it raised an error), so its rows are incomplete. "
                "Start again without this cache."
            )

    # ---- what comes from outside of the attention modules -----------------------------------------------------------------------

    @property
    def reads_embeddings(self) -> bool:
        """``read_embeddings`` is wanted in the pass that has begun."""
        passing = self.passing
        return self.ranker.reads_embeddings and isinstance(passing, MultiTokenPass) and passing.reads_prompt

    def read_embeddings(self, embeddings: Tensor) -> None:
        """``[B, q, d]``, what enters the first layer in the pass that has begun."""
        assert isinstance(self.passing, MultiTokenPass)
        self.ranker.read(embeddings, self.passing.slots[0], self.turn, self.passing.ends_prompt)

    def see(self, layer: int, hidden: Tensor) -> None:
        """``[B, q, d]``, what goes into the attention of ``layer``; kept where it is wanted."""
        if self.keeps_hidden and layer in self.decider.stages:
            self.scoring.hidden = hidden

    def hold_back(self, hidden: Tensor) -> EarlyChunk:
        """The pass under way is ``deferred``: ``[B, q, d]``, what its first pruned layer would receive."""
        assert isinstance(self.passing, MultiTokenPass)
        chunk = EarlyChunk(self.passing.slots[0], hidden)
        self.turn.waiting.append(chunk)
        return chunk

    def see_logits(self, logits: Tensor, unpruned: Callable[[], Any]) -> Any:
        """Shows the policy what came of the newest pass; where it asks for it, the step runs once more unpruned, and that is its result.

        Args:
            logits: ``[B, V]`` of its last column.
            unpruned: runs it again; its result has ``logits`` ``[B, q, V]``.

        Returns:
            What ``unpruned`` returned; None: it was not called.
        """
        turn, store, policy = self.turn, self.store, self.policy
        if turn.frozen or not self.decider.state or store.length < turn.end:
            return None
        step, output = store.length - turn.end, None
        if step > 0 and store.full.bound > 0 and policy.checks(step):
            with self._again():
                output = unpruned()
            policy.see_unpruned(logits, output.logits[:, -1], self.decider.state)
            logits = output.logits[:, -1]
        policy.see_logits(logits, self.decider.state)
        return output

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Within: the newest decode step can run once more; it reads all visual tokens, decides nothing and is what counts in the end."""
        store = self.store
        self._rewind(1)
        store.length -= 1
        store.text_bound -= 1
        store.n_text.sub_(1)
        self.unpruned = True
        try:
            yield
        finally:
            self.unpruned = False

    # ---- one layer --------------------------------------------------------------------------------------------------------------

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Takes the new rows of ``layer``; its ``attend`` must follow, which is given them again. A decode step writes them there."""
        if self._unread is not None:
            raise RuntimeError(
                f"layer {self._unread} stored rows that no attention has read: the patched attention of that layer was bypassed. "
                "Do not replace attention modules after dyrate_kernels.patch(); unpatch, change the model, then patch it."
            )
        self._unread = layer
        passing = self.passing
        if isinstance(passing, DecodePass):
            return
        assert passing is not None, "no forward pass is under way on this cache"
        slots = self.effects.slots(passing, self.store.index_of[layer])
        if slots is not None:  # None: a deferred chunk, whose rows come with the last one
            self.store.write(layer, key, value, slots.row)

    def rotate(self, layer: int, cos: Tensor, sin: Tensor) -> bool:
        """Asks that the attention of ``layer`` rotates its query and its new key by these ``[B or 1, D]``, so that ``write`` and ``attend``
        are given them as they were; before ``write``. Returns whether it will: not every attention can.
        """
        passing = self.passing
        return isinstance(passing, DecodePass) and len(self.decider.stages) == 1 and passing.attention.rotate(layer, cos, sin)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one layer: query ``[B, Hq, q, D]`` -> output ``[B, q, Hq, D]``. At a score layer the policy decides."""
        passing, self._unread = self.passing, None
        if window is not None:
            self.windows.add(window)
        stage = self.decider.stages.get(layer)
        if isinstance(passing, DecodePass):
            if self.branch.apart:
                self.branch.reach(layer)
            if window is not None and window > passing.start:
                window = None  # no row has left it yet
            if stage is None:
                return passing.attention.attend(layer, query, key, value, scale, window)
            new = (key, value)
            return self.scoring.step(passing, stage, query, new, scale, window, self.turn, (self.step, self.column), self.unpruned)
        assert passing is not None, "no forward pass is under way on this cache"
        return self._attend_many(passing, stage, layer, query, key, value, scale, window)

    # ---- a pass of several tokens ---------------------------------------------------------------------------------------------------

    def _attend_many(
        self, passing: MultiTokenPass, stage: Stage | None, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        store, index = self.store, self.store.index_of[layer]
        slots = self.effects.slots(passing, index)
        if slots is None:  # a deferred chunk: nobody reads this
            return torch.zeros_like(query).transpose(1, 2)
        rows = rows_of(store, layer, slots, key, value, passing.blocks).to(query.device)
        allowed = self.effects.allowed.get(index)
        plain = slots.plain and allowed is None and (window is None or passing.start + passing.length <= window)
        if plain and stage is None:
            return attend_many(query, rows, None, scale)
        mask = visibility(rows, slots.column.to(query.device), window)
        if allowed is not None:
            mask = restrict(mask, rows, allowed.to(query.device))
        output = attend_many(query, rows, None if plain else mask, scale)
        if stage is not None:
            self.scoring.many(passing, stage, slots, Seen(query, rows, mask, scale, window), self.turn, self.reduction)
        return output

    # ---- what stats() reads -----------------------------------------------------------------------------------------------------

    @property
    def record(self) -> Record | None:
        """Figures of the turn's steps; None before the first."""
        return self.scoring.record

    @property
    def effects(self) -> Effects:
        """Returns the effects of the decisions of the newest multi-token pass."""
        return self.scoring.effects

    def steps_without_a_drop(self) -> int:
        """Returns how many steps were made, if there were visual tokens and none was dropped in any; else 0. Reads the device."""
        record, store = self.record, self.store
        if record is None or store.full.bound == 0:
            return 0
        told = [(record, store.full.n_visual)]
        told += [(left.record, left.n_visual[0]) for left, _ in self.roster.left.values() if left.record is not None]
        dropped = any(bool((each.kept[: each.steps] < n_visual).any()) for each, n_visual in told)
        return 0 if dropped else record.steps

    def snapshot(self) -> Snapshot:
        """Returns what ``stats()`` needs: copies of small tensors. Reads nothing on the host."""
        store, reduction = self.store, self.reduction
        started = store.started
        columns = started and bool(self.shape.windows)
        return Snapshot(
            policy=self.policy,
            shape=self.shape,
            backend=self.backend,
            retention=self.retention,
            record=copy.copy(self.record),  # its number of steps is that of now
            n_text=store.n_text.clone() if started else None,
            n_visual=[store.held(group).clone() for group in store.groups] if started else [],
            group_layers=[group.layers for group in store.groups],
            bytes_per_row=store.bytes_per_row(),
            bytes_reserved=store.bytes_reserved(),
            prompt_end=self.turn.end,
            text_asked=store.text_asked.clone() if started else None,
            most_visual=[group.most.clone() for group in store.groups] if started else [],
            text_column=store.text_column.clone() if columns else None,
            token_column=store.token_column.clone() if columns else None,
            vision=reduction.names,
            visual_in=None if reduction.visual_in is None else reduction.visual_in.clone(),
            visual_place=reduction.visual_place,
            roster=self.roster,
        )

    # ---- sequences and columns that go ------------------------------------------------------------------------------------------

    def select(self, index: Tensor) -> None:
        """Sequence ``i`` goes on from the former sequence ``index[i]``: everything per sequence follows."""
        if self.store.started:
            self._make_writable()
            for owner in (self.store, self.decider, self.reduction, self.record):
                if owner is not None:
                    owner.select(index)

    def dismiss(self, stays: Sequence[int]) -> None:
        """Leaves only the sequences ``stays`` (ascending numbers in the present batch) in the passes of this turn: the others have ended.
        Their rows go; what was recorded of them stays in ``roster``. Reads nothing on the host.
        """
        self._check_whole()
        snapshot = replace(self.snapshot(), roster=Roster())
        self.roster = self.roster.without(stays, snapshot, self.store.batch)
        self.select(torch.tensor(stays, dtype=torch.int64).to(self.store.device, non_blocking=True))

    @property
    def croppable(self) -> bool:
        """No rows were evicted while decoding."""
        return not self.turn.evicted

    def crop(self, length: int) -> None:
        """Forgets the columns from ``length`` on.

        Raises:
            RuntimeError: rows were evicted while decoding, or the removed columns hold visual tokens and pruned layers have lost rows:
                what was dropped cannot come back. A drafting model may: nothing is decided again there.
        """
        store, turn = self.store, self.turn
        self._make_writable()
        store.settle()
        if not self.croppable:
            raise RuntimeError(
                "crop() after compaction: rows were evicted while decoding and cannot come back. Use retention='recoverable' where the "
                "cache is rolled back (assisted decoding through generate() freezes compaction by itself)."
            )
        into = f"crop() to {length} columns reaches into a prompt (which ends at {turn.end})"
        if self.reduction.active and length < turn.end and not (turn.frozen and self.reduction.all_valid_from(length)):
            raise RuntimeError(f"{into} that vision reducers have shortened. Start again without this cache.")
        if self.retention.shrinks and length < turn.end and store.holds_visual_from(length):
            if not turn.frozen:
                raise RuntimeError(
                    f"{into} whose visual tokens were evicted. Use retention='recoverable', or start again without this cache."
                )
            store.drop_from(length)
        columns = store.length - length
        visual = store.truncate(length)
        self._rewind(columns)
        self.reduction.truncate(length, visual)

    def _rewind(self, columns: int) -> None:
        """The newest ``columns`` never came."""
        self.decider.rewind(columns)
        if self.scoring.record is not None:
            self.scoring.record.rewind(columns)
        self.step.sub_(columns).clamp_(min=0)
        self.column.sub_(columns)

    def _owners(self) -> list[Any]:
        """Returns the objects that hold the state of the conversation, this one first."""
        parts = (self.decider, self.ranker, self.scoring, self.turn, self.reduction, self.blocks, self.record)
        return [self, self.store, *self.store.groups, *(part for part in parts if part is not None)]

    def _make_writable(self) -> None:
        """The conversation may go on outside of the inference mode that it began in."""
        if self.store.started:
            make_writable(self._owners())

    # ---- captured steps ---------------------------------------------------------------------------------------------------------

    def _moves_later(self, apart: bool) -> bool:
        """Rows that the next decode step drops move at the beginning of the one after it; ``apart``: what is forked really runs aside."""
        pruned = self.store.full.bound > 0 and len(self.store.groups) > 1
        return apart and pruned and self.retention.moves and self.decider.at_decode(self.turn.frozen)

    def reserve_step(self, apart: bool = False) -> None:
        """Makes room for one more decode step, so that the step itself replaces no tensor that the next one needs.

        Args:
            apart: ``Branch.apart`` in that step.
        """
        store = self.store
        if self._moves_later(apart):
            store.expect()
        if store.text_bound + 1 >= store.text_capacity:
            store.reserve_text(2 * store.text_capacity)
        if self.scoring.record is not None:
            self.scoring.record.reserve(self.turn.step_of(store.length))

    def step_state(self) -> StepState:
        """Returns what the next decode step depends on, besides its arguments."""
        store, state = self.store, self.decider.state
        sizes = tuple((group.capacity, group.bound) for group in store.groups)
        windows = tuple(sorted(window for window in self.windows if window <= store.length))
        lasting = [*store.lasting_tensors(), self.step, self.column, *state.values(), *(self.record.tensors() if self.record else ())]
        made = [tensor for group in store.groups[1:] for tensor in (group.kept, group.n_kept)]
        return StepState(
            (store.batch, store.text_capacity, sizes, windows, tuple(state)),
            tuple(None if tensor is None else tensor.data_ptr() for tensor in lasting),
            (*made, self.decider.rate),
        )

    def replay(self, run: Callable[[], None], made: Mapping[int, Tensor]) -> None:
        """``carry_out`` of a captured decode step, and what the step itself would have noted on the host.

        Args:
            made: what it made anew: by index in ``StepState.made``.
        """
        store, groups = self.store, self.store.groups[1:]
        self.carry_out(run)
        for index, tensor in made.items():
            if index == 2 * len(groups):
                self.decider.finish(tensor)
            elif index % 2:
                groups[index // 2].n_kept = tensor
            else:
                groups[index // 2].kept = tensor
        if self.scoring.record is not None:
            self.scoring.record.note(self.turn.step_of(store.length))
        store.text_bound += 1
        store.length += 1

    def carry_out(self, run: Callable[[], None]) -> None:
        """Runs on the device what the host has noted already. Should it raise, the rows are incomplete."""
        self.in_forward = True
        run()
        self.in_forward = False

    @contextlib.contextmanager
    def whole_regions(self) -> Iterator[None]:
        """Within: no bound that changes from step to step reaches an operator, so that a step can be captured."""
        before = self.bounds_at_capacity
        self.bounds_at_capacity = True
        try:
            yield
        finally:
            self.bounds_at_capacity = before

    @contextlib.contextmanager
    def decides_aside(self, aside: Aside | None) -> Iterator[None]:
        """Within: what follows from the decision of a decode step runs on ``aside``; None: in its place."""
        self.branch.aside = aside
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # within a broken capture nothing can be joined
                self.branch.join()
            raise
        finally:
            self.branch.aside = None

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Within: an error leaves the host's side as it was. What happened on the device stays."""
        saved = [
            (owner, {name: value.copy() if type(value) in (list, dict, set) else value for name, value in vars(owner).items()})
            for owner in self._owners()
        ]
        try:
            yield
        except BaseException:
            for owner, values in saved:
                vars(owner).clear()
                vars(owner).update(values)
            raise
