"""Proposals for a device's file, from the rows of the experiments, and the figures that speak for them.

A change of settings is proposed for a key of the file where, over all cases of that key in its experiment, the geometric mean of the ratios
lies below 1 by more than the noise, at least one case is faster and none slower. A key of which a case was not reached, or where a result
was wrong or a kernel did not run with the change, gets nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dyrate_kernels import devices
from dyrate_kernels.files import write_json
from dyrate_kernels.measuring import timing

from .runner import BASE, FASTER, NOT_REACHED, SLOWER, Row

# sections of rows that stand elsewhere in the file than under their name
SWITCHES = "switches"  # what holds for every launch or step: some stand at the top of the file (``TOP``), others are a word of ``layers``
CAPTURE = "capture_from"  # a number at the top of the file
ASIDE = "decision_aside"
TOP = ("dependent_launch", ASIDE)
CUDA = "cuda"  # settings of the CUDA attention, one entry for all keys
PRODUCTS = "products"  # under ``layers``; keys are such as "linear 12288x4096, 32 rows", the number of rows being a power of two
WITHIN_NOISE = "within noise"
CONFIRMING = 13  # the experiment that times the winners of the others together


@dataclass(frozen=True)
class Candidate:
    """A change that could be written.

    Attributes:
        section, key: where. changes: what. base: the settings that it was changed from. experiment: that found it.
        ratio: geometric mean over its cases. noise: mean of theirs.
        cases: name -> ``{"base_us", "us", "ratio"}``.
        against: why not, or None.
    """

    section: str
    key: str
    changes: dict[str, Any]
    base: dict[str, Any]
    experiment: int
    ratio: float
    noise: float
    cases: dict[str, dict[str, float]]
    against: str | None

    def figures(self) -> dict[str, Any]:
        """Returns what the file says about it."""
        return {
            "experiment": self.experiment, "changes": self.changes, "ratio": round(self.ratio, 4), "noise": round(self.noise, 4),
            "cases": self.cases,
        }  # fmt: skip


def candidates(rows: Iterable[Row]) -> Iterator[Candidate]:
    """Every change that was tried, with the reason where it is not proposed."""
    rows = [row for row in rows if row["section"] is not None and row["key"] is not None]
    groups: dict[tuple[int, str, str, str], list[Row]] = {}
    for row in rows:
        if row["changes"]:
            name = json.dumps(row["changes"], sort_keys=True)
            groups.setdefault((row["experiment"], row["section"], row["key"], name), []).append(row)
    judged = [_judged(rows, *place[:3], found) for place, found in groups.items() if place[1] != CAPTURE]
    yield from _capture([row for row in rows if row["section"] == CAPTURE])
    for one in judged:
        yield one if one.section != SWITCHES else _vetoed(one, judged)


def _vetoed(one: Candidate, others: Iterable[Candidate]) -> Candidate:
    """Several switches together are not proposed where a part of them, which more cases may have, was wrong or slower."""
    for part in others:
        same = (part.section, part.key, part.experiment) == (one.section, one.key, one.experiment)
        if same and part.changes.items() < one.changes.items() and part.against not in (None, WITHIN_NOISE) and one.against is None:
            return replace(one, against=f"{', '.join(part.changes)}: {part.against}")
    return one


def _capture(rows: list[Row]) -> Iterator[Candidate]:
    """From how many new tokens on captured steps were faster in every case; else the reason of the most tokens that were tried."""
    found, against = None, None
    for new_tokens in sorted({row["new_tokens"] for row in rows}, reverse=True):
        same = [row for row in rows if row["new_tokens"] == new_tokens]
        slow = next((row for row in same if row["changes"] and row["verdict"] != FASTER), None)
        if any(row["correct"] is not None and not row["correct"]["passed"] for row in same):
            against = "a result was wrong"
        elif any(row["verdict"] == NOT_REACHED for row in same):
            against = "a case was not reached"
        elif slow is not None or not any(row["changes"] for row in same):
            against = "it did not run" if slow is None else f"not faster: {slow['case']}"
        if against is not None:
            break
        found = new_tokens
    if rows:
        least = max(row["new_tokens"] for row in rows) if found is None else found
        timed = [row for row in rows if row["changes"] and row["ratio"] is not None and row["new_tokens"] >= least]
        ratio = math.exp(statistics.fmean(math.log(row["ratio"]) for row in timed)) if timed else math.nan
        noise = statistics.fmean(row["noise"] for row in timed) if timed else math.nan
        bases = {row["case"]: row["median_us"] for row in rows if row["verdict"] == BASE}
        cases = {row["case"]: {"base_us": bases[row["case"]], "us": row["median_us"], "ratio": row["ratio"]} for row in timed}
        why = against if found is None else None
        yield Candidate(CAPTURE, CAPTURE, {CAPTURE: least}, {}, rows[0]["experiment"], ratio, noise, cases, why)


def _judged(rows: list[Row], experiment: int, section: str, key: str, found: list[Row]) -> Candidate:
    """The change of ``found``, rows of one experiment and key, against the base of its cases."""
    same = [row for row in rows if (row["experiment"], row["section"], row["key"]) == (experiment, section, key)]
    bases = {row["case"]: row for row in same if row["verdict"] == BASE and row["median_us"] is not None}
    timed = [row for row in found if row["ratio"] is not None and row["median_us"]]
    ratio = math.exp(statistics.fmean(math.log(row["ratio"]) for row in timed)) if timed else math.nan
    noise = statistics.fmean(row["noise"] for row in timed) if timed else math.nan
    cases = {
        row["case"]: {"base_us": bases[row["case"]]["median_us"], "us": row["median_us"], "ratio": row["ratio"]}
        for row in timed
        if row["case"] in bases
    }
    against = None
    if any(row["correct"] is not None and not row["correct"]["passed"] for row in found):
        against = "a result was wrong"
    elif len(timed) < len(found) or len(cases) < len(timed):
        against = "it did not run in every case"
    elif any(row["verdict"] == NOT_REACHED for row in same):
        against = "a case was not reached"
    elif any(row["verdict"] == SLOWER for row in found):
        against = "slower in " + next(row["case"] for row in found if row["verdict"] == SLOWER)
    elif not any(row["verdict"] == FASTER for row in found) or ratio >= 1 - noise:
        against = WITHIN_NOISE
    return Candidate(section, key, found[0]["changes"], found[0].get("base") or {}, experiment, ratio, noise, cases, against)


def winners(rows: Iterable[Row]) -> dict[tuple[str, str], list[Candidate]]:
    """(section, key) -> the best change of each experiment, best first."""
    best: dict[tuple[str, str, int], Candidate] = {}
    for one in candidates(rows):
        place = (one.section, one.key, one.experiment)
        if one.against is None and (place not in best or one.ratio < best[place].ratio):
            best[place] = one
    found: dict[tuple[str, str], list[Candidate]] = {}
    for one in sorted(best.values(), key=lambda one: one.ratio):
        found.setdefault((one.section, one.key), []).append(one)
    return found


def together(found: list[Candidate]) -> dict[str, Any]:
    """The changes of all of them; where two change the same thing the better one's."""
    changes: dict[str, Any] = {}
    for one in reversed(found):
        changes |= one.changes
    return changes


def chosen(rows: Iterable[Row]) -> list[Candidate]:
    """One change a key: the winner, or what the confirming experiment found better than the base and than it."""
    rows = list(rows)
    picked = []
    for found in winners(rows).values():
        confirmed = [one for one in found if one.experiment == CONFIRMING]
        others = [one for one in found if one.experiment != CONFIRMING]
        picked.append((confirmed or others)[0])
    return picked


def device_file(rows: Iterable[Row], device_name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The body of the file: what is shipped for the device now, with what is proposed over it."""
    body = {"device": device_name, **devices.measured(device_name), **facts, "made_by": "bench/gpu.sh --only experiments"}
    layers = {**body.get("layers", {})}
    products: dict[str, list[dict[str, Any]]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for one in chosen(rows):
        if one.section == SWITCHES:
            layers |= {name: value for name, value in one.changes.items() if name not in TOP}
            body |= {name: value for name, value in one.changes.items() if name in TOP}
        elif one.section == CAPTURE:
            body |= one.changes
        elif one.section == CUDA:
            body[CUDA] = {**body.get(CUDA, {}), **one.changes}
        elif one.section == PRODUCTS:
            problem, _, number = one.key.removesuffix(" rows").partition(", ")
            most = int(number)  # a kernel for so many rows serves every number above its half
            products.setdefault(problem, []).append({"rows": [max(most // 2 + 1, 2), most], **one.changes})
        else:
            body[one.section] = {**body.get(one.section, {}), one.key: {**one.base, **one.changes}}
        figures.setdefault(one.section, {})[one.key] = one.figures()
    if products:
        ordered = {problem: sorted(ranges, key=lambda entry: entry["rows"]) for problem, ranges in products.items()}
        layers["products"] = {**layers.get("products", {}), **ordered}
    return {**body, **({"layers": layers} if layers else {}), "figures": figures}


def write(folder: Path, rows: Iterable[Row], device_name: str) -> tuple[Path | None, dict[str, Any]]:
    """Writes the file beside the table (none where nothing is proposed). Returns its path and body."""
    here = timing.environment()
    facts = {name: here[name] for name in ("torch", "triton", "commit", "driver", "measurement")}
    body = device_file(rows, device_name, facts)
    path = folder / devices.file_name(device_name)
    path.unlink(missing_ok=True)
    if not body["figures"]:
        return None, body
    write_json(path, dict(sorted(body.items())))
    return path, body
