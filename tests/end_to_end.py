"""Whole generations of a compiled backend against the reference backend's: what its case files on a CPU share."""

from __future__ import annotations

from typing import Any

import torch

import dyrate_kernels as dk
from dyrate_kernels.shapes import draw, make_scene
from tests import models
from tests.checks import ROWS, greedy

GENERATIONS = [
    ("dyrate", "recoverable", {}),
    ("dyrate", "evict", {}),
    (dk.policies.FastV(k=2, rate=0.5), "recoverable", {"num_beams": 2}),
    (dk.policies.Fixed(k=1, rate=0.9), "evict", {"num_beams": 2}),
    ("dyrate", "pool=0.5", {}),
]


def shallow_demo(layers: int = 3) -> tuple[Any, Any]:
    """The bundled model with its first layers alone, for what pays by the launch, and its processor."""
    model, processor = dk.load_demo()
    del models.decoder_layers(model)[layers:]
    model.config.get_text_config().num_hidden_layers = layers
    return model, processor


def assert_tokens_equal_the_references(
    demo: tuple[Any, Any], backend: str, policy: Any, retention: str, options: dict, steps: int, **patching: Any
) -> None:  # fmt: skip
    """The bundled model generates the reference backend's tokens with the reference backend's kept counts."""
    model, processor = demo
    pictures = [draw(make_scene(seed)) for seed in (3, 4)][: 1 if options else 2]
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt", padding=True)
    found = []
    for name in ("reference", backend):
        with dk.patch(model, policy, retention=retention, backend=name, **(patching if found else {})) as handle:
            tokens = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **options)
            stats = handle.stats()
        assert stats.backend == name
        found.append((tokens, [step["kept"] for step in stats.to_dict()["steps"]]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def assert_replays_equal_the_references(backend: str, policy: str, retention: str) -> None:
    """A captured decode step (a tape in place of the graph) gives the eager reference's tokens and kept counts."""
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:2])
    chosen = dk.policies.get(policy, k=1)
    with dk.patch(model, chosen, retention=retention, backend="reference") as handle:
        want, stats = model.generate(**fields, **greedy(5)), handle.stats()
    with dk.patch(model, chosen, retention=retention, backend=backend, cuda_graph=True) as handle:
        got = model.generate(**fields, **greedy(5))
        assert handle.graph.off is None and (handle.graph.captures, handle.graph.replays) == (1, 3)
        assert [step["kept"] for step in handle.stats().to_dict()["steps"]] == [step["kept"] for step in stats.to_dict()["steps"]]
    assert torch.equal(got.sequences, want.sequences)
