"""``bench.experiments`` at toy size: from the kernels to a table and a device file that the launcher takes."""

from __future__ import annotations

import json

import torch

from bench.experiments import chain, problems, runner, session
from dyrate_kernels import devices
from dyrate_kernels.triton_kernels import plan

EXPERIMENTS = [2, 3, 7]  # the quick ones; bench/gpu.sh OUT --toy --only experiments goes through all


def test_a_rehearsal_leaves_a_table_rows_and_no_wrong_result(tmp_path):
    with torch.no_grad():
        assert session.measure(tmp_path, EXPERIMENTS, True, 300.0) == 0
    found = json.loads((tmp_path / "experiments.json").read_text())
    assert {one["number"] for one in found["experiments"]} == {*EXPERIMENTS, 13}
    assert {row["experiment"] for row in found["rows"]} >= set(EXPERIMENTS)
    assert all(row["correct"]["passed"] and row["median_us"] and not row["measurement"] for row in found["rows"])
    text = (tmp_path / "experiments.md").read_text()
    assert "not a measurement" in text and all(f"| {row['case']} | {row['variant']} |" in text for row in found["rows"])


def test_a_proposal_is_what_the_launcher_reads(tmp_path, monkeypatch):
    """Of real launches, at times that are made up."""
    of = problems.shape(True, "mha", 1, 24)
    planned = problems.case(of, "plain", {"2 waves": {"waves": 2}})
    context = runner.Context(True, 1e9, clock=lambda work, budget: [[2e-6] * 7, [1e-6] * 7, [2e-6] * 7])
    with torch.no_grad():
        rows = list(runner.compare(context, planned, 1.0))
    path = session.write(tmp_path, rows, [])
    assert path == tmp_path / devices.file_name(plan.INTERPRETED)
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    for cached in (devices.measured, plan.settings):
        cached.cache_clear()
    try:
        usual = problems.settings_of(of, "list", context.device)
        assert plan.settings(plan.INTERPRETED, 1, 16, 4, "plain") == plan.Settings(**{**vars(usual), "waves": 2})
    finally:
        monkeypatch.undo()
        for cached in (devices.measured, plan.settings):
            cached.cache_clear()


def test_a_kernel_that_keeps_no_new_row_is_wrong():
    """What an earlier variant stored does not help it."""
    planned = problems.case(problems.shape(True, "mha", 1, 24), "plain", {"2 waves": {"waves": 2}})

    def make(context):
        case = planned.make(context)
        data = context.data(problems.shape(True, "mha", 1, 24))
        case.variants[1].calls = data.ours(problems.ops.decode_attention)
        return case

    context = runner.Context(True, 1e9)
    with torch.no_grad():
        rows = list(runner.compare(context, runner.Planned("a", make), 1.0))
    assert [row["correct"]["passed"] for row in rows] == [True, False]


def test_a_chain_of_layers_is_held_to_float64():
    planned = chain.around_attention(True)

    def make(context):
        case = planned.make(context)
        right = case.variants[0].calls[0]()
        assert case.variants[0].gate(right, 0)["passed"] and not case.variants[0].gate(right * 1.01, 0)["passed"]
        case.variants = case.variants[2:]
        return case

    with torch.no_grad():
        rows = list(runner.compare(runner.Context(True, 1e9), runner.Planned("a", make), 1.0))
    assert rows[0]["correct"]["passed"]
