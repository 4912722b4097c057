"""The patched bundled model with ``backend="triton"`` gives the reference backend's tokens and kept counts."""

from __future__ import annotations

import pytest

import dyrate_kernels as dk
from dyrate_kernels.triton_kernels import plan
from tests import end_to_end
from tests.interpreter import harness

WIDE = plan.Settings(block_n=256, min_blocks=4)  # one large step a head: the interpreter pays by the step


@pytest.mark.parametrize("policy, retention, options", end_to_end.GENERATIONS, ids=str)
def test_tokens_equal_the_references(policy, retention, options):
    demo = dk.load_demo() if policy == "dyrate" else end_to_end.shallow_demo()  # its predictor is for all of the layers
    with harness.settings(WIDE):
        end_to_end.assert_tokens_equal_the_references(demo, "triton", policy, retention, options, steps=3)
