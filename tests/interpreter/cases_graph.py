"""A captured decode step (a tape in place of the graph) with the Triton backend: tokens and kept counts of the eager reference."""

from __future__ import annotations

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.patching import graph
from dyrate_kernels.triton_kernels import plan
from tests import models
from tests.checks import ROWS, greedy
from tests.fake_graph import TapeRecorder

LARGE = plan.Settings(block_n=64, min_blocks=4)


@pytest.mark.parametrize("retention", ["recoverable", "evict"])
@pytest.mark.parametrize("policy", ["dyrate", "fixed"])
def test_replayed_steps(policy, retention, monkeypatch):
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:2])
    chosen = dk.policies.get(policy, k=1)
    with dk.patch(model, chosen, retention=retention, backend="reference") as handle:
        want, stats = model.generate(**fields, **greedy(5)), handle.stats()
    recorder = TapeRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    plan.override(LARGE)
    try:
        with dk.patch(model, chosen, retention=retention, backend="triton", cuda_graph=True) as handle:
            got = model.generate(**fields, **greedy(5))
            assert handle.graph.off is None and (handle.graph.captures, handle.graph.replays) == (1, 3)
            assert [step["kept"] for step in handle.stats().to_dict()["steps"]] == [step["kept"] for step in stats.to_dict()["steps"]]
    finally:
        plan.override(None)
    assert torch.equal(got.sequences, want.sequences)
