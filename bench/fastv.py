"""FastV's eager path at one new token, in plain torch, as its authors and the eager attention of transformers do it.

Chen et al., An Image is Worth 1/2 Tokens After Layer 2, 2024 (arXiv 2403.06764), algorithm of section 4.1: the attention matrix of the
score layer is materialised, averaged over heads, the highest image tokens are taken by ``torch.topk``, and what stays is gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FastVStep(NamedTuple):
    """output ``[B, Hq, D]``; attention ``[B, Hq, S]``; index int64 ``[B, kept + T]`` ascending rows that stay; their keys and values."""

    output: Tensor
    attention: Tensor
    index: Tensor
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
    text = torch.arange(n_visual, key.shape[2], device=key.device).expand(key.shape[0], -1)
    index = torch.cat([top, text], dim=1).sort(dim=1).values
    where = index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    return FastVStep(output, weights[:, :, 0], index, key.gather(2, where), value.gather(2, where))
