"""``dyrate compare``: several policies on the same input, one table."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from dyrate_kernels.cli import common

DEFAULT_POLICIES = "none,dyrate,fastv,fixed,random,uniform,vtw,depth"


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("compare", help="several policies on the same picture and prompt", description=__doc__)
    common.add_common(parser)
    common.add_input(parser)
    parser.add_argument(
        "--policies", default=DEFAULT_POLICIES, metavar="A,B,..",
        help="names, each with options and reducers if wanted: fastv:k=2:rate=0.75, dyrate+aim:keep=0.5 (else those of --vision); "
        f"default: {DEFAULT_POLICIES}",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Does it."""
    image = common.load_image(given.image)
    names = common.split_list(given.policies)
    if not names:
        raise ValueError("--policies is empty; name at least one, e.g. none,dyrate,fastv")
    chosen = []
    for name in names:
        policy, reducers = common.split_vision(name)
        chosen.append((name, common.parse_policy(policy), common.parse_vision(reducers or given.vision)))
    model, processor = common.load_model(given)
    inputs = common.prepare(processor, image, given.prompt, model.device, model.dtype)
    reference = common.answer(model, processor, inputs, given)
    rows = []
    for number, (name, policy, reducers) in enumerate(chosen, 1):
        if not given.json and sys.stderr.isatty():
            print(f"\r{number} of {len(chosen)}: {name:<40}", end="", file=sys.stderr, flush=True)
        rows.append(_row(name, policy, reducers, model, processor, inputs, reference, given))
    if not given.json and sys.stderr.isatty():
        print(f"\r{'':<60}\r", end="", file=sys.stderr)
    if given.json:
        common.print_json({"prompt": given.prompt, "retention": given.retention, "policies": rows})
        return 0
    _print_table(rows)
    return 0


def _row(
    name: str, policy: Any, reducers: Any, model: Any, processor: Any, inputs: dict, reference: list[int], given: argparse.Namespace
) -> dict[str, Any]:
    import dyrate_kernels as dk

    options = {"retention": given.retention, "backend": given.backend, "cuda_graph": given.cuda_graph, "fuse": given.fuse}
    with dk.patch(model, policy, vision=reducers, **options) as handle:
        started = time.perf_counter()
        tokens = common.answer(model, processor, inputs, given)
        seconds = time.perf_counter() - started
        stats = handle.stats()
    same = sum(a == b for a, b in zip(tokens, reference, strict=False)) / max(len(tokens), len(reference), 1)
    return {
        "policy": name,
        "predictor": stats.predictor,
        "k": stats.k,
        "vision": stats.vision,
        "visual_tokens_in": stats.visual_tokens_in[0],
        "visual_tokens": stats.visual_tokens[0],
        "kept_by_step": changes([step.kept[0] for step in stats.steps]),
        "kept_mean": stats.kept_mean,
        "paper_cost": stats.paper_cost,
        "flops_share": stats.flops / stats.flops_unreduced,
        "bytes_read_share": stats.bytes_read / stats.bytes_read_unreduced if stats.bytes_read_unreduced else 1.0,
        "kv_bytes_live": stats.kv_bytes_live,
        "agreement": same,
        "new_tokens": len(tokens),
        "seconds": seconds,
        "text": processor.decode(tokens, skip_special_tokens=True).strip(),
    }


def changes(counts: list[int]) -> list[list[int]]:
    """``[step, count]`` of the first step and of every step whose count is another than the one before."""
    return [[step, count] for step, count in enumerate(counts) if step == 0 or count != counts[step - 1]]


def budget_text(row: dict[str, Any], most: int = 4) -> str:
    """``576 -> 288 -> 216/144/72``: before the reducers, after them (where there are any), kept by step."""
    kept = [str(count) for _, count in row["kept_by_step"]]
    kept = kept if len(kept) <= most else [*kept[: most - 1], "..", kept[-1]]
    counts = [str(row["visual_tokens_in"]), *([str(row["visual_tokens"])] if row["vision"] else []), "/".join(kept)]
    return " -> ".join(counts)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table()
    headings = ("policy", "k", "visual tokens", "kept", "paper cost", "FLOPs", "read", "KV live", "same tokens", "tokens", "s")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        shares = [f"{100 * row[name]:.1f} %" for name in ("kept_mean", "paper_cost", "flops_share", "bytes_read_share")]
        name = row["policy"] + (f" ({row['predictor']})" if row["predictor"] else "")
        table.add_row(
            name, str(row["k"]), budget_text(row), *shares, common.bytes_text(row["kv_bytes_live"]), f"{100 * row['agreement']:.0f} %",
            str(row["new_tokens"]), f"{row['seconds']:.2f}",
        )  # fmt: skip
    common.console().print(table)
    print("same tokens: share of positions where the answer equals that of the unpatched model")
    if any(row["vision"] for row in rows):
        print("visual tokens: before the reducers -> after them -> kept by step; kept: of what the reducers left;")
        print("paper cost, FLOPs and read: of the model without reducers and pruning")
    print()
    for row in rows:
        print(f"{row['policy']}: {row['text']}")
