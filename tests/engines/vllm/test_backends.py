"""An attention backend that the plug-in has no form of."""

from __future__ import annotations

import pytest

from tests.engines.vllm import kit


def test_a_policy_that_no_attention_obeys_is_an_error(folder):
    with pytest.raises(AssertionError, match="attention_backend must be one that dyrate has a form of"):
        kit.engine(folder("llava"), {"policy": "fixed", "k": 3, "rate": 0.75}, kit.mix(2, tokens=4), own_attention=True)


def test_an_engine_that_asks_for_nothing_takes_any_attention(folder):
    place, requests = folder("llava"), kit.mix(2, tokens=4)
    got = kit.engine(place, None, requests, own_attention=True)
    assert kit.compare(place, "none", requests, got).unequal == []
    assert got.attention and not any("dyrate" in line for line in got.attention)
