"""What the commands share: options, loading a model, preparing an input, policies by name, tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from dyrate_kernels import loading
from dyrate_kernels.loading import parse_value

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
        help="shapes (drawn scenes), a LLaVA .json / .jsonl file, the folder of a saved dataset, or a dataset on the hub; default: shapes",
    )  # fmt: skip
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures that the .json names; default: where it lies")
    parser.add_argument("--split", default="train", help="of a dataset; default: train")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, order and noise; default: 0")


def add_input(parser: argparse.ArgumentParser) -> None:
    """Options that name the model and what it is shown."""
    parser.add_argument("--image", required=True, metavar="FILE", help="a picture in any format that Pillow reads")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f"default: {DEFAULT_PROMPT!r}")
    add_model(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=160, metavar="N", help="default: 160")
    parser.add_argument("--retention", choices=("recoverable", "evict"), default="recoverable", help="default: recoverable")
    parser.add_argument("--backend", choices=("auto", "triton", "cuda", "reference"), default="auto", help="default: auto")
    parser.add_argument(
        "--vision", metavar="NAME[:OPTIONS][+NAME..]",
        help="reducers before the language model, e.g. aim:keep=0.5 or tome+aim; `dyrate info` lists them; default: none",
    )  # fmt: skip
    parser.add_argument("--cuda-graph", action="store_true", help="capture a decode step once and replay it (on one CUDA device)")
    parser.add_argument("--fuse", action="store_true", help="fewer launches a decoder layer (backend triton; Llama, Mistral, Qwen2)")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")


def positive(text: str) -> int:
    """An argument that is a number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load_model(given: argparse.Namespace) -> tuple[Any, Any]:
    """(model, processor) as asked for."""
    return loading.load_model(given.model, given.device, given.dtype, given.quantize)


def check_output(option: str, path: str | None) -> None:
    """ValueError now, rather than an answer that is lost when its file cannot be written."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {Path(path).parent} does not exist; make it first")


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


def prepare(processor: Any, image: Any, prompt: str, device: Any, dtype: Any = None) -> dict[str, Any]:
    """Model inputs for one picture and one question."""
    if not prompt.strip():
        raise ValueError("--prompt is empty; say what to do with the picture")
    from dyrate_kernels import chat

    fields = chat.encode(processor, [chat.render(processor, [chat.user(prompt, images=1)])], [[image]])
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in fields.items()}


def make_policy(name: str, options: dict[str, Any]) -> Any:
    """A policy by name; options that were not given keep their defaults."""
    from dyrate_kernels import policies

    return policies.get(name, **{key: value for key, value in options.items() if value is not None})


def split_list(text: str, mark: str = ",") -> list[str]:
    """``a,b:kept=[(0, 5), (2, 3)]`` -> two parts: commas (or other marks) inside of brackets do not part."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse_policy(text: str) -> Any:
    """``fastv:k=2:rate=0.75`` -> the policy; one inside of another in brackets: ``recycle:policy=(fastv:k=2):share=1``."""
    name, *options = split_list(text, ":") or [""]
    pairs = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise ValueError(f"--policies: options are NAME=VALUE, got {option!r} in {text!r}")
        nested = key == "policy" and value.startswith("(") and value.endswith(")")
        pairs[key] = parse_policy(value[1:-1]) if nested else parse_value(value)
    return make_policy(name.strip(), pairs)


def parse_vision(text: str | None) -> Any:
    """``tome:keep=0.5+aim`` -> the reducers, in order; none for None."""
    from dyrate_kernels import vision

    return vision.chain(text)


def split_vision(text: str) -> tuple[str, str | None]:
    """``fastv:rate=0.5+tome+aim:keep=0.5`` -> the policy's part, and the reducers' part or None."""
    from dyrate_kernels import vision

    parts = split_list(text, "+")
    names = set(vision.names())
    first = next((place for place, part in enumerate(parts) if place and part.partition(":")[0] in names), len(parts))
    if "=" not in parts[0] and len(parts) > 1 and first > 1:  # else a '+' may be part of an option's value
        raise ValueError(f"--policies: reducer must be one of {', '.join(vision.names())}; got {parts[1]!r} in {text!r}")
    if text.count("+") > len(parts) - 1 + sum(part.count("+") for part in parts):
        raise ValueError(f"--policies: a reducer is missing beside a '+' in {text!r}")
    return "+".join(parts[:first]), "+".join(parts[first:]) or None


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


def console(wide: bool = False) -> Any:
    """Where tables go; ``wide`` ones are not squeezed into a file or a pipe."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else max(int(os.environ.get("COLUMNS", 120)), 200 if wide else 0)
    return Console(width=width, highlight=False)


def bytes_text(count: float) -> str:
    """1536 -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def flops_text(count: float) -> str:
    """2.5e9 -> ``2.50 GFLOP``."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if count < 1000 or unit == "TFLOP":
            return f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
