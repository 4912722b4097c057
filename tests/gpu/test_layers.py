"""The fused parts of a decoder layer (``triton_kernels.layers``) against their specification in float64."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels.ops import layer_settings
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 17, 32, 64] if ON_GPU else [3])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("size, counts", [(3584, (3584, 512, 512)), (11008, (4096,)), (1000, (333, 8))] if ON_GPU else [(40, (33, 1))])
def test_products_with_few_rows(kit, layers, size, counts, splits, rows, dtype):
    """The last program to finish adds the splits, whichever it is: twice the same, bit for bit."""
    x = made(kit, 7, dtype, rows, 1, size)
    weights = [made(kit, 8 + number, dtype, count, size) / size**0.5 for number, count in enumerate(counts)]
    biases = [made(kit, 20 + number, dtype, count) for number, count in enumerate(counts)]
    up = made(kit, 30, dtype, counts[0], size) / size**0.5
    names = layer_settings.problem("linear", sum(counts), size), layer_settings.problem("gated", counts[0], size)
    tile = layer_settings.Tile(splits=splits) if dtype != torch.float32 else layer_settings.Tile(columns=32, splits=splits)
    layer_settings.override(layer_settings.LayerSettings(products=dict.fromkeys(names, ((2, 64, tile),))))
    try:
        exact = want.linears(x.double(), [w.double() for w in weights], [b.double() for b in biases])
        found = layers.linears(x, weights, biases)
        for one, again, other in zip(found, layers.linears(x, weights, biases), exact, strict=True):
            assert torch.equal(one, again)
            assert_close(one, other, dtype, 2)
        for activation in want.ACTIVATIONS:
            exact_gate = want.gated(x.double(), weights[0].double(), up.double(), activation)
            assert_close(layers.gated(x, weights[0], up, activation), exact_gate, dtype, 2)
    finally:
        layer_settings.override(None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("size", [3584, 4096] if ON_GPU else [96])
def test_residual_and_norm(kit, layers, size, one_plus, dtype):
    """In a launch, and in the product behind it."""
    x, residual, weight = made(kit, 1, dtype, 1, 1, size), made(kit, 2, dtype, 1, 1, size), made(kit, 3, dtype, size)
    total, normal = layers.residual_norm(x, residual, weight, 1e-6, one_plus)
    assert torch.equal(total, residual + x)
    assert_close(normal, want.rms_norm(total.double(), weight.double(), 1e-6, one_plus), dtype)
    before = made(kit, 4, dtype, size)
    assert_close(
        layers.residual_norm(x, residual, weight, 1e-6, one_plus, before)[0],
        residual.double() + want.rms_norm(x.double(), before.double(), 1e-6, one_plus),
        dtype,
    )
    matrices = [made(kit, 5 + number, dtype, 33, size) / size**0.5 for number in range(2)]
    for found, parts in (
        (layers.norm_linears(x, residual, weight, 1e-6, matrices, [None, None], one_plus), layers.linears(normal, matrices, [None, None])),
        (layers.norm_gated(x, residual, weight, 1e-6, *matrices, "gelu_tanh", one_plus), [layers.gated(normal, *matrices, "gelu_tanh")]),
    ):
        assert torch.equal(found[0], total)
        for one, other in zip([found[1]] if isinstance(found[1], torch.Tensor) else found[1], parts, strict=True):
            assert_close(one, other.double(), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["norm", "sections"])
def test_rotate_with_norms_of_heads_or_three_streams(kit, layers, how, dtype):
    query, key = (made(kit, 5, dtype, 3, 2, many, 128).transpose(1, 2) for many in (8, 2))
    angle = 6 * torch.rand(*([3] if how == "sections" else []), 3, 2, 128, generator=torch.Generator().manual_seed(6))
    cos, sin = (value.to(kit.device, dtype) for value in (angle.cos(), angle.sin()))
    more = {"sections": (16, 24, 24)}
    if how == "norm":
        more = {"query_norm": made(kit, 7, dtype, 128), "key_norm": made(kit, 8, dtype, 128), "eps": 1e-6}
    exact = want.rotate(
        *(tensor.double() for tensor in (query, key, cos, sin)),
        **{name: value.double() if isinstance(value, torch.Tensor) else value for name, value in more.items()},
    )
    for one, other in zip(layers.rotate(query, key, cos, sin, **more), exact, strict=True):
        assert_close(one, other, dtype, 2)
