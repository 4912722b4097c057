"""Engines, which run the workers: this process (``local``), Ray Data, on this machine or a cluster (``ray``), or vLLM (``vllm``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dyrate_kernels.captioning import on_ray, vllm, vllm_on_ray
from dyrate_kernels.captioning.captioner import WINDOW, Caption, Captioner, Task
from dyrate_kernels.captioning.inputs import Source

ENGINES = ("ray", "local", "vllm")


def run(
    engine: str, task: Task, sources: Sequence[Source], workers: int | None = None, address: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> Iterator[list[Caption]]:  # fmt: skip
    """Captions, some at a time, by one of ``ENGINES``.

    Args:
        workers, address: ``on_ray.run_ray``; with ``vllm`` and an address: engines on that cluster (``vllm_on_ray``).
        more: of engine ``vllm``: arguments of ``vllm.LLM``.

    Raises:
        Whatever the engine raises.
    """
    if engine == "vllm":
        given = more or {}
        return vllm_on_ray.run_on_ray(task, sources, workers, address, given) if address else vllm.run_vllm(task, sources, given)
    return run_local(task, sources) if engine == "local" else on_ray.run_ray(task, sources, workers, address)


def run_local(task: Task, sources: Sequence[Source]) -> Iterator[list[Caption]]:
    """One worker, in this process."""
    captioner, window = Captioner(task), WINDOW * task.batch_size
    for start in range(0, len(sources), window):
        yield captioner(sources[start : start + window])
