"""From answers to a table: scores with paired bootstrap intervals against the unpruned model, agreement, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dyrate_kernels.evaluation.runner import Answer

RESAMPLES = 4000


@dataclass(frozen=True)
class Line:
    """A contender over a set of questions.

    Attributes:
        label, group: whose, over what; ``"short"`` and ``"long"`` are sets of groups.
        score, low, high: points over points that could be had, with its 95 % bootstrap interval.
        retained, retained_low, retained_high: score / unpruned score, resampled in pairs; None where the unpruned model scored nothing.
        agreement: share of token positions where the answer equals the unpruned one.
        kept, visual_share, n, paper_cost, exact_cost, kv_bytes: means over questions.
        flops_share: executed over unpruned, summed.
        time_per_token, first: seconds a decoded token, all of a batch together, and to its first one.
        floor: of ``time_per_token``: bytes read over the copy bandwidth.
        batch: the largest.
        questions: how many.
    """

    label: str
    group: str
    score: float
    low: float
    high: float
    retained: float | None
    retained_low: float | None
    retained_high: float | None
    agreement: float
    kept: float
    visual_share: float
    n: float
    paper_cost: float
    exact_cost: float
    flops_share: float
    kv_bytes: float
    time_per_token: float
    floor: float
    first: float
    batch: int
    questions: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise(label: str, group: str, answers: Sequence[Answer], unpruned: Sequence[Answer], seed: int = 0) -> Line:
    """One line. ``answers`` and ``unpruned`` are to the same questions, in the same order.

    Raises:
        ValueError: they are not, or there are none.
    """
    if not answers or [a.item for a in answers] != [b.item for b in unpruned]:
        raise ValueError(f"{label}: needs answers to the same questions as the unpruned model's, got {len(answers)} and {len(unpruned)}")
    points = np.array([[a.right, a.total, b.right, b.total] for a, b in zip(answers, unpruned, strict=True)])
    score, low, high = bootstrap(points[:, 0], points[:, 1], seed)
    retained, retained_low, retained_high = paired_bootstrap(points, seed)
    decoded = max(sum(len(a.tokens) - 1 for a in answers), 1)
    same = [agreement(a.tokens, b.tokens) for a, b in zip(answers, unpruned, strict=True)]

    def mean(name: str) -> float:
        return float(np.mean([getattr(a, name) for a in answers]))

    return Line(
        label, group, score, low, high, retained, retained_low, retained_high, float(np.mean(same)),
        mean("kept"), mean("visual_share"), mean("n"), mean("paper_cost"), mean("exact_cost"),
        sum(a.flops for a in answers) / sum(a.flops_unpruned for a in answers), mean("kv_bytes"),
        sum(a.seconds for a in answers) / decoded, sum(a.floor for a in answers) / decoded,
        mean("first"), max(a.batch for a in answers), len(answers),
    )  # fmt: skip


def agreement(tokens: Sequence[int], other: Sequence[int]) -> float:
    """Share of positions with equal tokens; of the longer one's positions."""
    return sum(a == b for a, b in zip(tokens, other, strict=False)) / max(len(tokens), len(other), 1)


def lead(first: Sequence[Answer], other: Sequence[Answer], seed: int = 0) -> tuple[float, float, float]:
    """(difference, low, high): one contender's score less another's to the same questions, resampled together, 95 %."""
    if [a.item for a in first] != [b.item for b in other]:
        raise ValueError("a lead needs answers to the same questions")
    points = np.array([[a.right, a.total, b.right, b.total] for a, b in zip(first, other, strict=True)])
    sums = np.concatenate([points.sum(0, keepdims=True), _draws(len(points), seed) @ points])
    differences = sums[:, 0] / np.maximum(sums[:, 1], 1e-12) - sums[:, 2] / np.maximum(sums[:, 3], 1e-12)
    low, high = np.quantile(differences[1:], (0.025, 0.975))
    return float(differences[0]), float(low), float(high)


def _draws(count: int, seed: int) -> np.ndarray:
    """``[RESAMPLES, count]``: how often each question is drawn."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def bootstrap(right: np.ndarray, total: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(ratio, low, high): sum of right over sum of total, questions resampled, 95 %."""
    draws = _draws(len(right), seed)
    low, high = np.quantile(draws @ right / np.maximum(draws @ total, 1e-12), (0.025, 0.975))
    return float(right.sum() / total.sum()), float(low), float(high)


def paired_bootstrap(points: np.ndarray, seed: int = 0) -> tuple[float, float, float] | tuple[None, None, None]:
    """(ratio, low, high) of two scores over the same questions, resampled together: columns right, total, right, total.

    A share of nothing is no number: None where the second score is 0, and draws in which it is 0 take no part in the interval.
    """
    whole = points.sum(0)
    if not whole[2]:
        return None, None, None
    sums = _draws(len(points), seed) @ points
    sums = sums[sums[:, 2] > 0]
    ratio = (sums[:, 0] / np.maximum(sums[:, 1], 1e-12)) / (sums[:, 2] / np.maximum(sums[:, 3], 1e-12))
    low, high = np.quantile(ratio, (0.025, 0.975))
    return float((whole[0] / whole[1]) / (whole[2] / whole[3])), float(low), float(high)
