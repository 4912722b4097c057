"""The gate of a feed-forward block, ``activation(gate) * up``: a launch of its own, and for products that have both already."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyrate_kernels.ops import layers as reference
from dyrate_kernels.ops.layers import ACTIVATIONS, activation_number

from .dependent import follow
from .launch import start

SILU, GELU_TANH = (tl.constexpr(ACTIVATIONS.index(name)) for name in ("silu", "gelu_tanh"))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == GELU_TANH:  # (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def apply_gate(gate, up, kind: tl.constexpr, ACTIVATION: tl.constexpr):
    """``activation(gate) * up`` of float32 values, in ``kind`` and rounded to it where a model rounds; ACTIVATION: its place in
    ``ops.layers.ACTIVATIONS``."""
    return (_activate(gate, ACTIVATION).to(kind).to(tl.float32) * up).to(kind)


@triton.jit
def gate_mul_kernel(gate_ptr, up_ptr, output_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """``count`` elements that lie densely."""
    follow(PDL)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + place, apply_gate(gate, up, output_ptr.dtype.element_ty, ACTIVATION), mask=inside)


def gate_mul(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """See ``dyrate_kernels.ops.layers.gate_mul``."""
    if gate.dtype == torch.float64:
        return reference.gate_mul(gate, up, activation)
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(gate)
    count, block = gate.numel(), 1024
    if count:
        rest = (count, activation_number(activation), block)
        start(gate_mul_kernel, gate.device, (triton.cdiv(count, block), 1, 1), rest, 4, (gate, up, output), gate.dtype)
    return output
