"""A decoder layer but for its attention, in few launches.

A model that launches these operation by operation spends more of a decode step on them than on attention (bench/results). The arithmetic
is float32, rounded to the tensors' dtype wherever the model's own chain of operations rounds, so that the results agree with it up to the
order of a sum and the last bit of an exponential. The reference is ``dyrate_kernels.ops.layers``; kernels: ``norms``, ``gates``,
``rotary``, ``products`` (one row), ``few_rows``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyrate_kernels.ops import layers as reference
from dyrate_kernels.ops.layer_settings import settings

from . import products
from .few_rows import few_rows
from .gates import gate_mul
from .norms import residual_norm, rms_norm
from .rotary import rotate

__all__ = ["gate_mul", "gated", "linears", "norm_gated", "norm_linears", "residual_norm", "rms_norm", "rotate"]


def _for_reference(x: Tensor) -> bool:
    """No kernel multiplies in float64, and a row that is not there cannot be read."""
    return x.dtype == torch.float64 or not x.numel()


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """See ``dyrate_kernels.ops.layers.linears``: x has at most ``MOST_ROWS`` rows, and at most three weights share the launch."""
    if _for_reference(x):
        return reference.linears(x, weights, biases)
    size = x.shape[-1]
    rows = x.numel() // size
    if rows == 1:
        return products.linears(x, weights, biases)[1]
    tile = settings(x.device).tile("linear", sum(weight.shape[0] for weight in weights), size, rows)
    return few_rows(x, weights, biases, tile=tile)


def gated(x: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """See ``dyrate_kernels.ops.layers.gated``: x has at most ``MOST_ROWS`` rows."""
    if _for_reference(x):
        return reference.gated(x, gate, up, activation)
    count, size = gate.shape
    rows = x.numel() // size
    if rows == 1:
        return products.gated(x, gate, up, activation)[1]
    return few_rows(x, [gate, up], [None, None], activation, settings(x.device).tile("gated", count, size, rows))[0]


def norm_linears(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    one_plus: bool = False, total: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """See ``dyrate_kernels.ops.layers.norm_linears``: x is one row."""
    if _for_reference(x):
        return reference.norm_linears(x, residual, norm, eps, weights, biases, one_plus, total)
    return products.linears(x, weights, biases, products.Norm(residual, norm, eps, one_plus, total))


def norm_gated(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, gate: Tensor, up: Tensor, activation: str = "silu",
    one_plus: bool = False, total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``dyrate_kernels.ops.layers.norm_gated``: x is one row."""
    if _for_reference(x):
        return reference.norm_gated(x, residual, norm, eps, gate, up, activation, one_plus, total)
    return products.gated(x, gate, up, activation, products.Norm(residual, norm, eps, one_plus, total))
