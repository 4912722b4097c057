"""Predictions of whole requests (``request_model``), of ``dyrate info`` and ``dyrate doctor``."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dyrate_kernels import specs
from dyrate_kernels.cli import common
from dyrate_kernels.units import bytes_text

DEVICE = "h200"


@dataclass(frozen=True)
class Subject:
    """A model whose requests are predicted.

    Attributes:
        name: of the model.
        shape: of its text model.
        visual: visual tokens that it makes of one picture; None: depends on the picture.
        request: ``(batch, new_tokens, visual, text)`` -> ``request_model.Request``.
    """

    name: str
    shape: Any
    visual: int | None
    request: Callable[[int, int, int, int], Any]


def known(text: str) -> str:
    """An argument that names a model of ``flops.named_model``."""
    from dyrate_kernels import flops

    try:
        flops.named_model(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def named(name: str) -> Subject:
    """A model of ``flops.MODELS``."""
    from dyrate_kernels import flops, request_model

    model = flops.named_model(name)

    def request(batch: int, new_tokens: int, visual: int, text: int) -> Any:
        return request_model.named_request(name, batch, new_tokens, visual, text)

    return Subject(name, model.shape, model.visual_tokens, request)


def of_config(name: str, config: Any) -> Subject:
    """A model by its config; its vision side is left out where ``request_model`` does not know it."""
    from dyrate_kernels.policies.base import ModelShape
    from dyrate_kernels.request_model import Request, VisionShape

    shape = ModelShape.from_config(config)
    vision = None
    with contextlib.suppress(ValueError):
        vision = VisionShape.from_config(config)
    one = getattr(config, "image_seq_length", None) if not hasattr(config, "image_grid_pinpoints") else None

    def request(batch: int, new_tokens: int, visual: int, text: int) -> Any:
        return Request(shape, batch, visual, text, new_tokens, vision)

    return Subject(name, shape, one if isinstance(one, int) else None, request)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that concern whole requests."""
    parser.add_argument(
        "--new-tokens", type=common.positive, nargs="+", default=[256], metavar="T", help="of each answer, one or several; default: 256"
    )
    add_plan(parser)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Adds options: how a request is answered, and by a device of which rates."""
    from dyrate_kernels import request_model

    parser.add_argument("--policy", default="dyrate", metavar="NAME[:OPTION=VALUE..]", help="default: dyrate")
    parser.add_argument("--retention", choices=specs.RETENTIONS, nargs="+", help="default: all that the policy has")
    parser.add_argument(
        "--kept", type=float, metavar="SHARE",
        help="of the visual tokens that layers from k on read; default: the policy's own, or "
        f"{request_model.ASSUMED_KEPT} where that depends on what it sees",
    )  # fmt: skip
    parser.add_argument("--pool", type=float, metavar="SHARE", help=f"of them that retention pool holds; default: {request_model.POOL}")
    names = ", ".join(request_model.DEVICES)
    parser.add_argument("--device", metavar="NAME", help=f"whose rates are taken: {names}; default: {DEVICE}")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="of memory, in place of the device's")
    parser.add_argument("--tflops", type=float, metavar="TFLOP/S", help="of matrix products, in place of the device's")


def collect(given: argparse.Namespace, subject: Subject | None = None) -> dict[str, Any]:
    """Predictions of every batch and length, dense and under each retention.

    Args:
        subject: None: the model that ``--config`` names.

    Raises:
        ValueError: an option names nothing, or is out of range.
    """
    from dyrate_kernels import policies, request_model
    from dyrate_kernels.request_model import DENSE, Plan

    rates = _rates(given)
    model = named(given.config) if subject is None else subject
    policy = policies.parse(given.policy).bind(model.shape)
    visual = model.visual if given.visual is None else given.visual
    if visual is None:
        raise ValueError(f"--visual is needed: how many visual tokens {model.name} makes depends on the picture")
    if given.kept is not None and not 0 <= given.kept <= 1:
        raise ValueError(f"--kept must be in [0, 1], got {given.kept}")
    pool = request_model.POOL if given.pool is None else given.pool
    try:
        specs.retention("pool", pool)
    except ValueError as error:
        raise ValueError(f"--pool: {error}") from None
    if not policy.decides:
        pool = 1.0  # every token stays
    kept, assumed = request_model.kept_of(policy, visual, max(given.new_tokens))
    most = given.kept is None and not assumed and request_model.kept_at_most(policy, model.shape.num_layers)
    if given.kept is not None:
        kept, assumed = (given.kept,), False
    asked = given.retention or specs.RETENTIONS
    retentions = [name for name in asked if specs.retention(name).suits(policy)]
    if not retentions:
        specs.retention(asked[0]).check(policy)  # says why
    k = policy.layer_groups(model.shape.num_layers)[0]
    plans = {DENSE: Plan()} | {name: Plan(name, k, kept, pool) for name in retentions}
    rows = []
    for batch in given.batch:
        for new_tokens in given.new_tokens:
            request = model.request(batch, new_tokens, visual, given.text)
            for name, plan in plans.items():
                found = request_model.predict(request, plan, rates)
                facts = {"retention": name, "batch": batch, "new_tokens": new_tokens}
                rows.append(facts | found.to_dict() | {"largest_batch": request_model.largest_batch(request, plan, rates)})
    return {
        "prediction": True, "config": model.name, "visual_tokens": visual, "text_tokens": given.text, "policy": given.policy, "k": k,
        "kept": list(kept) if len(set(kept)) > 1 else kept[0], "kept_is_assumed": assumed, "kept_is_most": most,
        "bandwidth": rates.bandwidth, "flops_per_s": rates.flops, "rates": rates.source, "rows": rows,
    }  # fmt: skip


def _rates(given: argparse.Namespace) -> Any:
    from dyrate_kernels import request_model
    from dyrate_kernels.request_model import Rates

    if given.measure:
        if given.device is not None:
            raise ValueError("--measure takes the rates of this machine, --device those of another one; leave one of them out")
        from dyrate_kernels.measuring import timing

        memory = timing.environment().get("memory_bytes")
        rates = Rates(
            timing.copy_bandwidth()[0], timing.product_rate()[0], memory, "bandwidth of a copy and a matrix product, measured here"
        )
    else:
        name = given.device or DEVICE
        rates = request_model.named_rates(name)
        rates = Rates(rates.bandwidth, rates.flops, rates.memory, f"{name}: {rates.source}")
    for option, factor in (("bandwidth", 1e9), ("tflops", 1e12)):
        value = getattr(given, option)
        if value is None:
            continue
        if not 0 < value < math.inf:
            raise ValueError(f"--{option} must be above 0 and finite, got {value}")
        both = given.bandwidth is not None and given.tflops is not None
        source = "given" if both else f"{rates.source}; {option} given"
        changed = {"bandwidth": value * factor} if option == "bandwidth" else {"flops": value * factor}
        rates = Rates(**{"bandwidth": rates.bandwidth, "flops": rates.flops, "memory": rates.memory, "source": source} | changed)
    return rates


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> None:
    """Prints rows under ``heads``, numbers to the right, within 80 columns where numbers are not huge."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for number, head in enumerate(heads):
        words = number == 0 or head == "each waits for"
        table.add_column(head, justify="left" if words else "right", no_wrap=head != "each waits for", overflow="fold")
    for row in rows:
        table.add_row(*row)
    common.console().print(table)
    print()


def show(found: dict[str, Any]) -> None:
    """Prints :func:`collect`: totals of each request, then its phases."""
    from dyrate_kernels.request_model import DENSE

    share = f"{100 * found['kept']:.1f} %" if isinstance(found["kept"], float) else "a falling share"
    source = " (assumed, --kept says another)" if found["kept_is_assumed"] else ""
    source = " (the most that it keeps in any layer and step: it may take less, --kept says another)" if found["kept_is_most"] else source
    common.say("requests", f"predicted, not measured: what {found['policy']} takes at least, k={found['k']}, {share} kept{source}")
    common.say("rates", f"{found['bandwidth'] / 1e9:.0f} GB/s, {found['flops_per_s'] / 1e12:.0f} TFLOP/s; {found['rates']}")
    totals, phases = [], []
    dense: dict[str, Any] = {}
    for row in found["rows"]:
        dense = row if row["retention"] == DENSE else dense
        which = [row["retention"], str(row["batch"]), str(row["new_tokens"])]
        memory, largest = bytes_text(row["peak_bytes"]), "" if row["largest_batch"] is None else str(row["largest_batch"])
        totals.append([
            *which, f"{row['seconds']:.3f}", f"{dense['seconds'] / row['seconds']:.2f}x", f"{row['images_per_s']:.2f}",
            f"{row['tokens_per_s']:.0f}", memory, largest,
        ])  # fmt: skip
        parts = [row[name] for name in ("encode", "prefill", "decode")]
        phases.append([*which, *(f"{1e3 * part['seconds']:.1f}" for part in parts), ", ".join(part["bound"] for part in parts)])
    _table(("at least", "B", "new", "request s", "faster", "img/s", "tok/s", "memory", "most B"), totals)
    _table(("milliseconds", "B", "new", "encode", "prefill", "decode", "each waits for"), phases)
    common.say("memory", "of weights, keys and values; most B: as many sequences fit the device; img, tok: pictures and new tokens")
