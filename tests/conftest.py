"""Shared by every test: one thread, fixed seeds, models made once, and a mode that trips on a host synchronisation."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_HERE = Path(__file__).parent
_made: dict[Any, Any] = {}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


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
    """Counts the operators that would wait for a device: reading a value, data-dependent shapes, boolean indexing.

    Attributes:
        found: the operator names, in order.
    """

    _NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item", "aten::is_nonzero", "aten::equal", "aten::unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.where: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        boolean_index = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        # a fill from one Python number is no read
        if boolean_index or name in self._NAMES or name.startswith("aten::_unique"):
            self.found.append(name + (" (boolean index)" if boolean_index else ""))
            self.where.append(_caller())
        return func(*args, **(kwargs or {}))

    def ours(self) -> list[str]:
        """Those called from a file of this package."""
        return [f"{name} at {place}" for name, place in zip(self.found, self.where, strict=True) if place]


def _caller() -> str:
    """The nearest frame above that lies in the package: ``file:line``, or nothing if the innermost non-torch frame is elsewhere's."""
    import sys

    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in path and not path.endswith("conftest.py"):
            return f"{Path(path).name}:{frame.f_lineno}" if "dyrate_kernels" in Path(path).parts else ""
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@pytest.fixture
def no_host_sync() -> Callable[[], contextlib.AbstractContextManager[HostSync]]:
    """``with no_host_sync() as mode:`` fails at the end if this package read a value from a device inside."""

    @contextlib.contextmanager
    def guard() -> Iterator[HostSync]:
        mode = HostSync()
        with mode:
            yield mode
        assert not mode.ours(), f"host synchronisation in a decode step: {mode.ours()}"

    return guard
