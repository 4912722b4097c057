"""The fixture ``backend``: every backend of this process (``backends.py``), or those that the marker ``backends`` names."""

from __future__ import annotations

import pytest

from tests.gpu import kit
from tests.ops import backends

collect_ignore = backends.of_others()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        values = [pytest.param(name, marks=[pytest.mark.gpu] if name in kit.BACKENDS else []) for name in backends.names()]
        metafunc.parametrize("backend", values, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests whose marker ``backends`` does not name their backend, and in a process of one technique those of no backend."""
    kept, dropped = [], []
    alone = backends.INTERPRETED or backends.VARIANT is not None
    for item in items:
        here = item.path.parent == config.rootpath / "tests" / "ops"
        name = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        marker = item.get_closest_marker("backends")
        wrong = here and (alone if name is None else marker is not None and name not in marker.args)
        (dropped if wrong else kept).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    """A backend under test."""
    return backends.make(request.param)


@pytest.fixture
def chunks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection in chunks of 16 tokens, so that the interpreter can follow."""
    from dyrate_kernels.triton_kernels import backend as triton
    from dyrate_kernels.triton_kernels import plan

    whole = plan.select
    monkeypatch.setattr(triton.plan, "select", lambda tokens, largest=0: whole(tokens, 16))
    monkeypatch.setattr(triton, "_attentions", {})
