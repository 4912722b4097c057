"""The one trip wire for what would wait for a device: reading a value, data-dependent shapes, boolean indexing, leaving torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "repeat_interleave.Tensor")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_METHODS = ("tolist", "numpy", "cpu")  # on a CPU they dispatch no operator


def waiting(func: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> str | None:
    """Returns the name of an operator that would wait for the device with these arguments; None where it would not."""
    name = func.name().split("::")[-1]
    plain = name.split(".")[0]
    if name in _OPERATORS or plain in _OPERATORS or plain.startswith(("_unique", "unique")):
        return name
    if plain in _INDEXING:
        indices = args[1] if len(args) > 1 else (kwargs or {})["indices"]
        if any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices):
            return f"{name} with a boolean"
    return None


class HostSync(TorchDispatchMode):
    """Counts what would wait for a device.

    Attributes:
        found: names, in order.
        where: for each, ``file:line`` if a file of this package asked for it, else an empty string.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.where: list[str] = []
        self._saved: dict[str, Any] = {}

    def __enter__(self) -> HostSync:
        for name in _METHODS:
            self._saved[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counting(name, self._saved[name]))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name in _METHODS:
            setattr(torch.Tensor, name, self._saved.pop(name))

    def _counting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._note(f"Tensor.{name}")
            return method(tensor, *args, **kwargs)

        return counted

    def _note(self, name: str) -> None:
        self.found.append(name)
        self.where.append(_caller())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = waiting(func, args, kwargs)
        if name is not None:
            self._note(name)
        return func(*args, **(kwargs or {}))

    def ours(self) -> list[str]:
        """Those that a file of this package asked for."""
        return [f"{name} at {place}" for name, place in zip(self.found, self.where, strict=True) if place]


def _caller() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path.name != "host_sync.py":
            return f"{path.name}:{frame.f_lineno}" if "dyrate_kernels" in path.parts else ""
        frame = frame.f_back
    return ""
