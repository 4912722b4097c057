"""``dyrate eval``: policies over a suite of questions, one table: score, agreement, kept tokens, cost."""

from __future__ import annotations

import argparse
import math
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
        help="names, with options and retention if wanted: fastv:k=2:rate=0.75@evict; also downsample:side=7; ' as NAME' names a row; "
        f"default: {DEFAULT_POLICIES}",
    )  # fmt: skip
    parser.add_argument(
        "--cost", metavar="A,B,..",
        help="percentages of the unpruned model's visual rows: each policy is tuned, on other scenes, to cost that much",
    )  # fmt: skip
    parser.add_argument("--also", default="", metavar="A,B,..", help="with --cost: policies that are not tuned, in the same table")
    parser.add_argument("--against", metavar="FILE", help="JSON of an earlier table: says which scores come out again")
    parser.add_argument("--report", metavar="DIR", help="write table (Markdown, JSON) and plots there too")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--backend", choices=("auto", "triton", "cuda", "reference"), default="auto", help="default: auto")
    parser.set_defaults(run=run)


def contenders(text: str) -> list[Any]:
    """``fastv:rate=0.75@evict,random as chance`` -> contenders; the unpruned model comes first."""
    from dyrate_kernels import policies
    from dyrate_kernels.evaluation.runner import Contender

    found = [Contender("none", policies.KeepAll())]
    for part in common.split_list(text):
        part, _, label = (side.strip() for side in part.partition(" as "))
        name, _, retention = part.partition("@")
        if not name or name == "none":
            continue
        if retention not in ("", "recoverable", "evict"):
            raise ValueError(f"--policies: retention must be recoverable or evict, got {retention!r} in {part!r}")
        label = re.sub(r"[^\w.=@+-]+", "_", label or part)
        if name.split(":")[0] == "downsample":
            found.append(Contender(label, policies.KeepAll(), side=_side(name)))
        else:
            found.append(Contender(label, common.parse_policy(name), retention or "recoverable"))
    if len(found) == 1:
        raise ValueError("--policies is empty; name at least one, e.g. dyrate,fastv")
    if len({contender.label for contender in found}) < len(found):
        raise ValueError(f"--policies names one twice: {text}")
    return found


def _side(name: str) -> int:
    """``downsample:side=7`` -> 7; ``downsample`` -> 6."""
    value = name.partition(":")[2] or "side=6"
    side = value.removeprefix("side=")
    if not side.isdigit() or int(side) < 1:
        raise ValueError(f"--policies: downsample takes one option, side (an integer of at least 1), got {name!r}")
    return int(side)


def run(given: argparse.Namespace) -> int:
    """Does it."""
    from dyrate_kernels import shapes
    from dyrate_kernels.evaluation import against
    from dyrate_kernels.evaluation.runner import run as ask
    from dyrate_kernels.evaluation.suite import ShapesSuite

    tasks = shapes.TASKS if given.tasks is None else tuple(task.strip() for task in given.tasks.split(","))
    chosen = contenders(given.policies)
    costs = costs_in(given.cost)
    if given.also and not costs:
        raise ValueError("--also goes with --cost; without it --policies names all of them")
    before = None if given.against is None else against.read_lines(Path(given.against))
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {given.batch_size}")
    model, processor = common.load_model(given)
    suite = ShapesSuite(given.scenes, given.seed, tasks)
    folder = Path(given.out)
    say = _silent if given.json else _progress
    tuned: dict[str, dict[str, float]] = {}
    if costs:
        others = ShapesSuite(CALIBRATION, (given.seed + 500_000) % 10**6, ("describe",))
        chosen, tuned = _at_costs(model, processor, others, chosen, costs, folder, given, say)
        chosen += contenders(given.also)[1:] if given.also else []
    answers = {}
    for number, contender in enumerate(chosen, 1):

        def progress(done: int, total: int, number: int = number, label: str = contender.label) -> None:
            say(f"{number} of {len(chosen)}: {label}: {done} of {total}")

        answers[contender.label] = ask(
            model, processor, suite, contender, folder, batch_size=given.batch_size, backend=given.backend, progress=progress
        )
    say("")
    lines = _lines(answers)
    table = {"suite": suite.name, "seed": given.seed, "scenes": given.scenes, "lines": [line.to_dict() for line in lines]}
    if tuned:
        table["tuned"] = tuned
    found = against.pairs(lines, before, ("long", "short")) if before is not None else []
    if before is not None:
        table["against"] = {f"{pair.label}, {pair.group}": [*pair.now, *pair.before, pair.agrees] for pair in found}
    common.write_json(folder / "table.json", table)
    if given.report is not None:
        _report(Path(given.report), given, table, lines, model, processor, _long_part(suite))
    if given.json:
        common.print_json(table)
    else:
        _print_table(lines)
        if before is not None:
            _print_pairs(found, given.against)
        print(f"answers: {folder}/*.jsonl, table: {folder / 'table.json'}" + (f", report: {given.report}" if given.report else ""))
    return 0


CALIBRATION = 24  # descriptions that costs are tuned on


def costs_in(text: str | None) -> list[float]:
    """``57.9,33.3`` (percent) -> fractions."""
    found = []
    for part in common.split_list(text or ""):
        try:
            cost = float(part) / 100
        except ValueError:
            cost = -1.0
        if not 0.0 < cost <= 1.0:
            raise ValueError(f"--cost must be percentages in (0, 100], e.g. 57.9,33.3,20, got {part!r}")
        found.append(cost)
    if len(set(found)) < len(found):
        raise ValueError(f"--cost names one twice: {text}")
    return found


def _at_costs(
    model: Any, processor: Any, suite: Any, chosen: list[Any], costs: list[float], folder: Path, given: argparse.Namespace, say: Any
) -> tuple[list[Any], dict[str, dict[str, float]]]:  # fmt: skip
    """The unpruned model, and every other contender at every cost. What was found is kept in ``tuned.json`` for the next run."""
    import json
    from dataclasses import replace

    from dyrate_kernels.evaluation.equal_cost import tune
    from dyrate_kernels.policies.base import ModelShape

    path = folder / "tuned.json"
    folder.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    shape = ModelShape.from_config(model.config)
    found, tuned = [chosen[0]], {}
    for cost in costs:
        for contender in chosen[1:]:
            label = f"{contender.label}@{100 * cost:g}"
            if contender.policy.name == "none":  # a coarser picture: the nearest square
                ids = processor(text=processor.image_token, images=[suite[0].images[0]])["input_ids"][0]
                side = max(round(math.sqrt(cost * list(ids).count(model.config.image_token_id))), 1)
                found.append(replace(contender, label=label, side=side))
                continue
            policy = contender.bound(model)
            if known.get(label, {}).get("policy") != str(contender.policy):
                say(f"tuning {label}")
                result = tune(model, processor, suite, contender, cost, batch_size=CALIBRATION, backend=given.backend)
                known[label] = {"policy": str(contender.policy), "strength": result.strength, "cost": result.cost}
                common.write_json(path, known)
            tuned[label] = known[label]
            found.append(replace(contender, label=label, policy=policy.at_strength(known[label]["strength"], shape.num_layers)))
    return found, tuned


def _report(folder: Path, given: argparse.Namespace, table: dict[str, Any], lines: list[Any], *measured: Any) -> None:
    """Tables in Markdown and JSON, plots. ``measured``: model, processor and suite, for the curves."""
    from dyrate_kernels.evaluation import curves, report

    folder.mkdir(parents=True, exist_ok=True)
    name = table["suite"]
    groups = {group: [line for line in lines if line.group == group] for group in ("long", "short")}
    groups = {group: rows for group, rows in groups.items() if rows}
    common.write_json(folder / f"{name}.json", table)
    text = [f"# {name}, seed {given.seed}, {given.scenes} questions a task\n", f"`{_command()}`\n"]
    for group, rows in groups.items():
        text += [f"## {group} answers ({rows[0].questions} questions, n = {rows[0].n:.0f} tokens)\n", report.markdown(rows)]
    (folder / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
    if table.get("tuned"):
        report.draw_scores(folder / f"{name}.png", {f"{group} answers": rows for group, rows in groups.items()})
    model, processor, suite = measured
    layers = range(model.config.get_text_config().num_hidden_layers - 1)
    picked = range(0, len(layers), max(len(layers) // 5, 1))
    found = curves.measure(model, processor, suite, [layers[i] for i in picked], batch_size=given.batch_size)
    common.write_json(folder / f"{name}-curves.json", [each.to_dict() for each in found])
    report.draw_curves(folder / f"{name}-curves.png", found)


def _long_part(suite: Any) -> Any:
    """The suite's descriptions, up to 100 of them."""
    from dyrate_kernels.evaluation.suite import ShapesSuite

    return ShapesSuite(min(suite.scenes, 100), suite.seed, ("describe",))


def _command() -> str:
    import shlex

    return shlex.join(["dyrate", *sys.argv[1:]])


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<78}" + ("" if text else "\r"), end="", file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


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


def _print_pairs(found: list[Any], path: str) -> None:
    from dyrate_kernels.evaluation.report import interval

    same = sum(pair.agrees for pair in found)
    print(f"{same} of {len(found)} scores agree with {path} (their 95 % intervals overlap)" + (":" if same < len(found) else ""))
    for pair in found:
        if not pair.agrees:
            print(f"  {pair.label}, {pair.group}: {interval(*pair.now)}, before {interval(*pair.before)}")


def _print_table(lines: list[Any]) -> None:
    from rich.table import Table

    from dyrate_kernels.evaluation.report import HEADINGS, cells

    for group in dict.fromkeys(line.group for line in lines):
        rows = [line for line in lines if line.group == group]
        table = Table(title=f"{group} answers ({rows[0].questions} questions, n = {rows[0].n:.0f} tokens)", title_justify="left")
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="left" if number == 0 else "right")
        for line in rows:
            table.add_row(*cells(line))
        common.console().print(table)
