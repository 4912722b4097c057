"""``dyrate compare``: several policies on the same input, one table."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any

from dyrate_kernels import specs
from dyrate_kernels.cli import common, contenders, saved
from dyrate_kernels.units import bytes_text

DEFAULT_POLICIES = "none,dyrate,fastv,fixed,random,uniform,vtw,depth"
POOLED_POLICIES = "none,dyrate,fastv@evict,fixed,random,uniform,vtw@evict,depth@evict"  # what decides once has no use for a pool


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("compare", help="several policies on the same picture and prompt", description=__doc__)
    common.add_common(parser)
    common.add_input(parser)
    common.add_policies(parser, DEFAULT_POLICIES, "; those that name none have --retention and --vision")
    parser.set_defaults(policies=None)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Asks every contender and prints the table."""
    images = common.load_images(given.image)
    retention = common.retention_from(given)
    default = DEFAULT_POLICIES if specs.retention(retention).pool is None else POOLED_POLICIES
    chosen = contenders.parse(default if given.policies is None else given.policies, retention, given.vision)
    model, processor = common.load_model(given)
    inputs = common.prepare(processor, images, given.prompt, model.device, model.dtype)
    settings = {
        each.label: contenders.settings(model.config, each.policy, each.retention, given.backend, model.device, each.vision, each.side)
        for each in chosen
    }
    odd = contenders.not_followed(model, given.sample)
    if odd and not given.json:
        common.say("but", odd)
    reference = common.answer(model, processor, inputs, given)
    rows = []
    for number, contender in enumerate(chosen, 1):
        if not given.json and sys.stderr.isatty():
            print(f"\r{number} of {len(chosen)}: {contender.label:<40}", end="", file=sys.stderr, flush=True)
        rows.append(_row(contender, model, processor, inputs, reference, given))
    if not given.json and sys.stderr.isatty():
        print(f"\r{'':<60}\r", end="", file=sys.stderr)
    if given.json:
        more = {"not_followed": odd} if odd else {}
        common.print_json({"prompt": given.prompt, "retention": retention, "policies": rows, "settings": settings} | more)
        return 0
    _print_saved(rows, model, inputs, len(reference))
    _print_table(rows)
    _print_answers(rows)
    print("\nsettings:")
    for label, found in settings.items():
        common.say(label, contenders.words(found), indent=4)
    return 0


def _row(
    contender: Any, model: Any, processor: Any, inputs: dict, reference: list[int], given: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    from dyrate_kernels.evaluation.coarse import downsampled, thin

    length, n_visual = inputs["input_ids"].shape[1], 0
    with contextlib.ExitStack() as stack:
        if contender.side is not None:
            n_visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
            inputs = thin(dict(inputs), model.config.image_token_id, n_visual, contender.side)
            stack.enter_context(downsampled(model, contender.side))
        handle = stack.enter_context(contender.patch(model, given.backend, **common.path_from(given)))
        started = time.perf_counter()
        tokens = common.answer(model, processor, inputs, given)
        seconds = time.perf_counter() - started
        stats = handle.stats()
    same = sum(a == b for a, b in zip(tokens, reference, strict=False)) / max(len(tokens), len(reference), 1)
    row = {
        "policy": contender.label,
        "retention": contender.retention,
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
        "path": str(stats.path),
        "text": processor.decode(tokens, skip_special_tokens=True).strip(),
    }
    if contender.side is not None:
        row |= _coarse(handle.shape, len(tokens), n_visual, stats.visual_tokens[0], length)
    return row


def _coarse(shape: Any, steps: int, n_visual: int, seen: int, length: int) -> dict[str, Any]:
    """Of a coarser picture: its costs as shares of those with every token."""
    from dyrate_kernels.evaluation.runner import coarse_cost

    cost = coarse_cost(shape, steps, n_visual, seen, length)
    return {
        "vision": "downsample", "visual_tokens_in": n_visual, "paper_cost": cost.paper_cost,
        "flops_share": cost.flops / cost.flops_unpruned,
        "bytes_read_share": cost.bytes_read / cost.bytes_read_unpruned if cost.bytes_read_unpruned else 1.0,
    }  # fmt: skip


def changes(counts: list[int]) -> list[list[int]]:
    """``[step, count]`` of the first step and of every step whose count is another than the one before."""
    return [[step, count] for step, count in enumerate(counts) if step == 0 or count != counts[step - 1]]


def budget_text(row: dict[str, Any], most: int = 4) -> str:
    """``576 -> 288 -> 216/144/72``: before the reducers, after them (where there are any), kept by step."""
    kept = [str(count) for _, count in row["kept_by_step"]]
    kept = kept if len(kept) <= most else [*kept[: most - 1], "..", kept[-1]]
    counts = [str(row["visual_tokens_in"]), *([str(row["visual_tokens"])] if row["vision"] else []), "/".join(kept)]
    return " -> ".join(counts)


def _print_saved(rows: list[dict[str, Any]], model: Any, inputs: dict[str, Any], new_tokens: int) -> None:
    """Prints what the most sparing row saved, and what pruning can buy here at most."""
    from dyrate_kernels.ops import dispatch
    from dyrate_kernels.patching.api import shape_of

    best = min(rows, key=lambda row: row["bytes_read_share"])
    visual = best["visual_tokens_in"]
    saved_share, work = 100 * (1 - best["bytes_read_share"]), 100 * (1 - best["flops_share"])
    common.say(
        "saved",
        f"at most {saved_share:.1f} % of the bytes that decode steps read, by {best['policy']} ({work:.1f} % of the FLOPs), "
        f"whose answer has {100 * best['agreement']:.0f} % of the unpatched model's tokens",
    )
    text = saved.text_rows(inputs["input_ids"].shape[1], visual, new_tokens)
    common.say("means", saved.meaning(shape_of(model), visual, text, dispatch.name_for("auto", model.device)))


def _table(headings: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    common.console().print(table)
    print()


def _print_table(rows: list[dict[str, Any]]) -> None:
    costs, how = [], []
    for row in rows:
        kept, paper, work, read, same = (
            f"{100 * row[name]:.1f}" for name in ("kept_mean", "paper_cost", "flops_share", "bytes_read_share", "agreement")
        )
        costs.append([row["policy"], kept, read, work, bytes_text(row["kv_bytes_live"]), same.split(".")[0], f"{row['seconds']:.2f}"])
        how.append([row["policy"], str(row["k"]), budget_text(row), paper, str(row["new_tokens"])])
    _table(("policy", "kept %", "read %", "FLOPs %", "KV live", "same %", "s"), costs)
    _table(("policy", "k", "visual tokens", "paper cost %", "new"), how)
    common.say("kept", "of the visual tokens in layers >= k, mean over steps", 8)
    common.say("read", "bytes that the decode steps read, of those with every visual token; FLOPs, paper cost: likewise", 8)
    common.say("same", "share of positions where the answer equals that of the unpatched model", 8)
    common.say("s", "of one run each; dyrate bench e2e measures", 8)
    if any(row["vision"] for row in rows):
        common.say("visual tokens", "before the reducers -> after them -> kept by step; kept is of what the reducers left", 8)


def _print_answers(rows: list[dict[str, Any]]) -> None:
    """Prints every answer once, under the names of all that gave it."""
    print()
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row["text"], []).append(row["policy"])
    for text, who in names.items():
        common.say(", ".join(who), text, 4)
