"""The fused parts of a decoder layer (``triton_kernels.layers``) against their specification in float64."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels.ops import layers as want
from tests.gpu.kit import DTYPES, ON_GPU, OUTPUT, Kit

pytestmark = pytest.mark.gpu

SIZES = (1, 96, 3584, 4096, 5120, 11008) if ON_GPU else (1, 96)


@pytest.fixture
def layers(kit: Kit):
    """The module under test; only one backend has it."""
    found = want.fused(kit.backend, kit.device)
    if found is None:
        pytest.skip(f"backend {kit.backend} fuses nothing")
    return found


def made(kit, seed, dtype, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(kit.device, dtype)


def assert_close(got, exact, dtype, factor=1.0):
    assert got.dtype == dtype and got.shape == exact.shape
    assert ((got.double() - exact).norm() / exact.norm()).item() <= factor * OUTPUT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 33])
def test_rms_norm(kit, layers, size, rows, dtype):
    x, weight = 3 * made(kit, 1, dtype, rows, 2, size), made(kit, 2, dtype, size)
    x[0] *= 1e-3
    assert_close(layers.rms_norm(x, weight, 1e-5), want.rms_norm(x.double(), weight.double(), 1e-5), dtype)
    last = x[:, -1:]
    assert_close(layers.rms_norm(last, weight, 1e-5), want.rms_norm(last.double(), weight.double(), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gate_mul(kit, layers, size, dtype):
    gate, up = made(kit, 3, dtype, 5, 1, size), made(kit, 4, dtype, 5, 1, size)
    assert_close(layers.gate_mul(gate, up), want.gate_mul(gate.double(), up.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(32, 32, 128), (28, 4, 128), (8, 8, 64)] if ON_GPU else [(7, 1, 20)])
@pytest.mark.parametrize("batch, columns, shared", [(1, 1, True), (32, 1, False), (3, 40, False)])
def test_rotate(kit, layers, heads, kv_heads, dim, batch, columns, shared, dtype):
    query, key = (made(kit, 5, dtype, batch, columns, many, dim).transpose(1, 2) for many in (heads, kv_heads))
    angle = 6 * torch.rand(1 if shared else batch, columns, dim, generator=torch.Generator().manual_seed(6))
    cos, sin = (value.to(kit.device, dtype) for value in (angle.cos(), angle.sin()))
    exact = want.rotate(*(tensor.double() for tensor in (query, key, cos, sin)))
    for one, other in zip(layers.rotate(query, key, cos, sin), exact, strict=True):
        assert_close(one, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size, counts", [(3584, (3584, 512, 512)), (4096, (4096,)), (11008, (4096,)), (100, (33, 1))] if ON_GPU else [(40, (33, 1))]
)
def test_products_with_one_row(kit, layers, size, counts, dtype):
    x = made(kit, 7, dtype, 1, 1, size)
    weights = [made(kit, 8 + number, dtype, count, size) / size**0.5 for number, count in enumerate(counts)]
    biases = [None if number % 2 else made(kit, 20 + number, dtype, count) for number, count in enumerate(counts)]
    exact = want.linears(x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases])
    for one, other in zip(layers.linears(x, weights, biases), exact, strict=True):
        assert_close(one, other, dtype, 2)
    up = made(kit, 30, dtype, counts[0], size) / size**0.5
    assert_close(layers.gated(x, weights[0], up), want.gated(x.double(), weights[0].double(), up.double()), dtype, 2)
