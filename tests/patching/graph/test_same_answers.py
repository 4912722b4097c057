"""``patch(model)``: captured decode steps give the answers of eager ones. Without a GPU a tape stands in for the graph."""

from __future__ import annotations

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.generation import kv_store
from dyrate_kernels.generation.session import Session
from tests import models
from tests.checks import METHODS, ROWS, greedy, logits, policy, rows_for_beams
from tests.patching.graph.kit import ASIDE, LINES, RETENTION, STEPS, assert_same_stats, both, run


@LINES
@RETENTION
@pytest.mark.parametrize("method", METHODS)
def test_method(make_model, tape, method, retention):
    model = make_model()
    used = both(model, models.inputs(model, ROWS), greedy(STEPS), policy=policy(METHODS[method]), retention=retention)
    assert (used.captures, used.replays, tape.steps) == (1, STEPS - 2, 1)


@ASIDE
@RETENTION
@pytest.mark.parametrize("name", ["random", "uniform", "fixed"])
def test_kept_tokens(make_model, tape, name, retention):
    model = make_model()
    chosen = dk.policies.get(name, k=2, rate=0.6)
    both(model, models.inputs(model, ROWS[:2]), greedy(STEPS), policy=chosen, retention=retention, record_importance=True)


@LINES
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "dyrate-trained", "fixed", "fastv", "depth", "schedule"])
def test_bit_for_bit(make_model, tape, monkeypatch, method, retention):
    """With the text bound at capacity in both, a replay does to the bit what an eager step does; but for rows that move a step later, whose
    order, and so that of the sums over them, is another one in the step that decides.
    """
    monkeypatch.setattr(Session, "bounds_at_capacity", True)
    model = make_model()
    options = {"policy": policy(METHODS[method]), "retention": retention, "record_importance": True}
    fields = models.inputs(model, ROWS)
    want, want_stats, _ = run(model, fields, greedy(STEPS), {**options, "cuda_graph": False})
    got, got_stats, handle = run(model, fields, greedy(STEPS), options)
    assert handle.graph.replays == STEPS - 2
    assert torch.equal(got.sequences, want.sequences)
    tolerance = 1e-5 if tape.aside.forks > 2 else 0.0  # a fork to decide, and one to move rows
    assert tolerance == 0.0 or retention == "evict"
    torch.testing.assert_close(logits(got), logits(want), rtol=tolerance, atol=tolerance)
    assert_same_stats(got_stats, want_stats, tolerance)
    for a, b in zip(got.past_key_values.store.keys, want.past_key_values.store.keys, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)  # what waited to be moved has moved


MODES = {
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 30},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 2, "do_sample": True},
    "several-answers": {"do_sample": True, "num_return_sequences": 2},
    "rows-end-early": {"eos_token_id": list(range(5, 30))},
    "no-cache-of-masks": {"use_cache": True, "repetition_penalty": 1.2},
}


@ASIDE
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fixed", "fastv", "depth"])
@pytest.mark.parametrize("mode", MODES)
def test_mode(make_model, tape, method, retention, mode):
    model = make_model()
    fields = models.inputs(model, rows_for_beams(ROWS) if "beams" in mode else ROWS)
    used = both(model, fields, greedy(STEPS, **MODES[mode]), policy=policy(METHODS[method]), retention=retention, record_importance=True)
    if mode == "rows-end-early":
        assert used.replays >= used.captures
    else:
        assert (used.captures, used.replays) == (1, STEPS - 2)


@ASIDE
@RETENTION
@pytest.mark.parametrize(("family", "text"), models.VARIANTS, ids=["-".join(each) for each in models.VARIANTS])
def test_family(make_model, tape, family, text, retention):
    model = make_model(family, text)
    rows = ROWS[:2] if family != "video_llava" else [["text 4", "image", "text 6"], ["text 7"]]
    used = both(model, models.inputs(model, rows), greedy(STEPS), policy="dyrate", retention=retention)
    assert used.captures == 1


@ASIDE
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fastv"])
def test_a_sliding_window_is_reached_in_the_middle(tape, method, retention):
    model = models.build("llava", "mistral", sliding_window=39)
    fields = models.inputs(model, [["text 4", "image", "text 6"], ["text 7"]])
    assert fields["input_ids"].shape[1] == 35
    used = both(model, fields, greedy(14), policy=policy(METHODS[method]), retention=retention)
    assert used.captures == 2
    assert used.replays == 13 - 2


@ASIDE
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fixed"])
def test_text_region_and_record_grow_in_the_middle(make_model, tape, monkeypatch, method, retention):
    monkeypatch.setattr(kv_store, "ROUND", 4)
    begin = Session.begin_turn
    monkeypatch.setattr(
        Session, "begin_turn", lambda self, prompt, longest, frozen, **options: begin(self, prompt, prompt + 2, frozen, **options)
    )
    model = make_model()
    used = both(model, models.inputs(model, ROWS[:2]), greedy(40), policy=policy(METHODS[method]), retention=retention)
    assert 3 <= used.captures <= 8
    assert used.replays == 39 - used.captures


@ASIDE
@RETENTION
def test_no_picture(make_model, tape, retention):
    model = make_model()
    used = both(model, models.inputs(model, [["text 9"], ["text 4"]]), greedy(STEPS), policy="dyrate", retention=retention)
    assert used.captures == 1


@ASIDE
@pytest.mark.parametrize("pool", ["pool=0.5", "pool=0.3:by=uniform"])
@pytest.mark.parametrize("method", [name for name, rule in METHODS.items() if rule.decides_while_decoding])
def test_choosing_within_a_pool(make_model, tape, monkeypatch, method, pool):
    """To the bit, in beams too."""
    monkeypatch.setattr(Session, "bounds_at_capacity", True)
    model = make_model()
    options = {"policy": policy(METHODS[method]), "retention": pool, "record_importance": True}
    for more in ({}, {"num_beams": 2}):
        fields = models.inputs(model, rows_for_beams(ROWS) if more else ROWS)
        want, want_stats, _ = run(model, fields, greedy(STEPS, **more), options)
        got, got_stats, handle = run(model, fields, greedy(STEPS, **more), {**options, "cuda_graph": True})
        assert handle.graph.replays == STEPS - 2 and handle.graph.captures == 1
        assert torch.equal(got.sequences, want.sequences) and torch.equal(logits(got), logits(want))
        assert got_stats.to_dict() == want_stats.to_dict()


@ASIDE
@pytest.mark.parametrize("method", ["dyrate", "layerwise"])
def test_a_window_is_reached_within_a_pool(tape, method):
    model = models.build("llava", "mistral", sliding_window=39)
    fields = models.inputs(model, [["text 4", "image", "text 6"], ["text 7"]])
    used = both(model, fields, greedy(14), policy=policy(METHODS[method]), retention="pool=0.5", record_importance=True)
    assert (used.captures, used.replays) == (2, 13 - 2)


@ASIDE
@RETENTION
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_answers(make_model, tape, length, retention):
    model = make_model()
    used = both(model, models.inputs(model, ROWS[:1]), greedy(length), policy="dyrate", retention=retention)
    assert used.replays == max(length - 2, 0)
