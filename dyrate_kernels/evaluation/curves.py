"""What the unpruned model looks at while it writes: mass by token type, and whether the important tokens stay the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

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
    """

    layer: int
    share: float
    answers: list[int]
    mass: dict[str, list[float]]
    with_first: list[float]
    with_last: list[float]
    returned: list[float]

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
    found = []
    for layer in layers:
        sequences = []
        with patch(model, KeepAll(k=layer + 1), record_importance=True) as handle:
            for start in range(0, len(suite), batch_size):
                items = [suite[index] for index in range(start, min(start + batch_size, len(suite)))]
                inputs = encode(processor, items).to(model.device)
                output = model.generate(**inputs, do_sample=False, max_new_tokens=max(item.most for item in items))
                end = processor.tokenizer.eos_token_id
                for place, row in enumerate(output[:, inputs["input_ids"].shape[1] :].tolist()):
                    stats = handle.stats(place, row.index(end) + 1 if end in row else len(row))
                    if stats.visual_tokens[0]:
                        sequences.append(_of_one(stats, share))
        if not sequences:
            raise ValueError("no question of the suite has a picture, so there is nothing to measure")
        found.append(_mean(layer, share, sequences, min(least, len(sequences))))
    return found


def _of_one(stats: Stats, share: float) -> np.ndarray:
    """``[steps, 7]``: mass by type, overlap with the first step and with the last one, returned."""
    count = max(round(share * stats.visual_tokens[0]), 1)
    rows, before, ever, first = [], None, set(), None
    for step in stats.steps:
        assert step.importance is not None
        order = np.argsort(-np.asarray(step.importance[0]), kind="stable")
        now = set(order[:count].tolist())
        first = now if first is None else first
        last = now if before is None else before
        rows.append([*step.mass[0], len(now & first) / count, len(now & last) / count, len((now - last) & ever) / count])
        ever |= now
        before = now
    return np.array(rows)


def _mean(layer: int, share: float, sequences: list[np.ndarray], least: int) -> Curves:
    means, answers = [], []
    for step in range(max(len(each) for each in sequences)):
        there = [each[step] for each in sequences if len(each) > step]
        if len(there) < least:
            break
        means.append(np.mean(there, axis=0))
        answers.append(len(there))
    columns = np.array(means).T.tolist()
    return Curves(layer, share, answers, dict(zip(TYPES, columns[:4], strict=True)), *columns[4:])
