"""The key/value cache: per layer one buffer with a visual region and a text region.

Layout of one layer (design.md, section 6): keys and values are ``[B, Hkv, Cv + Ct, D]``; sequence ``b`` holds its visual rows in
``[0, n_visual[b])`` and its text rows in ``[Cv, Cv + n_text[b])``. Keys are stored after RoPE, so the order of the rows is free:
dropping rows never re-rotates anything. Padding is never stored. The last row of each buffer is a scratch row that takes the
writes of padding; it is never read.

Lengths live on the device (``n_visual``, ``n_text``); the host only knows upper bounds of them (``bound``, ``text_bound``), which is
what makes a decode step free of host syncs. What the rows *mean* (which policy keeps which) is the session's business
(``dyrate_kernels.patching.session``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dyrate_kernels import ops

SYSTEM, IMAGE, INSTRUCTION, RESPONSE = 0, 1, 2, 3

_ROUND = 64  # capacities are rounded up, so that small differences in length do not reallocate


def _round_up(rows: int) -> int:
    return -(-rows // _ROUND) * _ROUND


def _resize(tensor: Tensor, size: int, fill: int | float | bool = 0, dim: int = 1) -> Tensor:
    """A copy of ``tensor`` with ``size`` entries along ``dim``; new entries hold ``fill``."""
    shape = list(tensor.shape)
    if shape[dim] == size:
        return tensor
    shape[dim] = size
    out = tensor.new_full(shape, fill)
    common = min(size, tensor.shape[dim])
    out.narrow(dim, 0, common).copy_(tensor.narrow(dim, 0, common))
    return out


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast what ``scaled_dot_product_attention`` makes of its arguments there: all in autocast's dtype. Else the same tensors."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


class RowGroup:
    """The layers ``[first, last)``, which hold the same visual rows.

    Attributes:
        capacity: visual rows a buffer has room for (``Cv``).
        bound: no sequence has more live visual rows than this (a host number).
        n_visual: int32 ``[B]``, live visual rows.
        most: int32 ``[B]``, the most visual rows that each sequence ever had.
        token: int64 ``[B, capacity]``, which visual token (0..N-1, in prompt order) a row holds.
        alive: bool ``[B, N]``, tokens this group still holds (retention ``evict``), else None.
        kept, n_kept: the list of rows to read, int32 ``[B, M]`` ascending, and its length int32 ``[B]`` (retention ``recoverable``),
        else None.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.capacity = 0
        self.bound = 0
        self.n_visual: Tensor | None = None
        self.most: Tensor | None = None
        self.token: Tensor | None = None
        self.alive: Tensor | None = None
        self.kept: Tensor | None = None
        self.n_kept: Tensor | None = None

    @property
    def layers(self) -> range:
        return range(self.first, self.last)


class BufferViews:
    """Views of the buffers ``[B, Hkv, C, D]`` of one layer, kept from step to step: making them takes as long as a small copy.

    Attributes:
        keys, values: the buffers.
        key_table, value_table: the same as tables of rows, ``[B * Hkv * C, D]``.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.key_table, self.value_table = keys.view(-1, keys.shape[-1]), values.view(-1, values.shape[-1])
        self._first: tuple[int, tuple[Tensor, Tensor]] = (-1, (keys, values))

    def first_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows ``[0, count)`` of every head, ``[B, Hkv, count, D]``."""
        if self._first[0] != count:
            self._first = (count, (self.keys[:, :, :count], self.values[:, :, :count]))
        return self._first[1]


class VisualCache(Cache):
    """Key/value cache of a patched model; a Hugging Face ``Cache``.

    ``generate()`` makes one by itself on a patched model. It answers *logical* lengths (``get_seq_length`` counts every column of the
    prompt, padding and dropped tokens included), while the rows that are really stored are fewer.

    Args:
        num_layers: decoder layers ``L``.
        group_starts: first layer of each pruned group, ascending, e.g. ``[k]``; layers before the first hold every row.
        shared_rows: True when every group holds every row (retention ``recoverable``), False when pruned groups hold fewer (``evict``).
    """

    def __init__(self, num_layers: int, group_starts: Sequence[int] = (), shared_rows: bool = True) -> None:
        super().__init__(layers=[])
        edges = [0, *group_starts, num_layers]
        self.groups = [RowGroup(first, last) for first, last in zip(edges[:-1], edges[1:], strict=True)]
        self.group_of = [group for group in self.groups for _ in group.layers]
        self.shared_rows = shared_rows
        self.num_layers = num_layers
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.length = 0  # columns seen so far: prompt, padding and generated tokens alike
        self.text_capacity = 0
        self.text_bound = 0  # no sequence has more live text rows than this
        self.n_text: Tensor | None = None
        self.text_asked: Tensor | None = None  # int32 [B]: text rows that each sequence ever asked room for
        self.text_type: Tensor | None = None  # uint8 [B, Ct]
        self.text_column: Tensor | None = None  # int32 [B, Ct]
        self.token_column: Tensor | None = None  # int32 [B, N]: the column of each visual token
        self.session: Any = None  # dyrate_kernels.patching.session.Session, set by it
        self._views: dict[int, BufferViews] = {}
        self._unread: int | None = None  # layer whose update() no attention has answered yet

    # ---- metadata -------------------------------------------------------------------------------------------------------------

    @property
    def full(self) -> RowGroup:
        """The group of the first layers, which always hold every row."""
        return self.groups[0]

    def allocate_metadata(self, batch: int, device: torch.device) -> None:
        """Makes the per-sequence tensors for ``batch`` empty sequences."""
        zeros = {"dtype": torch.int32, "device": device}
        self.n_text, self.text_asked = torch.zeros(batch, **zeros), torch.zeros(batch, **zeros)
        self.text_type = torch.zeros(batch, 0, dtype=torch.uint8, device=device)
        self.text_column = torch.zeros(batch, 0, **zeros)
        self.token_column = torch.zeros(batch, 0, **zeros)
        for group in self.groups:
            if group is not self.full and self.shared_rows:
                group.n_visual, group.most, group.token = self.full.n_visual, self.full.most, self.full.token
                continue
            group.n_visual, group.most = torch.zeros(batch, **zeros), torch.zeros(batch, **zeros)
            group.token = torch.zeros(batch, 0, dtype=torch.int64, device=device)
            if group is not self.full:
                group.alive = torch.zeros(batch, 0, dtype=torch.bool, device=device)

    def reserve_text(self, rows: int) -> None:
        """Makes room for ``rows`` text rows a sequence in every layer (one more is kept as the scratch row)."""
        if rows < self.text_capacity:
            return
        old, new = self.text_capacity, _round_up(rows + 1)
        for layer in range(self.num_layers):
            self._regrow(layer, self.group_of[layer].capacity, self.group_of[layer].capacity, old, new)
        self.text_type, self.text_column = _resize(self.text_type, new), _resize(self.text_column, new)
        self.text_capacity = new

    def reserve_tokens(self, tokens: int) -> None:
        """Makes room for ``tokens`` visual tokens a sequence in the full group and in every per-token table."""
        if tokens > self.token_column.shape[1]:
            self.token_column = _resize(self.token_column, _round_up(tokens))
            for group in self.groups:
                if group.alive is not None:
                    group.alive = _resize(group.alive, self.token_column.shape[1])
        for group in self.groups if self.shared_rows else self.groups[:1]:
            self.reserve_visual(group, tokens)

    def reserve_visual(self, group: RowGroup, rows: int) -> None:
        """Makes room for ``rows`` visual rows a sequence in the layers of ``group``."""
        if rows <= group.capacity:
            return
        old, new = group.capacity, _round_up(rows)
        for layer in group.layers:
            self._regrow(layer, old, new, self.text_capacity, self.text_capacity)
        group.capacity = new
        if group is not self.full and self.shared_rows:
            group.token = self.full.token
        else:
            group.token = _resize(group.token, new)

    def _regrow(self, layer: int, visual_old: int, visual_new: int, text_old: int, text_new: int) -> None:
        for buffers in (self.keys, self.values):
            old = buffers[layer]
            if old is None:
                continue
            batch, heads, _, dim = old.shape
            # zeros, not empty: rows past a sequence's end are multiplied by a zero weight in masked attention, and 0 * NaN is NaN
            new = old.new_zeros(batch, heads, visual_new + text_new, dim)
            new[:, :, :visual_old] = old[:, :, :visual_old]
            new[:, :, visual_new : visual_new + text_old] = old[:, :, visual_old : visual_old + text_old]
            buffers[layer] = new

    # ---- rows -----------------------------------------------------------------------------------------------------------------

    def write(self, layer: int, key: Tensor, value: Tensor, row: Tensor) -> None:
        """Stores ``key`` and ``value`` ``[B, Hkv, q, D]`` at rows ``row`` int64 ``[B, q]`` of ``layer``; -1 goes to the scratch row."""
        batch, heads, _, dim = key.shape
        if self.keys[layer] is None:
            rows = self.group_of[layer].capacity + self.text_capacity
            self.keys[layer] = key.new_zeros(batch, heads, rows, dim)
            self.values[layer] = value.new_zeros(batch, heads, rows, value.shape[-1])
        row = row.to(key.device)
        row = torch.where(row < 0, self.keys[layer].shape[2] - 1, row)
        sequence = torch.arange(batch, device=key.device)[:, None]
        self.keys[layer].transpose(1, 2).index_put_((sequence, row), key.transpose(1, 2))
        self.values[layer].transpose(1, 2).index_put_((sequence, row), value.transpose(1, 2))

    def views(self, layer: int) -> BufferViews:
        """Views of the key and value buffers of ``layer``; made anew where a buffer was replaced."""
        views = self._views.get(layer)
        if views is None or views.keys is not self.keys[layer] or views.values is not self.values[layer]:
            views = self._views[layer] = BufferViews(self.keys[layer], self.values[layer])
        return views

    def live_slices(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, R, D]`` of ``layer``: the visual rows below ``bound``, then the text rows below ``text_bound``."""
        group = self.group_of[layer]
        text = slice(group.capacity, group.capacity + self.text_bound)
        return tuple(
            torch.cat([buffer[:, :, : group.bound], buffer[:, :, text]], dim=2) for buffer in (self.keys[layer], self.values[layer])
        )

    def columns(self, group: RowGroup, visual_rows: int, text_rows: int) -> Tensor:
        """int32 ``[B, visual_rows + text_rows]``: the column that each row of ``group`` came from."""
        visual = self.token_column.gather(1, group.token[:, :visual_rows])
        return torch.cat([visual, self.text_column[:, :text_rows]], dim=1)

    def _buffers_by_device(self, layers: Iterable[int]) -> list[list[Tensor]]:
        """The key and value buffers of ``layers``, one list a device."""
        found: dict[torch.device, list[Tensor]] = {}
        for layer in layers:
            if self.keys[layer] is not None:
                found.setdefault(self.keys[layer].device, []).extend((self.keys[layer], self.values[layer]))
        return list(found.values())

    @staticmethod
    def rows_reserved(visual: int, text_asked: int, text: int) -> int:
        """Rows of a layer's buffers for one sequence alone: ``reserve_visual``, and ``reserve_text`` as steps call it.

        Args:
            visual: the most visual rows it ever had in the layer.
            text_asked: text rows it asked room for.
            text: text rows it holds now.
        """
        capacity = _round_up(text_asked + 1)
        while text >= capacity:
            capacity = _round_up(2 * capacity + 1)
        return _round_up(visual) + capacity

    def bytes_reserved(self) -> int:
        """Bytes of all key and value buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values) if t is not None)

    def bytes_per_row(self) -> list[int]:
        """Bytes of one row (key and value, all heads of one sequence) in each layer; 0 where nothing is stored yet."""
        return [
            0 if k is None else k.element_size() * k.shape[1] * k.shape[3] + v.element_size() * v.shape[1] * v.shape[3]
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    # ---- the Cache interface of transformers ----------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new rows of a layer. The attention of the same layer must follow, through a patched model."""
        if self.session is None or not self.session.in_forward:
            raise RuntimeError(
                "this VisualCache was handed to a model that is not patched (or no longer is): its rows can only be read by the "
                "attention of the model that dyrate_kernels.patch() was called on. Patch the model again, or start without this cache."
            )
        if self._unread is not None:
            raise RuntimeError(
                f"layer {self._unread} stored rows that no attention has read: the patched attention of that layer was bypassed. "
                "Do not replace attention modules after dyrate_kernels.patch(); unpatch, change the model, then patch it."
            )
        key_states, value_states = as_autocast(key_states, value_states)
        self.session.store(layer_idx, key_states, value_states)
        self._unread = layer_idx
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """The attention of ``layer`` over the rows stored here (``patching.attention.Carrier``)."""
        return self.session.attend(layer, query, key, value, scale, window)

    def rotate(self, layer: int, cos: Tensor, sin: Tensor) -> bool:
        """Asks that the attention of ``layer`` in this pass rotates its query and its new key by these ``[B or 1, D]``, so that ``update``
        and ``attend`` are given them as they were; before ``update``. Returns whether it will: not every attention can."""
        return self.session is not None and self.session.in_forward and self.session.rotate(layer, cos, sin)

    def see(self, layer: int, hidden: Tensor) -> None:
        """What goes into the attention of ``layer`` (``patching.attention.Carrier``)."""
        self.session.see(layer, hidden)

    def mark_read(self, layer: int) -> None:
        """Tells the cache that the attention of ``layer`` has answered its last ``update``."""
        self._unread = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far (logical length)."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the next token (logical)."""
        return self.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Logical key length and offset for ``query_length`` new tokens."""
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length + count, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows when it must."""
        return -1

    get_max_cache_shape = get_max_length

    def __len__(self) -> int:
        return self.num_layers

    def __repr__(self) -> str:
        return f"VisualCache(layers={self.num_layers}, columns={self.length}, groups={[(g.first, g.last) for g in self.groups]})"

    @property
    def batch_size(self) -> int:
        return -1 if self.n_text is None else self.n_text.shape[0]

    @property
    def is_initialized(self) -> bool:
        return self.n_text is not None

    # What kind of layer each is: transformers reads these of ``Cache.layers``, which this cache does not use.

    @property
    def is_linear(self) -> list[bool]:
        """No layer is a linear one (a Mamba layer, say)."""
        return [False] * self.num_layers

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets rows by itself: a sliding window is applied when the rows are read."""
        return [False] * self.num_layers

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer holds rows."""
        return [False] * self.num_layers

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return self.session is None or not self.session.evicted_while_decoding

    def _row_tensors(self) -> Iterator[tuple[Any, str]]:
        """(owner, attribute) of every per-sequence tensor, shared ones once."""
        seen: set[int] = set()
        owners: list[tuple[Any, str]] = [(self, n) for n in ("n_text", "text_asked", "text_type", "text_column", "token_column")]
        owners += [(group, n) for group in self.groups for n in ("n_visual", "most", "token", "alive", "kept", "n_kept")]
        for owner, name in owners:
            tensor = getattr(owner, name)
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield owner, name

    def _select(self, index: Tensor) -> None:
        """Makes sequence ``i`` a copy of the former sequence ``index[i]``; in place where the batch keeps its size."""

        def pick(tensor: Tensor) -> Tensor:
            picked = tensor.index_select(0, index.to(tensor.device))
            return tensor.copy_(picked) if picked.shape == tensor.shape else picked

        before = self.batch_size
        for owner, name in list(self._row_tensors()):
            setattr(owner, name, pick(getattr(owner, name)))
        if self.shared_rows:
            for group in self.groups[1:]:
                group.n_visual, group.most, group.token = self.full.n_visual, self.full.most, self.full.token
        if index.shape[0] == self.batch_size and index.shape[0] == before:
            backend = "auto" if self.session is None else self.session.backend
            for buffers in self._buffers_by_device(range(self.num_layers)):
                ops.reorder_(buffers, index.to(buffers[0].device, torch.int64), backend=backend)
        else:
            for buffers in (self.keys, self.values):
                for layer, tensor in enumerate(buffers):
                    if tensor is not None:
                        buffers[layer] = pick(tensor)
        if self.session is not None:
            self.session.select_sequences(pick)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence ``i`` goes on from sequence ``beam_idx[i]``. In place."""
        if self.is_initialized:
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence ``repeats`` times."""
        if self.is_initialized:
            self._select(torch.arange(self.batch_size, device=self.n_text.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices``."""
        if self.is_initialized:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            self._select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest columns: ``-n`` removes n of them, a positive n keeps the first n, 0 changes nothing.

        Raises:
            RuntimeError: rows were evicted while decoding, or the removed columns hold visual tokens and pruned layers have lost rows:
                what was dropped cannot come back. A drafting model may: nothing is decided again there.
        """
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0)
        if remove <= 0 or not self.is_initialized:
            return
        length = max(self.length - remove, 0)
        if not self.is_croppable:
            raise RuntimeError(
                "crop() after compaction: rows were evicted while decoding and cannot come back. Use retention='recoverable' where the "
                "cache is rolled back (assisted decoding through generate() freezes compaction by itself)."
            )
        if self.session is not None and self.session.reduced and length < self.session.turn_end and not self.session.reads_again(length):
            raise RuntimeError(
                f"crop() to {length} columns reaches into a prompt (which ends at {self.session.turn_end}) that vision reducers have "
                "shortened. Start again without this cache."
            )
        if not self.shared_rows and length < self.session.turn_end and self._holds_visual_from(length):
            if not self.session.frozen:
                raise RuntimeError(
                    f"crop() to {length} columns reaches into a prompt (which ends at {self.session.turn_end}) whose visual tokens were "
                    "evicted. Use retention='recoverable', or start again without this cache."
                )
            self._drop_from(length)
        live = torch.arange(self.text_capacity, device=self.n_text.device) < self.n_text[:, None]
        self.n_text.copy_((live & (self.text_column < length)).sum(1))
        held = torch.arange(self.full.capacity, device=self.n_text.device) < self.full.n_visual[:, None]
        before = self.full.n_visual.clone()
        self.full.n_visual.copy_((held & (self.token_column[:, : self.full.capacity] < length)).sum(1))
        if self.session is not None:
            self.session.rewind(self.length - length, before - self.full.n_visual)
        self.length = length

    def _holds_visual_from(self, column: int) -> bool:
        """Some sequence has a visual token at ``column`` or later. Reads the device."""
        held = torch.arange(self.full.capacity, device=self.n_text.device) < self.full.n_visual[:, None]
        return bool((held & (self.token_column[:, : self.full.capacity] >= column)).any())

    def _drop_from(self, column: int) -> None:
        """The pruned groups lose the visual tokens from ``column`` on: a drafting model reads its prompt's last columns again."""
        for group in self.groups[1:]:
            stays = group.alive & (self.token_column < column)
            count = stays.sum(1, dtype=torch.int32)
            held = torch.full_like(count, stays.shape[1])
            kept, n_kept = ops.select_tokens(stays.float(), count, held, backend=self.session.backend)
            self.evict(group, kept, n_kept, self.session.backend)

    def reset(self) -> None:
        """Forgets everything; the buffers stay for the next use."""
        if self.is_initialized:
            self.n_text.zero_()
            for group in self.groups:
                group.n_visual.zero_()
                group.bound = 0
                group.kept = group.n_kept = None
                if group.alive is not None:
                    group.alive.zero_()
            for buffer in (*self.keys, *self.values):
                if buffer is not None:
                    buffer.zero_()  # a NaN of an earlier use must not reach the next one (see _regrow)
            self.length = self.text_bound = 0
            if self.session is not None:
                self.session.restart()

    # ---- eviction -------------------------------------------------------------------------------------------------------------

    def evict(self, group: RowGroup, kept: Tensor, n_kept: Tensor, backend: str) -> None:
        """Drops every visual token of ``group`` but ``kept``: moves the kept rows to the front of each layer's buffers, in place.

        Args:
            kept: int32 ``[B, M]``, visual *tokens* (not rows), -1 past the end.
            n_kept: int32 ``[B]``.
        """
        tokens = self.token_column.shape[1]
        keep = torch.zeros(self.batch_size, tokens + 1, dtype=torch.bool, device=kept.device)
        keep.scatter_(1, torch.where(kept < 0, tokens, kept).long(), True)
        group.alive.copy_(keep[:, :tokens])
        if group.bound == 0:
            return
        held = keep.gather(1, group.token[:, : group.bound])
        row = torch.arange(group.bound, device=kept.device)
        held &= row < group.n_visual[:, None]
        count = held.sum(1, dtype=torch.int32)
        rows, count = ops.select_tokens(held.float(), count, group.n_visual, backend=backend)
        for buffers in self._buffers_by_device(group.layers):
            device = buffers[0].device
            ops.compact_(buffers, rows.to(device), count.to(device), group.n_visual.to(device), backend=backend)
        ops.compact_([group.token], rows, count, group.n_visual, backend=backend)
        group.n_visual.copy_(count)
