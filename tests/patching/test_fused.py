"""``patch(model, fuse=True)``: the same tokens in fewer launches. On a CPU the specification (``ops.layers``) stands in for the kernels."""

from __future__ import annotations

import copy
import json
import sys
import types
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

import dyrate_kernels as dk
from dyrate_kernels import devices
from dyrate_kernels.ops import layer_settings, layers
from dyrate_kernels.patching import fused, graph
from tests import models
from tests.checks import RETENTIONS, ROWS, assert_same, fingerprint, greedy, rows_for_beams
from tests.fake_graph import TapeRecorder

KNOWN = [("llava", "llama"), ("llava", "mistral"), ("llava", "qwen2"), ("llava_onevision", "qwen2"), ("video_llava", "llama")]
OTHERS = [
    ("llava", "qwen3"), ("qwen2_vl", "own"), ("qwen2_5_vl", "own"), ("qwen3_vl", "own"), ("gemma3", "own"), ("paligemma", "own"),
]  # fmt: skip
RETENTION = pytest.mark.parametrize("retention", RETENTIONS)


class Counted:
    """The functions of ``ops.layers``, and how often each was called."""

    def __init__(self):
        self.calls = Counter()

    def __getattr__(self, name):
        function = getattr(layers, name)

        def call(*args, **kwargs):
            self.calls[name] += 1
            return function(*args, **kwargs)

        return call


@pytest.fixture
def kernels(monkeypatch):
    counted = Counted()
    monkeypatch.setattr(layers, "fused", lambda backend, device: counted)
    return counted


def both(model, fields, options, kernels, **patching):
    """(output unfused, output fused)."""
    found = []
    for fuse in (False, True):
        kernels.calls.clear()
        with dk.patch(model, fuse=fuse, **patching) as handle:
            torch.manual_seed(3)
            found.append((model.generate(**fields, **options), handle.stats()))
        assert bool(kernels.calls) == fuse
    (want, stats), (got, fused_stats) = found
    assert [step.kept for step in stats.steps] == [step.kept for step in fused_stats.steps]
    return want, got


@RETENTION
@pytest.mark.parametrize("family, text", KNOWN)
def test_same_tokens(family, text, retention, kernels):
    model = models.build(family, text)
    want, got = both(model, models.inputs(model, ROWS), greedy(6), kernels, policy="fixed", retention=retention)
    assert_same(got, want, tolerance=1e-6)
    per_pass = {"rms_norm": 2 * models.LAYERS + 1, "rotate": models.LAYERS, "gate_mul": models.LAYERS}
    assert kernels.calls == {name: 6 * count for name, count in per_pass.items()}


@pytest.mark.parametrize("family, text", OTHERS)
def test_same_tokens_where_layers_differ(family, text, kernels):
    """Norms of each head go with the rotation; Gemma 3 has four norms a layer."""
    model = models.build(family, text)
    want, got = both(model, models.inputs(model, ROWS), greedy(4), kernels, policy="fixed")
    assert_same(got, want, tolerance=1e-6)
    norms = 4 if family == "gemma3" else 2
    per_pass = {"rms_norm": norms * models.LAYERS + 1, "rotate": models.LAYERS, "gate_mul": models.LAYERS}
    assert kernels.calls == {name: 4 * count for name, count in per_pass.items()}


@pytest.fixture
def turned_on():
    """Turns settings on that a device's file would."""

    def turn_on(**settings):
        layer_settings.override(layer_settings.LayerSettings(**settings))

    yield turn_on
    layer_settings.override(None)


@pytest.mark.parametrize("family, text", [("llava", "llama"), *OTHERS])
def test_a_sum_and_the_norm_behind_it_are_one_launch(family, text, kernels, turned_on):
    turned_on(residual_norm=True)
    model = models.build(family, text)
    want, got = both(model, models.inputs(model, ROWS), greedy(4), kernels, policy="fixed")
    assert_same(got, want, tolerance=1e-6)
    # deepstack adds to what a layer of the prompt gave, so that the norm behind it is the next layer's own
    added = 2 if family == "qwen3_vl" else 0
    assert kernels.calls["residual_norm"] == 4 * 2 * models.LAYERS
    assert kernels.calls["rms_norm"] == 4 + added


@pytest.mark.parametrize("family, text", [("llava", "llama"), ("llava", "qwen2"), *OTHERS])
@pytest.mark.parametrize("residual_norm", [False, True])
def test_with_one_row_a_product_makes_the_norm_before_it(family, text, residual_norm, kernels, turned_on):
    turned_on(norm_prologue=True, residual_norm=residual_norm)
    model = models.build(family, text)
    want, got = both(model, models.inputs(model, ROWS[:1]), greedy(4), kernels, policy="fixed")
    assert_same(got, want, tolerance=1e-6)
    if family == "gemma3":  # a norm stands between the block and the sum
        assert not kernels.calls["norm_linears"] and not kernels.calls["norm_gated"]
    else:
        assert kernels.calls["norm_linears"] == 3 * (models.LAYERS - 1) and kernels.calls["norm_gated"] == 3 * models.LAYERS


@pytest.mark.parametrize("family, text", [("llava", "llama"), ("llava", "qwen2"), ("gemma3", "own")])
def test_products_with_as_many_rows_as_the_devices_file_names(family, text, kernels, turned_on):
    model = models.build(family, text)
    config = model.config.get_text_config()
    names = [layer_settings.problem("linear", config.hidden_size, config.intermediate_size)]  # down
    names.append(layer_settings.problem("gated", config.intermediate_size, config.hidden_size))
    tile = layer_settings.Tile()
    fields = models.inputs(model, ROWS)
    for rows, calls in (((2, len(ROWS)), 3 * models.LAYERS), ((len(ROWS) + 1, 64), 0)):
        turned_on(products=dict.fromkeys(names, ((*rows, tile),)))
        want, got = both(model, fields, greedy(4), kernels, policy="fixed")
        assert_same(got, want, tolerance=1e-6)
        assert kernels.calls["linears"] == kernels.calls["gated"] == calls


BOTH = {"residual_norm": True, "norm_prologue": True}


@pytest.mark.parametrize("settings, rows", [({"residual_norm": True}, 2), ({"norm_prologue": True}, 1), (BOTH, 1)], ids=str)
def test_what_hooks_see_and_change_is_what_the_model_shows_them(settings, rows, kernels, turned_on):
    """A hook may read, replace or change in place what any module of the chain gives or is given."""
    turned_on(**settings)
    model = models.build("llava")
    text = model.model.language_model
    fields = models.inputs(model, ROWS[:rows])

    def shift(module, args, output):
        output.add_(0.5)

    def more(module, args):
        args[0].add_(0.5)

    def more_by_name(module, args, kwargs):
        kwargs["hidden_states"].add_(0.5)

    seen = []
    hooks = [
        lambda: text.layers[1].register_forward_hook(shift),
        lambda: text.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.clone())),
        lambda: text.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone())),
        lambda: text.layers[1].post_attention_layernorm.register_forward_hook(shift),
        lambda: text.layers[1].post_attention_layernorm.register_forward_pre_hook(more),
        lambda: text.layers[2].input_layernorm.register_forward_pre_hook(more),
        lambda: text.norm.register_forward_pre_hook(more),
        lambda: text.layers[0].mlp.register_forward_pre_hook(more),
        lambda: text.layers[1].self_attn.register_forward_pre_hook(more_by_name, with_kwargs=True),
    ]
    for hook in hooks:
        handle = hook()
        seen.clear()
        want, got = both(model, fields, greedy(3), kernels, policy="fixed")
        handle.remove()
        assert_same(got, want, tolerance=1e-6)
        assert not seen or all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen[:3], seen[3:], strict=True))


@pytest.mark.parametrize("settings", [{"residual_norm": True}, {"norm_prologue": True}], ids=str)
def test_sums_inside_inference_mode_and_of_captured_steps(settings, kernels, turned_on, monkeypatch):
    turned_on(**settings)
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    with torch.inference_mode():
        want, got = both(model, fields, greedy(4), kernels, policy="fixed")
    assert_same(got, want, tolerance=1e-6)
    recorder = TapeRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    want, got = both(model, fields, greedy(7), kernels, policy="dyrate", cuda_graph=True)
    assert_same(got, want, tolerance=1e-6)


def test_a_product_that_was_promised_and_does_not_run_leaves_no_trace(kernels, turned_on):
    """The module behind a norm fails: the next generation starts anew."""
    turned_on(norm_prologue=True)
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    with dk.patch(model, "fixed", fuse=True):
        want = model.generate(**fields, max_new_tokens=4)
        down = model.model.language_model.layers[1].mlp.down_proj
        hook = down.register_forward_hook(lambda module, args, output: 1 / 0 if output.shape[1] == 1 else None)
        with pytest.raises(ZeroDivisionError):
            model.generate(**fields, max_new_tokens=4)
        hook.remove()
        assert fused._PASS.pending is None and fused._PASS.ready is None
        assert torch.equal(model.generate(**fields, max_new_tokens=4), want)


def test_layers_are_left_alone_unless_something_asks_for_them(kernels, turned_on):
    model = models.build("llava")
    layer = model.model.language_model.layers[0]
    with dk.patch(model, "fixed", fuse=True):
        assert type(layer).__name__ == "LlamaDecoderLayer"
    turned_on(residual_norm=True)
    before = fingerprint(model)
    with dk.patch(model, "fixed", fuse=True):
        assert type(layer).__name__ == "FusedLlamaDecoderLayer"
        assert not set(dict(layer.named_modules())) - set(dict(models.build("llava").model.language_model.layers[0].named_modules()))
    assert fingerprint(model) == before and not any(fused._NEXT in vars(module) for module in model.modules())


def test_one_row_takes_the_products_too(kernels):
    model = models.build("llava")
    want, got = both(model, models.inputs(model, ROWS[:1]), greedy(6), kernels, policy="dyrate")
    assert_same(got, want, tolerance=1e-6)
    # the prompt has many rows, the five steps one: three products a layer, the gated pair apart
    assert kernels.calls["linears"] == 5 * 3 * models.LAYERS
    assert kernels.calls["gated"] == 5 * models.LAYERS and kernels.calls["gate_mul"] == models.LAYERS


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "temperature": 0.9}], ids=str)
def test_beams_and_sampling(options, kernels):
    model = models.build("llava")
    fields = models.inputs(model, rows_for_beams(ROWS) if "num_beams" in options else ROWS)
    want, got = both(model, fields, greedy(5) | options, kernels, policy="fastv", retention="evict")
    assert torch.equal(want.sequences, got.sequences)


def test_captured_steps(kernels, monkeypatch):
    recorder = TapeRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    model = models.build("llava")
    want, got = both(model, models.inputs(model, ROWS), greedy(7), kernels, policy="dyrate", cuda_graph=True)
    assert_same(got, want, tolerance=1e-6)


def test_a_module_that_does_more_than_multiply_is_called(kernels):
    """Hooks, other classes and a forward of an instance: LoRA, quantised weights, accelerate."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = models.build("llava")
    seen = []
    text = model.model.language_model.layers
    text[0].self_attn.o_proj.register_forward_hook(lambda module, args, output: seen.append(0))
    text[1].mlp.down_proj.__class__ = Doubled
    text[2].mlp.gate_proj.forward = lambda x: nn.functional.linear(x, text[2].mlp.gate_proj.weight) + 1
    want, got = both(model, models.inputs(model, ROWS[:1]), greedy(5), kernels, policy="fixed")
    assert_same(got, want, tolerance=1e-6)
    assert len(seen) == 2 * 5
    assert kernels.calls["linears"] == 4 * (3 * models.LAYERS - 2) and kernels.calls["gated"] == 4 * (models.LAYERS - 1)


def test_quantised_weights_are_not_read_as_numbers(kernels):
    """torchao leaves the class of a linear layer as it is and claims the old dtype for its weight."""
    quantization = pytest.importorskip("torchao.quantization")
    model = models.build("llava")
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.language_model.layers[0].mlp.down_proj) is nn.Linear
    want, got = both(model, models.inputs(model, ROWS[:1]), greedy(4), kernels, policy="fixed")
    assert_same(got, want, tolerance=1e-6)
    assert not kernels.calls["linears"] and not kernels.calls["gated"] and kernels.calls["gate_mul"] == 4 * models.LAYERS


def test_under_autocast_the_model_is_left_alone(kernels):
    """Rotary embedding keeps queries and keys in float32 there, values are not: SDPA casts all of them, and so does a patched model."""
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    with torch.autocast("cpu", torch.bfloat16):
        want = model.generate(**fields, max_new_tokens=5)
        with dk.patch(model, "none", fuse=True):
            got = model.generate(**fields, max_new_tokens=5)
    assert torch.equal(got, want) and not kernels.calls


def test_a_forward_that_outlives_the_patch(kernels):
    """accelerate keeps the forward that it found."""
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    want = model.generate(**fields, max_new_tokens=3)
    kept = []
    with dk.patch(model, "fixed", fuse=True):
        for layer in model.model.language_model.layers:
            for module in (layer.mlp, layer.input_layernorm, layer.self_attn):
                module.forward = module.forward
                kept.append(module)
    assert torch.equal(model.generate(**fields, max_new_tokens=3), want)


def test_only_generations_of_the_handle_are_fused(kernels):
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    want = fingerprint(model)
    plain = model(**fields).logits
    with dk.patch(model, "fixed", fuse=True):
        assert torch.equal(model(**fields).logits, plain)  # its own cache
        assert torch.equal(model.generate(**fields, use_cache=False, max_new_tokens=2), model.generate(**fields, max_new_tokens=2))
        kernels.calls.clear()
        model.train()
        loss = model(**fields, labels=fields["input_ids"]).loss
        loss.backward()
        model.eval()
        assert not kernels.calls
    assert fingerprint(model) == want and not any("Fused" in type(module).__name__ for module in model.modules())
    assert not any(fused._SWITCH in vars(module) for module in model.modules())


def test_a_pass_that_fails_leaves_the_models_own_forward(kernels):
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    with dk.patch(model, "fixed", fuse=True):
        hook = model.model.language_model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(**fields, max_new_tokens=3)
        hook.remove()
        assert fused._PASS.of is None
        kernels.calls.clear()
        model.model.language_model.layers[0].mlp(torch.zeros(1, 1, models.HIDDEN))
        assert not kernels.calls


def test_a_deep_copy_has_switches_of_its_own(kernels):
    model = models.build("llava")
    with dk.patch(model, "fixed", fuse=True) as handle:
        other = copy.deepcopy(model)
        layer = other.model.language_model.layers[0].mlp
        assert vars(layer)[fused._SWITCH] is not handle.fused
        fields = models.inputs(model, ROWS)
        assert torch.equal(other.generate(**fields, max_new_tokens=4), model.generate(**fields, max_new_tokens=4))
        dk.unpatch(other)
        assert not any("Fused" in type(module).__name__ for module in other.modules())
        assert any("Fused" in type(module).__name__ for module in model.modules())


def test_without_such_kernels_it_says_so_once():
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    want = model.generate(**fields, max_new_tokens=3)
    with dk.patch(model, "none", fuse=True, backend="reference"):
        with pytest.warns(UserWarning, match="fuse=True has no effect: the backend is 'reference'"):
            got = model.generate(**fields, max_new_tokens=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**fields, max_new_tokens=3)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family, text, name", [("llava", "qwen3", "Qwen3DecoderLayer"), ("gemma3", "own", "Gemma3DecoderLayer")])
def test_unknown_layers_are_the_models_own_and_that_is_said(family, text, name, kernels, monkeypatch):
    model = models.build(family, text)
    monkeypatch.delitem(fused.KNOWN, type(models.decoder_layers(model)[0].self_attn).__module__)
    model.generate(**models.inputs(model, ROWS[:1]), max_new_tokens=1)  # transformers leaves hooks of its own
    before = fingerprint(model)
    with pytest.warns(UserWarning, match=f"fuse=True has no effect: the decoder layers are {name}; known are those of Llama, "):
        dk.patch(model, "fixed", fuse=True)
    model.generate(**models.inputs(model, ROWS[:1]), max_new_tokens=3)
    assert not kernels.calls
    dk.unpatch(model)
    assert fingerprint(model) == before and not fused.fuses(model, "reference")


def test_fuse_is_a_bool():
    with pytest.raises(TypeError, match=r"fuse must be None \(automatic\), True or False, got 'yes'"):
        dk.patch(models.build("llava"), "fixed", fuse="yes")


TEXTS = [("llava", kind) for kind in ("llama", "mistral", "qwen2", "qwen3")] + OTHERS[1:]


@pytest.mark.parametrize("family, kind", TEXTS)
def test_layers_are_what_transformers_computes(family, kind):
    """The specification against the modules of every known text model, bit for bit."""
    model = models.build(family, kind)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare_layers(model.to(dtype), dtype)


def compare_layers(model, dtype):
    layer = models.decoder_layers(model)[0]
    known = fused.KNOWN[type(layer).__module__]
    g = torch.Generator().manual_seed(1)

    def random(*size):
        return torch.randn(*size, generator=g).to(dtype)

    x, residual = random(2, 3, models.HIDDEN), random(2, 3, models.HIDDEN)
    norm, mlp, attention = layer.input_layernorm, layer.mlp, layer.self_attn
    assert (type(norm).__name__, type(mlp).__name__) == (known.norm, known.feed_forward)
    assert (type(attention).__name__, type(layer).__name__) == (known.attention, known.layer)
    eps = norm.eps if known.one_plus else norm.variance_epsilon
    assert torch.equal(layers.rms_norm(x, norm.weight, eps, known.one_plus), norm(x))
    before = layer.post_attention_layernorm if known.four_norms else None
    total, normal = layers.residual_norm(x, residual, norm.weight, eps, known.one_plus, None if before is None else before.weight)
    assert torch.equal(total, residual + (x if before is None else before(x))) and torch.equal(normal, norm(total))
    activation = fused._activation(mlp.act_fn)
    assert activation == ("gelu_tanh" if "gemma" in known.norm.lower() else "silu")
    assert torch.equal(mlp.down_proj(layers.gated(x, mlp.gate_proj.weight, mlp.up_proj.weight, activation)), mlp(x))
    dim = attention.head_dim
    query, key = (random(2, 3, heads, dim).transpose(1, 2) for heads in (4, 2))
    angle = 6 * torch.rand(2, 3, dim, generator=g)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    how = {}
    if known.qk_norm:
        how = {"query_norm": attention.q_norm.weight, "key_norm": attention.k_norm.weight, "eps": eps, "one_plus": known.one_plus}
    first, second = (attention.q_norm(query), attention.k_norm(key)) if known.qk_norm else (query, key)
    own = sys.modules[type(attention).__module__]
    if hasattr(own, "apply_rotary_pos_emb"):
        for one, other in zip(layers.rotate(query, key, cos, sin, **how), own.apply_rotary_pos_emb(first, second, cos, sin), strict=True):
            assert torch.equal(one, other)
    else:  # transformers before 5.24
        cos, sin, sections = torch.stack([cos, sin, cos]), torch.stack([sin, cos, cos]), [1, 2, dim // 2 - 3]
        want = own.apply_multimodal_rotary_pos_emb(query, key, cos, sin, sections)
        for one, other in zip(layers.rotate(query, key, cos, sin, sections=sections), want, strict=True):
            assert torch.equal(one, other)


def test_three_streams_of_positions():
    """As transformers 5.6 rotates for Qwen2-VL, which later versions do in the model's rotary module."""
    g = torch.Generator().manual_seed(2)
    query, key = (torch.randn(2, heads, 3, 16, generator=g) for heads in (4, 2))
    cos, sin = torch.randn(3, 2, 3, 16, generator=g), torch.randn(3, 2, 3, 16, generator=g)
    stream = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2] * 2)
    chosen = [turns[stream, :, :, torch.arange(16)].permute(1, 2, 0) for turns in (cos, sin)]
    for one, other in zip(layers.rotate(query, key, cos, sin, sections=(2, 3, 3)), layers.rotate(query, key, *chosen), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "activation, want",
    [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu"), ("relu", None), ("gelu_python", None), ("gelu_new", None)],
)
def test_activations_by_name(activation, want):
    from transformers.activations import ACT2FN

    module = ACT2FN[activation]
    assert fused._activation(module) == want
    if want is not None:
        x = torch.randn(50, generator=torch.Generator().manual_seed(1))
        assert torch.equal(layers.gate_mul(x, x, want), module(x) * x)


def test_settings_of_layers_in_a_device_file(tmp_path, monkeypatch):
    entry = {"products": {"linear 96x64": [{"rows": [2, 8], "tile": {"rows": 64, "splits": 2}}, {"rows": [9, 64]}]}, "residual_norm": True}
    settings = layer_settings.LayerSettings.from_file(entry)
    assert settings.residual_norm and not settings.norm_prologue and not settings.rotary_in_attention
    assert settings.tile("linear", 96, 64, 8) == layer_settings.Tile(rows=64, splits=2)
    assert settings.tile("linear", 96, 64, 64) == layer_settings.Tile()
    for other in (("linear", 96, 64, 1), ("linear", 96, 64, 65), ("gated", 96, 64, 4), ("linear", 64, 96, 4)):
        assert settings.tile(*other) is None
    assert layer_settings.settings(torch.device("cpu")) == layer_settings.LayerSettings()
    (tmp_path / devices.file_name("ACME")).write_text(json.dumps({"layers": entry}))
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(name="ACME"))
    for cached in (devices.measured, layer_settings._shipped):
        cached.cache_clear()
    assert layer_settings.settings(torch.device("cuda", 0)) == settings
    for cached in (devices.measured, layer_settings._shipped):
        cached.cache_clear()
    with pytest.raises(ValueError, match="layers: unknown residual; known: norm_prologue, products"):
        layer_settings.LayerSettings.from_file({"residual": True})
    with pytest.raises(ValueError, match="expected names like 'linear 4096x4096'.*got 'down 4x4'"):
        layer_settings.LayerSettings.from_file({"products": {"down 4x4": []}})
    for wrong in ({"rows": 48}, {"rows": 8}, {"columns": 24}, {"warps": 3}, {"stages": 0}, {"splits": 1.5}, {"splits": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            layer_settings.Tile(**wrong)
