"""Random calls of every operator in odd shapes against the reference in float64.

    python -m tests.differential --calls 5000 --seed 7 [--backend interpreter | emulated | reference] [--operators NAME ...]

Each call draws an operator, shapes, layouts (strides, gaps, odd addresses), contents with ties and numbers that are none, and settings of
the backend. Its results are held against the reference in float64, within the rounding of the dtype; lists and counts exactly; NaN in the
same places; and nothing may have changed that the operator does not change, the memory around every tensor included. A miss is printed
with the words that draw it again (``--only``); the exit code says whether there was one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one call")
    parser.add_argument("--backend", default="interpreter", choices=["interpreter", "emulated", "reference"])
    parser.add_argument("--operators", nargs="+", help="draw from these alone")
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--stop", action="store_true", help="at the first miss")
    given = parser.parse_args()
    if given.calls < 1:
        parser.error(f"--calls: expected at least 1, got {given.calls}")
    if given.backend == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from tests.differential import run

    torch.set_num_threads(1)
    numbers = range(given.first, given.first + given.calls) if given.only is None else [given.only]
    start = time.monotonic()
    missed = run.run(given.backend, given.seed, numbers, given.operators, stop=given.stop, loud=given.only is not None)
    print(f"{len(numbers)} calls of {given.backend}, seed {given.seed}: {missed} missed, {time.monotonic() - start:.0f} s")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
