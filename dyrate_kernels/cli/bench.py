"""``dyrate bench e2e``: how fast a whole model answers, patched and unpatched, each beside its floor."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from dyrate_kernels.cli import common, contenders
from dyrate_kernels.files import write_json
from dyrate_kernels.units import bytes_text

if TYPE_CHECKING:
    from dyrate_kernels.measuring.end_to_end import Problem, Row, Setup

BUNDLED = "bundled"
CPU_BYTES = 4 << 30  # of weights; more is for a GPU


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
        "--new-tokens", "--max-new-tokens", type=common.positive, nargs="+", default=[64], metavar="T",
        help="tokens of every answer, 2 or more, one or several: the shorter ones are read off the longest run; default: 64",
    )  # fmt: skip
    e2e.add_argument(
        "--policy", metavar="NAME[:OPTION=VALUE..]",
        help="default: the published schedule, half, a quarter and an eighth of the tokens from steps 0, 5, 10 on",
    )  # fmt: skip
    e2e.add_argument(
        "--vision", metavar="NAME[:OPTIONS][+NAME..]", help="each patched set-up once more behind these reducers; default: none"
    )
    e2e.add_argument(
        "--pool", type=float, default=0.25, metavar="SHARE", help="of the visual tokens that retention pool holds; default: 0.25"
    )
    e2e.add_argument("--backend", choices=("auto", "triton", "cuda", "reference"), default="auto", help="default: auto")
    e2e.add_argument("--device", help="default: cuda where there is one, else cpu")
    e2e.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    e2e.add_argument("--layers", type=common.positive, metavar="L", help="fewer decoder layers than the shape has")
    e2e.add_argument("--rounds", type=common.positive, default=3, metavar="R", help="set-ups take turns so many times; default: 3")
    e2e.add_argument(
        "--seconds", type=common.positive, metavar="S", help="to be done by then, about: what takes longer is shortened or left out"
    )
    e2e.add_argument(
        "--largest-batch", action="store_true", help="also look for the largest batch that fits (takes minutes; ignored on a CPU)"
    )
    e2e.add_argument("--out", metavar="FILE", help="write the rows there as JSON; python -m bench.report reads them")
    e2e.set_defaults(run=run)


_E2E = """Compares, in one run: the unpatched model through generate() and over a static cache, FastV at the same share of tokens, the
policy under each retention, the patched model that keeps everything, the patch without any switch, and the patched ones behind reducers. A
set-up whose logits are wrong has no speed. Floor: the bytes that a step must read, over the copy bandwidth measured in the same run. Beside
each request stands what it would take at least, predicted by that bandwidth and the rate of a matrix product of the same run."""


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
    if min(given.new_tokens) < 2:
        raise ValueError("--new-tokens 1: the time of a token is that between two; ask for 2 or more")
    if not 0 < given.pool <= 1:
        raise ValueError(f"--pool must be above 0 and at most 1, got {given.pool}")
    until = None if given.seconds is None else time.monotonic() + given.seconds
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
        common.say(name, f"{contenders.words(settings)}; evict, FastV and the unpruned model beside it", 4)
    with torch.no_grad():
        for batch in given.batch:
            fuse = fuses(model, backend)
            problem = end_to_end.Problem(name, model, make, batch, max(given.new_tokens), backend, pictures, tuple(given.new_tokens))
            kept = _mean_kept(problem, policy)
            setups = [
                *end_to_end.unpatched_setups(device),
                *end_to_end.policies_for(model, policy, label, kept, fuse, given.vision, given.pool),
            ]
            if not given.json:
                print(f"{name}, B={batch}, N={visual}: {len(setups)} set-ups, {given.rounds} rounds", flush=True)
            found = list(end_to_end.measure(problem, setups, rounds=given.rounds, bandwidth=bandwidth, until=until))
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


def _build(given: argparse.Namespace, name: str, device: Any) -> tuple[Any, Any, int, float]:
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
    if given.device is None and device.type == "cpu":
        _check_size(name, given.layers, dtype)
    model = random_models.build(name, device, dtype=dtype, layers=given.layers)
    visual = given.visual or random_models.MODELS[name].visual_tokens
    random_models.inputs(model, 1, visual, given.text)  # a wrong number is an error now
    return model, lambda batch: random_models.inputs(model, batch, visual, given.text), visual, random_models.pictures(model, visual, name)


def _check_size(name: str, layers: int | None, dtype: Any) -> None:
    """ValueError now, rather than hours later: a shape that is meant for a GPU, where there is none and none was asked for."""
    import torch

    from dyrate_kernels import flops
    from dyrate_kernels.measuring import random_models

    if name not in random_models.MODELS:
        return
    shape = random_models.MODELS[name].text
    shape = shape.replace(dtype=dtype or torch.float32, num_layers=layers or shape.num_layers)
    if (size := flops.weight_bytes(shape)) > CPU_BYTES:
        raise ValueError(
            f"--config {name}: {bytes_text(size)} of weights, and there is no GPU: this would take hours. `dyrate doctor --config {name}` "
            "predicts instead, --layers 2 or --config small measures less, --device cpu insists"
        )


def _bundled(device: Any, dtype: Any) -> tuple[Any, Any, int, float]:
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
    from dyrate_kernels.measuring import end_to_end

    console = common.console(wide=True)
    copy = next(row for row in rows if row["group"] == "copy")
    console.print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s on {copy['gpu']}; torch {copy['torch']}, transformers {copy['transformers']}")
    models = [row for row in rows if row["group"] == "model"]
    for batch, new_tokens in dict.fromkeys((row["B"], row["new_tokens"]) for row in models):
        here = [row for row in models if (row["B"], row["new_tokens"]) == (batch, new_tokens)]
        first = here[0]
        title = (
            f"{first['model']}, {first['layers']} layers, {first['dtype']}: B={batch}, N={first['N']}, {first['text']} text tokens, "
            f"{new_tokens} new tokens"
        )
        for kind, columns in (("a token", TOKEN), ("a request", REQUEST)):
            cells = [[row["name"], *(_cells(row, columns) if row["median_us"] is not None else ["not measured"])] for row in here]
            common.print_table(f"{title}; {kind}", ["set-up", *columns], cells)
        for row in here:
            if row["median_us"] is None:  # whole, where a cell of the table would cut it
                console.print(f"{row['name']}: {row['note']}", markup=False, highlight=False, soft_wrap=True)
    if any(row.get("over_unpatched") is not None for row in models):
        console.print(f"{end_to_end.PAIRED}\n{end_to_end.COUNTED}", highlight=False)
    for line in end_to_end.verdicts(rows):
        console.print(line)


MILLI, WHOLE = 1e-3, 1e-6  # of microseconds
Columns = dict[str, tuple[str, str, float]]  # head -> key of a row, format (bytes: as such), factor
TOKEN: Columns = {
    "kept": ("kept", ".1%", 1), "ms": ("median_us", ".2f", MILLI), "p20": ("p20_us", ".2f", MILLI), "p80": ("p80_us", ".2f", MILLI),
    "of unpatched": ("over_unpatched", ".0%", 1), "floor ms": ("floor_us", ".2f", MILLI), "x floor": ("times_floor", ".2f", 1),
    "tokens/s": ("tokens_per_s", ".1f", 1), "KV live": ("kv_live_bytes", "bytes", 1), "KV reserved": ("kv_reserved_bytes", "bytes", 1),
    "largest B": ("largest_batch", "d", 1),
}  # fmt: skip
REQUEST: Columns = {
    "encode ms": ("encode_us", ".1f", MILLI), "first token ms": ("first_token_us", ".1f", MILLI), "decode ms": ("decode_us", ".1f", MILLI),
    "request s": ("request_us", ".3f", WHOLE), "predicted s": ("predicted_request_us", ".3f", WHOLE),
    "of unpatched": ("request_over_unpatched", ".0%", 1), "images/s": ("images_per_s", ".2f", 1),
    "tokens/s": ("request_tokens_per_s", ".1f", 1), "peak": ("peak_bytes", "bytes", 1),
}  # fmt: skip


def _cells(row: Row, columns: Columns) -> list[str]:
    """Empty where a row knows nothing of it: a captured step, a record of an older version."""

    def cell(key: str, form: str, factor: float) -> str:
        value = row.get(key)
        if value is None:
            return ""
        return bytes_text(value) if form == "bytes" else format(value if form == "d" else value * factor, form)

    return [cell(*column) for column in columns.values()]
