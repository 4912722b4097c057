"""A tape stands in for the graph, and a step that stays eager without being meant to is an error."""

from __future__ import annotations

import warnings

import pytest

from dyrate_kernels.patching import aside, graph
from tests.fake_graph import TapeRecorder


@pytest.fixture
def tape(monkeypatch, request):
    """Captures on the CPU; with ``LINES`` or ``ASIDE`` of the kit also with decisions that run aside."""
    where = getattr(request, "param", "in line")
    recorder = TapeRecorder(late=where == "aside, late")
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    monkeypatch.setattr(graph, "CAPTURE_FROM", 1)
    aside.override(where != "in line")
    yield recorder
    aside.override(None)


@pytest.fixture
def told():
    """For ``TOLD``."""


@pytest.fixture(autouse=True)
def no_warning(request):
    """A step that could not be captured says so in a warning: only tests marked ``TOLD`` may see one."""
    with warnings.catch_warnings():
        if "told" not in request.fixturenames:
            warnings.filterwarnings("error", message="cuda_graph=True has no effect")
        yield
