"""Decode attention on a CPU: torch's SDPA over the rows where they lie, and plain matrix products where statistics are needed.

The reference operators make their masks anew in every layer, which is where the time of a small model's step went. Here whatever the layers
of a group share is made once a step, and a layer is left with as many calls of torch as the unpatched model's: two writes, two views, SDPA.
Results are those of ``ops.reference``, with which the tests compare them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from dyrate_kernels import ops
from dyrate_kernels.generation.attend import OperatorStep
from dyrate_kernels.generation.kv_store import BufferViews, RowGroup, RowStore
from dyrate_kernels.ops.contract import accumulator

enabled = True  # False: the reference operators do it, e.g. to compare with them

_ROUND = 32  # rows
_WORTH_A_GATHER = 1 << 15  # numbers of the keys; on one core reading so many takes as long as two index_select of an eighth of them


class _Rows(NamedTuple):
    """The rows that the layers of one group read in one step, of buffers ``[B, Hkv, C, D]``.

    Attributes:
        length: R, how many rows.
        read: int64 ``[B * Hkv * R]``, their indices in the buffers seen as ``[B * Hkv * C, D]``; None: they are rows ``[0, R)``.
        mask: ``[B, 1, 1, R]`` in the query's dtype, 0 for rows that are read, -inf for others. Some row is read: the new one.
    """

    length: int
    read: Tensor | None
    mask: Tensor


def _flat_index(buffer: Tensor, rows: Tensor) -> Tensor:
    """Rows int64 ``[B, r]`` of a buffer ``[B, H, C, D]`` -> their indices int64 ``[B * H * r]`` in the same seen as ``[B * H * C, D]``."""
    batch, heads, capacity, _ = buffer.shape
    first = torch.arange(batch * heads).view(batch, heads, 1) * capacity
    return (first + rows[:, None]).flatten()


class CpuStep(OperatorStep):
    """One decode step where rows, counts and lists are on a CPU and no other backend was asked for."""

    fuses = False

    def __init__(self, store: RowStore, row: Tensor, column: Tensor, unpruned: bool, whole: bool = False) -> None:
        super().__init__(store, row, column, unpruned, whole)
        self.on_host = not whole and not torch.compiler.is_compiling()
        self._seen: dict[tuple[int, int | None], _Rows] = {}  # by group and window
        self._new_row: dict[int, Tensor] = {}  # by group: flat index of the new row
        self._text_row = self._shared_row()
        self._written: tuple[int, BufferViews] | None = None  # layer that was written last, and its buffers

    def _shared_row(self) -> int | None:
        """The text row of the new token, if it is the same in every sequence; None if not, or where views of rows cannot be written."""
        if not self.on_host or torch.is_grad_enabled():  # autograd refuses to write one of several views
            return None
        rows = self.row.flatten().tolist()
        return rows[0] if rows and rows.count(rows[0]) == len(rows) else None

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        store = self.store
        group = store.group_of[layer]
        if store.keys[layer] is None:
            store.write(layer, key, value, group.capacity + self.row)
            return
        views = store.views(layer)
        self._written = (layer, views)
        if self._text_row is not None:
            keys, values = views.single_row(group.capacity + self._text_row)
            keys.copy_(key)
            values.copy_(value)
            return
        index = self._new_row.get(group.first)
        if index is None:
            index = self._new_row[group.first] = _flat_index(views.keys, group.capacity + self.row)
        views.key_table.index_copy_(0, index, key.reshape(-1, key.shape[3]))
        views.value_table.index_copy_(0, index, value.reshape(-1, value.shape[3]))

    def attend(self, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
        heads = query.shape[1]
        query, keys, values, rows = self._operands(layer, query, window)
        output = scaled_dot_product_attention(query, keys, values, attn_mask=rows.mask, scale=scale)
        return output.reshape(output.shape[0], 1, heads, -1)

    def score(self, layer: int, query: Tensor, scale: float, window: int | None, importance: bool) -> tuple[Tensor, Tensor, Any]:
        store, group = self.store, self.store.group_of[layer]
        if group is not store.full:  # rows are no tokens there
            return super().score(layer, query, scale, window, importance)
        heads, dtype, exact = query.shape[1], query.dtype, accumulator(query)
        query, keys, values, rows = self._operands(layer, query, window)
        query, keys, values, mask = (tensor.to(exact) for tensor in (query, keys, values, rows.mask))
        weights = torch.softmax(torch.matmul(query * scale, keys.transpose(2, 3)).add_(mask), -1)
        output = torch.matmul(weights, values).to(dtype)
        weights = weights.flatten(1, 2)
        kind = torch.cat([torch.ones_like(group.token, dtype=torch.uint8), store.text_type[:, : rows.length - group.capacity]], 1)
        of_type = (kind[:, :, None] == torch.arange(ops.reference.TYPES)).to(exact)
        mean = pad(weights[..., : group.bound].mean(1), (0, group.capacity - group.bound)) if importance else None
        return output.reshape(output.shape[0], heads, -1), torch.matmul(weights, of_type), mean

    def _operands(self, layer: int, query: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor, _Rows]:
        """Query, keys and values as matrix products take them, and what there is to know about the rows."""
        group, written = self.store.group_of[layer], self._written
        views = written[1] if written is not None and written[0] == layer else self.store.views(layer)
        rows = self._seen.get((group.first, window))
        if rows is None:
            rows = self._seen[group.first, window] = self._rows_of(group, views.keys, query.dtype, window)
        if rows.read is None:
            keys, values = views.first_rows(rows.length)
        else:  # whole rows of one flat table: 12 times as fast as Tensor.gather on a CPU
            shape = (*views.keys.shape[:2], rows.length, -1)
            keys, values = (table.index_select(0, rows.read).view(shape) for table in (views.key_table, views.value_table))
        if query.shape[1] != keys.shape[1]:  # heads that share a key head stand side by side as rows, so that no key is repeated
            query = query.reshape(keys.shape[0], keys.shape[1], -1, query.shape[3])
        return query, keys, values, rows

    def _rows_of(self, group: RowGroup, keys: Tensor, dtype: torch.dtype, window: int | None) -> _Rows:
        kept = None if self.unpruned else group.kept
        if kept is None:  # groups that hold the same rows and read all of them share these
            for other in self.store.groups:
                unlisted = other.kept is None or self.unpruned
                if unlisted and other.n_visual is group.n_visual and (other.first, window) in self._seen:
                    return self._seen[other.first, window]
        return self._make(group, kept, keys, dtype, window)

    def _make(self, group: RowGroup, kept: Tensor | None, keys: Tensor, dtype: torch.dtype, window: int | None) -> _Rows:
        store = self.store
        batch, listed = keys.shape[0], 0 if kept is None else kept.shape[1]
        visual, text = group.bound, store.text_bound
        # a longer list may name most rows, and few numbers are read in less time than a gather's calls take: masking all rows is cheaper
        gathers = kept is not None and 2 * listed <= visual and keys[:, :, :visual].numel() >= _WORTH_A_GATHER
        row = torch.arange(max(visual, text + _ROUND, listed))
        live = row[:visual] < group.n_visual[:, None]
        listed_row = row
        if kept is not None:
            assert group.n_kept is not None
            inside = row[:listed] < group.n_kept[:, None]
            listed_row = torch.where(inside, kept, 0 if gathers else visual).long()
            if gathers:
                live = inside
            else:
                live = torch.zeros(batch, visual + 1, dtype=torch.bool).scatter_(1, listed_row, True)[:, :visual]
        gap = 0 if gathers else group.capacity - visual  # dead rows before the text's: masked rather than jumped over
        if not gathers:  # nor are the newest rows cut off sharply: the views of a buffer then serve many steps
            text = min(text + -text % _ROUND, store.text_capacity)
        live = torch.cat([live, live.new_zeros(batch, gap), row[:text] < store.n_text[:, None]], 1)
        index = torch.cat([listed_row, (group.capacity + row[:text]).expand(batch, -1)], 1) if gathers else None
        if window is not None:
            column = store.columns(group, group.capacity, text)
            column = column if index is None else column.gather(1, index)
            live = live & (self.column - column < window)
        mask = torch.zeros(batch, 1, 1, live.shape[1], dtype=dtype).masked_fill_(~live[:, None, None], float("-inf"))
        return _Rows(live.shape[1], None if index is None else _flat_index(keys, index), mask)
