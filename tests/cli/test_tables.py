"""Tables on screens of any width: nothing is cut, no line is longer, every cell is there once."""

from __future__ import annotations

import re

import pytest

from dyrate_kernels.cli import common

HEADS = ("policy", *(f"column {number}" for number in range(7)))
ROWS = [
    ["fastv_rate=0.75@evict", *(f"{number}.25 [{number}.00, 9.99]" for number in range(7))],
    ["a longer name of a set-up, in several words", *(f"{100 + number} KiB" for number in range(7))],
    ["short", "not measured"],
]


@pytest.mark.parametrize("columns", [48, 80, 120, 200])
def test_columns_that_do_not_fit_follow_below(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    common.print_table("long answers (4 questions, of which none is short), a title that is longer than some screens are", HEADS, ROWS)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns and "…" not in out
    for row in ROWS[:2]:
        for cell in row[1:]:
            assert len(re.findall(rf"(?<!\S){re.escape(cell)}(?!\S)", out)) == 1, cell
    tables = out.count("─\n")
    assert (tables == 1) == (columns == 200)
    if columns >= 80:  # a name of one word that fits is whole
        assert len(re.findall(r"^fastv_rate=0\.75@evict ", out, re.MULTILINE)) == tables


def test_a_pipe_of_no_width_gets_whole_tables(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    common.print_table("answers", HEADS, ROWS)
    out = capsys.readouterr().out
    assert out.count("─\n") == 1 and max(map(len, out.splitlines())) > 120
