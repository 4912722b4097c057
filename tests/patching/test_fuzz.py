"""A few of the random configurations of ``tests.fuzz``; thousands of them: ``python -m tests.fuzz --configurations 3000``."""

from __future__ import annotations

from typing import Any

import pytest

from dyrate_kernels.generation import decide
from tests import fuzz

MADE: dict[Any, Any] = {}


@pytest.mark.parametrize("number", range(24))
def test_a_random_configuration_is_as_the_oracle_has_it(number):
    fuzz.check(fuzz.draw(number, seed=19), MADE)


def test_a_broken_selection_is_a_miss(monkeypatch):
    right = decide.ops.select_tokens

    def wrong(score, *args, **kwargs):
        return right(-score, *args, **kwargs)

    monkeypatch.setattr(decide.ops, "select_tokens", wrong)
    assert fuzz.run(12, seed=19) > 0
