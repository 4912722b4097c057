"""Random configurations against the mask oracle: ``python -m tests.fuzz --configurations 3000 --seed 7``.

Each draws a family, a text model, its weights, a method with its options, a retention, a batch of prompts and a way to decode, and holds
tokens, logits, kept counts and the number of steps against ``tests.oracle``. A miss is printed with its number, which draws it again
(``--only``); the exit code says whether there was one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from dyrate_kernels.families import FAMILIES
from tests import models
from tests.checks import PICTURES_FIRST, assert_close_logits, assert_same_decisions, first_difference, greedy, logits, patched
from tests.oracle import Oracle, Rule

VARIANTS = (*models.VARIANTS, *models.MORE_VARIANTS)
MODES = ("greedy", "chunked", "lookup", "assistant", "beams", "sampling", "several", "ends early")
NEVER_SHRINKS = ("qwen3_vl",)  # deepstack features are added after the first layers: no token may leave before
# a chunk of such a prompt cannot read what comes after it, patched or not
SEES_AHEAD = [name for name, family in FAMILIES.items() if family.sees_ahead]
TOLERANCE = 1e-4


@dataclass
class Case:
    """One configuration."""

    family: str
    text: str
    seed: int
    rule: Rule
    retention: str
    rows: list[list[str]]
    mode: str
    length: int
    options: dict[str, Any]


def draw_rule(pick: random.Random) -> Rule:
    """A method with options."""
    last = models.LAYERS - 1
    k = pick.randint(1, last)
    rate = pick.choice([0.0, 0.3, 0.5, 0.75, 0.9, 1.0, round(pick.random(), 3)])
    name = pick.choice(
        ["none", "fixed", "fastv", "vtw", "depth", "schedule", "uniform", "dyrate", "threshold", "st3", "dycoke"]
        + ["pyramiddrop", "layerwise", "sparsevlm", "aim"]
    )
    options: dict[str, Any] = {
        "none": {},
        "fixed": {"rate": rate},
        "fastv": {"rate": rate, "ranking": pick.choice(["last", "mean"])},
        "vtw": {},
        "depth": {"prune": round(0.6 * pick.random(), 2), "growth": round(pick.random(), 2)},
        "schedule": {"kept": tuple((step, pick.randint(0, 14)) for step in sorted(pick.sample(range(8), 3)))},
        "uniform": {"rate": rate},
        "dyrate": {"rates": pick.choice(["half_open", "closed"]), "spread": pick.choice([0.0, 0.5, 1.0])},
        "threshold": {"share": round(0.1 + 0.85 * pick.random(), 2)},
        "st3": {"rate": 0.3, "growth": 0.4, "least": 0.2, "horizon": pick.randint(1, 6), "stages": pick.randint(1, 3)},
        "dycoke": {"rate": max(rate, 0.3), "similarity": round(0.5 + 0.49 * pick.random(), 2)},
        "pyramiddrop": {"keep": pick.choice([0.4, 0.6, 0.8]), "stages": pick.randint(1, 3)},
        "layerwise": {"stages": pick.randint(1, 3), "rates": pick.choice(["half_open", "closed"])},
        "sparsevlm": {"shares": (0.8, 0.5, 0.3)},
        "aim": {"k": pick.randint(1, 2), "end": pick.randint(3, models.LAYERS + 1)},
    }[name]
    return Rule(name, **({"k": k} | options))


def draw_rows(pick: random.Random, family: str, mode: str) -> list[list[str]]:
    """A ragged batch; one row where the mode needs it."""
    kinds = ["image"] + (["video"] if family in ("video_llava", "llava_onevision") else [])
    rows = []
    for _ in range(1 if mode in ("lookup", "assistant") else pick.randint(1, 3)):
        row = [f"text {pick.randint(1, 8)}"]
        for _ in range(pick.choice([0, 1, 1, 1, 2])):
            row += [pick.choice(kinds), f"text {pick.randint(1, 8)}"]
        if mode == "beams" and not PICTURES_FIRST:
            row = row[:3]
        rows.append(row)
    return rows


def draw(number: int, seed: int, pools: bool = False) -> Case:
    """Configuration ``number`` of this seed; ``pools``: with retention ``pool`` wherever the method can."""
    pick = random.Random(f"{seed} {number}")
    family, text = pick.choice(VARIANTS)
    modes = [mode for mode in MODES if mode != "chunked" or family not in SEES_AHEAD]
    mode = pick.choice([mode for mode in modes if mode != "assistant" or family == "llava"])  # others give arguments that it does not take
    rule, retention = draw_rule(pick), pick.choice(["recoverable", "evict"])
    other = random.Random(f"{seed} {number} pool")  # of its own, so that numbers draw what they drew before
    if rule.decides_while_decoding and (pools or other.random() < 1 / 3):
        by = other.choice(["policy", "uniform", round(other.random(), 2)])
        retention = f"pool={other.choice([0.1, 0.25, 0.5, 0.75, 1.0, round(other.uniform(0.01, 1), 2)])}:by={by}"
    if family in NEVER_SHRINKS and retention != "recoverable" and rule.stage_starts(models.LAYERS)[0] < 3:
        retention = "recoverable"
    length = pick.randint(2, 8)
    options: dict[str, Any] = {
        "chunked": {"prefill_chunk_size": pick.randint(3, 24)},
        "lookup": {"prompt_lookup_num_tokens": pick.randint(1, 4), "max_matching_ngram_size": pick.randint(1, 2)},
        "assistant": {},
        "beams": {"num_beams": pick.randint(2, 3)},
        "sampling": {"do_sample": True, "temperature": 1.5},
        "several": {"do_sample": True, "num_return_sequences": 2},
    }.get(mode, {})
    return Case(family, text, pick.randint(0, 2), rule, retention, draw_rows(pick, family, mode), mode, length, options)


def check(case: Case, made: dict[Any, Any]) -> None:
    """Raises AssertionError where the package and the oracle differ."""
    key = (case.family, case.text, case.seed)
    if key not in made:
        made[key] = models.build(case.family, case.text, seed=case.seed)
    model = made[key]
    fields = models.inputs(model, case.rows, seed=case.seed)
    asked = greedy(case.length, **case.options)
    plain = dict(asked)
    assisted = case.mode in ("lookup", "assistant")
    if assisted:
        for name in case.options:
            plain.pop(name, None)
    if case.mode == "assistant":
        asked["assistant_model"] = made.setdefault("assistant", models.build_text(0))
    if case.mode == "chunked":
        plain.pop("prefill_chunk_size")
    if case.mode == "ends early":
        torch.manual_seed(case.seed)
        free = Oracle(model, case.rule, case.retention).generate(**fields, **plain)
        ends = {int(row[fields["input_ids"].shape[1] + case.length // 2]) for row in free.sequences}
        asked["eos_token_id"] = plain["eos_token_id"] = sorted(ends)
        asked["pad_token_id"] = plain["pad_token_id"] = 0
    oracle = Oracle(model, case.rule, case.retention, frozen=assisted)
    torch.manual_seed(case.seed)
    want = oracle.generate(**fields, **plain)
    torch.manual_seed(case.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with patched(model, case.rule, case.retention) as handle:
            got = model.generate(**fields, **asked)
            stats = handle.stats()
    assert got.sequences.tolist() == want.sequences.tolist(), first_difference(got, want)
    steps = got.sequences.shape[1] - fields["input_ids"].shape[1]
    if case.mode != "beams":
        assert_close_logits(logits(got), logits(want), TOLERANCE)
        assert len(stats.steps) == steps, f"{len(stats.steps)} steps of {steps} tokens"
    if case.mode in ("greedy", "chunked", "lookup", "assistant"):
        assert_same_decisions(stats, oracle)


def run(configurations: int, seed: int, only: int | None = None, pools: bool = False) -> int:
    """Checks them all and prints the misses. Returns how many there were."""
    made: dict[Any, Any] = {}
    numbers = range(configurations) if only is None else [only]
    missed, start = 0, time.monotonic()
    for number in numbers:
        case = draw(number, seed, pools)
        try:
            check(case, made)
        except Exception as error:
            missed += 1
            print(f"miss {number}: {case}\n  {type(error).__name__}: {str(error)[:300]}", flush=True)
            if only is not None:
                raise
        if number % 100 == 99:
            print(f"{number + 1} configurations, {missed} missed, {time.monotonic() - start:.0f} s", flush=True)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one configuration")
    parser.add_argument("--pools", action="store_true", help="retention pool wherever the method can")
    given = parser.parse_args()
    torch.set_num_threads(1)
    missed = run(given.configurations, given.seed, given.only, given.pools)
    print(f"{missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
