"""``dyrate eval``: policies over a suite of questions, one table: score, agreement, kept tokens, cost."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from dyrate_kernels.cli import common

DEFAULT_POLICIES = "dyrate,dyrate@evict,dyrate:predictor=closed-form,fastv,fixed,random,uniform"


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("eval", help="policies over a suite of questions, one table", description=__doc__)
    common.add_common(parser)
    common.add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="answers are written there as they come; a rerun goes on with them")
    parser.add_argument("--suite", choices=("shapes",), default="shapes", help="default: shapes (drawn scenes, no download)")
    parser.add_argument("--scenes", type=int, default=100, metavar="N", help="questions of each task; default: 100")
    parser.add_argument("--tasks", metavar="A,B,..", help="tasks of the suite; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the questions; default: 0")
    parser.add_argument(
        "--policies", default=DEFAULT_POLICIES, metavar="A,B,..",
        help=f"names, with options and retention if wanted: fastv:k=2:rate=0.75@evict; default: {DEFAULT_POLICIES}",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--backend", choices=("auto", "triton", "cuda", "reference"), default="auto", help="default: auto")
    parser.set_defaults(run=run)


def contenders(text: str) -> list[Any]:
    """``fastv:rate=0.75@evict,random`` -> contenders; the unpruned model comes first."""
    from dyrate_kernels import policies
    from dyrate_kernels.evaluation.runner import Contender

    found = [Contender("none", policies.KeepAll())]
    for part in common.split_list(text):
        name, _, retention = part.partition("@")
        if not name or name == "none":
            continue
        if retention not in ("", "recoverable", "evict"):
            raise ValueError(f"--policies: retention must be recoverable or evict, got {retention!r} in {part!r}")
        label = re.sub(r"[^\w.=@+-]+", "_", part)
        found.append(Contender(label, common.parse_policy(name), retention or "recoverable"))
    if len(found) == 1:
        raise ValueError("--policies is empty; name at least one, e.g. dyrate,fastv")
    if len({contender.label for contender in found}) < len(found):
        raise ValueError(f"--policies names one twice: {text}")
    return found


def run(given: argparse.Namespace) -> int:
    """Does it."""
    from dyrate_kernels import shapes
    from dyrate_kernels.evaluation.runner import run as ask
    from dyrate_kernels.evaluation.suite import ShapesSuite

    tasks = shapes.TASKS if given.tasks is None else tuple(task.strip() for task in given.tasks.split(","))
    chosen = contenders(given.policies)
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {given.batch_size}")
    model, processor = common.load_model(given)
    suite = ShapesSuite(given.scenes, given.seed, tasks)
    folder = Path(given.out)
    answers = {}
    for number, contender in enumerate(chosen, 1):

        def progress(done: int, total: int, number: int = number, label: str = contender.label) -> None:
            if not given.json and sys.stderr.isatty():
                print(f"\r{number} of {len(chosen)}: {label}: {done} of {total} {'':<20}", end="", file=sys.stderr, flush=True)

        answers[contender.label] = ask(
            model, processor, suite, contender, folder, batch_size=given.batch_size, backend=given.backend, progress=progress
        )
    if not given.json and sys.stderr.isatty():
        print(f"\r{'':<70}\r", end="", file=sys.stderr)
    lines = _lines(answers)
    table = {"suite": suite.name, "seed": given.seed, "scenes": given.scenes, "lines": [line.to_dict() for line in lines]}
    common.write_json(folder / "table.json", table)
    if given.json:
        common.print_json(table)
    else:
        _print_table(lines)
        print(f"answers: {folder}/*.jsonl, table: {folder / 'table.json'}")
    return 0


def _lines(answers: dict[str, list[Any]]) -> list[Any]:
    """Long answers, short answers, and each task."""
    from dyrate_kernels.evaluation.table import summarise

    unpruned = answers["none"]
    groups: dict[str, list[int]] = {}
    for index, answer in enumerate(unpruned):
        for name in ("long" if answer.group == "describe" else "short", answer.group):
            groups.setdefault(name, []).append(index)
    order = sorted(groups, key=lambda name: ("long", "short").index(name) if name in ("long", "short") else 2)
    return [
        summarise(label, group, [each[index] for index in groups[group]], [unpruned[index] for index in groups[group]])
        for group in order
        for label, each in answers.items()
    ]


def _print_table(lines: list[Any]) -> None:
    from rich.table import Table

    for group in dict.fromkeys(line.group for line in lines):
        rows = [line for line in lines if line.group == group]
        table = Table(title=f"{group} answers ({rows[0].questions} questions, n = {rows[0].n:.0f} tokens)", title_justify="left")
        headings = ("policy", "score [95 %]", "of unpruned [95 %]", "same tokens", "kept", "paper cost", "FLOPs", "KV", "ms/token")
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="left" if number == 0 else "right")
        for line in rows:
            table.add_row(
                line.label, _interval(line.score, line.low, line.high), _interval(line.retained, line.retained_low, line.retained_high),
                f"{100 * line.agreement:.1f} %", f"{100 * line.kept:.1f} %", f"{100 * line.paper_cost:.1f} %",
                f"{100 * line.flops_share:.1f} %", common.bytes_text(line.kv_bytes), f"{1000 * line.time_per_token:.2f}",
            )  # fmt: skip
        common.console().print(table)


def _interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
