"""The operators over paged rows: the same attention, statistics and decision for a cache that an inference engine owns.

The cache of a layer is a pool of blocks; line ``s`` of ``block_table`` says which block holds which rows of sequence ``s``: its row of
position ``p`` is row ``p % block_size`` of block ``block_table[s, p // block_size]``. The unit of a call is the **query row**: ``R`` query
rows, each with its sequence, its own number of readable rows, its own kept list, statistics and decision, so that plain decoding (one row
a sequence) and speculative decoding (as many as were drafted, not the same everywhere) are one form. Sequences may share blocks.

Where the visual tokens stand is told by two lists of positions a sequence, ascending, both of the prompt: ``visual_position`` and
``text_position``, of all others. After the prompt text runs on. A query row reads its visual tokens first, then its text; without a kept
list and without statistics it reads all rows in the order of positions, and needs no list.

The engine writes its own keys and values (``slot_mapping``): nothing here appends, moves or changes a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, direct, dispatch
from .contract import Decide, PagedRows, step_arguments

_ops = torch.ops.dyrate


class PagedAttention(NamedTuple):
    """output ``[R, Hq, Dv]`` in the query's dtype; mass float32 ``[R, Hq, 4]`` or None; importance float32 ``[R, N]`` or None, of each
    visual token that the row reads, by its place in the list; 0 past the list's end."""

    output: Tensor
    mass: Tensor | None
    importance: Tensor | None


class PagedStep(NamedTuple):
    """output, mass, importance as in :class:`PagedAttention`; kept int32 ``[R, N]`` ascending **positions**, -1 past the end; n_kept
    int32 ``[R]``; rate float64 ``[R]``, the fraction removed of the visual tokens that the row reads."""

    output: Tensor
    mass: Tensor
    importance: Tensor
    kept: Tensor
    n_kept: Tensor
    rate: Tensor


def _attention_arguments(
    *rows: Any, mass: bool = False, importance: bool = False, out: Tensor | None = None, **named: Any
) -> tuple[tuple, dict[str, Any]]:
    return (PagedRows(*rows, **named),), {"mass": mass, "importance": importance, "out": out}


@direct.operator(_attention_arguments)
def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    n_rows: Tensor,
    *,
    sequence: Tensor | None = None,
    visual_position: Tensor | None = None,
    n_visual: Tensor | None = None,
    text_position: Tensor | None = None,
    text_type: Tensor | None = None,
    kept: Tensor | None = None,
    n_kept: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    mass: bool = False,
    importance: bool = False,
    row_bound: int | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> PagedAttention:
    """Attention of ``R`` query rows over paged rows, on request with mass and importance; see the module for the layout.

    Mutates nothing but ``out``. No value on the device is read on the host: lengths, lists and tables may change under a captured graph.

    Args:
        query: ``[R, Hq, D]``, float16, bfloat16, float32 or float64.
        key, value: ``[blocks, block_size, Hkv, D]`` in the query's dtype, with any strides: views of one pool are fine, as vLLM's
            ``kv_cache[..., :D].transpose(1, 2)``. Only rows that are read count, others may hold NaN.
        block_table: int32 ``[S, M]``; entries of blocks that no query row reads may be anything.
        n_rows: int32 ``[R]``, rows that a query row reads at most: those of the positions below it, its own being the last. 0 for a query
            row that only pads the batch (its n_visual and n_kept are 0 then, its output is 0).
        sequence: int32 ``[R]`` in ``[0, S)``, the line of ``block_table`` of each query row; None: row ``r`` is sequence ``r``.
        visual_position: int32 ``[S, N]``, ascending positions of the visual tokens; n_visual int32 ``[R]``, how many of them a query row
            reads: those below ``n_rows``.
        text_position: int32 ``[S, T]``, ascending positions of the prompt's other tokens, -1 past their end. The t-th text token past them
            stands at ``t + n_visual``.
        text_type: uint8 ``[S, T]``, the type of each of these (0 system, 1 image, 2 instruction, 3 response). What runs on after the
            prompt has the type that stands past its end (where text_position is -1), so fill that with 3; past T it is the response.
        kept, n_kept: int32 ``[R, W]``, ascending **positions**, and ``[R]``: of the visual tokens the row reads only these.
        scale: factor of the logits; None is ``D ** -0.5``.
        window: a row is read iff ``n_rows - 1 - position < window``.
        mass: also sum the probability per head and token type. Needs all lists, as importance does.
        importance: also average the probability of each visual token over the ``Hq`` heads; ``[R, N]``, with a kept list ``[R, W]``.
        row_bound: no query row reads more rows; None: ``M * block_size``. The grid and the scratch memory are made for it: with
            statistics float32 ``[R, Hq, row_bound]``. Does not change the result, unless a query row reads more after all: then some of its
            last rows are left out.
        out: ``[R, Hq, Dv]``, contiguous, in the query's dtype: the output is **written there**, and is this tensor.
        backend: ``auto | triton | reference`` (CUDA C++ has no paged form).

    Returns:
        PagedAttention.
    """
    rows = PagedRows(
        query, key, value, block_table, n_rows, checks.scale(scale, query, "R"), sequence, visual_position, n_visual, text_position,
        text_type, kept, n_kept, window, row_bound,
    )  # fmt: skip
    checks.paged(rows, mass, importance)
    if out is not None:
        checks.tensor("out", out, (*query.shape[:2], value.shape[-1]), (query.dtype,), query.device)
        if not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous tensor, got strides {list(out.stride())}")
    dispatch.check_name(backend)
    if out is None:
        output, by_type, per_row = _ops.paged_attention(*rows, mass, importance, backend)
    else:
        output, (by_type, per_row) = out, _ops.paged_attention_out(*rows, mass, importance, backend, out=out)
    return PagedAttention(output, by_type if mass else None, per_row if importance else None)


@direct.operator(step_arguments(PagedRows))
def paged_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    n_rows: Tensor,
    *,
    n_visual: Tensor,
    text_position: Tensor,
    text_type: Tensor,
    sequence: Tensor | None = None,
    visual_position: Tensor | None = None,
    kept: Tensor | None = None,
    n_kept: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    row_bound: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rates: Tensor | None = None,
    count: Tensor | None = None,
    score: Tensor | None = None,
    alive: Tensor | None = None,
    max_kept: Tensor | None = None,
    backend: str = "auto",
) -> PagedStep:
    """The score layer's whole step over paged rows: attention with statistics, the rate, the count, the kept list, row by row.

    As :func:`dyrate_kernels.ops.decode_step`; ``N`` below is the width of ``visual_position``, or of ``kept`` where a list is given:
    the decision is then among its tokens. The list that comes out goes into the layers behind as it is.

    Args:
        weight, bias, rates: the predictor, as in :func:`dyrate_kernels.ops.predict_rate`; bias ``[K]`` or ``[R, K]``.
        count: int32 ``[R]``, how many stay; instead of the predictor.
        score: float ``[R, N]``, what to rank by; None is the importance.
        alive: bool ``[R, N]``, tokens that can be chosen.
        max_kept: int32 ``[R]``, the count is clamped to it.
        The others: as in :func:`paged_attention`.

    Returns:
        PagedStep.
    """
    rows = PagedRows(
        query, key, value, block_table, n_rows, checks.scale(scale, query, "R"), sequence, visual_position, n_visual, text_position,
        text_type, kept, n_kept, window, row_bound,
    )  # fmt: skip
    tokens = checks.paged(rows, True, True)
    decide = Decide(weight, bias, rates, count, score, alive, max_kept)
    checks.decision(decide, query, tokens)
    dispatch.check_name(backend)
    return PagedStep(*_ops.paged_step(*rows, *decide, backend))
