"""The pass under way, complete when made: where its columns go, and what kind of pass it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dyrate_kernels.generation import cpu_step
from dyrate_kernels.generation.attend import OperatorStep
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.layout import Arrival, Blocks, SlotMapping, appended, assign_rows
from dyrate_kernels.generation.turn import Reduction, Turn
from dyrate_kernels.ops.reference import RESPONSE

_MOST_ROOM = 4096  # text rows reserved ahead


@dataclass
class DecodePass:
    """One token after the prompt. Reads no value on the host, unless it computes all of them (``CpuStep``).

    Attributes:
        start: its column.
        attention: what attends.
    """

    start: int
    attention: OperatorStep

    decodes: ClassVar[bool] = True
    length: ClassVar[int] = 1


@dataclass
class MultiTokenPass:
    """Any other pass: prompts, chunks of prompts, the next turn of a chat, draft tokens.

    Attributes:
        start, length: columns ``[start, start + length)``.
        drafted: columns at its end that come after the prompt.
        ends_prompt: it holds the prompt's last column.
        deferred: an early chunk of a prompt that is shrunk: pruned layers wait for the last chunk.
        slots: by layer group; a group whose part of the prompt is decided in this pass has none here (``apply.Shrunk``).
        narrow: where reducers left fewer columns, what the layers receive instead: int64 ``[B, width]``, which columns these are, and
            bool, False for filler; None: all.
        joined: columns of this and the waiting chunks, where it ends a prompt that is shrunk.
        moved: int64 ``[B, 1]``, by how much this pass moved the columns that came before, or None.
        blocks: ``layout.Blocks.counted``.
    """

    start: int
    length: int
    drafted: int
    ends_prompt: bool
    deferred: bool
    slots: dict[int, SlotMapping]
    narrow: tuple[Tensor, Tensor] | None
    joined: SlotMapping | None
    moved: Tensor | None
    blocks: Tensor | None

    decodes: ClassVar[bool] = False

    @property
    def width(self) -> int:
        """Columns that the layers before the first pruned one receive: ``length``, or fewer where reducers left fewer."""
        return self.slots[0].column.shape[1]

    @property
    def reads_prompt(self) -> bool:
        """Some column is of the prompt."""
        return self.drafted < self.length


def decode(store: RowStore, column: Tensor, unpruned: bool, whole: bool) -> DecodePass:
    """A decode step, for which there is room; the new token is counted **in the store**.

    Args:
        column, unpruned, whole: as in ``OperatorStep``.
    """
    row = store.n_text[:, None].long()
    store.text_type.scatter_(1, row, RESPONSE)
    store.text_column.scatter_(1, row, column.expand(store.batch, 1))
    store.n_text.add_(1)
    store.text_bound += 1
    on_cpu = cpu_step.enabled and store.backend == "reference" and row.device.type == "cpu" and not whole
    attention = (cpu_step.CpuStep if on_cpu else OperatorStep)(store, row, column, unpruned, whole)
    return DecodePass(store.length, attention)


def many(
    store: RowStore, turn: Turn, reduction: Reduction, blocks: Blocks, new: Arrival, staged_blocks: Tensor | None, prunes: bool
) -> MultiTokenPass:  # fmt: skip
    """A pass of several tokens: makes room for its rows and notes them **in the store**.

    Args:
        new: its columns; ``turn`` knows of them.
        staged_blocks: ``Blocks.note``.
        prunes: its prompt is shrunk in the pruned layers.
    """
    room = min(max(turn.max_length - new.end, 0), _MOST_ROOM)
    store.reserve_text(new.most_text + room)
    store.reserve_tokens(new.most_visual)
    store.ask(new.total_visual, new.total_text + room)
    blocks.note(staged_blocks, new, turn.end)
    width, moved = new.columns.expand(store.batch, -1), None
    if reduction.active:
        width, moved = reduction.count(store, new)
        for chunk in turn.waiting:
            chunk.slots.column = chunk.slots.column + moved
    ends_prompt = turn.ends_within(new.start, new.length)
    slots = assign_rows(store, new, width, turn.start == 0, ends_prompt, blocks.every is None)
    if reduction.active and reduction.valid is not None:
        reduction.note(new, slots.token, store.full.capacity)
        blocks.count(reduction.valid)
    drafted, narrow = max(new.end - max(turn.end, new.start), 0), None
    size = max(new.most, 1)
    if reduction.active and not drafted and not reduction.keeps_width and size < new.length:
        slots, narrow = slots.narrowed(size, slots.fresh and blocks.every is None and new.most == new.least > 0)
    store.full.n_visual.copy_(new.total_visual)
    store.text_bound = new.most_text
    by_group = {0: slots}
    for index, group in enumerate(store.groups):
        if store.shared_rows or index == 0:
            group.bound, by_group[index] = new.most_visual, slots
        elif not prunes:  # nothing is decided (drafts, a second turn of text): the group takes every new row
            by_group[index] = appended(store, group, slots, slots.plain)
    joined = None
    if prunes and ends_prompt:
        joined = slots
        for chunk in reversed(turn.waiting):
            joined = chunk.slots.followed_by(joined)
    deferred = prunes and new.end < turn.end
    return MultiTokenPass(new.start, new.length, drafted, ends_prompt, deferred, by_group, narrow, joined, moved, blocks.counted)
