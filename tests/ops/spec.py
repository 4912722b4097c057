"""The operators once more, in float64 and in loops, written from the contract in ``dyrate_kernels/ops/__init__.py`` and nothing else: what
the tests of every backend and the benchmarks hold their results against.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


class Attention(NamedTuple):
    """output ``[B, Hq, Dv]``, mass ``[B, Hq, 4]`` (None without types), importance ``[B, visual_capacity]``, all float64."""

    output: Tensor
    mass: Tensor | None
    importance: Tensor


def attention(query, key, value, n_visual, n_text, visual_capacity, scale, kept=None, n_kept=None, text_type=None, position=None,
              query_position=None, window=None):  # fmt: skip
    """Softmax attention head by head, on the device of the tensors; only live rows are looked at. Lengths may be lists."""
    q, k, v = query.detach().double(), key.detach(), value.detach()
    batch, heads, _ = q.shape
    groups = heads // k.shape[1]
    output, mass = q.new_zeros(batch, heads, v.shape[-1]), q.new_zeros(batch, heads, 4)
    importance = q.new_zeros(batch, visual_capacity)
    for b in range(batch):
        visual = list(range(int(n_visual[b]))) if kept is None else kept[b, : int(n_kept[b])].tolist()
        text = int(n_text[b])
        row = torch.tensor([*visual, *range(visual_capacity, visual_capacity + text)], dtype=torch.long, device=q.device)
        kind = torch.ones_like(row)
        kind[len(visual) :] = 0 if text_type is None else text_type[b, :text].long()
        if window is not None:
            inside = query_position[b].long() - position[b, row].long() < window
            row, kind = row[inside], kind[inside]
        if not len(row):
            continue
        seen = row < visual_capacity
        for h in range(heads):
            logits = k[b, h // groups, row].double() @ q[b, h] * scale
            weights = (logits - logits.max()).exp()
            weights = weights / weights.sum()
            output[b, h] = weights @ v[b, h // groups, row].double()
            for number in range(4):
                mass[b, h, number] = weights[kind == number].sum()
            if weights.isnan().any():
                mass[b, h] = math.nan  # of the whole head
            importance[b, row[seen]] += weights[seen] / heads  # no row is named twice
    return Attention(output, None if text_type is None else mass, importance)


def keep_count(n: int, rate: float) -> int:
    """How many of n stay."""
    return n if math.isnan(rate) else min(max(math.floor(n * (1 - rate) + 1e-6), 0), n)


def select(score: list[float], count: int, n_visual: int, alive: list[bool] | None = None) -> list[int]:
    """The kept list of one sequence."""
    candidates = [i for i in range(n_visual) if alive is None or alive[i]]
    ranked = sorted(candidates, key=lambda i: (math.isnan(score[i]), -score[i] if not math.isnan(score[i]) else 0.0, i))
    return sorted(ranked[: max(count, 0)])


def predict(mass: Tensor, weight: Tensor, bias: Tensor) -> list[int]:
    """The class of each sequence."""
    classes = []
    for b in range(mass.shape[0]):
        offset = _array(bias if bias.dim() == 1 else bias[b])
        logits = (_array(weight) @ _array(mass[b]).reshape(-1) + offset).tolist()
        classes.append(min(range(len(logits)), key=lambda i: (math.isnan(logits[i]), 0.0 if math.isnan(logits[i]) else -logits[i], i)))
    return classes


def compact(rows: Tensor, kept: list[int]) -> Tensor:
    """One sequence ``[.., C, D]`` or ``[C]`` after hole filling."""
    out = rows.clone()
    dim = 0 if rows.dim() == 1 else -2
    n, listed = len(kept), set(kept)
    movers = [row for row in kept if row >= n]
    holes = [row for row in range(n) if row not in listed]
    for source, target in zip(movers, holes, strict=True):
        out.select(dim, target).copy_(rows.select(dim, source))
    return out


def problem(batch, heads, kv_heads, dim, visual_capacity, text_capacity, n_visual, n_text, dtype=torch.float64, seed=0, poison=True):
    """Arguments of an attention operator; every dead row holds NaN, every dead type and position garbage."""
    g = torch.Generator().manual_seed(seed)
    rows = visual_capacity + text_capacity
    query = torch.randn(batch, heads, dim, generator=g, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, rows, dim, generator=g, dtype=torch.float64)
    value = torch.randn(batch, kv_heads, rows, dim, generator=g, dtype=torch.float64)
    types = torch.tensor([0, 2, 3])[torch.randint(0, 3, (batch, text_capacity), generator=g)].to(torch.uint8)
    position = torch.stack([torch.randperm(rows, generator=g) for _ in range(batch)]).int()
    if poison:
        for b in range(batch):
            dead = [*range(n_visual[b], visual_capacity), *range(visual_capacity + n_text[b], rows)]
            key[b, :, dead] = value[b, :, dead] = float("nan")
            position[b, dead] = torch.randint(-(2**31), 2**31 - 1, (len(dead),), generator=g).int()
            types[b, n_text[b] :] = 200
    return {
        "query": query.to(dtype),
        "key": key.to(dtype),
        "value": value.to(dtype),
        "n_visual": torch.tensor(n_visual, dtype=torch.int32),
        "n_text": torch.tensor(n_text, dtype=torch.int32),
        "visual_capacity": visual_capacity,
        "scale": dim**-0.5,
        "text_type": types,
        "position": position,
        "query_position": torch.full((batch,), rows, dtype=torch.int32),
    }


def lists(n_visual, counts, width, seed=0):
    """Ascending kept lists: int32 ``[B, width]`` (garbage past the end) and their lengths."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.full((len(counts), width), -7, dtype=torch.int32)
    for b, (n, count) in enumerate(zip(n_visual, counts, strict=True)):
        kept[b, :count] = torch.randperm(n, generator=g)[:count].sort().values.int()
    return kept, torch.tensor(counts, dtype=torch.int32)
