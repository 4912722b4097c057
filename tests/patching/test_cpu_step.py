"""Decode steps on a CPU (``generation.cpu_step``) against the same steps through the reference operators, in every dtype."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels.generation import cpu_step
from tests import models
from tests.checks import METHODS, RETENTIONS, ROWS, assert_close_logits, greedy, logits, patched

LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
RANKING = [(method, dtype) for method in ("fastv", "dyrate", "layerwise") for dtype in (torch.float64, torch.float32)]
# no ranking in 16 bit: rounding may change what it keeps, and then nothing can be compared
CASES = [(method, dtype) for method in ("none", "uniform") for dtype in LIMIT] + RANKING
TEXTS = [("llava", "mistral"), ("llava", "qwen3")]


@pytest.mark.parametrize(("method", "dtype"), CASES, ids=[f"{method}-{str(dtype)[6:]}" for method, dtype in CASES])
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "mask"])
@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize(("family", "text"), TEXTS, ids=["-".join(text) for text in TEXTS])
def test_a_step_is_that_of_the_reference(make_model, monkeypatch, family, text, method, retention, gathers, dtype):
    monkeypatch.setattr(cpu_step, "_WORTH_A_GATHER", 0 if gathers else 1 << 60)
    model = make_model(family, text, dtype=dtype)
    fields = models.inputs(model, ROWS)
    fields = {name: t.to(dtype) if t.is_floating_point() else t for name, t in fields.items()}
    made = []

    class Spy(cpu_step.CpuStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    outputs = []
    monkeypatch.setattr(cpu_step, "CpuStep", Spy)
    for enabled in (True, False):
        monkeypatch.setattr(cpu_step, "enabled", enabled)
        with patched(model, METHODS[method], retention) as handle:
            outputs.append((model.generate(**fields, **greedy(9)), handle.stats()))
    assert len(made) == 8, "the steps did not go the way that is tested here"
    (got, here), (want, there) = outputs
    same = torch.ones(len(ROWS), dtype=torch.bool)
    length = fields["input_ids"].shape[1]
    for number, (a, b) in enumerate(zip(logits(got), logits(want), strict=True)):
        assert_close_logits(a[same][None], b[same][None], LIMIT[dtype])
        same &= got.sequences[:, length + number] == want.sequences[:, length + number]
    assert same.any()
    if dtype.itemsize > 2:
        assert same.all()
        assert [step.kept for step in here.steps] == [step.kept for step in there.steps]
        mass, other = (torch.tensor([step.mass for step in stats.steps]) for stats in (here, there))
        torch.testing.assert_close(mass, other, atol=1e-5, rtol=1e-4)


def test_importance_is_that_of_the_reference(make_model, monkeypatch):
    model = make_model("llava", "llama")
    fields = models.inputs(model, ROWS)
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(cpu_step, "enabled", enabled)
        with patched(model, METHODS["none"], record_importance=True) as handle:
            model.generate(**fields, **greedy(4))
            found.append(torch.tensor([x for step in handle.stats().steps for row in step.importance for x in row]))
    assert found[0].abs().sum() > 0.1
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
