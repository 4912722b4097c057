"""Uses of the rows of benchmarks: the backend of each operator, targets, plots, tables, comparisons. The rows here are made up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import choose_backend, operators, plots, report, targets
from dyrate_kernels import devices
from dyrate_kernels.measuring import end_to_end

RIGHT, WRONG = {"passed": True, "errors": {}}, {"passed": False, "errors": {}}


def row(name, backend, median, batch=32, correct=RIGHT, measured=True, **facts):
    begin = "dyrate cuda" if backend == "cuda" else "dyrate"
    same = {"B": batch, "N": 2880, "heads": "32/32x128", "dtype": "bfloat16", "group": "attention", "gpu": "ACME GPU", "commit": "0"}
    found = {"name": f"{begin} {name}", "backend": backend, "median_us": median, "correct": correct, "measurement": measured}
    return {**same, **found, "share_of_copy": 0.95, "times_floor": 1.05, **facts}


def test_the_sizes_that_gpu_sh_asks_pytest_for_exist():
    """On a CPU it asks for none, so only the names can be checked."""
    from _pytest.mark.expression import Expression

    text = (Path(__file__).parents[2] / "bench" / "gpu.sh").read_text()
    asked = Expression.compile(re.search(r'^few=.* \|\| echo "(.+)"\)$', text, re.MULTILINE).group(1))
    found = []
    for kind in ("mha", "gqa"):
        for batch in (1, 8, 32, 64):
            for visual in (576, 2880, 16384):
                word = operators.Shape(f"{kind} B={batch} N={visual}", batch, visual, 128, 32, 32, 128, torch.bfloat16).word()
                if asked.evaluate(lambda name, word=word, **_: name.lower() in word.lower()):
                    found.append((kind, batch, visual))
    assert found == [(kind, *size) for kind in ("mha", "gqa") for size in ((1, 576), (32, 2880))]


def test_the_faster_backend_is_chosen_from_rows_that_both_measured_rightly():
    rows = [
        row("decode_attention", "triton", 100.0),
        row("decode_attention", "cuda", 80.0),
        row("decode_attention, 12.5 % kept", "triton", 10.0),
        row("decode_attention, 12.5 % kept", "cuda", 10.0),
        row("decode_attention", "triton", 10.0, batch=1),
        row("decode_attention", "cuda", 1.0, batch=1, correct=WRONG),  # does not count
        row("decode_step", "triton", 100.0),
        row("decode_step", "cuda", 99.5),  # within the noise
        row("select_tokens", "triton", 10.0),
        row("select_tokens", "cuda", 5.0, measured=False),  # a rehearsal
        row("compact_, 2880 -> 720", "triton", 20.0),
        row("compact_, 2880 -> 720", "cuda", 40.0),
        row("reorder_ of one layer", "cuda", 1.0),  # alone
        row("decision (decode_step minus attention with statistics)", "triton", 9.0),
        row("decision (decode_step minus attention with statistics)", "cuda", 1.0),  # no operator
    ]
    chosen, measured = choose_backend.choose(rows)
    assert chosen == {"decode_attention": "cuda", "decode_step": "triton", "compact_": "triton"}
    assert measured["decode_attention"]["rows"] == 2
    assert measured["decode_attention"]["cuda_over_triton"] == pytest.approx(0.8**0.5)
    assert measured["compact_"]["cuda_over_triton"] == pytest.approx(2.0)


def test_the_choice_is_written_beside_what_the_file_holds(tmp_path, monkeypatch, capsys):
    (tmp_path / devices.file_name("ACME GPU")).write_text('{"device": "ACME GPU", "settings": {"kind": 1}}')
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    rows = tmp_path / "rows"
    rows.write_text(json.dumps([row("compact_, 2880 -> 720", "triton", 20.0), row("compact_, 2880 -> 720", "cuda", 10.0)]))
    monkeypatch.setattr(sys, "argv", ["choose_backend", str(rows)])
    choose_backend.main()
    devices.measured.cache_clear()
    body = devices.measured("ACME GPU")
    devices.measured.cache_clear()
    assert body["settings"] == {"kind": 1} and body["backend"] == {"compact_": "cuda"}
    assert "0.500 over 1 rows" in capsys.readouterr().out
    both = [row("compact_, 2880 -> 720", "triton", 10.0), row("compact_, 2880 -> 720", "cuda", 20.0)]
    (tmp_path / "report.json").write_text(json.dumps(record(both)))
    for given in (tmp_path, tmp_path / "report.json"):
        monkeypatch.setattr(sys, "argv", ["choose_backend", str(given), "--out", str(tmp_path / "chosen")])
        choose_backend.main()
        assert json.loads((tmp_path / "chosen").read_text())["backend"] == {"compact_": "triton"}
    monkeypatch.setattr(sys, "argv", ["choose_backend", str(rows)])
    rows.write_text("[]")
    with pytest.raises(SystemExit, match="nothing is written"):
        choose_backend.main()


def test_targets_have_a_line_for_each_backend():
    rows = [
        row("decode_attention with statistics", "triton", 100.0),
        row("decode_attention with statistics", "cuda", 120.0, share_of_copy=0.8),
        row("decode_attention", "triton", 99.0),
        row("decode_attention", "cuda", 100.0),
    ]
    lines = {(line["what"][:45], line["backend"]): line for line in targets.targets(rows)}
    share = "decode_attention with statistics, B=32, N=288"
    assert lines[share, "triton"]["met"] is True and lines[share, "cuda"]["met"] is False
    cost = next(
        line for line in targets.targets(rows) if line["what"].startswith("statistics on against off, MHA") and line["backend"] == "cuda"
    )
    assert cost["measured"] == pytest.approx(0.2) and cost["met"] is False
    assert not any(line["backend"] == "cuda" for line in targets.targets(rows[:1]))
    assert all(line["met"] is None for line in targets.targets([row("decode_attention", "triton", 1.0, measured=False)]))


def test_plots_show_measured_rows_that_are_right(tmp_path):
    rows = [
        row("decode_step", "triton", 20.0, bytes=2_000_000, floor_us=1.0),
        row("decode_step", "triton", 10.0, bytes=1_000_000, floor_us=1.0),
        row("decode_step", "cuda", 9.0, bytes=1_000_000, floor_us=1.0, correct=WRONG),
        row("select_tokens", "triton", 1.0, bytes=1_000, floor_us=1.0),  # its time is latency: no point of a plot of bandwidth
        row("decode_attention", "triton", None, bytes=1_000, floor_us=1.0),
        row("a step", "triton", 5.0, group="model", model="LLaVA", floor_us=4.0),
        row("a wrong step", "triton", 5.0, group="model", model="LLaVA", floor_us=4.0, correct=WRONG),
    ]
    assert {name: [row["median_us"] for row in found] for name, found in plots.series(rows).items()} == {"dyrate decode_step": [10.0, 20.0]}
    assert [row["name"] for row in plots.shown(rows) if row["group"] == "model"] == ["dyrate a step"]
    here = {"gpu": "ACME GPU", "torch": "2", "measurement": False}
    (tmp_path / "report.json").write_text(json.dumps({"environment": here, "rows": rows}))
    written = plots.write(tmp_path)
    assert [path.name for path in written] == ["bandwidth.png", "models.png"] and all(path.stat().st_size > 5000 for path in written)
    (tmp_path / "report.json").write_text(json.dumps({"environment": here, "rows": []}))
    assert plots.write(tmp_path) == []


HERE = {"gpu": "ACME GPU", "torch": "2", "triton": "3", "transformers": "5", "commit": "c0ffee", "measurement": True}


def record(rows, **facts):
    return {"environment": HERE | facts, "rows": rows, "targets": targets.targets(rows)}


def test_plots_over_visual_tokens_and_over_steps(tmp_path):
    rows = [row("decode_attention", "triton", 10.0 * n, N=n, bytes=1000 * n, floor_us=9.0 * n) for n in (576, 2880)]
    steps = {"group": "model", "model": "LLaVA", "floor_us": 4.0, "kept_by_step": [1.0, 0.5, 0.25]}
    rows += [row("generate(), dyrate, evict", "triton", 5.0, **steps), row("generate(), wrong", "triton", 5.0, correct=WRONG, **steps)]
    (tmp_path / "report.json").write_text(json.dumps(record(rows)))
    assert [path.name for path in plots.write(tmp_path)] == ["bandwidth.png", "visual.png", "models.png", "kept.png"]


def test_tables_show_what_is_right_and_nothing_else():
    steps = {"group": "model", "model": "LLaVA", "kept": 0.125, "over_unpatched": 0.5, "first_token_us": 2500.0, "images_per_s": 3.25}
    rows = [
        row("decode_attention with statistics", "triton", 123.4),
        row("decode_step", "triton", 77.7, correct=WRONG),
        row("generate(), dyrate, evict", "triton", 5432.0, **steps),
        row("generate(), wrong", "triton", 111.0, correct=WRONG, **steps),
    ]
    text = report.tables(record(rows))
    assert "| dyrate decode_attention with statistics | 123 |" in text
    assert "| dyrate generate(), dyrate, evict | 12.5 % | 5.43 ms | 50 % | 1.05 | 2.50 ms | 3.25 |" in text
    assert "78" not in text and "wrong" not in text and "| met |" in text
    assert end_to_end.PAIRED in text
    lines = [line for line in text.splitlines() if line.startswith("| decode_attention with statistics,")]
    assert len(lines) == 1 and "| triton | >= 0.95 | 0.95 | met |" in lines[0]
    both = [row("decode_attention with statistics", "triton", 123.4), row("decode_attention with statistics", "cuda", 100.0)]
    assert "| cuda | >= 0.95 | 0.95 | met |" in report.tables(record(both))
    old = row("unpatched captured step", "triton", 222.0, correct=None, gate_of_twin=WRONG, **steps)
    assert "captured" not in report.tables(record([old])), "older records kept the twin's gate apart"
    assert "not a measurement" not in text
    assert "not a measurement" in report.tables(record([row("decode_step", "triton", 1.0, measured=False)], measurement=False))


def test_tables_and_plots_of_whole_requests(tmp_path):
    times = {"encode_us": 2e4, "first_token_us": 9e4, "predicted_request_us": 4e5, "request_us": 5e5, "images_per_s": 2.0}
    facts = {"group": "model", "model": "LLaVA", "kept": 1.0, "floor_us": 4.0, "over_unpatched": 0.5}
    rows = [row("generate(), dense", "triton", 5000.0, new_tokens=length, **facts | times) for length in (64, 256)]
    rows += [row("captured step, dense", "triton", 4000.0, new_tokens=40, **facts)]
    text = report.tables(record(rows))
    line = "| dyrate generate(), dense | 100.0 % | 5.00 ms | 50 % | 1.05 | 20.00 ms | 90.00 ms | 500.00 ms | 400.00 ms | 2 |"
    assert text.count(line) == 2 and "visual tokens, 64 new tokens |" in text and "visual tokens, 256 new tokens |" in text
    assert "| dyrate captured step, dense | 100.0 % | 4.00 ms | 50 % | 1.05 |  |  |" in text
    (tmp_path / "report.json").write_text(json.dumps(record(rows)))
    assert tmp_path / "models.png" in plots.write(tmp_path)
    other = json.loads(json.dumps(rows))
    other[1]["median_us"] = 2500.0
    assert "| 2500 | 0.500 |" in report.compare(record(rows), record(other)), "of the same length"


def test_a_report_prints_no_speed_of_a_row_that_is_wrong():
    facts = {"p20_us": 71.0, "p80_us": 72.0, "GB_per_s": 73.0, "floor_us": 74.0}
    shares = {"share_of_copy": 0.76, "times_floor": 7.7}
    rows = [row("decode_step", "triton", 70.0, correct=WRONG, **facts | shares), row("decode_step", "cuda", 60.0, **facts)]
    here = HERE | {"backends": {}}
    text = report.markdown({**record(rows), "environment": here, "parts": [], "speed_ups": []})
    shape = "32 | 2880 | 32/32x128 | bfloat16"
    assert f"| dyrate decode_step | {shape} |  |  |  |  |  | 74 |  | NO |" in text
    assert f"| dyrate cuda decode_step | {shape} | 60 | 71 | 72 | 73 | 0.95 | 74 | 1.05 | yes |" in text


def test_tables_of_rows_alone_and_of_other_files(tmp_path, monkeypatch, capsys):
    versions = {"torch": "2", "triton": "3", "transformers": "5", "driver": "1"}
    path = tmp_path / "e2e.json"
    monkeypatch.setattr(sys, "argv", ["report", "tables", str(path)])
    path.write_text(json.dumps([row("generate(), dyrate, evict", "triton", 5432.0, group="model", model="LLaVA", **versions)]))
    report.main()
    text = capsys.readouterr().out
    assert "ACME GPU, torch 2, triton 3, transformers 5, commit 0" in text and "5.43 ms" in text and "not a measurement" not in text
    others = [
        ('{"machine_info": {}, "benchmarks": []}', "this is of pytest-benchmark"),
        ("[1]", "something else"),
        ("{", "this is no JSON"),
    ]
    for body, message in others:
        path.write_text(body)
        with pytest.raises(SystemExit, match=f"expected a record's report.json, or the rows that .*{message}"):
            report.main()


def test_two_records_are_compared_row_by_row(tmp_path, monkeypatch, capsys):
    first = record([row("decode_step", "triton", 20.0), row("decode_step", "triton", 8.0, batch=1), row("reorder_", "triton", 3.0)])
    for side in ("first", "second"):  # a row that is wrong on one side
        name = {"name": f"wrong in the {side}"}
        first["rows"].append(row("", "triton", 5.0, correct=WRONG if side == "first" else RIGHT) | name)
    second = record([row("decode_step", "triton", 10.0), row("decode_step", "triton", None, batch=1)], commit="beef")
    second["rows"] += [
        row("", "triton", 6.0, correct=WRONG if side == "second" else RIGHT) | {"name": f"wrong in the {side}"}
        for side in ("first", "second")
    ]
    for name, body in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(body))
    monkeypatch.setattr(sys, "argv", ["report", "compare", str(tmp_path / "a"), str(tmp_path / "b")])
    report.main()
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and "c0ffee" in lines[0] and "beef" in lines[0]
    assert lines[2] == "| dyrate decode_step | 32 2880 32/32x128 | 20 | 10 | 0.500 |"
    monkeypatch.setattr(sys, "argv", ["report", "tables", str(tmp_path / "c")])
    with pytest.raises(SystemExit, match=r"expected a record, a folder with a report\.json"):
        report.main()


GPU_SH = Path(__file__).parents[2] / "bench" / "gpu.sh"


def rehearse(*arguments):
    """With a python that does nothing and succeeds."""
    return subprocess.run(
        ["bash", str(GPU_SH), *arguments], env={**os.environ, "PYTHON": "true"}, capture_output=True, text=True, timeout=60
    )


def test_gpu_sh_tells_what_it_is():
    for option in ("-h", "--help"):
        told = rehearse(option)
        assert told.returncode == 0 and told.stdout.startswith("Everything that needs a GPU") and "set -uo" not in told.stdout
    assert rehearse("--no-such-option").returncode == 2


def test_gpu_sh_empties_the_logs_of_the_parts_that_run(tmp_path):
    logs = ("environment", "tests", "sanitizer", "operators", "pytest", "end_to_end")
    for log in logs:
        (tmp_path / f"{log}.log").write_text("of an earlier run\n")
    assert rehearse(str(tmp_path), "--toy", "--only", "kernels end_to_end").returncode == 0
    kept = [log for log in logs if "of an earlier run" in (tmp_path / f"{log}.log").read_text()]
    assert kept == ["environment", "tests", "operators", "pytest"]


@pytest.mark.parametrize(
    ("arguments", "budget", "inner"),
    [
        (["--toy"], 950, 900),
        (["--toy", "--seconds", "300"], (285, 288), 900),
        ([], 130, 100),
        (["--seconds", "117"], 26, 20),
        (["--config", "llava-next-7b"], 570, 530),
        (["--config", "llava-next-7b", "--batch", "32"], 570, 530),
    ],
)
def test_gpu_sh_gives_a_rehearsal_time(tmp_path, arguments, budget, inner):
    rehearse(str(tmp_path), *arguments, "--only", "end_to_end")
    line = (tmp_path / "end_to_end.log").read_text().splitlines()[0]
    found = int(re.search(r"at most (\d+)s", line).group(1))
    low, high = budget if isinstance(budget, tuple) else (budget, budget)
    assert low <= found <= high and line.endswith(f"--seconds {inner}")
    assert " ".join(option for option in arguments if option not in ("--toy", "--seconds", "300", "117")) in line
