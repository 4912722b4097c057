"""The clock of all measurements, and the facts that a row of results carries.

On a CUDA device: events around replays of a CUDA graph that holds several calls, each on buffers of its own where one set would fit in the
L2 cache (cold L2), medians over replays. On a CPU, which is for rehearsals only: a host clock.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyrate_kernels.triton_kernels import interpreted

REHEARSAL = "rehearsal in Triton's interpreter on a CPU: not a measurement"
ROOT = Path(__file__).resolve().parent.parent.parent  # of a checkout


def release() -> None:
    """Gives back the memory of what is no longer used, so that the next measurement finds it free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Times(NamedTuple):
    """Seconds of one call: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def here() -> torch.device:
    """The current CUDA device, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@functools.cache
def environment() -> dict[str, Any]:
    """Machine and versions, as every row carries them."""
    import transformers

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    facts: dict[str, Any] = {
        "gpu": None,
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "measurement": torch.cuda.is_available() and not interpreted(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(here())
        facts |= {
            "gpu": properties.name,
            "driver": _driver(),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    else:
        facts["gpu"] = f"none ({platform.machine()} CPU)"
    return facts


def _commit() -> str:
    """The checkout's commit, "+" behind it where files differ from it; "unknown" outside of git. DYRATE_COMMIT names that of a copy."""
    if os.environ.get("DYRATE_COMMIT"):
        return os.environ["DYRATE_COMMIT"]
    try:
        commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
        return commit + ("+" if _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]) else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _driver() -> str:
    try:
        return _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL).stdout.strip()


def summary(seconds: Sequence[float]) -> Times:
    """Median and percentiles."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return Times(statistics.median(ordered), at(0.2), at(0.8))


def copies_for_cold_cache(bytes_per_set: int, most: int = 128) -> int:
    """Returns how many sets of inputs to rotate among, so that three times the L2 cache passes before one is read again."""
    l2 = environment().get("l2_bytes") or 0
    return max(min(math.ceil(3 * l2 / max(bytes_per_set, 1)), most), 1)


class Recorded(NamedTuple):
    """Work that can be started again and again.

    Attributes:
        replay: starts ``number`` calls; on a CPU runs one.
        last: what the last of the calls left. On a CUDA device replays write it again, and it lasts as long as ``replay``.
    """

    replay: Callable[[], Any]
    number: int
    last: Callable[[], Any]


def recorded(calls: Sequence[Callable[[], Any]]) -> Recorded:
    """One CUDA graph that holds all of ``calls`` (the same work on different buffers), once or more often; on a CPU the calls."""
    if not torch.cuda.is_available():
        order = itertools.cycle(calls)
        return Recorded(lambda: next(order)(), 1, calls[-1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    repeats = max(1, 8 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in itertools.chain.from_iterable([calls] * repeats):
            result = call()
    return Recorded(graph.replay, repeats * len(calls), lambda: result)


def time_captured(calls: Sequence[Callable[[], Any]], *, budget: float = 0.25, most: int = 200) -> Times:
    """Seconds of one of ``calls`` (the same work on different buffers), from replays of one CUDA graph that holds all of them.

    Args:
        budget: seconds to measure for, about.
        most: replays at most.
    """
    if not torch.cuda.is_available():
        return _time_on_host(calls)
    work = recorded(calls)
    times = _events(work.replay, budget, most)
    return Times(*(value / work.number for value in times))


def time_launched(calls: Sequence[Callable[[], Any]], *, budget: float = 0.25, most: int = 200) -> Times:
    """Seconds of one of ``calls`` as Python launches it, one after the other, without a graph."""
    if not torch.cuda.is_available():
        return _time_on_host(calls)
    order = itertools.cycle(calls)
    for _ in range(min(len(calls) + 2, 8)):
        next(order)()
    return _events(lambda: next(order)(), budget, most)


def _events(run: Callable[[], Any], budget: float, most: int) -> Times:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - begin, 1e-6)
    rounds = max(min(int(budget / once), most), 7)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) * 1e-3 for start, end in marks])


def _time_on_host(calls: Sequence[Callable[[], Any]], count: int = 3) -> Times:
    calls[0]()
    seconds = []
    for call in list(itertools.islice(itertools.cycle(calls), count)):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return summary(seconds)


def host_time(call: Callable[[], Any], rounds: int = 30, burst: int = 50) -> Times:
    """Seconds of Python that one call takes before it returns. The device is idle at the start of each burst, and is not waited for."""
    if not torch.cuda.is_available():
        rounds, burst = 2, 1
    seconds = []
    for _ in range(min(rounds, 3)):
        call()
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(burst):
            call()
        seconds.append((time.perf_counter() - begin) / burst)
    return summary(seconds)


@functools.cache
def copy_bandwidth(size: int | None = None, device: torch.device | None = None) -> tuple[float, Times]:
    """Bytes a second of a device-to-device copy, read plus written: the roof under every floor here. And the times behind it. Measured once
    in a process.

    Args:
        size: bytes copied; None: 4 GiB on a CUDA device, or an eighth of what is free there, else 256 MiB, more than the caches hold.
        device: None: :func:`here`.
    """
    device = here() if device is None else device
    if size is None:
        size = min(4 << 30, torch.cuda.mem_get_info(device)[0] // 8) if device.type == "cuda" else 256 << 20
    source = torch.arange(size // 4, dtype=torch.int32, device=device)  # written: pages of zeros may be one and the same
    target = torch.empty_like(source)
    copy = [lambda: target.copy_(source)]
    times = time_launched(copy, budget=1.0) if device.type == "cuda" else _time_on_host(copy, 7)
    if not torch.equal(source[:: 1 << 12], target[:: 1 << 12]):
        raise RuntimeError("the copy did not copy")
    return 2 * size / times.median, times


@functools.cache
def product_rate(dtype: torch.dtype | None = None, device: torch.device | None = None, size: int | None = None) -> tuple[float, Times]:
    """FLOPs a second of a product of two square matrices, and the times behind it. Measured once in a process.

    Args:
        dtype: None: bfloat16 on a CUDA device, else float32.
        device: None: :func:`here`.
        size: rows; None: 8192 on a CUDA device, else 1024.
    """
    device = here() if device is None else device
    cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    size = size or (8192 if cuda else 1024)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    multiply = [lambda: torch.mm(left, right, out=product)]
    times = time_launched(multiply, budget=1.0) if cuda else _time_on_host(multiply, 5)
    if not relative(product[:4], left[:4].double() @ right.double()) < 0.1:
        raise RuntimeError("the product is wrong")
    return 2.0 * size**3 / times.median, times


def row(
    name: str,
    times: Times | None,
    *,
    group: str,
    bandwidth: float | None = None,
    moved: float | None = None,
    gate: dict[str, Any] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """One row of ``report.json``.

    Args:
        times: None where nothing was timed; ``facts["note"]`` then says why.
        bandwidth: measured copy bandwidth, bytes a second.
        moved: bytes that the work must read and write at least.
        gate: of :func:`correctness`; a row without one that passed takes part in no speed-up.
        facts: B, N, dtype and whatever else names the row.
    """
    micro = None if times is None else [round(1e6 * value, 3) for value in times]
    floor = moved / bandwidth if moved and bandwidth else None
    rate = moved / times.median if moved and times else None
    here = environment()
    return {
        "group": group,
        "name": name,
        "B": None,
        "N": None,
        "dtype": None,
        **facts,
        "median_us": micro and micro[0],
        "p20_us": micro and micro[1],
        "p80_us": micro and micro[2],
        "bytes": None if moved is None else int(moved),
        "GB_per_s": rate and round(rate / 1e9, 2),
        "share_of_copy": rate and bandwidth and round(rate / bandwidth, 4),
        "floor_us": floor and round(1e6 * floor, 3),
        "times_floor": floor and times and round(times.median / floor, 3),
        "correct": gate,
        **{key: here[key] for key in ("gpu", "driver", "torch", "triton", "transformers", "commit", "measurement")},
        "label": None if here["measurement"] else REHEARSAL,
    }


def relative(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||``."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def correctness(limit: float, **errors: float) -> dict[str, Any]:
    """A gate: passed where every error is within ``limit``. NaN never is."""
    return {"passed": all(error <= limit for error in errors.values()), "limit": limit, "errors": errors}
