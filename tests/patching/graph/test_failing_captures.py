"""Captures and replays that fail: the generation goes on eagerly, or the cache says that it did not finish."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.generation.session import Session
from dyrate_kernels.patching.lookup import cache_name
from dyrate_kernels.policies.base import Decision
from dyrate_kernels.policies.fixed import Fixed
from tests import models
from tests.checks import METHODS, ROWS, assert_same, greedy, patched, policy
from tests.fake_graph import Tape
from tests.patching.graph.kit import ASIDE, RETENTION, STEPS, TOLD, ReadsTheHost, assert_same_stats, run, warned


@dataclass(frozen=True)
class ReplacesItsState(Fixed):
    """A policy that breaks the other rule: its state is a new tensor in every step. Every third step keeps fewer."""

    constant = False

    def start(self, n_visual):
        return {"seen": torch.zeros_like(n_visual)}

    def decide(self, view):
        decision = super().decide(view)
        view.state["seen"] = view.state["seen"] + 1
        fewer = torch.where(view.state["seen"] % 3 == 0, decision.count // 2, decision.count)
        return Decision(decision.rate, fewer)


@ASIDE
@TOLD
@RETENTION
@pytest.mark.parametrize(
    ("broken", "word"), [(ReadsTheHost, "not permitted when stream is capturing"), (ReplacesItsState, "in place")], ids=["host", "state"]
)
def test_a_step_that_cannot_be_captured(make_model, tape, retention, broken, word):
    model = make_model()
    fields = models.inputs(model, ROWS)
    options = {"policy": broken(k=2, rate=0.4), "retention": retention}
    want, want_stats, _ = run(model, fields, greedy(STEPS), {**options, "cuda_graph": False})
    with dk.patch(model, cuda_graph=True, **options) as handle:
        with pytest.warns(UserWarning, match=word) as caught:
            got = model.generate(**fields, **greedy(STEPS))
        assert len(warned(caught)) == 1
        stats = handle.stats()
        assert word in handle.graph.off
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = model.generate(**fields, **greedy(STEPS))
    assert handle.graph.captures == 0
    assert_same(got, want)
    assert_same(again, want)
    assert_same_stats(stats, want_stats)


@ASIDE
@TOLD
@RETENTION
@pytest.mark.parametrize("layer", [0, 1, 3, models.LAYERS - 1])
def test_an_operator_that_fails_in_a_capture(make_model, tape, monkeypatch, retention, layer):
    """At whatever layer it breaks off: rows, lengths and records are as if nothing had been tried."""
    model = make_model()
    fields = models.inputs(model, ROWS)
    options = {"policy": policy(METHODS["fixed"]), "retention": retention, "cuda_graph": False}
    want, want_stats, _ = run(model, fields, greedy(STEPS), options)
    attend = Session.attend

    def failing(self, index, *args):
        output = attend(self, index, *args)
        if index == layer and isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), Tape):
            raise NotImplementedError("no such operator in a graph")
        return output

    monkeypatch.setattr(Session, "attend", failing)
    with patched(model, METHODS["fixed"], retention, cuda_graph=True) as handle:
        with pytest.warns(UserWarning, match="NotImplementedError: no such operator in a graph"):
            got = model.generate(**fields, **greedy(STEPS))
        stats = handle.stats()
    assert_same(got, want)
    assert_same_stats(stats, want_stats)


def test_an_interrupted_capture_leaves_the_cache_whole(make_model, tape, monkeypatch):
    model = make_model()
    fields = models.inputs(model, ROWS)
    seen = []

    def interrupted(step):
        seen.append(step)
        raise KeyboardInterrupt

    with patched(model, METHODS["dyrate"], cuda_graph=True) as handle:
        with monkeypatch.context() as patching:
            patching.setattr(tape, "record", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(**fields, **greedy(STEPS))
        assert seen and handle.session is None
        want = model.generate(**fields, **greedy(STEPS))
        assert handle.graph.replays == STEPS - 2
    assert_same(run(model, fields, greedy(STEPS), {"policy": "dyrate", "cuda_graph": False})[0], want)


def test_a_replay_that_fails_spoils_the_cache_as_a_forward_would(make_model, tape, monkeypatch):
    model = make_model()
    fields = models.inputs(model, ROWS)
    caches = []
    hook = model.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    replay = Tape.replay

    def failing(self):
        failing.calls += 1
        if failing.calls == 3:
            raise RuntimeError("device-side assert")
        replay(self)

    failing.calls = 0
    try:
        with patched(model, METHODS["dyrate"], cuda_graph=True):
            with monkeypatch.context() as patching:
                patching.setattr(Tape, "replay", failing)
                with pytest.raises(RuntimeError, match="device-side assert"):
                    model.generate(**fields, **greedy(STEPS))
            with torch.no_grad(), pytest.raises(RuntimeError, match="did not finish"):
                model(input_ids=fields["input_ids"][:, -1:], **{cache_name(): caches[-1]})
            model.generate(**fields, **greedy(STEPS))
    finally:
        hook.remove()
