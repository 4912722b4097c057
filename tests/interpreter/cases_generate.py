"""The patched bundled model with ``backend="triton"`` gives the reference backend's tokens and kept counts."""

from __future__ import annotations

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.shapes import draw, make_scene
from dyrate_kernels.triton_kernels import plan
from tests.interpreter import harness

WIDE = plan.Settings(block_n=256, min_blocks=4)  # one large step a head: the interpreter pays by the step


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.mark.parametrize(
    "policy, retention, options",
    [
        ("dyrate", "recoverable", {}),
        ("dyrate", "evict", {}),
        (dk.policies.FastV(k=2, rate=0.5), "recoverable", {"num_beams": 2}),
        (dk.policies.Fixed(k=1, rate=0.9), "evict", {"num_beams": 2}),
    ],
    ids=str,
)
def test_tokens_equal_the_references(demo, policy, retention, options):
    model, processor = demo
    pictures = [draw(make_scene(seed)) for seed in (3, 4)][: 1 if options else 2]
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True)
    inputs = processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt", padding=True)
    found = []
    for backend in ("reference", "triton"):
        with harness.settings(WIDE), dk.patch(model, policy, retention=retention, backend=backend) as handle:
            torch.use_deterministic_algorithms(False)
            tokens = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)
            stats = handle.stats()
        assert stats.backend == backend
        found.append((tokens, [step["kept"] for step in stats.to_dict()["steps"]]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
