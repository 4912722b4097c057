"""Correctness of answers: attributes named in a description, or an exact short answer; accuracies with confidence intervals."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from statistics import NormalDist

from dyrate_kernels.shapes.scenes import COLOURS, PLACES, SHAPES, SIZES
from dyrate_kernels.shapes.tasks import Sample

_THING = re.compile(
    r"(?P<place>"
    + "|".join(sorted(PLACES, key=len, reverse=True))
    + r")\s+there\s+is\s+an?\s+(?P<size>"
    + "|".join(SIZES)
    + r")\s+(?P<colour>"
    + "|".join(COLOURS)
    + r")\s+(?P<shape>"
    + "|".join(SHAPES)
    + r")\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Score:
    """``right`` of ``total`` attributes (a description) or answers (a short task: 0 or 1 of 1)."""

    right: int
    total: int

    @property
    def fraction(self) -> float:
        """right / total."""
        return self.right / self.total


def parse_description(text: str) -> list[dict[str, str]]:
    """The things a description names, each with place, size, colour and shape."""
    return [{name: value.lower() for name, value in match.groupdict().items()} for match in _THING.finditer(text)]


def score(sample: Sample, text: str) -> Score:
    """Compares an answer with the truth.

    A description earns a point for each attribute (place, size, colour, shape) of each thing; a thing that is not there costs as much as
    one that was left out, so saying more than there is does not pay. A short answer must be the right words, alone.
    """
    if sample.task != "describe":
        return Score(int(text.strip().strip(".").lower() == sample.answer.lower()), 1)
    named: dict[str, dict[str, str]] = {}
    surplus = 0
    for words in parse_description(text):
        if words["place"] in named or sample.scene.at(words["place"]) is None:
            surplus += 1
        else:
            named[words["place"]] = words
    right = 0
    for thing in sample.scene.things:
        said = named.get(thing.place, {})
        right += sum(said.get(name) == value for name, value in thing.words.items())
    if not sample.scene.things:  # nothing to name: the one point is for saying so
        return Score(int("no objects" in text.lower()), 1 + 4 * surplus)
    return Score(right, 4 * (len(sample.scene.things) + surplus))


def accuracy_interval(right: int, total: int, confidence: float = 0.95) -> tuple[float, float, float]:
    """Accuracy and its Wilson interval: ``(accuracy, low, high)``.

    Raises:
        ValueError: total < 1, or right outside [0, total].
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"right must be in [0, total] with total >= 1, got right={right}, total={total}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = right / total
    scale = 1 + z * z / total
    middle = (p + z * z / (2 * total)) / scale
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / scale
    return p, max(0.0, middle - half), min(1.0, middle + half)
