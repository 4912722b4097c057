"""One ``generate()`` of a conversation: its bounds and what was there before it; and prompts that reducers have shortened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyrate_kernels.generation.index import picked, resized, scatter_
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.layout import Arrival, SlotMapping


class Before(NamedTuple):
    """int32 ``[B]`` each, before a turn: visual tokens and text rows that were held, and those visual tokens before any reducer."""

    visual: Tensor
    text: Tensor
    visual_in: Tensor


@dataclass
class EarlyChunk:
    """A chunk of a prompt that the pruned layers have not seen yet: the last chunk decides what they will see of it.

    Attributes:
        slots: of its columns, in the layers before the first pruned one.
        hidden: ``[B, q, d]``, what the first pruned layer would have received.
        positions: by layer, what else it would have received; nobody here looks into it.
    """

    slots: SlotMapping
    hidden: Tensor
    positions: dict[int, Any] = field(default_factory=dict)


@dataclass
class Turn:
    """One ``generate()``.

    Attributes:
        number: 0 for the first one of the conversation; -1: none has begun.
        start, end: columns of its prompt, from the first up to but not including the last. end -1: where its first pass ends.
        max_length: columns it may reach.
        frozen: rows are not compacted while decoding (assisted decoding rolls the cache back).
        mask: ``[B, columns]`` of all columns up to the prompt's end, as its caller gave it, or None.
        new_images: it brought visual tokens.
        evicted: rows were evicted while decoding.
        before: what was there before it; None: nothing has come yet.
        waiting: early chunks of its prompt.
    """

    number: int = -1
    start: int = 0
    end: int = 0
    max_length: int = 0
    frozen: bool = False
    mask: Tensor | None = None
    new_images: bool = False
    evicted: bool = False
    before: Before | None = None
    waiting: list[EarlyChunk] = field(default_factory=list)

    def step_of(self, column: int) -> int:
        """Step of the pass that reads this column: 0 for the prompt's last, 1 for the first decode step."""
        return column - self.end + 1

    def note(self, new: Arrival, store: RowStore, reduction: Reduction) -> None:
        """A pass of several tokens begins; nothing of it is stored yet."""
        if self.end < 0:
            self.end = new.end
        if new.start == self.start:
            visual, before = store.full.n_visual, reduction.visual_in
            self.before = Before(visual.clone(), store.n_text.clone(), (visual if before is None else before).clone())
        self.new_images |= bool(new.added)

    def go_on(self, max_length: int, frozen: bool, mask: Tensor | None) -> None:
        """Another call goes on with this turn."""
        self.max_length, self.frozen, self.mask = max_length, frozen, mask

    def evict(self) -> None:
        """Rows were evicted in a decode step."""
        self.evicted = True

    def ends_within(self, start: int, length: int) -> bool:
        """The prompt's last column is among these."""
        return start < self.end <= start + length


class Reduction:
    """The changes that reducers before the language model made to the prompts of a conversation.

    Where they masked columns, those of a sequence are counted without these, from the newest one back, so that sliding windows measure
    what the language model really received.

    Attributes:
        names: of the reducers, for ``stats()``, or None.
        active: they have masked columns within prompts.
        keeps_width: no columns are left out of the passes (their caller wants the hidden states).
        valid: bool ``[B, columns]`` where active: which columns are real, for the mask of the next turn.
        visual_in: int32 ``[B]`` where active: visual tokens before the reducers.
        visual_place: int64 ``[B, N]`` where active: which of those each visual token stands in the place of.
    """

    def __init__(self) -> None:
        self.names: str | None = None
        self.active = self.keeps_width = False
        self.valid: Tensor | None = None
        self.visual_in: Tensor | None = None
        self.visual_place: Tensor | None = None

    def begin(self, names: str, active: bool, keeps_width: bool) -> None:
        """Another turn begins; one in which nothing was reduced says nothing of ``keeps_width``."""
        self.names = names
        if active:
            self.active, self.keeps_width = True, keeps_width

    def all_valid_from(self, column: int) -> bool:
        """No column from this one on is masked, so that they can be read again. Reads the device."""
        return self.valid is not None and bool(self.valid[:, column:].all())

    def count(self, store: RowStore, new: Arrival) -> tuple[Tensor, Tensor]:
        """Counts the columns of a pass back from its end, over the valid ones; **moves** the columns in the store up to them.

        Returns:
            int64 ``[B, q]``, and by how much what came earlier moved: int64 ``[B, 1]``.
        """
        self.valid = torch.cat([new.earlier, new.valid], dim=1)
        masked = new.length - new.valid.sum(1, keepdim=True)
        store.text_column += masked.int()
        store.token_column += masked.int()
        return new.end - new.valid.flip(1).cumsum(1).flip(1), masked

    def note(self, new: Arrival, token: Tensor, capacity: int) -> None:
        """Notes in place of which token each of a pass's visual tokens ``token`` (int64 ``[B, q]``) stands; ``capacity``: their most."""
        batch = token.shape[0]
        before = new.placeholder.sum(1, dtype=torch.int32)
        had = torch.zeros_like(before) if self.visual_in is None else self.visual_in
        visual_place = token.new_zeros(batch, 0) if self.visual_place is None else self.visual_place
        visual_place = resized(visual_place, capacity).clone()  # what stats() has taken stays
        scatter_(visual_place, torch.where(new.visual, token, -1), had[:, None] + new.placeholder.cumsum(1) - 1)
        self.visual_place, self.visual_in = visual_place, had + before

    def truncate(self, length: int, visual: Tensor) -> None:
        """The columns from ``length`` on are gone, among them ``visual`` int32 ``[B]`` visual tokens."""
        if self.valid is not None:
            self.valid = self.valid[:, :length]
        if self.visual_in is not None:
            self.visual_in = self.visual_in - visual

    def select(self, index: Tensor) -> None:
        """Sequences were reordered."""
        if self.active and self.valid is not None and self.visual_in is not None and self.visual_place is not None:
            self.valid, self.visual_in = picked(self.valid, index), picked(self.visual_in, index)
            self.visual_place = picked(self.visual_place, index)
