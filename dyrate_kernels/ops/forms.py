"""Questions of the compiled backends about a call's tensors: their forms, layouts that kernels can read, memory for results, the stream.

A form says everything about a tensor but its address and content. What a backend prepares for a launch is kept by the forms of the
tensors, so that a decode step prepares nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

_Prepared = TypeVar("_Prepared")
_MOST_PREPARED = 4096  # forms; a server that sees new shapes all day must not keep all of them


def remember(cache: dict[Hashable, _Prepared], forms: Hashable, prepared: _Prepared) -> _Prepared:
    """Keeps what was prepared for these forms, and returns it; a cache that is full starts anew."""
    if len(cache) >= _MOST_PREPARED:
        cache.clear()
    cache[forms] = prepared
    return prepared


class Prepared:
    """Arguments that a backend has prepared for calls whose tensors all have the same forms: whoever knows that they do keeps one of these
    for them, and the backend does not look at the forms again.

    Attributes:
        launches: the backend's own; None before the first call.
        settings: under which they were prepared.
    """

    __slots__ = ("launches", "settings")

    def __init__(self) -> None:
        self.launches: Any = None
        self.settings: Hashable = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        """One for other tensors: launches are shared by those who prepare them, not copied."""
        return Prepared()


class Step(NamedTuple):
    """Results of an attention with its statistics and its decision: tensors, and None for what the caller did not ask for."""

    output: Any
    mass: Any
    importance: Any
    kept: Any
    n_kept: Any
    rate: Any


def empty_step(
    query: Tensor, value: Tensor, visual_capacity: int, *, output: bool, mass: bool, importance: bool, decide: bool
) -> Step:  # fmt: skip
    """Uninitialised results of ``ops.decode_attention`` and ``ops.decode_step``."""
    device = query.device
    batch, heads, _ = query.shape
    return Step(
        query.new_empty(batch, heads, value.shape[-1]) if output else None,
        torch.empty(batch, heads, 4, dtype=torch.float32, device=device) if mass else None,
        torch.empty(batch, visual_capacity, dtype=torch.float32, device=device) if importance else None,
        torch.empty(batch, visual_capacity, dtype=torch.int32, device=device) if decide else None,
        torch.empty(batch, dtype=torch.int32, device=device) if decide else None,
        torch.empty(batch, dtype=torch.float64, device=device) if decide else None,
    )


def form(tensor: Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first ``count`` strides, in elements; zeros for None."""
    return (0,) * count if tensor is None else tensor.stride()[:count]


@overload
def vector(tensor: Tensor) -> Tensor: ...
@overload
def vector(tensor: None) -> None: ...
@overload
def vector(tensor: Tensor | None) -> Tensor | None: ...
def vector(tensor: Tensor | None) -> Tensor | None:
    """A ``[B]`` tensor that lies in memory as the kernels read it."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


@overload
def last_contiguous(tensor: Tensor) -> Tensor: ...
@overload
def last_contiguous(tensor: None) -> None: ...
@overload
def last_contiguous(tensor: Tensor | None) -> Tensor | None: ...
def last_contiguous(tensor: Tensor | None) -> Tensor | None:
    """The same values with the elements of the last dimension next to each other."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def readable_list(kept: Tensor | None, n_kept: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A kept list of no columns has no address: one of a column of which nothing counts takes its place."""
    if kept is None or n_kept is None or kept.shape[1]:
        return kept, n_kept
    return kept.new_zeros(kept.shape[0], 1), torch.zeros_like(n_kept)


def stream_of(device: torch.device) -> int:
    """The current stream of ``device`` as a number; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if device.index is None else device.index)
