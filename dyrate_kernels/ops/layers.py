"""What a decoder layer does around its attention: RMSNorm, gated SiLU, rotary embedding, and its matrix products with a single row.

This file is the specification, in plain PyTorch, rounding where the models of ``transformers`` round. ``backend="triton"`` runs each as one
launch (``triton_kernels.layers``). ``patch(model, fuse=True)`` puts them in the place of the model's own chains of operations.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import dispatch


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: ``[.., d]``, of ``weight``'s dtype.
        weight: ``[d]``.
        eps: added to the mean square.

    Returns:
        ``[.., d]``; the normalised value is rounded to the dtype before it is multiplied by ``weight``.
    """
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, elementwise on tensors of one shape and dtype (Shazeer, arXiv 2002.05202)."""
    return torch.nn.functional.silu(gate) * up


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, the two halves of a head being rotated against each other (Su et al., arXiv 2104.09864).

    Args:
        query, key: ``[B, Hq, q, D]`` and ``[B, Hkv, q, D]`` with D even.
        cos, sin: ``[B, q, D]`` or ``[1, q, D]``, of the query's dtype.

    Returns:
        Both, rotated.
    """

    def half(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return torch.cat([-high, low], -1)

    cos, sin = cos[:, None], sin[:, None]
    return query * cos + half(query) * sin, key * cos + half(key) * sin


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """``x weight^T + bias`` for several weights.

    Args:
        x: ``[.., K]``; a backend that fuses takes one row.
        weights: up to three, ``[N, K]`` with adjacent elements in a row.
        biases: ``[N]`` or None, one for each.

    Returns:
        ``[.., N]`` for each.
    """
    return [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """``silu_mul`` of the products of x ``[.., K]`` with both weights ``[N, K]``; a backend that fuses takes one row."""
    return silu_mul(torch.nn.functional.linear(x, gate), torch.nn.functional.linear(x, up))


def fused(backend: str, device: torch.device) -> ModuleType | None:
    """The module whose functions run for ``backend`` on ``device``, or None where nothing fuses them there.

    Errors: as ``dispatch.name_for``.
    """
    if dispatch.name_for(backend, device) != "triton":
        return None
    return importlib.import_module("dyrate_kernels.triton_kernels.layers")
