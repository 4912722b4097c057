"""A captured decode step (a tape in place of the graph) with the Triton backend: tokens and kept counts of the eager reference."""

from __future__ import annotations

import pytest

from dyrate_kernels.patching import aside, graph
from dyrate_kernels.triton_kernels import plan
from tests import end_to_end
from tests.fake_graph import TapeRecorder
from tests.interpreter import harness

LARGE = plan.Settings(block_n=64, min_blocks=4)


@pytest.mark.parametrize("retention", ["recoverable", "evict", "pool=0.5"])
@pytest.mark.parametrize("where", ["in line", "aside"])
@pytest.mark.parametrize("policy", ["dyrate", "fixed"])
def test_replayed_steps(policy, where, retention, monkeypatch):
    recorder = TapeRecorder(late=True)
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    monkeypatch.setattr(aside, "_override", where == "aside")
    with harness.settings(LARGE):
        end_to_end.assert_replays_equal_the_references("triton", policy, retention)
    assert bool(recorder.aside.forks) == (where == "aside")
