"""Attention with a differentiable mask inside the softmax (docs/methods/dyrate.md).

    p_j = exp(s_j - max) m_j / sum_i exp(s_i - max) m_i        out = sum_j p_j v_j

``m`` is 1 for text and the mask's value for visual tokens. A mask of zeros and ones leaves exactly the softmax over the tokens that stay;
its gradient ``sum_h exp(s_j - max) / Z (dO v_j - dO out)`` is there for the tokens that were left out too, which is what a straight-through
estimator needs. No attention matrix outlives a chunk of query rows: the backward pass makes the scores again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.ops.contract import accumulator

CHUNK_BYTES = 64 << 20  # of one temporary [B, Hq, rows, S]; a handful of them live at a time
_MOST = 60.0  # of s - max for a token that was left out: exp of it must stay finite in float32


def row_chunks(rows: int, batch: int, heads: int, columns: int, item: int = 4) -> Iterator[slice]:
    """Slices of query rows whose scores fit ``CHUNK_BYTES``."""
    step = max(CHUNK_BYTES // max(batch * heads * columns * item, 1), 1)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """query ``[B, Hq, q, D]``, key ``[B, Hkv, S, D]`` -> ``[B, Hq, q, S]`` in the accumulator's type."""
    exact = accumulator(query)
    batch, heads, rows, dim = query.shape
    grouped = query.to(exact).reshape(batch, key.shape[1], -1, dim)
    return (grouped @ key.to(exact).transpose(2, 3) * scale).view(batch, heads, rows, -1)


def _over_heads(weights: Tensor, rows: Tensor) -> Tensor:
    """weights ``[B, Hq, q, S]`` times rows ``[B, Hkv, S, D]`` -> ``[B, Hq, q, D]``."""
    batch, heads, count, columns = weights.shape
    return (weights.reshape(batch, rows.shape[1], -1, columns) @ rows.to(weights.dtype)).view(batch, heads, count, -1)


def _to_rows(weights: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """weights ``[B, Hq, q, S]`` transposed times rows ``[B, Hq, q, D]``, summed over each group -> ``[B, Hkv, S, D]``."""
    batch, _, _, columns = weights.shape
    grouped = weights.reshape(batch, kv_heads, -1, columns).transpose(2, 3)
    return grouped @ rows.reshape(batch, kv_heads, -1, rows.shape[-1])


class _MaskedAttention(torch.autograd.Function):
    """See :func:`masked_attention`. Saves query, key, value, mask, output and two numbers a query row and head."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, allowed: Tensor, columns: Tensor, scale: float
    ) -> Tensor:  # fmt: skip
        batch, heads, rows, _ = query.shape
        output = query.new_empty(batch, heads, rows, value.shape[-1])
        peak = query.new_empty(batch, heads, rows, dtype=accumulator(query))
        norm = torch.empty_like(peak)
        for part in row_chunks(rows, batch, heads, key.shape[2]):
            score = scores(query[:, :, part], key, scale)
            multiplier = _multiplier(mask[:, part], allowed[:, part], columns).to(score.dtype)[:, None]
            high = score.masked_fill(multiplier == 0, float("-inf")).amax(-1, keepdim=True)
            high = high.masked_fill(high == float("-inf"), 0.0)
            weight = (score - high).clamp(max=_MOST).exp() * multiplier
            total = weight.sum(-1, keepdim=True)
            output[:, :, part] = _over_heads(weight / total.where(total != 0, 1.0), value).to(output.dtype)
            peak[:, :, part], norm[:, :, part] = high[..., 0], total[..., 0]
        ctx.save_for_backward(query, key, value, mask, allowed, columns, output, peak, norm)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, allowed, columns, output, peak, norm = ctx.saved_tensors
        exact = accumulator(query)
        batch, heads, rows, _ = query.shape
        kv_heads = key.shape[1]
        for_query, for_key, for_value, for_mask = ctx.needs_input_grad[:4]
        grad_query = torch.empty_like(query) if for_query else None
        grad_key = torch.zeros_like(key, dtype=exact) if for_key else None
        grad_value = torch.zeros_like(value, dtype=exact) if for_value else None
        grad_mask = torch.empty_like(mask) if for_mask else None
        for part in row_chunks(rows, batch, heads, key.shape[2]):
            upper = grad[:, :, part].to(exact)
            score = scores(query[:, :, part], key, ctx.scale)
            multiplier = _multiplier(mask[:, part], allowed[:, part], columns).to(exact)[:, None]
            total = norm[:, :, part, None]
            share = (score - peak[:, :, part, None]).clamp(max=_MOST).exp() / total.where(total != 0, 1.0)
            share = share.masked_fill(~allowed[:, None, part], 0.0)
            along = (upper * output[:, :, part].to(exact)).sum(-1, keepdim=True)
            change = share * (scores(upper, value, 1.0) - along)  # d out / d m, for every column
            if grad_mask is not None:
                grad_mask[:, part] = _at_columns(change.sum(1), columns).to(mask.dtype)
            change = change * multiplier
            if grad_query is not None:
                grad_query[:, :, part] = (_over_heads(change, key) * ctx.scale).to(query.dtype)
            if grad_key is not None:
                grad_key += _to_rows(change, query[:, :, part].to(exact), kv_heads) * ctx.scale
            if grad_value is not None:
                grad_value += _to_rows(share * multiplier, upper, kv_heads)
        return (
            grad_query,
            None if grad_key is None else grad_key.to(key.dtype),
            None if grad_value is None else grad_value.to(value.dtype),
            grad_mask,
            None,
            None,
            None,
        )


def _multiplier(mask: Tensor, allowed: Tensor, columns: Tensor) -> Tensor:
    """``[B, q, S]``: the mask's value at visual columns, 1 at text, 0 where a row may not look."""
    spare = torch.ones(*allowed.shape[:2], allowed.shape[2] + 1, dtype=mask.dtype, device=mask.device)
    index = torch.where(columns >= 0, columns, allowed.shape[2])
    spare.scatter_(2, index[:, None].expand(-1, allowed.shape[1], -1), mask.detach())
    return spare[..., :-1] * allowed


def _at_columns(values: Tensor, columns: Tensor) -> Tensor:
    """``[B, q, S]`` at the visual columns -> ``[B, q, N]``, 0 where a sequence has no such token."""
    index = columns.clamp(min=0)[:, None].expand(-1, values.shape[1], -1)
    return values.gather(2, index).masked_fill((columns < 0)[:, None], 0.0)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, allowed: Tensor, columns: Tensor, scale: float
) -> Tensor:  # fmt: skip
    """Attention of ``q`` rows over ``S`` columns with a mask on visual columns inside the softmax.

    Memory: saves the arguments and ``(q D + 2 q)`` elements a head; temporaries of ``CHUNK_BYTES`` each, whatever the lengths.

    Args:
        query: ``[B, Hq, q, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        mask: ``[B, q, N]``, what each row keeps of each visual token: 0 or 1 in training; any value is differentiated right.
        allowed: bool ``[B, q, S]``: columns that are not padding, not in the future, inside of the window.
        columns: int64 ``[B, N]``: the column of each visual token, -1 past a sequence's last one.
        scale: of the scores.

    Returns:
        ``[B, Hq, q, Dv]`` in the query's type; float32 inside, float64 for float64. Zero in rows that may look nowhere.
    """
    return _MaskedAttention.apply(query, key, value, mask, allowed, columns, scale)
