"""Shared by every test: one thread, fixed seeds, models made once, and a mode that trips on a host synchronisation."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import gc
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_made: dict[Any, Any] = {}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the test models are tiny: a second thread only waits for the first


def pytest_collection_finish(session: pytest.Session) -> None:
    """What imports and collection made stays to the end. Else every collection of garbage, of which a benchmark makes a dozen, would walk
    all of torch and transformers again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # or extension modules report what the interpreter's end does not free


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """``make_model(family, text, **options)``: as ``models.build``, but each model is made once. Leave it as you found it."""
    from tests import models

    def make(family: str = "llava", text: str = "llama", **options: Any) -> Any:
        key = (family, text, *sorted(options.items(), key=lambda item: item[0]))
        key = tuple(map(str, key))
        if key not in _made:
            _made[key] = models.build(family, text, **options)
        return _made[key]

    return make


class HostSync(TorchDispatchMode):
    """Counts what would wait for a device: reading a value, data-dependent shapes, boolean indexing, leaving torch.

    Attributes:
        found: names, in order.
        where: for each, ``file:line`` if a file of this package asked for it, else an empty string.
    """

    _OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "repeat_interleave.Tensor")
    _METHODS = ("tolist", "numpy", "cpu")  # on a CPU they dispatch no operator

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.where: list[str] = []
        self._saved: dict[str, Any] = {}

    def __enter__(self) -> HostSync:
        for name in self._METHODS:
            self._saved[name] = getattr(torch.Tensor, name)
            setattr(torch.Tensor, name, self._counting(name, self._saved[name]))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for name in self._METHODS:
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
        name = func.name().removeprefix("aten::")
        plain = name.split(".")[0]
        boolean_index = plain in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if boolean_index or name in self._OPERATORS or plain in self._OPERATORS or plain.startswith(("_unique", "unique")):
            self._note(name + (" with a boolean" if boolean_index else ""))
        return func(*args, **(kwargs or {}))

    def ours(self) -> list[str]:
        """Those that a file of this package asked for."""
        return [f"{name} at {place}" for name, place in zip(self.found, self.where, strict=True) if place]


def _caller() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path.name != "conftest.py":
            return f"{path.name}:{frame.f_lineno}" if "dyrate_kernels" in path.parts else ""
        frame = frame.f_back
    return ""


@pytest.fixture
def host_sync() -> type[HostSync]:
    """The class :class:`HostSync`: ``with host_sync() as mode: ...; assert not mode.found``."""
    return HostSync


@pytest.fixture
def no_host_sync() -> Callable[[], contextlib.AbstractContextManager[HostSync]]:
    """``with no_host_sync():`` fails at the end if anything inside would have waited for a device."""

    @contextlib.contextmanager
    def guard() -> Iterator[HostSync]:
        with HostSync() as mode:
            yield mode
        assert not mode.found, f"host synchronisation: {list(zip(mode.found, mode.where, strict=True))}"

    return guard
