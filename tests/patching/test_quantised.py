"""Quantised weights: a patched model is the same quantised model; what pruning changes is the policy's doing alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import bundled, loading
from dyrate_kernels.cli.main import main
from tests.checks import RETENTIONS, assert_same, greedy

MISSING = {name: package for name, package in loading.QUANTIZATIONS.items() if importlib.util.find_spec(package) is None}


@pytest.fixture(scope="module", params=loading.QUANTIZATIONS)
def quantised(request):
    if request.param in MISSING:
        pytest.skip(f"{MISSING[request.param]} is not installed")
    model, processor = loading.load_model(None, "cpu", "bfloat16" if request.param == "int8" else "float32", quantize=request.param)
    model.generation_config.eos_token_id = None
    inputs = bundled.scene_inputs(model, processor, batch=2)
    return model, inputs, request.param


@pytest.mark.parametrize("retention", RETENTIONS)
def test_keep_all_is_the_unpatched_quantised_model(quantised, retention):
    model, inputs, name = quantised
    assert type(model.get_decoder().layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    # not state_dict(): bitsandbytes 0.50 repacks its weights there on a CPU, and the unpatched model's own logits change by it
    before = {key: (type(value), id(value)) for key, value in model.named_parameters()}
    want = model.generate(**inputs, **greedy(8))
    with dk.patch(model, "none", retention=retention):
        # fused attention sums in another order; bfloat16 rounds that (int8), and so does bitsandbytes where it rounds its inputs (nf4)
        assert_same(model.generate(**inputs, **greedy(8)), want, tolerance=0.01 if name == "int8" else 1e-3)
        assert {key: (type(value), id(value)) for key, value in model.named_parameters()} == before
    assert_same(model.generate(**inputs, **greedy(8)), want, tolerance=0)


@pytest.mark.parametrize("retention", RETENTIONS)
def test_pruned(quantised, retention):
    model, inputs, name = quantised
    whole = model.generate(**inputs, **greedy(8))
    with dk.patch(model, dk.policies.Fixed(k=2, rate=0.5), retention=retention) as handle:
        first = model.generate(**inputs, **greedy(8))
        again = model.generate(**inputs, **greedy(8))
        stats = handle.stats()
    assert torch.equal(first.logits[-1], again.logits[-1]) and not torch.equal(first.logits[-1], whole.logits[-1])
    assert [step.kept for step in stats.steps[1:]] == [[72, 72]] * 7


def test_bytes_are_those_stored(quantised):
    model, inputs, name = quantised
    with dk.patch(model, "none") as handle:
        model.generate(**inputs, **greedy(3))
        shape, stats = handle.shape, handle.stats()
    # by hand: linear layers of the decoder at 1 byte (or half a byte, and a float32 scale for each 64), everything else as it is
    count = 0
    for layer in model.get_decoder().layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                numbers = module.in_features * module.out_features
                if name == "int8":
                    count += numbers + 2 * module.out_features
                elif module.in_features % 64:
                    count += 4 * numbers
                else:
                    count += numbers // 2 + 4 * numbers // 64
    assert dk.flops.weight_bytes(shape) > count
    assert dk.flops.weight_bytes(shape) < 1.02 * count + 2 * 4 * (model.get_decoder().embed_tokens.weight.numel() + 4000)
    assert dk.flops.weight_bytes(shape) < dk.flops.weight_bytes(shape.replace(stored_weights=None))
    assert stats.bytes_read > 2 * dk.flops.weight_bytes(shape)


@pytest.mark.parametrize("name", loading.QUANTIZATIONS)
def test_command_line(capsys, name):
    status = main(["generate", "--image", "examples/shapes_1.png", "--quantize", name, "--max-new-tokens", "12"])
    captured = capsys.readouterr()
    if name in MISSING:
        assert status == 1 and f"quantize='{name}' needs {MISSING[name]}: pip install 'dyrate-kernels[quantize]'" in captured.err
    else:
        assert status == 0 and "saved:" in captured.out


def test_mistakes():
    with pytest.raises(ValueError, match="quantize must be one of int8, nf4, got 'fp3'"):
        loading.load_model(None, quantize="fp3")
