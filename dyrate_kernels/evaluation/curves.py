"""Curves of the unpruned model's attention while it writes: mass by token type, and whether the important tokens stay the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dyrate_kernels import answering
from dyrate_kernels.evaluation.runner import encode
from dyrate_kernels.evaluation.suite import Suite
from dyrate_kernels.patching.api import patch
from dyrate_kernels.policies.none import KeepAll
from dyrate_kernels.stats import Stats

TYPES = ("system", "image", "instruction", "response")


@dataclass(frozen=True)
class Curves:
    """Means over answers, by step (0 = prefill), at one layer. The important tokens of a step are its ``share`` most attended ones.

    Attributes:
        layer: whose attention.
        share: of the visual tokens that are called important.
        answers: how many answers reached each step.
        mass: by token type.
        with_first: fraction of a step's important tokens that were important in the prefill; chance is ``share``.
        with_last: likewise, in the step before.
        returned: fraction of a step's important tokens that were not in the step before but in some earlier one: what an evicted token
            would have been missed for.
        with_layers: by layer, fraction of a step's important tokens that are important there too, mean over decode steps; chance is
            ``share``. A ranking made at one layer serves another one that far.
    """

    layer: int
    share: float
    answers: list[int]
    mass: dict[str, list[float]]
    with_first: list[float]
    with_last: list[float]
    returned: list[float]
    with_layers: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def measure(
    model: Any, processor: Any, suite: Suite, layers: Sequence[int], share: float = 0.25, batch_size: int = 8, least: int = 5
) -> list[Curves]:  # fmt: skip
    """Curves at each of the layers, for the suite's questions with pictures. Steps that fewer than ``least`` answers reach are left out.

    Raises:
        ValueError: no answer has a picture.
    """
    of_layer: dict[int, list[AnswerAtLayer]] = {}
    for layer in layers:
        sequences = of_layer[layer] = []
        with patch(model, KeepAll(k=layer + 1), record_importance=True) as handle:
            for start in range(0, len(suite), batch_size):
                items = [suite[index] for index in range(start, min(start + batch_size, len(suite)))]
                rows = answering.generate(
                    model, processor, encode(processor, items, model), max(item.most for item in items), handle=handle
                )
                for sequence, row in enumerate(rows):
                    stats = handle.stats(sequence, len(row))
                    if stats.visual_tokens[0]:
                        sequences.append(_of_one(stats, share))
        if not sequences:
            raise ValueError("no question of the suite has a picture, so there is nothing to measure")
    return [_mean(layer, share, of_layer, least) for layer in layers]


@dataclass(frozen=True)
class AnswerAtLayer:
    """One answer at one layer.

    Attributes:
        rows: ``[steps, 7]``: mass by type, overlap with the first step and with the last one, returned.
        important: of each step.
    """

    rows: np.ndarray
    important: list[set[int]]


def _of_one(stats: Stats, share: float) -> AnswerAtLayer:
    count = max(round(share * stats.visual_tokens[0]), 1)
    rows: list[list[float]] = []
    important: list[set[int]] = []
    ever: set[int] = set()
    for step in stats.steps:
        assert step.importance is not None
        order = np.argsort(-np.asarray(step.importance[0]), kind="stable")
        now = set(order[:count].tolist())
        important.append(now)
        first, last = important[0], important[max(len(important) - 2, 0)]
        rows.append([*step.mass[0], len(now & first) / count, len(now & last) / count, len((now - last) & ever) / count])
        ever |= now
    return AnswerAtLayer(np.array(rows), important)


def _mean(layer: int, share: float, of_layer: dict[int, list[AnswerAtLayer]], least: int) -> Curves:
    sequences = of_layer[layer]
    means, answers = [], []
    for step in range(max(len(each.rows) for each in sequences)):
        there = [each.rows[step] for each in sequences if len(each.rows) > step]
        if len(there) < min(least, len(sequences)):
            break
        means.append(np.mean(there, axis=0))
        answers.append(len(there))
    *mass, with_first, with_last, returned = np.array(means).T.tolist()
    shared = {other: _shared(sequences, there) for other, there in of_layer.items()}
    return Curves(layer, share, answers, dict(zip(TYPES, mass, strict=True)), with_first, with_last, returned, shared)


def _shared(sequences: list[AnswerAtLayer], others: list[AnswerAtLayer]) -> float:
    """Mean over the decode steps of the same answers."""
    pairs = [pair for a, b in zip(sequences, others, strict=True) for pair in list(zip(a.important, b.important, strict=True))[1:]]
    return float(np.mean([len(now & there) / len(now) for now, there in pairs])) if pairs else 1.0
