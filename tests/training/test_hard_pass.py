"""Passes without gradients against pruned generations, token by token, and against the training pass."""

from __future__ import annotations

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.training.hard_pass import HardPass, ReadingPass
from dyrate_kernels.training.masked_pass import take_likeliest, training_hooks
from tests import models
from tests.checks import greedy, rows_for
from tests.training.test_masked_pass import STEPS, generated, predictor_for, rates_of


def constant(rate, k, model, spread=0.0):
    return dk.DyRatePredictor.for_model(dk.policies.ModelShape.from_config(model.config), (rate,), k=k, spread=spread)


def passed(model, fields, answer, make):
    with torch.no_grad(), training_hooks(model) as passes:
        read = passes.read(fields)
        first = passes.over(read, answer, torch.ones_like(answer), make)
        read.again()
        again = passes.over(read, answer, torch.ones_like(answer), make)
    assert torch.equal(first.logits, again.logits), "the prompt's cache was not put back"
    return read, first


@pytest.mark.parametrize(("family", "text"), models.VARIANTS)
@pytest.mark.parametrize(
    "policy, k, spread, random",
    [("dyrate", 3, 0.0, None), ("dyrate", 1, 0.6, None), ("uniform", 2, 1.0, None), ("fixed", 2, 0.0, None), ("random", 2, 0.0, 0)],
)
def test_it_is_the_pruned_generation(make_model, family, text, policy, k, spread, random):
    model = make_model(family, text)
    fields = models.inputs(model, rows_for(family))
    predictor = predictor_for(model, k, text=True) if policy == "dyrate" else constant(0.6, k, model)
    named = dk.policies.DyRate(k=k, predictor=predictor, spread=spread) if policy == "dyrate" else dk.policies.get(policy, k=k, rate=0.6)
    output, stats = generated(model, fields, named)
    answer = output.sequences[:, fields["input_ids"].shape[1] :]
    read, got = passed(model, fields, answer, lambda *columns: HardPass(predictor, k, rates_of(predictor), *columns, spread, random))
    logits = torch.stack(output.logits, 1)
    scale = logits.abs().max()
    torch.testing.assert_close(read.first_logits / scale, logits[:, 0] / scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(got.logits / scale, logits[:, 1:] / scale, rtol=0, atol=2e-5)
    for b, visual in enumerate(stats.visual_tokens):
        assert [step.kept[b] for step in stats.steps[1:]] == got.carrier.count[b].tolist() if visual else True


def test_the_unpruned_pass_notes_what_predictors_read(make_model):
    model = make_model("llava", "llama")
    fields = models.inputs(model, rows_for("llava"))
    output = model.generate(**fields, **greedy(STEPS, min_new_tokens=STEPS))
    answer = output.sequences[:, fields["input_ids"].shape[1] :]
    _, got = passed(model, fields, answer, lambda *columns: ReadingPass([0, 2], *columns))
    logits = torch.stack(output.logits, 1)
    torch.testing.assert_close(got.logits, logits[:, 1:], rtol=1e-4, atol=1e-4)
    for k in (1, 3):
        predictor = predictor_for(model, k)
        with training_hooks(model) as run:
            choice = run(fields, answer, torch.ones_like(answer), predictor, k, rates_of(predictor), take_likeliest).choice
        torch.testing.assert_close(got.carrier.mass[k - 1], choice.mass)
        torch.testing.assert_close(got.carrier.hidden[k - 1], choice.hidden)
    assert set(got.carrier.mass) == {0, 2}
