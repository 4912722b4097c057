"""The patched model with ``backend="cuda"``, emulated: the reference backend's tokens and kept counts, eagerly and in a captured step."""

from __future__ import annotations

import pytest

import dyrate_kernels as dk
from dyrate_kernels.patching import graph
from tests import end_to_end
from tests.emulated import harness
from tests.fake_graph import TapeRecorder


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.fixture(autouse=True)
def order():
    harness.configure(*harness.ORDERS[-1])


@pytest.mark.parametrize("policy, retention, options", harness.some(end_to_end.GENERATIONS, 2), ids=str)
def test_tokens_equal_the_references(demo, policy, retention, options):
    end_to_end.assert_tokens_equal_the_references(demo, "cuda", policy, retention, options, steps=8 if harness.PLAIN else 3)


@pytest.mark.parametrize(
    "policy, retention", harness.some([("dyrate", "evict"), ("fixed", "recoverable"), ("dyrate", "recoverable"), ("dyrate", "pool=0.5")])
)
def test_replayed_steps(policy, retention, monkeypatch):
    recorder = TapeRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    end_to_end.assert_replays_equal_the_references("cuda", policy, retention)
