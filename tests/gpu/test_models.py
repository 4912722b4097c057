"""Whole models: the bundled one on the backend under test, captured decode steps against eager ones, a LLaVA-1.5-7B shape."""

from __future__ import annotations

import gc

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import shapes
from tests import models
from tests.checks import METHODS, RETENTIONS, ROWS, assert_same, greedy, logits, policy, rows_for_beams
from tests.gpu.kit import ON_GPU

pytestmark = pytest.mark.gpu

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)


def generated(model, fields, options, seed=5, **patching):
    """(output, stats, handle) of a patched model."""
    with dk.patch(model, **patching) as handle:
        torch.manual_seed(seed)
        output = model.generate(**fields, **options)
        return output, handle.stats(), handle


def assert_same_tokens(got, want, slack):
    """Equal token ids; where a row parts from the other, its logits were a tie within ``slack`` of the largest logit."""
    a, b = got.sequences, want.sequences
    assert a.shape == b.shape
    first, second = logits(got), logits(want)
    assert first.isfinite().all() and second.isfinite().all()
    steps = first.shape[0]
    for row in range(a.shape[0]):
        parted = (a[row, -steps:] != b[row, -steps:]).nonzero().flatten().tolist()
        step = parted[0] if parted else None
        same = steps if step is None else step + 1  # logits are comparable up to the step where the rows part
        error = (first[:same, row] - second[:same, row]).norm() / second[:same, row].norm()
        assert error <= slack, f"row {row}: relative error of the logits {error:.1e}"
        if step is not None:
            scores = second[step, row]
            gap = scores[b[row, -steps + step]] - scores[a[row, -steps + step]]
            assert gap <= slack * scores.abs().max(), f"row {row} takes another token at step {step}, {float(gap):.2e} below the best"


@pytest.fixture(scope="module")
def demo():
    """The bundled model and its processor, on the device."""
    return dk.load_demo(torch.device("cuda", torch.cuda.current_device()) if ON_GPU else "cpu")


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fixed", "fastv", "vtw"] if ON_GPU else ["dyrate"])
def test_bundled_model(kit, demo, method, retention):
    """The tokens of the reference backend; on a GPU also of a captured step and of fused layers."""
    model, processor = demo
    samples = [shapes.make_sample(-1 - i, "describe") for i in range(4 if ON_GPU else 1)]
    content = [{"type": "image"}, {"type": "text", "text": samples[0].prompt}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    size = processor.image_processor.size["height"]
    images = [sample.image(size) for sample in samples]
    fields = processor(images=images, text=[prompt] * len(samples), padding=True, return_tensors="pt").to(kit.device)
    options = greedy(32 if ON_GPU else 3)
    want, want_stats, _ = generated(model, fields, options, policy=method, retention=retention, backend="reference", cuda_graph=False)
    eager = {"cuda_graph": False}
    ways = [eager, {}, {**eager, "fuse": True}, {"fuse": True}] if ON_GPU else [{}]
    for way in [way for way in ways if kit.backend == "triton" or "fuse" not in way]:
        got, stats, handle = generated(model, fields, options, policy=method, retention=retention, backend=kit.backend, **way)
        assert handle.graph is None or not ON_GPU or handle.graph.replays > 0
        assert stats.backend == kit.backend
        assert_same(got, want, tolerance=1e-3)
        assert [step.kept for step in stats.steps] == [step.kept for step in want_stats.steps]


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 30},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 2, "do_sample": True},
}


# a trained predictor belongs to one model; mistral has sliding windows
MODELS = [("llama", method) for method in ("dyrate", "dyrate-trained", "fixed", "fastv", "depth")]
MODELS += [("mistral", method) for method in ("dyrate", "fixed")]


@RETENTION
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("text", "method"), MODELS)
def test_captured_steps_give_the_tokens_of_eager_ones(cuda, kit, text, method, mode, retention):
    """On a ragged batch."""
    model = models.build("llava", text).to(cuda)
    fields = {name: value.to(cuda) for name, value in models.inputs(model, rows_for_beams(ROWS)).items()}
    options = greedy(20) | MODES[mode]
    patching = {"policy": policy(METHODS[method]), "retention": retention, "backend": kit.backend}
    want, want_stats, _ = generated(model, fields, options, **patching, cuda_graph=False)
    got, stats, handle = generated(model, fields, options, **patching)
    assert handle.graph.off is None and handle.graph.replays >= 15
    assert_same(got, want)
    assert [step.kept for step in stats.steps] == [step.kept for step in want_stats.steps]


@RETENTION
@pytest.mark.parametrize("method", ["dyrate-trained", "fixed", "uniform", "schedule"])
def test_backend_gives_the_tokens_of_the_reference(kit, method, retention):
    model = models.build("llava").to(kit.device)
    rows = ROWS if ON_GPU else ROWS[:2]
    fields = {name: value.to(kit.device) for name, value in models.inputs(model, rows).items()}
    options = greedy(20 if ON_GPU else 3)
    patching = {"policy": policy(METHODS[method]), "retention": retention}
    want, want_stats, _ = generated(model, fields, options, **patching, backend="reference", cuda_graph=False)
    got, stats, _ = generated(model, fields, options, **patching, backend=kit.backend)
    assert_same(got, want, tolerance=1e-4)
    assert [step.kept for step in stats.steps] == [step.kept for step in want_stats.steps]


# ---- LLaVA-1.5-7B -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven_billion():
    """A randomly initialised LLaVA-1.5-7B in bfloat16."""
    if not ON_GPU:
        pytest.skip("no CUDA device")
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, {torch.cuda.mem_get_info()[0] >> 30} GiB are free")
    from dyrate_kernels.measuring import random_models

    yield random_models.build("llava-1.5-7b", torch.device("cuda", torch.cuda.current_device()))
    gc.collect()
    torch.cuda.empty_cache()


def test_llava_7b(cuda, kit, seven_billion):
    """Keeping all gives the unpatched model's tokens; a captured step those of an eager one, with what was kept."""
    from dyrate_kernels.measuring import random_models

    model = seven_billion
    fields = random_models.inputs(model, batch=2, visual_tokens=576, text_tokens=64)
    options = greedy(12)
    plain = model.generate(**fields, **options)
    for retention in RETENTIONS:
        everything, _, _ = generated(model, fields, options, policy="none", retention=retention, backend=kit.backend)
        assert_same_tokens(everything, plain, slack=5e-2)
        fixed = {"policy": dk.policies.Fixed(k=3, rate=0.875), "retention": retention, "backend": kit.backend}
        want, want_stats, _ = generated(model, fields, options, **fixed, cuda_graph=False, exact=True)
        got, stats, handle = generated(model, fields, options, **fixed, exact=True)
        assert handle.graph.captures == 1 and handle.graph.off is None
        assert_same_tokens(got, want, slack=2e-2)
        assert [step.kept for step in stats.steps] == [step.kept for step in want_stats.steps]
        assert stats.steps[-1].kept == [72, 72]
        got, stats, handle = generated(model, fields, options, **fixed)
        layers = "fused" if kit.backend == "triton" else "own"
        assert stats.path is not None and (stats.path.steps, stats.path.layers) == ("captured", layers)
        assert_same_tokens(got, want, slack=5e-2)
