"""One generation of a patched model: which rows each forward pass adds, what the policy decides, which rows each layer reads.

The flow of one forward pass (design.md, section 5):

1. ``stage`` (hook on the base model) learns which columns are visual tokens, from the token ids.
2. ``begin_forward`` (hook on the text model) gives every column its row in the cache and reserves room.
3. each attention module calls ``store`` (through ``VisualCache.update``) and then ``attend``; at the score layer ``k-1``, ``attend`` also
   lets the policy decide.
4. ``finish_forward`` (hook on the text model) closes the pass.

A pass of one token after the prompt is a *decode step* and reads no device value on the host. Every other pass is *wide*: prompts,
chunks of prompts, the next turn of a chat, drafted tokens. In a wide pass each drafted token decides for itself, exactly as if it had
come alone, so assisted decoding with retention ``recoverable`` gives the tokens of plain decoding.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.cache import INSTRUCTION, RESPONSE, SYSTEM, RowGroup, VisualCache
from dyrate_kernels.patching import cpu_step
from dyrate_kernels.patching.parallel import HeadShards
from dyrate_kernels.patching.raters import Raters
from dyrate_kernels.patching.stages import Noted, Stages
from dyrate_kernels.patching.wide import KeyRows, attend_wide, row_statistics, sum_of_all_rows, visibility
from dyrate_kernels.policies.base import ModelShape, Policy, View
from dyrate_kernels.stats import Record


@dataclass
class Slot:
    """What the layers of one group receive in a wide pass.

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


@dataclass
class Forward:
    """The forward pass under way."""

    start: int
    length: int
    decode: bool
    row: Tensor | None = None  # decode: int64 [B, 1], text row index (not yet offset by the visual capacity)
    moved: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)  # decode: by id and device, metadata and their copies
    new_row: tuple[Tensor, Tensor] | None = None  # decode: key and value [B, Hkv, D] that the layer's attention is to store
    on_cpu: cpu_step.CpuStep | None = None  # decode: what attends on a CPU, without the reference operators
    slots: dict[int, Slot] = field(default_factory=dict)  # wide: by index of the group
    allowed: dict[int, Tensor] = field(default_factory=dict)  # wide: by group, bool [B, d, N] visual tokens each decode row may read
    drafted: int = 0  # rows at the end of this pass that come after the prompt
    ends_prompt: bool = False
    deferred: bool = False  # an early chunk of a prompt: pruned layers wait for the last chunk
    width: int = 0  # columns that the layers before the first pruned one receive: ``length``, or fewer where reducers left fewer
    narrow: tuple[Tensor, Tensor] | None = None  # then: int64 [B, width], which columns these are, and bool, False for filler
    shrunk: bool = False  # pruned layers receive fewer columns; then, by group:
    source: dict[int, Tensor] = field(default_factory=dict)  # int64 [B, s], which columns (of this and the waiting chunks) stay
    filled: dict[int, Tensor] = field(default_factory=dict)  # bool [B, s], False for the filler of shorter sequences
    merge: dict[int, Tensor] = field(default_factory=dict)  # int64 [B, N], Decision.merge of policies that merge
    noted: Noted | None = None  # where groups decide one by one: what the first one saw
    drafts: Noted | None = None  # likewise, for drafted rows
    joined: tuple[Tensor, ...] | None = None  # column, stored, token, text and type of this and the waiting chunks
    joined_length: int = 0  # columns of this and the waiting chunks
    positions: dict[tuple, Any] = field(default_factory=dict)  # gathered for a group, with what they were gathered from


class Session:
    """Carries policy, state and cache through one conversation.

    Args:
        policy: a policy bound to the model (``Policy.bind``).
        shape: the text model's shape.
        retention: ``"recoverable"`` or ``"evict"``.
        backend: name of the operator backend.
        record_importance: keep importance and kept tokens of every step for ``stats()``.
        heads: the processes among which the model's heads are shared out; None: all are here.

    Attributes:
        unpruned: the decode step under way is the newest one once more, with all visual tokens (``again``).
        bounds_at_capacity: decode steps tell the operators no bound of the text rows, which changes from step to step (patching.graph).
        windows: sliding windows of the layers seen so far.
        score_layer: layer ``k-1``, which decides for all pruned layers, or for the first group of them where there are ``stages``.
        score_layers: all layers whose statistics decide.
        stages: what decides for the later groups, each at the layer before it (``Policy.rescores``), or None.
        raters: what lets chosen rows of a prompt rank (``Policy.query_rows == "raters"``) and tokens be merged, or None.
        vision: names of the reducers of the prompts, for ``stats()``, or None.
        reduced: reducers have masked columns within prompts. Columns of a sequence are then counted without these, from the newest one
            back, so that sliding windows measure what the language model really received.
        column_valid: bool ``[B, columns]`` where ``reduced``: which columns are real, for the mask of the next turn.
        visual_in: int32 ``[B]`` where ``reduced``: visual tokens before the reducers.
        visual_place: int64 ``[B, N]`` where ``reduced``: which of those each visual token stands in the place of.
        blocks: int64 ``[B, columns]`` where prompts are not causal throughout: ``KeyRows.blocks``.
        keeps_width: no columns are left out of this generation's passes (its caller wants the hidden states).
    """

    unpruned: bool = False
    bounds_at_capacity: bool = False

    def __init__(
        self, policy: Policy, shape: ModelShape, retention: str, backend: str, record_importance: bool = False,
        heads: HeadShards | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.shape, self.retention, self.backend = policy, shape, retention, backend
        self.heads = heads
        self.evict = retention == "evict"
        self.score_layer = policy.k - 1
        starts = policy.layer_groups(shape.num_layers)
        self.stages = Stages(self, starts) if policy.rescores and len(starts) > 1 else None
        self.score_layers = frozenset([self.score_layer, *(self.stages.groups if self.stages else ())])
        merges = self.evict and policy.merges
        self.raters = Raters(self) if policy.query_rows in ("raters", "pagerank") or merges else None
        self.keeps_hidden = policy.reads_hidden or merges
        self.cache = VisualCache(shape.num_layers, starts, shared_rows=not self.evict)
        self.cache.session = self
        self.record_importance = record_importance
        self.record: Record | None = None
        self.in_forward = False
        self.vision: str | None = None
        self.keeps_width = False
        self.restart()

    def restart(self) -> None:
        """Forgets the conversation."""
        self.state: dict[str, Tensor] = {}
        self.turn = -1
        self.turn_start = self.turn_end = 0
        self.max_length = 0
        # visual tokens and text rows held before this turn, and those visual tokens before any reducer, int32 [B] each
        self.cached: tuple[Tensor, Tensor, Tensor] | None = None
        self.frozen = False
        self.evicted_while_decoding = False
        self.decided = False  # the policy has decided at a prefill of this conversation
        self.had_decided = False  # before the prefill that is under way
        self.new_images = False  # this turn brought visual tokens
        self.step: Tensor | None = None  # int64 [1]: step of the next token (0 = the prompt)
        self.column: Tensor | None = None  # int32 [1]: column of the next token
        self.last_rate: Tensor | None = None
        self.column_sum: Tensor | None = None  # [B, N], attention received from all prompt rows so far
        self.waiting: list[Any] = []  # early chunks of a prompt, patching.shrink.Waiting
        self.staged: Tensor | None = None
        self.staged_blocks: Tensor | None = None
        self.staged_mask: Tensor | None = None
        self.blocks: Tensor | None = None
        self.forward: Forward | None = None
        self.hidden: Tensor | None = None  # [B, q, d] of this pass at the score layer, for policies that read it
        self.windows: set[int] = set()
        self.reduced = False
        self.column_valid: Tensor | None = None
        self.visual_in: Tensor | None = None
        self.visual_place: Tensor | None = None
        if self.raters is not None:
            self.raters.forget()

    def part_from_cache(self) -> None:
        """After a generation: if nobody else holds the cache, lets go of it, so that its memory is free at once.

        Session and cache refer to each other; without this their gigabytes would wait for Python's cyclic garbage collector.
        """
        cache = self.cache
        if sys.getrefcount(cache) <= 3:  # this session, the name above, and the argument of the call
            cache.session = None
            self.cache = None

    # ---- generation ---------------------------------------------------------------------------------------------------------------

    def begin_turn(self, prompt_length: int | None, max_length: int, frozen: bool, assistant: bool = False) -> None:
        """A ``generate()`` call begins.

        Args:
            prompt_length: the column at which its prompt ends; None: where its first forward pass ends.
            max_length: columns it may reach.
            frozen: rows are not compacted while decoding (assisted decoding rolls the cache back).
            assistant: this model drafts for another one.
        """
        if self.in_forward:
            raise RuntimeError(
                "the last forward pass on this cache did not finish (it raised an error), so its rows are incomplete. "
                "Start again without this cache."
            )
        self.max_length = max_length
        self.frozen = frozen
        if assistant and self.turn >= 0:
            return  # the drafting model of assisted decoding: its later calls go on with the same turn
        if prompt_length is not None and self.cache.length >= prompt_length and self.turn >= 0:
            return  # nothing new to read: go on decoding
        self.turn += 1
        self.turn_start, self.turn_end = self.cache.length, -1 if prompt_length is None else prompt_length
        self.new_images = False
        self.column_sum = None
        self.waiting = []
        if self.raters is not None:
            self.raters.forget()
        self.evicted_while_decoding = False
        self.record = None

    def stage(self, visual: Tensor | None, blocks: Tensor | None = None) -> None:
        """bool ``[B, q]``: which columns of the next pass are visual tokens by their ids; ``families.blocks_ahead`` of it."""
        self.staged, self.staged_blocks = visual, blocks

    def begin_forward(self, batch: int, length: int, attention_mask: Tensor | None, device: torch.device) -> None:
        """Gives the ``length`` new columns their rows. Checks everything before it changes anything."""
        cache = self.cache
        staged, self.staged = self.staged, None
        if self.in_forward:
            raise RuntimeError(
                "the last forward pass on this cache did not finish (it raised an error), so its rows are incomplete. "
                "Start again without this cache."
            )
        if cache.is_initialized and cache.batch_size != batch:
            raise ValueError(f"the cache holds {cache.batch_size} sequences, input_ids has {batch}; pass a cache of the same batch")
        if self.turn < 0:  # a plain forward on a fresh cache: its columns are the prompt
            self.begin_turn(length, length, frozen=False)
        if not cache.is_initialized:
            cache.allocate_metadata(batch, device)
            self.step = torch.zeros(1, dtype=torch.int64, device=device)
            self.column = torch.zeros(1, dtype=torch.int32, device=device)
        start = cache.length
        if self.turn_end < 0:
            self.turn_end = start + length
        if length == 1 and start >= self.turn_end:
            self._begin_decode(start)
        else:
            self._begin_wide(start, length, attention_mask, staged, device)
        self.in_forward = True

    def is_decode(self, length: int) -> bool:
        """A pass of ``length`` columns would be a decode step."""
        return length == 1 and self.turn >= 0 and self.cache.is_initialized and 0 <= self.turn_end <= self.cache.length

    def reserve_step(self) -> None:
        """Makes room for one more decode step, so that the step itself replaces no tensor that the next one needs."""
        cache = self.cache
        if cache.text_bound + 1 >= cache.text_capacity:
            cache.reserve_text(2 * cache.text_capacity)
        if self.record is not None:
            self.record.reserve(cache.length - self.turn_end + 1)

    def note_replay(self) -> None:
        """A captured decode step ran on the device: what ``begin_forward`` to ``finish_forward`` would have noted on the host."""
        cache = self.cache
        if self.record is not None:
            self.record.note(cache.length - self.turn_end + 1)
        cache.text_bound += 1
        cache.length += 1
        self.in_forward = False

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within: the newest decode step can run once more; it reads all visual tokens, decides nothing and is what counts in the end."""
        cache = self.cache
        cache.length -= 1
        cache.text_bound -= 1
        cache.n_text.sub_(1)
        self.rewind(1)
        self.unpruned = True
        try:
            yield
        finally:
            self.unpruned = False

    def _begin_decode(self, start: int) -> None:
        cache = self.cache
        self.reserve_step()
        row = cache.n_text[:, None].long()
        cache.text_type.scatter_(1, row, RESPONSE)
        cache.text_column.scatter_(1, row, self.column.expand(cache.batch_size, 1))
        cache.n_text.add_(1)
        cache.text_bound += 1
        on_cpu = cpu_step.enabled and self.backend == "reference" and row.device.type == "cpu" and not self.bounds_at_capacity
        step = cpu_step.CpuStep(cache, row, self.unpruned) if on_cpu else None
        self.forward = Forward(start, 1, decode=True, row=row, on_cpu=step)

    def _begin_wide(self, start: int, length: int, attention_mask: Tensor | None, staged: Tensor | None, device: torch.device) -> None:
        cache = self.cache
        batch = cache.batch_size
        columns = torch.arange(start, start + length, device=device)
        prompt = columns < self.turn_end
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
        if start == self.turn_start:
            before = cache.full.n_visual if self.visual_in is None else self.visual_in
            self.cached = (cache.full.n_visual.clone(), cache.n_text.clone(), before.clone())
        new_visual, new_text = visual.sum(1, dtype=torch.int32), text.sum(1, dtype=torch.int32)
        total_visual, total_text = cache.full.n_visual + new_visual, cache.n_text + new_text
        # the one host read of a prompt: how much room its rows need, and whether it is padded
        each = valid.sum(1)
        max_visual, max_text, added, last_real, real, most, least = torch.stack(
            [total_visual.max(), total_text.max(), new_visual.sum(), valid[:, -1].all(), valid.sum(), each.max(), each.min()]
        ).tolist()
        if not last_real and start + length >= self.turn_end:
            raise ValueError(
                "attention_mask ends with padding (right padding); a patched model needs the last prompt token in the last column. "
                "Set processor.tokenizer.padding_side = 'left'."
            )
        self.new_images |= bool(added)
        cache.reserve_text(max_text + min(max(self.max_length - start - length, 0), 4096))
        cache.reserve_tokens(max_visual)

        token = torch.where(visual, cache.full.n_visual[:, None] + visual.cumsum(1) - 1, -1)
        text_row = torch.where(text, cache.n_text[:, None] + text.cumsum(1) - 1, -1)
        seen_image = (cache.full.n_visual[:, None] > 0) | (visual.cumsum(1) > 0)
        kind = torch.where(seen_image, INSTRUCTION, SYSTEM) if self.turn_start == 0 else torch.full_like(token, INSTRUCTION)
        kind = torch.where(prompt, kind, RESPONSE)
        kind = torch.where(visual, 1, kind).to(torch.uint8)

        self._note_blocks(start, start + length, batch, device)
        width = columns.expand(batch, -1)
        if self.reduced:
            width = self._count_without_masked(start, length, valid, attention_mask)
            placeholder = torch.zeros_like(valid) if staged is None else staged.to(device) & prompt
            before = placeholder.sum(1, dtype=torch.int32)
            if self.visual_in is None:
                self.visual_in, self.visual_place = torch.zeros_like(before), columns.new_zeros(batch, 0)
            table = columns.new_zeros(batch, cache.full.capacity + 1)
            table[:, : self.visual_place.shape[1]] = self.visual_place
            place = self.visual_in[:, None] + placeholder.cumsum(1) - 1
            self.visual_place = table.scatter_(1, torch.where(visual, token, cache.full.capacity), place)[:, :-1]
            self.visual_in = self.visual_in + before
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
        if self.turn_start == 0 and start < self.turn_end <= start + length:  # a prompt without an image has no system part
            no_image = (total_visual == 0)[:, None]
            cache.text_type.masked_fill_(no_image & (cache.text_type == SYSTEM), INSTRUCTION)
            kind = kind.masked_fill(no_image & (kind == SYSTEM), INSTRUCTION)

        forward = Forward(start, length, decode=False, width=length)
        forward.drafted = max(start + length - max(self.turn_end, start), 0)
        forward.ends_prompt = start < self.turn_end <= start + length
        forward.deferred = self.prunes_prompt and start + length < self.turn_end
        row = torch.where(visual, token, torch.where(text, cache.full.capacity + text_row, -1))
        fresh = start == 0
        plain = fresh and self.blocks is None
        forward.slots[0] = Slot(width, valid, token, text_row, kind, row, fresh, plain and real == batch * length)
        if self.reduced and not forward.drafted and not self.keeps_width and max(most, 1) < length:
            self._narrow(forward, each, max(most, 1), plain and most == least > 0)
        if not self.evict:
            cache.full.n_visual.copy_(total_visual)
            for index, group in enumerate(cache.groups):
                group.bound = max_visual
                forward.slots[index] = forward.slots[0]
        else:
            cache.full.n_visual.copy_(total_visual)
            cache.full.bound = max_visual
            if not self.prunes_prompt:
                for index, group in enumerate(cache.groups[1:], 1):
                    self._append_all(forward, index, group)
        cache.text_bound = max_text
        self.forward = forward

    def _note_blocks(self, start: int, columns: int, batch: int, device: torch.device) -> None:
        """Takes over what was staged of the columns that see ahead. What was known from ``start`` on was cropped."""
        staged, self.staged_blocks = self.staged_blocks, None
        if self.blocks is None and staged is None:
            return
        table = torch.full((batch, columns), -1, dtype=torch.int64, device=device)
        for known, until in ((self.blocks, start), (staged, columns)):
            if known is not None:
                width = min(known.shape[1], until)
                table[:, :width] = known[:, :width].to(device)
        self.blocks = table

    def _count_without_masked(self, start: int, length: int, valid: Tensor, attention_mask: Tensor | None) -> Tensor:
        """int64 ``[B, q]``: columns of this pass, counted back from its end over the valid ones. What came earlier moves up to them."""
        cache = self.cache
        earlier = valid.new_ones(valid.shape[0], start)
        if attention_mask is not None and attention_mask.shape[1] == start + length:
            earlier = attention_mask[:, :start].to(device=valid.device, dtype=torch.bool)
        self.column_valid = torch.cat([earlier, valid], dim=1)
        masked = length - valid.sum(1, keepdim=True)
        cache.text_column += masked.int()
        cache.token_column += masked.int()
        for waiting in self.waiting:
            waiting.slot.column = waiting.slot.column + masked
        if self.raters is not None:
            self.raters.move(masked)
        return start + length - valid.flip(1).cumsum(1).flip(1)

    @staticmethod
    def _narrow(forward: Forward, each: Tensor, size: int, plain: bool) -> None:
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

    def _append_all(self, forward: Forward, index: int, group: RowGroup) -> None:
        """Evict, a pass in which nothing is decided: the pruned group takes every new row (drafts, a second turn of text)."""
        slot = forward.slots[0]
        visual = slot.stored & (slot.token >= 0)
        self._place(forward, index, group, slot.column, slot.stored, slot.token, slot.text, slot.type, visual, slot.fresh, slot.plain)

    def _place(
        self, forward: Forward, index: int, group: RowGroup, column: Tensor, stored: Tensor, token: Tensor, text: Tensor, kind: Tensor,
        visual: Tensor,
        fresh: bool, plain: bool,
    ) -> None:  # fmt: skip
        """Appends ``visual`` (bool ``[B, q]``) and all text of these columns to a pruned group and makes its slot."""
        cache = self.cache
        added = visual.sum(1, dtype=torch.int32)
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

    def forward_in_progress(self) -> Forward:
        """The pass under way."""
        if self.forward is None:
            raise RuntimeError("no forward pass is under way on this cache")
        return self.forward

    @property
    def prunes_prompt(self) -> bool:
        """The prompt of this turn is shrunk in the pruned layers."""
        return self.evict and self._decides_at_prefill and self.cache.length < self.turn_end

    @property
    def _decides_at_prefill(self) -> bool:
        if not self.policy.at_prefill or (self.frozen and self.decided):
            return False
        # a method that decides once does so again only when new visual tokens came
        return self.policy.at_decode or not self.decided or self.new_images

    def finish_forward(self) -> None:
        """The pass came to its end: the new columns count from now on."""
        forward = self.forward_in_progress()
        self.cache.length += forward.length
        if forward.decode:
            self.step.add_(1)
            self.column.add_(1)
        else:
            self.step.fill_(max(self.cache.length - self.turn_end + 1, 0))
            self.column.fill_(self.cache.length)
        if forward.ends_prompt and self.raters is not None:
            self.raters.forget()
        self.in_forward = False
        self.forward = self.hidden = None

    def rewind(self, columns: int) -> None:
        """The newest ``columns`` were cropped away."""
        self.step.sub_(columns).clamp_(min=0)
        self.column.sub_(columns)

    def select_sequences(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Sequences were reordered: everything per sequence follows."""
        self.state = {name: pick(tensor) for name, tensor in self.state.items()}
        if self.last_rate is not None:
            self.last_rate = pick(self.last_rate)
        if self.reduced and self.column_valid is not None:
            self.column_valid, self.visual_in, self.visual_place = map(pick, (self.column_valid, self.visual_in, self.visual_place))
        if self.record is not None:
            self.record.select_sequences(pick)

    # ---- one layer --------------------------------------------------------------------------------------------------------------

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes the new rows of ``layer`` (called by ``VisualCache.update``)."""
        forward, cache = self.forward_in_progress(), self.cache
        if forward.decode:
            if cache.keys[layer] is None:
                cache.write(layer, key, value, cache.group_of[layer].capacity + forward.row)
            elif forward.on_cpu is not None:
                forward.on_cpu.write(layer, key, value)
            elif self.backend != "reference":
                forward.new_row = (key[:, :, 0], value[:, :, 0])  # the attention kernel writes it: two launches fewer a layer
            else:
                cache.write(layer, key, value, cache.group_of[layer].capacity + forward.row)
            return
        slot = forward.slots.get(self.group_index(layer))
        if slot is not None:  # None: a deferred chunk, whose rows come with the last one
            cache.write(layer, key, value, slot.row)

    def see(self, layer: int, hidden: Tensor) -> None:
        """Keeps the hidden states that go into the score layer's attention (called by ``VisualCache.see``)."""
        if self.keeps_hidden and layer in self.score_layers:
            self.hidden = hidden

    def hidden_of(self, rows: slice) -> Tensor | None:
        """``[B, r, d]`` of these rows of the pass, where the text's metadata are."""
        return None if self.hidden is None else self.hidden[:, rows].detach().to(self.cache.n_text.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one layer: query ``[B, Hq, q, D]`` -> output ``[B, q, Hq, D]``. At the score layer the policy decides."""
        self.cache.mark_read(layer)
        if window is not None:
            self.windows.add(window)
        forward = self.forward_in_progress()
        if not forward.decode:
            return self._attend_wide(layer, query, key, value, scale, window)
        if window is not None and window > forward.start:
            window = None  # no row has left it yet
        if forward.on_cpu is not None and layer not in self.score_layers:
            return forward.on_cpu.attend(layer, query, scale, window)
        return self._attend_decode(layer, query, scale, window)

    def group_index(self, layer: int) -> int:
        return self.cache.groups.index(self.cache.group_of[layer])

    # ---- decode step ------------------------------------------------------------------------------------------------------------

    def _attend_decode(self, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
        cache = self.cache
        if layer == self.score_layer:
            return self._score_decode(layer, query, scale, window)[:, None]
        rows = self._rows(layer, query, scale, window)
        group = cache.group_of[layer]
        if group.kept is not None and not self.unpruned:
            rows["kept"], rows["n_kept"] = self._at(query.device, group.kept), self._at(query.device, group.n_kept)
        if layer in self.score_layers and self._decides_now:
            rows["text_type"] = self._at(query.device, cache.text_type)
            return self.stages.decode(layer, rows)[:, None]
        return ops.trusted("decode_attention", self.backend, query.device)(**rows)[0][:, None]

    def _rows(self, layer: int, query: Tensor, scale: float, window: int | None) -> dict[str, Any]:
        """What ``ops.decode_attention`` is given in ``layer``, but for kept lists, statistics and the backend."""
        cache, forward = self.cache, self.forward
        group = cache.group_of[layer]
        device = query.device
        rows = {
            "query": query[:, :, 0],
            "key": cache.keys[layer],
            "value": cache.values[layer],
            "n_visual": self._at(device, group.n_visual),
            "n_text": self._at(device, cache.n_text),
            "visual_capacity": group.capacity,
            "scale": scale,
            "visual_bound": group.bound,
            "text_bound": cache.text_capacity if self.bounds_at_capacity else cache.text_bound,
            "clean": True,  # the cache fills its buffers with zeros
        }
        if forward.new_row is not None:
            rows["new_key"], rows["new_value"] = forward.new_row
            forward.new_row = None
        if window is not None:
            rows["position"] = cache.columns(group, group.capacity, cache.text_capacity).to(device)
            rows["query_position"] = self._at(device, self.column).expand_as(rows["n_text"])
            rows["window"] = window
        return rows

    def _at(self, device: torch.device, tensor: Tensor) -> Tensor:
        """``tensor`` on ``device``; moved there once in a decode step, however many layers read it there."""
        if tensor.device == device:
            return tensor
        moved = self.forward.moved
        key = (id(tensor), device)
        if key not in moved:
            moved[key] = (tensor, tensor.to(device))  # held, so that its id stays its own
        return moved[key][1]

    @property
    def _decides_now(self) -> bool:
        """A decode step chooses."""
        policy = self.policy
        able = policy.at_decode and not self.unpruned and self.cache.full.bound > 0
        return able and not (self.evict and (self.frozen or policy.constant))

    def _score_decode(self, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
        cache, policy, on_cpu = self.cache, self.policy, self.forward.on_cpu
        if on_cpu is None:
            rows = self._rows(layer, query, scale, window)
            rows["text_type"] = self._at(query.device, cache.text_type)
            score, decide = (ops.trusted(name, self.backend, query.device) for name in ("decode_attention", "decode_step"))
            score, decide = functools.partial(score, **rows, mass=True), functools.partial(decide, **rows)
        else:
            score, decide = (functools.partial(call, layer, query, scale, window) for call in (on_cpu.score, on_cpu.step))
        if not self._decides_now:
            output, mass, importance = score(importance=self.record_importance)
            self.write_record(*self.of_all_heads(mass, importance))
            return output
        pruned = cache.groups[1]
        hidden = self.hidden_of(slice(-1, None))
        hidden = None if hidden is None else hidden[:, 0]
        whole = len(cache.groups) == 2 and self.heads is None  # one call scores and decides
        tensors = policy.predictor_tensors(self.state, hidden) if whole else None
        if tensors is not None:
            weight, bias, rates = tensors
            step = decide(
                weight=weight, bias=bias, rates=rates, alive=self.alive_of(pruned), max_kept=pruned.n_visual if self.evict else None
            )
            output, mass, importance, kept, n_kept, self.last_rate = step
            self.apply(pruned, kept, n_kept)
        else:
            output, mass, importance = score(importance=True)
            mass, importance = self.of_all_heads(mass, importance)
            batch = mass.shape[0]
            view = View(self.step.expand(batch), mass, importance, cache.full.n_visual, self.alive_of(pruned), self.state, hidden)
            decision = policy.decide(view)
            if self.stages is not None:
                self.stages.first(mass, importance, decision)
                return output
            self._select_and_apply(decision, importance)
        self.write_record(mass, importance)
        return output

    def of_all_heads(self, mass: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Statistics of the heads of this process -> of all."""
        return (mass, importance) if self.heads is None else self.heads.statistics(mass, importance)

    def alive_of(self, group: RowGroup) -> Tensor | None:
        return None if group.alive is None else group.alive[:, : self.cache.full.capacity]

    def _select_and_apply(self, decision, importance: Tensor) -> None:
        cache = self.cache
        score = importance if decision.score is None else decision.score
        counts = decision.count if decision.count.dim() == 2 else decision.count[None].expand(len(cache.groups) - 1, -1)
        self.last_rate = decision.rate
        for group, count in zip(cache.groups[1:], counts, strict=True):
            if self.evict:
                count = torch.minimum(count, group.n_visual)
            kept, n_kept = ops.select_tokens(score, count, cache.full.n_visual, alive=self.alive_of(group), backend=self.backend)
            self.apply(group, kept, n_kept)

    def apply(self, group: RowGroup, kept: Tensor, n_kept: Tensor) -> None:
        """The choice of a step takes effect: a list to read through, or rows that move."""
        cache = self.cache
        self.forward.moved.clear()  # counts may change in place
        if self.evict:
            cache.evict(group, kept, n_kept, self.backend)
            self.evicted_while_decoding = True
        else:
            width = self.policy.kept_bound(cache.full.bound)
            group.kept, group.n_kept = kept[:, :width], n_kept

    # ---- wide pass --------------------------------------------------------------------------------------------------------------

    def _key_rows(self, layer: int, slot: Slot, key: Tensor, value: Tensor) -> KeyRows:
        """Everything the rows of this pass may read in ``layer``."""
        cache = self.cache
        group = cache.group_of[layer]
        if slot.fresh:
            return KeyRows(key, value, slot.column, slot.stored, slot.token, slot.type, self.blocks)
        keys, values = cache.live_slices(layer)
        visual, text = group.bound, cache.text_bound
        device = cache.n_text.device
        live = torch.cat(
            [
                torch.arange(visual, device=device) < group.n_visual[:, None],
                torch.arange(text, device=device) < cache.n_text[:, None],
            ],
            dim=1,
        )
        token = torch.cat([group.token[:, :visual], torch.full_like(cache.text_column[:, :text], -1, dtype=torch.int64)], dim=1)
        kind = torch.cat([torch.ones_like(token[:, :visual], dtype=torch.uint8), cache.text_type[:, :text]], dim=1)
        return KeyRows(keys, values, cache.columns(group, visual, text).long(), live, token, kind, self.blocks)

    def _attend_wide(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        forward = self.forward
        index = self.group_index(layer)
        slot = forward.slots.get(index)
        if slot is None:  # a deferred chunk: nobody reads this
            return torch.zeros_like(query).transpose(1, 2)
        rows = self._key_rows(layer, slot, key, value).to(query.device)
        column = slot.column.to(query.device)
        plain = slot.plain and index not in forward.allowed and (window is None or forward.start + forward.length <= window)
        mask = None
        scores = layer in self.score_layers
        if not plain or scores:
            mask = visibility(rows, column, window)
            if index in forward.allowed:
                mask = self._restrict(mask, rows, forward.allowed[index].to(query.device))
        output = attend_wide(query, rows, None if plain else mask, scale)
        if layer == self.score_layer:
            self._score_wide(layer, query, rows, mask, column, scale, window)
        elif scores:
            self.stages.wide(layer, query, rows, mask, scale, window)
        return output

    @staticmethod
    def _restrict(mask: Tensor, rows: KeyRows, allowed: Tensor) -> Tensor:
        """The last ``d`` rows of this pass may read only the visual tokens ``allowed`` ``[B, d, N]``."""
        drafted = allowed.shape[1]
        token = rows.token[:, None].expand(-1, drafted, -1)
        may = allowed.gather(2, token.clamp(min=0)) | (token < 0)
        mask = mask.clone()
        mask[:, -drafted:] &= may
        return mask

    def _score_wide(self, layer: int, query: Tensor, rows: KeyRows, mask: Tensor, column: Tensor, scale: float, window: int | None) -> None:
        """The score layer of a wide pass: the last prompt row decides, then each drafted row for itself."""
        forward, cache, policy = self.forward, self.cache, self.policy
        tokens = cache.full.capacity
        last = forward.width - forward.drafted - 1  # the last prompt row, where this pass holds it
        home = cache.n_text.device
        if policy.query_rows == "mean" and self._decides_at_prefill and forward.drafted < forward.length:
            prompt = slice(0, forward.width - forward.drafted)
            real = forward.slots[0].stored[:, prompt].to(query.device)
            added = sum_of_all_rows(query[:, :, prompt], rows, mask[:, prompt], real, scale, tokens)
            added = (added if self.heads is None else self.heads.mean(added)).to(home)
            self.column_sum = added if self.column_sum is None else _resize_like(self.column_sum, added) + added
        if self.raters is not None and forward.drafted < forward.length:
            self.raters.note(layer, forward.slots[0], query)
        if forward.ends_prompt:
            hidden = self.hidden_of(slice(last, last + 1))
            if forward.drafted or window is not None:
                mass, importance = self.of_all_heads(
                    *row_statistics(query[:, :, last : last + 1], rows, mask[:, last : last + 1], scale, tokens)
                )
                mass, importance = mass[:, 0].to(home), importance[:, 0].to(home)
            else:
                mass, importance = self._score_last_query(layer, query[:, :, last], scale)
            if self.raters is not None:
                importance = self.raters.importance(layer, rows, scale, window, importance)
            self._decide_prompt(mass, importance, None if hidden is None else hidden[:, 0])
        if forward.drafted:
            first = forward.length - forward.drafted
            mass, importance = self.of_all_heads(*row_statistics(query[:, :, first:], rows, mask[:, first:], scale, tokens))
            self._decide_drafts(mass.to(home), importance.to(home))

    def _score_last_query(self, layer: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        cache = self.cache
        group, device, home = cache.group_of[layer], query.device, cache.n_text.device
        mass, importance = ops.score_last_query(
            query, cache.keys[layer], cache.values[layer], group.n_visual.to(device), cache.n_text.to(device),
            visual_capacity=group.capacity, scale=scale, text_type=cache.text_type.to(device),
            visual_bound=group.bound, text_bound=cache.text_bound, backend=self.backend,
        )  # fmt: skip
        mass, importance = self.of_all_heads(mass, importance)
        return mass.to(home), importance.to(home)

    def _decide_prompt(self, mass: Tensor, importance: Tensor, hidden: Tensor | None) -> None:
        """Step 0: the last prompt row's statistics, the policy's first decision, and what follows from it for the pruned layers."""
        cache, policy = self.cache, self.policy
        batch = mass.shape[0]
        n_visual = cache.full.n_visual
        self.record = Record(self, batch)
        keep_all = torch.zeros(batch, dtype=torch.float64, device=n_visual.device)
        self.last_rate = keep_all
        if self._decides_at_prefill and cache.full.bound > 0:
            if self.column_sum is not None:
                importance = self.column_sum
            alive = None
            if self.evict:
                alive = self.candidates(cache.groups[1])
            if not self.state or self.new_images:
                self.state = policy.start(n_visual)
            step = torch.zeros(batch, dtype=torch.int64, device=n_visual.device)
            view = View(step, mass, importance, n_visual, alive, self.state, hidden)
            if self.raters is not None:
                self.raters.show(self.score_layer, view)
            decision = policy.decide(view)
            score = importance if decision.score is None else decision.score
            groups = cache.groups[1:] if self.stages is None else cache.groups[1:2]
            counts = decision.count if decision.count.dim() == 2 else decision.count[None].expand(len(groups), -1)
            if self.evict or not policy.at_decode:
                self.last_rate = decision.rate
            if self.stages is not None:
                self.forward.noted = Noted(mass, importance, [decision.rate])
            self.had_decided = self.decided
            self.choose_for_prompt(groups, score, counts, merge=decision.merge)
            self.decided = True
        elif self.prunes_prompt:
            self.shrink_prompt(cache.groups[1:], importance, n_visual[None].expand(len(cache.groups) - 1, -1))
        if self.forward.noted is None:  # else more groups decide first
            self.write_record(mass, importance, step=0)

    def choose_for_prompt(
        self, groups: list[RowGroup], score: Tensor, counts: Tensor, within: Tensor | None = None, merge: Tensor | None = None
    ) -> None:  # fmt: skip
        """What these groups keep of the prompt: rows under ``evict``, else a list, if nothing is decided again.

        Args:
            score: ``[B, N]``.
            counts: ``[len(groups), B]``.
            within: bool ``[B, N]``, what can be chosen; None: all.
            merge: ``Decision.merge``, for the first of the groups.
        """
        cache = self.cache
        if self.evict:
            if merge is not None:
                self.forward.merge[cache.groups.index(groups[0])] = merge
            self.shrink_prompt(groups, score, counts, within)
            return
        if self.policy.at_decode:
            return
        for group, count in zip(groups, counts, strict=True):
            kept, n_kept = ops.select_tokens(score, count, cache.full.n_visual, alive=within, backend=self.backend)
            kept = kept[:, : self.policy.kept_bound(cache.full.bound)]
            if group.kept is not None and self.had_decided:  # sequences without new images keep their old choice
                kept, n_kept = self.keep_old_choice(group, kept, n_kept)
            group.kept, group.n_kept = kept, n_kept

    def keep_old_choice(self, group: RowGroup, kept: Tensor, n_kept: Tensor) -> tuple[Tensor, Tensor]:
        fresh = (self.forward.slots[0].token >= 0).any(1)
        width = max(kept.shape[1], group.kept.shape[1])
        old = torch.full((kept.shape[0], width), -1, dtype=torch.int32, device=kept.device)
        new = old.clone()
        old[:, : group.kept.shape[1]], new[:, : kept.shape[1]] = group.kept, kept
        return torch.where(fresh[:, None], new, old), torch.where(fresh, n_kept, group.n_kept)

    def candidates(self, group: RowGroup) -> Tensor:
        """bool ``[B, N]``: tokens a pruned group holds already or would receive in this turn."""
        cache = self.cache
        columns = cache.token_column[:, : cache.full.capacity]
        token = torch.arange(columns.shape[1], device=columns.device)
        live = token < cache.full.n_visual[:, None]
        new = token >= self.cached[0][:, None] if self.reduced else columns >= self.turn_start
        return (self.alive_of(group) | new) & live

    def shrink_prompt(self, groups: list[RowGroup], score: Tensor, counts: Tensor, within: Tensor | None = None) -> None:
        """Evict at prefill: each of these groups keeps ``counts`` of its candidates; old rows are compacted, new columns get slots."""
        cache, forward = self.cache, self.forward
        if forward.joined is None:
            slots = [waiting.slot for waiting in self.waiting] + [forward.slots[0]]
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
            kept, n_kept = ops.select_tokens(score, count, cache.full.n_visual, alive=able, backend=self.backend)
            chosen.append((kept, n_kept))
            mark = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=column.device)
            mark.scatter_(1, torch.where(kept < 0, tokens, kept).long(), True)
            keeps.append(torch.where(visual, mark.gather(1, token.clamp(min=0)), stored))
        # the last column's hidden state gives the next token, so it stays even where its own key is dropped
        stays = []
        for keep in keeps:
            stay = keep.clone()
            stay[:, -1] = True
            stays.append(stay)
        sizes = torch.stack(
            [torch.stack([s.sum(1).max(), s.sum(1).min(), k.sum(1).min()]) for s, k in zip(stays, keeps, strict=True)]
        ).tolist()
        for group, (kept, n_kept), keep, stay, (size, least, real) in zip(groups, chosen, keeps, stays, sizes, strict=True):
            index = cache.groups.index(group)
            if self.turn_start > 0:
                cache.evict(group, kept, n_kept, self.backend)
            place = stay.cumsum(1) - 1 + (size - stay.sum(1, keepdim=True))
            source = torch.zeros(batch, size + 1, dtype=torch.int64, device=column.device)
            source.scatter_(1, torch.where(stay, place, size), torch.arange(width, device=column.device).expand(batch, -1))
            source = source[:, :-1]
            filled = torch.arange(size, device=column.device) >= size - stay.sum(1, keepdim=True)
            here = keep.gather(1, source) & filled
            got = token.gather(1, source)
            fresh = self.turn_start == 0
            self._place(
                forward, index, group, column.gather(1, source), here, got, text.gather(1, source), kind.gather(1, source),
                here & (got >= 0), fresh, fresh and self.blocks is None and least == size == real,
            )  # fmt: skip
            forward.source[index], forward.filled[index] = source, filled
        forward.shrunk, forward.joined_length = True, width

    def _decide_drafts(self, mass: Tensor, importance: Tensor) -> None:
        """Drafted rows: each decides for itself (recoverable); under evict the kept set stays as it is (compaction is frozen)."""
        cache, policy, forward = self.cache, self.policy, self.forward
        drafted = mass.shape[1]
        forward.drafts = Noted(mass, importance)
        if not self.evict and cache.full.bound > 0:
            if policy.at_decode:
                hidden = self.hidden_of(slice(forward.length - drafted, forward.length))
                indices = range(1, len(cache.groups)) if self.stages is None else range(1, 2)
                self.choose_for_drafts(indices, mass, importance, hidden)
            else:
                for index, group in enumerate(cache.groups[1:], 1):
                    if group.kept is not None:
                        forward.allowed[index] = self.mark(group.kept)[:, None].expand(-1, drafted, -1)
        if self.stages is None:
            kept = forward.drafts.kept
            self.write_drafts(mass, importance, torch.stack(kept) if kept else None)

    def choose_for_drafts(
        self, indices: Sequence[int], mass: Tensor, importance: Tensor, hidden: Tensor | None, within: Tensor | None = None, stage: int = 0
    ) -> None:  # fmt: skip
        """What each drafted row may read in these groups: one decision, for all of them.

        Args:
            indices: of the groups.
            mass: ``[B, d, Hq, 4]``, importance: ``[B, d, N]``, hidden: ``[B, d, D]`` or None.
            within: bool ``[B * d, N]``, what can be chosen; None: all.
            stage: ``View.group``.
        """
        cache, policy, forward = self.cache, self.policy, self.forward
        batch, drafted = mass.shape[:2]
        first = self._first_draft(drafted)
        each = cache.full.n_visual.repeat_interleave(drafted)
        steps = torch.arange(first, first + drafted, device=each.device)
        state = {name: tensor.repeat_interleave(drafted, 0) for name, tensor in self.state.items()}
        hidden = None if hidden is None else hidden.flatten(0, 1)
        view = View(steps.repeat(batch), mass.flatten(0, 1), importance.flatten(0, 1), each, within, state, hidden, stage)
        decision = policy.decide(view)
        score = view.importance if decision.score is None else decision.score
        counts = decision.count if decision.count.dim() == 2 else decision.count[None].expand(len(indices), -1)
        rate = decision.rate.view(batch, drafted)
        self.last_rate = rate[:, -1].contiguous()
        forward.drafts.rates.append(rate)
        width = policy.kept_bound(cache.full.bound)
        for index, count in zip(indices, counts, strict=True):
            kept, n_kept = ops.select_tokens(score, count, each, alive=within, backend=self.backend)
            forward.allowed[index] = self.mark(kept).view(batch, drafted, -1)
            forward.drafts.kept.append(n_kept.view(batch, drafted))
            cache.groups[index].kept = kept.view(batch, drafted, -1)[:, -1, :width].contiguous()
            cache.groups[index].n_kept = n_kept.view(batch, drafted)[:, -1].contiguous()

    def _first_draft(self, drafted: int) -> int:
        """Step of the first drafted row of this pass."""
        return self.forward.start + self.forward.length - drafted - self.turn_end + 1

    def write_drafts(self, mass: Tensor, importance: Tensor, kept: Tensor | None) -> None:
        """Notes drafted rows: ``[B, d, ..]`` each; kept ``[G, B, d]`` or None."""
        if self.record is None:
            self.record = Record(self, mass.shape[0])
        first = self._first_draft(mass.shape[1])
        for row in range(mass.shape[1]):
            self.record.write(self, first + row, mass[:, row], importance[:, row], None if kept is None else kept[:, :, row])

    def mark(self, kept: Tensor) -> Tensor:
        """A list of tokens (-1 past its end) as bool ``[.., N]``."""
        tokens = self.cache.full.capacity
        mark = torch.zeros(kept.shape[0], tokens + 1, dtype=torch.bool, device=kept.device)
        return mark.scatter_(1, torch.where(kept < 0, tokens, kept).long(), True)[:, :-1]

    # ---- what stats() reads -----------------------------------------------------------------------------------------------------

    def write_record(self, mass: Tensor, importance: Tensor | None, step: int | None = None) -> None:
        if self.record is None:
            self.record = Record(self, mass.shape[0])
        self.record.write(self, step, mass, importance)


def _resize_like(tensor: Tensor, like: Tensor) -> Tensor:
    out = torch.zeros_like(like)
    out[:, : tensor.shape[1]] = tensor
    return out
