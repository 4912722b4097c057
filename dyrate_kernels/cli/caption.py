"""``dyrate caption``: captions of a folder of pictures or of Parquet files, on one machine or a Ray cluster; a killed run goes on."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from dyrate_kernels.cli import common, contenders
from dyrate_kernels.cli.generate import add_policy, policy_from
from dyrate_kernels.files import check_folder, printable
from dyrate_kernels.pictures import MAX_PIXELS

_RECENT = 60  # seconds that the newest speed is of
_EVERY = 15  # seconds between two lines of progress where they cannot overwrite each other


def add_parser(commands: Any) -> None:
    """Registers the command."""
    parser = commands.add_parser("caption", help="captions of many pictures, resumable, on one machine or many", description=__doc__)
    common.add_common(parser)
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR_OR_PARQUET",
        help="a folder of pictures (and those below it), a Parquet file, or a folder of those",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="captions are written there as they come; a rerun goes on with them")
    parser.add_argument("--prompt", default=common.DEFAULT_PROMPT, help=f"default: {common.DEFAULT_PROMPT!r}")
    common.add_model(parser)
    parser.add_argument("--max-new-tokens", type=common.positive, default=160, metavar="N", help="default: 160")
    common.add_retention(parser)
    parser.add_argument("--backend", choices=("auto", "triton", "cuda", "reference"), default="auto", help="default: auto")
    parser.add_argument("--vision", metavar="NAME[:OPTIONS][+NAME..]", help="reducers before the language model; default: none")
    add_policy(parser)
    shown = "pictures generated together, at most; default: 8, of engine vllm as vLLM has it"
    parser.add_argument("--batch-size", type=common.positive, metavar="N", help=shown)
    shown = "default: ray where it is installed, else local (one worker in this process); vllm: an engine of vLLM"
    parser.add_argument("--engine", choices=("ray", "local", "vllm"), help=shown)
    common.add_engine_options(parser)
    shown = "of engine ray, and of vllm with --address; default: one a GPU, or one"
    parser.add_argument("--workers", type=common.positive, metavar="N", help=shown)
    shown = "of a running Ray cluster, e.g. auto or ray://HOST:10001; default: Ray is started here, engine vllm without it"
    parser.add_argument("--address", help=shown)
    parser.add_argument(
        "--image-column",
        metavar="NAME",
        help="of Parquet files; default: image, or the first like it; of a list of pictures the first is captioned",
    )
    parser.add_argument("--id-column", metavar="NAME", help="of Parquet files: names the rows; default: file and row number")
    parser.add_argument(
        "--max-pixels", type=common.positive, default=MAX_PIXELS, metavar="N", help=f"larger pictures are failures; default: {MAX_PIXELS}"
    )
    parser.add_argument(
        "--early-leave",
        action=argparse.BooleanOptionalAction,
        help="captions that have ended leave their batch while the others go on; none changes; default: on a CPU (on a GPU not timed yet)",
    )
    parser.add_argument(
        "--compare-dense",
        type=common.positive,
        nargs="?",
        const=32,
        default=0,
        metavar="N",
        help="at the end the first N captioned pictures (default: 32) are captioned again in this process, in turns with the unpruned "
        "model, and the speeds are told; off without it, as it takes the time of three such runs",
    )
    parser.add_argument("--limit", type=common.positive, metavar="N", help="only the first N pictures")
    parser.add_argument("--retry-failed", action="store_true", help="ask again for pictures that failed in an earlier run")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Captions the pictures and prints what was written."""
    from dataclasses import replace

    from dyrate_kernels import answering_vllm, vision
    from dyrate_kernels.captioning import inputs, on_ray, vllm
    from dyrate_kernels.captioning import run as runs
    from dyrate_kernels.captioning.captioner import Task

    if not given.prompt.strip():
        raise ValueError("--prompt is empty; say what to do with the pictures")
    engine = given.engine or ("ray" if on_ray.has_ray() else "local")
    check_engine(given, engine)
    more = common.engine_options_from(given, engine)
    out = Path(given.out)
    sources = inputs.find(given.images, given.image_column, given.id_column)
    if given.limit:
        sources = replace(sources, sources=sources.sources[: given.limit])
    model = (
        given.model if given.model is None or not Path(given.model).expanduser().is_dir() else str(Path(given.model).expanduser().resolve())
    )
    task = Task(
        model, given.device, given.dtype, given.quantize, policy_from(given), common.retention_from(given), given.backend,
        vision.chain(given.vision), given.prompt, given.max_new_tokens, given.batch_size or 8,
        str(Path(given.images).expanduser().resolve()), sources.column,
        given.id_column if sources.column else None, given.max_pixels, given.early_leave,
    )  # fmt: skip
    if engine == "vllm":
        vllm.check(task)
        if not given.address:
            answering_vllm.require()
    check_folder("--out", given.out, inputs.OUTPUTS)
    say = _Say(quiet=given.json)
    say.line(f"{len(sources.sources)} pictures, engine {engine}")
    settings = contenders.settings_by_name(model, task.policy, task.retention, task.backend, task.device, task.vision)
    say.line(f"with {contenders.words(settings)}")
    found = runs.run(
        task,
        sources,
        out,
        engine=engine,
        workers=given.workers,
        address=given.address,
        engine_options=more,
        retry_failed=given.retry_failed,
        progress=say.progress,
        compare_dense=given.compare_dense,
    )
    say.end()
    if given.json:
        common.print_json(found | {"settings": settings})
    else:
        _print(found, out)
    if not found["captioned"]:
        raise RuntimeError(f"none of the {found['pictures']} pictures has a caption; the first: {found['first_failure']}")
    return 0


def check_engine(given: argparse.Namespace, engine: str) -> None:
    """ValueError for an option that the engine has not."""
    from dyrate_kernels.captioning import on_ray

    if engine == "local" and (given.workers or given.address):
        raise ValueError(
            "--workers and --address go with --engine ray" + ("" if on_ray.has_ray() else ": pip install 'dyrate-kernels[caption]'")
        )
    if engine == "vllm" and given.workers and not given.address:
        raise ValueError("--workers goes with --engine ray, or with --engine vllm on a cluster (--address); leave it out")
    if engine == "vllm" and given.compare_dense:
        raise ValueError("--compare-dense measures models in this process, not --engine vllm; leave it out, or use --engine local")
    if given.address and given.compare_dense:
        raise ValueError("--compare-dense measures in this process, not on the cluster of --address; run it without --address")


def _print(found: dict[str, Any], out: Path) -> None:
    from dyrate_kernels.captioning import run as runs

    print(f"{'captioned:':<12}{found['captioned']} of {found['pictures']} pictures ({found['new']} in this run, {found['seconds']:.1f} s)")
    if found["failed"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found["failures"].items())
        print(f"{'failed:':<12}{found['failed']} ({kinds}); --retry-failed asks for them again")
    if found["other_files"]:
        print(f"{'left out:':<12}{found['other_files']} files that are no pictures by their names")
    if found["closed_folders"]:
        print(f"{'not listed:':<12}{len(found['closed_folders'])} folders, the first is {found['closed_folders'][0]}")
    if found["visual_rows_read"] is not None:
        print(f"{'read:':<12}{100 * found['visual_rows_read']:.1f} % of the visual rows, mean over steps and layers")
    if found["pictures_per_second"] is not None:
        print(f"{'speed:':<12}{found['pictures_per_second']:.2f} pictures/s, from the start to the last caption")
    if "dense" in found:
        _print_dense(found["dense"])
    written = [name for name in (runs.LINES, runs.TABLE, runs.REPORT) if (out / name).exists()]
    print(f"{'written:':<12}{printable(str(out))}: {', '.join(written)}")


def _print_dense(dense: dict[str, Any]) -> None:
    rows, to = dense["rows"], dense["speed_to_unpruned"]
    where = "a CPU" if dense["device"] == "cpu" else dense["environment"]["gpu"]
    print(
        f"{'dense:':<12}the first {dense['pictures']} captioned pictures again, in turns, {dense['rounds']} rounds after a warm-up; "
        f"batches of {dense['batch_size']}, {dense['dtype']}, {where}"
    )
    for name, row in rows.items():
        ratio = "" if to.get(name) is None else f"; this run's speed is {to[name]:.2f} times that"
        print(f"{'':<12}{name:<18}{row['pictures_per_second']:.2f} pictures/s, {row['generated_tokens']} tokens{ratio}")


class _Say:
    """Progress for a person: one line that is overwritten, or a line now and then where that cannot be."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.tty, self.last = quiet, sys.stderr.isatty(), time.monotonic()
        self.seen: deque[tuple[float, int]] = deque([(0.0, 0)])  # (seconds, pictures of this run): now and a minute back

    def line(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def progress(self, at: Any) -> None:
        if self.quiet:
            return
        self.seen.append((at.seconds, at.new))
        while len(self.seen) > 2 and self.seen[1][0] <= at.seconds - _RECENT:
            self.seen.popleft()
        (since, before), speed = self.seen[0], at.new / max(at.seconds, 1e-9)
        recent = (at.new - before) / max(at.seconds - since, 1e-9)
        text = f"{at.done} of {at.total} ({at.failed} failed), {speed:.1f} pictures/s, {recent:.1f} in the last minute"
        if recent:
            left = (at.total - at.done) / recent
            text += f", {left:.0f} s left" if left < 120 else f", {left / 60:.0f} min left"
        if self.tty:
            print(f"\r{text:<100}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last >= _EVERY:
            self.last = time.monotonic()
            self.line(text)

    def end(self) -> None:
        if self.tty and not self.quiet:
            print(file=sys.stderr)
