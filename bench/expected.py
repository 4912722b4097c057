"""Expected results of the benchmarks: those of ``tests.ops.spec``, of which nothing is measured, for the dense rows of a benchmark.

Dense rows of one layer, as ``bench.operators.Data`` makes them: ``[0, visual)`` of a sequence are visual, the rest is text, all are live.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ops import spec
from tests.ops.spec import Attention

__all__ = ["Attention", "attention", "compacted", "fastv_wrong", "highest", "rate"]


def attention(query: Tensor, key: Tensor, value: Tensor, visual: int, text_type: Tensor, kept: Tensor | None = None) -> Attention:
    """Softmax attention of one new token in float64.

    Args:
        query: ``[B, Hq, D]``; key, value ``[B, Hkv, S, D]``; text_type ``[B, S - visual]``.
        visual: N.
        kept: int ``[B, n]``, the visual rows that may be read; None: all.
    """
    batch, dim = query.shape[0], query.shape[-1]
    lengths = [visual] * batch, [key.shape[2] - visual] * batch
    listed = None if kept is None else [kept.shape[1]] * batch
    return spec.attention(query, key, value, *lengths, visual, dim**-0.5, kept, listed, text_type)


def highest(score: Tensor, count: int) -> Tensor:
    """int64 ``[B, count]``, ascending: the places of the highest of ``score`` ``[B, N]``; of equal ones the first."""
    return torch.tensor([spec.select(row, count, len(row)) for row in score.tolist()], device=score.device)


def rate(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> Tensor:
    """float64 ``[B]``: the rate whose logit, a linear function of the mass ``[B, Hq, 4]``, is highest."""
    return rates.double()[spec.predict(mass, weight, bias)]


def compacted(rows: Tensor, kept: Tensor) -> Tensor:
    """A copy of ``[B, H, S, D]`` whose first n rows are the ``kept`` ones (int ``[B, n]``): those already there stay, the others fill the
    gaps in order.
    """
    return torch.stack([spec.compact(sequence, chosen) for sequence, chosen in zip(rows, kept.tolist(), strict=True)])


def fastv_wrong(score: Tensor, index: Tensor, kept: int, visual: int, rows: int) -> int:
    """Returns how many sequences FastV's choice is wrong in: ``index`` int64 ``[B, kept + text]`` must be ascending rows, all of the text
    and ``kept`` visual ones of which none scores lower (float ``[B, visual]``) than one that is left out. Equal ones come in any order.
    """
    wrong = 0
    for values, chosen in zip(score.tolist(), index.tolist(), strict=True):
        inside = {row for row in chosen if row < visual}
        outside = [value for row, value in enumerate(values) if row not in inside]
        right = chosen == sorted(set(chosen)) and len(inside) == kept and chosen[kept:] == list(range(visual, rows))
        wrong += not (right and (not outside or min(values[row] for row in inside) >= max(outside)))
    return wrong
