"""Comparison of tensors, for the tests of every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)  # of a single element the last stride may be any: a new one is 1


def close(got: Tensor, want: Any, tolerance: float, what: str) -> None:
    """NaN in the same places, everything else within ``tolerance``."""
    want = torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    got = got.double()
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places"
    error = (got - want).nan_to_num(0.0).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance, f"{what}: off by {error}"


def tensors_in(arguments: Any) -> list[Tensor]:
    """Returns every tensor of nested lists, tuples and dictionaries."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, dict):
        return tensors_in(list(arguments.values()))
    return [tensor for part in arguments for tensor in tensors_in(part)] if isinstance(arguments, list | tuple) else []
