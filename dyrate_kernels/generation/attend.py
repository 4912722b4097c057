"""Attention and its statistics, of a decode step (through ``dyrate_kernels.ops``) and of a pass of several tokens. Knows no policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention

from dyrate_kernels import ops
from dyrate_kernels.generation.kv_store import RowGroup, RowStore
from dyrate_kernels.generation.layout import KeyRows
from dyrate_kernels.ops.contract import accumulator
from dyrate_kernels.ops.forms import Prepared


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast what ``scaled_dot_product_attention`` makes of its arguments there: all in autocast's dtype. Else the same tensors."""
    if not torch._C._is_any_autocast_enabled():  # the same question of any device, in a tenth of the time
        return tensors
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


# ---- a decode step ------------------------------------------------------------------------------------------------------------------


class OperatorStep:
    """The attention of one decode step, layer by layer, by the operators of a backend.

    Args:
        store: whose rows are read; the new token counts in ``n_text`` already.
        row: int64 ``[B, 1]``, the text row of the new token.
        column: int32 ``[1]``, its column.
        unpruned: all rows are read, whatever is kept.
        whole: the text region is read up to its capacity: no bound that changes from step to step reaches an operator.

    Attributes:
        fuses: attention and decision can be one call (``step``).
        on_host: all of the step is on a CPU and is neither captured nor compiled, so the host may read what it computes.
    """

    fuses = True
    on_host = False

    def __init__(self, store: RowStore, row: Tensor, column: Tensor, unpruned: bool, whole: bool) -> None:
        self.store, self.row, self.column, self.unpruned = store, row, column, unpruned
        self.text_bound = store.text_capacity if whole else store.text_bound
        self._rotation: tuple[Tensor, Tensor] | None = None  # cos and sin by which the attention is to rotate query and new key
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # metadata and their copies on other devices
        self._counts: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = {}  # by group: ``_counts_of``

    def rotate(self, layer: int, cos: Tensor, sin: Tensor) -> bool:
        """Asks that the attention of ``layer``, which comes next, rotates query and new key. Returns whether it will."""
        if self.store.backend == "reference" or self.store.keys[layer] is None:
            return False
        self._rotation = (cos, sin)
        return True

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention over the rows that the layer may read, the new one among them.

        Args:
            query: ``[B, Hq, 1, D]``.
            key, value: ``[B, Hkv, 1, D]``, the new row; **written to the store**.
            window: a sliding window that some row may have left; None: every live row is visible.

        Returns:
            ``[B, 1, Hq, Dv]``.
        """
        rows = self._rows(layer, query, key, value, scale, window)
        return self._attention(layer, rows)(rows, mass=False, importance=False)[0].unsqueeze(1)

    def score(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, importance: bool
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """Output ``[B, Hq, Dv]``, mass, and importance by row where it is asked for, as of ``ops.decode_attention``."""
        rows = self._rows(layer, query, key, value, scale, window, self.store.text_type)
        return ops.trusted("decode_attention", self.store.backend, query.device)(rows, mass=True, importance=importance)

    def step(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, decide: ops.Decide
    ) -> ops.DecodeStep:  # fmt: skip
        """``ops.decode_step`` by a predictor (weight, bias, rates, alive, max_kept), in a layer that holds every visual row."""
        rows = self._rows(layer, query, key, value, scale, window, self.store.text_type)
        return ops.DecodeStep(*ops.trusted("decode_step", self.store.backend, query.device)(rows, decide))

    def predicted(self, mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rate and count, float64 and int32 ``[B]``, of ``ops.predict_rate`` and ``ops.keep_count``, where there is a shorter way."""
        return None

    def chosen(self, score: Tensor, count: Tensor, n_visual: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The result of ``ops.select_tokens`` where there is a shorter way."""
        return None

    def changed(self) -> None:
        """A decision took effect: lists are others, counts may have changed in place."""
        self._moved.clear()
        self._counts.clear()

    def at(self, device: torch.device, tensor: Tensor) -> Tensor:
        """``tensor`` on ``device``; moved there once in a step, however many layers read it there."""
        if tensor.device == device:
            return tensor
        key = (id(tensor), device)
        if key not in self._moved:
            self._moved[key] = (tensor, tensor.to(device))  # held, so that its id stays its own
        return self._moved[key][1]

    def _attention(self, layer: int, rows: ops.Rows) -> Callable[..., Any]:
        """The backend's ``decode_attention`` for rows of these forms; what it prepares for them lasts from step to step."""
        query, key, kept, cos, sin = rows.query, rows.key, rows.kept, rows.cos, rows.sin
        if rows.window is not None or rows.new_key is None or rows.new_value is None or torch.compiler.is_compiling():
            return ops.trusted("decode_attention", self.store.backend, query.device)
        forms = (
            query.device, query.dtype, query.shape, query.stride(), key.dtype, key.shape, rows.value.shape,
            rows.visual_capacity, rows.scale, rows.new_key.dtype, rows.new_key.stride(), rows.new_value.dtype, rows.new_value.stride(),
            None if kept is None else (kept.shape, kept.stride()),
            None if cos is None or sin is None else (cos.dtype, cos.shape, cos.stride(), sin.dtype, sin.shape, sin.stride()),
        )  # fmt: skip
        known = self.store.attentions.get(layer)
        if known is None or known[0] != forms:
            known = forms, ops.trusted("decode_attention", self.store.backend, query.device, Prepared())
            self.store.attentions[layer] = known
        return known[1]

    def _counts_of(self, group: RowGroup, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Counts of visual and text rows, and the list to read through with its length, on ``device``: once for all layers of a group."""
        found = self._counts.get((group.first, device))
        if found is None:
            kept, n_kept = None, None
            if group.kept is not None and group.n_kept is not None and not self.unpruned:
                kept, n_kept = self.at(device, group.kept), self.at(device, group.n_kept)
            found = self.at(device, group.n_visual), self.at(device, self.store.n_text), kept, n_kept
            self._counts[group.first, device] = found
        return found

    def _rows(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, text_type: Tensor | None = None
    ) -> ops.Rows:  # fmt: skip
        """Returns the operators' rows of ``layer``, the new one written or given to them to write; takes the rotation that waits."""
        store, device = self.store, query.device
        group = store.group_of[layer]
        new_key, new_value = None, None
        if store.backend == "reference" or store.keys[layer] is None:
            store.write(layer, key, value, group.capacity + self.row)
        else:
            new_key, new_value = key.squeeze(2), value.squeeze(2)  # the attention kernel writes it: two launches fewer a layer
        keys, values = store.buffers(layer)
        n_visual, n_text, kept, n_kept = self._counts_of(group, device)
        cos, sin = self._rotation or (None, None)
        self._rotation = None
        position, query_position = None, None
        if text_type is not None:
            text_type = self.at(device, text_type)
        if window is not None:
            position = store.columns(group, group.capacity, store.text_capacity).to(device)
            query_position = self.at(device, self.column).expand_as(n_text)
        clean = True  # the store fills its buffers with zeros
        return ops.Rows(  # by position: by name it takes twice as long
            query.squeeze(2), keys, values, n_visual, n_text, group.capacity, scale, kept, n_kept, text_type, position, query_position,
            window, group.bound, self.text_bound, clean, new_key, new_value, cos, sin,
        )  # fmt: skip


# ---- a pass of several tokens -------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """The rows that a pass sees in one layer: query ``[B, Hq, q, D]``, mask bool ``[B, q, R]`` over ``rows``."""

    query: Tensor
    rows: KeyRows
    mask: Tensor
    scale: float
    window: int | None


def attend_many(query: Tensor, rows: KeyRows, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention: query ``[B, Hq, q, D]``, mask bool ``[B, q, R]`` (None: plainly causal) -> ``[B, q, Hq, D]``, 0 of no row."""
    key, value = per_query_head(query, rows.key), per_query_head(query, rows.value)
    if mask is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)
    blind = ~mask.any(-1, keepdim=True)
    output = scaled_dot_product_attention(query, key, value, attn_mask=(mask | blind)[:, None], scale=scale)
    return output.masked_fill(blind[:, None], 0.0).transpose(1, 2)


def row_statistics(seen: Seen, of: slice, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns, of these query rows, mass ``[B, r, Hq, 4]`` and importance ``[B, r, N]`` (mean over heads), float32 (float64 for float64
    input): what ``ops.score_last_query`` gives for one.
    """
    rows, weights = seen.rows, attention_weights(seen.query[:, :, of], seen.rows, seen.mask[:, of], seen.scale)
    mass = torch.einsum("bhqr,brt->bqht", weights, one_hot(rows.type.long(), ops.reference.TYPES).to(weights.dtype))
    return mass, by_token(weights.mean(1), rows.token, tokens)


def last_row_statistics(store: RowStore, layer: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same of the prompt's last row alone, query ``[B, Hq, D]``, by ``ops.score_last_query``: mass ``[B, Hq, 4]``, importance."""
    group, device = store.group_of[layer], query.device
    return ops.score_last_query(
        query, *store.buffers(layer), group.n_visual.to(device), store.n_text.to(device),
        visual_capacity=group.capacity, scale=scale, text_type=store.text_type.to(device),
        visual_bound=group.bound, text_bound=store.text_bound, backend=store.backend,
    )  # fmt: skip


def per_query_head(query: Tensor, tensor: Tensor) -> Tensor:
    """Key or value heads repeated for the query heads that share them."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def attention_weights(query: Tensor, rows: KeyRows, mask: Tensor, scale: float) -> Tensor:
    """Softmax weights ``[B, Hq, q, R]``; mask bool ``[B, q, R]``."""
    dtype = accumulator(query)
    return seen_softmax(query.to(dtype) @ per_query_head(query, rows.key).to(dtype).transpose(-1, -2) * scale, mask)


def seen_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Over what each query sees: logits ``[B, H, q, R]``, mask bool ``[B, q, R]``; 0 where it sees nothing."""
    weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True)[:, None], 0.0)


def by_token(weights: Tensor, token: Tensor, tokens: int) -> Tensor:
    """Sorts weights ``[B, q, R]`` by visual token: ``[B, q, N]``; text rows fall away."""
    index = torch.where(token < 0, tokens, token)[:, None].expand_as(weights)
    out = weights.new_zeros(*weights.shape[:2], tokens + 1)
    return out.scatter_(2, index, weights)[..., :-1]
