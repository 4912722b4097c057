"""Which backend ``auto`` takes for an operator on this kind of GPU: from the rows of ``bench/operators.py`` into the device's file.

    python -m bench.operators OUT.json
    python -m bench.choose_backend OUT.json [--out FILE]        # rows of bench.operators, or a record (its folder or report.json)

An operator goes to the CUDA kernels where the geometric mean of ``cuda / triton`` over its rows is below 1 by more than the noise, else to
the Triton ones. Only rows count that were measured on a GPU, with a result that passed its gate, by both. Everything else in
``dyrate_kernels/devices/<device name>.json`` stays as it is.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from bench.operators import label
from bench.report import read
from bench.targets import passed
from dyrate_kernels import devices

NOISE = 0.01  # a smaller gain is none
OPERATORS = ("decode_attention", "decode_step", "score_last_query", "select_tokens", "predict_rate", "compact_", "reorder_")
SAME = ("B", "N", "heads", "dtype", "layers", "group")


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Operator -> ``{"cuda_over_triton": geometric mean, "rows": how many}``, for those that both measured."""
    found: dict[str, list[float]] = {}
    for row in rows:
        begin = label("triton") + " "
        if row.get("backend") != "triton" or not row["name"].startswith(begin) or not passed(row):
            continue
        what = row["name"].removeprefix(begin)
        operator = what.split()[0].rstrip(",")
        for twin in rows:
            same = twin["name"] == f"{label('cuda')} {what}" and all(row.get(key) == twin.get(key) for key in SAME)
            if same and passed(twin) and operator in OPERATORS and row["median_us"]:
                found.setdefault(operator, []).append(math.log(twin["median_us"] / row["median_us"]))
    return {name: {"cuda_over_triton": math.exp(sum(logs) / len(logs)), "rows": len(logs)} for name, logs in found.items()}


def choose(rows: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """(operator -> backend, what it was decided by)."""
    measured = ratios(rows)
    return {name: "cuda" if of["cuda_over_triton"] < 1 - NOISE else "triton" for name, of in measured.items()}, measured


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = read(given.rows)["rows"]
    chosen, measured = choose(rows)
    if not chosen:
        raise SystemExit("no operator was measured on a GPU with both backends and a right result: nothing is written")
    name, commit = next((row["gpu"], row["commit"]) for row in rows if row["measurement"])
    path = given.out or devices.FOLDER / devices.file_name(name)
    body = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"device": name}
    body |= {"backend": chosen, "backend_measured": {**measured, "commit": commit, "made_by": "python -m bench.choose_backend"}}
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for operator, backend in chosen.items():
        of = measured[operator]
        print(f"{operator:18} {backend:7} cuda / triton = {of['cuda_over_triton']:.3f} over {of['rows']} rows")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
