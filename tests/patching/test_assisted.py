"""Assisted decoding: drafted tokens give what plain decoding gives, in tokens, in what was kept and in what is counted."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import METHODS, RETENTIONS, assert_close_logits, assert_same, greedy, logits, patched, single
from tests.oracle import Oracle, Turn

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
LOOKUP = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "eos_token_id": -1}  # -1 is never generated
PROMPTS = {
    "text-last": ["text 5", "image", "text 8"],
    "picture-last": ["text 5", "image", "text 4", "image"],
    "picture-alone": ["image"],
    "no-picture": ["text 9"],
}
# methods that decide in different ways, and where each is tried; under evict with drafts, only what the prompt decides takes effect
AT_EVERY_STEP = ("fixed", "dyrate", "dycoke", "layerwise", "schedule-grows")
AT_THE_PROMPT = ("none", "fastv-mean", "vtw", "depth", "sparsevlm", "aim-k1")
POOLED = [(method, "pool=0.4:by=0.5") for method in AT_EVERY_STEP]


def drafting(model, how):
    """Options of ``generate`` that draft from the first pass on."""
    if how == "lookup":
        return LOOKUP
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": assistant}


def prompt(model, row, seed=0):
    """Text that repeats itself, so that the first pass has something to look up."""
    fields = single(model, row, seed=seed)
    ids = fields["input_ids"]
    text = (ids[0] < models.IMAGE_TOKEN).nonzero()[:, 0]
    ids[0, text] = 11 + torch.arange(len(text)) % 3
    return fields


def assert_same_stats(got, want):
    """All that is counted, but for the buffers (drafts need room) and rounding of what was measured."""
    got, want = ({name: value for name, value in each.to_dict().items() if name != "kv_bytes_reserved"} for each in (got, want))
    steps, wanted = got.pop("steps"), want.pop("steps")
    assert got == want
    assert len(steps) == len(wanted)
    for step, other in zip(steps, wanted, strict=True):
        for name in ("mass", "importance"):
            assert torch.allclose(torch.tensor(step.pop(name, 0)), torch.tensor(other.pop(name, 0)), atol=1e-5)
        assert step == other


@pytest.mark.parametrize("row", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(
    ("method", "retention"),
    [*itertools.product([*AT_EVERY_STEP, *AT_THE_PROMPT, "fixed-nothing-left", "pyramiddrop"], RETENTIONS), *POOLED],
)
def test_tokens_are_those_of_masks(make_model, method, retention, row):
    model, rule = make_model(), METHODS[method]
    if method == "dycoke" and retention == "evict":
        pytest.skip("the oracle selects anew where the kept set is frozen")
    fields = prompt(model, row)
    want = Oracle(model, rule, retention, frozen=True).generate(**fields, **greedy(7))
    ways = [drafting(model, how) for how in ("lookup", "assistant")]
    with patched(model, rule, retention):
        for options in ways if retention != "evict" or method in AT_EVERY_STEP else [{}, *ways]:
            assert_same(model.generate(**fields, **greedy(7, **options)), want)


@pytest.mark.parametrize(
    ("method", "retention"),
    [(method, "recoverable") for method in (*AT_EVERY_STEP, *AT_THE_PROMPT)] + [(method, "evict") for method in AT_THE_PROMPT] + POOLED,
)
@pytest.mark.parametrize("row", [PROMPTS["text-last"], PROMPTS["no-picture"]], ids=["picture", "no-picture"])
def test_stats_are_those_of_plain_decoding(make_model, method, retention, row):
    """Refused drafts count nowhere: not in steps, kept tokens, FLOPs, bytes or costs."""
    model, rule = make_model(), METHODS[method]
    fields = prompt(model, row)
    ways = [drafting(model, how) for how in ("lookup", "assistant")]
    for length in (1, 9):
        with patched(model, rule, retention, record_importance=True) as handle:
            plain, want = model.generate(**fields, **greedy(length)), handle.stats()
            assert len(want.steps) == length
            for options in ways:
                assert_same(model.generate(**fields, **greedy(length, **options)), plain)
                assert_same_stats(handle.stats(), want)


@RETENTION
def test_an_end_among_the_accepted_drafts(make_model, retention):
    """The answer ends within the drafts; what was drafted past its end is no step."""
    model = make_model()
    fields, assistant = prompt(model, PROMPTS["text-last"]), drafting(model, "assistant")
    with patched(model, METHODS["fastv"], retention) as handle:
        answer = model.generate(**fields, **greedy(12)).sequences[0, fields["input_ids"].shape[1] :].tolist()
        for end in sorted({*answer}):
            plain, want = model.generate(**fields, **greedy(12, eos_token_id=end)), handle.stats()
            got = model.generate(**fields, **greedy(12, eos_token_id=end, **assistant))
            assert_same(got, plain)
            assert_same_stats(handle.stats(), want)


def test_columns_cropped_later_leave_the_stats_of_a_generation(make_model):
    model = make_model()
    fields = prompt(model, PROMPTS["text-last"])
    with patched(model, METHODS["fixed"]) as handle:
        cache = model.generate(**fields, **greedy(6)).past_key_values
        want = handle.stats()
        cache.crop(-3)
        assert handle.stats() == want


# -- chat ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "retention"),
    [*itertools.product(["dyrate", "dyrate-closed-k1", "fastv", "layerwise", "pyramiddrop"], RETENTIONS), *POOLED],
)
@pytest.mark.parametrize("second", [["text 7"], ["text 3", "image", "text 4"], ["image"]], ids=["text", "picture", "picture-last"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole-conversation", "only-new-ids"])
def test_two_turns_of_chat_are_those_of_masks(make_model, method, retention, second, whole):
    """A turn decides anew as in plain decoding. transformers gives the first pass all that was said, whatever the cache holds."""
    model, rule = make_model(), METHODS[method]
    if retention == "recoverable" and second == ["text 7"] and not rule.decides_while_decoding:
        pytest.skip("the oracle decides again without a new picture")
    first, more = prompt(model, PROMPTS["text-last"], seed=1), prompt(model, second, seed=2)
    oracle, options = Oracle(model, rule, retention, frozen=True), drafting(model, "lookup")
    want = oracle.generate(**first, **greedy(5))
    ids = torch.cat([want.sequences, more["input_ids"]], 1)
    mask, pictures = torch.ones_like(ids), {name: more[name] for name in ("pixel_values",) if name in more}
    turn, start = Turn(0, first["input_ids"].shape[1]), want.sequences.shape[1] - 1
    pixels = torch.cat([fields["pixel_values"] for fields in (first, pictures) if fields])
    then = oracle.generate(before=[turn], start=start, input_ids=ids, attention_mask=mask, pixel_values=pixels, **greedy(6))
    with patched(model, rule, retention) as handle:
        got = model.generate(**first, **greedy(5, **options))
        assert_same(got, want)
        cache = got.past_key_values
        given = ids if whole else ids[:, cache.get_seq_length() :]
        got = model.generate(input_ids=given, attention_mask=mask, **pictures, **{cache_name(): cache}, **greedy(6, **options))
        assert got.sequences[0, given.shape[1] :].tolist() == then.sequences[0, ids.shape[1] :].tolist()
        assert_close_logits(logits(got), logits(then))
        assert len(handle.stats().steps) == 6


@pytest.mark.parametrize("whole", [True, False], ids=["whole-conversation", "only-new-ids"])
def test_a_chat_whose_picture_was_reduced(make_model, whole):
    """The mask that hides what the reducers took is that of the conversation, not of the new ids."""
    model = make_model()
    first, more = prompt(model, ["image", "text 6"]), prompt(model, PROMPTS["no-picture"])
    found = []
    for options in ({}, LOOKUP):
        with patched(model, METHODS["dyrate"], vision="uniform:keep=0.4") as handle:
            got = model.generate(**first, **greedy(4))
            ids, cache = torch.cat([got.sequences, more["input_ids"]], 1), got.past_key_values
            given = ids if whole else ids[:, cache.get_seq_length() :]
            got = model.generate(input_ids=given, attention_mask=torch.ones_like(ids), **{cache_name(): cache}, **greedy(8, **options))
            found.append((got, handle.stats()))
    assert_same(found[1][0], found[0][0])
    assert_same_stats(found[1][1], found[0][1])


# -- policies whose steps come one at a time -------------------------------------------------------------------------------------------

ONE_AT_A_TIME = {
    "recycle": dk.policies.Recycle(policy=dk.policies.Fixed(k=2, rate=0.9), entropy=1.0, share=1.0),
    "recycle-fastv": dk.policies.Recycle(policy=dk.policies.FastV(k=2, rate=0.9), entropy=0.0, share=1.0),
    "recycle-layerwise": dk.policies.Recycle(policy=dk.policies.LayerWise(k=2, groups=2), entropy=1.0),
    "recycle-aim": dk.policies.Recycle(policy=dk.policies.AIM(k=2, end=4), entropy=1.0),
    "klguard": dk.policies.KLGuard(policy=dk.policies.Fixed(k=2, rate=0.9), every=2, limit=0.01),
}


@pytest.mark.parametrize("row", [PROMPTS["picture-last"], PROMPTS["no-picture"]], ids=["picture", "no-picture"])
@pytest.mark.parametrize("policy", ONE_AT_A_TIME.values(), ids=ONE_AT_A_TIME)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_policies_that_see_each_result_decode_token_by_token(make_model, policy, row, sampled):
    """They decide, and check, as in plain decoding; the user is told once."""
    model = make_model()
    fields = prompt(model, row)
    ways = [drafting(model, how) for how in ("lookup", "assistant")]
    for options in ways:
        with dk.patch(model, policy) as handle, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = []
            for more in ({}, options, options):
                torch.manual_seed(3)
                found.append((model.generate(**fields, **greedy(10) | {"do_sample": sampled}, **more), handle.stats()))
        plain, want = found[0]
        for got, stats in found[1:]:
            assert_same(got, plain)
            assert stats == want
        assert sum("no token can be drafted ahead" in str(each.message) for each in told) == 1


class CountsSteps(dk.policies.LayerWise):
    """Remembers what all its groups did, so that no step can be decided before the one ahead of it is through."""

    name = "counts-steps"
    remembers = True

    def start(self, n_visual):
        return {**super().start(n_visual), "calls": torch.zeros(n_visual.shape[0], dtype=torch.int64)}

    def decide(self, view):
        view.state["calls"].add_(1)
        decision = super().decide(view)
        decision.count = torch.minimum(decision.count, (view.state["calls"] % 7 + 3).int())
        return decision


def test_a_policy_that_remembers_across_groups_decodes_token_by_token(make_model):
    model = make_model()
    fields = prompt(model, PROMPTS["text-last"])
    with dk.patch(model, CountsSteps(k=2, groups=2)) as handle:
        want, kept = model.generate(**fields, **greedy(10)), [step.kept for step in handle.stats().steps]
        with pytest.warns(UserWarning, match="counts-steps.*drafted ahead"):
            got = model.generate(**fields, **greedy(10, **drafting(model, "lookup")))
        assert_same(got, want)
        assert kept == [step.kept for step in handle.stats().steps]


def test_a_cache_of_the_callers_own_is_drafted_for_as_unpatched(make_model):
    from transformers import DynamicCache

    model = make_model()
    fields = prompt(model, PROMPTS["text-last"])
    want = model.generate(**fields, **greedy(8, **LOOKUP), **{cache_name(): DynamicCache()})
    with dk.patch(model, ONE_AT_A_TIME["recycle"]), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        got = model.generate(**fields, **greedy(8, **LOOKUP), **{cache_name(): DynamicCache()})
    assert_same(got, want)
    assert not any("drafted" in str(each.message) for each in told)


# -- a patched model that drafts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(
    ("method", "retention"),
    [
        *itertools.product(["fixed", "fixed-nothing-left", "pyramiddrop", "dyrate"], RETENTIONS),
        ("dyrate", "pool=0.5"),
        ("layerwise", "pool=1"),
    ],
)
def test_a_patched_model_drafts_for_another_whatever_its_prompt_ends_with(make_model, method, retention, row):
    """Where its first draft is refused, it reads the last column of the prompt again: a token of a picture, perhaps."""
    model = make_model()
    drafter = drafting(models.build("llava", "llama", seed=5), "assistant")["assistant_model"]
    fields = prompt(model, row)
    want = model.generate(**fields, **greedy(6))
    with patched(drafter, METHODS[method], retention):
        assert_same(model.generate(**fields, **greedy(6, assistant_model=drafter)), want)


@RETENTION
def test_a_drafter_whose_drafts_are_padding_ids(make_model, retention):
    """transformers hides a draft with the id of padding from the drafting model; that is no padded prompt."""
    model = make_model()
    fields = prompt(model, PROMPTS["text-last"])
    want = model.generate(**fields, **greedy(6))
    drafter = drafting(model, "assistant")["assistant_model"]
    for word in want.sequences[0, fields["input_ids"].shape[1] :].tolist():
        drafter.generation_config.pad_token_id = word
        with patched(drafter, METHODS["fixed"], retention):
            assert_same(model.generate(**fields, **greedy(6, assistant_model=drafter)), want)


@pytest.mark.parametrize("row", [PROMPTS["text-last"], PROMPTS["picture-last"]], ids=["text-last", "picture-last"])
@RETENTION
def test_a_model_with_reducers_drafts_for_itself(make_model, retention, row):
    """It reads the last column of its reduced prompt again where the first draft is refused."""
    model = make_model()
    fields = prompt(model, row)
    for seed in range(3):
        vision = f"random:keep=0.3:seed={seed}"
        with patched(model, METHODS["vtw"], retention, vision=vision) as handle:
            want, counted = model.generate(**fields, **greedy(6)), handle.stats()
            assert_same(model.generate(**fields, **greedy(6, assistant_model=model)), want)
            assert_same_stats(handle.stats(), counted)


def test_right_padding_is_told_from_drafts_that_follow_it(make_model):
    model = make_model()
    fields = prompt(model, PROMPTS["text-last"])
    fields["attention_mask"][0, -1] = 0
    with patched(model, METHODS["fixed"]), pytest.raises(ValueError, match="right padding"):
        model.generate(**fields, **greedy(6, **LOOKUP))
