"""Engines, which run the workers: this process (``local``), or Ray Data, on this machine or a cluster (``ray``)."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dyrate_kernels.captioning.captioner import Caption, Captioner, Task
from dyrate_kernels.captioning.inputs import Source

ENGINES = ("ray", "local")
WINDOW = 4  # batches that a worker is handed at a time, and sorts by visual tokens


def has_ray() -> bool:
    """Returns whether Ray Data is installed."""
    return importlib.util.find_spec("ray") is not None


def run_local(task: Task, sources: Sequence[Source]) -> Iterator[list[Caption]]:
    """One worker, in this process."""
    captioner, window = Captioner(task), WINDOW * task.batch_size
    for start in range(0, len(sources), window):
        yield captioner(sources[start : start + window])


def run_ray(task: Task, sources: Sequence[Source], workers: int | None, address: str | None) -> Iterator[list[Caption]]:
    """Workers on Ray: each an actor with a patched model. One that is killed is started anew, and what it had not answered is done again.

    Args:
        workers: how many; None: one a GPU of the cluster, or one.
        address: of a running cluster (``ray://..``, ``auto``); None: Ray is started on this machine, and ended with the run.

    Raises:
        ImportError: Ray Data is not installed.
        ConnectionError: no cluster answers there.
    """
    if not has_ray():
        raise ImportError("--engine ray needs Ray Data: pip install 'dyrate-kernels[caption]', or use --engine local")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False, "num_cpus": _processors()}
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False, configure_logging=True)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        on_gpu = gpus > 0 and (task.device is None or task.device.startswith("cuda"))
        count = workers or (gpus if on_gpu else 1)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)
        window = WINDOW * task.batch_size
        rows = [{"number": number, **asdict(source), "file": os.fsencode(source.file)} for number, source in enumerate(sources)]
        blocks = max(min(-(-len(rows) // window), 20_000), 1)
        data = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Worker, fn_constructor_args=(task,), batch_size=window, compute=ray.data.ActorPoolStrategy(size=min(count, blocks)),
            num_gpus=1 if on_gpu else 0, num_cpus=1,
        )  # fmt: skip
        tables: Iterable[Any] = data.iter_batches(batch_size=None, batch_format="pyarrow")
        for table in tables:
            yield [Caption(**row) for row in table.to_pylist()]
    finally:
        if mine:
            ray.shutdown()


def _processors() -> int:
    return max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 2)


class _Worker:
    """An actor of Ray Data: columns in, columns out."""

    def __init__(self, task: Task) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        self.captioner = Captioner(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        sources = [Source(str(n), os.fsdecode(f), int(r)) for n, f, r in zip(batch["name"], batch["file"], batch["row"], strict=True)]
        found = [caption.to_dict() for caption in self.captioner(sources)]
        return {name: [each[name] for each in found] for name in found[0]}
