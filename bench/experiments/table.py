"""``experiments.md``: one table of all rows, what each experiment took, and what is proposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dyrate_kernels.measuring import timing

from .propose import Candidate, chosen
from .runner import NOT_REACHED, Row

READING = (
    "us: median over interleaved rounds of CUDA graph replays with a cold L2. ratio: to the base of the same case, median over the rounds "
    "of the ratio within a round; noise: how far the base lies from itself. A row whose result is not that of the float64 reference has no "
    "speed."
)


def _number(value: Any) -> str:
    if value is None:
        return ""
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "/").replace("\n", " ")


def _table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[str]:
    rendered = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*rendered, *("| " + " | ".join(map(_number, line)) + " |" for line in lines)]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _fate(one: Candidate, proposed: Sequence[Candidate]) -> str:
    """Returns what became of a change that nothing speaks against; of each key one is proposed."""
    for other in proposed:
        if (other.section, other.key) == (one.section, one.key):
            if other.changes == one.changes:
                return "proposed"
            return "part of what is proposed" if one.changes.items() <= other.changes.items() else "faster, but another change is proposed"
    return "not proposed"


def markdown(rows: Sequence[Row], experiments: Sequence[dict[str, Any]], found: Sequence[Candidate], written: str | None) -> str:
    """The text. found: of :func:`bench.experiments.propose.candidates`; written: the name of the proposed device file."""
    here = timing.environment()
    text = [f"# Experiments on {here['gpu']}", ""]
    if not here["measurement"]:
        text += [f"**{timing.REHEARSAL}. No number below says anything about speed.**", ""]
    versions = ", ".join(f"{name} {here[name]}" for name in ("torch", "triton", "driver", "commit"))
    text += [f"{versions}. {READING}", ""]
    lines = []
    for row in rows:
        right = row["correct"] is None or row["correct"]["passed"]
        state = "" if row["correct"] is None else "yes" if right else "NO"
        spread = None if row["p20_us"] is None else f"{row['p20_us']:.4g}-{row['p80_us']:.4g}"
        says = "; ".join(filter(None, (row["verdict"], row.get("note"))))
        what = [row["experiment"], row["case"] or row["name"], row["variant"]]
        lines.append([*what, row["median_us"], spread, row["ratio"], _percent(row["noise"]), row["times_floor"], state, says])
    text += _table(["#", "case", "variant", "us", "p20-p80", "ratio", "noise", "x floor", "right", "says"], lines)
    text += ["", "## What each took", ""]
    short = [one for one in experiments if one["not_reached"]]
    body = [[one["number"], one["title"], one["seconds"], one["budget"], one["rows"], one["not_reached"]] for one in experiments]
    text += _table(["#", "experiment", "seconds", "budget", "rows", NOT_REACHED], body)
    if short:
        text += ["", "Not reached: " + ", ".join(f"{one['not_reached']} of experiment {one['number']}" for one in short) + "."]
    text += ["", "## Proposed", ""]
    if written is None:
        text += ["Nothing: no change was faster beyond the noise in its cases and right in all of them.", ""]
    else:
        text += [f"`{written}`, which `dyrate_kernels/devices` reads. An entry holds the figures that chose it.", ""]
    proposed = chosen(rows)
    tried = [[one.section, one.key, ", ".join(f"{name}={value}" for name, value in one.changes.items()), one.experiment, one.ratio,
              _percent(one.noise), len(one.cases), one.against or _fate(one, proposed)] for one in found]  # fmt: skip
    text += _table(["section", "key", "change", "#", "ratio", "noise", "cases", ""], tried)
    return "\n".join([*text, ""])
