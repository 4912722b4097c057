"""Every family: vLLM's own tokens are Hugging Face's, and so they are where both prune."""

from __future__ import annotations

import pytest

import dyrate_kernels as dk
from tests.engines.vllm import kit, models
from tests.engines.vllm.runner import PLUGIN


@pytest.mark.parametrize("name", models.FAMILIES)
def test_unpruned_tokens_are_hugging_faces_and_the_policy_none_touches_nothing(folder, name):
    place, requests = folder(name), kit.mix(6)
    got = kit.engine(place, {"policy": "none"}, requests)
    assert kit.compare(place, "none", requests, got).unequal == []
    assert not any(PLUGIN in layer for layer in got.attention), got.attention


@pytest.mark.parametrize("name", models.FAMILIES)
def test_pruned_tokens_are_those_of_the_patched_model(folder, name):
    place, requests, options = folder(name), kit.mix(6), {"k": 2, "rate": 0.9}
    got = kit.engine(place, {"policy": "fixed", **options}, requests)
    result = kit.compare(place, dk.policies.get("fixed", **options), requests, got)
    assert result.unequal == []
    assert result.changed > 0, "the policy changes nothing: equality says nothing"
    assert all(PLUGIN in layer for layer in got.attention), got.attention
