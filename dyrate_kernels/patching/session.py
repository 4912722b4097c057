"""One generation of a patched model: its life cycle, the decode step, and which rows each layer reads.

Beside it, a subject a file: ``columns`` gives the columns of a wide pass their rows, ``prompt`` decides at a prompt's end, ``drafts`` for
drafted tokens, ``stages`` group by group, ``raters`` by chosen rows; ``forward`` is what they all know of the pass under way.

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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.cache import RESPONSE, RowGroup, VisualCache
from dyrate_kernels.patching import cpu_step
from dyrate_kernels.patching.columns import lay_out
from dyrate_kernels.patching.drafts import Drafts
from dyrate_kernels.patching.forward import Forward, Slot
from dyrate_kernels.patching.parallel import HeadShards
from dyrate_kernels.patching.prompt import Prompt
from dyrate_kernels.patching.raters import Raters
from dyrate_kernels.patching.stages import Stages
from dyrate_kernels.patching.wide import KeyRows, attend_wide, row_statistics, visibility
from dyrate_kernels.policies.base import ModelShape, Policy, View
from dyrate_kernels.stats import Record


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
        prompt, drafts: what decides at the end of a prompt, and for drafted tokens.
        stages: what decides for the later groups, each at the layer before it (``Policy.rescores``), or None.
        raters: what lets chosen rows of a prompt rank (``Policy.query_rows == "raters"``) and tokens be merged, or None.
        vision: names of the reducers of the prompts, for ``stats()``, or None.
        reduced: reducers have masked columns within prompts. Columns of a sequence are then counted without these, from the newest one
            back, so that sliding windows measure what the language model really received.
        column_valid: bool ``[B, columns]`` where ``reduced``: which columns are real, for the mask of the next turn.
        visual_in: int32 ``[B]`` where ``reduced``: visual tokens before the reducers.
        visual_place: int64 ``[B, N]`` where ``reduced``: which of those each visual token stands in the place of.
        blocks: int64 ``[B, columns]`` where prompts are not causal throughout: ``KeyRows.blocks``. every_block: as the prompts came, masked
            columns included.
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
        self.prompt, self.drafts = Prompt(self), Drafts(self)
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
        self.decided_in = -1  # in which turn, the last time
        self.turn_mask: Tensor | None = None  # [B, columns], of all columns up to the end of this turn's prompt
        self.had_decided = False  # before the prefill that is under way
        self.new_images = False  # this turn brought visual tokens
        self.step: Tensor | None = None  # int64 [1]: step of the next token (0 = the prompt)
        self.column: Tensor | None = None  # int32 [1]: column of the next token
        self.last_rate: Tensor | None = None
        self.prompt.forget()
        self.waiting: list[Any] = []  # early chunks of a prompt, patching.shrink.Waiting
        self.staged: Tensor | None = None
        self.staged_blocks: Tensor | None = None
        self.staged_mask: Tensor | None = None
        self.blocks: Tensor | None = None
        self.every_block: Tensor | None = None
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
            self.cache = self.forward = self.hidden = None
            self.waiting = []

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
        self.prompt.forget()
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
        self.drafts.forget()
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
            self.forward = lay_out(self, start, length, attention_mask, staged, device)
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
        self.rewind(1)
        cache.length -= 1
        cache.text_bound -= 1
        cache.n_text.sub_(1)
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

    def forward_in_progress(self) -> Forward:
        """The pass under way."""
        if self.forward is None:
            raise RuntimeError("no forward pass is under way on this cache")
        return self.forward

    @property
    def prunes_prompt(self) -> bool:
        """The prompt of this turn is shrunk in the pruned layers."""
        return self.evict and self.decides_at_prefill and self.cache.length < self.turn_end

    @property
    def decides_at_prefill(self) -> bool:
        if not self.policy.at_prefill or (self.frozen and self.decided_in == self.turn):  # a drafting model reads its last column again
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

    def reads_again(self, column: int) -> bool:
        """This model drafts, and no column of its reduced prompt from ``column`` on is masked, so that they can be read again."""
        return self.frozen and self.column_valid is not None and bool(self.column_valid[:, column:].all())

    def rewind(self, columns: int, visual: Tensor | None = None) -> None:
        """The newest ``columns`` were cropped away, among them ``visual`` int32 ``[B]`` visual tokens; None: none."""
        self.drafts.rewind(columns)
        if self.column_valid is not None:
            self.column_valid = self.column_valid[:, : self.cache.length - columns]
        if self.visual_in is not None and visual is not None:
            self.visual_in = self.visual_in - visual
        if self.record is not None:
            self.record.rewind(columns)
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

    def rotate(self, layer: int, cos: Tensor, sin: Tensor) -> bool:
        """The kernel of a decode step that writes the new row can rotate it (called by ``VisualCache.rotate``)."""
        forward = self.forward_in_progress()
        able = forward.decode and forward.on_cpu is None and self.backend != "reference"
        if not able or self.stages is not None or self.cache.keys[layer] is None:
            return False
        forward.rotation = (cos, sin)
        return True

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
        if forward.rotation is not None:
            rows["cos"], rows["sin"] = forward.rotation
            forward.rotation = None
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
                mask = self.drafts.restrict(mask, rows, forward.allowed[index].to(query.device))
        output = attend_wide(query, rows, None if plain else mask, scale)
        if layer == self.score_layer:
            self._score_wide(layer, query, rows, mask, column, scale, window)
        elif scores:
            self.stages.wide(layer, query, rows, mask, scale, window)
        return output

    def _score_wide(self, layer: int, query: Tensor, rows: KeyRows, mask: Tensor, column: Tensor, scale: float, window: int | None) -> None:
        """The score layer of a wide pass: the last prompt row decides, then each drafted row for itself."""
        forward, cache, policy = self.forward, self.cache, self.policy
        tokens = cache.full.capacity
        last = forward.width - forward.drafted - 1  # the last prompt row, where this pass holds it
        home = cache.n_text.device
        if policy.query_rows == "mean" and self.decides_at_prefill and forward.drafted < forward.length:
            self.prompt.add(query, rows, mask, scale)
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
            self.prompt.decide(mass, importance, None if hidden is None else hidden[:, 0])
        if forward.drafted:
            first = forward.length - forward.drafted
            mass, importance = self.of_all_heads(*row_statistics(query[:, :, first:], rows, mask[:, first:], scale, tokens))
            self.drafts.decide(mass.to(home), importance.to(home))

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
