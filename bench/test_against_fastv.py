"""pytest-benchmark: one decode step of the score layer, ours beside torch's dense attention and FastV's eager path.

    pytest bench

On a GPU: LLaVA-1.5-7B and LLaVA-NeXT-7B shapes in bfloat16 with the Triton kernels. Without one: a toy size with the reference operators
(plain PyTorch), which shows how to run it and no speed worth quoting. ``bench/gpu.sh`` measures without Python in the way and with a floor
beside every number. A benchmark whose result is not that of the float64 reference fails.
"""

from __future__ import annotations

import pytest
import torch

import dyrate_kernels as dk
from bench import fastv, operators, timing
from dyrate_kernels import ops

ON_GPU = torch.cuda.is_available()
BACKEND = "triton" if ON_GPU and dk.backends()["triton"] == "available" else "reference"
SHAPES = (
    [operators.Shape(f"B={batch} N={visual}", batch, visual, 128, 32, 32, 128, torch.bfloat16) for batch, visual in ((1, 576), (32, 2880))]
    if ON_GPU
    else [operators.Shape("toy", 2, 144, 16, 4, 4, 32, torch.float32)]
)


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.name, scope="module")
def data(request):
    """Random inputs."""
    return operators.Data(request.param, BACKEND, timing.device())


def run(benchmark, data, call, check):
    """Times ``call()`` until the device is done, once its result has passed ``check``."""
    benchmark.group = data.shape.name
    benchmark.extra_info.update(timing.environment() | data.shape.facts() | {"backend": BACKEND, "floor_bytes": data.shape.attention_bytes})

    def whole():
        result = call()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    picked, want = data.reference()
    passed = check(picked, want, whole())
    assert passed["passed"], passed
    benchmark.pedantic(whole, rounds=30 if ON_GPU else 10, warmup_rounds=3)


def attention_gate(shape):
    return lambda picked, want, got: operators.gate(shape, picked, want, got)


def test_dyrate_decode_step(benchmark, data):
    """Attention, statistics, rate, top-k and kept list in one call."""
    call = data.ours(ops.decode_step, text_type=data.text_type, **data.linear)[0]
    run(benchmark, data, call, lambda p, w, got: operators.kept_gate(data.shape, operators.gate(data.shape, p, w, got), got))


def test_dyrate_decode_attention(benchmark, data):
    run(benchmark, data, data.ours(ops.decode_attention)[0], attention_gate(data.shape))


def test_dense_sdpa(benchmark, data):
    call = dict(operators.dense_twins(data))["torch SDPA"]()
    run(benchmark, data, data.calls(call)[0], attention_gate(data.shape))


def test_fastv_eager(benchmark, data):
    """Chen et al. 2024, arXiv 2403.06764: attention matrix, mean over heads, topk, gather."""
    call = data.calls(fastv.step, n_visual=data.shape.visual, n_keep=data.shape.kept, scale=data.shape.dim**-0.5)[0]
    run(benchmark, data, call, lambda picked, want, got: operators.gate(data.shape, picked, want, got.output))
