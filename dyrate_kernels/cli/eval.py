"""``dyrate eval``: policies over a suite of questions, one table: score, agreement, kept tokens, cost."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from dyrate_kernels import specs
from dyrate_kernels.cli import common, contenders, eval_vllm
from dyrate_kernels.files import check_file, check_folder, locked, write_json

DEFAULT_POLICIES = "dyrate,dyrate@evict,dyrate:predictor=closed-form,fastv,fixed,random,uniform"
CALIBRATION = 24  # questions that costs are tuned on
LEAST_CALIBRATION = 8
SUITE_OPTIONS = {"shapes": ("tasks",), "lmms-eval": ("tasks", "include_path"), "a data set": ("data", "images")}


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
    common.add_images(parser)
    common.add_limit(parser, "questions of --data, or of each task of shapes (there by default 100) and lmms-eval", "--scenes")
    parser.add_argument("--tasks", metavar="A,B,..", help="of shapes (default: all) or of lmms-eval")
    parser.add_argument("--include-path", metavar="DIR", help="more tasks for lmms-eval: a folder of its YAML files")
    common.add_seed(parser)
    common.add_policies(parser, DEFAULT_POLICIES, "; the unpruned model (none) comes first by itself")
    parser.add_argument(
        "--cost", metavar="A,B,..",
        help="percentages of the unpruned model's visual rows: each policy is tuned to cost that much (none with reducers: the last "
        "reducer's keep is set to it), on other scenes, or on the "
        f"questions of --data behind the first --limit (up to {CALIBRATION} are needed, about other pictures)",
    )  # fmt: skip
    parser.add_argument(
        "--leave-out", action="store_true", help="with --cost: leave out, and name, what cannot cost that much, instead of refusing the run"
    )
    parser.add_argument("--also", default="", metavar="A,B,..", help="with --cost: policies that are not tuned, in the same table")
    parser.add_argument("--against", metavar="FILE", help="JSON of an earlier table: says which scores come out again")
    parser.add_argument("--report", metavar="DIR", help="write table (Markdown, JSON) and plots there too")
    parser.add_argument("--batch-size", type=common.positive, metavar="N", help="default: 8, of engine vllm as vLLM has it")
    shown = "local: models in this process; vllm: an engine of vLLM for each policy, one after the other; default: local"
    parser.add_argument("--engine", choices=("local", "vllm"), default="local", help=shown)
    common.add_engine_options(parser)
    parser.add_argument("--backend", choices=("auto", "triton", "cuda", "reference"), default="auto", help="default: auto")
    parser.set_defaults(run=run)


def with_unpruned(text: str) -> list[Any]:
    """The contenders of a text, behind the unpruned model, which every other one is compared with."""
    from dyrate_kernels import policies
    from dyrate_kernels.evaluation.runner import Contender

    found = [each for each in contenders.parse(text, files=True) if each.label != "none"]
    return [Contender("none", policies.KeepAll()), *found]


def label_at(contender: Any, cost: float) -> str:
    """The row of a contender that is tuned to a cost."""
    return f"{contender.label}@{100 * cost:g}"


def run(given: argparse.Namespace) -> int:
    """Asks every contender the questions, writes answers and prints the table."""
    from dyrate_kernels.cli import eval_lmms
    from dyrate_kernels.evaluation import against, report

    chosen = with_unpruned(given.policies)
    costs = costs_in(given.cost)
    more_of_engine = common.engine_options_from(given, given.engine)
    given.batch_size = given.batch_size or 8
    if given.engine == "vllm":
        eval_vllm.check(given)
    if given.also and not costs:
        raise ValueError("--also goes with --cost; without it --policies names all of them")
    more = with_unpruned(given.also)[1:] if given.also else []
    before = None if given.against is None else against.read_lines(Path(given.against))
    folder = Path(given.out)
    say = _silent if given.json else _progress
    if given.suite == "lmms-eval":
        check_options(given, "lmms-eval")
        check_folder("--out", folder)
        with locked(folder):
            return eval_lmms.run(given, chosen, folder, say)
    suite, others, about = open_suite(given, bool(costs))
    check_folder("--out", folder)
    check_file("--out", folder / "table.json")
    tuned = [label_at(contender, cost) for cost in costs for contender in chosen[1:]]
    labels = ["none", *(tuned or [each.label for each in chosen[1:]]), *(each.label for each in more)]
    contenders.check_labels(labels, [folder / f"{label}.jsonl" for label in labels])
    if given.report is not None:
        check_folder("--report", given.report)
        for name in report.names(suite.name):
            (common.check_plot if name.endswith(".png") else check_file)("--report", str(Path(given.report) / name))
    with locked(folder):
        return _compare(given, chosen, costs, more, before, folder, say, suite, others, about, more_of_engine)


def _compare(
    given: argparse.Namespace, chosen: list[Any], costs: list[float], more: list[Any], before: Any, folder: Path, say: Any, suite: Any,
    others: Any, about: dict[str, Any], more_of_engine: dict[str, Any],
) -> int:  # fmt: skip
    import torch

    from dyrate_kernels.evaluation import against, report

    engines = eval_vllm.engines(given, suite, chosen, more_of_engine) if given.engine == "vllm" else None
    model, processor = common.load_model(given) if engines is None else (engines.checkpoint, engines.checkpoint.processor)
    torch.manual_seed(given.seed)
    settings = contenders.introduce(given, model, [*chosen, *more])
    tuned: dict[str, dict[str, float]] = {}
    left_out: list[str] = []
    if costs:
        chosen, tuned, left_out = _at_costs(model, processor, others, chosen, costs, folder, given, say)
        chosen += more
    answers = _answers(given, model, processor, engines, suite, chosen, folder, say)
    lines = report.lines_of(answers, suite.long)
    table = {
        "suite": suite.name,
        **about,
        "engine": given.engine,
        "batch_size": given.batch_size if engines is None else max(answer.batch for answer in answers["none"]),
        "machine": machine(model, given.engine),
        "settings": settings,
        "lines": [line.to_dict() for line in lines],
    }
    starts = first_layers(model, chosen)
    if len(set(starts.values())) > 1:
        table["first_layers"] = starts
    if tuned:
        table["tuned"] = tuned
    if left_out:
        table["left_out"] = left_out
    found = against.pairs(lines, before, ("long", "short")) if before is not None else []
    if before is not None:
        table["against"] = {f"{pair.label}, {pair.group}": [*pair.now, *pair.before, pair.agrees] for pair in found}
    summary = {label: suite.summary([answer.text for answer in each]) for label, each in answers.items()} if given.data else {}
    if any(summary.values()):
        table["summary"] = summary
    write_json(folder / "table.json", table)
    if given.report is not None:
        command = shlex.join(["dyrate", *sys.argv[1:]])
        report.write(Path(given.report), table, command, answers, lines, suite, model, processor, given.batch_size)
    if given.json:
        common.print_json(table)
    else:
        _print_table(lines)
        for why in left_out:
            print(f"left out: {why}")
        if "first_layers" in table:
            print(report.first_layers_text(starts))
        if before is not None:
            _print_pairs(found, given.against)
        for label, numbers in table.get("summary", {}).items():
            print(f"{label}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in numbers.items()))
        print(f"answers: {folder}/*.jsonl, table: {folder / 'table.json'}" + (f", report: {given.report}" if given.report else ""))
    return 0


def _answers(
    given: argparse.Namespace, model: Any, processor: Any, engines: Any, suite: Any, chosen: list[Any], folder: Path, say: Any
) -> dict[str, list[Any]]:  # fmt: skip
    """Each contender's answers, by label. ``engines``: of vLLM; None: the model answers."""
    from dyrate_kernels.evaluation import runner, vllm

    found = {}
    for number, contender in enumerate(chosen, 1):

        def progress(done: int, total: int, number: int = number, label: str = contender.label) -> None:
            say(f"{number} of {len(chosen)}: {label}: {done} of {total}")

        found[contender.label] = (
            vllm.run(engines, suite, contender, folder, progress=progress)
            if engines is not None
            else runner.run(
                model, processor, suite, contender, folder, batch_size=given.batch_size, backend=given.backend, progress=progress
            )
        )
    say("")
    return found


def open_suite(given: argparse.Namespace, calibrates: bool) -> tuple[Any, Any, dict[str, Any]]:
    """(suite, other questions to tune costs on, what the table says about it). Files and pictures are looked at here, before any work."""
    from dyrate_kernels import shapes
    from dyrate_kernels.evaluation import suites
    from dyrate_kernels.evaluation.suite import ShapesSuite

    if given.suite == "shapes":
        check_options(given, "shapes")
        tasks = shapes.TASKS if given.tasks is None else tuple(task.strip() for task in given.tasks.split(","))
        scenes = 100 if given.limit is None else given.limit
        seed = given.seed
        # a cost is that of an answer's whole length: of the long answers where there are any, else of those that are asked
        long = tuple(task for task in tasks if task in ShapesSuite.long) or tasks
        others: Any = ShapesSuite(CALIBRATION, (seed + 500_000) % 10**6, long) if calibrates else None
        return ShapesSuite(scenes, seed, tasks), others, {"seed": seed, "scenes": scenes}
    if given.suite not in suites.names():
        raise ValueError(f"--suite must be one of shapes, {', '.join(suites.names())}, lmms-eval, got {given.suite!r}")
    check_options(given, "a data set")
    if given.data is None:
        raise ValueError(f"--suite {given.suite} needs --data FILE, the questions as the data set's authors publish them, and --images DIR")
    common.check_images(given.images, given.data, f"--suite {given.suite}")
    suite = suites.get(given.suite, given.data, given.images, given.limit)
    others = suite.held_back(CALIBRATION, LEAST_CALIBRATION) if calibrates else None
    return suite, others, {"data": suite.file.name, "questions": len(suite)}


def check_options(given: argparse.Namespace, kind: str) -> None:
    """ValueError for an option that belongs to another kind of suite, rather than silence."""
    for other, names in SUITE_OPTIONS.items():
        for name in names:
            if getattr(given, name) is not None and name not in SUITE_OPTIONS[kind]:
                raise ValueError(f"--{name.replace('_', '-')} belongs to {other}, not to --suite {given.suite}; leave it out")


def machine(model: Any, engine: str = "local") -> dict[str, str]:
    """Returns device and versions, beside which times are written."""
    import importlib
    import platform

    import torch
    import transformers

    from dyrate_kernels import __version__

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    found = {"device": name, "dyrate_kernels": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return found | ({"vllm": importlib.import_module("vllm").__version__} if engine == "vllm" else {})


def costs_in(text: str | None) -> list[float]:
    """``57.9,33.3`` (percent) -> fractions."""
    found = []
    for part in specs.split_list(text or ""):
        try:
            cost = float(part) / 100
        except ValueError:
            cost = -1.0
        if not 0.0 < cost <= 1.0:
            raise ValueError(f"--cost must be percentages in (0, 100], e.g. 57.9,33.3,20, got {part!r}")
        found.append(cost)
    if len({f"{100 * cost:g}" for cost in found}) < len(found):  # rows are named so
        raise ValueError(f"--cost names one twice: {text}")
    return found


def first_layers(model: Any, chosen: list[Any]) -> dict[str, int]:
    """Of the contenders that prune: the first layer that sees the pruned set."""
    layers = model.config.get_text_config().num_hidden_layers
    return {each.label: each.bound(model).layer_groups(layers)[0] for each in chosen if each.policy.decides}


def _at_costs(
    model: Any, processor: Any, suite: Any, chosen: list[Any], costs: list[float], folder: Path, given: argparse.Namespace, say: Any
) -> tuple[list[Any], dict[str, dict[str, float]], list[str]]:  # fmt: skip
    """The unpruned model, every other contender at every cost that it can meet, what was tuned (kept in ``tuned.json`` for the next run),
    and why the others are left out.

    Raises:
        ValueError: a contender cannot meet a cost, but for ``--leave-out``.
    """
    from dataclasses import replace

    from dyrate_kernels.evaluation.equal_cost import WITHIN, check_cost, check_reachable, mean_cost, tune
    from dyrate_kernels.json_files import read_json
    from dyrate_kernels.policies.base import ModelShape

    path = folder / "tuned.json"
    folder.mkdir(parents=True, exist_ok=True)
    known = read_json(path) if path.exists() else {}
    if not isinstance(known, dict) or not all(isinstance(each, dict) and "cost" in each for each in known.values()):
        raise ValueError(f"{path} holds no tuning of this version; give another folder, or remove the file")
    shape = ModelShape.from_config(model.config)
    found, tuned, refused = [chosen[0]], {}, []

    def at(contender: Any, cost: float, label: str) -> Any:
        if contender.vision and not contender.policy.decides:
            *before, last = contender.vision
            made = replace(contender, label=label, vision=(*before, replace(last, keep=cost)))
            setting = str(made.vision)
            if known.get(label, {}).get("policy") != setting:
                say(f"counting {label}")
                found = mean_cost(model, processor, suite, made, CALIBRATION, given.backend)
                check_cost(contender.label, cost, found)
                known[label] = {"policy": setting, "cost": found}
                write_json(path, known)
            return made
        if not contender.policy.decides:  # a coarser picture: the nearest square
            ids = processor(text=processor.image_token, images=[suite[0].images[0]])["input_ids"][0]
            tokens = list(ids).count(model.config.image_token_id)
            side = max(round(math.sqrt(cost * tokens)), 1)
            check_cost(contender.label, cost, side * side / tokens, f" with side={side}, the nearest")
            return replace(contender, label=label, side=side)
        policy = contender.bound(model)
        if known.get(label, {}).get("policy") != str(contender.policy) or abs(known[label]["cost"] - cost) > WITHIN:
            say(f"tuning {label}")
            result = tune(model, processor, suite, contender, cost, batch_size=CALIBRATION, backend=given.backend)
            known[label] = {"policy": str(contender.policy), "strength": result.strength, "cost": result.cost}
            write_json(path, known)
        tuned[label] = known[label]
        return replace(contender, label=label, policy=policy.at_strength(known[label]["strength"], shape.num_layers))

    def check(contender: Any, cost: float, label: str) -> None:
        if contender.policy.decides:
            check_reachable(model, contender, cost)

    left = [(contender, cost) for cost in costs for contender in chosen[1:]]
    for step in (check, at):  # what can be told without a question is told before the first one
        for contender, cost in [*left]:
            try:
                made = step(contender, cost, label_at(contender, cost))
                found += [] if made is None else [made]
            except ValueError as error:
                refused.append(str(error))
                left.remove((contender, cost))
        say("")
        if refused and not given.leave_out:
            raise ValueError("--cost: " + "; ".join(refused))
    return found, tuned, refused


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<78}" + ("" if text else "\r"), end="", file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


def _print_pairs(found: list[Any], path: str) -> None:
    from dyrate_kernels.evaluation.report import interval

    same = sum(pair.agrees for pair in found)
    print(f"{same} of {len(found)} scores agree with {path} (their 95 % intervals overlap)" + (":" if same < len(found) else ""))
    for pair in found:
        if not pair.agrees:
            print(f"  {pair.label}, {pair.group}: {interval(*pair.now)}, before {interval(*pair.before)}")


def _print_table(lines: list[Any]) -> None:
    from dyrate_kernels.evaluation.report import HEADINGS, cells

    for group in dict.fromkeys(line.group for line in lines):
        rows = [line for line in lines if line.group == group]
        title = f"{group} answers ({rows[0].questions} questions, n = {rows[0].n:.0f} tokens)"
        common.print_table(title, HEADINGS, [cells(line) for line in rows])
