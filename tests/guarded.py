"""Memory that nobody may write beyond: tensors, and what a backend allocates, between bytes that are looked at afterwards."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dyrate_kernels.ops import workspace

_EDGE = 64  # bytes before and behind; keeps what torch aligns aligned
_FILL = 0xA5


class Guarded:
    """A tensor of NaN, or of a number that is none of any list (-1 is the end of one), with bytes before and behind it that nobody may
    change."""

    def __init__(self, size: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> None:
        item = torch.empty((), dtype=dtype).element_size()
        first = _EDGE + shift * item
        past = first + math.prod(size) * item
        self.memory = torch.full((past + _EDGE,), 0xFF if dtype.is_floating_point else 0x5A, dtype=torch.uint8)
        self.before, self.behind = self.memory[:first].fill_(_FILL), self.memory[past:].fill_(_FILL)
        strides = tuple(math.prod(size[place + 1 :]) for place in range(len(size)))
        self.tensor = torch.empty(0, dtype=dtype).set_(self.memory.untyped_storage(), first // item, size, strides)

    def check(self) -> None:
        assert (self.before == _FILL).all(), "bytes before a tensor were written"
        assert (self.behind == _FILL).all(), "bytes behind a tensor were written"


def guarded(tensor: Tensor, shift: int = 0) -> tuple[Tensor, Guarded]:
    """A contiguous copy in guarded memory, ``shift`` elements past a multiple of 64 bytes."""
    made = Guarded(tuple(tensor.shape), tensor.dtype, shift)
    made.tensor.copy_(tensor)
    return made.tensor, made


class GuardedAllocations(TorchDispatchMode):
    """Every uninitialised tensor made inside is a :class:`Guarded` one."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Guarded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format:
            size, dtype = args[0], kwargs.get("dtype")
        elif func is torch.ops.aten.new_empty.default:
            size, dtype = args[1], kwargs.get("dtype") or args[0].dtype
        elif func is torch.ops.aten.empty_like.default:
            size, dtype = args[0].shape, kwargs.get("dtype") or args[0].dtype
        else:
            return func(*args, **kwargs)
        self.made.append(Guarded(tuple(size), dtype or torch.get_default_dtype()))
        return self.made[-1].tensor

    def check(self) -> None:
        for guarded in self.made:
            guarded.check()


_active: list[GuardedAllocations] = []


def watch(backend: Any, names: Iterable[str]) -> None:
    """Guards what these functions of a backend, as far as it has them, allocate inside of :func:`allocations`: an operator's
    implementation runs outside of the caller's dispatch modes."""
    for name in names:
        if hasattr(backend, name):
            setattr(backend, name, _watched(getattr(backend, name)))


def _watched(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _active:
            return function(*args, **kwargs)
        with _active[-1]:
            return function(*args, **kwargs)

    return call


def scratch() -> list[tuple[str, Tensor]]:
    """The kernels' scratch buffers, with their names."""
    return [item for space in workspace.living() for item in space.buffers().items()]


@contextlib.contextmanager
def allocations() -> Iterator[None]:
    """Guards what a watched backend allocates inside and poisons its scratch memory; counters must be back at zero at the end."""
    for name, buffer in scratch():
        if name != "counters":
            buffer.fill_(float("nan"))
    mode = GuardedAllocations()
    _active.append(mode)
    try:
        yield
    finally:
        _active.pop()
    mode.check()
    for name, buffer in scratch():
        if name == "counters":
            assert not buffer.any(), "a counter was left above zero"
