"""The record of a generation: written on the device while it runs, read once when asked (``dyrate_kernels.stats``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.generation.index import below, picked
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.turn import Before
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.retention import Retention

_BY_STEP = ("rate", "mass", "kept", "again", "near", "near_again", "importance", "chosen")
_BY_GROUP = ("kept", "again", "near", "near_again")  # their sequences are the third dimension


@dataclass(frozen=True)
class Part:
    """The layers of a group that share a sliding window.

    Attributes:
        group: index of the group.
        layers: which they are.
        window: columns that they read back, their own among them; None: all.
    """

    group: int
    layers: list[int]
    window: int | None


def parts_of(groups: Sequence[range], windows: Sequence[int | None]) -> list[Part]:
    """Groups of layers, each by window.

    Args:
        groups: the layers of each group.
        windows: ``ModelShape.windows``.
    """
    of = windows or [None] * (groups[-1].stop if groups else 0)
    return [
        Part(index, [layer for layer in layers if of[layer] == window], window)
        for index, layers in enumerate(groups)
        for window in dict.fromkeys(of[layer] for layer in layers)
    ]


def windowed(groups: Sequence[range], windows: Sequence[int | None]) -> list[Part]:
    """The pruned parts that have a window: what ``Record.near`` counts."""
    return [part for part in parts_of(groups, windows) if part.window is not None and part.group > 0]


def first_columns(
    text_column: Tensor, token_column: Tensor, n_text: Tensor, n_visual: Tensor, visual_before: Tensor, text_before: Tensor
) -> Tensor:
    """int ``[B]``: the column of the first row, text or visual, that came after the first ``..before`` ones."""
    last = torch.iinfo(torch.int32).max
    first = text_column.new_full(n_text.shape, last)
    for column, count, before in ((text_column, n_text, text_before), (token_column, n_visual, visual_before)):
        if column.shape[1]:
            found = column.gather(1, before.long().clamp(max=column.shape[1] - 1)[:, None])[:, 0]
            first = torch.where(before < count, torch.minimum(first, found), first)
    return first


class Record:
    """Per-step tensors of one turn. Writing is a few small copies on the device, at an index that lives on the device.

    Args:
        store: whose rows are counted.
        before: what it held before the turn.
        prompt_end: column at which the prompt ended.
        max_length: columns that the turn may reach; 0: not known.
        windows: sliding window of each layer, as in ``ModelShape``.
        keep_importance: keep importance and kept tokens, too.
        counts_again: steps may run again unpruned (``Policy.checks``).

    Attributes:
        steps: one more than the newest step written.
        rate ``[S, B]``, mass ``[S, B, 4]``, kept ``[S, G, B]``: of each step.
        again: ``[S, G, B]``, what a pass kept before the step ran again, plus 1; 0: it did not.
        near, near_again: ``[S, P, B]``, of what is kept, the rows that the window of each part shows.
        importance, chosen: ``[S, B, N]``.
        computed: int64 ``[G, B]``: visual tokens of a shrunk prompt that each group computed.
    """

    rate: Tensor
    mass: Tensor
    kept: Tensor
    again: Tensor | None = None
    near: Tensor | None = None
    near_again: Tensor | None = None
    importance: Tensor | None = None
    chosen: Tensor | None = None
    computed: Tensor | None = None

    def __init__(
        self, store: RowStore, before: Before, prompt_end: int, max_length: int, windows: Sequence[int | None], keep_importance: bool,
        counts_again: bool,
    ) -> None:  # fmt: skip
        self.device, self.batch = store.device, store.batch
        self.groups = max(len(store.groups) - 1, 1)
        self.tokens = store.full.capacity
        self.before, self.prompt_end = before, prompt_end
        self.parts = windowed([group.layers for group in store.groups], windows)
        self.keep_importance, self.counts_again = keep_importance, counts_again
        self.capacity = self.steps = 0
        self._grow(max(max_length - prompt_end, 0) + 2 if max_length else 64)

    def _grow(self, capacity: int) -> None:
        capacity = min(capacity, max(4096, 2 * self.capacity))
        sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "rate": (torch.float64, (self.batch,)),
            "mass": (torch.float32, (self.batch, 4)),
            "kept": (torch.int32, (self.groups, self.batch)),
        }
        if self.counts_again:
            sizes["again"] = sizes["kept"]
        if self.parts:
            sizes["near"] = (torch.int32, (len(self.parts), self.batch))
            if self.counts_again:
                sizes["near_again"] = sizes["near"]
        if self.keep_importance:
            sizes["importance"] = (torch.float32, (self.batch, self.tokens))
            sizes["chosen"] = (torch.bool, (self.batch, self.tokens))
        for name, (dtype, shape) in sizes.items():
            old, new = getattr(self, name, None), torch.zeros(capacity, *shape, dtype=dtype, device=self.device)
            if old is not None:
                new[: old.shape[0]] = old
            setattr(self, name, new)
        self.capacity = capacity

    def tensors(self) -> list[Tensor]:
        """Those that a step writes."""
        return [tensor for name in _BY_STEP if (tensor := getattr(self, name)) is not None]

    def reserve(self, step: int) -> None:
        """Makes room for ``step``."""
        if step >= self.capacity:
            self._grow(2 * self.capacity)

    def note(self, step: int) -> None:
        """``step`` is written, or will be before anyone reads."""
        self.steps = max(self.steps, step + 1)

    def rewind(self, steps: int) -> None:
        """The newest ``steps`` are none: their tokens were refused."""
        self.steps = max(self.steps - steps, 0)
        if self.again is not None:
            self.again[self.steps :] = 0

    def write(
        self, store: RowStore, step: int, mass: Tensor, importance: Tensor | None, rate: Tensor | None, *, counters: Any = None,
        unpruned: bool = False, kept: Tensor | None = None, allowed: Mapping[int, Tensor] | None = None, computed: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Notes one step.

        Args:
            mass: ``[B, Hq, 4]``.
            importance: ``[B, N]`` or None.
            rate: ``[B]``; None: there was no decision.
            counters: of a decode step: int64 ``[1]`` and int32 ``[1]``, step and column on the device, whose content changes where
                the step is captured; None: they are made.
            unpruned: the step ran once more, with all visual tokens.
            kept: int32 ``[G, B]``; None: what the groups keep now.
            allowed: by group, bool ``[B, N]``: what this (draft) row reads; of other groups what they keep now.
            computed: for ``computed``.
        """
        self.reserve(step)
        self.note(step)
        allowed = allowed or {}
        index = torch.full((1,), step, dtype=torch.int64, device=self.device) if counters is None else counters[0]
        reads_all = unpruned or step == 0  # of what it holds
        if kept is None:
            groups = store.groups[1:] or store.groups
            kept = torch.stack([group.n_visual if group.n_kept is None or reads_all else group.n_kept for group in groups])
        if unpruned:
            self._put("again", index, self._get("kept", index) + 1)
            if self.parts:
                self._put("near_again", index, self._get("near", index))
        if self.parts:
            column = self._column(store, step) if counters is None else counters[1]
            self._put("near", index, self._near(store, step, column, kept, reads_all, allowed)[None])
        if computed is not None:
            self.computed = computed
        if rate is not None:
            removes_none = unpruned or (step == 0 and store.shared_rows)
            self._put("rate", index, (torch.zeros_like(rate) if removes_none else rate).to(torch.float64)[None])
        self._put("mass", index, mass.to(self.device, torch.float32).mean(1)[None])
        self._put("kept", index, kept[None])
        if self.keep_importance and importance is not None:
            self._put("importance", index, importance.to(self.device, torch.float32)[None, :, : self.tokens])
            chosen = self._chosen(store, reads_all) if 1 not in allowed else allowed[1]
            self._put("chosen", index, chosen[None, :, : self.tokens])

    def _put(self, name: str, index: Tensor, value: Tensor) -> None:
        getattr(self, name).index_copy_(0, index, value)

    def _get(self, name: str, index: Tensor) -> Tensor:
        return getattr(self, name).index_select(0, index)

    def _column(self, store: RowStore, step: int) -> Tensor:
        """int32 ``[1]`` or ``[B]``: the column whose windows count in a step that is no decode step."""
        if step > 0:
            return torch.full((1,), self.prompt_end + step - 1, dtype=torch.int32, device=self.device)
        held = (store.text_column, store.token_column, store.n_text, store.full.n_visual)
        return first_columns(*held, self.before.visual, self.before.text)

    def _near(
        self, store: RowStore, step: int, column: Tensor, kept: Tensor, reads_all: bool, allowed: Mapping[int, Tensor]
    ) -> Tensor:  # fmt: skip
        """int32 ``[parts, B]``: kept visual rows that the window of each part shows."""
        near, newest = [], self.prompt_end + step - 1
        for part in self.parts:
            group = store.groups[part.group]
            assert part.window is not None
            if part.window > newest:  # hides nothing yet
                near.append(kept[part.group - 1])
                continue
            columns, live = store.token_column, None
            if part.group in allowed:
                live = allowed[part.group]
            else:
                if not store.shared_rows:
                    columns = columns.gather(1, group.token)
                if group.kept is not None and not reads_all:
                    columns, live = columns.gather(1, group.kept.clamp(min=0).long()), group.kept >= 0
            if live is None:
                live = below(group.n_visual, columns.shape[1])
            columns = columns[:, : live.shape[1]]
            near.append((live[:, : columns.shape[1]] & (columns > column[:, None] - part.window)).sum(1, dtype=torch.int32))
        return torch.stack(near)

    def _chosen(self, store: RowStore, all_tokens: bool) -> Tensor:
        group = (store.groups[1:] or store.groups)[0]
        kept = None if all_tokens else store.tokens_kept(group)
        if kept is not None:
            return kept
        return below(store.full.n_visual, self.tokens) if group.alive is None else group.alive

    def select(self, index: Tensor) -> None:
        """Sequences were reordered: their records follow, in place where the batch keeps its size."""
        self.before = Before(*(picked(tensor, index) for tensor in self.before))
        for name in (*_BY_STEP, "computed"):
            tensor = getattr(self, name)
            if tensor is not None:
                dim = 2 if name in _BY_GROUP else 1
                chosen = picked(tensor.movedim(dim, 0).contiguous(), index).movedim(0, dim)
                setattr(self, name, tensor.copy_(chosen) if chosen.shape == tensor.shape else chosen.contiguous())
        self.batch = index.shape[0]


@dataclass(frozen=True)
class Snapshot:
    """The part of a session that ``stats()`` needs, without its keys and values, so that asking later does not keep them in memory.

    Attributes:
        policy, shape, backend, retention: of the session.
        record: its per-step tensors.
        n_text: int32 ``[B]``, live text rows.
        n_visual: by group, int32 ``[B]``, live visual rows; the full group first.
        group_layers: layers of each group.
        bytes_per_row, bytes_reserved: as the store tells.
        prompt_end: column at which the prompt ended.
        text_asked, most_visual: int32 ``[B]``, the latter by group: what the room of each sequence alone follows from.
        text_column, token_column: int32 ``[B, ..]``, of text rows and visual tokens, where layers have windows; else None.
        vision, visual_in, visual_place: of ``turn.Reduction``.
        roster: the sequences that the figures above are of, and those that left before.
    """

    policy: Policy
    shape: ModelShape
    backend: str
    retention: Retention
    record: Record | None
    n_text: Tensor | None
    n_visual: list[Tensor]
    group_layers: list[range]
    bytes_per_row: list[int]
    bytes_reserved: int
    prompt_end: int
    text_asked: Tensor | None
    most_visual: list[Tensor]
    text_column: Tensor | None
    token_column: Tensor | None
    vision: str | None
    visual_in: Tensor | None
    visual_place: Tensor | None
    roster: Roster = field(default_factory=lambda: Roster())

    def of(self, sequence: int | None) -> tuple[Snapshot, int | None]:
        """Returns the snapshot that tells of one sequence of the batch that the turn began with, and its number there.

        Raises:
            RuntimeError: ``sequence`` is None, all of them, and some left before the others.
            ValueError: there is no such sequence.
        """
        roster = self.roster
        if roster.present is None:
            return self, sequence
        if sequence is None:
            raise RuntimeError(
                f"{len(roster.left)} of {roster.batch} sequences left the batch when they had ended, so no step is of all: "
                "ask for one of them, stats(sequence, new_tokens)"
            )
        if not 0 <= sequence < roster.batch:
            raise ValueError(f"sequence must be in [0, {roster.batch - 1}], got {sequence}")
        return roster.left[sequence] if sequence in roster.left else (self, roster.present.index(sequence))


@dataclass(frozen=True)
class Roster:
    """The sequences of a turn's batch that are still in its passes; the others have ended and left.

    Attributes:
        batch: how many the turn began with; 0: nobody left.
        present: numbers of those that stay, ascending; None: all do.
        left: by number, what was recorded of a sequence when it left, and its number in that.
    """

    batch: int = 0
    present: list[int] | None = None
    left: dict[int, tuple[Snapshot, int]] = field(default_factory=dict)

    def without(self, stays: Sequence[int], snapshot: Snapshot, batch: int) -> Roster:
        """The roster once only the sequences ``stays`` are left of the ``batch`` that are present, which ``snapshot`` is of."""
        present = list(range(batch)) if self.present is None else self.present
        staying = set(stays)
        gone = {number: (snapshot, place) for place, number in enumerate(present) if place not in staying}
        return Roster(self.batch or batch, [present[place] for place in stays], self.left | gone)
