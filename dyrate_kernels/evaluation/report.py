"""Writes a comparison down: tables in Markdown, everything in JSON, plots."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyrate_kernels.evaluation.curves import Curves, measure
from dyrate_kernels.evaluation.equal_cost import WITHIN
from dyrate_kernels.evaluation.runner import Answer
from dyrate_kernels.evaluation.suite import Subset, Suite
from dyrate_kernels.evaluation.table import Line, lead, summarise
from dyrate_kernels.files import write_json
from dyrate_kernels.units import bytes_text

HEADINGS = (
    "policy", "score [95 %]", "of unpruned [95 %]", "same tokens", "kept", "visual", "paper cost", "exact cost", "FLOPs", "KV", "ms/token",
    "floor",
)  # fmt: skip


PARTS = ("long", "short")
CURVE_QUESTIONS, CURVE_LAYERS = 100, 5


def lines_of(answers: dict[str, list[Answer]], long: frozenset[str]) -> list[Line]:
    """Long answers, short answers, and each group, a line a contender. ``answers`` by label, ``"none"`` among them; ``long``: groups."""
    unpruned = answers["none"]
    indices: dict[str, list[int]] = {}
    for index, answer in enumerate(unpruned):
        for name in (PARTS[answer.group not in long], answer.group):
            indices.setdefault(name, []).append(index)
    order = sorted(indices, key=lambda name: PARTS.index(name) if name in PARTS else len(PARTS))
    return [
        summarise(label, group, [each[index] for index in indices[group]], [unpruned[index] for index in indices[group]])
        for group in order
        for label, each in answers.items()
    ]


def names(suite: str) -> list[str]:
    """Files that :func:`write` writes."""
    return [f"{suite}{ending}" for ending in (".json", ".md", ".png", "-curves.json", "-curves.png")]


def write(
    folder: Path, table: dict[str, Any], command: str, answers: dict[str, list[Answer]], lines: Sequence[Line], suite: Suite, model: Any,
    processor: Any, batch_size: int,
) -> None:  # fmt: skip
    """The whole report into ``folder``: tables as Markdown and JSON, scores over cost, what the unpruned model looks at over steps.

    Args:
        table: for the JSON.
        command: that made it.
        answers: by label.
        lines: of them.
        suite, model, processor, batch_size: what was asked of whom.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = table["suite"]
    groups = {group: [line for line in lines if line.group == group] for group in PARTS}
    groups = {group: rows for group, rows in groups.items() if rows}
    write_json(folder / f"{name}.json", table)
    about = ", ".join(f"{key} {table[key]}" for key in ("seed", "scenes", "data", "questions") if key in table)
    machine = ", ".join(map(" ".join, table["machine"].items()))
    text = [f"# {name}: {about}\n", f"`{command}`\n", f"Batches of {table['batch_size']}; {machine}.\n"]
    text += [f"Left out: {why}\n" for why in table.get("left_out", [])]
    for group, rows in groups.items():
        text += [f"## {group} answers ({rows[0].questions} questions, n = {rows[0].n:.0f} tokens)\n", markdown(rows)]
        text += [first_layers_text(table["first_layers"]) + "\n"] if "first_layers" in table else []
        inside = {row.group for row in lines if row.group not in PARTS and (row.group in suite.long) == (group == PARTS[0])}
        difference = leads({label: [answer for answer in each if answer.group in inside] for label, each in answers.items()})
        if difference:
            text += ["Difference of the scores, in points [95 %, paired]; -: they do not cost the same here:\n", difference]
    (folder / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
    if table.get("tuned"):
        draw_scores(folder / f"{name}.png", {f"{group} answers": rows for group, rows in groups.items()})
    indices = [index for index in range(len(suite)) if suite[index].group in suite.long] or range(len(suite))
    layers = range(model.config.get_text_config().num_hidden_layers - 1)
    picked = [layers[index] for index in range(0, len(layers), max(len(layers) // CURVE_LAYERS, 1))]
    found = measure(model, processor, Subset(suite, indices[:CURVE_QUESTIONS]), picked, batch_size=batch_size)
    write_json(folder / f"{name}-curves.json", [each.to_dict() for each in found])
    draw_curves(folder / f"{name}-curves.png", found)


def cells(line: Line) -> list[str]:
    """A line of a table, in the order of ``HEADINGS``."""
    return [
        shown_label(line), interval(line.score, line.low, line.high), interval(line.retained, line.retained_low, line.retained_high),
        *(f"{100 * value:.1f} %" for value in (
            line.agreement, line.kept, line.visual_share, line.paper_cost, line.exact_cost, line.flops_share,
        )),
        bytes_text(line.kv_bytes), f"{1000 * line.time_per_token:.2f}", f"{1000 * line.floor:.3f}",
    ]  # fmt: skip


def shown_label(line: Line) -> str:
    """The label; where the line does not cost what the label says, also what it costs: ``fastv@33.3 (here 66.2)``."""
    cost = cost_of(line.label)
    off = cost is not None and abs(line.visual_share - cost) > WITHIN
    return f"{line.label} (here {100 * line.visual_share:.1f})" if off else line.label


def first_layers_text(starts: dict[str, int]) -> str:
    """``Pruned from layer 1 on: dyrate, fixed; from layer 3 on: fastv.`` of labels that do not all begin at one layer."""
    by_layer: dict[int, list[str]] = {}
    for label, layer in starts.items():
        by_layer.setdefault(layer, []).append(label)
    for layer, labels in by_layer.items():
        others = {method_of(label) for other, those in by_layer.items() if other != layer for label in those}
        by_layer[layer] = list(dict.fromkeys(label if method_of(label) in others else method_of(label) for label in labels))
    return "Pruned from " + "; from ".join(f"layer {layer} on: {', '.join(by_layer[layer])}" for layer in sorted(by_layer)) + "."


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """``99.1 [98.0, 99.9]`` of fractions; ``-`` for None."""
    if value is None or low is None or high is None:
        return "-"
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def markdown(lines: Sequence[Line]) -> str:
    """Lines of one group as a table."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(cells(line) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def leads(answers: dict[str, Sequence[Answer]]) -> str:
    """Returns by how much the first method of each cost leads every other one of that cost, in points of the score: a table in Markdown,
    a row a method, a column a cost. ``answers`` of one group, by label.
    """
    levels: dict[str, list[str]] = {}
    for label in answers:
        if method_of(label) != label:
            levels.setdefault(label.rpartition("@")[2], []).append(label)
    if not levels:
        return ""
    firsts = {level: labels[0] for level, labels in levels.items()}
    methods = list(dict.fromkeys(method_of(label) for labels in levels.values() for label in labels[1:]))
    rows = [[f"{method_of(next(iter(firsts.values())))} less ..", *(f"at {level} %" for level in levels)], ["---"] * (len(levels) + 1)]

    def cell(first: str, other: str) -> str:
        shares = [float(np.mean([answer.visual_share for answer in answers[label]])) for label in (first, other)]
        if max(abs(share - float(first.rpartition("@")[2]) / 100) for share in shares) > WITHIN:
            return "-"
        value, low, high = lead(answers[first], answers[other])
        return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"

    for method in methods:
        pairs = [(first, f"{method}@{level}") for level, first in firsts.items()]
        rows.append([method, *(cell(first, other) if other in answers else "-" for first, other in pairs)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw_scores(path: Path, groups: dict[str, list[Line]]) -> None:
    """Score against cost, a panel a group: each method a line through its levels, dashed under ``evict``; policies that were not tuned are
    crosses.

    Args:
        groups: name of a panel -> its lines. Lines of one method have the same label but for the cost that they were tuned to, ``@33.3``.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(groups) + 2.2, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    methods = list(dict.fromkeys(method_of(line.label) for lines in groups.values() for line in lines))
    methods.remove("none")
    names = list(dict.fromkeys(method.partition("@")[0] for method in methods))
    tab20 = matplotlib.colormaps["tab20"]
    colours = dict(zip(names, itertools.cycle(map(tab20, range(tab20.N))), strict=False))
    for index, (title, lines) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), index + 1)
        for method in methods:
            points = sorted((line for line in lines if method_of(line.label) == method), key=lambda line: line.visual_share)
            nothing = float("nan")  # no share of the unpruned score: no point
            x = [100 * line.visual_share for line in points]
            y, lows, highs = (
                [100 * (nothing if value is None else value) for value in values]
                for values in zip(*((line.retained, line.retained_low, line.retained_high) for line in points))
            )
            low = [max(middle - end, 0.0) for middle, end in zip(y, lows)]
            high = [max(end - middle, 0.0) for middle, end in zip(y, highs)]
            tuned, strong = points[0].label != method, method.startswith("dyrate")
            axes.errorbar(
                x, y, [low, high], label=method, color=colours[method.partition("@")[0]], marker="o" if tuned else "x",
                linestyle="--" if "@" in method else "-", markersize=5 if strong or not tuned else 3, linewidth=2.2 if strong else 1,
                capsize=2, elinewidth=0.7,
            )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("visual rows read, % of unpruned", fontsize=9)
        axes.set_ylabel("score, % of unpruned", fontsize=9)
        axes.grid(True, color="#e5e5e5", linewidth=0.6)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right center")
    figure.savefig(path)


def method_of(label: str) -> str:
    """``fastv@evict@33.3`` -> ``fastv@evict``: the label without the cost it was tuned to."""
    return label if cost_of(label) is None else label.rpartition("@")[0]


def cost_of(label: str) -> float | None:
    """``fastv@evict@33.3`` -> 0.333: the cost that a contender was tuned to; None: it was not."""
    head, _, tail = label.rpartition("@")
    return float(tail) / 100 if head and tail.replace(".", "", 1).isdigit() else None


def draw_curves(path: Path, found: Sequence[Curves]) -> None:
    """Mass by type, and overlap of the important tokens, a column a layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from dyrate_kernels.plots import COLOURS

    figure = Figure(figsize=(3.4 * len(found), 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(found), squeeze=False, sharex=True, sharey=True)
    for column, curves in enumerate(found):
        steps = range(len(curves.answers))
        top, bottom = grid[0][column], grid[1][column]
        for name, values in curves.mass.items():
            top.plot(steps, values, color=COLOURS[name], linewidth=1.3, label=name)
        top.set_title(f"layer {curves.layer}", fontsize=9)
        for values, name in (
            (curves.with_first, "also in the prefill"),
            (curves.with_last, "also in the step before"),
            (curves.returned, "came back"),
        ):
            bottom.plot(steps, values, linewidth=1.3, label=name)
        bottom.axhline(curves.share, color="#888888", linestyle="--", linewidth=0.8, label="chance of the first two")
        bottom.set_xlabel("generation step", fontsize=8)
        for axes in (top, bottom):
            axes.set_ylim(0, 1)
            axes.tick_params(labelsize=7)
            axes.grid(True, color="#e5e5e5", linewidth=0.6)
    grid[0][0].set_ylabel("attention mass", fontsize=8)
    grid[1][0].set_ylabel(f"of the top {100 * found[0].share:g} % of tokens", fontsize=8)
    grid[0][-1].legend(fontsize=7, frameon=False)
    grid[1][-1].legend(fontsize=7, frameon=False)
    figure.savefig(path)
