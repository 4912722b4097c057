"""A decoder layer but for its attention: RMSNorm, the gate of its feed-forward block, rotary embedding, and its matrix products
with few rows.

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
from .contract import accumulator

MOST_ROWS = 64  # of a product that a backend fuses
# of a gate: SiLU, and GELU by tanh or by the error function (Hendrycks and Gimpel, arXiv 1606.08415)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def activation_number(activation: str) -> int:
    """Returns its place in ``ACTIVATIONS``."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return ACTIVATIONS.index(activation)


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool = False) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: ``[.., d]``, of ``weight``'s dtype.
        weight: ``[d]``.
        eps: added to the mean square.
        one_plus: Gemma's: ``1 + weight`` in the place of ``weight``.

    Returns:
        ``[.., d]``; the normalised value is rounded to the dtype before it is multiplied by ``weight``, Gemma's after it.
    """
    exact = x.to(accumulator(x))
    normal = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return (normal * (1.0 + weight.to(exact.dtype))).to(x.dtype) if one_plus else weight * normal.to(x.dtype)


def residual_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, one_plus: bool = False, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream after a block, and what the next block reads.

    Args:
        x: ``[.., d]``, what the block before gave.
        residual: ``[.., d]``, the stream until then.
        weight, eps, one_plus: of the norm before the next block (``rms_norm``).
        before: ``[d]``, the weight of a norm of the same kind that x goes through before it is added (Gemma 2 and 3); None: it goes through
            none.

    Returns:
        (sum = ``residual + x``, ``rms_norm(sum)``), both ``[.., d]``; the sum is rounded to the dtype.
    """
    total = residual + (x if before is None else rms_norm(x, before, eps, one_plus))
    return total, rms_norm(total, weight, eps, one_plus)


def gate_mul(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``activation(gate) * up``, elementwise on tensors of one shape and dtype (Shazeer, arXiv 2002.05202).

    activation: of ``ACTIVATIONS``.
    """
    activation_number(activation)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def rotate(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
    sections: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding, the two halves of a head being rotated against each other (Su et al., arXiv 2104.09864).

    Args:
        query, key: ``[B, Hq, q, D]`` and ``[B, Hkv, q, D]`` with D even.
        cos, sin: ``[B, q, D]`` or ``[1, q, D]``, of the query's dtype; with ``sections`` ``[3, B, q, D]`` or ``[3, 1, q, D]``.
        query_norm, key_norm: ``[D]``, weights of an RMSNorm of each head that comes first (Qwen3, Gemma 3), both or neither; ``eps`` and
            ``one_plus`` are those of ``rms_norm``.
        sections: how many places of half a head turn by the time's, the height's and the width's position (M-RoPE of Qwen2-VL, arXiv
            2409.12191); cos and sin hold a stream for each. None: there is one stream, which may be such a choice already
            (transformers 5.24 makes it in the model's rotary module, Qwen3-VL's interleaved one too).

    Returns:
        Both, rotated.
    """

    def half(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return torch.cat([-high, low], -1)

    if query_norm is not None and key_norm is not None:
        query, key = rms_norm(query, query_norm, eps, one_plus), rms_norm(key, key_norm, eps, one_plus)
    if sections is not None:
        cos, sin = (
            torch.cat([part[number % 3] for number, part in enumerate(tensor.split([*sections, *sections], -1))], -1)
            for tensor in (cos, sin)
        )
    cos, sin = cos[:, None], sin[:, None]
    return query * cos + half(query) * sin, key * cos + half(key) * sin


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """``x weight^T + bias`` for several weights.

    Args:
        x: ``[.., K]``; a backend that fuses takes up to ``MOST_ROWS`` rows.
        weights: up to three, ``[N, K]`` with adjacent elements in a row.
        biases: ``[N]`` or None, one for each.

    Returns:
        ``[.., N]`` for each.
    """
    return [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def gated(x: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """``gate_mul`` of the products of x ``[.., K]`` with both weights ``[N, K]``; a backend that fuses takes up to ``MOST_ROWS`` rows."""
    return gate_mul(torch.nn.functional.linear(x, gate), torch.nn.functional.linear(x, up), activation)


def norm_linears(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    one_plus: bool = False, total: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """``residual_norm``, then ``linears`` of what it normalised; a backend that fuses takes one row.

    Args:
        x: ``[.., K]``.
        residual: of x's shape, or None: x is the residual stream itself.
        norm, eps, one_plus: as ``rms_norm`` takes them.
        weights, biases: as ``linears`` takes them.
        total: of x's shape and dtype and dense, where ``residual + x`` is written; None: a new tensor. With a residual only.

    Returns:
        (``residual + x``, ``[.., N]`` for each weight).
    """
    total = x if residual is None else torch.add(residual, x, out=total)
    return total, linears(rms_norm(total, norm, eps, one_plus), weights, biases)


def norm_gated(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float, gate: Tensor, up: Tensor, activation: str = "silu",
    one_plus: bool = False, total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``residual_norm``, then ``gated`` of what it normalised, as ``norm_linears``: (``residual + x``, ``[.., N]``)."""
    total = x if residual is None else torch.add(residual, x, out=total)
    return total, gated(rms_norm(total, norm, eps, one_plus), gate, up, activation)


def fused(backend: str, device: torch.device) -> ModuleType | None:
    """The module whose functions run for ``backend`` on ``device``, or None where nothing fuses them there.

    Errors: as ``dispatch.name_for``.
    """
    if dispatch.name_for(backend, device) != "triton":
        return None
    return importlib.import_module("dyrate_kernels.triton_kernels.layers")
