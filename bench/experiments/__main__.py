"""Command line: see ``bench.experiments``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

NUMBERS = (*range(1, 13), 14, 15)  # 13 confirms what they find, and comes by itself


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.experiments")
    parser.add_argument("out", type=Path, nargs="?", help="folder for experiments.md, experiments.json and the device file")
    parser.add_argument("--toy", action="store_true", help="a rehearsal in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=470.0, help="for everything (default: %(default)s)")
    parser.add_argument("--only", type=int, nargs="+", choices=NUMBERS, metavar="NUMBER", help="these alone")
    parser.add_argument("--compile", action="store_true", help="build the kernels and measure nothing")
    given = parser.parse_args(arguments)
    if given.toy and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is imported, which some of what follows does
    from bench.operators import operators_backends
    from dyrate_kernels.files import check_file

    if operators_backends(given.toy)[0] != "triton":
        raise SystemExit("the experiments are of the Triton kernels, which cannot run here")
    from . import session

    if given.compile:
        session.compile_all(session.picked(given.only), given.toy)
        return 0
    if given.out is None:
        parser.error("OUT_DIR is missing")
    given.out.mkdir(parents=True, exist_ok=True)
    check_file("OUT_DIR", given.out / "experiments.json")
    return session.measure(given.out, given.only, given.toy, given.seconds)


if __name__ == "__main__":
    sys.exit(main())
