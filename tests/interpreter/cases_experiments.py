"""``bench.experiments`` at toy size: from the kernels to a table and a device file that the launcher takes."""

from __future__ import annotations

import json

import pytest
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
    """Rows that an earlier variant stored do not help it."""
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


@pytest.mark.parametrize("rows", [1, 3])
def test_a_chain_of_layers_is_held_to_float64(monkeypatch, rows):
    """Two layers: norms behind what a block adds, between layers too. A variant that leaves out a part of it is wrong."""
    monkeypatch.setattr(chain, "TOY_LAYERS", 2)
    case = chain.around_attention(True, chain.sizes.TOY[0], rows).make(runner.Context(True, 1e9))
    names = [variant.name for variant in case.variants]
    assert names[0] == "as it is" and names[-1] == "torch" and ("residual and norm in the product" in names) == (rows == 1)
    with torch.no_grad():
        for variant in case.variants:
            got = variant.calls[0]()
            assert variant.gate(got, 0)["passed"], variant.name
            assert not variant.gate(got * 1.01, 0)["passed"]


def test_a_rotation_that_is_left_out_is_wrong():
    case = chain.rotation(True, "gqa", 2, "list").make(runner.Context(True, 1e9))
    with torch.no_grad():
        for variant in case.variants:
            variant.prepare()
            got = variant.calls[0]()
            assert variant.gate(got, 0)["passed"], variant.name
        turned = case.variants[1].calls[0]
        monkey = problems.ops.decode_attention
        try:
            problems.ops.decode_attention = lambda *args, cos=None, sin=None, **more: monkey(*args, **more)
            case.variants[1].prepare()
            assert not case.variants[1].gate(turned(), 0)["passed"]
        finally:
            problems.ops.decode_attention = monkey
