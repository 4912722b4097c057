"""Decoding modes: sampling, beams, several answers, chunks, drafts, chat; and what a decode step may not do."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.generation import cpu_step
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import (
    METHODS,
    PICTURES_FIRST,
    RETENTIONS,
    ROWS,
    VARIANTS,
    assert_same,
    assert_same_decisions,
    greedy,
    logits,
    patched,
    rows_for,
    rows_for_beams,
    single,
)
from tests.oracle import Oracle, Turn

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
# every family with the method that decides most; every method with two families
CASES = [(family, text, "dyrate") for family, text in models.VARIANTS] + [
    ("llava", text, method) for text in ("llama", "mistral") for method in ("fixed", "fastv-mean", "depth", "schedule")
]
CASE = pytest.mark.parametrize(("family", "text", "method"), CASES, ids=["-".join(case) for case in CASES])

MODES = {
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 30},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 2, "do_sample": True},
    "several-answers": {"do_sample": True, "num_return_sequences": 2},
    "several-beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
}


@CASE
@RETENTION
@pytest.mark.parametrize("mode", ["sampling", "beams", "several-answers"])
def test_mode(make_model, family, text, method, retention, mode):
    _mode(make_model(family, text), rows_for(family)[:3], METHODS[method], retention, MODES[mode])


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "vtw", "uniform", "pyramiddrop", "layerwise", "sparsevlm"])
@pytest.mark.parametrize("mode", ["sampled-beams", "several-beams"])
def test_more_modes(make_model, method, retention, mode):
    _mode(make_model(), ROWS, METHODS[method], retention, MODES[mode])


def _mode(model, rows, rule, retention, options):
    fields = models.inputs(model, rows_for_beams(rows) if "num_beams" in options else rows)
    options = greedy(6, **options)
    oracle = Oracle(model, rule, retention)
    torch.manual_seed(5)
    want = oracle.generate(**fields, **options)
    with patched(model, rule, retention):
        torch.manual_seed(5)
        got = model.generate(**fields, **options)
    assert_same(got, want)
    if getattr(want, "sequences_scores", None) is not None:
        assert torch.allclose(got.sequences_scores, want.sequences_scores, atol=1e-4)


@RETENTION
def test_beams_that_end_at_different_steps(make_model, retention):
    model = make_model()
    fields = models.inputs(model, rows_for_beams(ROWS))
    options = greedy(12, num_beams=3, eos_token_id=list(range(5, 25)))
    rule = METHODS["dyrate"]
    want = Oracle(model, rule, retention).generate(**fields, **options)
    with patched(model, rule, retention):
        assert_same(model.generate(**fields, **options), want)


@RETENTION
def test_rows_that_end_at_different_steps(make_model, retention):
    model = make_model()
    fields = models.inputs(model, ROWS)
    options = greedy(12, eos_token_id=list(range(5, 30)))
    rule = METHODS["dyrate"]
    want = Oracle(model, rule, retention).generate(**fields, **options)
    with patched(model, rule, retention):
        assert_same(model.generate(**fields, **options), want)


@VARIANTS
@RETENTION
@pytest.mark.parametrize("chunk", [7, 16])
def test_chunked_prefill(make_model, family, text, retention, chunk):
    _chunked(make_model(family, text), rows_for(family), METHODS["dyrate"], retention, chunk)


@RETENTION
@pytest.mark.parametrize("method", ["fixed", "fastv", "vtw", "depth", "schedule", "uniform", "pyramiddrop", "layerwise", "sparsevlm"])
def test_chunked_prefill_of_every_method(make_model, method, retention):
    _chunked(make_model(), ROWS, METHODS[method], retention, 10)


@RETENTION
@pytest.mark.parametrize("chunk", [1, 13, 40])
def test_chunked_prefill_rated_through_a_window(make_model, retention, chunk):
    """The rows that rate come in several chunks, and see less of the picture the later they come."""
    _chunked(make_model("llava", "mistral"), ROWS, METHODS["sparsevlm"], retention, chunk)


@RETENTION
@pytest.mark.parametrize("chunk", [1, 63, 64, 1000])
def test_chunk_lengths(make_model, retention, chunk):
    _chunked(make_model(), ROWS, METHODS["fixed"], retention, chunk)


def _chunked(model, rows, rule, retention, chunk):
    if not PICTURES_FIRST:
        pytest.skip("this transformers gives no picture to a prompt in chunks")
    fields = models.inputs(model, rows)
    try:
        model.generate(**fields, **greedy(2, prefill_chunk_size=chunk))
    except ValueError as error:
        pytest.skip(f"this transformers cannot: {error}")
    want = Oracle(model, rule, retention).generate(**fields, **greedy(6))  # the answer does not depend on the chunks
    with patched(model, rule, retention):
        assert_same(model.generate(**fields, **greedy(6, prefill_chunk_size=chunk)), want)


# -- drafts --------------------------------------------------------------------------------------------------------------------------------


def _echo(model, row, seed=0):
    """A prompt whose end repeats its beginning and its own text, so that prompt lookup has something to propose from the first pass on."""
    fields = single(model, row, seed=seed)
    ids = fields["input_ids"]
    ids[0, -6:] = torch.tensor([11, 12, 13, 11, 12, 13])
    return fields


@VARIANTS
@RETENTION
def test_prompt_lookup(make_model, family, text, retention):
    _drafted(make_model(family, text), METHODS["dyrate"], retention, prompt_lookup_num_tokens=3, eos_token_id=-1)


@RETENTION
@pytest.mark.parametrize(
    "method", ["none", "fixed", "fastv", "vtw", "depth", "schedule", "uniform", "dyrate-closed-k1", "pyramiddrop", "layerwise", "sparsevlm"]
)
def test_prompt_lookup_with_every_method(make_model, method, retention):
    _drafted(make_model(), METHODS[method], retention, prompt_lookup_num_tokens=4, eos_token_id=-1)


@pytest.mark.parametrize(("family", "text"), [("llava", "llama"), ("llava", "mistral"), ("llava_next", "llama"), ("vipllava", "llama")])
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "schedule", "dycoke"])
def test_assistant_model(make_model, family, text, method, retention):
    """The unpruned model drafts for the pruned one: some drafts are accepted, some are not."""
    model = make_model(family, text)
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    _drafted(model, METHODS[method], retention, assistant_model=assistant)


def _drafted(model, rule, retention, **options):
    """``options`` turn the drafting on; prompt lookup of transformers 5.6 needs an ``eos_token_id``, and -1 is never generated."""
    fields = _echo(model, ["text 5", "image", "text 8"])
    want = Oracle(model, rule, retention, frozen=True).generate(**fields, **greedy(14))
    plain = model.generate(**fields, **greedy(14))
    try:
        unpatched = model.generate(**fields, **greedy(14, **options))
    except RuntimeError as error:
        pytest.skip(f"this transformers cannot: {error}")
    if unpatched.sequences.shape[1] > plain.sequences.shape[1]:
        pytest.skip("this transformers generates more than max_new_tokens when it drafts")
    assert_same(unpatched, plain, scores=False)  # the mode itself works
    with patched(model, rule, retention):
        got = model.generate(**fields, **greedy(14, **options))
    if not PICTURES_FIRST and got.sequences.shape[1] > want.sequences.shape[1]:
        pytest.skip("this transformers generates more than max_new_tokens when it drafts")
    assert_same(got, want)


@RETENTION
def test_patched_model_as_the_assistant(make_model, retention):
    model = make_model()
    drafter = copy.deepcopy(model)
    fields = _echo(model, ["text 5", "image", "text 8"])
    want = model.generate(**fields, **greedy(10))
    with patched(drafter, METHODS["dyrate"], retention):
        got = model.generate(**fields, **greedy(10, assistant_model=drafter))
    assert_same(got, want)


# -- chat ----------------------------------------------------------------------------------------------------------------------------------


def _extend(previous, fields, extra, generator):
    """The next turn's ids and mask: what was said so far and ``extra`` new tokens."""
    ids = previous.sequences
    new = torch.randint(models.FIRST_WORD, models.IMAGE_TOKEN, (ids.shape[0], extra), generator=generator)
    ids = torch.cat([ids, new], 1)
    ones = torch.ones(ids.shape[0], ids.shape[1] - fields["attention_mask"].shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([fields["attention_mask"], ones], 1)}


@pytest.mark.parametrize(("family", "text"), [("llava", "llama"), ("llava", "mistral"), ("llava_next", "llama"), ("video_llava", "llama")])
@RETENTION
@pytest.mark.parametrize("method", ["none", "fixed", "dyrate", "vtw"])
def test_three_turns_of_chat(make_model, family, text, method, retention):
    model = make_model(family, text)
    generator = torch.Generator().manual_seed(1)
    rule = METHODS[method]
    fields = models.inputs(model, rows_for(family))
    pictures = {name: value for name, value in fields.items() if name not in ("input_ids", "attention_mask")}
    oracle = Oracle(model, rule, retention)
    turns: list[Turn] = []
    start, cache = 0, None
    with patched(model, rule, retention) as handle:
        for _ in range(3):
            now = {k: v for k, v in fields.items() if k in ("input_ids", "attention_mask")}
            want = oracle.generate(before=turns, start=start, **now, **pictures, **greedy(5))
            if cache is None:
                got = model.generate(**now, **pictures, **greedy(5))
            else:
                got = model.generate(**now, **{cache_name(): cache}, **greedy(5))
            assert_same(got, want)
            turns.append(Turn(start, now["input_ids"].shape[1]))
            start, cache = got.sequences.shape[1] - 1, got.past_key_values
            fields = _extend(got, now, 4, generator)
        assert handle.stats().steps[0].step == 0


@pytest.mark.parametrize("retention", ["recoverable", "evict", "pool=0.5"])
@pytest.mark.parametrize("method", ["dyrate", "layerwise"])
def test_a_chat_goes_in_and_out_of_inference_mode(make_model, method, retention):
    """What is made in it may not be written outside of it; the second turn grows and replaces tensors, the third writes them."""
    model = make_model()
    fields = models.inputs(model, ROWS)
    found = []
    with patched(model, METHODS[method], retention):
        for modes in ((False, False, False), (True, False, True), (False, True, False), (True, True, False)):
            now, cache, generator = fields, {}, torch.Generator().manual_seed(1)
            for inside in modes:
                with torch.inference_mode(inside):
                    got = model.generate(**now, **cache, **greedy(14))
                cache = {cache_name(): got.past_key_values}
                now = _extend(got, {name: now[name] for name in ("input_ids", "attention_mask")}, 4, generator)
            if retention != "evict":
                got.past_key_values.crop(-3)
            got.past_key_values.batch_select_indices(torch.tensor([1, 0, 2]))
            got.past_key_values.reset()
            found.append(got.sequences.clone())
    assert all(torch.equal(each, found[0]) for each in found[1:])


@pytest.mark.parametrize(("family", "text"), [("llava", "llama"), ("llava", "qwen2"), ("vipllava", "llama")])
@RETENTION
@pytest.mark.parametrize("method", ["none", "fixed", "fastv", "dyrate", "pyramiddrop", "sparsevlm"])
def test_second_image_in_the_second_turn(make_model, family, text, method, retention):
    model = make_model(family, text)
    rule = METHODS[method]
    first = single(model, ["text 4", "image", "text 5"])
    second = single(model, ["text 3", "image", "text 4"], seed=9)
    oracle = Oracle(model, rule, retention)
    want = oracle.generate(**first, **greedy(5))
    with patched(model, rule, retention):
        got = model.generate(**first, **greedy(5))
        assert_same(got, want)
        ids = torch.cat([got.sequences, second["input_ids"]], 1)
        mask = torch.ones_like(ids)
        turn = Turn(0, first["input_ids"].shape[1])
        pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
        start = got.sequences.shape[1] - 1
        want = oracle.generate(before=[turn], start=start, input_ids=ids, attention_mask=mask, pixel_values=pixels, **greedy(5))
        got = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=second["pixel_values"], **{cache_name(): got.past_key_values}, **greedy(5)
        )
    assert_same(got, want)


@RETENTION
def test_first_image_in_the_second_turn(make_model, retention):
    model = make_model()
    rule = METHODS["fixed"]
    first, second = single(model, ["text 6"]), single(model, ["text 3", "image", "text 4"], seed=9)
    oracle = Oracle(model, rule, retention)
    with patched(model, rule, retention):
        got = model.generate(**first, **greedy(4))
        ids = torch.cat([got.sequences, second["input_ids"]], 1)
        mask = torch.ones_like(ids)
        start = got.sequences.shape[1] - 1
        turn = Turn(0, first["input_ids"].shape[1])
        pixels = second["pixel_values"]
        want = oracle.generate(before=[turn], start=start, input_ids=ids, attention_mask=mask, pixel_values=pixels, **greedy(5))
        got = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **{cache_name(): got.past_key_values}, **greedy(5))
    assert_same(got, want)


# -- what a step may not do ----------------------------------------------------------------------------------------------------------------


class _DecodeSteps:
    """Runs a mode inside every one-token forward pass of a model."""

    def __init__(self, model, mode):
        self.model, self.mode, self.steps = model, mode, 0
        self.inside = False

    def __enter__(self):
        self.hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _before(self, module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            self.inside = True
            self.steps += 1
            self.mode.__enter__()

    def _after(self, module, args, kwargs, output):
        if self.inside:
            self.inside = False
            self.mode.__exit__(None, None, None)


@RETENTION
@pytest.mark.parametrize(
    "method", ["none", "dyrate", "dyrate-trained", "fixed", "fastv", "vtw", "depth", "schedule", "uniform", "sparsevlm"]
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_no_host_sync_in_a_decode_step(make_model, host_sync, monkeypatch, method, retention, options):
    monkeypatch.setattr(cpu_step, "enabled", False)  # which reads what a CPU has computed; here the way is the one that a GPU takes
    model = make_model("llava", "llama" if method == "dyrate-trained" else "mistral")  # a predictor belongs to one model
    fields = models.inputs(model, ROWS)
    plain = host_sync()
    with _DecodeSteps(model, plain) as steps:
        model.generate(**fields, **greedy(6, **options))
    assert steps.steps == 5
    ours = host_sync()
    with patched(model, METHODS[method], retention):
        with _DecodeSteps(model, ours) as steps:
            output = model.generate(**fields, **greedy(6, **options))
        assert steps.steps == 5
        assert not ours.ours(), ours.ours()
        assert len(ours.found) <= len(plain.found), (ours.found, plain.found)
        reorder = host_sync()
        with reorder:
            output.past_key_values.reorder_cache(torch.arange(output.sequences.shape[0] * options.get("num_beams", 1)))
        assert not reorder.found


@RETENTION
def test_autocast_makes_of_a_patched_model_what_it_makes_of_the_model(make_model, retention):
    """Rotated queries and keys are float32 there, values are not; the cache and attention take all of them in bfloat16."""
    model, found = make_model(), []
    for patches in (False, True):
        with torch.autocast("cpu", torch.bfloat16), patched(model, METHODS["none"], retention) if patches else contextlib.nullcontext():
            output = model.generate(**models.inputs(model, ROWS[:1]), **greedy(6))
            found.append(output)
    cache = found[1].past_key_values.store
    assert {tensor.dtype for tensor in (*cache.keys, *cache.values)} == {torch.bfloat16}
    for want, got in zip(*map(logits, found), strict=True):
        torch.testing.assert_close(got.float(), want.float(), atol=0.1, rtol=0.0)


def test_the_mode_that_counts_host_syncs_counts_them(host_sync):
    mode = host_sync()
    tensor = torch.arange(4)
    with mode:
        tensor[0].item()
        bool(tensor[1] > 0)
        tensor[tensor > 1]
        tensor.nonzero()
        tensor.tolist()
        tensor.numpy()
        tensor[0] + 1
    assert len(mode.found) >= 6


@RETENTION
def test_sequence_of_decisions_is_recorded_for_beams(make_model, retention):
    model = make_model()
    with patched(model, METHODS["fixed"], retention) as handle:
        model.generate(**models.inputs(model, ROWS), **greedy(5, num_beams=3))
        stats = handle.stats()
    assert len(stats.steps) == 5
    assert stats.visual_tokens == [n for n in (25, 50, 0, 25) for _ in range(3)]
    assert all(step.kept == [n // 2 for n in stats.visual_tokens] for step in stats.steps[1:])


@RETENTION
def test_stats_of_a_second_turn(make_model, retention):
    model = make_model()
    rule = METHODS["fixed"]
    fields = single(model, ROWS[0])
    oracle = Oracle(model, rule, retention)
    with patched(model, rule, retention) as handle:
        got = model.generate(**fields, **greedy(4))
        following = _extend(got, fields, 3, torch.Generator().manual_seed(2))
        turn = Turn(0, fields["input_ids"].shape[1])
        start = got.sequences.shape[1] - 1
        model.generate(**following, **{cache_name(): got.past_key_values}, **greedy(4))
        stats = handle.stats()
    oracle.generate(before=[turn], start=start, **following, pixel_values=fields["pixel_values"], **greedy(4))
    assert len(stats.steps) == 4
    assert_same_decisions(stats, oracle)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@RETENTION
def test_the_older_name_of_the_cache(make_model, retention):
    """``past_key_values=`` goes on working where transformers calls the argument ``cache``, in ``generate`` and in a plain forward."""
    model = make_model()
    fields = single(model, ROWS[0])
    results = []
    for name in (cache_name(), "past_key_values"):
        with patched(model, METHODS["fixed"], retention) as handle:
            got = model.generate(**fields, **greedy(4))
            following = _extend(got, fields, 3, torch.Generator().manual_seed(2))
            got = model.generate(**following, **{name: got.past_key_values}, **greedy(4))
            assert len(handle.stats().steps) == 4
            mask = torch.ones(1, got.sequences.shape[1], dtype=torch.int64)
            with torch.no_grad():
                last = model(input_ids=got.sequences[:, -1:], attention_mask=mask, **{name: got.past_key_values}).logits
        results.append((got.sequences, last))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@RETENTION
def test_stats_of_one_sequence(make_model, retention):
    """The parts sum to the whole; an answer's first tokens are counted as if it had ended there."""
    model = make_model()
    fields = models.inputs(model, ROWS)
    with patched(model, METHODS["dyrate"], retention) as handle:
        model.generate(**fields, **greedy(6, min_new_tokens=6))
        whole, parts, short = handle.stats(), [handle.stats(b) for b in range(4)], handle.stats(1, 3)
        for wrong in ({"sequence": 4}, {"new_tokens": 7}, {"new_tokens": 0}):
            with pytest.raises(ValueError, match="must be in"):
                handle.stats(**wrong)
        model.generate(**fields, **greedy(3, min_new_tokens=3))
        assert short == handle.stats(1)
    assert sum(part.kv_bytes_live for part in parts) == whole.kv_bytes_live
    assert sum(part.flops for part in parts) == pytest.approx(whole.flops, rel=1e-12)
    assert [[part.steps[i].kept[0] for part in parts] for i in range(6)] == [step.kept for step in whole.steps]


def test_what_a_policy_remembers_goes_with_accepted_drafts_alone(make_model):
    """Each step keeps what it keeps in plain decoding; refused drafts leave nothing behind."""
    model = make_model()
    drafted = 0
    for seed in range(4):
        fields = _echo(model, ["text 5", "image", "text 2", "image", "text 8"], seed)
        found = []
        for options in ({}, {"prompt_lookup_num_tokens": 3, "eos_token_id": -1}):
            with dk.patch(model, dk.policies.DyCoke(k=2, rate=0.6, similarity=0.9), record_importance=True) as handle:
                tokens = model.generate(**fields, **greedy(12, **options)).sequences[0, : fields["input_ids"].shape[1] + 12]
                found.append((tokens.tolist(), [step.kept_tokens[0] for step in handle.stats().steps[:12]]))
        assert found[0] == found[1]
        drafted += len({str(kept) for kept in found[0][1]}) > 2
    assert drafted  # sets changed on the way
