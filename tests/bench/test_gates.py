"""The gates of ``pytest bench`` and ``bench.operators``: an operator that is broken on purpose has no speed."""

from __future__ import annotations

import json

import pytest
import torch

from bench import expected, fastv, operators, test_decode
from bench.conftest import DECISION
from dyrate_kernels import ops
from dyrate_kernels.ops import reference

SHAPES = [operators.Shape("mha", 2, 24, 8, 2, 2, 16, torch.float32), operators.Shape("gqa", 2, 24, 8, 4, 2, 16, torch.float32)]
ATTENTION = ("dyrate decode_attention", test_decode.STATISTICS, test_decode.STEP, "dyrate pruned layer: 12.5 % through the kept list",
             "dyrate score_last_query (prefill)")  # fmt: skip
NEW = {name: f"dyrate {name}, {operators.NEW_ROW}" for name in operators.FORMS}
PAGED = {f"dyrate {name}" for name in operators.PAGED}
STATISTICS = {test_decode.STATISTICS, test_decode.STEP, ATTENTION[-1], NEW["decode_attention with statistics"], NEW["decode_step"],
              "dyrate paged_step"}  # fmt: skip
STEPS = {test_decode.STEP, NEW["decode_step"], "dyrate paged_step"}


def failing(shape=SHAPES[1]):
    """Rows whose gate does not pass."""
    data = operators.Data(shape, "reference", torch.device("cpu"), sets=2)
    found = []
    for name in test_decode.CASES:
        try:
            case = test_decode.made(data, name)
        except pytest.skip.Exception:
            continue
        number = len(case.calls) - 1
        if not (case.gate(case.calls[0](), 0)["passed"] and case.gate(case.calls[-1](), number)["passed"]):
            found.append(name)
    return found


def swap(monkeypatch, name, change):
    original = getattr(reference, name)
    monkeypatch.setattr(reference, name, change(original))


def more_importance(original):
    def statistics(weights, *args):
        mass, importance = original(weights, *args)
        return mass, None if importance is None else importance * 1.02

    return statistics


def no_image_mass(original):
    def statistics(*args):
        mass, importance = original(*args)
        return mass if mass is None else mass * torch.tensor([1.0, 0.5, 1.0, 1.0]), importance

    return statistics


BROKEN = {
    "scale": ("_probabilities", lambda f: lambda query, rows, scale: f(query, rows, 1.3 * scale), {*ATTENTION, *NEW.values(), *PAGED}),
    "importance": ("_statistics", more_importance, STATISTICS),
    "mass": ("_statistics", no_image_mass, STATISTICS),
    "selection": (
        "select_tokens",
        lambda f: lambda score, *args, **more: f(-score, *args, **more),
        {*STEPS, "dyrate select_tokens (its second half)"},
    ),
    "count": ("keep_count", lambda f: lambda *args: f(*args) + 1, STEPS),
    "rate": (
        "predict_rate",
        lambda f: lambda *args, **named: tuple(part.flip(0) if part.dtype == torch.int64 else part * 0 for part in f(*args, **named)),
        {*STEPS, "dyrate predict_rate (the decision's first half)"},
    ),
    "new row": ("append", lambda f: lambda *args: None, set(NEW.values())),
    "nothing moved": ("compact_", lambda f: lambda *args: None, {"dyrate compact_, one layer"}),
    "rows mixed up": (
        "compact_",
        lambda f: lambda rows, *args: [f(rows, *args), [tensor.copy_(tensor.flip(2)) for tensor in rows]][0],
        {"dyrate compact_, one layer"},
    ),
}


def test_what_is_right_passes():
    assert failing() == [] == failing(SHAPES[0])


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_fails_and_nothing_else(monkeypatch, case):
    name, change, wrong = BROKEN[case]
    swap(monkeypatch, name, change)
    assert set(failing()) == wrong


def test_fastv_is_held_to_its_choice_and_its_rows(monkeypatch):
    original = fastv.step
    broken = [
        lambda *args, **more: original(*args, **more)._replace(stays=torch.arange(11).expand(2, -1)),
        lambda *args, **more: (found := original(*args, **more))._replace(key=found.key.flip(2)),
    ]
    for change in broken:
        monkeypatch.setattr(fastv, "step", change)
        assert failing() == [test_decode.FASTV]


def test_equal_scores_may_come_in_any_order():
    score = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    for index, wrong in (([0, 1, 4], 0), ([0, 2, 4], 0), ([0, 3, 4], 1), ([1, 2, 4], 1), ([0, 1, 3], 1), ([1, 0, 4], 1)):
        assert expected.fastv_wrong(score, torch.tensor([index]), 2, 4, 5) == wrong


def test_wrong_from_the_second_set_on_has_no_speed():
    """Results are looked at after the clock ran, too."""
    data = operators.Data(SHAPES[0], "reference", torch.device("cpu"), sets=2)
    calls = data.ours(ops.decode_attention)
    times, passed = operators.measured([calls[0], calls[0]], operators.attention_gate(data))
    assert not passed["passed"] and operators.measured(calls, operators.attention_gate(data))[1]["passed"]
    row = operators.row("x", times, passed, group="attention")
    assert row["median_us"] is None and row["GB_per_s"] is None and row["note"].startswith("wrong, so it has no speed")


def rows_of(shape):
    facts = {"backend": "reference", "bandwidth": 1e9, **shape.facts()}
    return {row["name"]: row for row in operators.our_attention_rows(operators.Data(shape, "reference", torch.device("cpu"), 2), facts)}


def test_operators_are_timed_with_a_new_row_as_a_model_calls_them(monkeypatch):
    rows = rows_of(SHAPES[1])
    assert all(row["correct"]["passed"] for row in rows.values())
    timed = ("decode_attention", "decode_attention with statistics", "decode_attention, 12.5 % kept", "decode_step")
    for name in timed:
        new = rows[f"dyrate {name}, with a new row"]
        assert new["median_us"] is not None and new["bytes"] - rows[f"dyrate {name}"]["bytes"] == SHAPES[1].new_row_bytes
    swap(monkeypatch, "append", lambda original: lambda *args: None)
    wrong = {name for name, row in rows_of(SHAPES[1]).items() if not row["correct"]["passed"]}
    assert wrong == {f"dyrate {name}, with a new row" for name in timed}


def test_operators_print_no_speed_of_what_is_wrong(monkeypatch, tmp_path, capsys):
    swap(monkeypatch, "_probabilities", BROKEN["scale"][1])
    monkeypatch.setattr(operators, "operators_backends", lambda toy: ["reference"])
    monkeypatch.setattr(operators, "shapes", lambda toy: SHAPES[1:])
    monkeypatch.setattr(operators.layers, "rows", lambda *args: iter(()))
    out = tmp_path / "rows.json"
    assert operators.run_and_save(out, lambda save: operators.collect(True, 30.0, save)) == 1
    rows = json.loads(out.read_text())
    wrong = [row for row in rows if row["correct"] is not None and not row["correct"]["passed"]]
    assert {row["name"] for row in wrong} >= {"dyrate decode_attention", "dyrate decode_step", "dyrate score_last_query"}
    assert all(row["median_us"] is None for row in wrong) and any(row["name"] == "dense torch SDPA" and row["median_us"] for row in rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert len(lines) == len(wrong) and not any(" us" in line for line in lines)


def test_the_rows_of_the_decision_exist():
    assert set(DECISION) <= set(test_decode.CASES)
