"""What the plug-in's entry point does to an engine that asks for something, and to one that does not; vLLM is a stand-in."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dyrate_kernels.engines import vllm as plugin


@pytest.fixture
def configure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``configure(additional_config)`` as of a vLLM that the plug-in was not written for."""

    class EngineArgs:
        def __init__(self, asked: Any) -> None:
            self.asked = asked

        def create_engine_config(self) -> Any:
            return SimpleNamespace(additional_config=self.asked)

    vllm, engine, arguments = (ModuleType(name) for name in ("vllm", "vllm.engine", "vllm.engine.arg_utils"))
    vllm.__version__, arguments.EngineArgs = "0.99.0", EngineArgs  # type: ignore[attr-defined]
    for module in (vllm, engine, arguments):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    plugin.register()
    wrapped = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is wrapped  # once
    return lambda asked: EngineArgs(asked).create_engine_config()


@pytest.mark.parametrize(
    "asked", [None, {}, {"other": 3}, {"dyrate": None}, {"dyrate": {}}, {"dyrate": "none"}, {"dyrate": {"policy": "none"}}]
)
def test_an_engine_that_asks_for_nothing_is_left_alone(configure, asked):
    assert configure(asked).additional_config is asked


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"policy": "fastv"}, ImportError, "expected a version from .*, got 0.99.0"),
        ({"policy": "klguard"}, ValueError, "policy 'klguard' cannot run inside of vLLM"),
        (False, TypeError, "must be an object like .*, got False"),
        ("", ValueError, "policy must be one of .*, got ''"),
    ],
)
def test_what_is_asked_for_is_checked_before_the_engine_starts(configure, asked, error, message):
    with pytest.raises(error, match=message):
        configure({"dyrate": asked})
