"""The fused parts of a decoder layer against their specification, and a whole model with them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.ops import layers as want
from dyrate_kernels.triton_kernels import layers as got
from dyrate_kernels.triton_kernels import plan
from tests import end_to_end
from tests.interpreter import harness

DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def close(a, b, dtype):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.isfinite(), b.isfinite())
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 96), (3, 5, 128), (1, 7, 40)])
def test_rms_norm(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) * 3
    x[0, 0] *= 1e-3  # there eps counts
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    exact = want.rms_norm(x.double(), weight.double(), 1e-5)
    with harness.settings():
        close(got.rms_norm(x, weight, 1e-5), want.rms_norm(x, weight, 1e-5), dtype)
        torch.testing.assert_close(got.rms_norm(x, weight, 1e-5).double(), exact, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])
        last = x[:, -1:]  # rows that do not lie densely
        close(got.rms_norm(last, weight, 1e-5), want.rms_norm(last, weight, 1e-5), dtype)
        turned = x.transpose(0, 1)
        close(got.rms_norm(turned, weight, 1e-5), want.rms_norm(turned, weight, 1e-5), dtype)
        assert got.rms_norm(x[:0], weight, 1e-5).shape == x[:0].shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1111), (4, 1, 64)])
def test_silu_mul(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up = (torch.randn(shape, generator=generator).to(dtype) * 4 for _ in range(2))
    gate.view(-1)[0] = float("nan")
    with harness.settings():
        close(got.silu_mul(gate, up), want.silu_mul(gate, up), dtype)
        close(got.silu_mul(gate.transpose(0, 2), up.transpose(0, 2)), want.silu_mul(gate.transpose(0, 2), up.transpose(0, 2)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, heads, kv_heads, columns, dim", [(1, 1, 1, 1, 2), (2, 4, 2, 3, 16), (3, 7, 1, 1, 20), (1, 5, 5, 4, 128)])
@pytest.mark.parametrize("shared", [True, False])
def test_rotate(batch, heads, kv_heads, columns, dim, shared, dtype):
    generator = torch.Generator().manual_seed(batch + heads + dim)

    def made(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query, key = (made(batch, columns, many, dim).transpose(1, 2) for many in (heads, kv_heads))
    angle = torch.rand(1 if shared else batch, columns, dim, generator=generator) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    with harness.settings():
        for a, b in ((query, key), (query.contiguous(), key.contiguous())):
            for one, other in zip(got.rotate(a, b, cos, sin), want.rotate(a, b, cos, sin), strict=True):
                close(one, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, counts", [(1, [1]), (40, [3, 50]), (300, [17, 1, 33]), (512, [64, 16, 16])])
def test_linears(size, counts, dtype):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(1, 1, size, generator=generator).to(dtype)
    wide = [torch.randn(count, size + 3, generator=generator).to(dtype) / size**0.5 for count in counts]
    weights = [weight[:, :size] for weight in wide]  # rows that do not lie densely
    biases = [None if number % 2 else torch.randn(count, generator=generator).to(dtype) for number, count in enumerate(counts)]
    with harness.settings():
        found = got.linears(x, weights, biases)
        exact = want.linears(x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases])
        for one, other in zip(found, exact, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])
        gate, up = weights[0], torch.randn(counts[0], size, generator=generator).to(dtype)
        exact = want.gated(x.double(), gate.double(), up.double())
        torch.testing.assert_close(got.gated(x, gate, up).double(), exact, rtol=8 * TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])


ONE_ROW = ("dyrate", "recoverable", {"use_cache": True})  # options: one picture


@pytest.mark.parametrize("policy, retention, options, steps", [(*end_to_end.GENERATIONS[2], 2), (*ONE_ROW, 3)], ids=str)
def test_fused_model_gives_the_references_tokens(policy, retention, options, steps, monkeypatch):
    demo = dk.load_demo()
    layers = demo[0].config.text_config.num_hidden_layers
    calls = Counter()
    for name in ("rms_norm", "silu_mul", "rotate", "linears", "gated"):
        monkeypatch.setattr(got, name, counted(calls, name, getattr(got, name)))
    with harness.settings(plan.Settings(block_n=256, min_blocks=4)):
        end_to_end.assert_tokens_equal_the_references(demo, "triton", policy, retention, options, steps=steps, fuse=True)
    single = 2 * layers if options is ONE_ROW[2] else 0  # layers of steps with one row
    assert calls == Counter(
        rms_norm=steps * (2 * layers + 1), rotate=steps * layers, silu_mul=steps * layers - single, gated=single, linears=3 * single
    )


def counted(calls, name, function):
    def call(*args):
        calls[name] += 1
        return function(*args)

    return call
