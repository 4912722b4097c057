"""Which column of a pass of several tokens sits in which row, of which token type it is, and what may see what.

A row is visible by its *column*, not by its index in the buffer, because rows are stored in an order of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dyrate_kernels.generation.index import below, right_aligned, scattered
from dyrate_kernels.generation.kv_store import RowGroup, RowStore
from dyrate_kernels.ops.reference import IMAGE, INSTRUCTION, RESPONSE, SYSTEM


class Arrival(NamedTuple):
    """New columns, looked at before anything is changed.

    Attributes:
        start, length: columns ``[start, start + length)``.
        columns: int64 ``[q]``; prompt bool ``[q]``: those of the prompt.
        valid, visual, text: bool ``[B, q]``: no padding, visual tokens, all others.
        placeholder: bool ``[B, q]``: visual by their ids, masked ones among them.
        earlier: bool ``[B, start]``: which of the columns before are valid, as far as the mask says.
        total_visual, total_text: int32 ``[B]``, with what is held already; widest of each: most_visual, most_text.
        valid_count: int64 ``[B]``; its sum, maximum and minimum: real, most, least.
        added: visual tokens among them, in all sequences.
    """

    start: int
    length: int
    columns: Tensor
    prompt: Tensor
    valid: Tensor
    visual: Tensor
    text: Tensor
    placeholder: Tensor
    earlier: Tensor
    total_visual: Tensor
    total_text: Tensor
    most_visual: int
    most_text: int
    valid_count: Tensor
    real: int
    most: int
    least: int
    added: int

    @property
    def end(self) -> int:
        return self.start + self.length


def look(
    store: RowStore, start: int, length: int, prompt_end: int, mask: Tensor | None, staged: Tensor | None, device: torch.device,
    frozen: bool,
) -> Arrival:  # fmt: skip
    """Reads what comes; one host read, changes nothing.

    Args:
        prompt_end: column at which the prompt ends.
        mask: ``[B, start + length]`` or ``[B, length]``, 0 for padding; None: there is none.
        staged: bool ``[B, length]``, which columns are visual tokens by their ids; None: none.
        frozen: the pass may begin with a column of a prompt that was read before (a drafting model).

    Raises:
        ValueError: a mask of another shape, or whose prompt ends with padding.
    """
    batch = store.batch
    columns = torch.arange(start, start + length, device=device)
    prompt = columns < prompt_end
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    earlier = valid.new_ones(batch, start)
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            raise ValueError(
                f"attention_mask must be [{batch}, {start + length}] (0 = padding), got {list(mask.shape)}; "
                "a patched model makes its own causal mask"
            )
        valid = mask[:, -length:].to(device=device, dtype=torch.bool)
        if mask.shape[1] == start + length:
            earlier = mask[:, :start].to(device=device, dtype=torch.bool)
    placeholder = torch.zeros_like(valid) if staged is None else staged.to(device) & prompt
    visual = placeholder & valid
    text = valid & ~visual
    new_visual = visual.sum(1, dtype=torch.int32)
    total_visual, total_text = store.full.n_visual + new_visual, store.n_text + text.sum(1, dtype=torch.int32)
    last = prompt_end - 1 - start  # of the prompt, where this pass holds it: what comes after it is drafted, padding ids included
    last = last if last in range(length) else length - 1
    # the one host read of a prompt: how much room its rows need, and whether it is padded
    count = valid.sum(1)
    most_visual, most_text, added, last_real, real, most, least = torch.stack(
        [total_visual.max(), total_text.max(), new_visual.sum(), valid[:, last].all(), valid.sum(), count.max(), count.min()]
    ).tolist()
    if not last_real and start + length >= prompt_end > (start if frozen else 0):
        raise ValueError(
            "attention_mask ends with padding (right padding); a patched model needs the last prompt token in the last column. "
            "Set processor.tokenizer.padding_side = 'left'."
        )
    return Arrival(
        start, length, columns, prompt, valid, visual, text, placeholder, earlier, total_visual, total_text, most_visual, most_text, count,
        real, most, least, added,
    )  # fmt: skip


@dataclass
class SlotMapping:
    """The tokens that the layers of one group receive in a multi-token pass, and their rows.

    Attributes:
        column: int64 ``[B, q]``, absolute column of each hidden-state row.
        stored: bool ``[B, q]``, False for padding and for tokens that are dropped here.
        token: int64 ``[B, q]``, visual token index, -1 for text.
        text: int64 ``[B, q]``, text row index, -1 for visual tokens and padding.
        type: uint8 ``[B, q]``, token type.
        row: int64 ``[B, q]``, destination row in the buffers, -1 for rows that are not stored.
        fresh: the group held nothing before, so the new rows are all there is to read.
        plain: besides ``fresh``: no padding, every sequence equally long, columns ascending (causal attention needs no mask).
    """

    column: Tensor
    stored: Tensor
    token: Tensor
    text: Tensor
    type: Tensor
    row: Tensor
    fresh: bool
    plain: bool

    @property
    def visual(self) -> Tensor:
        """bool ``[B, q]``: visual tokens that are stored."""
        return self.stored & (self.token >= 0)

    @property
    def stored_token(self) -> Tensor:
        """int64 ``[B, q]``: the visual token of each column, -1 for text, filler and dropped tokens."""
        return torch.where(self.stored, self.token, -1)

    def followed_by(self, later: SlotMapping) -> SlotMapping:
        """The columns of both, in a row."""

        def both(name: str) -> Tensor:
            return torch.cat([getattr(self, name), getattr(later, name)], dim=1)

        column, stored, token, text, kind, row = map(both, ("column", "stored", "token", "text", "type", "row"))
        return SlotMapping(column, stored, token, text, kind, row, later.fresh, later.plain)

    def at(self, source: Tensor, filled: Tensor, plain: bool) -> SlotMapping:
        """The columns ``source`` (int64 ``[B, s]``) alone; ``filled`` bool ``[B, s]``, False for filler, which is not stored."""

        def pick(tensor: Tensor, filler: int) -> Tensor:
            return tensor.gather(1, source).masked_fill(~filled, filler)

        return SlotMapping(
            self.column.gather(1, source), self.stored.gather(1, source) & filled, pick(self.token, -1), pick(self.text, -1),
            pick(self.type, INSTRUCTION), pick(self.row, -1), self.fresh, plain,
        )  # fmt: skip

    def narrowed(self, size: int, plain: bool) -> tuple[SlotMapping, tuple[Tensor, Tensor]]:
        """Only the columns that are stored, right aligned in ``size`` ones, and where these came from (``index.right_aligned``)."""
        source, filled = right_aligned(self.stored, size)
        return self.at(source, filled, plain), (source, filled)


def assign_rows(store: RowStore, new: Arrival, width: Tensor, first_turn: bool, ends_prompt: bool, plain: bool) -> SlotMapping:
    """Gives new columns their rows in the groups that hold every row, and notes column and type of each. There is room for them.

    Args:
        width: int64 ``[B, q]``, column of each as sliding windows count them.
        first_turn: text before the first picture is of type SYSTEM, unless there comes none.
        plain: nothing but what ``new`` says speaks against causal attention without a mask.
    """
    full = store.full
    token = torch.where(new.visual, full.n_visual[:, None] + new.visual.cumsum(1) - 1, -1)
    text_row = torch.where(new.text, store.n_text[:, None] + new.text.cumsum(1) - 1, -1)
    seen_image = (full.n_visual[:, None] > 0) | (new.visual.cumsum(1) > 0)
    kind = torch.where(seen_image, INSTRUCTION, SYSTEM) if first_turn else torch.full_like(token, INSTRUCTION)
    kind = torch.where(new.prompt, kind, RESPONSE)
    kind = torch.where(new.visual, IMAGE, kind).to(torch.uint8)
    scratch = torch.where(new.text, text_row, store.text_capacity - 1)
    store.text_type.scatter_(1, scratch, kind)
    store.text_column.scatter_(1, scratch, width.int())
    if new.added:
        store.add_tokens(token, width)
    store.n_text.copy_(new.total_text)
    if first_turn and ends_prompt:  # a prompt without an image has no system part
        no_image = (new.total_visual == 0)[:, None]
        store.text_type.masked_fill_(no_image & (store.text_type == SYSTEM), INSTRUCTION)
        kind = kind.masked_fill(no_image & (kind == SYSTEM), INSTRUCTION)
    row = torch.where(new.visual, token, torch.where(new.text, full.capacity + text_row, -1))
    fresh = new.start == 0
    return SlotMapping(width, new.valid, token, text_row, kind, row, fresh, fresh and plain and new.real == new.valid.numel())


def appended(store: RowStore, group: RowGroup, slots: SlotMapping, plain: bool) -> SlotMapping:
    """These columns at the end of a group that holds rows of its own: its visual tokens get new rows there. One host read."""
    visual = slots.visual
    row = store.append(group, slots.token, visual)
    row = torch.where(visual, row, torch.where(slots.stored & (slots.text >= 0), group.capacity + slots.text, -1))
    return replace(slots, row=row, plain=plain)


class Blocks:
    """Columns of prompts that see each other in both directions.

    Attributes:
        every: int64 ``[B, columns]``, by column its block, -1 for none; None: prompts are causal throughout.
        counted: the same by column as sliding windows count them (``turn.Reduction``): what ``KeyRows.blocks`` is.
    """

    def __init__(self) -> None:
        self.every: Tensor | None = None
        self.counted: Tensor | None = None

    def note(self, staged: Tensor | None, new: Arrival, prompt_end: int) -> None:
        """Takes over what is known of new columns: int64 ``[B, columns so far]``. What was known from ``new.start`` on was cropped."""
        if self.every is None and staged is None:
            return
        table = torch.full((new.valid.shape[0], new.end), -1, dtype=torch.int64, device=new.valid.device)
        for known, until in ((self.every, new.start), (staged, new.end)):
            if known is not None:
                width = min(known.shape[1], until)
                table[:, :width] = known[:, :width].to(table.device)
        table[:, prompt_end:] = -1  # drafted tokens are given the type of the prompt's last one
        self.every = self.counted = table

    def count(self, valid: Tensor) -> None:
        """Moves the blocks to where columns are counted without the masked ones: valid bool ``[B, columns]``."""
        if self.every is None:
            return
        columns = valid.shape[1]
        column = torch.where(valid, columns - valid.flip(1).cumsum(1).flip(1), -1)
        self.counted = scattered(column, self.every, columns, -1)


@dataclass
class KeyRows:
    """Rows that may be read.

    Attributes:
        key, value: ``[B, Hkv, R, D]``.
        column: int64 ``[B, R]``, absolute column of each row.
        live: bool ``[B, R]``, False for padding, dropped tokens and rows past a sequence's end.
        token: int64 ``[B, R]``, visual token index, -1 for text.
        type: uint8 ``[B, R]``, token type.
        blocks: ``Blocks.counted``.
    """

    key: Tensor
    value: Tensor
    column: Tensor
    live: Tensor
    token: Tensor
    type: Tensor
    blocks: Tensor | None = None

    def to(self, device: torch.device) -> KeyRows:
        """The same rows with all metadata on ``device``."""
        column, live, token, kind = (t.to(device) for t in (self.column, self.live, self.token, self.type))
        return KeyRows(self.key, self.value, column, live, token, kind, None if self.blocks is None else self.blocks.to(device))


def rows_of(store: RowStore, layer: int, slots: SlotMapping, key: Tensor, value: Tensor, blocks: Tensor | None) -> KeyRows:
    """Everything the rows of a pass may read in ``layer``; its own rows ``key``, ``value`` are stored already."""
    if slots.fresh:
        return KeyRows(key, value, slots.column, slots.stored, slots.token, slots.type, blocks)
    group = store.group_of[layer]
    keys, values = store.live_slices(layer)
    visual, text = group.bound, store.text_bound
    live = torch.cat([below(group.n_visual, visual), below(store.n_text, text)], dim=1)
    token = torch.cat([group.token[:, :visual], torch.full_like(store.text_column[:, :text], -1, dtype=torch.int64)], dim=1)
    kind = torch.cat([torch.ones_like(token[:, :visual], dtype=torch.uint8), store.text_type[:, :text]], dim=1)
    return KeyRows(keys, values, store.columns(group, visual, text).long(), live, token, kind, blocks)


def visibility(rows: KeyRows, column: Tensor, window: int | None) -> Tensor:
    """bool ``[B, q, R]``: row r is live, not later than query q (column int64 ``[B, q]``) or in its block, and inside the sliding window.
    A query may see nothing: padding, and a dropped picture's last token that nothing was written before.
    """
    query, key = column[:, :, None], rows.column[:, None]
    seen = key <= query
    if rows.blocks is not None:
        own = _block_of(rows.blocks, column)[:, :, None]
        seen = seen | ((own == _block_of(rows.blocks, rows.column)[:, None]) & (own >= 0))
    mask = rows.live[:, None] & seen
    if window is not None:
        mask &= query - key < window
    return mask


def _block_of(blocks: Tensor, column: Tensor) -> Tensor:
    """int64 like ``column`` ``[B, n]``: the block that each is in."""
    last = blocks.shape[1] - 1
    return torch.where((column < 0) | (column > last), -1, blocks.gather(1, column.clamp(0, last)))


def restrict(mask: Tensor, rows: KeyRows, allowed: Tensor) -> Tensor:
    """``mask`` where the last ``d`` rows of the pass may read only the visual tokens ``allowed`` ``[B, d, N]``."""
    drafted = allowed.shape[1]
    token = rows.token[:, None].expand(-1, drafted, -1)
    may = allowed.gather(2, token.clamp(min=0)) | (token < 0)
    mask = mask.clone()
    mask[:, -drafted:] &= may
    return mask
