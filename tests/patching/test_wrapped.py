"""Wrapped models: the model inside is patched, or the wrapper is refused by name. Pickling a patched model says what to do."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import dyrate_kernels as dk
from tests import models
from tests.checks import fingerprint

FIXED = dk.policies.Fixed(k=1, rate=0.9)
TARGETS = ["q_proj", "v_proj", "o_proj"]


@pytest.fixture
def model():
    return models.build("llava")


@pytest.fixture
def fields(model):
    return models.inputs(model, [["text 3", "image", "text 5"]], seed=1)


def scores(model, fields):
    found = model.generate(**fields, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return torch.stack(found.logits)


def adapters():
    peft = pytest.importorskip("peft")
    return {
        "lora": peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
        "lora with a task": peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM"),
        "dora": peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
        "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }


@pytest.mark.parametrize("name", ["lora", "lora with a task", "dora", "ia3"])
def test_adapters_that_change_weights_prune(model, fields, name):
    import peft

    base = scores(model, fields)
    wrapped = peft.get_peft_model(model, adapters()[name]).eval()
    plain = scores(wrapped, fields)
    assert not torch.equal(plain, base)
    with dk.patch(wrapped, "none"):
        torch.testing.assert_close(scores(wrapped, fields), plain, rtol=0, atol=1e-4)
    handle = dk.patch(wrapped, FIXED)
    assert handle.model is wrapped.get_base_model()
    pruned = scores(wrapped, fields)
    assert not torch.allclose(pruned, plain, atol=1e-3) and handle.stats().kept_mean < 1
    wrapped.merge_adapter()
    torch.testing.assert_close(scores(wrapped, fields), pruned, rtol=0, atol=1e-3)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(scores(wrapped, fields), pruned, rtol=0, atol=1e-3)
    with wrapped.disable_adapter():
        without = scores(wrapped, fields)
    dk.unpatch(wrapped)
    torch.testing.assert_close(scores(wrapped, fields), plain, rtol=0, atol=1e-4)
    merged = wrapped.merge_and_unload()
    with dk.patch(merged, FIXED):
        torch.testing.assert_close(scores(merged, fields), pruned, rtol=0, atol=1e-3)
    fresh = models.build("llava")
    with dk.patch(fresh, FIXED):
        torch.testing.assert_close(without, scores(fresh, fields), rtol=0, atol=1e-4)


def test_an_adapter_put_on_a_patched_model(model, fields):
    import peft

    with dk.patch(model, FIXED):
        want = scores(model, fields)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS)).eval()  # changes nothing yet
        torch.testing.assert_close(scores(wrapped, fields), want, rtol=0, atol=1e-5)
        wrapped.unload()
    with pytest.raises(RuntimeError, match="not patched"):
        dk.unpatch(wrapped)


@pytest.mark.parametrize("name", ["prompt tuning", "prefix tuning"])
def test_adapters_that_change_the_prompt_are_refused(model, name):
    import peft

    wrapped = peft.get_peft_model(model, adapters()[name]).eval()
    before = fingerprint(model)
    with pytest.raises(TypeError, match=r"adds virtual tokens.*LoRA, DoRA, IA3.*model\.get_base_model\(\)"):
        dk.patch(wrapped, FIXED)
    assert fingerprint(model) == before


@pytest.mark.parametrize("wrap", ["compile", "compile in place", "peft in compile"])
def test_compiled_models_prune(model, fields, wrap):
    with dk.patch(model, FIXED):
        want = scores(model, fields)
    if wrap == "compile in place":
        model.compile(backend="eager")
        compiled = model
    else:
        inner = model
        if wrap == "peft in compile":
            peft = pytest.importorskip("peft")
            inner = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS)).eval()
        compiled = torch.compile(inner, backend="eager")
    with dk.patch(compiled, FIXED) as handle:
        assert handle.model is model
        torch.testing.assert_close(scores(compiled, fields), want, rtol=0, atol=1e-5)
        assert handle.stats().kept_mean < 1
        with pytest.raises(RuntimeError, match="patched already"):
            dk.patch(model, FIXED)


class Forwarding(nn.Module):
    """A wrapper as trainers have them: a module that passes attributes on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Plain:
    """One that is no module."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)


class Hidden(nn.Module):
    """A module that holds the model where no module is looked for."""

    def __init__(self, inner):
        super().__init__()
        self.__dict__["held"] = [inner]
        self.linear = nn.Linear(2, 2)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["held"][0], name)


class Slots:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


WRAPPERS = [
    (Hidden, "model.held.0."),
    (Slots, "model.inner"),
    (lambda model: Plain(Slots(model)), "model.inner.inner"),
    (Forwarding, "model.inner"),
    (Plain, "model.inner"),
    (nn.DataParallel, "model.module"),
    (lambda model: Forwarding(Forwarding(model)), "model.inner.inner"),
]


@pytest.mark.parametrize(
    ("wrap", "path"), WRAPPERS, ids=["hidden", "slots", "two plain ones", "forwarding", "no module", "parallel", "twice"]
)
def test_other_wrappers_are_refused_with_the_object_to_patch(model, wrap, path):
    before = fingerprint(model)
    with pytest.raises(TypeError, match=f"which wraps a model: patch that one, {path}"):
        dk.patch(wrap(model), FIXED)
    assert fingerprint(model) == before


def test_a_proxy_is_refused(model):
    with pytest.raises(TypeError, match="model must be a transformers vision-language model, got .*Proxy"):
        dk.patch(weakref.proxy(model), FIXED)


def test_attention_that_peft_wraps_is_refused(model):
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up_proj"], modules_to_save=["self_attn"])).eval()
    with pytest.raises(TypeError, match="attention is a .*Wrapper, not transformers' own"):
        dk.patch(wrapped, FIXED)


def test_a_mixed_peft_model_prunes(model, fields):
    import peft

    wrapped = peft.PeftMixedModel(model, peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).eval()
    plain = scores(wrapped, fields)
    with dk.patch(wrapped, FIXED) as handle:
        assert handle.model is model
        assert not torch.allclose(scores(wrapped, fields), plain, atol=1e-3)


def test_a_wrapper_left_on_an_unpatched_model_can_be_pickled():
    model = models.build("llava")
    with dk.patch(model, FIXED):
        model.generate = functools.partial(model.generate, do_sample=False)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)


@pytest.mark.parametrize("save", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())], ids=["pickle", "torch.save"])
def test_a_patched_model_says_that_it_must_be_unpatched_before_it_is_pickled(model, fields, save):
    want = scores(model, fields)
    with dk.patch(model, FIXED, retention="evict") as handle:
        for each in (model, handle, model.get_decoder().layers[0].self_attn):
            with pytest.raises(TypeError, match=r"unpatch\(model\) first.*save_pretrained"):
                save(each)
        pruned = scores(model, fields)
        twin = copy.deepcopy(model)
        assert torch.equal(scores(twin, fields), pruned)
        assert type(copy.copy(model.get_decoder().layers[0].self_attn)) is type(model.get_decoder().layers[0].self_attn)
    fresh = models.build("llava")  # transformers leaves hooks in a model that has run, which pickle refuses
    with dk.patch(fresh, FIXED):
        pass
    assert torch.equal(scores(pickle.loads(pickle.dumps(fresh)), fields), want)


def test_the_handle_says_which_predictor_is_used(model):
    with dk.patch(model) as handle:
        assert "predictor='closed-form'" in repr(handle) and "k=3" in repr(handle)
    with dk.patch(model, "recycle") as handle:
        assert "predictor='closed-form'" in repr(handle)
    bundled, _ = dk.load_demo()
    with dk.patch(bundled) as handle:
        assert "predictor=DyRatePredictor(" in repr(handle) and "source='trained" in repr(handle)
    with dk.patch(bundled, retention="evict") as handle:
        assert "predictor='closed-form'" in repr(handle)
