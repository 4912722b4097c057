"""Pictures a second beside the unpruned model's: the same pictures, batches of the same size, in one process, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dyrate_kernels.captioning.captioner import WINDOW, Caption, Captioner, Task
from dyrate_kernels.captioning.inputs import Source
from dyrate_kernels.measuring.timing import environment

ROUNDS = 2
THIS, NONE, PLAIN = "this run", "unpruned, patched", "unpatched"
"""Rows: the task; the same with policy ``none`` and without reducers; the model's own ``generate``, without a patch."""


def compare(task: Task, sources: Sequence[Source], rounds: int = ROUNDS) -> dict[str, Any]:
    """Captions the pictures with each row in turns, ``rounds`` times after a warm-up on as many pictures as a batch holds. The time of a
    round is that of all its work: pictures are read, encoded, generated for and decoded; loading the model and patching it are not in it.

    Returns:
        For JSON: the rows by name with their ``seconds`` (mean of the rounds) and ``pictures_per_second``, what the first row's speed is
        to each of the others', and how many captions of the two unpruned rows are equal.

    Raises:
        ValueError: there is no picture, or less than one round.
        Whatever loading the model or patching it raises.
    """
    from dyrate_kernels.loading import load_model

    if not sources or rounds < 1:
        raise ValueError(f"there must be a picture and a round to compare, got {len(sources)} pictures and {rounds} rounds")
    loaded = load_model(task.model, task.device, task.dtype, task.quantize)
    seconds: dict[str, float] = {}
    captions: dict[str, list[Caption]] = {}
    for number in range(-1, rounds):  # the first is the warm-up
        for name in (THIS, NONE, PLAIN):
            part = sources[: task.batch_size] if number < 0 else sources
            took, captions[name] = _measured(_task_of(name, task), loaded, name != PLAIN, part)
            seconds[name] = seconds.get(name, 0.0) + (took / rounds if number >= 0 else 0.0)
    rows = {name: _row(seconds[name], captions[name]) for name in captions}
    speed = {name: row["pictures_per_second"] for name, row in rows.items()}
    equal = sum(a.caption == b.caption for a, b in zip(captions[NONE], captions[PLAIN], strict=True))
    return {
        "pictures": len(sources),
        "rounds": rounds,
        "batch_size": task.batch_size,
        "device": str(loaded[0].device),
        "dtype": str(loaded[0].dtype).removeprefix("torch."),
        "environment": environment(),
        "rows": rows,
        "speed_to_unpruned": {name: speed[THIS] / speed[name] if speed[name] else None for name in (NONE, PLAIN)},
        "equal_unpruned_captions": equal,
    }


def _task_of(name: str, task: Task) -> Task:
    return task if name == THIS else replace(task, policy="none", vision=None)


def _measured(task: Task, loaded: tuple[Any, Any], patched: bool, sources: Sequence[Source]) -> tuple[float, list[Caption]]:
    """Seconds, and the captions."""
    worker, window = Captioner(task, loaded, patched), WINDOW * task.batch_size
    try:
        started, captions = time.perf_counter(), []
        for start in range(0, len(sources), window):
            captions += worker(sources[start : start + window])
        return time.perf_counter() - started, captions
    finally:
        if worker.handle is not None:
            worker.handle.unpatch()


def _row(seconds: float, captions: Sequence[Caption]) -> dict[str, Any]:
    good = [caption for caption in captions if caption.error is None]
    return {
        "seconds": seconds,
        "pictures_per_second": len(good) / seconds,
        "captioned": len(good),
        "generated_tokens": sum(caption.tokens for caption in good),
    }
