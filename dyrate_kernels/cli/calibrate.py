"""``dyrate calibrate``: from which layer on the visual tokens may leave a model (VTW's search), on a few examples."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dyrate_kernels.cli import common


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("calibrate", help="find the layer for policy vtw", description=__doc__)
    common.add_common(parser)
    common.add_model(parser)
    common.add_data(parser)
    common.add_limit(parser, "examples", "--samples", default=20)
    parser.add_argument("--eta", type=float, default=0.003, help="largest mean KL divergence of the next token, in nats; default: 0.003")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Searches the layer and prints what each would cost."""
    from dyrate_kernels.training.layer_search import search_layer

    source = common.open_source(given, given.limit)
    model, processor = common.load_model(given)
    settings = {"policy": "vtw", "k": f"1 to {model.config.get_text_config().num_hidden_layers - 1}", "retention": "evict"}
    if not given.json:
        print(f"{'with:':<12}vtw, every k from {settings['k']}, retention evict, against the unpruned model", flush=True)
    shows = not given.json and sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if shows:
            print(f"\r{done} of {total} examples", end="" if done < total else "\r", file=sys.stderr, flush=True)

    found = search_layer(model, processor, source, eta=given.eta, samples=given.limit, progress=progress)
    if given.json:
        found_out = {"k": found.k, "divergence": found.divergence, "eta": found.eta, "samples": found.samples, "skipped": found.skipped}
        common.print_json(found_out | {"settings": settings})
        return 0
    from rich.table import Table

    table = Table(title=f"visual tokens gone from layer k on: {found.samples} examples, {found.skipped} skipped", title_justify="left")
    for heading in ("k", "KL divergence of the next token"):
        table.add_column(heading, justify="right")
    for k, value in found.divergence.items():
        table.add_row(str(k), f"{value:.5f}" + (" <=" if value <= found.eta else ""))
    common.console().print(table)
    if found.k is None:
        print(f"no layer stays within {found.eta}: these examples need the picture in every layer")
    else:
        print(f"use it: dyrate generate --image FILE --policy vtw --k {found.k}")
    return 0
