"""Draws calls, runs them and counts the misses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tests.differential.backends import BACKENDS
from tests.differential.draw import Draw
from tests.differential.registry import OPERATORS


def run(
    name: str, seed: int, numbers: Sequence[int], operators: Sequence[str] | None = None, *, stop: bool = False, loud: bool = False
) -> int:
    """Runs the calls of these numbers and prints the misses; how many there were."""
    backend = BACKENDS[name]()
    for operator in operators or ():
        if operator not in OPERATORS or operator in backend.without:
            names = [known for known in OPERATORS if known not in backend.without]
            raise SystemExit(f"--operators: expected some of {', '.join(names)} for {name}, got {operator}")
    missed, start, seen = 0, time.monotonic(), Counter()
    for done, number in enumerate(numbers, 1):
        draw = Draw(seed, number, backend.floats)
        operator = draw_operator(draw, backend.without, operators)
        seen[operator] += 1
        try:
            one(backend, operator, draw)
        except Exception as error:
            missed += 1
            chosen = f" --operators {' '.join(operators)}" if operators else ""
            print(f"miss: --backend {name} --seed {seed} --only {number}{chosen}: {operator}, {', '.join(draw.told)}", flush=True)
            print(f"    {type(error).__name__}: {str(error)[:400]}", flush=True)
            if loud:
                raise
            if stop:
                break
        if done % 500 == 0:
            print(f"{done} calls, {missed} missed, {time.monotonic() - start:.0f} s", flush=True)
    if loud:
        return missed
    print(", ".join(f"{count} {operator}" for operator, count in sorted(seen.items())), flush=True)
    return missed


def draw_operator(draw: Draw, without: Sequence[str], operators: Sequence[str] | None) -> str:
    names = [name for name in operators or OPERATORS if name not in without]
    return draw.pick.choices(names, [OPERATORS[name][0] for name in names])[0]


def one(backend: Any, operator: str, draw: Draw) -> None:
    """One call; AssertionError where its result is wrong."""
    call = OPERATORS[operator][1](draw)
    with backend.call(draw):
        got = call.run(backend.name)
    call.check(got)
