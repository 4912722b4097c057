"""Shared by every test: one thread, fixed seeds, models made once, and a mode that trips on a host synchronisation."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import gc
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.host_sync import HostSync

_made: dict[Any, Any] = {}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the test models are tiny: a second thread only waits for the first


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked ``slow`` comes first in the share of each of xdist's workers, so that no worker begins it when the others are done.

    A worker is given one run of neighbours of the list; what it has not begun another may take from its end.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    rest = iter([item for item in items if not item.get_closest_marker("slow")])
    ordered: list[pytest.Item] = []
    for worker in range(workers):
        first, size = slow[worker::workers], (len(items) - len(ordered)) // (workers - worker)
        ordered += [*first, *itertools.islice(rest, max(size - len(first), 0))]
    items[:] = ordered


def pytest_collection_finish(session: pytest.Session) -> None:
    """Freezes what imports and collection made, so that it stays to the end. Else every collection of garbage, of which a benchmark makes
    a dozen, would walk all of torch and transformers again."""
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
