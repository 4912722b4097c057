"""Decode attention on a CPU: torch's SDPA over the rows where they lie, and plain matrix products where statistics are needed.

The reference operators make their masks anew in every layer, which is where the time of a small model's step went. Here whatever the layers
of a group share is made once a step, and a layer is left with as many calls of torch as the unpatched model's: two writes, two views, SDPA.
What is the same as in the step before is taken over from it (``RowStore.left``): it is compared by value, which a host that computes it all
can do. Results are those of ``ops.reference``, with which the tests compare them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from dyrate_kernels import ops
from dyrate_kernels.generation.attend import OperatorStep
from dyrate_kernels.generation.index import numbered
from dyrate_kernels.generation.kv_store import BufferViews, RowGroup, RowStore
from dyrate_kernels.ops.contract import accumulator

enabled = True  # False: the reference operators do it, e.g. to compare with them

_TYPES = torch.arange(ops.reference.TYPES, device="cpu")
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


@dataclass
class _Left:
    """A mask over all rows, for the next step, and what it was made of.

    Attributes:
        facts: that must be the same for it to be of use.
        text: live text rows of each sequence.
        kept, counts: copies of the list that it shows and of the list's lengths; None: it shows every visual row.
    """

    rows: _Rows
    facts: tuple
    text: list[int]
    kept: Tensor | None
    counts: list[int]


class _Candidates(NamedTuple):
    """The candidates of a selection: a copy of bool ``[B, N]``, of how many tokens; their list int32 ``[B, N]`` and how many they are."""

    alive: Tensor
    totals: list[int]
    kept: Tensor
    counts: list[int]


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
        self._extends = self.on_host and not torch.is_grad_enabled()  # what autograd may have kept must not be written
        self._text_row = self._shared_row()

    def _shared_row(self) -> int | None:
        """The text row of the new token, if it is the same in every sequence; None if not, or where views of rows cannot be written."""
        if not self._extends:
            return None
        rows = self.row.flatten().tolist()
        return rows[0] if rows and rows.count(rows[0]) == len(rows) else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        heads = query.shape[1]
        query, keys, values, rows = self._operands(layer, query, key, value, window)
        output = scaled_dot_product_attention(query, keys, values, attn_mask=rows.mask, scale=scale)
        return output.reshape(output.shape[0], 1, heads, -1)

    def score(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, importance: bool
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        store, group = self.store, self.store.group_of[layer]
        if group is not store.full:  # rows are no tokens there
            return super().score(layer, query, key, value, scale, window, importance)
        heads, dtype, exact = query.shape[1], query.dtype, accumulator(query)
        query, keys, values, rows = self._operands(layer, query, key, value, window)
        mask = rows.mask
        if dtype != exact:
            query, keys, values, mask = (tensor.to(exact) for tensor in (query, keys, values, mask))
        weights = torch.softmax(torch.matmul(query * scale, keys.transpose(2, 3)).add_(mask), -1)
        output = torch.matmul(weights, values).to(dtype)
        weights = weights.flatten(1, 2)
        kind = pad(store.text_type[:, : rows.length - group.capacity], (group.capacity, 0), value=ops.reference.IMAGE)
        of_type = (kind[:, :, None] == _TYPES).to(exact)
        mean = pad(weights[..., : group.bound].mean(1), (0, group.capacity - group.bound)) if importance else None
        return output.reshape(output.shape[0], heads, -1), torch.matmul(weights, of_type), mean

    def predicted(self, mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.on_host:
            return None
        dtype = accumulator(mass)
        logits = torch.matmul(mass.flatten(1).to(dtype), weight.to(dtype).t()) + bias.to(dtype)
        values, totals = rates.tolist(), self.store.full.n_visual.tolist()
        chosen = [values[_first_highest(row)] for row in logits.tolist()]
        counts = [min(max(math.floor(total * (1.0 - rate) + 1e-6), 0), total) for total, rate in zip(totals, chosen, strict=True)]
        return torch.tensor(chosen, dtype=torch.float64), torch.tensor(counts, dtype=torch.int32)

    def chosen(self, score: Tensor, count: Tensor, n_visual: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if not self.on_host:
            return None
        counts, totals = count.tolist(), n_visual.tolist()
        return _highest(score, counts, totals) if alive is None else self._all_of(alive, counts, totals)

    def _all_of(self, alive: Tensor, counts: list[int], totals: list[int]) -> tuple[Tensor, Tensor] | None:
        """The candidates ``alive`` where each sequence chooses all of them: so it is in most steps once others were dropped."""
        left: _Candidates | None = self.store.left.get("candidates")
        if left is None or left.totals != totals or not torch.equal(left.alive, alive):
            able = alive & (torch.arange(alive.shape[1]) < torch.tensor(totals)[:, None])
            listed = numbered(able)
            kept = torch.full_like(alive, -1, dtype=torch.int32)
            row, token = able.nonzero(as_tuple=True)
            kept[row, listed[row, token]] = token.int()
            left = self.store.left["candidates"] = _Candidates(alive.clone(), totals, kept, able.sum(1).tolist())
        if any(wanted < held for wanted, held in zip(counts, left.counts, strict=True)):
            return None
        return left.kept.clone(), torch.tensor(left.counts, dtype=torch.int32)

    def _operands(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor, _Rows]:  # fmt: skip
        """Writes the new row. Query, keys and values as matrix products take them, and what there is to know about the rows."""
        store = self.store
        group = store.group_of[layer]
        if store.keys[layer] is None:
            store.write(layer, key, value, group.capacity + self.row)
        views = store.views(layer)
        if self._text_row is not None:
            new_key, new_value = views.single_row(group.capacity + self._text_row)
            new_key.copy_(key)
            new_value.copy_(value)
        else:
            self._write(group, views, key, value)
        rows = self._seen.get((group.first, window))
        if rows is None:
            rows = self._seen[group.first, window] = self._rows_of(group, views.keys, query.dtype, window)
        if rows.read is None:
            keys, values = views.first if views.count == rows.length else views.first_rows(rows.length)
        else:  # whole rows of one flat table: 12 times as fast as Tensor.gather on a CPU
            shape = (*views.keys.shape[:2], rows.length, -1)
            keys, values = (table.index_select(0, rows.read).view(shape) for table in (views.key_table, views.value_table))
        if query.shape[1] != keys.shape[1]:  # heads that share a key head stand side by side as rows, so that no key is repeated
            query = query.reshape(keys.shape[0], keys.shape[1], -1, query.shape[3])
        return query, keys, values, rows

    def _write(self, group: RowGroup, views: BufferViews, key: Tensor, value: Tensor) -> None:
        """Writes the new row of each sequence at a place of its own."""
        index = self._new_row.get(group.first)
        if index is None:
            index = self._new_row[group.first] = _flat_index(views.keys, group.capacity + self.row)
        views.key_table.index_copy_(0, index, key.reshape(-1, key.shape[3]))
        views.value_table.index_copy_(0, index, value.reshape(-1, value.shape[3]))

    def _rows_of(self, group: RowGroup, keys: Tensor, dtype: torch.dtype, window: int | None) -> _Rows:
        kept = None if self.unpruned else group.kept
        if kept is None:  # groups that hold the same rows and read all of them share these
            for other in self.store.groups:
                unlisted = other.kept is None or self.unpruned
                if unlisted and other.n_visual is group.n_visual and (other.first, window) in self._seen:
                    return self._seen[other.first, window]
        return self._make(group, kept, keys, dtype, window)

    def _make(self, group: RowGroup, kept: Tensor | None, keys: Tensor, dtype: torch.dtype, window: int | None) -> _Rows:
        listed, visual = 0 if kept is None else kept.shape[1], group.bound
        # a longer list may name most rows, and few numbers are read in less time than a gather's calls take: masking all rows is cheaper
        gathers = kept is not None and 2 * listed <= visual and keys[:, :, :visual].numel() >= _WORTH_A_GATHER
        if gathers or window is not None or not self._extends:
            return self._made(group, kept, keys, dtype, window, gathers)
        return self._extended(group, kept, keys, dtype)

    def _extended(self, group: RowGroup, kept: Tensor | None, keys: Tensor, dtype: torch.dtype) -> _Rows:
        """The rows that the step before read and the new one, by a mask over all rows; where it read others, they are made."""
        store, n_shown = self.store, group.n_visual if kept is None else group.n_kept
        assert n_shown is not None
        text, counts, shape = store.n_text.tolist(), n_shown.tolist(), None if kept is None else kept.shape
        length = group.capacity + min(store.text_bound + -store.text_bound % _ROUND, store.text_capacity)
        facts = (group.bound, group.capacity, length, dtype, torch.is_inference_mode_enabled(), shape)
        left: _Left | None = store.left.pop(group.first, None)  # put back once it is whole
        if left is not None and (left.facts != facts or (kept is None and counts != left.counts)):
            left = None
        if left is not None and text != left.text and text != [rows + 1 for rows in left.text]:
            left = None
        if left is None:
            left = _Left(self._made(group, kept, keys, dtype, None, False), facts, text, None if kept is None else kept.clone(), counts)
        else:
            newest, mask = group.capacity + self.row, left.rows.mask.view(len(text), length)
            if text != left.text:
                mask.scatter_(1, newest, 0.0)
            if kept is not None and left.kept is not None and not (counts == left.counts and torch.equal(kept, left.kept)):
                mask[:, : group.bound].fill_(float("-inf"))
                inside = torch.arange(kept.shape[1]) < n_shown[:, None]
                mask.scatter_(1, torch.where(inside, kept, newest), 0.0)
                left.kept, left.counts = kept.clone(), counts
            left.text = text
        store.left[group.first] = left
        return left.rows

    def _made(
        self, group: RowGroup, kept: Tensor | None, keys: Tensor, dtype: torch.dtype, window: int | None, gathers: bool
    ) -> _Rows:  # fmt: skip
        store = self.store
        batch, listed = keys.shape[0], 0 if kept is None else kept.shape[1]
        visual, text = group.bound, store.text_bound
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


def _first_highest(row: list[float]) -> int:
    """Index of the first of the highest; NaN is below all numbers."""
    best = 0
    for index, value in enumerate(row):
        if value > row[best] or (math.isnan(row[best]) and not math.isnan(value)):
            best = index
    return best


def _highest(score: Tensor, counts: list[int], totals: list[int]) -> tuple[Tensor, Tensor] | None:
    """``ops.select_tokens`` where all sequences choose as many of as many; None where not, or where a score is NaN: it sorts elsewhere."""
    batch = len(counts)
    if not batch or counts.count(counts[0]) < batch or totals.count(totals[0]) < batch:
        return None
    total = totals[0]
    count = min(max(counts[0], 0), total)
    kept = torch.full(score.shape, -1, dtype=torch.int32)
    if count:
        values, order = score[:, :total].sort(dim=1, descending=True, stable=True)
        if any(map(math.isnan, values[:, 0].tolist())):
            return None
        kept[:, :count] = order[:, :count].sort(dim=1).values
    return kept, torch.full((batch,), count, dtype=torch.int32)
