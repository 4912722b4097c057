"""Plants one fault after the other in a copy of the repository and looks whether the tests see it; see README.md here."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults import fault as faults
from tests.faults import runner


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--family", nargs="+", choices=faults.NAMES, default=list(faults.NAMES))
    parser.add_argument("--only", type=int, nargs="+", help="numbers of faults")
    parser.add_argument("--seconds", type=int, default=300, help="of a processor, after which a run counts as one that never ends")
    given = parser.parse_args()
    table = []
    with runner.copied() as copy:
        for name in given.family:
            family = faults.load(name)
            runner.preload(family)
            failed, seen = runner.run(family, None, copy, given.seconds)
            if failed:
                print(f"{name}: the tests fail without a fault: {seen}")
                return 1
            survivors = []
            for number, planted in enumerate(family.faults):
                if given.only is not None and number not in given.only:
                    continue
                start = time.monotonic()
                failed, seen = runner.run(family, planted, copy, given.seconds)
                print(
                    f"{name} {number:>2} {'seen' if failed else 'SURVIVES'} {time.monotonic() - start:.0f} s  {planted}  [{seen}]",
                    flush=True,
                )
                if not failed:
                    survivors.append(number)
            count = len(family.faults) if given.only is None else len(given.only)
            table.append((name, count, count - len(survivors), survivors))
    for name, count, dead, survivors in table:
        print(f"{name}: {count} faults, {dead} seen{', survivors: ' + ', '.join(map(str, survivors)) if survivors else ''}")
    return int(any(survivors for *_, survivors in table))


if __name__ == "__main__":
    sys.exit(main())
