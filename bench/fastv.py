"""FastV's eager path at one new token, in plain torch, from its paper's description and the eager attention of transformers.

Chen et al., An Image is Worth 1/2 Tokens After Layer 2, 2024 (arXiv 2403.06764), algorithm of section 4.1: the attention matrix of the
score layer is materialised, averaged over heads, the highest image tokens are taken by ``torch.topk``, and what stays is gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FastVStep(NamedTuple):
    """output ``[B, Hq, D]``; attention ``[B, Hq, S]``; stays int64 ``[B, kept + T]`` ascending rows; their keys and values."""

    output: Tensor
    attention: Tensor
    stays: Tensor
    key: Tensor
    value: Tensor


def repeat_kv(rows: Tensor, groups: int) -> Tensor:
    """``[B, Hkv, S, D]`` -> ``[B, Hkv * groups, S, D]``, materialised where groups > 1 (as in transformers)."""
    if groups == 1:
        return rows
    batch, heads, length, dim = rows.shape
    return rows[:, :, None].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """query ``[B, Hq, D]`` over dense rows ``[B, Hkv, S, D]`` -> output ``[B, Hq, D]`` and the attention matrix ``[B, Hq, 1, S]``."""
    groups = query.shape[1] // key.shape[1]
    weights = torch.matmul(query[:, :, None], repeat_kv(key, groups).transpose(2, 3)) * scale
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, repeat_kv(value, groups))[:, :, 0], weights


def step(query: Tensor, key: Tensor, value: Tensor, n_visual: int, n_keep: int, scale: float) -> FastVStep:
    """The whole step of the score layer: attention, mean over heads, top-k, gather. Rows ``[0, n_visual)`` are the image's."""
    output, weights = eager_attention(query, key, value, scale)
    mean = weights.mean(dim=1)[:, -1]  # of the last query
    top = mean[:, :n_visual].topk(n_keep, dim=-1).indices
    index = rows_that_stay(top, n_visual, key.shape[2]).sort(dim=1).values
    return FastVStep(output, weights[:, :, 0], index, gather_rows(key, index), gather_rows(value, index))


# ---- the layers behind the score layer, in the three ways that FastV offers. kept: int [B, n], ascending rows that stay ------


def rows_that_stay(kept: Tensor, n_visual: int, rows: int) -> Tensor:
    """int64 ``[B, n + T]``: the kept rows of the image, then all rows of text."""
    text = torch.arange(n_visual, rows, device=kept.device).expand(kept.shape[0], -1)
    return torch.cat([kept.long(), text], dim=1)


def dropped_mask(kept: Tensor, n_visual: int, rows: int) -> Tensor:
    """bool ``[B, rows]``: True where a row must not be seen."""
    dropped = torch.ones(kept.shape[0], rows, dtype=torch.bool, device=kept.device)
    return dropped.scatter_(1, rows_that_stay(kept, n_visual, rows), False)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``[B, Hkv, S, D]`` at index ``[B, n]`` -> ``[B, Hkv, n, D]``."""
    return rows.gather(2, index[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def masked_layer(query: Tensor, key: Tensor, value: Tensor, dropped: Tensor, scale: float) -> Tensor:
    """Attention over every row, with -inf on the dropped ones: output ``[B, Hq, D]``. It saves nothing."""
    groups = query.shape[1] // key.shape[1]
    weights = torch.matmul(query[:, :, None], repeat_kv(key, groups).transpose(2, 3)) * scale
    weights = weights.masked_fill(dropped[:, None, None], float("-inf"))
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, repeat_kv(value, groups))[:, :, 0]


def gathering_layer(query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float) -> Tensor:
    """Gathers the rows that stay, then attends to them: output ``[B, Hq, D]``.

    With a cache that was shortened once (``gather_rows``), ``eager_attention`` over it is FastV's third way.
    """
    return eager_attention(query, gather_rows(key, index), gather_rows(value, index), scale)[0]
