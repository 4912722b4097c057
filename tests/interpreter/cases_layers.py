"""The fused parts of a decoder layer against their specification, and a whole model with them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.ops import layer_settings, workspace
from dyrate_kernels.ops import layers as want
from dyrate_kernels.ops.layer_settings import LayerSettings, Tile, problem
from dyrate_kernels.triton_kernels import few_rows, plan
from dyrate_kernels.triton_kernels import layers as got
from tests import end_to_end, models
from tests.checks import ROWS
from tests.interpreter import harness

DTYPES = [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def close(a, b, dtype, factor=1):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.isfinite(), b.isfinite())
    torch.testing.assert_close(a, b, rtol=factor * TOLERANCE[dtype], atol=factor * TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_plus", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 96), (3, 5, 128), (1, 7, 40)])
def test_rms_norm(shape, one_plus, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) * 3
    x[0, 0] *= 1e-3  # there eps counts
    how = (torch.randn(shape[-1], generator=generator).to(dtype), 1e-5, one_plus)
    exact = want.rms_norm(x.double(), how[0].double(), *how[1:])
    with harness.settings():
        close(got.rms_norm(x, *how), want.rms_norm(x, *how), dtype)
        torch.testing.assert_close(got.rms_norm(x, *how).double(), exact, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])
        last = x[:, -1:]  # rows that do not lie densely
        close(got.rms_norm(last, *how), want.rms_norm(last, *how), dtype)
        turned = x.transpose(0, 1)
        close(got.rms_norm(turned, *how), want.rms_norm(turned, *how), dtype)
        assert got.rms_norm(x[:0], *how).shape == x[:0].shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_plus, before", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 96), (3, 2, 40)])
def test_residual_norm(shape, one_plus, before, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    x, residual = (torch.randn(shape, generator=generator).to(dtype) * 3 for _ in range(2))
    weight, first = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in range(2))
    how = (weight, 1e-5, one_plus, first if before else None)
    with harness.settings():
        for a, b in ((x, residual), (x.transpose(0, 1), residual.transpose(0, 1)), (x[:, -1:], residual[:, -1:])):
            total, normal = got.residual_norm(a, b, *how)
            same_total, same_normal = want.residual_norm(a, b, *how)
            if not before:
                assert torch.equal(total, same_total)
            close(total, same_total, dtype)
            close(normal, same_normal, dtype)
            # it rounds where the model does: a rounding more or less changes the last bit of many elements
            assert (normal == same_normal).double().mean() > 0.95 or dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", want.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1111), (4, 1, 64)])
def test_gate_mul(shape, activation, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up = (torch.randn(shape, generator=generator).to(dtype) * 4 for _ in range(2))
    gate.view(-1)[-3:] = torch.tensor([60.0, -60.0, float("nan")])[-gate.numel() :]
    with harness.settings():
        close(got.gate_mul(gate, up, activation), want.gate_mul(gate, up, activation), dtype, 6)  # products of up to 200
        turned = (gate.transpose(0, 2), up.transpose(0, 2), activation)
        close(got.gate_mul(*turned), want.gate_mul(*turned), dtype, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, heads, kv_heads, columns, dim", [(1, 1, 1, 1, 2), (2, 4, 2, 3, 16), (3, 7, 1, 1, 20), (1, 5, 5, 4, 128)])
@pytest.mark.parametrize(
    "shared, norm, sections",
    [(True, None, False), (False, None, False), (False, False, False), (True, True, False), (False, None, True), (True, False, True)],
)
def test_rotate(batch, heads, kv_heads, columns, dim, shared, norm, sections, dtype):
    """``norm``: Gemma's of each head (True), Llama's (False), none; ``sections``: three streams of positions."""
    generator = torch.Generator().manual_seed(batch + heads + dim)

    def made(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query, key = (made(batch, columns, many, dim).transpose(1, 2) for many in (heads, kv_heads))
    angle = torch.rand(*[3] * sections, 1 if shared else batch, columns, dim, generator=generator) * 6
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    half = dim // 2
    how = {"sections": (half // 4, half - half // 4 - half // 3, half // 3)} if sections else {}
    if norm is not None:
        how |= {"query_norm": made(dim), "key_norm": made(dim), "eps": 1e-5, "one_plus": norm}
    with harness.settings():
        for a, b in ((query, key), (query.contiguous(), key.contiguous())):
            for one, other in zip(got.rotate(a, b, cos, sin, **how), want.rotate(a, b, cos, sin, **how), strict=True):
                close(one, other, dtype)


def products(size, counts, rows, dtype):
    """(x, weights whose rows do not lie densely, biases, of which every second one is missing)."""
    generator = torch.Generator().manual_seed(size + rows)
    x = torch.randn(rows, 1, size, generator=generator).to(dtype)
    wide = [torch.randn(count, size + 3, generator=generator).to(dtype) / size**0.5 for count in counts]
    biases = [None if number % 2 else torch.randn(count, generator=generator).to(dtype) for number, count in enumerate(counts)]
    return x, [weight[:, :size] for weight in wide], biases


def double(tensors):
    return [tensor if tensor is None else tensor.double() for tensor in tensors]


def near(found, exact, factor, dtype):
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=factor * TOLERANCE[dtype], atol=factor * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, counts", [(1, [1]), (40, [3, 50]), (300, [17, 1, 33]), (512, [64, 16, 16])])
def test_linears(size, counts, dtype):
    x, weights, biases = products(size, counts, 1, dtype)
    with harness.settings():
        for one, other in zip(got.linears(x, weights, biases), want.linears(x.double(), double(weights), double(biases)), strict=True):
            near(one, other, 3, dtype)
        up = products(size, counts[:1], 2, dtype)[1][0]
        for activation in want.ACTIVATIONS:
            exact = want.gated(x.double(), weights[0].double(), up.double(), activation)
            near(got.gated(x, weights[0], up, activation), exact, 8, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one_plus, has_residual", [(False, True), (True, True), (False, False)])
def test_a_norm_before_a_product_with_one_row(one_plus, has_residual, dtype):
    """The sum and what is normalised are rounded as the model rounds them, so that results equal those of the parts."""
    x, weights, biases = products(300, [17, 5], 1, dtype)
    generator = torch.Generator().manual_seed(1)
    residual, norm = (torch.randn(shape, generator=generator).to(dtype) for shape in ((1, 1, 300), (300,)))
    residual = residual if has_residual else None
    up = products(300, [17], 2, dtype)[1][0]
    with harness.settings():
        total, found = got.norm_linears(x, residual, norm, 1e-5, weights, biases, one_plus)
        assert torch.equal(total, x if residual is None else x + residual)
        normal = got.rms_norm(total, norm, 1e-5, one_plus)
        for one, other in zip(found, got.linears(normal, weights, biases), strict=True):
            close(one, other, dtype)
        again, gate = got.norm_gated(x, residual, norm, 1e-5, weights[0], up, "gelu_tanh", one_plus)
        assert torch.equal(again, total)
        close(gate, got.gated(normal, weights[0], up, "gelu_tanh"), dtype)
        exact = want.norm_linears(x, residual, norm, 1e-5, weights, biases, one_plus)
        assert torch.equal(exact[0], total)
        for one, other in zip(found, exact[1], strict=True):
            near(one, other.double(), 4, dtype)


TILES = [None, Tile(rows=16, columns=16, stages=2), Tile(rows=32, columns=64, splits=2), Tile(rows=16, columns=32, splits=3, warps=2)]


@pytest.mark.parametrize(
    "tile, dtype", [*((tile, torch.float32) for tile in TILES), *((tile, torch.float16) for tile in TILES[1:3])], ids=str
)
@pytest.mark.parametrize("rows, size, counts", [(2, 40, [50]), (17, 128, [33, 16, 1]), (5, 100, [7, 40]), (64, 64, [20])])
def test_products_with_few_rows(rows, size, counts, tile, dtype):
    x, weights, biases = products(size, counts, rows, dtype)
    others = [torch.ones_like(weight[:, 0]) for weight in weights]
    up = products(size, counts[:1], 99, dtype)[1][0]
    settings = LayerSettings(
        products={problem("linear", sum(counts), size): ((2, 64, tile),), problem("gated", counts[0], size): ((1, 64, tile),)}
    )
    layer_settings.override(settings if tile else None)
    try:
        with harness.settings():
            for given in (biases, others, [None] * len(weights)):
                found = scratched(lambda given=given: got.linears(x, weights, given))
                for one, other in zip(found, want.linears(x.double(), double(weights), double(given)), strict=True):
                    near(one, other, 3, dtype)
            (found,) = scratched(lambda: [got.gated(x, weights[0], up, "gelu")])
            near(found, want.gated(x.double(), weights[0].double(), up.double(), "gelu"), 8, dtype)
    finally:
        layer_settings.override(None)


def scratched(call):
    """Returns what it gives, twice, with poisoned scratch memory: bit for bit the same, and the counters are back at zero."""
    results = []
    for _ in range(2):
        for space in workspace.living():
            for name, buffer in space.buffers().items():
                assert name != "counters" or not buffer.any()
                if name != "counters":
                    buffer.fill_(float("nan"))
        results.append(call())
    assert all(harness.same(one, other) for one, other in zip(*results, strict=True))
    return results[1]


def test_a_tile_is_taken_from_the_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(few_rows, "start", lambda *args, stages: seen.append((args[2], stages)))
    x, weights, biases = products(64, [40, 24], 3, torch.float16)
    tile = Tile(rows=16, columns=16, stages=5, splits=2)
    layer_settings.override(LayerSettings(products={"linear 64x64": ((2, 3, tile),)}))
    try:
        got.linears(x, weights, [None, None])
        got.linears(x[:2], weights, [None, None])
        got.linears(torch.cat([x, x]), weights, [None, None])
    finally:
        layer_settings.override(None)
    assert seen == [((5, 2, 1), 5), ((5, 2, 1), 5), ((2, 1, 1), 4)]


ONE_ROW = (dk.policies.DyRate(k=1, predictor="closed-form"), "recoverable", {"use_cache": True})  # options: one picture


@pytest.mark.parametrize("policy, retention, options, steps", [(*end_to_end.GENERATIONS[3], 2), (*ONE_ROW, 2)], ids=str)
def test_fused_model_gives_the_references_tokens(policy, retention, options, steps, monkeypatch):
    demo = end_to_end.shallow_demo(2)
    layers = demo[0].config.text_config.num_hidden_layers
    calls = Counter()
    for name in ("rms_norm", "gate_mul", "rotate", "linears", "gated"):
        monkeypatch.setattr(got, name, counted(calls, name, getattr(got, name)))
    with harness.settings(plan.Settings(block_n=256, min_blocks=4)):
        end_to_end.assert_tokens_equal_the_references(demo, "triton", policy, retention, options, steps=steps, fuse=True)
    single = (steps - 1) * layers if options is ONE_ROW[2] else 0  # layers of steps with one row
    assert calls == Counter(
        rms_norm=steps * (2 * layers + 1), rotate=steps * layers, gate_mul=steps * layers - single, gated=single, linears=3 * single
    )


EVERYTHING = {"residual_norm": True, "norm_prologue": True, "rotary_in_attention": True}


@pytest.mark.parametrize(
    "family, text, rows, steps, less", [("llava", "qwen2", 1, 3, {"num_hidden_layers": 3}), ("gemma3", "own", 2, 2, {})]
)
def test_a_model_with_every_fusion_gives_the_references_tokens(family, text, rows, steps, less, monkeypatch):
    model = models.build(family, text, **less)
    fields = models.inputs(model, ROWS[:rows])
    config = model.config.get_text_config()
    hidden, wide = config.hidden_size, config.intermediate_size
    heads, kv_heads = (count * models.decoder_layers(model)[0].self_attn.head_dim for count in (4, config.num_key_value_heads))
    names = [problem("linear", heads + 2 * kv_heads, hidden), problem("linear", hidden, heads), problem("linear", hidden, wide)]
    calls = Counter()
    for name in got.__all__:
        monkeypatch.setattr(got, name, counted(calls, name, getattr(got, name)))
    products = dict.fromkeys([*names, problem("gated", wide, hidden)], ((2, 8, Tile(rows=64, columns=64, splits=2)),))
    layer_settings.override(LayerSettings(products=products, **EVERYTHING))
    found = []
    try:
        for backend in ("reference", "triton"):
            with harness.settings(), dk.patch(model, dk.policies.DyRate(k=1), backend=backend, fuse=backend == "triton"):
                found.append(model.generate(**fields, max_new_tokens=steps, min_new_tokens=steps, do_sample=False))
    finally:
        layer_settings.override(None)
    assert torch.equal(*found)
    layers, decoded = len(models.decoder_layers(model)), steps - 1
    # norms of heads come before the rotation, so attention leaves that to the kernel that does both
    assert calls["rotate"] == (steps if family == "gemma3" else 1) * layers and calls["rms_norm"] == steps
    if rows == 1:
        assert calls["norm_linears"] == decoded * (layers - 1) and calls["norm_gated"] == decoded * layers
    else:
        assert calls["linears"] == 3 * decoded * layers and calls["gated"] == decoded * layers
        assert calls["residual_norm"] == steps * 2 * layers


def counted(calls, name, function):
    def call(*args, **kwargs):
        calls[name] += 1
        return function(*args, **kwargs)

    return call
