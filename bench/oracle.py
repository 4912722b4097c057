"""What the benchmarks' results are held against: the operators once more, in plain torch and loops, of nothing that is measured.

Dense rows of one layer, as ``bench.operators.Data`` makes them: ``[0, visual)`` of a sequence are visual, the rest is text, all are live.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Attention:
    """output float64 ``[B, Hq, D]``, mass ``[B, Hq, 4]``, importance ``[B, N]`` (mean over heads)."""

    output: Tensor
    mass: Tensor
    importance: Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, visual: int, text_type: Tensor, kept: Tensor | None = None) -> Attention:
    """Softmax attention of one new token in float64, head by head.

    Args:
        query: ``[B, Hq, D]``; key, value ``[B, Hkv, S, D]``; text_type ``[B, S - visual]``.
        visual: N.
        kept: int ``[B, n]``, the visual rows that may be read; None: all.
    """
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, dim = query.shape
    types = torch.cat([torch.ones(batch, visual, dtype=torch.long, device=query.device), text_type.long()], dim=1)
    seen = torch.ones_like(types, dtype=torch.bool)
    if kept is not None:
        seen[:, :visual] = False
        for sequence in range(batch):
            seen[sequence, kept[sequence].long()] = True
    output, mass = torch.empty_like(query), query.new_zeros(batch, heads, 4)
    importance = query.new_zeros(batch, visual)
    for head in range(heads):
        shared = head * key.shape[1] // heads
        logits = (key[:, shared] @ query[:, head, :, None])[..., 0] / math.sqrt(dim)
        logits[~seen] = -math.inf
        weights = (logits - logits.amax(1, keepdim=True)).exp()
        weights = weights / weights.sum(1, keepdim=True)
        output[:, head] = (weights[:, None] @ value[:, shared])[:, 0]
        for kind in range(4):
            mass[:, head, kind] = (weights * (types == kind)).sum(1)
        importance += weights[:, :visual] / heads
    return Attention(output, mass, importance)


def highest(score: Tensor, count: int) -> Tensor:
    """int64 ``[B, count]``, ascending: the places of the highest of ``score`` ``[B, N]``; of equal ones the first."""

    def best(row: list[float]) -> list[int]:
        return sorted(sorted(range(len(row)), key=lambda place: (-row[place], place))[:count])

    return torch.tensor([best(row) for row in score.tolist()], device=score.device)


def rate(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> Tensor:
    """float64 ``[B]``: the rate whose logit, a linear function of the mass ``[B, Hq, 4]``, is highest."""
    logits = torch.einsum("bhk,rhk->br", mass.double(), weight.double().unflatten(1, (-1, 4))) + bias.double()
    return rates.double()[logits.argmax(1)]


def count(visual: int, rate: float) -> int:
    """How many of ``visual`` tokens are kept at a rate."""
    return min(max(math.floor(visual * (1 - rate) + 1e-6), 0), visual)


def compacted(rows: Tensor, kept: Tensor) -> Tensor:
    """A copy of ``[B, H, S, D]`` whose first n rows are the ``kept`` ones (int ``[B, n]``): those already there stay, the others fill the
    gaps in order.
    """
    out = rows.clone()
    for sequence, chosen in enumerate(kept.tolist()):
        n, inside = len(chosen), set(chosen)
        gaps = [place for place in range(n) if place not in inside]
        out[sequence, :, gaps] = rows[sequence][:, [row for row in chosen if row >= n]]
    return out


def fastv_wrong(score: Tensor, index: Tensor, kept: int, visual: int, rows: int) -> int:
    """How many sequences FastV's choice is wrong in: ``index`` int64 ``[B, kept + text]`` must be ascending rows, all of the text and
    ``kept`` visual ones of which none scores lower (float ``[B, visual]``) than one that is left out. Equal ones may come in any order.
    """
    wrong = 0
    for values, chosen in zip(score.tolist(), index.tolist(), strict=True):
        inside = {row for row in chosen if row < visual}
        outside = [value for row, value in enumerate(values) if row not in inside]
        right = chosen == sorted(set(chosen)) and len(inside) == kept and chosen[kept:] == list(range(visual, rows))
        wrong += not (right and (not outside or min(values[row] for row in inside) >= max(outside)))
    return wrong
