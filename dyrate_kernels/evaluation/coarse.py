"""The control that a pruning method must beat: a coarser picture. Its features are averaged before the language model sees them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def downsampled(model: Any, side: int) -> Iterator[None]:
    """While it lasts, a LLaVA's projected picture of M x M tokens is averaged to ``side`` x ``side``. ``thin`` prepares its inputs.

    A tower of fixed size makes as many tokens of a small picture as of a large one, so the average is taken of what it gives [choice].

    Raises:
        TypeError: the model has no ``multi_modal_projector``.
        ValueError: while it runs: the tokens are no square, or fewer than asked for.
    """
    projector = next((module for name, module in model.named_modules() if name.split(".")[-1] == "multi_modal_projector"), None)
    if projector is None:
        raise TypeError(f"{type(model).__name__} has no multi_modal_projector, whose output could be averaged")
    handle = projector.register_forward_hook(_Average(side))
    try:
        yield
    finally:
        handle.remove()


class _Average:
    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        pictures, tokens, width = output.shape
        before = check_square(tokens, self.side)
        grid = output.transpose(1, 2).reshape(pictures, width, before, before)
        return nn.functional.adaptive_avg_pool2d(grid, self.side).flatten(2).transpose(1, 2)


def check_square(tokens: int, side: int) -> int:
    """M of M x M tokens.

    Raises:
        ValueError: there is none, or it is less than ``side``.
    """
    before = math.isqrt(tokens)
    if before * before != tokens or not 1 <= side <= before:
        raise ValueError(f"a picture of {tokens} tokens cannot be averaged to {side} x {side}; it must be a square of at least that side")
    return before


def thin(inputs: Any, image_token: int, tokens: int, side: int) -> Any:
    """Leaves ``side^2`` of each picture's ``tokens`` placeholders in ``input_ids`` ``[B, q]`` and ``attention_mask``; pads on the left.

    Returns:
        the same mapping, changed.
    """
    check_square(tokens, side)
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        index = (ids == image_token).cumsum(0) - 1
        rows.append(ids[((ids != image_token) | (index % tokens < side * side)) & mask.bool()])
    length = max(len(row) for row in rows)
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).to(inputs["attention_mask"])
    filler = inputs["input_ids"].new_zeros(1)
    inputs["input_ids"] = torch.stack([torch.cat([filler.expand(length - len(row)), row]) for row in rows])
    inputs["attention_mask"] = mask
    return inputs
