"""The engine ``ray``: workers on Ray Data, on this machine or a cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dyrate_kernels.captioning.captioner import WINDOW, Caption, Captioner, Task
from dyrate_kernels.captioning.inputs import Source


def has_ray() -> bool:
    """Returns whether Ray Data is installed."""
    return importlib.util.find_spec("ray") is not None


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
    with connected(address) as ray:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        on_gpu = gpus > 0 and (task.device is None or task.device.startswith("cuda"))
        count = workers or (gpus if on_gpu else 1)
        window = WINDOW * task.batch_size
        rows = rows_of(sources)
        blocks = max(min(-(-len(rows) // window), 20_000), 1)
        data = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Worker, fn_constructor_args=(task,), batch_size=window, compute=ray.data.ActorPoolStrategy(size=min(count, blocks)),
            num_gpus=1 if on_gpu else 0, num_cpus=1,
        )  # fmt: skip
        tables: Iterable[Any] = data.iter_batches(batch_size=None, batch_format="pyarrow")
        for table in tables:
            yield [Caption(**row) for row in table.to_pylist()]


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Within: Ray, quiet, connected to a cluster or (None) started here. A connection that was there before stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False, "num_cpus": _processors()}
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False, configure_logging=True)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)
        yield ray
    finally:
        if mine:
            ray.shutdown()


def rows_of(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Sources as rows of a Ray dataset; :func:`source_of` reads one."""
    return [{"number": number, **asdict(source), "file": os.fsencode(source.file)} for number, source in enumerate(sources)]


def source_of(row: Mapping[str, Any]) -> Source:
    """A row of :func:`rows_of`."""
    return Source(str(row["name"]), os.fsdecode(row["file"]), int(row["row"]))


def _processors() -> int:
    return max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 2)


class _Worker:
    """An actor of Ray Data: columns in, columns out."""

    def __init__(self, task: Task) -> None:
        logging.getLogger("ray").setLevel(logging.ERROR)
        self.captioner = Captioner(task)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        columns = zip(batch["name"], batch["file"], batch["row"], strict=True)
        sources = [source_of({"name": name, "file": file, "row": row}) for name, file, row in columns]
        found = [caption.to_dict() for caption in self.captioner(sources)]
        return {name: [each[name] for each in found] for name in found[0]}
