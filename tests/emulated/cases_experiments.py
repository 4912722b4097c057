"""Experiment 12 of ``bench.experiments`` with the emulated kernels: every setting runs, and a result that is wrong is seen."""

from __future__ import annotations

import pytest
import torch

from bench.experiments import native, runner
from tests.emulated import harness

pytestmark = pytest.mark.skipif(not harness.PLAIN, reason="no kernel runs here that the other cases do not run under detectors")


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_every_setting_is_timed_behind_its_gate(heads):
    planned = native.beside(True, heads, 1, 24, "step")
    context = runner.Context(True, 1e9, clock=lambda work, budget: [[1e-6] * 7 for _ in [*work, work[0]]])
    with torch.no_grad():
        rows = list(runner.compare(context, planned, 1.0))
    names = ["as it is", *native.SETTINGS, *(native.ALONE if heads == "mha" else ())]
    assert [row["variant"] for row in rows][: len(names)] == [f"dyrate cuda, {name}" for name in names]
    assert all(row["correct"]["passed"] for row in rows), rows
    assert [row["changes"] for row in rows[1 : len(names)]] == list(planned.changes.values())


def test_a_wrong_result_has_no_speed(monkeypatch):
    planned = native.beside(True, "gqa", 1, 24, "plain")

    def make(context):
        case = planned.make(context)
        right = case.variants[2].gate
        case.variants[2].gate = lambda got, number: right(got._replace(output=got.output * 1.1), number)
        return case

    context = runner.Context(True, 1e9, clock=lambda work, budget: [[1e-6] * 7 for _ in [*work, work[0]]])
    with torch.no_grad():
        rows = list(runner.compare(context, runner.Planned("a", make, planned.section, planned.key), 1.0))
    assert [row["verdict"] == runner.WRONG for row in rows] == [place == 2 for place in range(len(rows))]
    assert rows[2]["median_us"] is None
