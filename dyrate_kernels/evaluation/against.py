"""A comparison beside an earlier one, of other questions: does each score come out again within what chance allows?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dyrate_kernels.evaluation.table import Line
from dyrate_kernels.json_files import read_json


@dataclass(frozen=True)
class Pair:
    """One contender in two comparisons.

    Attributes:
        label, group: whose, over what.
        now, before: score relative to the unpruned model's, with its 95 % interval: (value, low, high).
    """

    label: str
    group: str
    now: tuple[float, float, float]
    before: tuple[float, float, float]

    @property
    def agrees(self) -> bool:
        """The intervals overlap."""
        return self.now[1] <= self.before[2] and self.before[1] <= self.now[2]


def read_lines(path: Path) -> dict[tuple[str, str], tuple[float, float, float]]:
    """The relative scores of a ``table.json``, or of the JSON of a report, by label and group.

    Raises:
        ValueError: it is no such file.
    """
    try:
        lines = read_json(path)["lines"]
        return {(line["label"], line["group"]): (line["retained"], line["retained_low"], line["retained_high"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be the table.json of dyrate eval, or the JSON of its report; it cannot be read ({error})") from None


def pairs(lines: Sequence[Line], before: dict[tuple[str, str], tuple[float, float, float]], groups: Sequence[str]) -> list[Pair]:
    """Contenders of these groups that both comparisons have, but for the unpruned model."""
    return [
        Pair(line.label, line.group, (line.retained, line.retained_low, line.retained_high), before[line.label, line.group])
        for line in lines
        if line.group in groups and line.label != "none" and (line.label, line.group) in before
    ]
