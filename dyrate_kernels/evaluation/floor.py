"""The floor under a measured time: bytes that had to move over the copy bandwidth of the device (design.md, section 10)."""

from __future__ import annotations

import functools
import statistics
import time

import torch


@functools.cache
def copy_bandwidth_of(device: torch.device) -> float:
    """:func:`copy_bandwidth`, measured once in a process."""
    return copy_bandwidth(device)


def copy_bandwidth(device: torch.device, size: int | None = None, rounds: int = 9) -> float:
    """Bytes a second of a copy on ``device``, read plus written; the median of ``rounds``.

    Args:
        size: bytes copied; default: 1 GiB on a CUDA device, else 256 MiB, more than the caches hold.
    """
    cuda = device.type == "cuda"
    size = size or (1 << 30 if cuda else 1 << 28)
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.ones_like(source)
    seconds = []
    for _ in range(rounds + 1):  # the first one touches fresh memory
        started = time.perf_counter()
        target.copy_(source)
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size / statistics.median(seconds[1:])
