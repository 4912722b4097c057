"""The report of ``bench/gpu.sh``, and what else is made of a record's rows.

    python -m bench.report environment [--toy]
    python -m bench.report write OUT_DIR --parts parts.tsv --rows operators.json end_to_end.json
    python -m bench.report tables RECORD_DIR_OR_FILE
    python -m bench.report compare RECORD_DIR OTHER_DIR

The first prints the machine and fails where no compiled kernels can run. The second writes ``report.json`` (environment, parts, targets,
all rows), ``report.md`` and, with matplotlib, the plots of ``bench.plots``; rows may come from ``dyrate bench e2e --out`` and from an
``experiments.json`` as well. The third prints a record's tables as docs/performance.md shows them, the fourth how the rows that two records
share differ; both take a folder with a report.json, or a file of rows. A row whose result failed its gate has no speed, whatever the record
holds. A speed-up is the ratio of two rows of one run whose results both passed their gate; a target is met or not by such rows alone, and
neither is printed for a rehearsal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dyrate_kernels as dk
from bench import plots
from bench.operators import label
from bench.targets import sentences, speed_up, targets
from dyrate_kernels.files import write_json
from dyrate_kernels.measuring import end_to_end, timing

Row = dict[str, Any]


def speed_ups(rows: list[Row]) -> list[dict[str, Any]]:
    """Our rows against the other rows of the same problem."""
    pairs = []
    for ours in (label("triton"), label("cuda")):
        every = ("decode_attention", "decode_attention with statistics", "decode_step")
        pairs += [*((f"{ours} {name}", "dense *") for name in every), (f"{ours} decode_step", "FastV*")]
    found = []
    for row in rows:
        for ours, other in pairs:
            if row["name"] != ours:
                continue
            for twin in rows:
                same = all(row.get(key) == twin.get(key) for key in ("B", "N", "heads", "dtype", "group"))
                ratio = speed_up(row, twin) if same and twin["name"].startswith(other[:-1]) else None
                if ratio is not None:
                    found.append(
                        {"B": row["B"], "N": row["N"], "heads": row["heads"], "row": ours, "against": twin["name"], "times": ratio}
                    )
    return found


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: list[str], lines: Iterable[Iterable[Any]]) -> str:
    rendered = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    rendered += ["| " + " | ".join(_number(cell).replace("|", "/") for cell in line) + " |" for line in lines]
    return "\n".join(rendered)


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    here, rows = report["environment"], report["rows"]
    text = ["# dyrate_kernels on " + str(here["gpu"]), ""]
    if not here["measurement"]:
        text += [f"**{timing.REHEARSAL}. No number below says anything about speed.**", ""]
    text += [_table(["what", "value"], ((key, value) for key, value in here.items() if key != "backends")), ""]
    text += [_table(["backend", "state"], here["backends"].items()), "", "## Parts", ""]
    text += [_table(["part", "status", "seconds", "budget", "log"], ([p[k] for k in PART] for p in report["parts"])), ""]
    text += ["## Targets (docs/design.md, section 10)", ""]
    verdict = {True: "met", False: "MISSED", None: "not measured"}
    text += [
        _table(
            ["what", "backend", "target", "measured", ""],
            ([t["what"], t["backend"], t["target"], t["measured"], verdict[t["met"]]] for t in report["targets"]),
        )
    ]
    text += ["", *sentences(report["targets"])]
    text += ["", "## Speed-ups", "", "Both results passed their comparison with the float64 reference in this run.", ""]
    text += [_table(["B", "N", "heads", "row", "against", "times as fast"], (s.values() for s in report["speed_ups"])), ""]
    head = ["row", "B", "N", "heads", "dtype", "median us", "p20", "p80", "GB/s", "share of copy", "floor us", "x floor", "correct"]
    keys = ["name", "B", "N", "heads", "dtype", "median_us", "p20_us", "p80_us", "GB_per_s", "share_of_copy", "floor_us", "times_floor"]
    speed = {"median_us", "p20_us", "p80_us", "GB_per_s", "share_of_copy", "times_floor"}
    for group in dict.fromkeys(row["group"] for row in rows if not row["group"].startswith("experiment ")):  # experiments.md has those
        text += [f"## Rows: {group}", ""]
        lines = []
        for row in (row for row in rows if row["group"] == group):
            right = plots.right(row)
            state = "NO" if not right else "" if row["correct"] is None else "yes"
            cells = (row.get(key) if right or key not in speed else None for key in keys)
            lines.append([*cells, "; ".join(filter(None, ("" if state == "yes" and row.get("note") else state, row.get("note"))))])
        text += [_table(head, lines), ""]
    text += [f"Commit {here['commit']}. Floor: bytes that must move over the copy bandwidth measured in the same run.", ""]
    return "\n".join(text)


def _time(micro: float | None) -> str:
    if micro is None:
        return ""
    return f"{micro / 1e3:.2f} ms" if micro >= 1e3 else f"{micro:.0f} us"


def tables(report: dict[str, Any]) -> str:
    """Returns a record's tables, as in docs/performance.md: whole models, attention of a layer, targets. Rows that failed their gate are
    left out."""
    here = report["environment"]
    rows = plots.shown(report["rows"])
    versions = ", ".join(f"{name} {here[name]}" for name in ("torch", "triton", "transformers", "commit"))
    text = [f"{here['gpu']}, {versions}", ""]
    if not here["measurement"]:
        text += [f"**{timing.REHEARSAL}**", ""]
    models = [row for row in rows if row["group"] == "model"]
    for problem in dict.fromkeys(map(_problem, models)):
        found = [row for row in models if _problem(row) == problem]
        model, batch, visual, new_tokens = problem
        length = "" if new_tokens is None else f", {new_tokens} new tokens"
        head = [f"{model}, batch {batch}, {visual} visual tokens{length}", "kept", "a token", "of unpatched", "x floor"]
        shown = [_model_cells(row) for row in found]
        if any(row.get("request_us") for row in found):
            head += ["encode", "first token", "request", "predicted", "images/s"]
            shown = [_request_cells(row, line) for row, line in zip(found, shown, strict=True)]
        else:  # an older record
            head += ["first token", "images/s"]
        text += [_table(head, shown), ""]
    text += [end_to_end.PAIRED, ""] if models else []
    attention = [row for row in rows if row["group"] == "attention"]
    if attention:
        operators = [*plots.OPERATORS[:4], "decision (decode_step minus attention with statistics)"]
        ours = [row for row in attention if row["name"].removeprefix("dyrate ") in operators or not row["name"].startswith("dyrate")]
        shapes = list(dict.fromkeys((row["heads"], row["B"], row["N"]) for row in ours))
        names = list(dict.fromkeys(row["name"] for row in ours))
        cells = {(row["name"], row["heads"], row["B"], row["N"]): f"{row['median_us']:.0f}" for row in ours}
        head = ["us, one layer", *(f"{heads.split('x')[0]} heads, B={batch}, N={visual}" for heads, batch, visual in shapes)]
        text += [_table(head, ([name, *(cells.get((name, *shape), "") for shape in shapes)] for name in names)), ""]
    if any(t["met"] is not None for t in report["targets"]):
        verdict = {True: "met", False: "missed", None: "not measured"}
        lines = ([t["what"], t["backend"], t["target"], t["measured"], verdict[t["met"]]] for t in report["targets"])
        text += [_table(["target", "backend", "asked", "measured", ""], lines), ""]
        text += [*said, ""] if (said := sentences(report["targets"])) else []
    return "\n".join(text)


def _problem(row: Row) -> tuple[Any, ...]:
    """Returns what a table is of; captured steps, which are of no length, have one of their own beside those of requests."""
    return row["model"], row["B"], row["N"], None if row.get("request_us") is None else row["new_tokens"]


def _model_cells(row: Row) -> list[Any]:
    ratio = row.get("over_unpatched")
    kept = row.get("kept", row.get("kept_mean"))
    shares = (None if share is None else f"{100 * share:.{digits}f} %" for share, digits in ((kept, 1), (ratio, 0)))
    kept_text, ratio_text = shares
    times = (_time(row["median_us"]), ratio_text, row["times_floor"], _time(row.get("first_token_us")))
    return [row["name"], kept_text, *times, row.get("images_per_s")]


def _request_cells(row: Row, cells: list[Any]) -> list[Any]:
    encode, whole, predicted = (_time(row.get(key)) for key in ("encode_us", "request_us", "predicted_request_us"))
    return [*cells[:5], encode, cells[5], whole, predicted, cells[6]]


def compare(report: dict[str, Any], other: dict[str, Any]) -> str:
    """The rows that both have, and the second's time as a share of the first's."""
    keys = ("name", "model", "B", "N", "heads", "dtype", "new_tokens")
    found = {tuple(row.get(key) for key in keys): row for row in plots.shown(other["rows"])}
    lines = []
    for row in plots.shown(report["rows"]):
        twin = found.get(tuple(row.get(key) for key in keys))
        if twin is not None:
            shape = " ".join(str(row[key]) for key in ("model", "B", "N", "heads") if row.get(key) is not None)
            lines.append([row["name"], shape, row["median_us"], twin["median_us"], f"{twin['median_us'] / row['median_us']:.3f}"])
    first, second = (f"{r['environment']['gpu']}, {r['environment']['commit']}" for r in (report, other))
    return _table(["row", "shape", f"us: {first}", f"us: {second}", "second / first"], lines)


PART = ("part", "status", "seconds", "budget", "log")


def write(out: Path, parts: Path, row_files: list[Path]) -> None:
    """``report.json``, ``report.md`` and the plots."""
    lines = parts.read_text(encoding="utf-8").splitlines() if parts.is_file() else []
    rows: list[Row] = []
    for path in row_files:
        if path.is_file():
            body = json.loads(path.read_text(encoding="utf-8"))
            rows += body["rows"] if isinstance(body, dict) else body
    report = {
        "environment": timing.environment() | {"measurement": any(row["measurement"] for row in rows), "backends": dk.backends()},
        "parts": [dict(zip(PART, line.split("\t"), strict=True)) for line in lines],
        "targets": targets(rows),
        "speed_ups": speed_ups(rows),
        "rows": rows,
    }
    write_json(out / "report.json", report)
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
    else:
        plots.write(out)


ENVIRONMENT = ("gpu", "driver", "torch", "triton", "transformers", "commit")  # what each row carries of it


def read(place: Path) -> dict[str, Any]:
    """A record: of a folder's report.json, of such a file, or of a list of rows, whose environment is read off them.

    Raises:
        SystemExit: it is none of these; says what it is.
    """
    path = place / "report.json" if place.is_dir() else place
    if not path.is_file():
        raise SystemExit(f"{place}: expected a record, a folder with a report.json; there is none")
    wanted = f"{path}: expected a record's report.json, or the rows that dyrate bench e2e --out or python -m bench.operators wrote"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{wanted}; this is no JSON: {error}") from None
    if isinstance(body, list) and all(isinstance(row, dict) and {"name", "group", "median_us"} <= row.keys() for row in body):
        first = body[0] if body else {}
        here = {key: first.get(key) for key in ENVIRONMENT} | {"measurement": any(row.get("measurement") for row in body)}
        return {"environment": here, "rows": body, "targets": targets(body)}
    if isinstance(body, dict) and "benchmarks" in body:
        raise SystemExit(f"{wanted}; this is of pytest-benchmark: `pytest-benchmark compare {path}` reads it")
    if not isinstance(body, dict) or not {"environment", "rows"} <= body.keys():
        raise SystemExit(f"{wanted}; this is something else")
    return body


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("environment").add_argument("--toy", action="store_true")
    writing = commands.add_parser("write")
    writing.add_argument("out", type=Path)
    writing.add_argument("--parts", type=Path, required=True)
    writing.add_argument("--rows", type=Path, nargs="*", default=[])
    commands.add_parser("tables").add_argument("record", type=Path)
    comparing = commands.add_parser("compare")
    for name in ("record", "other"):
        comparing.add_argument(name, type=Path)
    given = parser.parse_args()
    if given.command in ("tables", "compare"):
        records = [read(path) for path in (given.record, getattr(given, "other", None)) if path is not None]
        print(tables(*records) if given.command == "tables" else compare(*records))
        return
    if given.command == "write":
        write(given.out, given.parts, given.rows)
        return
    here, backends = timing.environment(), dk.backends()
    for key, value in {**here, "backends": backends}.items():
        print(f"{key}: {value}")
    if "available" not in (backends["triton"], backends["cuda"]):
        raise SystemExit(f"no compiled kernels can run: triton is {backends['triton']}, cuda is {backends['cuda']}")
    if not given.toy and not here["measurement"]:
        raise SystemExit(
            "no measurement can be made here: no CUDA device, or TRITON_INTERPRET is set. bench/gpu.sh OUT_DIR --toy rehearses"
        )


if __name__ == "__main__":
    main()
