"""A comparison beside an earlier one, and the differences between methods of one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dyrate_kernels.evaluation import against, report
from dyrate_kernels.evaluation.table import lead, summarise
from tests.evaluation.test_table import answer


def answers(rights, label="x"):
    return [answer(f"q{place}", float(right)) for place, right in enumerate(rights)]


def test_pairs_agree_where_intervals_overlap(tmp_path):
    rng = np.random.default_rng(0)
    whole = answers(np.ones(200))
    good, bad = answers(rng.random(200) < 0.9), answers(rng.random(200) < 0.5)
    (tmp_path / "table.json").write_text(
        json.dumps({"lines": [summarise(label, "long", each, whole).to_dict() for label, each in (("a", good), ("b", bad))]})
    )
    before = against.read_lines(tmp_path / "table.json")
    for encoding in ("utf-8-sig", "utf-16"):  # as editors and shells save it
        (tmp_path / "odd.json").write_text((tmp_path / "table.json").read_text(), encoding=encoding)
        assert against.read_lines(tmp_path / "odd.json") == before
    lines = [summarise(label, "long", answers(rng.random(200) < 0.9), whole) for label in ("a", "b", "c")]
    found = against.pairs([*lines, summarise("a", "other", good, whole)], before, ("long", "short"))
    assert [(pair.label, pair.agrees) for pair in found] == [("a", True), ("b", False)]
    for text in ("{", "{}", '{"lines": [{"label": 1}]}', "[]"):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong\.json must be the table\.json"):
            against.read_lines(tmp_path / "wrong.json")
    with pytest.raises(ValueError, match=r"nothing\.json"):
        against.read_lines(tmp_path / "nothing.json")


def test_a_lead_is_paired():
    rng = np.random.default_rng(1)
    hard = rng.random(300) < 0.5
    better = hard | (rng.random(300) < 0.1)
    value, low, high = lead(answers(better), answers(hard))
    assert value == pytest.approx(better.mean() - hard.mean()) and 0 < low < value < high < 0.1
    assert lead(answers(hard), answers(hard)) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same questions"):
        lead(answers(hard), answers(hard)[::-1])


def test_leads_have_a_row_a_method_and_a_column_a_cost_where_costs_are_the_same():
    ones, half = answers(np.ones(40)), answers(np.arange(40) % 2)
    given = {"none": ones, "dyrate@50": ones, "fastv@evict@50": half, "dyrate@20": half, "fastv@evict@20": ones, "vtw": half}
    costs = {"dyrate@50": 0.5, "fastv@evict@50": 0.506, "dyrate@20": 0.2, "fastv@evict@20": 0.2}
    given = {label: [replace(each, visual_share=costs.get(label, 1.0)) for each in those] for label, those in given.items()}
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in report.leads(given).splitlines()]
    assert rows[0] == ["dyrate less ..", "at 50 %", "at 20 %"] and len(rows) == 3 and rows[2][0] == "fastv@evict"
    assert rows[2][1].startswith("+50.0 [+") and rows[2][2].startswith("-50.0 [-")
    assert report.leads({"none": ones, "vtw": half}) == ""
    given["fastv@evict@20"] = [replace(each, visual_share=0.51) for each in given["fastv@evict@20"]]
    assert report.leads(given).splitlines()[2].split("|")[3].strip() == "-"
    line = summarise("fastv@evict@20", "short", given["fastv@evict@20"], ones)
    assert report.shown_label(line) == "fastv@evict@20 (here 51.0)"
    assert report.shown_label(replace(line, visual_share=0.205)) == "fastv@evict@20"
    assert report.shown_label(replace(line, label="vtw")) == "vtw"
