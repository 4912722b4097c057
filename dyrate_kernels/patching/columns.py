"""Which row of the cache each column of a wide pass goes to: a prompt, a chunk of one, the next turn of a chat, drafted tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyrate_kernels.cache import INSTRUCTION, RESPONSE, SYSTEM
from dyrate_kernels.patching.forward import Forward, Slot

if TYPE_CHECKING:
    from dyrate_kernels.cache import RowGroup
    from dyrate_kernels.patching.session import Session


def lay_out(
    session: Session, start: int, length: int, attention_mask: Tensor | None, staged: Tensor | None, device: torch.device
) -> Forward:  # fmt: skip
    """A wide pass of ``length`` columns from ``start`` on. Checks everything before it changes anything.

    Args:
        staged: bool ``[B, q]``, which columns are visual tokens by their ids; None: none.
    """
    cache = session.cache
    batch = cache.batch_size
    columns = torch.arange(start, start + length, device=device)
    prompt = columns < session.turn_end
    valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask must be [{batch}, {start + length}] (0 = padding), got {list(attention_mask.shape)}; "
                "a patched model makes its own causal mask"
            )
        valid = attention_mask[:, -length:].to(device=device, dtype=torch.bool)
    visual = torch.zeros_like(valid) if staged is None else staged.to(device) & valid & prompt
    text = valid & ~visual
    if start == session.turn_start:
        before = cache.full.n_visual if session.visual_in is None else session.visual_in
        session.cached = (cache.full.n_visual.clone(), cache.n_text.clone(), before.clone())
    new_visual, new_text = visual.sum(1, dtype=torch.int32), text.sum(1, dtype=torch.int32)
    total_visual, total_text = cache.full.n_visual + new_visual, cache.n_text + new_text
    last = session.turn_end - 1 - start  # of the prompt, where this pass holds it: what comes after it is drafted, padding ids included
    last = last if last in range(length) else length - 1
    # the one host read of a prompt: how much room its rows need, and whether it is padded
    each = valid.sum(1)
    max_visual, max_text, added, last_real, real, most, least = torch.stack(
        [total_visual.max(), total_text.max(), new_visual.sum(), valid[:, last].all(), valid.sum(), each.max(), each.min()]
    ).tolist()
    if not last_real and start + length >= session.turn_end > (start if session.frozen else 0):
        raise ValueError(
            "attention_mask ends with padding (right padding); a patched model needs the last prompt token in the last column. "
            "Set processor.tokenizer.padding_side = 'left'."
        )
    session.new_images |= bool(added)
    room = min(max(session.max_length - start - length, 0), 4096)
    cache.reserve_text(max_text + room)
    cache.reserve_tokens(max_visual)
    cache.text_asked.copy_(torch.maximum(cache.text_asked, total_text + room))
    cache.full.most.copy_(torch.maximum(cache.full.most, total_visual))

    token = torch.where(visual, cache.full.n_visual[:, None] + visual.cumsum(1) - 1, -1)
    text_row = torch.where(text, cache.n_text[:, None] + text.cumsum(1) - 1, -1)
    seen_image = (cache.full.n_visual[:, None] > 0) | (visual.cumsum(1) > 0)
    kind = torch.where(seen_image, INSTRUCTION, SYSTEM) if session.turn_start == 0 else torch.full_like(token, INSTRUCTION)
    kind = torch.where(prompt, kind, RESPONSE)
    kind = torch.where(visual, 1, kind).to(torch.uint8)

    _note_blocks(session, start, start + length, batch, device)
    width = columns.expand(batch, -1)
    if session.reduced:
        width = _count_without_masked(session, start, length, valid, attention_mask)
        placeholder = torch.zeros_like(valid) if staged is None else staged.to(device) & prompt
        before = placeholder.sum(1, dtype=torch.int32)
        if session.visual_in is None:
            session.visual_in, session.visual_place = torch.zeros_like(before), columns.new_zeros(batch, 0)
        table = columns.new_zeros(batch, cache.full.capacity + 1)
        table[:, : session.visual_place.shape[1]] = session.visual_place
        place = session.visual_in[:, None] + placeholder.cumsum(1) - 1
        session.visual_place = table.scatter_(1, torch.where(visual, token, cache.full.capacity), place)[:, :-1]
        session.visual_in = session.visual_in + before
        _count_blocks(session)
    scratch = torch.where(text, text_row, cache.text_capacity - 1)
    cache.text_type.scatter_(1, scratch, kind)
    cache.text_column.scatter_(1, scratch, width.int())
    if added:
        spare = torch.zeros(batch, cache.token_column.shape[1] + 1, dtype=torch.int32, device=device)
        spare[:, :-1] = cache.token_column
        spare.scatter_(1, torch.where(visual, token, spare.shape[1] - 1), width.int())
        cache.token_column.copy_(spare[:, :-1])
        cache.full.token.copy_(torch.arange(cache.full.capacity, device=device))
    cache.n_text.copy_(total_text)
    if session.turn_start == 0 and start < session.turn_end <= start + length:  # a prompt without an image has no system part
        no_image = (total_visual == 0)[:, None]
        cache.text_type.masked_fill_(no_image & (cache.text_type == SYSTEM), INSTRUCTION)
        kind = kind.masked_fill(no_image & (kind == SYSTEM), INSTRUCTION)

    forward = Forward(start, length, decode=False, width=length)
    forward.drafted = max(start + length - max(session.turn_end, start), 0)
    forward.ends_prompt = start < session.turn_end <= start + length
    forward.deferred = session.prunes_prompt and start + length < session.turn_end
    row = torch.where(visual, token, torch.where(text, cache.full.capacity + text_row, -1))
    fresh = start == 0
    plain = fresh and session.blocks is None
    forward.slots[0] = Slot(width, valid, token, text_row, kind, row, fresh, plain and real == batch * length)
    if session.reduced and not forward.drafted and not session.keeps_width and max(most, 1) < length:
        narrow(forward, each, max(most, 1), plain and most == least > 0)
    if not session.evict:
        cache.full.n_visual.copy_(total_visual)
        for index, group in enumerate(cache.groups):
            group.bound = max_visual
            forward.slots[index] = forward.slots[0]
    else:
        cache.full.n_visual.copy_(total_visual)
        cache.full.bound = max_visual
        if not session.prunes_prompt:
            for index, group in enumerate(cache.groups[1:], 1):
                _append_all(session, forward, index, group)
    cache.text_bound = max_text
    return forward


def _note_blocks(session: Session, start: int, columns: int, batch: int, device: torch.device) -> None:
    """Takes over what was staged of the columns that see ahead. What was known from ``start`` on was cropped."""
    staged, session.staged_blocks = session.staged_blocks, None
    if session.every_block is None and staged is None:
        return
    table = torch.full((batch, columns), -1, dtype=torch.int64, device=device)
    for known, until in ((session.every_block, start), (staged, columns)):
        if known is not None:
            width = min(known.shape[1], until)
            table[:, :width] = known[:, :width].to(device)
    table[:, session.turn_end :] = -1  # drafted tokens are given the type of the prompt's last one
    session.every_block = session.blocks = table


def _count_without_masked(session: Session, start: int, length: int, valid: Tensor, attention_mask: Tensor | None) -> Tensor:
    """int64 ``[B, q]``: columns of this pass, counted back from its end over the valid ones. What came earlier moves up to them."""
    cache = session.cache
    earlier = valid.new_ones(valid.shape[0], start)
    if attention_mask is not None and attention_mask.shape[1] == start + length:
        earlier = attention_mask[:, :start].to(device=valid.device, dtype=torch.bool)
    session.column_valid = torch.cat([earlier, valid], dim=1)
    masked = length - valid.sum(1, keepdim=True)
    cache.text_column += masked.int()
    cache.token_column += masked.int()
    for waiting in session.waiting:
        waiting.slot.column = waiting.slot.column + masked
    if session.raters is not None:
        session.raters.move(masked)
    return start + length - valid.flip(1).cumsum(1).flip(1)


def _count_blocks(session: Session) -> None:
    """Moves the blocks to where columns are counted without the masked ones."""
    if session.every_block is None:
        return
    valid, columns = session.column_valid, session.column_valid.shape[1]
    place = torch.where(valid, columns - valid.flip(1).cumsum(1).flip(1), columns)
    table = session.every_block.new_full((valid.shape[0], columns + 1), -1)
    session.blocks = table.scatter_(1, place, session.every_block)[:, :-1]


def narrow(forward: Forward, each: Tensor, size: int, plain: bool) -> None:
    """Leaves out of this pass the columns that are no token: ``size`` remain, right aligned. ``each``: int64 ``[B]``, valid ones."""
    slot = forward.slots[0]
    batch, length = slot.stored.shape
    device = slot.stored.device
    place = torch.where(slot.stored, slot.stored.cumsum(1) - 1 + (size - each[:, None]), size)
    source = torch.zeros(batch, size + 1, dtype=torch.int64, device=device)
    source = source.scatter_(1, place, torch.arange(length, device=device).expand(batch, -1))[:, :-1]
    filled = torch.arange(size, device=device) >= size - each[:, None]

    def at(tensor: Tensor, filler: int) -> Tensor:
        return tensor.gather(1, source).masked_fill(~filled, filler)

    forward.slots[0] = Slot(
        slot.column.gather(1, source), filled, at(slot.token, -1), at(slot.text, -1), at(slot.type, INSTRUCTION), at(slot.row, -1),
        slot.fresh, plain,
    )  # fmt: skip
    forward.narrow, forward.width = (source, filled), size


def _append_all(session: Session, forward: Forward, index: int, group: RowGroup) -> None:
    """Evict, a pass in which nothing is decided: the pruned group takes every new row (drafts, a second turn of text)."""
    slot = forward.slots[0]
    visual = slot.stored & (slot.token >= 0)
    place_rows(session, forward, index, group, slot.column, slot.stored, slot.token, slot.text, slot.type, visual, slot.fresh, slot.plain)


def place_rows(
    session: Session, forward: Forward, index: int, group: RowGroup, column: Tensor, stored: Tensor, token: Tensor, text: Tensor,
    kind: Tensor, visual: Tensor, fresh: bool, plain: bool,
) -> None:  # fmt: skip
    """Appends ``visual`` (bool ``[B, q]``) and all text of these columns to a pruned group and makes its slot."""
    cache = session.cache
    added = visual.sum(1, dtype=torch.int32)
    group.most.copy_(torch.maximum(group.most, group.n_visual + added))
    group.bound = int((group.n_visual + added).max())
    cache.reserve_visual(group, group.bound)
    place = torch.where(visual, group.n_visual[:, None] + visual.cumsum(1) - 1, -1)
    tokens = cache.token_column.shape[1]
    spare = torch.zeros(group.token.shape[0], group.capacity + 1, dtype=torch.int64, device=token.device)
    spare[:, :-1] = group.token
    spare.scatter_(1, torch.where(visual, place, group.capacity), token)
    group.token.copy_(spare[:, :-1])
    alive = torch.zeros(token.shape[0], tokens + 1, dtype=torch.bool, device=token.device)
    alive.scatter_(1, torch.where(visual, token, tokens), True)
    group.alive |= alive[:, :-1]
    group.n_visual += added
    row = torch.where(visual, place, torch.where(stored & (text >= 0), group.capacity + text, -1))
    forward.slots[index] = Slot(column, stored, token, text, kind, row, fresh, plain)
