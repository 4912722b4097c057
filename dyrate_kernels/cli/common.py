"""Parts shared by the commands: options, loading a model, preparing an input, tables."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from dyrate_kernels import loading, specs
from dyrate_kernels.files import check_file

DEFAULT_PROMPT = "Describe the picture."


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that name the model."""
    parser.add_argument("--model", metavar="DIR_OR_ID", help="folder or hub id of a LLaVA-type model; default: the bundled one")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float32 on a CPU, else the model's own")
    parser.add_argument(
        "--quantize", choices=tuple(loading.QUANTIZATIONS),
        help="round the language model's weights as they are loaded: int8 (torchao), nf4 (bitsandbytes, 4 bits); default: not",
    )  # fmt: skip


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options that name examples with answers."""
    parser.add_argument(
        "--data", default="shapes", metavar="SOURCE",
        help="shapes (drawn scenes), a LLaVA .json, .jsonl or .ndjson file, a saved dataset's folder, or one on the hub; default: shapes",
    )  # fmt: skip
    add_images(parser)
    parser.add_argument("--split", default="train", help="of a dataset; default: train")
    add_seed(parser)


def add_images(parser: argparse.ArgumentParser) -> None:
    """Where the pictures of ``--data`` are."""
    shown = "folder of the pictures that --data names; default: where it lies"
    parser.add_argument("--images", type=os.path.expanduser, metavar="DIR", help=shown)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Of everything that is drawn at random."""
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of scenes, order, noise and sampling, 0 .. 999999; default: 0")


def add_limit(parser: argparse.ArgumentParser, of: str, *synonyms: str, default: int | None = None) -> None:
    """Adds ``--limit``: how many of what there is are taken.

    Args:
        of: what is counted.
        synonyms: other names of the option.
    """
    shown = "all" if default is None else default
    parser.add_argument(
        "--limit", *synonyms, dest="limit", type=positive, default=default, metavar="N", help=f"the first N {of}; default: {shown}"
    )


def add_policies(parser: argparse.ArgumentParser, default: str, more: str = "") -> None:
    """Several policies."""
    from dyrate_kernels.cli import contenders

    parser.add_argument("--policies", default=default, metavar="A,B,..", help=f"{contenders.HELP}{more}; default: {default}")


def add_retention(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a retention; :func:`retention_from` reads them."""
    parser.add_argument(
        "--retention", type=_retention, default="recoverable", metavar="NAME",
        help=f"{', '.join(specs.RETENTIONS)}, also pool=0.5 or pool=0.5:by=uniform; default: recoverable",
    )  # fmt: skip
    parser.add_argument(
        "--pool", type=float, metavar="FRACTION", help="of --retention pool: the part of each picture that layers >= k hold; default: 0.25"
    )
    parser.add_argument(
        "--pool-by", metavar="RANKING",
        help="of --retention pool: policy, uniform, or the share of the pool, 0 .. 1, that is evenly spaced; default: policy",
    )  # fmt: skip


def _retention(text: str) -> str:
    """An argument that ``specs.retention`` reads."""
    try:
        specs.retention(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def retention_from(given: argparse.Namespace) -> str:
    """The retention that the options ask for, as ``patch`` takes it.

    Raises:
        ValueError: they contradict each other, or hold a wrong value.
    """
    try:
        return str(specs.retention(given.retention, given.pool, None if given.pool_by is None else specs.value(given.pool_by)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--retention, --pool, --pool-by: {error}") from None


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--engine-option``; :func:`engine_options_from` reads it."""
    parser.add_argument(
        "--engine-option", action="append", default=[], metavar="NAME=VALUE",
        help="of engine vllm: an argument of vllm.LLM, e.g. tensor_parallel_size=2 or max_model_len=4096; repeatable",
    )  # fmt: skip


def engine_options_from(given: argparse.Namespace, engine: str) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that the options ask for; ``--batch-size`` is one, where it is given.

    Raises:
        ValueError: they are for another engine, or no NAME=VALUE.
    """
    if engine != "vllm":
        if given.engine_option:
            raise ValueError(f"--engine-option goes with --engine vllm, not with {engine}; leave it out")
        return {}
    found = dict(specs.pair(item, "--engine-option must be") for item in given.engine_option)
    if given.batch_size is not None:
        if "max_num_seqs" in found:
            raise ValueError("--batch-size and --engine-option max_num_seqs are one setting of engine vllm: leave one of them out")
        found["max_num_seqs"] = given.batch_size
    return found


def add_input(parser: argparse.ArgumentParser) -> None:
    """Options that name the model and what it is shown."""
    shown = "a picture in any format that Pillow reads, or several, of which the question is asked at once"
    parser.add_argument("--image", required=True, nargs="+", metavar="FILE", help=shown)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f"default: {DEFAULT_PROMPT!r}")
    add_model(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=160, metavar="N", help="default: 160")
    add_retention(parser)
    parser.add_argument("--backend", choices=("auto", "triton", "cuda", "reference"), default="auto", help="default: auto")
    parser.add_argument(
        "--vision", metavar="NAME[:OPTIONS][+NAME..]",
        help="reducers before the language model, e.g. aim:keep=0.5 or tome+aim; `dyrate info` lists them; default: none",
    )  # fmt: skip
    add_path(parser)
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    add_seed(parser)


def add_path(parser: argparse.ArgumentParser) -> None:
    """Switches of the path that a generation takes; without any the fastest one is chosen."""
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--cuda-graph", action=switch, help="capture a decode step once and replay it; default: where it can be and pays")
    parser.add_argument("--fuse", action=switch, help="fewer launches a decoder layer; default: where the weights are float16 or bfloat16")
    parser.add_argument("--exact", action="store_true", help="the model's own chain of operations in every layer: nothing is fused")


def path_from(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``patch`` that :func:`add_path` asked for."""
    if given.exact and given.fuse:
        raise ValueError("--exact keeps the model's own chain of operations, which --fuse replaces: leave one of them out")
    return {"cuda_graph": given.cuda_graph, "fuse": given.fuse, "exact": given.exact}


def positive(text: str) -> int:
    """An argument that is a number from 1 on."""
    return _integer(text, 1, None)


def seed(text: str) -> int:
    """A seed; what is held out for evaluation has others."""
    return _integer(text, 0, 10**6 - 1)


def _integer(text: str, least: int, most: int | None) -> int:
    wanted = f"at least {least}" if most is None else f"in [{least}, {most}]"
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer {wanted}, got {text!r}") from None
    if value < least or (most is not None and value > most):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {value}")
    return value


def load_model(given: argparse.Namespace) -> tuple[Any, Any]:
    """(model, processor) as asked for."""
    return loading.load_model(given.model, given.device, given.dtype, given.quantize)


def check_plot(option: str, path: str | None) -> None:
    """ValueError now, rather than after the model ran: the file cannot be written, or not in the format that its ending names."""
    if path is None:
        return
    from dyrate_kernels import plots

    check_file(option, path)
    plots.check_ending(option, path)


def check_images(images: str | None, data: str | None, source: str) -> None:
    """``--images`` must be a folder, of pictures that ``--data`` names.

    Raises:
        ValueError: it is not, or there is no such file.
    """
    if images is None:
        return
    if data is None:
        raise ValueError(f"--images belongs to the file of --data, not to {source}; leave it out")
    if not os.path.isdir(images):
        raise ValueError(f"--images {images}: no such folder; give the one with the pictures that {data} names")


def open_source(given: argparse.Namespace, scenes: int) -> Any:
    """The examples that ``--data`` names, the first ``--limit`` of them.

    Args:
        scenes: of shapes, where ``--limit`` does not say.
    """
    from dyrate_kernels.training import data

    drawn = given.data == "shapes"
    named = given.data if data.names_file(given.data) else None
    check_images(given.images, named, "drawn scenes" if drawn else "a dataset")
    source = data.open_source(given.data, given.images, given.limit or scenes, given.seed, given.split)
    return source if drawn or given.limit is None else First(source, given.limit)


class First(Sequence):
    """The first ``count`` of a sequence."""

    def __init__(self, source: Sequence[Any], count: int) -> None:
        self.source, self.length = source, min(count, len(source))

    @property
    def origin(self) -> str:
        """Enough to tell it from another source."""
        from dyrate_kernels.training.data import origin_of

        cut = self.length < len(self.source)
        return f"the first {self.length} of {origin_of(self.source)}" if cut else origin_of(self.source)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.source[index]


def load_images(paths: Sequence[str]) -> list[Any]:
    """Pictures as RGB; errors as of :func:`load_image`."""
    return [load_image(path) for path in paths]


def load_image(path: str) -> Any:
    """A picture as RGB.

    Raises:
        ValueError: the file is missing, empty, or no picture; says which.
    """
    from dyrate_kernels.pictures import UnreadableError, read_picture

    try:
        return read_picture(path)
    except UnreadableError as error:
        raise ValueError(f"--image {path}: {error}") from error


def prepare(processor: Any, images: Sequence[Any], prompt: str, device: Any, dtype: Any = None) -> dict[str, Any]:
    """Model inputs for one question about one picture or several."""
    if not prompt.strip():
        raise ValueError("--prompt is empty; say what to do with the picture")
    from dyrate_kernels import chat

    fields = chat.encode(processor, [chat.render(processor, [chat.user(prompt, images=len(images))])], [list(images)])
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in fields.items()}


def answer(model: Any, processor: Any, inputs: dict[str, Any], given: argparse.Namespace, streamer: Any = None) -> list[int]:
    """Token ids of the answer to one prompt, as the options say."""
    import torch

    from dyrate_kernels import answering

    torch.manual_seed(given.seed)
    options = {} if streamer is None else {"streamer": streamer}
    return answering.generate(model, processor, inputs, given.max_new_tokens, sample=given.sample, **options)[0]


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def say(name: str, text: str, indent: int = 12) -> None:
    """Prints ``name: text``, folded between words, never before a unit, to the width of the screen; further lines are indented."""
    first = f"{name}:".ljust(indent - 1) + " "
    held = re.sub(r"(?<=\d) (?=(?:%|[KMG]iB|[kMGT]?FLOP|m?s)(?!\w))", "\xa0", first + text)
    lines = textwrap.wrap(held, console().width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    print("\n".join(lines).replace("\xa0", " "), flush=True)


def console(wide: bool = False) -> Any:
    """Where tables go; ``wide`` ones are whole in a file or a pipe, unless ``COLUMNS`` says how wide that is."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 200 if wide else 120))
    return Console(width=width, highlight=False)


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table under ``title``; where the screen is too narrow, its columns follow in further tables, each with the first column.

    Args:
        heads: of the columns; the first one holds names, whose cells are folded where they must be.
        rows: cells; a row may be shorter.
    """
    from rich import box
    from rich.table import Table

    screen = console(wide=True)
    widths = [max(len(cell) for cell in (head, *(row[number] for row in rows if number < len(row)))) for number, head in enumerate(heads)]
    first = min(widths[0], max(screen.width // 3, 12))
    parts: list[list[int]] = [[]]
    for number, width in enumerate(widths[1:], 1):
        if parts[-1] and first + sum(widths[each] + 2 for each in parts[-1]) + width + 3 > screen.width:  # 2: between two columns
            parts.append([])
        parts[-1].append(number)
    print("\n".join(textwrap.wrap(title, screen.width)))
    for part in parts:
        table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column(heads[0], overflow="fold", max_width=widths[0] if len(parts) == 1 else first)
        for number in part:
            table.add_column(heads[number], justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row[0], *(row[number] if number < len(row) else "" for number in part))
        screen.print(table)
        print()
