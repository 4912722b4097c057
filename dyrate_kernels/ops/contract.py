"""The operator contract: the arguments of the public operators, bundled, as every backend is given them. Only this and the public functions
list them; ``torch.ops.dyrate`` is declared from here.

A backend is a module with these functions::

    decode_attention(rows: Rows, *, mass: bool, importance: bool) -> (output, mass or None, importance or None)
    score_last_query(rows: Rows) -> (mass, importance)
    decode_step(rows: Rows, decide: Decide) -> (output, mass, importance, kept, n_kept, rate)
    paged_attention(rows: PagedRows, *, mass: bool, importance: bool, out: Tensor | None = None) -> as decode_attention
    paged_step(rows: PagedRows, decide: Decide) -> as decode_step
    predict_rate, keep_count, select_tokens, compact_, reorder_: the public signatures without ``backend``

A score layer reads every visual row: ``score_last_query`` and ``decode_step`` are given no kept list, the former no new row either.
Arguments are valid there: the public functions have checked them, or ``ops.trusted``'s caller vouches for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def accumulator(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of sums over a tensor of this dtype, and of statistics: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class Rows(NamedTuple):
    """A query a sequence and the rows of the layer that it reads: see ``ops.decode_attention``, and ``docs/design.md`` for the layout."""

    query: Tensor
    key: Tensor
    value: Tensor
    n_visual: Tensor
    n_text: Tensor
    visual_capacity: int
    scale: float
    kept: Tensor | None = None
    n_kept: Tensor | None = None
    text_type: Tensor | None = None
    position: Tensor | None = None
    query_position: Tensor | None = None
    window: int | None = None
    visual_bound: int | None = None
    text_bound: int | None = None
    clean: bool = False
    new_key: Tensor | None = None
    new_value: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


class PagedRows(NamedTuple):
    """Query rows and the paged rows that they read: see ``ops.paged_attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    block_table: Tensor
    n_rows: Tensor
    scale: float
    sequence: Tensor | None = None
    visual_position: Tensor | None = None
    n_visual: Tensor | None = None
    text_position: Tensor | None = None
    text_type: Tensor | None = None
    kept: Tensor | None = None
    n_kept: Tensor | None = None
    window: int | None = None
    row_bound: int | None = None


class Decide(NamedTuple):
    """Grounds of a step's decision: a predictor (weight, bias, rates) or a count, and what narrows the choice; see ``ops.decode_step``."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    rates: Tensor | None = None
    count: Tensor | None = None  # type: ignore[assignment]  # tuple.count, which nobody needs of these
    score: Tensor | None = None
    alive: Tensor | None = None
    max_kept: Tensor | None = None


def step_arguments(kind: type[Rows] | type[PagedRows]) -> Callable[..., tuple[tuple, dict[str, Any]]]:
    """Returns what makes of a public step's arguments, but for ``backend``, those of a backend: (rows of ``kind``, decide) and no named."""

    def bundle(
        *rows: Any, weight: Any = None, bias: Any = None, rates: Any = None, count: Any = None, score: Any = None, alive: Any = None,
        max_kept: Any = None, **named: Any,
    ) -> tuple[tuple, dict[str, Any]]:  # fmt: skip
        return (kind(*rows, **named), Decide(weight, bias, rates, count, score, alive, max_kept)), {}

    return bundle
