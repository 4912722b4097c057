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
CALIBRATION = 24  # questions that costs are tuned on
LEAST_CALIBRATION = 8
SUITE_OPTIONS = {
    "shapes": ("scenes", "seed", "tasks"), "lmms-eval": ("tasks", "limit", "include_path"), "a data set": ("data", "images", "limit"),
}  # fmt: skip


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("eval", help="policies over a suite of questions, one table", description=__doc__)
    common.add_common(parser)
    common.add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="answers are written there as they come; a rerun goes on with them")
    parser.add_argument(
        "--suite", default="shapes", metavar="NAME",
        help="shapes (drawn scenes, no download); gqa, vizwiz, scienceqa, textvqa, pope, nocaps, flickr30k, coco (the data set's own file: "
        "--data); lmms-eval (its tasks: --tasks); default: shapes",
    )  # fmt: skip
    parser.add_argument("--data", metavar="FILE", help="questions or captions as the data set's authors publish them")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures that --data names; default: where it lies")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="of --data, or of each task of lmms-eval, the first N questions; default: all"
    )
    parser.add_argument("--scenes", type=int, metavar="N", help="of shapes: questions of each task; default: 100")
    parser.add_argument("--tasks", metavar="A,B,..", help="of shapes (default: all) or of lmms-eval")
    parser.add_argument("--include-path", metavar="DIR", help="more tasks for lmms-eval: a folder of its YAML files")
    parser.add_argument("--seed", type=int, help="of shapes; default: 0")
    parser.add_argument(
        "--policies", default=DEFAULT_POLICIES, metavar="A,B,..",
        help=f"names, with options and retention if wanted: fastv:k=2:rate=0.75@evict; also downsample:side=7; default: {DEFAULT_POLICIES}",
    )  # fmt: skip
    parser.add_argument(
        "--cost", metavar="A,B,..",
        help="percentages of the unpruned model's visual rows: each policy is tuned to cost that much, on other scenes, or on the "
        f"questions of --data behind the first --limit (up to {CALIBRATION} are needed, about other pictures)",
    )  # fmt: skip
    parser.add_argument("--report", metavar="DIR", help="write table (Markdown, JSON) and plots there too")
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
    from dyrate_kernels.evaluation.runner import run as ask

    chosen = contenders(given.policies)
    costs = costs_in(given.cost)
    if given.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {given.batch_size}")
    folder = Path(given.out)
    say = _silent if given.json else _progress
    if given.suite == "lmms-eval":
        return _run_lmms(given, chosen, folder, say)
    suite, others, about = open_suite(given, bool(costs))
    model, processor = common.load_model(given)
    tuned: dict[str, dict[str, float]] = {}
    if costs:
        chosen, tuned = _at_costs(model, processor, others, chosen, costs, folder, given, say)
    answers = {}
    for number, contender in enumerate(chosen, 1):

        def progress(done: int, total: int, number: int = number, label: str = contender.label) -> None:
            say(f"{number} of {len(chosen)}: {label}: {done} of {total}")

        answers[contender.label] = ask(
            model, processor, suite, contender, folder, batch_size=given.batch_size, backend=given.backend, progress=progress
        )
    say("")
    lines = _lines(answers, suite.long)
    table = {"suite": suite.name, **about, "lines": [line.to_dict() for line in lines]}
    if tuned:
        table["tuned"] = tuned
    summary = {label: suite.summary([answer.text for answer in each]) for label, each in answers.items()} if given.data else {}
    if any(summary.values()):
        table["summary"] = summary
    common.write_json(folder / "table.json", table)
    if given.report is not None:
        _report(Path(given.report), given, table, lines, model, processor, _long_part(suite))
    if given.json:
        common.print_json(table)
    else:
        _print_table(lines)
        for label, numbers in table.get("summary", {}).items():
            print(f"{label}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in numbers.items()))
        print(f"answers: {folder}/*.jsonl, table: {folder / 'table.json'}" + (f", report: {given.report}" if given.report else ""))
    return 0


def open_suite(given: argparse.Namespace, calibrates: bool) -> tuple[Any, Any, dict[str, Any]]:
    """(suite, other questions to tune costs on, what the table says about it). Files and pictures are looked at here, before any work."""
    from dyrate_kernels import shapes
    from dyrate_kernels.evaluation import suites
    from dyrate_kernels.evaluation.suite import ShapesSuite

    if given.suite == "shapes":
        check_options(given, "shapes")
        tasks = shapes.TASKS if given.tasks is None else tuple(task.strip() for task in given.tasks.split(","))
        scenes = 100 if given.scenes is None else given.scenes
        seed = given.seed or 0
        others: Any = ShapesSuite(CALIBRATION, (seed + 500_000) % 10**6, ("describe",)) if calibrates else None
        return ShapesSuite(scenes, seed, tasks), others, {"seed": seed, "scenes": scenes}
    if given.suite not in suites.names():
        raise ValueError(f"--suite must be one of shapes, {', '.join(suites.names())}, lmms-eval, got {given.suite!r}")
    check_options(given, "a data set")
    if given.data is None:
        raise ValueError(f"--suite {given.suite} needs --data FILE, the questions as the data set's authors publish them, and --images DIR")
    suite = suites.get(given.suite, given.data, given.images, given.limit)
    others = suite.held_back(CALIBRATION, LEAST_CALIBRATION) if calibrates else None
    return suite, others, {"data": suite.file.name, "questions": len(suite)}


def check_options(given: argparse.Namespace, kind: str) -> None:
    """ValueError for an option that belongs to another kind of suite, rather than silence."""
    for other, names in SUITE_OPTIONS.items():
        for name in names:
            if getattr(given, name) is not None and name not in SUITE_OPTIONS[kind]:
                raise ValueError(f"--{name.replace('_', '-')} belongs to {other}, not to --suite {given.suite}; leave it out")


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


def _run_lmms(given: argparse.Namespace, chosen: list[Any], folder: Path, say: Any) -> int:
    """lmms-eval's tasks: its metrics, our costs."""
    import importlib.util

    check_options(given, "lmms-eval")
    tasks = [task.strip() for task in (given.tasks or "").split(",") if task.strip()]
    if not tasks:
        raise ValueError("--suite lmms-eval needs --tasks A,B,.., e.g. gqa,pope")
    for name in ("cost", "report"):
        if getattr(given, name) is not None:
            raise ValueError(f"--{name} is not there for --suite lmms-eval; leave it out, or give a data set's own file (--suite gqa)")
    if given.limit is not None and given.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {given.limit}")
    if importlib.util.find_spec("lmms_eval") is None:
        raise RuntimeError("--suite lmms-eval needs the package lmms-eval: pip install 'dyrate-kernels[lmms-eval]'")
    from dyrate_kernels.evaluation.lmms import evaluate

    model, processor = common.load_model(given)
    found = evaluate(
        model, processor, chosen, tasks, folder, batch_size=given.batch_size, backend=given.backend, limit=given.limit,
        include_path=given.include_path, progress=say,
    )  # fmt: skip
    say("")
    table = {"suite": "lmms-eval", "limit": given.limit, "policies": found}
    common.write_json(folder / "table.json", table)
    if given.json:
        common.print_json(table)
        return 0
    from rich.table import Table

    for task, first in found["none"].items():
        shown = Table(title=f"{task} ({first['costs']['questions']} questions)", title_justify="left")
        headings = [*first["metrics"], "of unpruned", "kept", "rate", "FLOPs", "KV", "TTFT ms", "ms/token"]
        for number, heading in enumerate(["policy", *headings]):
            shown.add_column(heading, justify="left" if number == 0 else "right")
        for label, by_task in found.items():
            shown.add_row(label, *_lmms_cells(by_task[task], first))
        common.console().print(shown)
    print(f"answers: {folder}/*.jsonl, table: {folder / 'table.json'}")
    return 0


def _lmms_cells(line: dict[str, Any], unpruned: dict[str, Any]) -> list[str]:
    """Metrics with their standard errors, the first one as a share of the unpruned model's, costs."""
    from dyrate_kernels.evaluation.report import size

    cells = [f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "") for value, error in line["metrics"].values()]
    costs = line["costs"]
    (value, _), (whole, _) = (next(iter(each["metrics"].values()), (0.0, None)) for each in (line, unpruned))
    cells += [f"{100 * value / whole:.1f} %" if whole else "-"]
    cells += [f"{100 * costs[name]:.1f} %" for name in ("kept_mean", "rate", "flops_share")] + [size(costs["kv_bytes"])]
    return cells + ["-" if costs[name] is None else f"{1000 * costs[name]:.2f}" for name in ("ttft_seconds", "seconds_per_token")]


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
    about = ", ".join(f"{key} {table[key]}" for key in ("seed", "scenes", "data", "questions") if key in table)
    text = [f"# {name}: {about}\n", f"`{_command()}`\n"]
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
    """The questions with long answers, else all, up to 100 of them."""
    from dyrate_kernels.evaluation.suite import Part

    places = [index for index in range(len(suite)) if suite[index].group in suite.long] or range(len(suite))
    return Part(suite, places[:100])


def _command() -> str:
    import shlex

    return shlex.join(["dyrate", *sys.argv[1:]])


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<78}" + ("" if text else "\r"), end="", file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


def _lines(answers: dict[str, list[Any]], long: frozenset[str]) -> list[Any]:
    """Long answers, short answers, and each group."""
    from dyrate_kernels.evaluation.table import summarise

    unpruned = answers["none"]
    groups: dict[str, list[int]] = {}
    for index, answer in enumerate(unpruned):
        for name in ("long" if answer.group in long else "short", answer.group):
            groups.setdefault(name, []).append(index)
    order = sorted(groups, key=lambda name: ("long", "short").index(name) if name in ("long", "short") else 2)
    return [
        summarise(label, group, [each[index] for index in groups[group]], [unpruned[index] for index in groups[group]])
        for group in order
        for label, each in answers.items()
    ]


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
