"""Plots of a record: how near operators come to the copy bandwidth, their time over the visual tokens, whole models beside their floor, and
what a policy kept step by step.

    python -m bench.plots RECORD_DIR        # reads report.json, writes bandwidth.png, visual.png, models.png and kept.png beside it

``bench/gpu.sh`` calls it. Rows whose result failed its comparison with the reference are left out: they have no speed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BESIDE = ("dense ", "FastV eager step, in a CUDA graph")  # peers that the plot of operators shows
OPERATORS = (
    "decode_attention",
    "decode_attention with statistics",
    "decode_step",
    "decode_attention, 12.5 % kept",
    "compact_, 2880 -> 720",
)


def right(row: Row) -> bool:
    """Returns whether it did not fail its gate (``gate_of_twin`` in older records). A row that fails has no speed."""
    return all(gate is None or gate["passed"] for gate in (row["correct"], row.get("gate_of_twin")))


def shown(rows: Iterable[Row]) -> list[Row]:
    """Timed rows that did not fail their gate."""
    return [row for row in rows if row["median_us"] and right(row)]


def series(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of operators and their peers by name, in the order of their bytes; only what has a floor."""
    found: dict[str, list[Row]] = {}
    for row in shown(rows):
        name = row["name"]
        ours = name.startswith("dyrate") and name.removeprefix("dyrate cuda ").removeprefix("dyrate ") in OPERATORS
        if row["share_of_copy"] and row["group"] in ("attention", "rows") and (ours or name.startswith(BESIDE)):
            found.setdefault(name, []).append(row)
    return {name: sorted(of_name, key=lambda row: row["bytes"]) for name, of_name in found.items()}


def bandwidth(report: dict[str, Any], out: Path) -> bool:
    """Share of the copy bandwidth over the bytes that must move. False where the record has no such row."""
    from matplotlib.figure import Figure

    lines = series(report["rows"])
    if not lines:
        return False
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, rows) in enumerate(lines.items()):
        peer = not name.startswith("dyrate")
        style: dict[str, Any] = {"linestyle": "none", "marker": "x" if peer else "o", "color": f"C{number % 10}", "alpha": 0.8}
        axes.plot([row["bytes"] / 1e6 for row in rows], [row["share_of_copy"] for row in rows], label=name, **style)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.text(axes.get_xlim()[0], 1.0, " copy", va="bottom", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="MB that must move", ylabel="share of the copy bandwidth", title=_title(report))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(out, dpi=110)
    return True


def over_visual(report: dict[str, Any], out: Path) -> bool:
    """Microseconds over the visual tokens, a panel a batch and kind of heads, the floor as a line. False where N never differs."""
    from matplotlib.figure import Figure

    lines = series(report["rows"])
    panels = list(dict.fromkeys((row["heads"], row["B"]) for rows in lines.values() for row in rows if row.get("heads")))
    panels = [panel for panel in panels if len({r["N"] for rows in lines.values() for r in rows if (r.get("heads"), r["B"]) == panel}) > 1]
    if not panels:
        return False
    columns = min(len(panels), 3)
    figure = Figure(figsize=(5 * columns, 4 * -(-len(panels) // columns)), layout="constrained")
    every = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axes, panel in zip(every, sorted(panels, key=lambda panel: (panel[0], panel[1])), strict=False):
        for number, (name, rows) in enumerate(lines.items()):
            here = sorted((row for row in rows if (row.get("heads"), row["B"]) == panel), key=lambda row: row["N"])
            if here:
                style = {"color": f"C{number % 10}", "marker": "o" if name.startswith("dyrate") else "x", "alpha": 0.8}
                axes.plot([row["N"] for row in here], [row["median_us"] for row in here], label=name, **style)
        plain = [row for row in lines.get("dyrate decode_attention", []) if (row.get("heads"), row["B"]) == panel]
        plain = sorted(plain, key=lambda row: row["N"])
        axes.plot([row["N"] for row in plain], [row["floor_us"] for row in plain], color="black", label="floor of dense attention")
        heads, batch = panel
        axes.set(xscale="log", yscale="log", xlabel="visual tokens", ylabel="us", title=f"{heads}, batch {batch}")
        axes.grid(alpha=0.3, which="both")
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=3)
    figure.suptitle(_title(report))
    figure.savefig(out, dpi=110)
    return True


def kept(report: dict[str, Any], out: Path) -> bool:
    """Draws what layers from k on read of the visual tokens, step by step. Returns False where no row says it."""
    from matplotlib.figure import Figure

    rows = [row for row in shown(report["rows"]) if row.get("kept_by_step") and "generate()" in row["name"]]
    if not rows:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn: set[tuple] = set()
    for row in rows:
        line = (row["name"].removeprefix("dyrate generate(), "), row["model"], tuple(row["kept_by_step"]))
        if line not in drawn:  # batches of the same rule draw the same line
            drawn.add(line)
            axes.step(range(len(line[2])), [100 * share for share in line[2]], where="post", label=f"{line[1]}: {line[0]}")
    axes.set(xlabel="step (0 = prompt)", ylabel="visual tokens read, %", ylim=(0, 105), title=_title(report))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(out, dpi=110)
    return True


def models(report: dict[str, Any], out: Path) -> bool:
    """Time per token of whole models, the floor as a line across each bar. False where the record has no such row."""
    from matplotlib.figure import Figure

    rows = [row for row in shown(report["rows"]) if row["group"] == "model"]
    shortest: dict[Any, int] = {}  # a token of the shortest answers: those of longer ones are read off the same runs
    for row in rows:
        if row.get("request_us") is not None:
            asked = row["model"], row["B"], row["N"]
            shortest[asked] = min(shortest.get(asked, row["new_tokens"]), row["new_tokens"])
    rows = [row for row in rows if row.get("request_us") is None or row["new_tokens"] == shortest[row["model"], row["B"], row["N"]]]
    problems = list(dict.fromkeys((row["model"], row["B"], row["N"]) for row in rows))
    if not problems:
        return False
    figure = Figure(figsize=(10, 3.6 * len(problems)), layout="constrained")
    for axes, problem in zip(figure.subplots(len(problems), squeeze=False)[:, 0], problems, strict=True):
        here = [row for row in rows if (row["model"], row["B"], row["N"]) == problem][::-1]
        height = range(len(here))
        axes.barh(height, [row["median_us"] / 1e3 for row in here], color=["C0" if r["name"].startswith("dyrate") else "C7" for r in here])
        for place, row in zip(height, here, strict=True):
            if row["floor_us"]:
                axes.plot([row["floor_us"] / 1e3] * 2, [place - 0.4, place + 0.4], color="black")
            axes.text(row["median_us"] / 1e3, place, f" {row['median_us'] / 1e3:.2f}", va="center", fontsize=8)
        axes.set_yticks(height, [row["name"] for row in here], fontsize=8)
        model, batch, visual = problem
        axes.set(xlabel="ms a token; black: floor", title=f"{model}, batch {batch}, {visual} visual tokens · {_title(report)}")
    figure.savefig(out, dpi=110)
    return True


def _title(report: dict[str, Any]) -> str:
    here = report["environment"]
    return f"{here['gpu']}, torch {here['torch']}" + ("" if here["measurement"] else ", REHEARSAL: no measurement")


def write(folder: Path) -> list[Path]:
    """The plots of ``folder/report.json``, beside it; the files written."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    made = (
        (bandwidth, folder / "bandwidth.png"), (over_visual, folder / "visual.png"), (models, folder / "models.png"),
        (kept, folder / "kept.png"),
    )  # fmt: skip
    return [path for draw, path in made if draw(report, path)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    for path in write(parser.parse_args().record):
        print(path)


if __name__ == "__main__":
    main()
