"""transformers' own tests of the supported families, on patched models (tests/upstream/README.md).

Runs where ``DYRATE_TRANSFORMERS_TESTS`` names a checkout of transformers of the installed version.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.upstream import run_transformers_tests as runner

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not os.environ.get(runner.ENVIRONMENT),
        reason=f"set {runner.ENVIRONMENT} to a checkout of transformers with its tests (they are not in the wheel)",
    ),
]
PATCHED = [name for name in runner.VARIANTS if name != runner.BASELINE]


@pytest.fixture(scope="module")
def repo() -> Path:
    return Path(os.environ[runner.ENVIRONMENT]).resolve()


@pytest.fixture(scope="module")
def unpatched(repo):
    outcomes = runner.run_variant(repo, runner.BASELINE, list(runner.FAMILIES))
    assert sum(entry["outcome"] == "passed" for entry in outcomes.values()) > 100, "the checkout's tests do not run on this machine"
    return outcomes


@pytest.mark.parametrize("variant", PATCHED)
def test_transformers_own_tests(repo, unpatched, variant):
    patched = runner.run_variant(repo, variant, list(runner.FAMILIES))
    lost = [
        f"{entry['family']} {entry['test']}: {why}" for entry, verdict, why in runner.compare(unpatched, patched) if verdict == "regression"
    ]
    assert not lost, "\n".join(lost)
    for family in runner.FAMILIES:
        used = [entry for entry in patched.values() if entry["family"] == family and entry["counts"].get("caches")]
        assert len(used) >= 10, f"only {len(used)} tests of {family} went through our cache: is the model patched at all?"
