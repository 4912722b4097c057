"""``dyrate eval --suite lmms-eval``: lmms-eval's tasks and metrics, our costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dyrate_kernels.cli import common, contenders
from dyrate_kernels.files import write_json
from dyrate_kernels.units import bytes_text


def run(given: argparse.Namespace, chosen: list[Any], folder: Path, say: Any) -> int:
    """lmms-eval's tasks: its metrics, our costs."""
    import importlib.util

    tasks = [task.strip() for task in (given.tasks or "").split(",") if task.strip()]
    if not tasks:
        raise ValueError("--suite lmms-eval needs --tasks A,B,.., e.g. gqa,pope")
    for name in ("cost", "report", "against"):
        if getattr(given, name) is not None:
            raise ValueError(f"--{name} is not there for --suite lmms-eval; leave it out, or give a data set's own file (--suite gqa)")
    if importlib.util.find_spec("lmms_eval") is None:
        raise RuntimeError("--suite lmms-eval needs the package lmms-eval: pip install 'dyrate-kernels[lmms-eval]'")
    from dyrate_kernels.evaluation.lmms import evaluate, stem_of

    stems = [stem_of(contender, task) for contender in chosen for task in tasks]
    contenders.check_labels([], [folder / f"{stem}.{ending}" for stem in stems for ending in ("json", "jsonl")])
    model, processor = common.load_model(given)
    settings = contenders.introduce(given, model, chosen)
    found = evaluate(
        model, processor, chosen, tasks, folder, batch_size=given.batch_size, backend=given.backend, limit=given.limit,
        include_path=given.include_path, progress=say,
    )  # fmt: skip
    say("")
    table = {"suite": "lmms-eval", "limit": given.limit, "policies": found, "settings": settings}
    write_json(folder / "table.json", table)
    if given.json:
        common.print_json(table)
        return 0
    for task, first in found["none"].items():
        headings = ["policy", *first["metrics"], "of unpruned", "kept", "rate", "FLOPs", "KV", "TTFT ms", "ms/token"]
        title = f"{task} ({first['costs']['questions']} questions)"
        common.print_table(title, headings, [[label, *_cells(by_task[task], first)] for label, by_task in found.items()])
    print(f"answers: {folder}/*.jsonl, table: {folder / 'table.json'}")
    return 0


def _cells(line: dict[str, Any], unpruned: dict[str, Any]) -> list[str]:
    """Metrics with their standard errors, the first one as a share of the unpruned model's, costs."""
    cells = [f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "") for value, error in line["metrics"].values()]
    costs = line["costs"]
    (value, _), (whole, _) = (next(iter(each["metrics"].values()), (0.0, None)) for each in (line, unpruned))
    cells += [f"{100 * value / whole:.1f} %" if whole else "-"]
    cells += [f"{100 * costs[name]:.1f} %" for name in ("kept_mean", "rate", "flops_share")] + [bytes_text(costs["kv_bytes"])]
    return cells + ["-" if costs[name] is None else f"{1000 * costs[name]:.2f}" for name in ("ttft_seconds", "seconds_per_token")]
