"""Patching and unpatching: what is left behind (nothing), copies, several models, saving, accelerate, other caches."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

import dyrate_kernels as dk
from dyrate_kernels.generation.passes import DecodePass
from dyrate_kernels.patching.cache import VisualCache
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import fingerprint, greedy

ROWS = [["text 3", "image", "text 5"], ["text 1", "image", "text 2", "image", "text 4"], ["text 6"]]
FIXED = dk.policies.Fixed(k=2, rate=0.6)
METHODS_AS_POLICIES = {"fixed": dk.policies.Fixed(k=2, rate=0.5), "pyramiddrop": "pyramiddrop", "sparsevlm": "sparsevlm"}
RETENTION = pytest.mark.parametrize("retention", ["recoverable", "evict"])
FAMILY = pytest.mark.parametrize(("family", "text"), models.VARIANTS, ids=["-".join(each) for each in models.VARIANTS])


def tokens(model, fields, **options):
    return model.generate(**fields, **greedy(6, **options)).sequences


def logits(model, fields):
    with torch.no_grad():
        return model(**fields).logits


def rows_of(model):
    return ROWS if model.config.model_type != "video_llava" else [["text 3", "image", "text 5"], ["text 6"]]


@FAMILY
@RETENTION
def test_unpatch_leaves_nothing(family, text, retention):
    model = models.build(family, text)
    fields = models.inputs(model, rows_of(model))
    dk.patch(model, FIXED, retention=retention)
    dk.unpatch(model)  # what transformers registers once for all is there from here on
    before, first = fingerprint(model), logits(model, fields)
    want = model.generate(**fields, **greedy(6))
    handle = dk.patch(model, FIXED, retention=retention)
    changed = model.generate(**fields, **greedy(6))
    assert not torch.equal(torch.stack(changed.logits), torch.stack(want.logits))
    dk.unpatch(model)
    assert fingerprint(model) == before
    got = model.generate(**fields, **greedy(6))
    assert torch.equal(logits(model, fields), first)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    assert handle.stats().policy == "fixed"  # asking later still works


def test_the_block_undoes_itself_even_after_an_error(make_model):
    model = make_model()
    before = fingerprint(model)
    with pytest.raises(KeyError), dk.patch(model, FIXED):
        raise KeyError("theirs")
    assert fingerprint(model) == before
    with dk.patch(model, FIXED):
        dk.unpatch(model)  # leaving the block afterwards is fine
    assert fingerprint(model) == before


def test_a_failed_patch_changes_nothing(make_model):
    model = make_model()
    before = fingerprint(model)
    for bad in ({"policy": "dyrat"}, {"policy": dk.policies.Fixed(k=99)}, {"backend": "cudnn"}, {"retention": "drop"}):
        with pytest.raises(ValueError):
            dk.patch(model, **bad)
    assert fingerprint(model) == before


def test_print_shows_the_patch(make_model):
    model = make_model()
    with dk.patch(model):
        assert "DyRateLlamaAttention" in str(model)
    assert "DyRate" not in str(model)


def test_two_models_of_one_config_with_different_policies():
    config = models.config("llava")
    one, two, plain = (models.build("llava", seed=seed) for seed in (0, 0, 0))
    for model in (two, plain):
        model.config = one.config
        for ours, theirs in zip(model.modules(), one.modules(), strict=True):
            if hasattr(theirs, "config"):
                ours.config = theirs.config
    assert config is not one.config
    fields = models.inputs(one, ROWS)
    want = tokens(plain, fields)
    alone = {}
    for name, policy in (("one", FIXED), ("two", dk.policies.Fixed(k=1, rate=1.0))):
        with dk.patch(one, policy):
            alone[name] = tokens(one, fields)
    first = dk.patch(one, FIXED)
    second = dk.patch(two, dk.policies.Fixed(k=1, rate=1.0), retention="recoverable")
    assert torch.equal(tokens(one, fields), alone["one"])
    assert torch.equal(tokens(two, fields), alone["two"])
    assert torch.equal(tokens(plain, fields), want)
    assert first.stats().steps[1].kept != second.stats().steps[1].kept
    dk.unpatch(one)
    assert torch.equal(tokens(one, fields), want)
    assert torch.equal(tokens(two, fields), alone["two"])
    dk.unpatch(two)
    assert torch.equal(tokens(two, fields), want)


@RETENTION
def test_deepcopy(make_model, retention):
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    want = tokens(model, fields)
    dk.patch(model, FIXED, retention=retention)
    pruned = tokens(model, fields)
    twin = copy.deepcopy(model)
    assert torch.equal(tokens(twin, fields), pruned)
    dk.unpatch(model)
    assert torch.equal(tokens(model, fields), want)
    assert torch.equal(tokens(twin, fields), pruned)
    dk.unpatch(twin)
    assert torch.equal(tokens(twin, fields), want)


@RETENTION
def test_save_pretrained_after_patch(tmp_path, retention):
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    want = tokens(model, fields)
    model.save_pretrained(tmp_path / "plain")
    with dk.patch(model, FIXED, retention=retention):
        tokens(model, fields)
        model.save_pretrained(tmp_path / "patched")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "plain" / name).read_text() == (tmp_path / "patched" / name).read_text()
    again = type(model).from_pretrained(tmp_path / "patched")
    assert torch.equal(tokens(again.eval(), fields), want)


@RETENTION
@pytest.mark.parametrize("first", ["accelerate", "patch"])
def test_accelerate_hooks(retention, first):
    accelerate = pytest.importorskip("accelerate")
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    with dk.patch(model, FIXED, retention=retention):
        want = tokens(model, fields)
    plain = tokens(model, fields)

    def dispatch():
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    if first == "accelerate":
        dispatch()
    dk.patch(model, FIXED, retention=retention)
    if first == "patch":
        dispatch()
    assert torch.equal(tokens(model, fields), want)
    dk.unpatch(model)
    assert torch.equal(tokens(model, fields), plain)


@RETENTION
@pytest.mark.parametrize("method", ["fixed", "pyramiddrop", "sparsevlm"])
def test_device_map(tmp_path, retention, method):
    """As ``device_map="auto"`` dispatches a model that does not fit: layers here, layers on the disk."""
    pytest.importorskip("accelerate")
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    policy = METHODS_AS_POLICIES[method]
    with dk.patch(model, policy, retention=retention):
        want = tokens(model, fields)
    plain = tokens(model, fields)
    model.save_pretrained(tmp_path / "model")
    layers = "model.language_model.layers"
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model.embed_tokens": "cpu",
              "lm_head": "cpu", "model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu",
              **{f"{layers}.{i}": "disk" if i in (1, 3) else "cpu" for i in range(models.LAYERS)}}  # fmt: skip
    split = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32)
    models._settle(split)
    assert split.get_decoder().layers[3].self_attn.q_proj.weight.device.type == "meta"  # its weights are on the disk
    with dk.patch(split, policy, retention=retention) as handle:
        assert torch.equal(tokens(split, fields), want)
        assert handle.stats().kept_mean < 1
    assert torch.equal(tokens(split, fields), plain)


def test_metadata_move_once_in_a_step_to_another_device(make_model):
    """Layers on a second device read lists that were decided on the first: each is moved there once, and anew when it changes."""
    model = make_model()
    seen = []

    def watch(module, args, kwargs):
        session = kwargs["dyrate"].session
        kept = session.store.groups[1].kept
        if isinstance(session.passing, DecodePass) and kept is not None:
            attention = session.passing.attention
            there = [attention.at(torch.device("meta"), kept) for _ in range(2)]
            assert there[0] is there[1] and there[0].device.type == "meta" and attention.at(kept.device, kept) is kept
            seen.append(id(there[0]))

    hooks = [model.get_decoder().layers[i].register_forward_pre_hook(watch, with_kwargs=True) for i in (3, 4)]
    try:
        with dk.patch(model, dk.policies.Fixed(k=2, rate=0.5)):
            tokens(model, models.inputs(model, ROWS))
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) >= 4 and all(a == b for a, b in zip(seen[::2], seen[1::2], strict=True))


@RETENTION
@pytest.mark.parametrize("how", ["dynamic", "static", "no cache", "forward", "cached forward"])
def test_other_caches_behave_as_unpatched(make_model, retention, how):
    model = make_model()
    fields = models.inputs(model, ROWS)

    def run():
        if how == "dynamic":
            return tokens(model, fields, **{cache_name(): DynamicCache(config=model.config.get_text_config())})
        if how == "static":
            return tokens(model, fields, cache_implementation="static")
        if how == "no cache":
            return tokens(model, fields, use_cache=False)
        if how == "forward":
            return logits(model, fields)
        with torch.no_grad():
            cache = DynamicCache(config=model.config.get_text_config())
            model(**fields, **{cache_name(): cache}, use_cache=True)
            mask = torch.cat([fields["attention_mask"], torch.ones(3, 1, dtype=torch.int64)], 1)
            return model(input_ids=torch.full((3, 1), 7), attention_mask=mask, **{cache_name(): cache}).logits

    want = run()
    with dk.patch(model, FIXED, retention=retention):
        assert torch.equal(run(), want)


def test_gradients_still_flow_through_a_patched_forward(make_model):
    model = make_model()
    fields = models.inputs(model, ROWS[:1])

    def gradient():
        model.zero_grad()
        model(**fields, labels=fields["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradient()
    with dk.patch(model, FIXED):
        got = gradient()
    model.zero_grad()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_nothing_is_kept_alive():
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    handle = dk.patch(model, FIXED)
    output = model.generate(**fields, **greedy(4))
    keys = weakref.ref(output.past_key_values.store.keys[0])
    cache = weakref.ref(output.past_key_values)
    del output
    gc.collect()
    assert cache() is None and keys() is None  # the handle holds small tensors only
    assert handle.stats().steps
    dk.unpatch(model)
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None


def test_keys_and_values_are_free_as_soon_as_generate_returns(make_model, monkeypatch):
    model = make_model()
    fields = models.inputs(model, ROWS)
    made = []
    original = VisualCache.__init__

    def noted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(VisualCache, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        with dk.patch(model, FIXED) as handle:
            for options in ({}, {"num_beams": 2}, {"do_sample": True}):
                model.generate(**fields, max_new_tokens=3, return_dict_in_generate=False, **options)
                assert made.pop()() is None
            assert handle.stats().steps
            output = model.generate(**fields, max_new_tokens=3, return_dict_in_generate=True)
            assert made.pop()() is output.past_key_values
            assert output.past_key_values.store.keys[0] is not None
    finally:
        gc.enable()


def test_a_patched_model_can_be_collected():
    model = models.build("llava")
    dk.patch(model, FIXED)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation):
    model = models.build("llava")
    model.set_attn_implementation(implementation)
    fields = models.inputs(model, ROWS)
    want = tokens(model, fields)
    with dk.patch(model, "none"):
        assert torch.equal(tokens(model, fields), want)
    assert model.config.get_text_config()._attn_implementation == implementation


def test_repatching_with_another_policy(make_model):
    model = make_model()
    fields = models.inputs(model, ROWS)
    results = []
    for _ in range(2):
        for policy in (FIXED, "none"):
            with dk.patch(model, policy):
                results.append(tokens(model, fields))
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert not torch.equal(results[0], results[1])


def test_auto_follows_the_model_to_another_device(make_model, monkeypatch):
    with dk.patch(make_model()) as handle:
        assert handle.backend == "reference"
        monkeypatch.setattr("dyrate_kernels.ops.dispatch.name_for", lambda backend, device: f"{backend} on {device}")
        assert handle.backend == "auto on cpu"
