"""Tiny random vision-language models and inputs for them: no download, no tokenizer, no processor.

The weights are drawn so that a random model behaves like a trained one where it matters to a test: attention is far from uniform (logits of
standard deviation about 2) and the highest output logit stands clear of the second, so rounding changes neither a ranking nor a token.
"""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if str(Path(__file__).parents[1]) not in sys.path:
    sys.path.append(str(Path(__file__).parents[1]))  # for scripts that take this file by its own folder

from tests.builders import (
    BESIDE,
    BUILDERS,
    EOS_TOKEN,
    FIRST_WORD,
    FRAMES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGE_TOKEN,
    KV_HEADS,
    LAYERS,
    PAD_TOKEN,
    VIDEO_TOKEN,
    VOCAB,
    Builder,
    Noise,
    text_config,
)

__all__ = [
    "BESIDE", "BUILDERS", "EOS_TOKEN", "FIRST_WORD", "FRAMES", "HEADS", "HEAD_DIM", "HIDDEN", "IMAGE_TOKEN", "KV_HEADS", "LAYERS",
    "MORE_VARIANTS", "PAD_TOKEN", "VARIANTS", "VIDEO_TOKEN", "VOCAB", "build", "build_text", "config", "decoder_layers", "draw", "inputs",
    "poisoned", "text_config",
]  # fmt: skip
# every architecture named in the README's table: (family, text model)
VARIANTS = tuple((name, text) for name, builder in BUILDERS.items() if builder.llava for text in builder.texts)
# families whose config and inputs differ more
MORE_VARIANTS = tuple((name, text) for name, builder in BUILDERS.items() if not builder.llava for text in builder.texts)

Row = Sequence[str]


def config(family: str, text: str = "llama", **overrides: Any) -> Any:
    """The tiny config of a family. ``overrides`` go to the text config."""
    return BUILDERS[family].config(text, **overrides)


def build(family: str, text: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny random model in eval mode on the CPU, the same for the same arguments.

    Args:
        family: one of ``BUILDERS``.
        text: one of its ``texts``, or another that it is supported with.
        seed: of the weights.
        dtype: of the weights; they are drawn in float32 and then rounded.
        overrides: fields of the text config.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        model = getattr(transformers, f"{BUILDERS[family].classes}ForConditionalGeneration")(config(family, text, **overrides))
        draw(model, torch.Generator().manual_seed(zlib.crc32(f"{family}/{text}/{seed}".encode())))
    model = model.eval().to(dtype)
    _settle(model)
    return model


def build_text(seed: int = 0, **overrides: Any) -> Any:
    """A text-only model with the same vocabulary."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        model = LlamaForCausalLM(text_config("llama", **overrides))
        draw(model, torch.Generator().manual_seed(77 + seed))
    model = model.eval()
    _settle(model)
    return model


def _settle(model: Any) -> None:
    settings = model.generation_config
    settings.pad_token_id = PAD_TOKEN
    settings.eos_token_id = None  # lengths are the test's choice
    settings.suppress_tokens = [IMAGE_TOKEN, VIDEO_TOKEN]


@torch.no_grad()
def draw(model: nn.Module, generator: torch.Generator) -> None:
    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    for name, parameter in model.named_parameters():
        text = not any(tower in name for tower in ("vision_tower", "image_tower", "video_tower", "vision_model", ".visual."))
        fan_in = parameter.shape[-1]
        if name.endswith("image_newline"):
            normal(parameter, 1.0)
        elif "embed_tokens" in name:
            normal(parameter, 1.0)
        elif "norm" in name and name.endswith("weight"):
            zero_centred = text and getattr(BUILDERS.get(model.config.model_type), "zero_centred", False)
            parameter.fill_(0.0 if zero_centred else 1.0)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(0.4 if zero_centred else 1.4)
        elif parameter.ndim == 1:
            normal(parameter, 0.1)
        elif name.endswith("lm_head.weight"):
            normal(parameter, 4.0 / fan_in**0.5)
        elif "q_proj" in name or "k_proj" in name:
            normal(parameter, (1.4 if text else 1.0) / fan_in**0.5)
        elif "multi_modal_projector" in name:
            normal(parameter, 1.6 / fan_in**0.5)
        elif parameter.ndim == 2 and "embedding" not in name:
            normal(parameter, 1.0 / fan_in**0.5)
        elif "patch_embedding" in name:
            normal(parameter, 1.0 / parameter[0].numel() ** 0.5)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The text model's decoder layers."""
    return model.get_decoder().layers


def _noise(generator: torch.Generator) -> Noise:
    """Smooth blobs rather than white noise: neighbouring patches differ, but not all in the same way."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.8 + torch.randn((*shape[:-2], 1, 1), generator=generator)

    return noise


@torch.no_grad()
def _count(builder: Builder, model: Any, kind: str, pixels: dict[str, Tensor], alone: bool) -> int:
    parameter = next(model.parameters())
    fields = {name: value.to(parameter.device) for name, value in pixels.items()}
    fields = {name: value.to(parameter.dtype) if value.is_floating_point() else value for name, value in fields.items()}
    return builder.count(model, kind, fields, alone)


def inputs(model: Any, rows: Sequence[Row], *, seed: int = 0, pad_to: int | None = None) -> dict[str, Tensor]:
    """Inputs of ``model.generate``, left padded.

    What a row holds depends only on the row itself and the seed: ``inputs(model, [row])`` has the same tokens and pictures as that row
    in a batch.

    Args:
        model: made by :func:`build`.
        rows: each a list such as ``["text 3", "image", "text 5"]``; items are ``text N``, ``image``, ``video``.
        seed: of the content.
        pad_to: the padded length; the longest row's if None.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``[B, S]``, and ``pixel_values``, ``image_sizes``, ``batch_num_images``,
        ``pixel_values_videos`` as the family and the rows need them.
    """
    builder = BUILDERS[model.config.model_type]
    ids: list[list[int]] = []
    pictures: dict[str, list[Tensor]] = {}
    images_per_row: list[int] = []
    for row in rows:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}|{'|'.join(row)}".encode()))
        alone = sum(item == "image" for item in row) < 2
        tokens: list[int] = []
        for item in row:
            if item.startswith("text"):
                count = int(item.split()[1])
                tokens += torch.randint(FIRST_WORD, IMAGE_TOKEN, (count,), generator=generator).tolist()
                continue
            pixels = builder.pixels(item, _noise(generator), generator, alone)
            token = VIDEO_TOKEN if item == "video" else IMAGE_TOKEN
            tokens += builder.placeholders(item, token, _count(builder, model, item, pixels, alone))
            for name, value in pixels.items():
                pictures.setdefault(name, []).append(value)
        ids.append(tokens)
        images_per_row.append(sum(item == "image" for item in row))
    length = max(pad_to or 0, *(len(tokens) for tokens in ids))
    dtype = next(model.parameters()).dtype
    fields = {
        "input_ids": torch.tensor([[PAD_TOKEN] * (length - len(tokens)) + tokens for tokens in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in ids]),
    }
    if builder.row_holds_pictures and pictures:
        each = iter(pictures["pixel_values"])
        most = max(images_per_row)
        rows_of = [[next(each) for _ in range(count)] for count in images_per_row]
        empty = torch.zeros_like(pictures["pixel_values"][0])
        pictures["pixel_values"] = [torch.cat([*row, *[empty] * (most - len(row))], dim=1) for row in rows_of]
    for name, values in pictures.items():
        joined = torch.cat(values)
        fields[name] = joined.to(dtype) if joined.is_floating_point() else joined
    builder.finish(fields, images_per_row)
    return fields


@contextlib.contextmanager
def poisoned(parameter: Tensor, value: float = float("nan")) -> Iterator[None]:
    """Fills a parameter with ``value`` for a while."""
    saved = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(saved)
