"""Tests that need vLLM: skipped where it is not installed. ``run.sh`` makes an environment that has it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.vllm import models

HERE = Path(__file__).parent
_MISSING = "vLLM is not installed here: tests/engines/vllm/run.sh installs it and runs these"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    installed = importlib.util.find_spec("vllm") is not None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1800))
            if not installed:
                item.add_marker(pytest.mark.skip(reason=_MISSING))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder(name)``: of one of ``models.FAMILIES``, made once a session."""
    place = tmp_path_factory.mktemp("models")
    return lambda name: models.make(name, place)
