"""Attention over paged rows once more, in float64 numpy: every query row over a dense mask of its sequence's positions.

Written from the contract in ``dyrate_kernels/ops/paged.py`` and nothing else; what a decision does with the statistics is in ``spec.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.ops import spec

GARBAGE = 2**31 - 7
PLAIN = ("query", "key", "value", "block_table", "n_rows", "sequence", "scale")  # all that a layer without list and statistics takes


@dataclass(frozen=True)
class Shape:
    """Sequences by what their prompt holds and by the query rows that read them.

    Attributes:
        prompts: of each sequence, its token types in the order of positions: 1 is a visual token.
        rows: (sequence, rows that it reads) of each query row; a length below 0 counts from the whole sequence's end.
        answers: tokens of each sequence after its prompt.
        plain: ``sequence`` is None: query row r is of sequence r.
    """

    heads: int
    kv_heads: int
    dim: int
    block: int
    prompts: tuple[str, ...]
    answers: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    value_dim: int | None = None
    plain: bool = False


def _types(prompt: str) -> list[int]:
    """``"2s 5v 3i 4v"`` as types; s system, v visual, i instruction, r response (an answer of an earlier turn)."""
    found: list[int] = []
    for part in prompt.split():
        found += ["svir".index(part[-1])] * int(part[:-1])
    return found


def problem(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0, share: bool = False, spare: int = 3) -> dict[str, Any]:
    """Arguments of ``ops.paged_attention``: blocks in random order, NaN in every row that no sequence has, garbage in every entry and list
    that nobody may look at. share: sequences that begin alike have their first block together, as prefix caching does.
    """
    g = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    types = [_types(p) for p in shape.prompts]
    totals = [len(t) + a for t, a in zip(types, shape.answers, strict=True)]
    needed = [-(-n // shape.block) for n in totals]
    together = 1 if share and min(totals) >= shape.block else 0
    blocks = sum(needed) - together * (len(needed) - 1) + spare
    order = rng.permutation(blocks).tolist()
    table = torch.full((len(types), max(needed) + 2), GARBAGE, dtype=torch.int32)
    first = order.pop() if together else None
    for s, n in enumerate(needed):
        table[s, :n] = torch.tensor([first if together and i == 0 else order.pop() for i in range(n)], dtype=torch.int32)
    pools = []
    for dim in (shape.dim, shape.value_dim or shape.dim):
        pool = torch.full((blocks, shape.block, shape.kv_heads, dim), float("nan"), dtype=torch.float64)
        for s, total in enumerate(totals):
            for p in range(total):
                pool[table[s, p // shape.block], p % shape.block] = torch.randn(shape.kv_heads, dim, generator=g, dtype=torch.float64)
        pools.append(pool.to(dtype))
    visual = [[p for p, t in enumerate(kinds) if t == 1] for kinds in types]
    text = [[p for p, t in enumerate(kinds) if t != 1] for kinds in types]
    visual_position = torch.full((len(types), max(map(len, visual), default=0)), GARBAGE, dtype=torch.int32)
    text_position = torch.full((len(types), max(map(len, text), default=0)), -1, dtype=torch.int32)
    text_type = torch.full(text_position.shape, 3, dtype=torch.uint8)
    for s, kinds in enumerate(types):
        visual_position[s, : len(visual[s])] = torch.tensor(visual[s], dtype=torch.int32)
        text_position[s, : len(text[s])] = torch.tensor(text[s], dtype=torch.int32)
        text_type[s, : len(text[s])] = torch.tensor([kinds[p] for p in text[s]], dtype=torch.uint8)
    lengths = [totals[s] + n + 1 if n < 0 else n for s, n in shape.rows]
    sequence = torch.tensor([s for s, _ in shape.rows], dtype=torch.int32)
    return {
        "query": torch.randn(len(shape.rows), shape.heads, shape.dim, generator=g, dtype=torch.float64).to(dtype),
        "key": pools[0],
        "value": pools[1],
        "block_table": table,
        "n_rows": torch.tensor(lengths, dtype=torch.int32),
        "sequence": None if shape.plain else sequence,
        "visual_position": visual_position,
        "n_visual": torch.tensor([sum(p < n for p in visual[s]) for (s, _), n in zip(shape.rows, lengths, strict=True)], dtype=torch.int32),
        "text_position": text_position,
        "text_type": text_type,
        "scale": shape.dim**-0.5,
    }


def owners(arguments: dict[str, Any]) -> list[int]:
    """The sequence of each query row."""
    sequence = arguments["sequence"]
    return list(range(arguments["n_rows"].shape[0])) if sequence is None else sequence.tolist()


def visual_of(arguments: dict[str, Any]) -> list[list[int]]:
    """Positions of the visual tokens that each query row may read."""
    return [
        arguments["visual_position"][s, : int(n)].tolist() for s, n in zip(owners(arguments), arguments["n_visual"], strict=True)
    ]  # fmt: skip


def lists(arguments: dict[str, Any], share: float, width: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """A kept list of each query row: ascending positions, garbage past the end."""
    rng = np.random.default_rng(seed)
    chosen = [sorted(rng.permutation(v)[: round(len(v) * share)].tolist()) for v in visual_of(arguments)]
    kept = torch.full((len(chosen), max(map(len, chosen)) if width is None else width), GARBAGE, dtype=torch.int32)
    for r, line in enumerate(chosen):
        kept[r, : len(line)] = torch.tensor(line, dtype=torch.int32)
    return {"kept": kept, "n_kept": torch.tensor([len(line) for line in chosen], dtype=torch.int32)}


def attention(
    query: Tensor, key: Tensor, value: Tensor, block_table: Tensor, n_rows: Tensor, sequence: Tensor | None, visual_position: Tensor,
    n_visual: Tensor, text_position: Tensor, text_type: Tensor, scale: float, kept: Tensor | None = None, n_kept: Tensor | None = None,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """output, mass, importance (by place in the list that is read)."""
    rows, heads, _ = query.shape
    size, kv_heads = key.shape[1], key.shape[2]
    width = (visual_position if kept is None else kept).shape[1]
    output = np.zeros((rows, heads, value.shape[-1]))
    mass, importance = np.zeros((rows, heads, 4)), np.zeros((rows, width))
    for r in range(rows):
        s, length = r if sequence is None else int(sequence[r]), int(n_rows[r])
        if length == 0:
            continue
        visual = visual_position[s, : int(n_visual[r])].tolist()
        kinds = np.full(length, 3)
        for position, kind in zip(text_position[s].tolist(), text_type[s].tolist(), strict=True):
            if 0 <= position < length:
                kinds[position] = kind
        kinds[visual] = 1
        live = np.ones(length, dtype=bool)
        listed = visual if kept is None else kept[r, : int(n_kept[r])].tolist()
        live[sorted({*visual} - {*listed})] = False
        if window is not None:
            live[: max(length - window, 0)] = False
        where = [(int(block_table[s, p // size]), p % size) for p in range(length)]
        k = np.stack([spec._array(key[b, i]) for b, i in where])
        v = np.stack([spec._array(value[b, i]) for b, i in where])
        for h in range(heads):
            head = h // (heads // kv_heads)
            with np.errstate(invalid="ignore", over="ignore"):
                logits = np.where(live, k[:, head] @ spec._array(query[r, h]) * scale, -np.inf)
                weights = np.where(live, np.exp(logits - logits.max()), 0.0)
                weights = weights / weights.sum() if live.any() else weights
            output[r, h] = weights @ np.where(live[:, None], v[:, head], 0.0)
            for kind in range(4):
                mass[r, h, kind] = weights[kinds == kind].sum()
            importance[r, : len(listed)] += weights[listed] / heads
    return output, mass, importance


SHAPES = [
    # the last token alone of two sequences, in blocks of four
    Shape(2, 2, 8, 4, ("2s 9v 3i", "1s 4v 6i"), (2, 1), ((0, -1), (1, -1)), plain=True),
    # two images, G = 2, blocks of sixteen, ragged rows of drafts, in no order
    Shape(4, 2, 20, 16, ("3s 10v 4i 7v 2i", "5s 20v 1i", "4i"), (5, 1, 3), ((1, -1), (0, -3), (0, -2), (2, -1), (0, -1), (2, -2))),
    # an earlier answer in the prompt, the prompt's last row, rows that pad the batch; G = 4; blocks of five
    Shape(8, 2, 16, 5, ("3v 2i 4r 12v 3i", "2s 30v 3i"), (0, 6), ((0, -1), (1, 0), (1, -2), (1, -1), (0, 0)), value_dim=12),
    # an image after which nothing but answer comes, and one at the front; G = 7, blocks of one row
    Shape(7, 1, 5, 1, ("17v", "9s 8v"), (3, 2), ((0, -1), (1, -1), (0, -2))),
    # no image at all beside one, G = 1, more text than one program sums the mass of
    Shape(2, 2, 4, 8, ("150i", "3s 40v 2i"), (9, 90), ((0, -1), (1, -1), (1, -4))),
]
LARGE = [  # of real models, for a GPU
    Shape(28, 4, 128, 16, ("35s 1200v 11i 1680v 60i", "20s 576v 40i", "90i"), (77, 200, 3),
          ((0, -1), (1, -4), (1, -3), (1, -2), (1, -1), (2, -1), (0, 0))),
    Shape(8, 8, 128, 48, ("35s 2880v 60i", "20s 576v 40i"), (128, 1), ((0, -1), (1, -1)), plain=True),
]  # fmt: skip
