"""Attention of a pass of several rows (prompts, chunks, drafts), over rows in any order.

Decode steps go through ``dyrate_kernels.ops``. Here a row is visible by its *column*, not by its place in the buffer, because the cache
stores rows in an order of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_QUERY_BLOCK = 128  # rows at a time where attention weights are materialised
_PAGE_RANK_WEIGHTS = 2**26  # attention weights held at a time


@dataclass
class KeyRows:
    """Rows that may be read.

    Attributes:
        key, value: ``[B, Hkv, R, D]``.
        column: int64 ``[B, R]``, absolute column of each row.
        live: bool ``[B, R]``, False for padding, dropped tokens and rows past a sequence's end.
        token: int64 ``[B, R]``, visual token index, -1 for text.
        type: uint8 ``[B, R]``, token type.
        blocks: int64 ``[B, columns]``, by column the block whose rows see each other in both directions, -1 for none; None: there are none.
    """

    key: Tensor
    value: Tensor
    column: Tensor
    live: Tensor
    token: Tensor
    type: Tensor
    blocks: Tensor | None = None

    def to(self, device: torch.device) -> KeyRows:
        """The same rows with all metadata on ``device``."""
        moved = (t.to(device) for t in (self.column, self.live, self.token, self.type))
        return KeyRows(self.key, self.value, *moved, blocks=None if self.blocks is None else self.blocks.to(device))

    def block_of(self, column: Tensor) -> Tensor:
        """int64 like ``column`` ``[B, n]``: the block that each is in; needs ``blocks``."""
        last = self.blocks.shape[1] - 1
        return torch.where((column < 0) | (column > last), -1, self.blocks.gather(1, column.clamp(0, last)))


def visibility(rows: KeyRows, column: Tensor, window: int | None) -> Tensor:
    """bool ``[B, q, R]``: row r is live, not later than query q (column int64 ``[B, q]``) or in its block, and inside the sliding window.
    A query may see nothing: padding, and a dropped picture's last token that nothing was written before.
    """
    query, key = column[:, :, None], rows.column[:, None]
    seen = key <= query
    if rows.blocks is not None:
        own = rows.block_of(column)[:, :, None]
        seen = seen | ((own == rows.block_of(rows.column)[:, None]) & (own >= 0))
    mask = rows.live[:, None] & seen
    if window is not None:
        mask &= query - key < window
    return mask


def attend_wide(query: Tensor, rows: KeyRows, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention: query ``[B, Hq, q, D]``, mask bool ``[B, q, R]`` (None: plainly causal) -> ``[B, q, Hq, D]``, 0 of no row."""
    key, value = _per_query_head(query, rows.key), _per_query_head(query, rows.value)
    if mask is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)
    blind = ~mask.any(-1, keepdim=True)
    output = scaled_dot_product_attention(query, key, value, attn_mask=(mask | blind)[:, None], scale=scale)
    return output.masked_fill(blind[:, None], 0.0).transpose(1, 2)


def row_statistics(query: Tensor, rows: KeyRows, mask: Tensor, scale: float, tokens: int) -> tuple[Tensor, Tensor]:
    """What ``ops.score_last_query`` gives, for several query rows at once.

    Args:
        query: ``[B, Hq, r, D]``.
        mask: bool ``[B, r, R]``.
        tokens: N, width of the result.

    Returns:
        mass ``[B, r, Hq, 4]`` and importance ``[B, r, N]`` (mean over heads), float32 (float64 for float64 input).
    """
    weights = _weights(query, rows, mask, scale)
    types = torch.nn.functional.one_hot(rows.type.long(), 4).to(weights.dtype)
    mass = torch.einsum("bhqr,brt->bqht", weights, types)
    return mass, _by_token(weights.mean(1), rows.token, tokens)


def sum_of_all_rows(query: Tensor, rows: KeyRows, mask: Tensor, real: Tensor, scale: float, tokens: int) -> Tensor:
    """Attention each visual token receives from all the query rows (FastV's ranking in its paper, section 3).

    Args:
        query: ``[B, Hq, q, D]``.
        real: bool ``[B, q]``, False for padding, which must not vote.

    Returns:
        ``[B, N]``, mean over heads, sum over rows.
    """
    total = query.new_zeros(query.shape[0], tokens, dtype=_accumulator(query))
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        weights = _weights(query[:, :, block], rows, mask[:, block], scale).mean(1)
        weights = weights * real[:, block, None]
        total += _by_token(weights.sum(1, keepdim=True), rows.token, tokens)[:, 0]
    return total


def page_rank(
    query: Tensor, rows: KeyRows, column: Tensor, real: Tensor, span: tuple[int, int], scale: float, window: int | None,
    temperature: float, iterations: int, tokens: int,
) -> Tensor:  # fmt: skip
    """PageRank of a prompt's rows on its own attention (AIM, arXiv 2412.03248, section 3).

    Every row of the prompt starts with the same weight and hands it on by softmax(logits / temperature), ``iterations`` times.

    Args:
        query: ``[B, Hq, q, D]``; column int64 ``[B, q]``, its columns; real bool ``[B, q]``, False for what is no row of the prompt.
        span: columns of the prompt, from the first up to but not including the last.
        tokens: N, width of the result.

    Returns:
        ``[B, N]``: root of the mean over heads of the squared weight.
    """
    batch, heads, length, _ = query.shape
    size, (first, end) = rows.column.shape[1], span
    inside = rows.live & (rows.column >= first) & (rows.column < end)
    # where each query's own row lies among the keys; the spare row holds the weight of those that have none
    place = torch.full((batch, end - first + 1), size, dtype=torch.int64, device=query.device)
    index = torch.arange(size, device=query.device).expand(batch, -1)
    place.scatter_(1, torch.where(inside, rows.column - first, end - first), index)
    place[:, -1] = size
    own = place.gather(1, torch.where(real, column - first, end - first))
    mask = visibility(rows, column, window)
    start = inside / inside.sum(1, keepdim=True).clamp(min=1)
    total = query.new_zeros(batch, size, dtype=_accumulator(query))
    block = max(_PAGE_RANK_WEIGHTS // max(batch * length * size, 1), 1)  # heads at a time
    key = _per_query_head(query, rows.key)
    for head in range(0, heads, block):
        part = slice(head, head + block)
        dtype = _accumulator(query)
        logits = query[:, part].to(dtype) @ key[:, part].to(dtype).transpose(-1, -2) * (scale / temperature)
        step = _softmax(logits, mask) * real[:, None, :, None]
        weight = start.to(dtype)[:, None].expand(-1, step.shape[1], -1)
        for _ in range(iterations):
            held = torch.nn.functional.pad(weight, (0, 1)).gather(2, own[:, None].expand(-1, step.shape[1], -1))
            weight = (held[:, :, None] @ step)[:, :, 0]
        total += weight.square().sum(1)
    return _by_token((total / heads).sqrt()[:, None], rows.token, tokens)[:, 0]


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _per_query_head(query: Tensor, tensor: Tensor) -> Tensor:
    """Key or value heads repeated for the query heads that share them."""
    groups = query.shape[1] // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _weights(query: Tensor, rows: KeyRows, mask: Tensor, scale: float) -> Tensor:
    """Softmax weights ``[B, Hq, q, R]``."""
    dtype = _accumulator(query)
    return _softmax(query.to(dtype) @ _per_query_head(query, rows.key).to(dtype).transpose(-1, -2) * scale, mask)


def _softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Over what each query sees: logits ``[B, H, q, R]``, mask bool ``[B, q, R]``; 0 where it sees nothing."""
    weights = logits.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True)[:, None], 0.0)


def _by_token(weights: Tensor, token: Tensor, tokens: int) -> Tensor:
    """Sorts weights ``[B, q, R]`` by visual token: ``[B, q, N]``; text rows fall away."""
    index = torch.where(token < 0, tokens, token)[:, None].expand_as(weights)
    out = weights.new_zeros(*weights.shape[:2], tokens + 1)
    return out.scatter_(2, index, weights)[..., :-1]
