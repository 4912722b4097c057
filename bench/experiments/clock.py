"""The clock of a comparison: every variant once a round, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from dyrate_kernels.measuring.timing import Recorded

AHEAD = 2_000_000  # cycles that the device waits at the start of a round, about a millisecond: the host queues the round meanwhile
MOST, LEAST = 60, 7  # rounds


def interleaved(work: Sequence[Recorded], budget: float) -> list[list[float]]:
    """Seconds of one call, a list a piece of ``work`` with an entry a round. Each round begins with another one.

    Args:
        budget: seconds to measure for, about.
    """
    if not torch.cuda.is_available():
        return _on_host(work)
    for one in work:
        one.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for one in work:
        one.replay()
    torch.cuda.synchronize()
    once = max(time.perf_counter() - begin, 1e-6)
    rounds = max(min(int(budget / once), MOST), LEAST)
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in work]
    for number in range(rounds):
        torch.cuda._sleep(AHEAD)
        for place in range(len(work)):
            which = (number + place) % len(work)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work[which].replay()
            end.record()
            marks[which].append((start, end))
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) * 1e-3 / one.number for start, end in found] for one, found in zip(work, marks, strict=True)]


def _on_host(work: Sequence[Recorded]) -> list[list[float]]:
    found = []
    for one in work:
        begin = time.perf_counter()
        one.replay()
        found.append([(time.perf_counter() - begin) / one.number])
    return found
