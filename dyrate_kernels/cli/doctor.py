"""``dyrate doctor``: on one screen, whether this machine, this model and this request gain by pruning, and by what. Nothing is run: times
are the least that the model's shapes allow (docs/costs.md), `dyrate bench e2e` measures.
"""

from __future__ import annotations

import argparse
from typing import Any

from dyrate_kernels.cli import common, predicted
from dyrate_kernels.units import bytes_text

GAINS, LITTLE = 1.25, 1.05  # times as fast as the dense request: from the one on it gains, below the other one it does not


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("doctor", help="does pruning pay here: machine, model, request, on one screen", description=__doc__)
    common.add_common(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="DIR_OR_ID", help="whose config is read, no weights; default: the bundled one")
    which.add_argument("--config", type=predicted.known, metavar="NAME", help="a model that `dyrate info --config` knows")
    parser.add_argument("--batch", type=common.positive, default=1, metavar="B", help="sequences answered together; default: 1")
    parser.add_argument(
        "--visual", type=common.positive, metavar="N", help="visual tokens of each; default: what the model makes of one picture"
    )
    parser.add_argument("--text", type=common.positive, default=128, metavar="N", help="text tokens of each prompt; default: 128")
    parser.add_argument("--new-tokens", type=common.positive, default=256, metavar="T", help="of each answer; default: 256")
    parser.add_argument("--measure", action="store_true", help="take the rates of this machine, which are measured first")
    predicted.add_plan(parser)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Prints the screen."""
    found = collect(given)
    common.print_json(found) if given.json else _show(found)
    return 0


def collect(given: argparse.Namespace) -> dict[str, Any]:
    """Everything the command tells."""
    subject, refused = _subject(given)
    machine = _machine()
    if given.device is None and not given.measure:
        given.device = machine["rates_of"]
    asked = argparse.Namespace(**vars(given) | {"batch": [given.batch], "new_tokens": [given.new_tokens]})
    request = predicted.collect(asked, subject)
    dense, *pruned = request["rows"]
    best = min(pruned, key=lambda row: row["seconds"])
    parts = {name: dense[name]["seconds"] - best[name]["seconds"] for name in ("prefill", "decode")}
    return {
        "machine": machine, "model": {"name": subject.name, "refused": refused}, "request": request,
        "verdict": {
            "retention": best["retention"], "times_as_fast": dense["seconds"] / best["seconds"],
            "first_token": dense["first_token_seconds"] / best["first_token_seconds"],
            "token": dense["decode"]["seconds"] / best["decode"]["seconds"] if best["decode"]["seconds"] else 1.0,
            "bytes_less": dense["peak_bytes"] - best["peak_bytes"],
            "by": max(parts, key=lambda name: parts[name]),
        },
    }  # fmt: skip


def _subject(given: argparse.Namespace) -> tuple[predicted.Subject, str | None]:
    """The model, and why it cannot be patched, if that is so."""
    if given.config is not None:
        return predicted.named(given.config), None
    from transformers import AutoConfig

    from dyrate_kernels import families
    from dyrate_kernels.bundled import MODEL_FOLDER, NAME
    from dyrate_kernels.loading import check_name

    check_name(given.model)
    config = AutoConfig.from_pretrained(MODEL_FOLDER if given.model is None else given.model)
    refused = (
        None if config.model_type in families.FAMILIES else f"{config.model_type} cannot be patched, but: {', '.join(families.names())}"
    )
    return predicted.of_config(NAME if given.model is None else given.model, config), refused


def _machine() -> dict[str, Any]:
    """The device, what runs on it, and whose rates of ``request_model.DEVICES`` it has."""
    import torch

    import dyrate_kernels as dk
    from dyrate_kernels.patching.path import of_machine
    from dyrate_kernels.request_model import DEVICES

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name(0) if cuda else f"cpu ({torch.get_num_threads()} threads)"
    words = name.lower().replace("-", " ").split()
    own = next((each for each in DEVICES if each in words), None)
    ready = [backend for backend, state in dk.backends().items() if state == "available"]
    return {
        "device": name,
        "gpu": cuda,
        "backends": ready,
        "path": of_machine(),
        "rates_of": own or predicted.DEVICE,
        "rates_are_own": own is not None,
    }


def _show(found: dict[str, Any]) -> None:
    machine, request = found["machine"], found["request"]
    dense = request["rows"][0]
    share = f"{100 * request['kept']:.0f} % kept" if isinstance(request["kept"], float) else "a falling share kept"
    if request["kept_is_assumed"]:
        share += " (assumed; --kept)"
    common.say("model", f"{request['config']}, {request['policy']} from layer {request['k']} on, {share}")
    tokens = f"{request['visual_tokens']} visual + {request['text_tokens']} text tokens"
    common.say("request", f"{dense['batch']} x ({tokens}), {dense['new_tokens']} new tokens each")
    if found["model"]["refused"]:
        common.say("but", found["model"]["refused"])
    for name, text in _verdict(found):
        common.say(name, text)
    path = machine["path"]
    common.say("machine", f"{machine['device']}; {', '.join(machine['backends'])}; {path['steps']} steps, {path['layers']} layers")
    common.say("rates", f"{request['bandwidth'] / 1e9:.0f} GB/s, {request['flops_per_s'] / 1e12:.3g} TFLOP/s; {_whose(request)}")
    print()
    _table(request["rows"])


def _table(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for head in ("at least", "first ms", "token ms", "request s", "faster", "memory", "largest B"):
        table.add_column(head, justify="left" if head == "at least" else "right", no_wrap=True)
    for row in rows:
        token = row["decode"]["seconds"] / max(row["new_tokens"] - 1, 1)
        table.add_row(
            row["retention"], _number(1e3 * row["first_token_seconds"]), _number(1e3 * token), _number(row["seconds"]),
            f"{rows[0]['seconds'] / row['seconds']:.2f}x", bytes_text(row["peak_bytes"]), str(row["largest_batch"] or ""),
        )  # fmt: skip
    common.console().print(table)


def _number(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _verdict(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines behind the question: whether it gains, by what, and what this machine adds to that."""
    verdict, machine, request = found["verdict"], found["machine"], found["request"]
    dense, times = request["rows"][0], verdict["times_as_fast"]
    parts = {"prefill": "a shorter prompt in the later layers", "decode": "fewer keys and values read in each step"}
    numbers = f"first token {verdict['first_token']:.2f}x, each further one {verdict['token']:.2f}x"
    by = f"with {verdict['retention']}, mostly by {parts[verdict['by']]}; predicted, rates: {_whose(request)}"
    if times >= GAINS:
        said = f"gains: up to {times:.2f}x ({numbers}) {by}"
    elif times >= LITTLE:
        said = f"gains little: up to {times:.2f}x ({numbers}) {by}"
    else:
        said = f"no gain in time: {times:.2f}x at most; {_why_not(dense)}"
    lines = [("this request", said)]
    if verdict["bytes_less"] > 0.02 * dense["peak_bytes"]:
        lines.append(("memory", f"{bytes_text(verdict['bytes_less'])} less"))
    if machine["gpu"]:
        own = (
            ""
            if machine["rates_are_own"]
            else f"; its rates are not known here: those of {machine['rates_of']} were taken, --measure takes its own"
        )
        lines.append(("this machine", f"has a GPU: dyrate bench e2e measures what comes of it{own}"))
    else:
        lines.append(("this machine", "no GPU: the reference runs, a check of results and seldom a gain; the times are of the rates named"))
    return lines


def _whose(request: dict[str, Any]) -> str:
    """Names the device whose rates are taken, or where they come from."""
    return str(request["rates"]).split(":")[0]


def _why_not(dense: dict[str, Any]) -> str:
    """Where a dense request's time goes instead."""
    decode = dense["decode"]["seconds"] / dense["seconds"]
    steps = f"{100 * decode:.0f} % of it are decode steps, which read the weights above all"
    return f"{steps}: more sequences at once or more visual tokens change that"
