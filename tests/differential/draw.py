"""Random numbers, shapes and layouts of one call. Every tensor lies somewhere in a memory of NaN that is looked at after the call."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-7, 6e4, -6e4, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]


def bits(tensor: Tensor) -> Tensor:
    """Its bytes, contiguous."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).flatten().view(torch.uint8)


class Placed:
    """A tensor with strides of its own in a larger memory of ``0xFF`` bytes (NaN, -1).

    Attributes:
        tensor: the view that a call is given.
    """

    def __init__(self, content: Tensor, strides: Sequence[int], offset: int) -> None:
        item = content.element_size()
        span = 1 + sum((size - 1) * stride for size, stride in zip(content.shape, strides, strict=True) if size)
        edge = 64
        self.memory = torch.full((edge + (offset + max(span, 1)) * item + edge,), 0xFF, dtype=torch.uint8)
        first = edge // item + offset
        self.tensor = torch.empty(0, dtype=content.dtype).set_(self.memory.untyped_storage(), first, content.shape, tuple(strides))
        if content.numel():
            self.tensor[_once(strides, content.shape)] = content[_once(strides, content.shape)]
        self.before = self.memory.clone()

    def check(self, want: Tensor | None = None) -> None:
        """Nothing changed, but for the tensor's content, which is ``want`` now where that is given; bit for bit."""
        now = self.memory.clone()
        if want is not None:
            assert torch.equal(bits(self.tensor), bits(want)), "an argument's new content is not the reference's"
            old = torch.empty(0, dtype=self.tensor.dtype).set_(
                self.before.untyped_storage(), self.tensor.storage_offset(), self.tensor.shape, self.tensor.stride()
            )
            old.copy_(want)
        assert torch.equal(now, self.before), "memory was changed that nobody may change"


def _once(strides: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Every element of the memory once: dimensions that are expanded are written at their first place."""
    return tuple(slice(0, 1) if stride == 0 and size > 1 else slice(None) for stride, size in zip(strides, shape, strict=True))


class Draw:
    """The random decisions of call ``number`` of a seed.

    Attributes:
        floats: dtypes that the backend under test computes with.
        short_logits: the backend's settings keep logits in float16.
    """

    def __init__(self, seed: int, number: int, floats: Sequence[torch.dtype]) -> None:
        self.pick = random.Random(f"{seed} {number}")
        self.generator = torch.Generator().manual_seed(self.pick.getrandbits(60))
        self.floats = list(floats)
        self.placed: list[Placed] = []
        self.told: list[str] = []
        self.short_logits = False
        self.tidy = self.chance(0.3)  # everything lies densely at aligned addresses, where kernels copy 16 bytes at once

    # ---- decisions

    def chance(self, probability: float) -> bool:
        return self.pick.random() < probability

    def one(self, *choices: Any) -> Any:
        return self.pick.choice(choices)

    def size(self, most: int) -> int:
        """0 .. most; the ends and small numbers often."""
        return min(self.pick.choice([0, 1, 2, 3, most, max(most - 1, 0), self.pick.randint(0, most), self.pick.randint(0, most)]), most)

    def dtype(self) -> torch.dtype:
        return torch.float64 if self.chance(0.03) else self.pick.choice(self.floats)

    def tell(self, what: str) -> None:
        """A word for the line of a miss."""
        self.told.append(what)

    # ---- content, always float64 or an integer type first

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """``low <= x < high``."""
        return torch.randint(low, high, shape, generator=self.generator)

    def scores(self, *shape: int) -> Tensor:
        """Returns scores to rank: ordinary numbers, ties, numbers that share their highest bits, numbers that are none."""
        kind = self.one("normal", "softmax", "ties", "constant", "special", "close", "mixed")
        self.tell(kind)
        if kind == "softmax":
            return torch.softmax(4 * self.normal(*shape), -1)
        if kind == "ties":
            return self.integers(-3, 4, *shape).double()
        if kind == "constant":
            return torch.full(shape, self.pick.choice(SPECIAL), dtype=torch.float64)
        if kind == "special":
            return torch.tensor(SPECIAL, dtype=torch.float64)[self.integers(0, len(SPECIAL), *shape)]
        if kind == "close":
            return 1 + self.integers(0, 7, *shape).double() * 2.0 ** -self.pick.choice([52, 45, 30, 23, 22, 11, 10, 3])
        if kind == "mixed":
            special = torch.tensor(SPECIAL, dtype=torch.float64)[self.integers(0, len(SPECIAL), *shape)]
            return torch.where(self.uniform(*shape) < 0.2, special, self.normal(*shape))
        return self.normal(*shape)

    def lengths(self, batch: int, most: int) -> Tensor:
        return torch.tensor([self.size(most) for _ in range(batch)], dtype=torch.int32)

    # ---- layout

    def place(self, content: Tensor, *, adjacent: bool = False, expand: Sequence[int] = (), plain: float = 0.3) -> Tensor:
        """``content`` somewhere in memory: dimensions in any order, gaps between them, an odd address.

        adjacent: the elements of the last dimension lie next to each other. expand: dimensions that may be expanded from one place.
        """
        shape = content.shape
        order = list(range(content.dim()))
        usual = self.tidy or self.chance(plain)
        if not usual and self.chance(0.5):
            self.pick.shuffle(order)
        if adjacent and order:
            order.remove(content.dim() - 1)
            order.append(content.dim() - 1)
        strides = [0] * content.dim()
        step = 1 if usual or adjacent or self.chance(0.7) else self.pick.choice([2, 3])
        for dim in reversed(order):
            strides[dim] = step
            step *= max(shape[dim], 1)
            if not usual and self.chance(0.4):
                step += self.pick.choice([1, 2, 3, 8, 16]) * (1 if dim == order[-1] else strides[order[-1]])
        for dim in expand:
            if shape[dim] > 1 and self.chance(0.15):
                content = content.narrow(dim, 0, 1).expand(shape)
                strides[dim] = 0
        offset = 0 if usual or self.chance(0.4) else self.pick.choice([1, 2, 3, 4, 5, 8])
        made = Placed(content, strides, offset)
        self.placed.append(made)
        return made.tensor
