"""SparseVLM's recycling written down once more, slowly: Python lists and float64. Nothing of ``dyrate_kernels`` is imported here."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best(scores: dict[int, float], count: int) -> list[int]:
    """The keys of highest score, ties to the smaller key."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


def cluster(states: dict[int, Sequence[float]], count: int) -> dict[int, int]:
    """The centre of each point: ``count`` centres by density peaks."""
    points = sorted(states)
    apart = {(i, j): distance(states[i], states[j]) for i in points for j in points}
    near = min(max(count, 2), len(points))
    spread = {i: sum(d * d for d in sorted(apart[i, j] for j in points)[:near]) / near for i in points}
    widest = max(apart.values(), default=0.0)
    score = {}
    for i in points:
        denser = [apart[i, j] for j in points if (spread[j], j) < (spread[i], i)]
        score[i] = min([*denser, widest]) * math.exp(-spread[i])
    centres = sorted(best(score, count))
    return {i: i if i in centres else min(centres, key=lambda c: (apart[i, c], c)) for i in points} if centres else {}


def recycle(
    rating: dict[int, float], count: int, states: dict[int, Sequence[float]], share: float, clusters: float
) -> tuple[list[int], dict[int, int]]:  # fmt: skip
    """Returns what stays of the rated tokens, and for each token that has one the token it becomes part of.

    Args:
        rating: by token, all that can be chosen.
        count: how many stay, merged ones included.
        states: by token, of those that can be merged.
        share: of those that go, how many are recycled.
        clusters: of those, how many stay as centres.
    """
    count = min(count, len(rating))
    recycled = math.floor((len(rating) - count) * share + 1e-6)
    centres = min(math.ceil(recycled * clusters - 1e-6), count // 2)
    selected = best(rating, count - centres)
    pool = best({t: rating[t] for t in rating if t not in selected and t in states}, recycled)
    parts = cluster({t: states[t] for t in pool}, min(centres, len(pool)))
    stays = {*selected, *parts.values()}
    stays |= {*best({t: rating[t] for t in rating if t not in stays}, count - len(stays))}
    return sorted(stays), {**parts, **{t: t for t in stays}}
