"""What comes between captured steps: other generations, turns of a chat, passes by hand, hooks and lists that change."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels.measuring import decoding
from dyrate_kernels.patching import graph
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import METHODS, RETENTIONS, ROWS, assert_same, greedy, logits, patched, policy, single
from tests.patching.graph.kit import ASIDE, RETENTION, STEPS, assert_same_stats, both, run


@ASIDE
@RETENTION
def test_several_generations_in_a_row(make_model, tape, retention):
    model = make_model()
    wanted, got = [], []
    batches = (ROWS, ROWS[:1], ROWS, [["text 5"]], ROWS[:2])
    for results, options in ((wanted, {"cuda_graph": False}), (got, {})):
        with patched(model, METHODS["dyrate"], retention, **options) as handle:
            for rows in batches:
                results.append((model.generate(**models.inputs(model, rows), **greedy(6)), handle.stats()))
    assert handle.graph.captures == len(batches)
    for (output, stats), (want, want_stats) in zip(got, wanted, strict=True):
        assert_same(output, want)
        assert_same_stats(stats, want_stats)


@ASIDE
@RETENTION
@pytest.mark.parametrize("method", ["none", "dyrate", "fixed", "fastv", "depth"])
def test_chat(make_model, tape, method, retention):
    model = make_model()
    first = models.inputs(model, ROWS)

    def talk(**options):
        results = []
        generator = torch.Generator().manual_seed(1)
        with patched(model, METHODS[method], retention, **options) as handle:
            output = model.generate(**first, **greedy(6))
            results.append((output, handle.stats()))
            mask = first["attention_mask"]
            for _ in range(2):
                new = torch.randint(models.FIRST_WORD, models.IMAGE_TOKEN, (4, 3), generator=generator)
                ids = torch.cat([output.sequences, new], 1)
                mask = torch.cat([mask, torch.ones(4, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
                output = model.generate(input_ids=ids, attention_mask=mask, **{cache_name(): output.past_key_values}, **greedy(6))
                results.append((output, handle.stats()))
        return results, handle

    want, _ = talk(cuda_graph=False)
    got, handle = talk()
    assert handle.graph.captures == 3
    for (output, stats), (wanted, wanted_stats) in zip(got, want, strict=True):
        assert_same(output, wanted)
        assert_same_stats(stats, wanted_stats)


@ASIDE
@pytest.mark.parametrize(
    ("retention", "method"), [*((each, "fastv") for each in RETENTIONS), ("pool=0.4", "dyrate"), ("pool=0.4", "layerwise")]
)
def test_a_second_picture_in_the_chat(make_model, tape, retention, method):
    model = make_model()
    first, second = single(model, ["text 4", "image", "text 5"]), single(model, ["text 3", "image", "text 4"], seed=9)

    def talk(**options):
        with patched(model, METHODS[method], retention, **options):
            output = model.generate(**first, **greedy(5))
            ids = torch.cat([output.sequences, second["input_ids"]], 1)
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=second["pixel_values"],
                **{cache_name(): output.past_key_values},
                **greedy(6),
            )

    assert_same(talk(), talk(cuda_graph=False))


@ASIDE
@RETENTION
def test_an_eager_step_by_hand_after_captured_ones(make_model, tape, retention):
    """The cache that generate() returns is whole: a forward by the user goes on from it."""
    model = make_model()
    fields = models.inputs(model, ROWS[:2])

    def go_on(**options):
        with patched(model, METHODS["dyrate"], retention, **options), torch.no_grad():
            output = model.generate(**fields, **greedy(6))
            steps = []
            token = output.sequences[:, -1:]
            for _ in range(4):
                steps.append(model(input_ids=token, **{cache_name(): output.past_key_values}, use_cache=True).logits)
                token = steps[-1].argmax(-1)
            return torch.stack(steps)

    got, want = go_on(), go_on(cuda_graph=False)
    assert torch.allclose(got, want, atol=1e-4)


@RETENTION
def test_results_of_a_step_are_not_overwritten(make_model, tape, retention):
    model = make_model()
    seen = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with patched(model, METHODS["dyrate"], retention) as handle:
            output = model.generate(**models.inputs(model, ROWS), **greedy(STEPS))
    finally:
        hook.remove()
    assert handle.graph.replays == STEPS - 2
    assert {type(each) for each in seen} == {type(seen[0])}
    assert all(each.past_key_values is output.past_key_values for each in seen)
    assert torch.equal(torch.stack([each.logits[:, -1].float() for each in seen]), logits(output))


@ASIDE
@RETENTION
def test_without_position_ids(make_model, tape, retention):
    """The model then counts on the host, which a replay would not."""
    model = make_model()
    fields = single(model, ROWS[0])

    def drop(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "position_ids"}

    hook = model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        used = both(model, fields, greedy(STEPS), policy="dyrate", retention=retention)
    finally:
        hook.remove()
    assert used.replays == STEPS - 2


@ASIDE
@pytest.mark.parametrize("method", ["fastv", "depth"])
def test_a_kept_list_that_someone_replaces(make_model, tape, method):
    """A list that steps only read is looked up again before every replay."""
    model = make_model()
    calls = []

    def shorten(module, args, output):
        calls.append(1)
        if len(calls) == 5:
            for group in output.past_key_values.store.groups[1:]:
                group.n_kept = (group.n_kept - 2).clamp(min=0)

    def generate(**options):
        calls.clear()
        with patched(model, METHODS[method], **options) as handle:
            return model.generate(**models.inputs(model, ROWS), **greedy(STEPS)), handle.stats(), handle

    unchanged, *_ = generate(cuda_graph=False)
    hook = model.register_forward_hook(shorten)
    try:
        want, want_stats, _ = generate(cuda_graph=False)
        got, got_stats, handle = generate()
    finally:
        hook.remove()
    assert not torch.equal(logits(want), logits(unchanged))
    assert_same(got, want)
    assert_same_stats(got_stats, want_stats)
    assert handle.graph.captures == 2


@ASIDE
def test_an_eager_step_between_replays(make_model, tape, monkeypatch):
    """The kept list of the last step is the one that the cache names, whoever made it."""
    model = make_model()
    split = graph._split
    calls = []

    def sometimes(kwargs):
        calls.append(1)
        return None if len(calls) == 8 else split(kwargs)  # the prompt does not come here

    monkeypatch.setattr(graph, "_split", sometimes)
    options = {"policy": policy(METHODS["dyrate"]), "retention": "recoverable"}
    want, _, _ = run(model, models.inputs(model, ROWS), greedy(12), {**options, "cuda_graph": False})
    assert not calls
    got, _, handle = run(model, models.inputs(model, ROWS), greedy(12), options)
    assert (handle.graph.captures, handle.graph.replays) == (1, 11 - 2)
    assert_same(got, want)
    for a, b in zip(got.past_key_values.store.groups[1:], want.past_key_values.store.groups[1:], strict=True):
        assert torch.equal(a.kept, b.kept) and torch.equal(a.n_kept, b.n_kept)


def test_a_clock_finds_the_replays_of_its_generation(make_model, tape, monkeypatch):
    model = make_model()
    wrapped = []
    monkeypatch.setattr(decoding.Clock, "_timed", lambda self, replay: wrapped.append(replay) or replay)
    with patched(model, METHODS["fixed"]) as handle:
        model.generate(**models.inputs(model, ROWS[:1]), **greedy(5, logits_processor=[decoding.Clock(model, handle)]))
        assert handle.graph.replays == 3 and len(wrapped) == 1
