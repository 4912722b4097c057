"""A comparison beside an earlier one, of other questions: does each score come out again within what chance allows?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyrate_kernels.evaluation.table import Line
from dyrate_kernels.json_files import read_json

Interval = tuple[float, float, float]
"""A score and the ends of its interval."""


@dataclass(frozen=True)
class Pair:
    """One contender in two comparisons.

    Attributes:
        label, group: whose, over what.
        now, before: score relative to the unpruned model's, with its 95 % interval: (value, low, high).
    """

    label: str
    group: str
    now: Interval
    before: Interval

    @property
    def agrees(self) -> bool:
        """The intervals overlap."""
        return self.now[1] <= self.before[2] and self.before[1] <= self.now[2]


def shares(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Interval]:
    """Relative scores with their intervals, by label and group; not those of questions at which the unpruned model scored nothing."""
    keys = ("retained", "retained_low", "retained_high")
    found = {(line["label"], line["group"]): tuple(line[key] for key in keys) for line in lines}
    return {name: (values[0], values[1], values[2]) for name, values in found.items() if None not in values}


def read_lines(path: Path) -> dict[tuple[str, str], Interval]:
    """The relative scores of a ``table.json``, or of the JSON of a report, by label and group.

    Raises:
        ValueError: it is no such file.
    """
    try:
        return shares(read_json(path)["lines"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be the table.json of dyrate eval, or the JSON of its report; it cannot be read ({error})") from None


def pairs(lines: Sequence[Line], before: dict[tuple[str, str], Interval], groups: Sequence[str]) -> list[Pair]:
    """Contenders of these groups that both comparisons have, but for the unpruned model."""
    now = shares(line.to_dict() for line in lines)
    return [
        Pair(label, group, values, before[label, group])
        for (label, group), values in now.items()
        if group in groups and label != "none" and (label, group) in before
    ]
