"""A whole model with the fused parts of a decoder layer; each of them by itself is in tests/ops/test_layers.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.ops import layer_settings
from dyrate_kernels.ops.layer_settings import LayerSettings, Tile, problem
from dyrate_kernels.triton_kernels import layers as got
from dyrate_kernels.triton_kernels import plan
from tests import end_to_end, models
from tests.checks import ROWS
from tests.interpreter import harness

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
