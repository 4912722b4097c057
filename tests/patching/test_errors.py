"""Bad input: a clear error or a right answer, and the model goes on working."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import dyrate_kernels as dk
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import greedy

P = dk.policies
ROWS = [["text 3", "image", "text 5"], ["text 1", "image", "text 2"]]
RETENTION = pytest.mark.parametrize("retention", ["recoverable", "evict"])
SUPPORTED = "gemma3.*llava, .*llava_next.*llava_onevision.*video_llava.*vipllava"


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def fields(model):
    return models.inputs(model, ROWS)


def tokens(model, fields, length=6, **options):
    return model.generate(**fields, **greedy(length, **options)).sequences


def test_models_that_are_not_supported():
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    with pytest.raises(TypeError, match=f"llama.*supported: {SUPPORTED}"):
        dk.patch(LlamaForCausalLM(config))
    for thing in ("llava", None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=SUPPORTED):
            dk.patch(thing)


def test_the_inner_model_is_refused(model):
    with pytest.raises(TypeError, match=r"generate\(\)"):
        dk.patch(model.model)


CASES = [
    ({"policy": "dyrat"}, ValueError, "policy must be one of none, dyrate, fastv.*'dyrat'"),
    ({"policy": 3}, TypeError, "policy must be a name"),
    ({"policy": P.FastV}, TypeError, "policy must be a name"),
    ({"policy": P.Fixed(), "k": 2}, ValueError, "k and predictor"),
    ({"backend": "cudnn"}, ValueError, "auto, triton, cuda, reference"),
    ({"retention": "drop"}, ValueError, "recoverable, evict or pool"),
    ({"k": 0}, ValueError, "k must be at least 1"),
    ({"k": 5}, ValueError, r"k must be in \[1, 4\]"),
    ({"k": 1.5}, TypeError, "k must be an integer"),
    ({"predictor": "/not/there"}, FileNotFoundError, "/not/there"),
    ({"predictor": dk.DyRatePredictor(3, [0.0, 0.5])}, ValueError, "3 heads"),
    ({"policy": "fastv", "predictor": "x"}, TypeError, "no option 'predictor'"),
]


@pytest.mark.parametrize(("options", "error", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_wrong_options(model, options, error, message):
    with pytest.raises(error, match=message):
        dk.patch(model, **options)
    dk.patch(model).unpatch()


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf, "half", None, True])
@pytest.mark.parametrize("name", ["fixed", "fastv", "random", "uniform"])
def test_rates_outside_of_zero_to_one(name, rate):
    with pytest.raises((ValueError, TypeError), match="rate must be"):
        P.get(name, rate=rate)


def test_a_backend_that_cannot_run(model):
    for name, state in dk.backends().items():
        if state != "available":
            with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run here"):
                dk.patch(model, backend=name)


def test_second_patch_and_second_unpatch(model):
    with dk.patch(model), pytest.raises(RuntimeError, match="patched already"):
        dk.patch(model)
    with pytest.raises(RuntimeError, match="not patched"):
        dk.unpatch(model)


@RETENTION
def test_calls_that_are_refused_leave_the_model_working(model, fields, retention):
    with dk.patch(model, P.Fixed(k=2, rate=0.5), retention=retention) as handle:
        with pytest.raises(RuntimeError, match="nothing was generated yet"):
            handle.stats()
        want = tokens(model, fields)
        right = {**fields, "attention_mask": fields["attention_mask"].clone()}
        right["attention_mask"][1, -1] = 0
        short = {**fields, "attention_mask": fields["attention_mask"][:, 1:]}
        few = {**fields, "pixel_values": fields["pixel_values"][:1]}
        for bad, options, error, message in (
            (fields, {"output_attentions": True}, ValueError, "output_attentions=True is not available"),
            (right, {}, ValueError, "padding_side = 'left'"),
            (short, {}, ValueError, "attention_mask must be"),
            (few, {}, ValueError, "do not match"),
        ):
            with pytest.raises(error, match=message):
                tokens(model, bad, **options)
            assert torch.equal(tokens(model, fields), want)
        with pytest.raises(NotImplementedError, match="generate_batch"):
            model.generate_batch([[1, 2, 3]])
        assert torch.equal(tokens(model, fields), want)
        assert len(handle.stats().steps) == 6


@RETENTION
def test_an_error_in_the_middle_of_a_generation(model, fields, retention):
    class Stop(StoppingCriteria):
        calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with dk.patch(model, P.Fixed(k=2, rate=0.5), retention=retention):
        want = tokens(model, fields)
        with pytest.raises(KeyboardInterrupt):
            tokens(model, fields, stopping_criteria=[Stop()])
        assert torch.equal(tokens(model, fields), want)


def test_a_cache_of_another_policy_is_refused(model, fields):
    with dk.patch(model, P.Fixed(k=2, rate=0.5)):
        old = model.generate(**fields, **greedy(2))
    more = {"input_ids": old.sequences, "attention_mask": torch.nn.functional.pad(fields["attention_mask"], (0, 2), value=1)}
    with dk.patch(model, P.Fixed(k=1, rate=0.5)):
        with pytest.raises(ValueError, match="another policy or retention"):
            model.generate(**more, **{cache_name(): old.past_key_values}, **greedy(2))
        assert tokens(model, fields).shape[0] == 2
    with pytest.raises(RuntimeError, match="not patched"):
        model.generate(**more, **{cache_name(): old.past_key_values}, **greedy(2))


@RETENTION
@pytest.mark.parametrize("name", ["fixed", "dyrate", "fastv", "depth", "uniform"])
def test_nan_in_one_picture_touches_that_row_alone(model, fields, name, retention):
    with dk.patch(model, P.get(name, k=2), retention=retention) as handle:
        want = tokens(model, fields)
        bad = fields["pixel_values"].clone()
        bad[1] = math.nan
        got = tokens(model, {**fields, "pixel_values": bad})
        assert torch.equal(got[0], want[0])
        stats = handle.stats()
        assert all(0 <= kept <= n for step in stats.steps for kept, n in zip(step.kept, stats.visual_tokens, strict=True))
        assert torch.equal(tokens(model, fields), want)


@RETENTION
def test_text_without_an_image(model, recwarn, retention):
    ids = torch.tensor([[5, 6, 7]])
    want = model.generate(ids, **greedy(5)).sequences
    with dk.patch(model, retention=retention) as handle:
        assert torch.equal(model.generate(ids, **greedy(5)).sequences, want)
        assert handle.stats().visual_tokens == [0] and handle.stats().kept_mean == 1.0


@RETENTION
@pytest.mark.parametrize("policy", [P.Fixed(k=2, rate=1.0), P.VTW(k=1), P.Schedule(k=2, kept=[(0, 0)]), P.FastV(k=4, rate=1)], ids=str)
def test_nothing_kept(model, fields, policy, retention):
    with dk.patch(model, policy, retention=retention) as handle:
        assert tokens(model, fields).shape[1] == fields["input_ids"].shape[1] + 6
        assert all(step.kept == [0, 0] for step in handle.stats().steps[1:])


@RETENTION
def test_longer_than_was_reserved(model, retention):
    """The cache grows: a conversation goes on past the length its first turn asked for, and forward() past any length."""
    fields = models.inputs(model, ROWS[:1])
    with dk.patch(model, "none", retention=retention):
        first = model.generate(**fields, **greedy(2))
        cache = first.past_key_values
        reserved = cache.store.text_capacity
        steps = reserved + 10
        with torch.no_grad():
            for step in range(steps):
                mask = torch.nn.functional.pad(fields["attention_mask"], (0, step + 2), value=1)
                out = model(input_ids=first.sequences[:, -1:], attention_mask=mask, **{cache_name(): cache}, use_cache=True)
        assert cache.store.text_capacity > reserved
    ids = torch.cat([first.sequences, first.sequences[:, -1:].expand(-1, steps - 1)], 1)
    with torch.no_grad():
        mask = torch.nn.functional.pad(fields["attention_mask"], (0, steps + 1), value=1)
        want = model(input_ids=ids, attention_mask=mask, pixel_values=fields["pixel_values"]).logits[:, -1]
    assert torch.allclose(out.logits[:, -1], want, atol=2e-4 * want.abs().max().item())


def test_a_policy_that_should_drop_and_does_not_says_so_once(model, fields):
    with dk.patch(model, P.Fixed(k=2, rate=0.5)):
        with pytest.warns(UserWarning, match="nothing was dropped"):
            tokens(model, fields, length=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokens(model, fields, length=1)
            tokens(model, fields)
