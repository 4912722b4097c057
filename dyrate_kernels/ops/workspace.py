"""Scratch memory of the kernels: one set an owner, where somebody owns what is launched, else one a device, stream and thread, for good.

Launches of one stream follow each other, so they can share a set; but those of two threads come in any order, and a step is two launches,
the second of which reads what the first left: so each thread has its own. A captured step is replayed on whatever stream, beside whatever
else, and torch hands out 32 side streams round after round, so it has an :class:`Owner`: scratch memory, and the tables that it reads,
which live as long as it does. Buffers only grow, by at least doubling, and a buffer that was outgrown is kept: a captured graph may still
point at it, and all of them together are smaller than the newest one. A buffer cannot be made inside a capture (its zeros would be written
by replays only), and graphs of somebody who captures these operators without an owner share the set of their stream and thread: they must
not be replayed at the same time on two streams.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Hashable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_DTYPES = {"counters": torch.int32, "logits16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """Of the buffer of that name."""
    return _DTYPES.get(name, torch.float32)


def capturing(device: torch.device) -> bool:
    """The current stream of ``device`` is recording a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Workspace:
    """Named flat buffers on one device; their content is undefined between launches, but for ``counters``, which are zero then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}
        self._outgrown: list[Tensor] = []
        _living.add(self)

    def buffers_for(self, sizes: dict[str, int | None]) -> list[Tensor | None]:
        """A buffer of at least that many elements for each name; None for None."""
        found: list[Tensor | None] = []
        for name, size in sizes.items():
            buffer = None if size is None else self._buffers.get(name)
            if size is not None and (buffer is None or buffer.numel() < size):
                buffer = self._make(name, size)
            found.append(buffer)
        return found

    def _make(self, name: str, size: int) -> Tensor:
        if capturing(self.device):
            raise RuntimeError(
                "the kernels' scratch memory cannot be made inside a CUDA graph capture: run the same call once before, on the stream of "
                "the capture (torch.cuda.graph(g, stream=s), where s is the stream of the warm-up)"
            )
        if name in self._buffers:
            self._outgrown.append(self._buffers[name])
            size = max(size, 2 * self._buffers[name].numel())
        with torch.inference_mode(False):
            if name == "counters":
                buffer = torch.zeros(size, dtype=torch.int32, device=self.device)
            else:
                buffer = torch.empty(max(size, 1), dtype=dtype_of(name), device=self.device)
        self._buffers[name] = buffer
        return buffer

    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name (for tests)."""
        return dict(self._buffers)

    def tensors(self) -> list[Tensor]:
        """All of its memory, outgrown buffers included."""
        return [*self._buffers.values(), *self._outgrown]


class Owner:
    """The memory of one captured step: its launches write their intermediate results to it and read their tables from it. Those on a
    second stream have a workspace of their own.

    Its memory is given back with it. Make the step's eager calls and its capture inside of :func:`owned`.
    """

    def __init__(self) -> None:
        self._spaces: dict[tuple[torch.device, bool], Workspace] = {}
        self._tables: dict[Hashable, Tensor] = {}

    def workspace(self, device: torch.device) -> Workspace:
        """Its workspace on a device; within :func:`beside` another one."""
        key = (device, _beside.get())
        if key not in self._spaces:
            self._spaces[key] = Workspace(device)
        return self._spaces[key]

    def release(self) -> None:
        """Lets go of everything. What the current streams were given before may still read it: the allocator waits for that."""
        tensors = [tensor for space in self._spaces.values() for tensor in space.tensors()] + list(self._tables.values())
        for tensor in tensors:
            if tensor.device.type == "cuda":
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self._spaces.clear()
        self._tables.clear()


_living: weakref.WeakSet[Workspace] = weakref.WeakSet()
_workspaces: dict[tuple[torch.device, int, int], Workspace] = {}  # by device, stream and thread
_tables: dict[Hashable, Tensor] = {}  # of captures without an owner, whose end nobody tells
_owner: ContextVar[Owner | None] = ContextVar("dyrate_kernels_scratch_owner", default=None)
_beside: ContextVar[bool] = ContextVar("dyrate_kernels_scratch_beside", default=False)


@contextlib.contextmanager
def owned(owner: Owner) -> Iterator[None]:
    """Inside, this thread's launches use the owner's scratch memory, whatever their stream."""
    before = _owner.set(owner)
    try:
        yield
    finally:
        _owner.reset(before)


@contextlib.contextmanager
def beside() -> Iterator[None]:
    """Inside, this thread's launches use scratch memory of their owner that those outside do not: both may run at the same time."""
    before = _beside.set(True)
    try:
        yield
    finally:
        _beside.reset(before)


def for_stream(device: torch.device, stream: int) -> Workspace:
    """The owner's workspace, or that of a stream in this thread."""
    owner = _owner.get()
    if owner is not None:
        return owner.workspace(device)
    key = (device, stream, threading.get_ident())
    found = _workspaces.get(key)
    if found is None:
        found = _workspaces[key] = Workspace(device)
    return found


def keep(key: Hashable, table: Tensor) -> None:
    """A graph that is being captured points at this tensor: it stays as long as the owner, or for good where there is none."""
    owner = _owner.get()
    (_tables if owner is None else owner._tables)[key] = table


def living() -> list[Workspace]:
    """All workspaces there are (for tests)."""
    return list(_living)
