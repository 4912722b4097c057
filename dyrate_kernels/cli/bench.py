"""``dyrate bench e2e``: how fast a whole model answers, patched and unpatched, each beside its floor."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dyrate_kernels.cli import common, contenders
from dyrate_kernels.files import write_json
from dyrate_kernels.units import bytes_text

if TYPE_CHECKING:
    from dyrate_kernels.measuring.end_to_end import Problem, Row, Setup

BUNDLED = "bundled"


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("bench", help="time whole models, patched and unpatched", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    e2e = kinds.add_parser("e2e", help="time to first token, time per token, throughput, memory", description=_E2E)
    common.add_common(e2e)
    e2e.add_argument(
        "--config", metavar="NAME",
        help="a shape with random weights: llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-next-13b, llava-next-mistral-7b, "
        f"llava-onevision-7b, qwen2.5-vl-7b, small, toy, toy-onevision, toy-qwen; or {BUNDLED}, the model that ships with the package. "
        "Default: llava-1.5-7b on a GPU, small on a CPU",
    )  # fmt: skip
    e2e.add_argument("--batch", type=common.positive, nargs="+", default=[1], metavar="B", help="one or several; default: 1")
    e2e.add_argument("--visual", type=common.positive, metavar="N", help="visual tokens of a sequence; default: the shape's own number")
    e2e.add_argument("--text", type=common.positive, default=64, metavar="N", help="text tokens of the prompt; default: 64")
    e2e.add_argument(
        "--max-new-tokens", type=common.positive, default=64, metavar="N", help="tokens of every answer, 2 or more; default: 64",
    )  # fmt: skip
    e2e.add_argument(
        "--policy", metavar="NAME[:OPTION=VALUE..]",
        help="default: the published schedule, half, a quarter and an eighth of the tokens from steps 0, 5, 10 on",
    )  # fmt: skip
    e2e.add_argument("--backend", choices=("auto", "triton", "cuda", "reference"), default="auto", help="default: auto")
    e2e.add_argument("--device", help="default: cuda where there is one, else cpu")
    e2e.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    e2e.add_argument("--layers", type=common.positive, metavar="L", help="fewer decoder layers than the shape has")
    e2e.add_argument("--rounds", type=common.positive, default=3, metavar="R", help="set-ups take turns so many times; default: 3")
    e2e.add_argument(
        "--largest-batch", action="store_true", help="also look for the largest batch that fits (takes minutes; ignored on a CPU)"
    )
    e2e.add_argument("--out", metavar="FILE", help="write the rows there as JSON; python -m bench.report reads them")
    e2e.set_defaults(run=run)


_E2E = """Compares, in one run: the unpatched model through generate() and over a static cache, FastV at the same share of tokens, the
policy under both retentions, and the patched model that keeps everything. A set-up whose logits are wrong has no speed. Floor: the bytes
that a step must read, over the copy bandwidth measured in the same run."""


def run(given: argparse.Namespace) -> int:
    """Measures whole models, prints or writes the rows; returns 1 where a result was wrong."""
    import torch

    from dyrate_kernels import policies
    from dyrate_kernels.measuring import decoding, end_to_end, timing
    from dyrate_kernels.ops import dispatch
    from dyrate_kernels.patching.fused import fuses
    from dyrate_kernels.triton_kernels import interpreted

    if given.out is not None:
        common.check_file("--out", given.out)
    if given.max_new_tokens < 2:
        raise ValueError("--max-new-tokens 1: the time of a token is that between two; ask for 2 or more")
    device = _device(given.device)
    if given.largest_batch and device.type == "cpu":
        print("--largest-batch is ignored on a CPU: nothing there says what fits", file=sys.stderr)
    backend = dispatch.name_for(given.backend, device)
    bandwidth, times = timing.copy_bandwidth(device=device)
    rows = [timing.row("device-to-device copy", times, group="copy", bandwidth=bandwidth, moved=bandwidth * times.median)]
    name = given.config or ("llava-1.5-7b" if device.type == "cuda" else "small")
    model, make, visual, pictures = _build(given, name, device)
    policy = end_to_end.falling_schedule(visual, decoding.fitting_k(model)) if given.policy is None else policies.parse(given.policy)
    label = policy.name if given.policy is None else given.policy
    largest: dict[str, int | None] = {}
    settings = contenders.settings(model.config, policy, "recoverable", given.backend, device)
    if not given.json:
        print(f"{name}: {contenders.words(settings)}; evict, FastV and the unpruned model beside it", flush=True)
    with torch.no_grad():
        for batch in given.batch:
            fuse = fuses(model, backend)
            problem = end_to_end.Problem(name, model, make, batch, given.max_new_tokens, backend, pictures)
            kept = _mean_kept(problem, policy)
            setups = [*end_to_end.unpatched_setups(device), *end_to_end.policies_for(model, policy, label, kept, fuse)]
            if not given.json:
                print(f"{name}, B={batch}, N={visual}: {len(setups)} set-ups, {given.rounds} rounds", flush=True)
            found = list(end_to_end.measure(problem, setups, rounds=given.rounds, bandwidth=bandwidth))
            if given.largest_batch and not largest:
                largest = _largest(problem, setups)
            for row in found:
                row["largest_batch"] = largest.get(row["name"])
                if device.type == "cpu" and not interpreted():  # on a CPU on purpose: no rehearsal
                    row |= {"measurement": True, "label": None}
            rows += found
            if given.out is not None:
                write_json(given.out, rows)
    if given.json:
        verdicts = end_to_end.verdicts(rows)
        common.print_json({"bandwidth_GB_per_s": bandwidth / 1e9, "rows": rows, "verdicts": verdicts, "settings": settings})
    else:
        _show(rows, bandwidth)
    bad = [row for row in rows if row["correct"] is not None and not row["correct"]["passed"]]
    return 1 if bad else 0


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu, or cuda with or without a number")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA device here")
    return device


def _build(given: argparse.Namespace, name: str, device: Any) -> tuple[Any, Any, int, int]:
    """(model, batch -> inputs, visual tokens and pictures of a sequence)."""
    import torch

    from dyrate_kernels.measuring import random_models

    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    if name == BUNDLED:
        if given.visual is not None or given.layers is not None:
            raise ValueError(f"--config {BUNDLED} has its own number of visual tokens and layers; leave out --visual and --layers")
        return _bundled(device, dtype)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    model = random_models.build(name, device, dtype=dtype, layers=given.layers)
    visual = given.visual or random_models.MODELS[name].visual_tokens
    random_models.inputs(model, 1, visual, given.text)  # a wrong number is an error now
    return model, lambda batch: random_models.inputs(model, batch, visual, given.text), visual, random_models.pictures(model, visual)


def _bundled(device: Any, dtype: Any) -> tuple[Any, Any, int, int]:
    from dyrate_kernels.bundled import load_demo, scene_inputs

    model, processor = load_demo(device, dtype)

    def make(batch: int) -> dict[str, Any]:
        return scene_inputs(model, processor, batch)

    return model, make, int((make(1)["input_ids"] == model.config.image_token_id).sum()), 1


def _mean_kept(problem: Problem, policy: Any) -> float:
    """The share of visual tokens that the policy's decode steps read, of those whose times count; FastV is given the same."""
    import dyrate_kernels as dk
    from dyrate_kernels.measuring import decoding, end_to_end

    with dk.patch(problem.model, policy, backend=problem.backend) as handle:
        decoding.generate(problem.model, problem.make_inputs(1), problem.new_tokens)
        steps = end_to_end.kept_over_steps(handle.stats())
    return end_to_end.kept_while_timed(steps)


def _largest(problem: Problem, setups: list[Setup]) -> dict[str, int | None]:
    """By name of the row; empty on a CPU, where nothing says what fits."""
    from dyrate_kernels.measuring import end_to_end

    if problem.device.type != "cuda":
        return {}
    return {setup.name: end_to_end.largest_batch_of(problem, setup, 1024) for setup in setups}


def _show(rows: list[Row], bandwidth: float) -> None:
    from rich.table import Table

    from dyrate_kernels.measuring import end_to_end

    console = common.console(wide=True)
    copy = next(row for row in rows if row["group"] == "copy")
    console.print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s on {copy['gpu']}; torch {copy['torch']}, transformers {copy['transformers']}")
    models = [row for row in rows if row["group"] == "model"]
    for batch in dict.fromkeys(row["B"] for row in models):
        here = [row for row in models if row["B"] == batch]
        first = here[0]
        title = (
            f"{first['model']}, {first['layers']} layers, {first['dtype']}: B={batch}, N={first['N']}, {first['text']} text tokens, "
            f"{first['new_tokens']} new tokens"
        )
        table = Table(title=title, title_justify="left")
        heads = (
            "set-up",
            "kept",
            "first token ms",
            "ms a token",
            "p20..p80",
            "of unpatched",
            "floor ms",
            "x floor",
            "tokens/s",
            "images/s",
        )
        for head in (*heads, "KV live", "KV reserved", "peak", "largest B"):
            table.add_column(head, justify="left" if head == "set-up" else "right", no_wrap=head != "set-up")
        for row in here:
            table.add_row(*_cells(row))
        console.print(table)
        for row in here:
            if row["median_us"] is None:  # whole, where a cell of the table would cut it
                console.print(f"{row['name']}: {row['note']}", markup=False, highlight=False, soft_wrap=True)
    if any(row.get("over_unpatched") is not None for row in models):
        console.print(f"{end_to_end.PAIRED}\n{end_to_end.COUNTED}", highlight=False)
    for line in end_to_end.verdicts(rows):
        console.print(line)


def _cells(row: Row) -> list[str]:
    if row["median_us"] is None:
        return [row["name"], "not measured"]

    def number(key: str, form: str, factor: float = 1.0) -> str:
        return "" if row.get(key) is None else format(row[key] * factor, form)

    def size(key: str) -> str:
        return "" if row.get(key) is None else bytes_text(row[key])

    spread = f"{row['p20_us'] / 1e3:.2f}..{row['p80_us'] / 1e3:.2f}"
    return [
        row["name"], number("kept", ".1%"), number("first_token_us", ".1f", 1e-3), number("median_us", ".2f", 1e-3), spread,
        number("over_unpatched", ".0%"), number("floor_us", ".2f", 1e-3), number("times_floor", ".2f"), number("tokens_per_s", ".1f"),
        number("images_per_s", ".2f"), size("kv_live_bytes"), size("kv_reserved_bytes"), size("peak_bytes"), number("largest_batch", "d"),
    ]  # fmt: skip
