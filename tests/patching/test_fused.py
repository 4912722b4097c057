"""``patch(model, fuse=True)``: the same tokens in fewer launches. On a CPU the specification (``ops.layers``) stands in for the kernels."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

import dyrate_kernels as dk
from dyrate_kernels.ops import layers
from dyrate_kernels.patching import fused, graph
from tests import models
from tests.checks import RETENTIONS, ROWS, assert_same, fingerprint, greedy, rows_for_beams
from tests.fake_graph import TapeRecorder

KNOWN = [("llava", "llama"), ("llava", "mistral"), ("llava", "qwen2"), ("llava_onevision", "qwen2"), ("video_llava", "llama")]
RETENTION = pytest.mark.parametrize("retention", RETENTIONS)


class Counted:
    """The functions of ``ops.layers``, and how often each was called."""

    def __init__(self):
        self.calls = Counter()

    def __getattr__(self, name):
        function = getattr(layers, name)

        def call(*args):
            self.calls[name] += 1
            return function(*args)

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
        assert getattr(fused._PASS, "of", None) is None
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


@pytest.mark.parametrize("family, text, name", [("llava", "qwen3", "Qwen3Attention"), ("gemma3", "own", "Gemma3Attention")])
def test_unknown_layers_are_refused(family, text, name):
    model = models.build(family, text)
    before = fingerprint(model)
    with pytest.raises(TypeError, match=f"fuse=True knows decoder layers with LlamaAttention, .*have {name}: leave fuse out"):
        dk.patch(model, "fixed", fuse=True)
    assert fingerprint(model) == before and not fused.fuses(model, "reference")


def test_fuse_is_a_bool():
    with pytest.raises(TypeError, match="fuse must be True or False, got 'yes'"):
        dk.patch(models.build("llava"), "fixed", fuse="yes")


def test_layers_are_what_transformers_computes():
    """The specification against the modules of the three text models, bit for bit in float32 and bfloat16."""
    for kind in ("llama", "mistral", "qwen2"):
        for dtype in (torch.float32, torch.bfloat16):
            model = models.build("llava", kind).to(dtype)
            layer = model.model.language_model.layers[0]
            x = torch.randn(2, 3, models.HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
            norm = layer.input_layernorm
            assert torch.equal(layers.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x))
            mlp = layer.mlp
            assert torch.equal(mlp.down_proj(layers.gated(x, mlp.gate_proj.weight, mlp.up_proj.weight)), mlp(x))
            cos, sin = model.model.language_model.rotary_emb(x, torch.arange(3)[None].expand(2, 3))
            query, key = (torch.randn(2, heads, 3, models.HEAD_DIM).to(dtype) for heads in (4, 2))
            rotary = fused._own_rotary(type(layer.self_attn))
            for one, other in zip(layers.rotate(query, key, cos, sin), rotary(query, key, cos, sin), strict=True):
                assert torch.equal(one, other)
