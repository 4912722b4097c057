"""Decode attention on a CPU: torch's SDPA over the rows where they lie, and plain matrix products where statistics are needed.

The reference operators make their masks anew in every layer, which is where the time of a small model's step went. Here whatever the layers
of a group share is made once a step, and a layer is left with as many calls of torch as the unpatched model's: two writes, two views, SDPA.
Results are those of ``ops.reference``, with which the tests compare them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from dyrate_kernels import ops

if TYPE_CHECKING:
    from dyrate_kernels.cache import RowGroup, VisualCache


enabled = True  # False: the reference operators do it, e.g. to compare with them

_ROUND = 32  # rows
_WORTH_A_GATHER = 1 << 15  # numbers of the keys; on one core reading so many takes as long as two index_select of an eighth of them


class _Rows(NamedTuple):
    """What the layers of one group read in one step, of buffers ``[B, Hkv, C, D]``.

    Attributes:
        count: R, how many rows.
        read: int64 ``[B * Hkv * R]``, their places in the buffers seen as ``[B * Hkv * C, D]``; None: they are rows ``[0, R)``.
        mask: ``[B, 1, 1, R]`` in the query's dtype, 0 for rows that are read, -inf for others. Some row is read: the new one.
    """

    count: int
    read: Tensor | None
    mask: Tensor


def _place_of_rows(buffer: Tensor, rows: Tensor) -> Tensor:
    """Rows int64 ``[B, r]`` of a buffer ``[B, H, C, D]`` -> their places int64 ``[B * H * r]`` in the same seen as ``[B * H * C, D]``."""
    batch, heads, capacity, _ = buffer.shape
    first = torch.arange(batch * heads).view(batch, heads, 1) * capacity
    return (first + rows[:, None]).flatten()


class CpuStep:
    """One decode step.

    Args:
        cache: whose rows are read.
        row: int64 ``[B, 1]``, the text row of the new token.
        unpruned: all rows are read, whatever is kept.
    """

    def __init__(self, cache: VisualCache, row: Tensor, unpruned: bool) -> None:
        self.cache, self.row, self.unpruned = cache, row, unpruned
        self._rows: dict[tuple[int, int | None], _Rows] = {}  # by group and window
        self._new: dict[int, Tensor] = {}  # by group: place of the new row

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores the new row: key, value ``[B, Hkv, 1, D]``; **written to the cache**."""
        cache = self.cache
        group = cache.group_of[layer]
        new = self._new.get(group.first)
        if new is None:
            new = self._new[group.first] = _place_of_rows(cache.keys[layer], group.capacity + self.row)
        views = cache.views(layer)
        views.key_table.index_copy_(0, new, key.reshape(-1, key.shape[3]))
        views.value_table.index_copy_(0, new, value.reshape(-1, value.shape[3]))

    def attend(self, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention over the rows that the layer may read.

        Args:
            query: ``[B, Hq, 1, D]``.
            window: a sliding window that some row may have left; None: every live row is visible.

        Returns:
            ``[B, 1, Hq, Dv]``.
        """
        heads = query.shape[1]
        query, keys, values, rows = self._operands(layer, query, window)
        output = scaled_dot_product_attention(query, keys, values, attn_mask=rows.mask, scale=scale)
        return output.reshape(output.shape[0], 1, heads, -1)

    def score(self, layer: int, query: Tensor, scale: float, window: int | None, importance: bool) -> ops.DecodeAttention:
        """``ops.decode_attention`` with mass, and with importance where it is asked for, in a layer that holds every visual row.

        Args:
            query: ``[B, Hq, 1, D]``.
            window: as in ``attend``.
        """
        cache, group = self.cache, self.cache.group_of[layer]
        heads, dtype = query.shape[1], query.dtype
        query, keys, values, rows = self._operands(layer, query, window)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        query, keys, values, mask = (tensor.to(wide) for tensor in (query, keys, values, rows.mask))
        weights = torch.softmax(torch.matmul(query * scale, keys.transpose(2, 3)).add_(mask), -1)
        output = torch.matmul(weights, values).to(dtype)
        weights = weights.flatten(1, 2)
        kind = torch.cat([torch.ones_like(group.token, dtype=torch.uint8), cache.text_type[:, : rows.count - group.capacity]], 1)
        of_type = (kind[:, :, None] == torch.arange(ops.reference.TYPES)).to(wide)
        mean = pad(weights[..., : group.bound].mean(1), (0, group.capacity - group.bound)) if importance else None
        return ops.DecodeAttention(output.reshape(output.shape[0], heads, -1), torch.matmul(weights, of_type), mean)

    def step(
        self, layer: int, query: Tensor, scale: float, window: int | None, *, weight: Tensor, bias: Tensor, rates: Tensor,
        alive: Tensor | None, max_kept: Tensor | None,
    ) -> ops.DecodeStep:  # fmt: skip
        """``ops.decode_step`` by a predictor: what :meth:`score` gives, the rate, the kept list."""
        output, mass, importance = self.score(layer, query, scale, window, True)
        n_visual = self.cache.full.n_visual
        rate, _ = ops.predict_rate(mass, weight, bias, rates, backend="reference")
        count = ops.keep_count(n_visual, rate)
        if max_kept is not None:
            count = torch.minimum(count, max_kept)
        kept, n_kept = ops.select_tokens(importance, count, n_visual, alive=alive, backend="reference")
        return ops.DecodeStep(output, mass, importance, kept, n_kept, rate)

    def _operands(self, layer: int, query: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor, _Rows]:
        """Query, keys and values as matrix products take them, and what there is to know about the rows."""
        cache = self.cache
        group, views = cache.group_of[layer], cache.views(layer)
        rows = self._rows.get((group.first, window))
        if rows is None:
            rows = self._rows[group.first, window] = self._rows_of(group, views.keys, query.dtype, window)
        if rows.read is None:
            keys, values = views.first_rows(rows.count)
        else:  # whole rows of one flat table: 12 times as fast as Tensor.gather on a CPU
            shape = (*views.keys.shape[:2], rows.count, -1)
            keys, values = (table.index_select(0, rows.read).view(shape) for table in (views.key_table, views.value_table))
        if query.shape[1] != keys.shape[1]:  # heads that share a key head stand side by side as rows, so that no key is repeated
            query = query.reshape(keys.shape[0], keys.shape[1], -1, query.shape[3])
        return query, keys, values, rows

    def _rows_of(self, group: RowGroup, keys: Tensor, dtype: torch.dtype, window: int | None) -> _Rows:
        listed = group.kept is not None and not self.unpruned
        if not listed:  # groups that hold the same rows and read all of them share these
            for other in self.cache.groups:
                unlisted = other.kept is None or self.unpruned
                if unlisted and other.n_visual is group.n_visual and (other.first, window) in self._rows:
                    return self._rows[other.first, window]
        return self._make(group, listed, keys, dtype, window)

    def _make(self, group: RowGroup, listed: bool, keys: Tensor, dtype: torch.dtype, window: int | None) -> _Rows:
        cache = self.cache
        batch = keys.shape[0]
        visual, text = group.bound, cache.text_bound
        # a longer list may name most rows, and few numbers are read in less time than a gather's calls take: masking all rows is cheaper
        gathers = listed and 2 * group.kept.shape[1] <= visual and keys[:, :, :visual].numel() >= _WORTH_A_GATHER
        row = torch.arange(max(visual, text + _ROUND, group.kept.shape[1] if listed else 0))
        live = row[:visual] < group.n_visual[:, None]
        if listed:
            inside = row[: group.kept.shape[1]] < group.n_kept[:, None]
            place = torch.where(inside, group.kept, 0 if gathers else visual).long()
            if gathers:
                live = inside
            else:
                live = torch.zeros(batch, visual + 1, dtype=torch.bool).scatter_(1, place, True)[:, :visual]
        gap = 0 if gathers else group.capacity - visual  # dead rows before the text's: masked rather than jumped over
        if not gathers:  # nor are the newest rows cut off sharply: the views of a buffer then serve many steps
            text = min(text + -text % _ROUND, cache.text_capacity)
        live = torch.cat([live, live.new_zeros(batch, gap), row[:text] < cache.n_text[:, None]], 1)
        read = None
        if gathers:
            index = torch.cat([place, (group.capacity + row[:text]).expand(batch, -1)], 1)
            read = _place_of_rows(keys, index)
        if window is not None:
            column = cache.columns(group, group.capacity, text)
            column = column.gather(1, index) if gathers else column
            live = live & (cache.session.column - column < window)
        mask = torch.zeros(batch, 1, 1, live.shape[1], dtype=dtype).masked_fill_(~live[:, None, None], float("-inf"))
        return _Rows(live.shape[1], read, mask)
