"""``dyrate calibrate --out DIR``: a predictor for a model, chosen in minutes on your own pictures and prompts, without labels. Without
``--out``: from which layer on the visual tokens may leave a model (VTW's search).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from dyrate_kernels.cli import common

REPORT = "calibration.json"
PICTURES = 32
FEW = 20  # pictures: below, intervals are wide
_ONLY_OUT = ("prompts", "prompt", "cost", "k", "most_loss", "max_new_tokens", "batch_size", "text")


def add_parser(commands: Any) -> None:
    """Registers the command."""
    shown = "choose k, spread and rates on your own pictures and prompts (--out), or find the layer for policy vtw"
    parser = commands.add_parser("calibrate", help=shown, description=__doc__)
    common.add_common(parser)
    common.add_model(parser)
    parser.add_argument("--out", metavar="DIR", help="the predictor is written there; without it the layer for vtw is searched")
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="with --out and --images DIR, a folder of pictures or a Parquet file: a prompt a line, asked by turns; or JSON lines with "
        "prompt and image. Without both, examples of --data are asked, whose answers are not looked at",
    )  # fmt: skip
    parser.add_argument("--prompt", metavar="TEXT", help="in place of --prompts: asked of every picture")
    common.add_data(parser)
    common.add_limit(parser, f"examples, or pictures; for a predictor {PICTURES} by default,", "--samples")
    parser.add_argument(
        "--cost", metavar="A,B,..", help="percentages of the unpruned model's visual rows to calibrate for; default: 66.7,50,33.3,20"
    )
    parser.add_argument("--k", type=common.positive, nargs="+", metavar="K", help="first pruned layers to try; default: those of a list")
    parser.add_argument(
        "--most-loss", type=float, metavar="NATS",
        help="of log-likelihood a token, at the upper end of its interval, that counts as safe; default: 0.02",
    )  # fmt: skip
    parser.add_argument("--no-text", dest="text", action="store_false", default=None, help="none that reads the text's hidden state")
    parser.add_argument("--max-new-tokens", type=common.positive, metavar="N", help="of an answer; default: 128")
    parser.add_argument("--batch-size", type=common.positive, metavar="N", help="answers read together; default: 8")
    parser.add_argument("--eta", type=float, help="without --out: largest mean KL divergence of the next token, in nats; default: 0.003")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Calibrates a predictor, or searches the layer."""
    if given.out is None:
        for name in _ONLY_OUT:
            if getattr(given, name) is not None:
                option = "no-text" if name == "text" else name.replace("_", "-")
                raise ValueError(f"--{option} goes with --out DIR, where a predictor is written; without it the layer for vtw is searched")
        return _layer(given)
    if given.eta is not None:
        raise ValueError("--eta belongs to the search of a layer for vtw, which --out leaves out; --most-loss says what is safe")
    return _predictor(given)


def _predictor(given: argparse.Namespace) -> int:
    """Chooses a predictor, saves it and prints what was measured. Returns 1 where nothing is safe."""
    from dyrate_kernels.cli.eval import costs_in, machine
    from dyrate_kernels.files import check_folder, locked, printable, write_json
    from dyrate_kernels.predictor import CONFIG_FILE, WEIGHTS_FILE
    from dyrate_kernels.training.calibration import Options, calibrate

    options = {
        "costs": tuple(costs_in(given.cost)) or None, "layers": given.k, "most_loss": given.most_loss, "text": given.text,
        "max_new_tokens": given.max_new_tokens, "batch_size": given.batch_size,
    }  # fmt: skip
    chosen = Options(seed=given.seed, **{name: value for name, value in options.items() if value is not None})
    if printable(given.out) != given.out:
        raise ValueError(f"--out {given.out}: a name that is not UTF-8, which safetensors cannot write; give another")
    check_folder("--out", given.out, (WEIGHTS_FILE, CONFIG_FILE, REPORT))
    source = _source(given)
    with locked(Path(given.out)):
        model, processor = common.load_model(given)
        layers = model.config.get_text_config().num_hidden_layers
        if not given.json:
            costs = ", ".join(f"{100 * cost:g}" for cost in chosen.costs)
            tried = " ".join(map(str, chosen.layers_of(layers)))
            common.say("with", f"{len(source)} pictures, costs {costs} % of the visual rows, k {tried} of {layers} layers, spread 0 0.5 1, "
                       "retention recoverable")  # fmt: skip
        begun = time.monotonic()
        with _Bar(given.json) as progress:
            found = calibrate(model, processor, source, chosen, progress=progress)
        table = {"out": given.out if found.predictor is not None else None, **found.to_dict(), "most_loss": chosen.most_loss,
                 "seconds": round(time.monotonic() - begun, 1), "machine": machine(model)}  # fmt: skip
        if found.predictor is not None:
            found.predictor.save_pretrained(given.out)
        write_json(Path(given.out) / REPORT, table)
    if given.json:
        common.print_json(table)
    else:
        _show(found, chosen, given.out, layers, table["seconds"])
    return 0 if found.predictor is not None else 1


def _source(given: argparse.Namespace) -> Any:
    """Pictures and prompts that the options name; files are looked at here, before the model is loaded."""
    from dyrate_kernels.training.own_answers import PromptedPictures, read_prompts

    if given.data != "shapes" or (given.images is None and given.prompts is None and given.prompt is None):
        for name in ("prompts", "prompt"):
            if getattr(given, name) is not None:
                raise ValueError(f"--{name} goes with --images DIR, a folder of pictures; the examples of --data have their own prompts")
        given.limit = given.limit or PICTURES
        return common.open_source(given, PICTURES)
    if given.images is None:
        raise ValueError("--images is missing: give the folder of your pictures, of which --prompts are asked")
    if given.prompts is not None and given.prompt is not None:
        raise ValueError("--prompts and --prompt are two ways to say the same: leave one of them out")
    if given.prompts is None and given.prompt is None:
        raise ValueError("--prompts is missing: give a file with a prompt a line, such as your users ask, or --prompt TEXT")
    if given.prompt is not None and not given.prompt.strip():
        raise ValueError("--prompt is empty; say what to do with the picture")
    prompts = read_prompts(given.prompts) if given.prompt is None else [given.prompt]
    return common.First(PromptedPictures(given.images, prompts), given.limit or PICTURES)


class _Bar:
    """A progress bar on a terminal; silent elsewhere."""

    def __init__(self, silent: bool) -> None:
        self.shows = not silent and sys.stderr.isatty()

    def __enter__(self) -> Any:
        if not self.shows:
            return None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.made = Progress(
            TextColumn("{task.description:<15}"), BarColumn(), TextColumn("{task.completed} of {task.total}"), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.made.start()
        tasks: dict[str, Any] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = self.made.add_task(name, total=total)
            self.made.update(tasks[name], completed=done)

        return progress

    def __exit__(self, *_: object) -> None:
        if self.shows:
            self.made.stop()


def _show(found: Any, options: Any, out: str, layers: int, seconds: float) -> None:
    """Prints two tables of at most 80 columns, what was chosen, and what to think of it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=min(common.console().width, 80), highlight=False)
    title = f"log-likelihood lost by {found.pictures} unpruned answers of {found.tokens:.0f} tokens, and same next tokens"
    table = Table(title=title, title_justify="left")
    for heading in ("cost", "k", "spread", "rates", "nats a token [95 %]", "same", "safe"):
        table.add_column(heading, justify="left" if heading in ("rates", "safe") else "right")
    for level in found.levels:
        at, same = level.chosen, f"{100 * level.same[0]:.1f} %"
        cells = f"{100 * level.cost:g} %", str(at.k), f"{at.spread:g}", _RATES[at.signal], _interval(level.loss), same
        table.add_row(*cells, "yes" if level.safe else "no")
    console.print(table)
    table = Table(title="controls of the same cost: what they lose more than the choice", title_justify="left")
    for heading in ("cost", "control", "k", "nats a token [95 %]", ""):
        table.add_column(heading, justify="left" if heading in ("control", "") else "right")
    for level in found.levels:
        for name, control in level.controls.items():
            lead = _interval(control.lead)
            table.add_row(f"{100 * level.cost:g} %", name, str(control.k), lead, _verdict(level, name))
    console.print(table)
    _conclude(found, options, out, layers, seconds)


_RATES = {"constant": "one rate", "mass": "by mass", "text": "by text"}


def _interval(found: tuple[float, float, float]) -> str:
    return "{:.4f} [{:.4f}, {:.4f}]".format(*(round(value, 4) + 0.0 for value in found))  # no -0.0000


def _verdict(level: Any, name: str) -> str:
    control = level.controls[name]
    if name == "uniform" and level.chosen.is_uniform and level.chosen.k == control.k:
        return "the choice"
    return ("worse" if control.lead[0] > 0 else "better") if control.told_apart else "not told apart"


def _conclude(found: Any, options: Any, out: str, layers: int, seconds: float) -> None:
    for why in found.left_out:
        common.say("left out", why)
    if found.skipped:
        common.say("skipped", f"{len(found.skipped)}: " + "; ".join(found.skipped[:3]))
    made, level = found.predictor, found.level
    if made is None:
        best = min(found.levels, key=lambda each: each.loss[2])
        common.say(
            "nothing",
            f"is safe at these costs: the best one loses up to {best.loss[2]:.4f} nats a token (at {100 * best.cost:g} %), more than "
            f"{options.most_loss:g}. No predictor was written. Ask for a higher --cost, or say with --most-loss what you can bear.",
        )
    else:
        rates = " ".join(f"{rate:.2f}" for rate in made.rates)
        reads = ", reads mass and the text's hidden state" if made.text_size else ", reads mass" if level.chosen.signal == "mass" else ""
        common.say("chosen", f"{100 * level.cost:g} % of the visual rows, the least that is safe: k={made.k} of {layers} layers, "
                   f"spread {made.spread:g}, rates {rates}{reads}")  # fmt: skip
        common.say("worst", f"{level.worst[0]} loses {level.worst[1]:.4f} nats a token")
    rare = f"what happens on fewer than {300 / found.pictures:.0f} % of pictures may not show on {found.pictures}"
    common.say("but", rare + (f"; give {FEW} to 50" if found.pictures < FEW else ""))
    common.say("took", f"{seconds:.0f} s")
    if made is not None:
        common.say("saved", f"{out} (dyrate_predictor.safetensors, dyrate_predictor.json, {REPORT})")
        common.say("use it", f"dyrate generate --image FILE --predictor {out}")


def _layer(given: argparse.Namespace) -> int:
    """Searches the layer and prints what each would cost."""
    from dyrate_kernels.training.layer_search import search_layer

    given.limit = given.limit or 20
    eta = 0.003 if given.eta is None else given.eta
    source = common.open_source(given, given.limit)
    model, processor = common.load_model(given)
    settings = {"policy": "vtw", "k": f"1 to {model.config.get_text_config().num_hidden_layers - 1}", "retention": "evict"}
    if not given.json:
        print(f"{'with:':<12}vtw, every k from {settings['k']}, retention evict, against the unpruned model", flush=True)
    shows = not given.json and sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if shows:
            print(f"\r{done} of {total} examples", end="" if done < total else "\r", file=sys.stderr, flush=True)

    found = search_layer(model, processor, source, eta=eta, samples=given.limit, progress=progress)
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
