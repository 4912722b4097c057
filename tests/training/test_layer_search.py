"""VTW's layer search against masks, and from the command line."""

from __future__ import annotations

import json
import math

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import chat
from dyrate_kernels.cli.main import main
from dyrate_kernels.training.data import Example, ShapesSource
from dyrate_kernels.training.layer_search import divergence, search_layer
from tests.oracle import Oracle, Rule


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


def test_it_is_the_divergence_of_masked_passes(demo):
    model, processor = demo
    source = ShapesSource(3, seed=7)
    found = search_layer(model, processor, source, samples=3)
    assert list(found.divergence) == [1, 2, 3, 4, 5] and found.samples == 3 and found.skipped == 0
    one = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for k in (1, 4):
        want = 0.0
        for example in (source[i] for i in range(3)):
            inputs = processor(images=example.images, text=chat.render(processor, example.messages), return_tensors="pt")
            p = model.generate(**inputs, **one).logits[0][0].double().softmax(-1)
            q = Oracle(model, Rule("vtw", k=k), "evict").generate(**inputs, **one).logits[0][0].double().softmax(-1)
            want += sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)) / 3
        assert found.divergence[k] == pytest.approx(want, rel=1e-3, abs=1e-6)
    assert found.divergence[1] > found.divergence[5]
    limit = found.divergence[4]
    assert search_layer(model, processor, source, samples=3, eta=limit).k == min(k for k, v in found.divergence.items() if v <= limit)
    assert search_layer(model, processor, source, samples=1, eta=0.0).k in (None, 5)
    assert not hasattr(model, "_dyrate_handle")


def test_divergence():
    p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    assert divergence(p.log(), q.log()) == pytest.approx(math.log(2))
    assert divergence(p.log(), p.log()) == 0.0


def test_examples_without_a_picture_are_skipped(demo):
    words = Example("words", [chat.user("Hello.")], [], "Hi there.")
    found = search_layer(*demo, [words, ShapesSource(1)[0]], samples=5)
    assert (found.samples, found.skipped) == (1, 1)
    said = []
    found = search_layer(*demo, [words, *ShapesSource(3)], samples=2, progress=lambda *given: said.append(given))
    assert (found.samples, found.skipped, said[-1]) == (1, 1, (2, 2))  # the first two, as a limit means everywhere
    with pytest.raises(ValueError, match="none of the 1 examples"):
        search_layer(*demo, [words])
    for wrong in ({"samples": 0}, {"eta": -1.0}, {"eta": float("nan")}):
        with pytest.raises(ValueError, match="must"):
            search_layer(*demo, [words], **wrong)


def test_command(capsys):
    assert main(["calibrate", "--samples", "2", "--eta", "100"]) == 0
    assert "--policy vtw --k 1" in capsys.readouterr().out
    assert main(["calibrate", "--samples", "2", "--eta", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 2 and set(result["divergence"]) == {"1", "2", "3", "4", "5"}
