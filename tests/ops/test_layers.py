"""The fused parts of a decoder layer (``triton_kernels.layers``) against their specification (``ops.layers``), in the model's dtype and in
float64, on every backend that fuses them. The specification is the reference's own: there is nothing to compare that with.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from dyrate_kernels.ops import layer_settings
from dyrate_kernels.ops import layers as want
from dyrate_kernels.ops.layer_settings import LayerSettings, Tile, problem
from tests.gpu import kit
from tests.ops.backends import each

pytestmark = pytest.mark.backends("interpreter", "triton")

DTYPES = [torch.float32, torch.float16]  # of the interpreter
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
SIZES = (1, 96, 3584, 4096, 5120, 11008) if kit.ON_GPU else (1, 96)


def made(backend, generator, dtype, *shape):
    """Numbers on the backend's device; a number in place of a generator is its seed."""
    generator = torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator
    return torch.randn(*shape, generator=generator).to(backend.device, dtype)


def double(tensors):
    return [tensor if tensor is None else tensor.double() for tensor in tensors]


def agree(backend, found, exact, dtype, *, rounded=None, rounding=1, factor=None, worst=1):
    """On a GPU ``found`` has the norm of ``exact``, in float64, within ``worst`` roundings. In the interpreter, element by element, it is
    ``rounded``, what the model's own dtype gives, within ``rounding``, and ``exact`` within ``factor``, of those that are given."""
    assert found.dtype == dtype and found.shape == exact.shape
    assert torch.equal(found.isfinite(), exact.isfinite())
    if backend.name == "triton":
        error = (found.double() - exact).nan_to_num(0.0, 0.0, 0.0).norm().item()
        assert error <= worst * kit.OUTPUT[dtype] * exact.nan_to_num(0.0, 0.0, 0.0).norm().item()
        return
    tolerance = TOLERANCE[dtype]
    if rounded is not None:
        assert torch.equal(found.isfinite(), rounded.isfinite())
        torch.testing.assert_close(found, rounded, rtol=rounding * tolerance, atol=rounding * tolerance, equal_nan=True)
    if factor is not None:
        torch.testing.assert_close(found.double(), exact, rtol=factor * tolerance, atol=factor * tolerance)


# ---- norms, gates, rotary embedding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, one_plus, dtype",
    each(
        interpreter=itertools.product([(1, 1, 1), (2, 1, 96), (3, 5, 128), (1, 7, 40)], [False, True], DTYPES),
        triton=itertools.product([(rows, 2, size) for rows in (1, 33) for size in SIZES], [False, True], kit.DTYPES),
    ),
    ids=str,
)
def test_rms_norm(backend, shape, one_plus, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x = 3 * made(backend, generator, dtype, *shape)
    x[0, 0] *= 1e-3  # there eps counts
    weight = made(backend, generator, dtype, shape[-1])
    for rows in (x, x[:, -1:], x.transpose(0, 1)):  # those that do not lie densely too
        exact = want.rms_norm(rows.double(), weight.double(), 1e-5, one_plus)
        rounded = want.rms_norm(rows, weight, 1e-5, one_plus)
        agree(backend, backend.fused("rms_norm", rows, weight, 1e-5, one_plus), exact, dtype, rounded=rounded, factor=3)
    assert backend.fused("rms_norm", x[:0], weight, 1e-5, one_plus).shape == x[:0].shape


@pytest.mark.parametrize(
    "shape, one_plus, before, dtype",
    each(
        interpreter=[
            (shape, *how, dtype)
            for shape in [(1, 1, 1), (2, 1, 96), (3, 2, 40)]
            for how in [(False, False), (True, False), (True, True)]
            for dtype in DTYPES
        ],
        triton=itertools.product([(1, 1, size) for size in SIZES[2:4] or (96,)], [False, True], [False, True], kit.DTYPES),
    ),
    ids=str,
)
def test_residual_norm(backend, shape, one_plus, before, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual = (3 * made(backend, generator, dtype, *shape) for _ in range(2))
    weight, first = (made(backend, generator, dtype, shape[-1]) for _ in range(2))
    how = (weight, 1e-5, one_plus, first if before else None)
    last, dense = residual[:, -1:], residual[:, -1:].contiguous()  # of x's strides, and of others
    for a, b in ((x, residual), (x.transpose(0, 1), residual.transpose(0, 1)), (x[:, -1:], last), (x[:, -1:], dense)):
        total, normal = backend.fused("residual_norm", a, b, *how)
        same_total, same_normal = want.residual_norm(a, b, *how)
        if not before:
            assert torch.equal(total, same_total)
        inner = want.rms_norm(a.double(), first.double(), 1e-5, one_plus) if before else a.double()
        agree(backend, total, b.double() + inner, dtype, rounded=same_total)
        agree(backend, normal, want.rms_norm(total.double(), weight.double(), 1e-5, one_plus), dtype, rounded=same_normal)
        # it rounds where the model does: a rounding more or less changes the last bit of many elements
        assert backend.name == "triton" or dtype == torch.float32 or (normal == same_normal).double().mean() > 0.95


@pytest.mark.parametrize(
    "shape, activation, dtype",
    each(
        interpreter=itertools.product([(1, 1, 1), (2, 3, 1111), (4, 1, 64)], want.ACTIVATIONS, DTYPES),
        triton=itertools.product([(5, 1, size) for size in SIZES], want.ACTIVATIONS, kit.DTYPES),
    ),
    ids=str,
)
def test_gate_mul(backend, shape, activation, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up = (4 * made(backend, generator, dtype, *shape) for _ in range(2))
    gate.view(-1)[-3:] = torch.tensor([60.0, -60.0, float("nan")]).to(gate)[-gate.numel() :]
    for a, b in ((gate, up), (gate.transpose(0, 2), up.transpose(0, 2))):
        exact, rounded = want.gate_mul(a.double(), b.double(), activation), want.gate_mul(a, b, activation)
        agree(backend, backend.fused("gate_mul", a, b, activation), exact, dtype, rounded=rounded, rounding=6)  # products of up to 200


HEADS = [(32, 32, 128), (28, 4, 128), (8, 8, 64)] if kit.ON_GPU else [(7, 1, 20)]
PLAIN = [(True, None, False), (False, None, False)]  # shared, norm, sections
EMBEDDINGS = each(
    interpreter=[
        (*sizes, *how, dtype)
        for sizes in [(1, 1, 1, 1, 2), (2, 4, 2, 3, 16), (3, 7, 1, 1, 20), (1, 5, 5, 4, 128)]
        for how in [*PLAIN, (False, False, False), (True, True, False), (False, None, True), (True, False, True)]
        for dtype in DTYPES
    ],
    triton=[
        *(
            (batch, heads, kv_heads, columns, dim, shared, None, False, dtype)
            for heads, kv_heads, dim in HEADS
            for batch, columns, shared in [(1, 1, True), (32, 1, False), (3, 40, False)]
            for dtype in kit.DTYPES
        ),
        *((3, 8, 2, 2, 128, False, *how, dtype) for how in [(False, False), (None, True)] for dtype in kit.DTYPES),
    ],
)


@pytest.mark.parametrize("batch, heads, kv_heads, columns, dim, shared, norm, sections, dtype", EMBEDDINGS, ids=str)
def test_rotate(backend, batch, heads, kv_heads, columns, dim, shared, norm, sections, dtype):
    """``norm``: Gemma's of each head (True), Llama's (False), none; ``sections``: three streams of positions."""
    generator = torch.Generator().manual_seed(batch + heads + dim)
    query, key = (made(backend, generator, dtype, batch, columns, many, dim).transpose(1, 2) for many in (heads, kv_heads))
    angle = torch.rand(*[3] * sections, 1 if shared else batch, columns, dim, generator=generator) * 6
    cos, sin = angle.cos().to(backend.device, dtype), angle.sin().to(backend.device, dtype)
    half = dim // 2
    how = {"sections": (half // 4, half - half // 4 - half // 3, half // 3)} if sections else {}
    weights = {name: made(backend, generator, dtype, dim) for name in ("query_norm", "key_norm")} if norm is not None else {}
    if norm is not None:
        how |= {"eps": 1e-5, "one_plus": norm}
    worst = 2 if how else 1
    exact = want.rotate(*double((query, key, cos, sin)), **{name: weight.double() for name, weight in weights.items()}, **how)
    rounded = want.rotate(query, key, cos, sin, **weights, **how)
    for a, b in ((query, key), (query.contiguous(), key.contiguous())):
        for one, other, near in zip(backend.fused("rotate", a, b, cos, sin, **weights, **how), exact, rounded, strict=True):
            agree(backend, one, other, dtype, rounded=near, worst=worst)


# ---- products ---------------------------------------------------------------------------------------------------------------------


def products(backend, size, counts, rows, dtype, spare):
    """(x, weights with ``spare`` elements between their rows, biases, of which every second one is missing)."""
    generator = torch.Generator().manual_seed(size + rows)
    x = made(backend, generator, dtype, rows, 1, size)
    wide = [made(backend, generator, dtype, count, size + spare) / size**0.5 for count in counts]
    biases = [None if number % 2 else made(backend, generator, dtype, count) for number, count in enumerate(counts)]
    return x, [weight[:, :size] for weight in wide], biases


LARGE = [(3584, (3584, 512, 512)), (4096, (4096,)), (11008, (4096,)), (100, (33, 1))] if kit.ON_GPU else []
ONE_ROW = each(
    interpreter=itertools.product([(1, (1,)), (40, (3, 50)), (300, (17, 1, 33)), (512, (64, 16, 16))], [3], DTYPES),
    triton=[*itertools.product(LARGE, [0], kit.DTYPES), *itertools.product([(40, (33, 1))], [0, 3], kit.DTYPES)],
)


@pytest.mark.parametrize("sizes, spare, dtype", ONE_ROW, ids=str)
def test_products_with_one_row(backend, sizes, spare, dtype):
    size, counts = sizes
    x, weights, biases = products(backend, size, counts, 1, dtype, spare)
    exact = want.linears(x.double(), double(weights), double(biases))
    for one, other in zip(backend.fused("linears", x, weights, biases), exact, strict=True):
        agree(backend, one, other, dtype, factor=3, worst=2)
    up = products(backend, size, counts[:1], 2, dtype, spare)[1][0]
    for activation in want.ACTIVATIONS:
        gate = want.gated(x.double(), weights[0].double(), up.double(), activation)
        agree(backend, backend.fused("gated", x, weights[0], up, activation), gate, dtype, factor=8, worst=2)


NORMS = each(
    interpreter=[
        *((300, (17, 5), 3, *how, dtype) for how in [(False, True), (True, True), (False, False)] for dtype in DTYPES),
        (40, (3,), 3, False, True, torch.float32),  # of a single block
    ],
    triton=itertools.product(SIZES[2:4] or (96,), [(33, 33)], [0], [False, True], [True], kit.DTYPES),
)


@pytest.mark.parametrize("size, counts, spare, one_plus, has_residual, dtype", NORMS, ids=str)
def test_a_norm_before_a_product_with_one_row(backend, size, counts, spare, one_plus, has_residual, dtype):
    """The sum and what is normalised are rounded as the model rounds them, so that results equal those of the parts."""
    x, weights, biases = products(backend, size, counts, 1, dtype, spare)
    generator = torch.Generator().manual_seed(1)
    residual, norm = (made(backend, generator, dtype, *shape) for shape in ((1, 1, size), (size,)))
    residual = residual if has_residual else None
    up = products(backend, size, counts[:1], 2, dtype, spare)[1][0]
    for given in (biases, [None] * len(weights)):
        total, found = backend.fused("norm_linears", x, residual, norm, 1e-5, weights, given, one_plus)
        assert torch.equal(total, x if residual is None else x + residual)
        normal = backend.fused("rms_norm", total, norm, 1e-5, one_plus)
        for one, other in zip(found, backend.fused("linears", normal, weights, given), strict=True):
            agree(backend, one, other.double(), dtype, rounded=other, worst=2)
        exact = want.norm_linears(x, residual, norm, 1e-5, weights, given, one_plus)
        assert torch.equal(exact[0], total)
        for one, other in zip(found, exact[1], strict=True):
            agree(backend, one, other.double(), dtype, factor=4, worst=4)
    again, gate = backend.fused("norm_gated", x, residual, norm, 1e-5, weights[0], up, "gelu_tanh", one_plus)
    assert torch.equal(again, total)
    parts = backend.fused("gated", normal, weights[0], up, "gelu_tanh")
    agree(backend, gate, parts.double(), dtype, rounded=parts, worst=2)


TILES = [None, Tile(rows=16, columns=16, stages=2), Tile(rows=32, columns=64, splits=2), Tile(rows=16, columns=32, splits=3, warps=2)]
WIDE = [(3584, (3584, 512, 512)), (11008, (4096,)), (1000, (333, 8))] if kit.ON_GPU else [(40, (33, 1))]
FEW_ROWS = each(
    interpreter=[
        (rows, sizes, 3, tile, dtype)
        for rows, sizes in [(2, (40, (50,))), (17, (128, (33, 16, 1))), (5, (100, (7, 40))), (64, (64, (20,)))]
        for dtype, tiles in ((torch.float32, TILES), (torch.float16, TILES[1:3]))
        for tile in tiles
    ],
    triton=[
        (rows, sizes, 0, Tile(splits=splits) if dtype != torch.float32 else Tile(columns=32, splits=splits), dtype)
        for rows in ([2, 17, 32, 64] if kit.ON_GPU else [3])
        for sizes in WIDE
        for splits in (1, 3)
        for dtype in kit.DTYPES
    ],
)


@pytest.mark.parametrize("rows, sizes, spare, tile, dtype", FEW_ROWS, ids=str)
def test_products_with_few_rows(backend, rows, sizes, spare, tile, dtype):
    """The last program to finish adds the splits, whichever it is: every time the same, bit for bit."""
    size, counts = sizes
    x, weights, biases = products(backend, size, counts, rows, dtype, spare)
    others = [made(backend, number, dtype, count) for number, count in enumerate(counts)]
    up = products(backend, size, counts[:1], 99, dtype, spare)[1][0]
    chosen = {problem("linear", sum(counts), size): ((2, 64, tile),), problem("gated", counts[0], size): ((1, 64, tile),)}
    layer_settings.override(LayerSettings(products=chosen) if tile else None)
    try:
        for given in (biases, others, [None] * len(weights)):
            exact = want.linears(x.double(), double(weights), double(given))
            for one, other in zip(backend.fused("linears", x, weights, given), exact, strict=True):
                agree(backend, one, other, dtype, factor=3, worst=2)
        for activation in want.ACTIVATIONS if backend.name == "triton" else ("gelu",):
            gate = want.gated(x.double(), weights[0].double(), up.double(), activation)
            agree(backend, backend.fused("gated", x, weights[0], up, activation), gate, dtype, factor=8, worst=2)
    finally:
        layer_settings.override(None)


@pytest.mark.backends("interpreter")  # nothing is launched
def test_a_tile_is_taken_from_the_settings(backend, monkeypatch):
    from dyrate_kernels.triton_kernels import few_rows
    from dyrate_kernels.triton_kernels import layers as got

    seen = []
    monkeypatch.setattr(few_rows, "start", lambda *args, stages: seen.append((args[2], stages)))
    x, weights, biases = products(backend, 64, [40, 24], 3, torch.float16, 3)
    tile = Tile(rows=16, columns=16, stages=5, splits=2)
    layer_settings.override(LayerSettings(products={"linear 64x64": ((2, 3, tile),)}))
    try:
        got.linears(x, weights, [None, None])
        got.linears(x[:2], weights, [None, None])
        got.linears(torch.cat([x, x]), weights, [None, None])
    finally:
        layer_settings.override(None)
    assert seen == [((5, 2, 1), 5), ((5, 2, 1), 5), ((2, 1, 1), 4)]
