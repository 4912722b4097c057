"""``dyrate train``: a predictor of the pruning rate for a model, the model frozen."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from dyrate_kernels import specs
from dyrate_kernels.cli import common
from dyrate_kernels.units import bytes_text


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("train", help="train a predictor of the pruning rate for a model", description=__doc__)
    common.add_common(parser)
    common.add_model(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run; the predictor is saved there")
    common.add_data(parser)
    common.add_limit(parser, "examples (of shapes by default 4000)", "--examples")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-keep", type=float, metavar="SHARE", help="mean share of the visual tokens that decode steps keep")
    target.add_argument("--target-cost", type=float, metavar="SHARE", help="mean paper cost (FastV's FLOPs formula), 1 = unpruned")
    parser.add_argument("--k", type=int, default=3, help="first layer that sees the pruned set; default: 3")
    parser.add_argument("--rates", default="half_open", help="half_open, closed, or a list such as [0,.5,.9]; default: half_open")
    parser.add_argument("--num-rates", type=int, default=5, metavar="K", help="for half_open and closed; default: 5")
    parser.add_argument("--text-aware", action="store_true", help="read the hidden state of the text beside the attention mass")
    parser.add_argument("--spread", type=float, default=0.0, metavar="SHARE", help="of the kept tokens, evenly spaced; default: 0")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps; default: 1000")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step and device; default: 8")
    parser.add_argument("--learning-rate", type=float, default=2e-2, help="default: 0.02, on standardised mass")
    parser.add_argument("--budget-weight", type=float, default=100.0, metavar="LAMBDA", help="default: 100")
    parser.add_argument("--tau", type=float, nargs=2, default=(1.0, 0.1), metavar=("START", "END"), help="default: 1 0.1")
    parser.add_argument("--max-length", type=int, default=4096, metavar="N", help="longer examples are skipped; default: 4096")
    parser.add_argument("--max-answer", type=int, default=512, metavar="N", help="longer answers are cut; default: 512")
    parser.add_argument("--save-every", type=int, default=200, metavar="N", help="steps between checkpoints; default: 200")
    parser.add_argument("--log-every", type=int, default=20, metavar="N", help="steps between log lines; default: 20")
    parser.add_argument("--fresh", action="store_true", help="do not go on from a checkpoint in --out")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Trains the predictor, saves it and prints what it cost."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise RuntimeError("training needs the package accelerate: pip install 'dyrate-kernels[train]'") from None
    from dyrate_kernels.quiet import import_transformers

    import_transformers("trainer")
    from dyrate_kernels.files import check_folder, printable
    from dyrate_kernels.training.predictor_training import OUTPUTS, Options, train_predictor

    options = Options(
        k=given.k, rates=specs.value(given.rates), num_rates=given.num_rates, text=given.text_aware, spread=given.spread,
        target_keep=given.target_keep,
        target_cost=given.target_cost, steps=given.steps, batch_size=given.batch_size, learning_rate=given.learning_rate,
        budget_weight=given.budget_weight, tau_start=given.tau[0], tau_end=given.tau[1], seed=given.seed, max_length=given.max_length,
        max_answer=given.max_answer, save_every=given.save_every, log_every=given.log_every,
    )  # fmt: skip
    if printable(given.out) != given.out:
        raise ValueError(f"--out {given.out}: a name that is not UTF-8, which safetensors cannot write; give another")
    check_folder("--out", given.out, OUTPUTS)
    source = common.open_source(given, 4000)
    model, processor = common.load_model(given)
    if not given.json and os.environ.get("RANK", "0") == "0":
        rates = " ".join(f"{rate:g}" for rate in options.rate_values)
        reads = "attention mass and the text's hidden state" if options.text else "attention mass"
        target = f"keep {options.target_keep}" if options.target_cost is None else f"cost {options.target_cost}"
        layers = model.config.get_text_config().num_hidden_layers
        more = f"rates {rates}, spread {options.spread}, reads {reads}, target {target}"
        print(f"{'with:':<12}k={options.k} of {layers} layers, {more}", flush=True)
    if not given.json:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("dyrate_kernels.training").setLevel(logging.INFO)
    trained = train_predictor(model, processor, source, given.out, options, resume=not given.fresh, quiet=given.json)
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks
        return 0
    summary = trained.summary
    if given.json:
        common.print_json({"out": given.out, **summary})
        return 0
    target = "kept" if options.target_cost is None else "cost"
    lines = [
        ("saved", f"{given.out} (dyrate_predictor.safetensors, dyrate_predictor.json, training.json)"),
        ("budget", f"{100 * summary['cost_on_calibration']:.1f} % {target} on the training data"),
        ("examples", f"{summary['examples']}, {summary['skipped']} skipped" + "".join(f"\n  {why}" for why in summary["reasons"])),
        ("memory", f"{bytes_text(summary['saved_bytes_per_answer_token'])} kept for the backward pass, a token of the answer"),
    ]
    for name, text in lines:
        print(f"{name + ':':<12}{text}")
    print(f"use it:     dyrate generate --image FILE --predictor {given.out}" + ("" if given.k == 3 else f" --k {given.k}"))
    return 0
