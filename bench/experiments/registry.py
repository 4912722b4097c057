"""All experiments, in the order in which they run: what decides most comes first."""

from __future__ import annotations

from collections.abc import Sequence

from . import ablation, attention, chain, counters, generations, native, problems, products, propose, sanitizers, whole
from .runner import Experiment, Planned, Row

ORDER = (11, 2, 3, 1, 14, 4, 6, 9, 7, 10, 8, 15, 12, 5)
_FOUND = {
    one.number: one
    for module in (ablation, attention, chain, counters, generations, native, products, sanitizers, whole)
    for one in module.EXPERIMENTS
}
EXPERIMENTS: list[Experiment] = [_FOUND[number] for number in ORDER if number in _FOUND]


def confirming(rows: Sequence[Row]) -> Experiment:
    """The winners of several experiments that change one key of the device file, together against the better one and the base."""

    def cases(toy: bool) -> list[Planned]:
        found: list[Planned] = []
        for (section, key), winners in propose.winners(rows).items():
            if section == "settings" and len(winners) > 1:
                found += problems.again(toy, key, {"the best alone": winners[0].changes, "together": propose.together(winners)})
        return found

    return Experiment(propose.CONFIRMING, "winners of several experiments together", 20, cases)
