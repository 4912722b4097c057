"""Every policy that decides from mass and importance: tokens of the patched Hugging Face model, request by request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.predictor import WEIGHTS_FILE
from tests.engines.vllm import kit, models

POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {"k": 3, "rate": 0.75},
    "fastv": {"k": 2, "rate": 0.5, "ranking": "last"},
    "dyrate": {"k": 3},
    "vtw": {"k": 3},
    "schedule": {"k": 2, "kept": [[0, 100], [5, 40], [20, 10]]},
    "threshold": {"k": 2, "share": 0.6},
    "uniform": {"k": 2, "rate": 0.75},
    "random": {"k": 2, "rate": 0.75, "seed": 3},
    "dycoke": {"k": 2, "rate": 0.7},
    "st3": {"k": 2, "rate": 0.5, "horizon": 16, "stages": 2},
    "depth": {"k": 2},
    "pyramiddrop": {"k": 2, "keep": 0.4, "stages": 2},
    "layerwise": {"k": 2},
}
REFUSED = ("sparsevlm", "aim", "recycle", "klguard")


def check(place: Path, policy: Any, options: dict[str, Any]) -> None:
    requests = kit.mix(10)
    got = kit.engine(place, options, requests, max_num_batched_tokens=192)
    result = kit.compare(place, policy, requests, got)
    assert result.unequal == []
    assert result.changed > result.requests // 5, "the policy changes too little to tell pruned from unpruned"


@pytest.fixture(scope="module")
def predictor(folder, tmp_path_factory) -> Path:
    """A folder with a predictor of random weights that reads mass alone and changes its mind from step to step."""
    generator = torch.Generator().manual_seed(5)
    made = dk.DyRatePredictor.for_model(models.shape(folder("llava")), (0.0, 0.3, 0.6, 0.9), k=3)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator) * 3)
        made.bias.copy_(torch.randn(made.bias.shape, generator=generator) * 0.2)
    place = tmp_path_factory.mktemp("predictor")
    made.save_pretrained(place)
    return place


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_the_patched_model_under_chunked_prefill(folder, name):
    check(folder("llava"), dk.policies.get(name, **POLICIES[name]), {"policy": name, **POLICIES[name]})


def test_a_trained_predictor_that_reads_mass(folder, predictor):
    check(folder("llava"), dk.policies.get("dyrate", predictor=predictor), {"policy": "dyrate", "predictor": str(predictor)})


def test_the_bundled_model_with_a_predictor_in_its_folder(folder):
    """vLLM takes every safetensors file of a folder for weights: the plug-in leaves the predictor's out. This one reads hidden states."""
    place, options = folder("demo"), {"predictor": "closed-form"}
    assert (place / WEIGHTS_FILE).exists()
    check(place, dk.policies.get("dyrate", **options), {"policy": "dyrate", **options})
    with pytest.raises(AssertionError, match="its predictor reads hidden states"):
        kit.engine(place, {"policy": "dyrate"}, kit.mix(1))


@pytest.mark.parametrize("name", REFUSED)
def test_a_policy_that_needs_more_is_refused_by_name(folder, name):
    with pytest.raises(AssertionError, match=rf"{name}"):
        kit.engine(folder("llava"), {"policy": name}, kit.mix(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "fixd"}, "fixd"),
        ({"policy": "fixed", "k": 3, "rat": 0.5}, "rat"),
        ({"policy": "fixed", "k": 9}, "k must be"),
        ({"policy": "fixed", "k": 3, "retention": "evict"}, "evict"),
    ],
    ids=["name", "option", "k", "retention"],
)
def test_wrong_options_are_refused_at_the_start(folder, options, message):
    with pytest.raises(AssertionError, match=message):
        kit.engine(folder("llava"), options, kit.mix(1))
