"""The decision of a captured step beside the score layer's products: who reads it, who wraps it, and what a broken rule does."""

from __future__ import annotations

import contextlib

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.generation.aside import Branch
from dyrate_kernels.generation.score_layer import Scoring
from dyrate_kernels.generation.session import Session
from dyrate_kernels.patching import graph
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import METHODS, ROWS, assert_same, greedy, patched, policy
from tests.patching.graph.kit import RETENTION, STEPS, TOLD, assert_same_stats, both, run, warned

LATE = pytest.mark.parametrize("tape", ["aside, late"], indirect=True)


@RETENTION
@LATE
@pytest.mark.parametrize(("method", "forks"), [("none", 1), ("fixed", 1), ("dyrate", 1), ("pyramiddrop-k2", 1), ("layerwise", 3)])
def test_how_often_a_step_forks(make_model, tape, method, forks, retention):
    """Once a stage that decides, or for the record alone, in the warm-up as in the capture; never in a pass that nobody captures."""
    model = make_model()
    both(model, models.inputs(model, ROWS), greedy(STEPS), policy=policy(METHODS[method]), retention=retention)
    moves = retention == "evict" and method in ("dyrate", "layerwise")  # what the step before has dropped, joined with the first decision
    assert (tape.aside.forks, tape.aside.joins) == (2 * (forks + moves), 2 * forks)
    tape.aside.forks = 0
    with patched(model, METHODS[method], retention, cuda_graph=False):
        model.generate(**models.inputs(model, ROWS), **greedy(STEPS))
    assert tape.aside.forks == 0


@RETENTION
@LATE
def test_a_predictor_that_reads_hidden_states(make_model, tape, retention):
    model = make_model()
    shape = dk.patch(model).shape
    dk.unpatch(model)
    predictor = dk.DyRatePredictor.for_model(shape, (0.0, 0.3, 0.6, 0.9), k=3, text=True)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    used = both(model, models.inputs(model, ROWS), greedy(STEPS), policy=dk.policies.DyRate(predictor=predictor), retention=retention)
    assert used.captures == 1 and tape.aside.forks == 2 * (2 if retention == "evict" else 1)


@LATE
@pytest.mark.parametrize(("name", "options"), [("recycle", {"entropy": 2.0}), ("klguard", {"every": 4, "limit": 1e-4})])
@pytest.mark.parametrize("inner", ["fixed", "layerwise"])
def test_steps_that_run_again(make_model, tape, name, options, inner):
    model = make_model()
    made = dk.policies.get(name, policy=policy(METHODS[inner]), **options)
    used = both(model, models.inputs(model, ROWS), greedy(14), policy=made)
    assert used.replays > 5 and tape.aside.forks


def joins_never(monkeypatch):
    monkeypatch.setattr(Branch, "join", lambda self: None)


def joins_at_the_end(monkeypatch):
    monkeypatch.setattr(Branch, "reach", lambda self, layer: None)


def holds_nothing(monkeypatch):
    monkeypatch.setattr(Branch, "fork", lambda self, before, *read, original=Branch.fork: original(self, before))


def attends_within(monkeypatch):
    """The layer before the one that waits writes what the record reads."""
    write = Session.write

    def writes_too(self, layer, *rows):
        if layer == 2:
            self.step.add_(0)
        write(self, layer, *rows)

    @contextlib.contextmanager
    def fork(self, before, *read, original=Branch.fork):
        with original(self, before + 1, *read):
            yield

    monkeypatch.setattr(Branch, "fork", fork)
    monkeypatch.setattr(Session, "write", writes_too)


@TOLD
@LATE
@pytest.mark.parametrize(
    ("breaks", "method", "word"),
    [
        (joins_at_the_end, "dyrate", "of the main line touches what"),
        (joins_never, "none-decides", "of the main line writes what"),
        (attends_within, "fixed", "aten::add_.Tensor of the main line writes what"),
        (holds_nothing, "layerwise", "nothing refers any more to what"),
    ],
)
def test_a_broken_rule_is_seen(make_model, tape, monkeypatch, breaks, method, word):
    """By the tape; on a GPU nothing would tell. The generation goes on eagerly."""
    model = make_model()
    fields, retention = models.inputs(model, ROWS), "recoverable"
    if method == "none-decides":
        method, retention = "fixed", "evict"
    with patched(model, METHODS[method], retention, cuda_graph=False):
        want = model.generate(**fields, **greedy(STEPS))
    breaks(monkeypatch)
    with patched(model, METHODS[method], retention, cuda_graph=True) as handle:
        with pytest.warns(UserWarning, match="could not be captured") as caught:
            got = model.generate(**fields, **greedy(STEPS))
        assert "Race" in handle.graph.off and word in handle.graph.off and len(warned(caught)) == 1
    assert_same(got, want)


@RETENTION
@LATE
def test_a_warm_up_that_fails_is_joined(make_model, tape, monkeypatch, retention):
    """What runs aside may still write rows: nobody may use their memory before."""
    model = make_model()
    original = Scoring._take_effect

    def failing(self, *args):
        original(self, *args)
        if self.branch.apart:
            raise ZeroDivisionError

    monkeypatch.setattr(Scoring, "_take_effect", failing)
    with patched(model, METHODS["dyrate"], retention, cuda_graph=True) as handle:
        with pytest.raises(ZeroDivisionError):
            model.generate(**models.inputs(model, ROWS), **greedy(STEPS))
        assert handle.session is None and (tape.aside.forks, tape.aside.joins) == (2 if retention == "evict" else 1, 1)


# ---- rows that wait to be moved (retention evict) -----------------------------------------------------------------------------------

DECIDES = pytest.mark.parametrize("method", ["dyrate", "schedule", "layerwise"])


@LATE
@DECIDES
@pytest.mark.parametrize("window", [None, 39])
def test_stats_in_the_middle_count_what_waits_as_gone(tape, method, window):
    model = models.build("llava", "mistral", sliding_window=window) if window else models.build("llava")
    fields = models.inputs(model, [["text 4", "image", "text 6"], ["text 7", "image"]])

    def collect(**options):
        found = []
        with patched(model, METHODS[method], "evict", record_importance=True, **options) as handle:
            looks = [lambda ids, scores: found.append((handle.stats(), handle.session.snapshot().n_visual)) or scores]
            model.generate(**fields, **greedy(14, logits_processor=looks))
        return found

    got, want = collect(), collect(cuda_graph=False)
    assert tape.aside.forks and len(got) == len(want) == 14
    for (a, rows), (b, wanted) in zip(got, want, strict=True):
        assert_same_stats(a, b)
        assert all(map(torch.equal, rows, wanted))


@LATE
@DECIDES
def test_an_eager_step_finds_rows_where_they_belong(make_model, tape, monkeypatch, method):
    """And the captured steps after it go on with the same capture."""
    model = make_model()
    fields, split, calls = models.inputs(model, ROWS), graph._split, []
    options = {"policy": policy(METHODS[method]), "retention": "evict", "record_importance": True}
    want, want_stats, _ = run(model, fields, greedy(14), {**options, "cuda_graph": False})

    def sometimes(kwargs):
        calls.append(1)
        return None if len(calls) in (6, 9, 10) else split(kwargs)

    monkeypatch.setattr(graph, "_split", sometimes)
    got, got_stats, handle = run(model, fields, greedy(14), options)
    assert (handle.graph.captures, handle.graph.replays) == (1, 14 - 2 - 3)
    assert_same(got, want)
    assert_same_stats(got_stats, want_stats)


@LATE
@DECIDES
@pytest.mark.parametrize("stop", [5, 6])
def test_a_generation_that_is_broken_off_between_steps(make_model, tape, method, stop):
    """Its cache is whole: a forward goes on from it, sequences are reordered."""
    model = make_model()
    fields = models.inputs(model, ROWS[:2])

    def go_on(**options):
        kept = []

        def breaks(module, args, output):
            kept.append(output)
            if len(kept) == stop:
                raise KeyboardInterrupt

        with patched(model, METHODS[method], "evict", **options), torch.no_grad():
            hook = model.register_forward_hook(breaks)
            with pytest.raises(KeyboardInterrupt):
                model.generate(**fields, **greedy(STEPS))
            hook.remove()
            cache = kept[-1].past_key_values
            cache.reorder_cache(torch.tensor([1, 0]))
            assert all(group.kept is None for group in cache.store.groups)
            token = kept[-1].logits[[1, 0], -1:].argmax(-1)
            return model(input_ids=token, **{cache_name(): cache}, use_cache=True).logits

    torch.testing.assert_close(go_on(), go_on(cuda_graph=False), rtol=1e-4, atol=1e-4)


@TOLD
@LATE
@DECIDES
@pytest.mark.parametrize("layer", [1, models.LAYERS - 1])
def test_a_capture_that_fails_moves_what_waited(make_model, tape, monkeypatch, method, layer):
    model = make_model()
    fields = models.inputs(model, ROWS)
    options = {"policy": policy(METHODS[method]), "retention": "evict"}
    want, want_stats, _ = run(model, fields, greedy(STEPS), {**options, "cuda_graph": False})
    attend = Session.attend

    def failing(self, index, *args):
        output = attend(self, index, *args)
        if index == layer and tape.aside.tape is not None:
            raise NotImplementedError("no such operator in a graph")
        return output

    monkeypatch.setattr(Session, "attend", failing)
    with pytest.warns(UserWarning, match="no such operator in a graph"):
        got, got_stats, handle = run(model, fields, greedy(STEPS), {**options, "cuda_graph": True})
    assert handle.graph.captures == 0
    assert_same(got, want)
    assert_same_stats(got_stats, want_stats)
