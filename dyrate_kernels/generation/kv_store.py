"""Keys and values: per layer one buffer with a visual region and a text region.

Layout of one layer (docs/design.md, section 6): keys and values are ``[B, Hkv, Cv + Ct, D]``; sequence ``b`` holds its visual rows in
``[0, n_visual[b])`` and its text rows in ``[Cv, Cv + n_text[b])``. Keys are stored after RoPE, so the order of the rows is free:
dropping rows never re-rotates anything. Padding is never stored. The last row of each buffer is a scratch row that takes the
writes of padding; it is never read.

Lengths live on the device (``n_visual``, ``n_text``); the host only knows upper bounds of them (``bound``, ``text_bound``), which is
what makes a decode step free of host syncs. Which policy keeps which rows, and why, is the business of those below.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.generation.index import below, marked, picked, resized, scatter_, scattered
from dyrate_kernels.ops.forms import Prepared

ROUND = 64  # capacities are rounded up, so that small differences in length do not reallocate

_AHEAD = 16  # rows whose views are made at once


def _round_up(rows: int) -> int:
    return -(-rows // ROUND) * ROUND


class RowGroup:
    """The layers ``[first, last)``, which hold the same visual rows.

    Attributes:
        capacity: visual rows a buffer has room for (``Cv``).
        bound: no sequence has more live visual rows than this (a host number).
        n_visual: int32 ``[B]``, live visual rows.
        most: int32 ``[B]``, the most visual rows that each sequence ever had.
        token: int64 ``[B, capacity]``, which visual token (0..N-1, in prompt order) a row holds.
        alive: bool ``[B, N]``, tokens this group holds, where it holds rows of its own (retentions ``evict`` and ``pool``), else None.
        row: int32 ``[B, N]``, the row of each token, -1 of those that it does not hold, where its rows stay while decoding (retention
            ``pool``); rows ascend with tokens. Else None.
        kept, n_kept: the list of rows to read, int32 ``[B, M]`` ascending, -1 past its length, and that, int32 ``[B]`` (retentions
            ``recoverable`` and ``pool``; under ``evict`` while others wait to be moved away, ``RowStore.postpone``), else None.
        waiting: where such a list is written under ``evict``, in every step; None: none was so far.
    """

    n_visual: Tensor
    most: Tensor
    token: Tensor

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.capacity = 0
        self.bound = 0
        self.alive: Tensor | None = None
        self.row: Tensor | None = None
        self.kept: Tensor | None = None
        self.n_kept: Tensor | None = None
        self.waiting: tuple[Tensor, Tensor] | None = None

    @property
    def layers(self) -> range:
        return range(self.first, self.last)

    def share(self, other: RowGroup) -> None:
        """Holds the same rows as ``other``, in the same tensors."""
        self.n_visual, self.most, self.token = other.n_visual, other.most, other.token


class BufferViews:
    """Views of the buffers ``[B, Hkv, C, D]`` of one layer, kept from step to step: making them takes as long as a small copy.

    Attributes:
        keys, values: the buffers.
        key_table, value_table: the same as tables of rows, ``[B * Hkv * C, D]``.
        first, count: what ``first_rows`` gave last, and of how many rows.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.key_table, self.value_table = keys.view(-1, keys.shape[-1]), values.view(-1, values.shape[-1])
        self.count, self.first = -1, (keys, values)
        self._begin, self._single = 0, [(keys, values)][:0]  # views of single rows, from the row ``_begin`` on

    def first_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows ``[0, count)`` of every head, ``[B, Hkv, count, D]``."""
        if self.count != count:
            self.count, self.first = count, (self.keys[:, :, :count], self.values[:, :, :count])
        return self.first

    def single_row(self, row: int) -> tuple[Tensor, Tensor]:
        """Row ``row`` of every head, ``[B, Hkv, 1, D]``. Some that follow are made with it: one by one they take three times as long."""
        at = row - self._begin
        if not 0 <= at < len(self._single):
            ahead = slice(row, row + _AHEAD)
            keys, values = (table[:, :, ahead].split(1, dim=2) for table in (self.keys, self.values))
            self._begin, self._single, at = row, list(zip(keys, values, strict=True)), 0
        return self._single[at]


class RowStore:
    """The rows of one conversation.

    Args:
        num_layers: decoder layers ``L``.
        group_starts: first layer of each pruned group, ascending, e.g. ``[k]``; layers before the first hold every row.
        shared_rows: True when every group holds every row (retention ``recoverable``), False when pruned groups hold fewer.
        moves_rows: where they hold fewer: what a decode step drops leaves (``evict``); else steps read through lists (``pool``).
        backend: name of the operator backend.

    Attributes:
        length: columns seen so far: prompt, padding and generated tokens alike.
        text_bound: no sequence has more live text rows than this.
        n_text: int32 ``[B]``, live text rows.
        text_asked: int32 ``[B]``, text rows that each sequence ever asked room for.
        text_type: uint8 ``[B, Ct]``; text_column: int32 ``[B, Ct]``.
        token_column: int32 ``[B, N]``, the column of each visual token.
        attentions: by layer, forms of a step's tensors and the backend's attention prepared for them (``attend``).
        left: what a decode step on a CPU leaves for the next one (``cpu_step``), which compares, value by value, whether it still holds.
    """

    n_text: Tensor
    text_asked: Tensor
    text_type: Tensor
    text_column: Tensor
    token_column: Tensor

    def __init__(
        self, num_layers: int, group_starts: Sequence[int] = (), shared_rows: bool = True, backend: str = "auto", moves_rows: bool = True
    ) -> None:  # fmt: skip
        edges = [0, *group_starts, num_layers]
        self.groups = [RowGroup(first, last) for first, last in zip(edges[:-1], edges[1:], strict=True)]
        self.group_of = [group for group in self.groups for _ in group.layers]
        self.index_of = [index for index, group in enumerate(self.groups) for _ in group.layers]
        self.full = self.groups[0]  # of the first layers, which always hold every row
        self.shared_rows, self.num_layers, self.backend = shared_rows, num_layers, backend
        self.moves_rows = moves_rows and not shared_rows
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.batch = -1  # sequences; -1 before the first pass
        self.length = 0
        self.text_capacity = 0
        self.text_bound = 0
        self.attentions: dict[int, tuple[tuple, Callable[..., Any]]] = {}
        self.left: dict[Hashable, Any] = {}
        self._views: dict[int, BufferViews] = {}
        self._prepared: dict[int, tuple[list[Tensor | None], list[tuple[list[Tensor], Prepared]]]] = {}  # by group: ``_moving``

    # ---- room -----------------------------------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """The tensors for its sequences are there."""
        return self.batch >= 0

    def start(self, batch: int, device: torch.device) -> None:
        """Makes the per-sequence tensors for ``batch`` empty sequences."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.batch = batch
        self.n_text, self.text_asked = zeros(batch), zeros(batch)
        self.text_type = torch.zeros(batch, 0, dtype=torch.uint8, device=device)
        self.text_column = zeros(batch, 0)
        self.token_column = zeros(batch, 0)
        for group in self.groups:
            if group is not self.full and self.shared_rows:
                group.share(self.full)
                continue
            group.n_visual, group.most = zeros(batch), zeros(batch)
            group.token = torch.zeros(batch, 0, dtype=torch.int64, device=device)
            if group is not self.full:
                group.alive = torch.zeros(batch, 0, dtype=torch.bool, device=device)
                group.row = None if self.moves_rows else zeros(batch, 0)

    @property
    def device(self) -> torch.device:
        """Where lengths and tables are; a layer's rows may be elsewhere."""
        return self.n_text.device

    def reserve_text(self, rows: int) -> None:
        """Makes room for ``rows`` text rows a sequence in every layer (one more is kept as the scratch row)."""
        if rows < self.text_capacity:
            return
        old, new = self.text_capacity, _round_up(rows + 1)
        for layer in range(self.num_layers):
            self._regrow(layer, self.group_of[layer].capacity, self.group_of[layer].capacity, old, new)
        self.text_type, self.text_column = resized(self.text_type, new), resized(self.text_column, new)
        self.text_capacity = new

    def reserve_tokens(self, tokens: int) -> None:
        """Makes room for ``tokens`` visual tokens a sequence in the full group and in every per-token table."""
        if tokens > self.token_column.shape[1]:
            self.token_column = resized(self.token_column, _round_up(tokens))
            for group in self.groups:
                if group.alive is not None:
                    group.alive = resized(group.alive, self.token_column.shape[1])
                if group.row is not None:
                    group.row = resized(group.row, self.token_column.shape[1], -1)
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
            group.token = resized(group.token, new)

    def _regrow(self, layer: int, visual_old: int, visual_new: int, text_old: int, text_new: int) -> None:
        self._prepared.clear()  # it holds the old buffers
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
            0 if k is None or v is None else k.element_size() * k.shape[1] * k.shape[3] + v.element_size() * v.shape[1] * v.shape[3]
            for k, v in zip(self.keys, self.values, strict=True)
        ]

    # ---- rows -----------------------------------------------------------------------------------------------------------------

    def write(self, layer: int, key: Tensor, value: Tensor, row: Tensor) -> None:
        """Stores ``key`` and ``value`` ``[B, Hkv, q, D]`` at rows ``row`` int64 ``[B, q]`` of ``layer``; -1 goes to the scratch row."""
        batch, heads, _, dim = key.shape
        if self.keys[layer] is None:
            capacity = self.group_of[layer].capacity + self.text_capacity
            self.keys[layer] = key.new_zeros(batch, heads, capacity, dim)
            self.values[layer] = value.new_zeros(batch, heads, capacity, value.shape[-1])
        keys, values = self.buffers(layer)
        row = row.to(key.device)
        row = torch.where(row < 0, keys.shape[2] - 1, row)
        sequence = torch.arange(batch, device=key.device)[:, None]
        keys.transpose(1, 2).index_put_((sequence, row), key.transpose(1, 2))
        values.transpose(1, 2).index_put_((sequence, row), value.transpose(1, 2))

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that holds rows, ``[B, Hkv, Cv + Ct, D]``."""
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None and values is not None, f"layer {layer} has stored nothing"
        return keys, values

    def views(self, layer: int) -> BufferViews:
        """Views of the key and value buffers of ``layer``; made anew where a buffer was replaced."""
        views = self._views.get(layer)
        if views is None or views.keys is not self.keys[layer] or views.values is not self.values[layer]:
            views = self._views[layer] = BufferViews(*self.buffers(layer))
        return views

    def live_slices(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, R, D]`` of ``layer``: the visual rows below ``bound``, then the text rows below ``text_bound``."""
        group = self.group_of[layer]
        text = slice(group.capacity, group.capacity + self.text_bound)
        keys, values = (torch.cat([buffer[:, :, : group.bound], buffer[:, :, text]], dim=2) for buffer in self.buffers(layer))
        return keys, values

    def columns(self, group: RowGroup, visual_rows: int, text_rows: int) -> Tensor:
        """int32 ``[B, visual_rows + text_rows]``: the column that each row of ``group`` came from."""
        visual = self.token_column.gather(1, group.token[:, :visual_rows])
        return torch.cat([visual, self.text_column[:, :text_rows]], dim=1)

    def alive(self, group: RowGroup) -> Tensor | None:
        """bool ``[B, N]``: the tokens that a group with rows of its own holds; None: all."""
        return None if group.alive is None else group.alive[:, : self.full.capacity]

    def rows_of(self, group: RowGroup, kept: Tensor) -> Tensor:
        """Visual tokens that ``group`` holds -> their rows in it: int32 ``[B, M]`` ascending, -1 past the end, both."""
        if group.row is None:
            return kept
        return torch.where(kept < 0, kept, group.row.gather(1, kept.clamp(min=0).long()))

    def tokens_kept(self, group: RowGroup) -> Tensor | None:
        """bool ``[B, N]``: the tokens whose rows a group's list names; None: it reads all that it holds."""
        if group.kept is None:
            return None
        kept = group.kept
        if not self.shared_rows:
            kept = torch.where(kept < 0, -1, group.token.gather(1, kept.clamp(min=0).long()))
        return marked(kept, self.full.capacity)

    def _buffers_by_device(self, layers: Iterable[int]) -> list[list[Tensor]]:
        """The key and value buffers of ``layers``, one list a device."""
        found: dict[torch.device, list[Tensor]] = {}
        for layer in layers:
            if self.keys[layer] is not None:
                keys, values = self.buffers(layer)
                found.setdefault(keys.device, []).extend((keys, values))
        return list(found.values())

    def ask(self, visual: Tensor, text: Tensor) -> None:
        """Notes how many rows each sequence needs: int32 ``[B]``. There is room for them already."""
        self.text_asked.copy_(torch.maximum(self.text_asked, text))
        self.full.most.copy_(torch.maximum(self.full.most, visual))

    def add_tokens(self, token: Tensor, column: Tensor) -> None:
        """Notes new visual tokens: int64 ``[B, q]``, -1 for what is none, and their columns. The full group holds token n in row n."""
        scatter_(self.token_column, token, column.int())
        self.full.token.copy_(torch.arange(self.full.capacity, device=self.device))

    def append(self, group: RowGroup, token: Tensor, visual: Tensor) -> Tensor:
        """Rows for visual tokens at the end of a group that holds rows of its own. One host read.

        Args:
            token: int64 ``[B, q]``; visual bool ``[B, q]``: those that are appended.

        Returns:
            int64 ``[B, q]``: the row of each, -1 where none is appended.
        """
        added = visual.sum(1, dtype=torch.int32)
        group.most.copy_(torch.maximum(group.most, group.n_visual + added))
        group.bound = int((group.n_visual + added).max())
        self.reserve_visual(group, group.bound)
        row = torch.where(visual, group.n_visual[:, None] + visual.cumsum(1) - 1, -1)
        scatter_(group.token, row, token)
        assert group.alive is not None, "only a group that holds rows of its own is appended to"
        group.alive |= marked(torch.where(visual, token, -1), self.token_column.shape[1])
        group.n_visual += added
        self._note_rows(group)
        return row

    def _note_rows(self, group: RowGroup) -> None:
        """Writes ``RowGroup.row``, where the group has it, from its tokens."""
        if group.row is not None:
            place = torch.arange(group.capacity, dtype=torch.int32, device=self.device).expand(self.batch, -1)
            token = torch.where(below(group.n_visual, group.capacity), group.token, -1)
            group.row.copy_(scattered(token, place, group.row.shape[1], -1))

    def evict(self, group: RowGroup, kept: Tensor, on_host: bool = False) -> None:
        """Drops every visual token of ``group`` but ``kept``: moves the kept rows to the front of each layer's buffers, in place.

        Args:
            kept: int ``[B, M]``, visual *tokens* (not rows), below 0 past the end.
            on_host: the host may read what is kept: where that is all that the group holds, nothing else is done.
        """
        listed = self._staying(group, kept, on_host)
        if listed is not None:
            self._move(group, *listed)

    def _staying(self, group: RowGroup, kept: Tensor, on_host: bool = False) -> tuple[Tensor, Tensor] | None:
        """Notes that ``group`` holds these visual tokens alone. Returns the list of their rows and its length; None: it never had any, or
        has no others (``on_host``).
        """
        keep = marked(kept, self.token_column.shape[1])
        assert group.alive is not None, "only a group that holds rows of its own can evict"
        if on_host and torch.equal(keep, group.alive):
            return None
        group.alive.copy_(keep)
        if group.bound == 0:
            return None
        held = keep.gather(1, group.token[:, : group.bound])
        held &= below(group.n_visual, group.bound)
        count = held.sum(1, dtype=torch.int32)
        return ops.select_tokens(held.float(), count, group.n_visual, backend=self.backend)  # lists what is marked, ranks nothing

    def _move(self, group: RowGroup, rows: Tensor, count: Tensor) -> None:
        """Moves the rows of a list to the front of each layer's buffers of ``group``, in place."""
        for buffers, prepared in self._moving(group):
            device = buffers[0].device
            compact_ = ops.trusted("compact_", self.backend, device, prepared)
            compact_(buffers, rows.to(device), count.to(device), group.n_visual.to(device))
        ops.trusted("compact_", self.backend, self.device)([group.token], rows, count, group.n_visual)
        group.n_visual.copy_(count)
        self._note_rows(group)

    def _moving(self, group: RowGroup) -> list[tuple[list[Tensor], Prepared]]:
        """The buffers of ``group``, by device, and what a backend prepared to move their rows; made anew where a buffer was replaced."""
        held = [*self.keys[group.first : group.last], *self.values[group.first : group.last]]
        known = self._prepared.get(group.first)
        if known is None or any(old is not new for old, new in zip(known[0], held, strict=True)):
            known = self._prepared[group.first] = held, [(buffers, Prepared()) for buffers in self._buffers_by_device(group.layers)]
        return known[1]

    # ---- rows that move later -----------------------------------------------------------------------------------------------------

    def expect(self) -> None:
        """Makes sure that each group that evicts has a list of the rows that stay: all, where none waits to be moved."""
        for group in self.groups[1:]:
            if not self.moves_rows or group.bound == 0 or group.kept is not None:
                continue
            if group.waiting is None or group.waiting[0].shape != (self.batch, group.bound):
                group.waiting = (group.n_visual.new_empty(self.batch, group.bound), torch.empty_like(group.n_visual))
            rows, count = group.waiting
            row = torch.arange(group.bound, dtype=torch.int32, device=self.device)
            rows.copy_(torch.where(row < group.n_visual[:, None], row, -1))
            count.copy_(group.n_visual)
            group.kept, group.n_kept = rows, count

    def postpone(self, group: RowGroup, kept: Tensor) -> None:
        """Drops tokens as ``evict`` does, but moves no row: until ``settle`` the group is read through a list, written in place
        (``RowGroup.waiting``). What was postponed before is settled.
        """
        listed = self._staying(group, kept)
        if listed is None:
            return
        assert group.waiting is not None, "a list is expected"
        for old, new in zip(group.waiting, listed, strict=True):
            old.copy_(new)
        group.kept, group.n_kept = group.waiting

    def settle(self) -> None:
        """Moves the rows that wait: whoever looks at rows between two steps calls it first."""
        for group in self.groups[1:]:
            if group.waiting is not None and group.kept is group.waiting[0]:
                self._move(group, *group.waiting)
                group.kept = group.n_kept = None

    def held(self, group: RowGroup) -> Tensor:
        """int32 ``[B]``: live visual rows of a group, those that wait to leave it left out."""
        waiting = group.waiting
        return waiting[1] if waiting is not None and group.n_kept is waiting[1] else group.n_visual

    # ---- sequences and columns that go ------------------------------------------------------------------------------------------

    def select(self, index: Tensor) -> None:
        """Makes sequence ``i`` a copy of the former sequence ``index[i]``; in place where the batch keeps its size."""
        before = self.batch
        if index.shape[0] != before:  # else what waits to be moved is reordered with the rest
            self.settle()
        for owner, name in list(self._row_tensors()):
            setattr(owner, name, picked(getattr(owner, name), index))
        self.batch = index.shape[0]
        if self.shared_rows:
            for group in self.groups[1:]:
                group.share(self.full)
        if self.batch == before:
            for buffers in self._buffers_by_device(range(self.num_layers)):
                ops.reorder_(buffers, index.to(buffers[0].device, torch.int64), backend=self.backend)
            return
        self._prepared.clear()
        for stored in (self.keys, self.values):
            for layer, tensor in enumerate(stored):
                if tensor is not None:
                    stored[layer] = picked(tensor, index)

    def _row_tensors(self) -> Iterator[tuple[Any, str]]:
        """(owner, attribute) of every per-sequence tensor, shared ones once."""
        seen: set[int] = set()
        owners: list[tuple[Any, str]] = [(self, n) for n in ("n_text", "text_asked", "text_type", "text_column", "token_column")]
        owners += [(group, n) for group in self.groups for n in ("n_visual", "most", "token", "alive", "row", "kept", "n_kept")]
        for owner, name in owners:
            tensor = getattr(owner, name)
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield owner, name

    def holds_visual_from(self, column: int) -> bool:
        """Some sequence has a visual token at ``column`` or later. Reads the device."""
        held = below(self.full.n_visual, self.full.capacity)
        return bool((held & (self.token_column[:, : self.full.capacity] >= column)).any())

    def drop_from(self, column: int) -> None:
        """The groups that hold rows of their own lose the visual tokens from ``column`` on."""
        for group in self.groups[1:]:
            assert group.alive is not None
            stays = group.alive & (self.token_column < column)
            self.evict(group, torch.where(stays, torch.arange(stays.shape[1], device=stays.device), -1))

    def truncate(self, length: int) -> Tensor:
        """Forgets the columns from ``length`` on; of visual tokens in the full group alone (``drop_from`` does it in others).

        Returns:
            int32 ``[B]``: how many visual tokens went.
        """
        live, held = below(self.n_text, self.text_capacity), below(self.full.n_visual, self.full.capacity)
        self.n_text.copy_((live & (self.text_column < length)).sum(1))
        before = self.full.n_visual.clone()
        self.full.n_visual.copy_((held & (self.token_column[:, : self.full.capacity] < length)).sum(1))
        self.length = length
        return before - self.full.n_visual

    def reset(self) -> None:
        """Forgets everything; the buffers stay for the next use."""
        self.n_text.zero_()
        for group in self.groups:
            group.n_visual.zero_()
            group.bound = 0
            group.kept = group.n_kept = None
            if group.alive is not None:
                group.alive.zero_()
            if group.row is not None:
                group.row.fill_(-1)
        for buffer in (*self.keys, *self.values):
            if buffer is not None:
                buffer.zero_()  # a NaN of an earlier use must not reach the next one (see _regrow)
        self.length = self.text_bound = 0

    def lasting_tensors(self) -> list[Tensor | None]:
        """Returns the tensors that last from step to step and are written in place."""
        lasting = [*self.keys, *self.values, self.n_text, self.text_type, self.text_column, self.token_column]
        for group in self.groups:
            lasting += [group.n_visual, group.token, group.alive, group.row]
        return lasting
