"""The training pass against pruned generations: the same rates, the same mass, the same logits, token by token."""

from __future__ import annotations

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.training.masked_pass import gumbel, mask_for, take_likeliest, training_hooks
from tests import models
from tests.checks import ROWS, fingerprint, greedy, rows_for

STEPS = 7


def predictor_for(model, k, seed=3, rates=(0.0, 0.3, 0.6, 0.9), text=False):
    predictor = dk.DyRatePredictor.for_model(dk.policies.ModelShape.from_config(model.config), rates, k=k, text=text)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        predictor.weight.copy_(torch.randn(predictor.weight.shape, generator=g) * 6)
        predictor.bias.copy_(torch.randn(predictor.bias.shape, generator=g))
        if text:
            predictor.hidden_weight.copy_(torch.randn(predictor.hidden_weight.shape, generator=g))
    return predictor


def rates_of(predictor):
    return torch.tensor(predictor.rates, dtype=torch.float64)


def generated(model, fields, policy):
    with dk.patch(model, policy, backend="reference") as handle:
        output = model.generate(**fields, **greedy(STEPS, min_new_tokens=STEPS))
        return output, handle.stats()


@pytest.mark.parametrize(("family", "text"), models.VARIANTS)
@pytest.mark.parametrize(("k", "spread", "text_aware"), [(1, 0.0, False), (3, 0.0, True), (2, 0.6, False), (1, 0.6, True)])
def test_it_is_the_pruned_generation(make_model, family, text, k, spread, text_aware):
    model = make_model(family, text)
    rows = rows_for(family)
    fields = models.inputs(model, rows)
    predictor = predictor_for(model, k, text=text_aware)
    output, stats = generated(model, fields, dk.policies.DyRate(k=k, predictor=predictor, spread=spread))
    answer = output.sequences[:, fields["input_ids"].shape[1] :]
    with training_hooks(model) as run:
        got = run(fields, answer, torch.ones_like(answer), predictor, k, rates_of(predictor), take_likeliest, spread)
    logits = torch.stack(output.logits, 1)
    scale = logits.abs().max()
    torch.testing.assert_close(got.first_logits / scale, logits[:, 0] / scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(got.logits / scale, logits[:, 1:] / scale, rtol=0, atol=2e-5)
    chosen = rates_of(predictor)[got.choice.index]
    for b, visual in enumerate(stats.visual_tokens):
        for step in stats.steps[1:]:
            if visual:
                assert step.rate[b] == pytest.approx(chosen[b, step.step - 1].item(), abs=1e-12)
            mass = got.choice.mass[b, step.step - 1].mean(0)
            torch.testing.assert_close(mass, torch.tensor(step.mass[b]), rtol=0, atol=1e-5)
    assert len({rate for step in stats.steps[1:] for rate in step.rate}) > 1, "the rates never changed"


def test_answers_of_unequal_length(make_model):
    """Padding behind a shorter answer changes nothing before it."""
    model = make_model("llava", "llama")
    fields = models.inputs(model, ROWS[:2])
    predictor = predictor_for(model, 2)
    answer = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    rest = (predictor, 2, rates_of(predictor), take_likeliest)
    with training_hooks(model) as run:
        both = run(fields, answer, mask, *rest)
        other = answer.clone()
        other[1, 3:] = 5
        torch.testing.assert_close(run(fields, other, mask, *rest).logits[1, :3], both.logits[1, :3])
        alone = models.inputs(model, ROWS[1:2])
        short = run(alone, answer[1:, :3], mask[1:, :3], *rest)
    torch.testing.assert_close(short.logits[0], both.logits[1, :2], rtol=0, atol=1e-4)


def test_gradient_reaches_every_layer_from_k_on(make_model):
    """The gradient of the one-hot, against finite differences of the loss where the mask may take any value. The steps are large:
    transformers normalises in float32 whatever the model's type.
    """
    model = make_model("llava", "llama").double()
    fields = {n: t.double() if t.is_floating_point() else t for n, t in models.inputs(model, ROWS[:1]).items()}
    k = 2
    predictor = predictor_for(model, k).double()
    answer = torch.randint(3, 90, (1, 5), generator=torch.Generator().manual_seed(1))
    ones, upper = torch.ones_like(answer), torch.randn(1, 4, models.VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    share = torch.zeros(1, 4, 4, dtype=torch.float64)
    share[0, torch.arange(4), torch.tensor([1, 3, 0, 2])] = 1.0

    def loss(values):
        with training_hooks(model) as run:
            return (run(fields, answer, ones, predictor, k, rates_of(predictor), lambda logits: values).logits * upper).sum()

    leaf = share.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    assert grad.abs().min() > 0
    for place in [(0, 0, 0), (0, 1, 3), (0, 2, 1), (0, 3, 2)]:
        step = torch.zeros_like(share)
        step[place] = 2e-3
        with torch.no_grad():
            slope = (loss(share + step) - loss(share - step)) / 4e-3
        assert grad[place].item() == pytest.approx(slope.item(), rel=2e-3, abs=1e-3), place


def test_the_prompt_is_not_kept_for_the_backward_pass(make_model):
    """Memory follows the answer: a prompt of several pictures saves little more than a short one."""
    model = make_model("llava", "llama")
    predictor = predictor_for(model, 2)
    answer = torch.randint(3, 90, (1, 5))
    saved = []
    for row in (["text 3", "image", "text 3"], ["text 3", *["image"] * 6, "text 3"]):
        fields, kept = models.inputs(model, [row]), []
        with training_hooks(model) as run, torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            run(fields, answer, torch.ones_like(answer), predictor, 2, rates_of(predictor), gumbel(1.0))
        rows = fields["input_ids"].shape[1]
        # keys and values of the prompt are read in the backward pass, hidden states and MLPs are not
        wide = [t for t in kept if t.dim() == 3 and t.shape[1] >= rows and t.shape[-1] >= models.HIDDEN]
        assert not wide
        saved.append(sum(t.numel() for t in kept if t.requires_grad))
    assert saved[1] < 2.5 * saved[0]


def test_straight_through():
    logits = torch.tensor([[[2.0, 1.0, -1.0]]], requires_grad=True)
    share = take_likeliest(logits)
    torch.testing.assert_close(share.detach(), torch.tensor([[[1.0, 0.0, 0.0]]]))
    (share * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    probability = logits.detach().softmax(-1)[0, 0]
    value = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(logits.grad[0, 0], probability * (value - (probability * value).sum()))
    torch.manual_seed(0)
    drawn = torch.stack([gumbel(0.5)(logits.detach()).argmax(-1) for _ in range(3000)]).flatten().bincount(minlength=3) / 3000
    torch.testing.assert_close(drawn, probability, rtol=0, atol=0.04)


def test_masks_are_the_selection_of_the_operators():
    g = torch.Generator().manual_seed(5)
    importance = torch.randint(0, 6, (3, 4, 20), generator=g).float()  # ties
    n_visual = torch.tensor([20, 13, 0], dtype=torch.int32)
    rates = torch.tensor([0.0, 0.35, 0.8, 1.0], dtype=torch.float64)
    index = torch.randint(0, 4, (3, 4), generator=g)
    mask = mask_for(torch.nn.functional.one_hot(index, 4).float(), importance, n_visual, rates)
    for row in range(4):
        count = dk.ops.keep_count(n_visual, rates[index[:, row]])
        kept, n_kept = dk.ops.select_tokens(importance[:, row], count, n_visual, backend="reference")
        for b in range(3):
            assert mask[b, row].nonzero()[:, 0].tolist() == kept[b, : n_kept[b]].tolist()


def test_everything_is_put_back(make_model, request):
    model = make_model("llava", "llama")
    request.addfinalizer(lambda: model.eval().requires_grad_(True))
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = fingerprint(model)
    fields = models.inputs(model, ROWS[:1])
    predictor = predictor_for(model, 2)
    with pytest.raises(ZeroDivisionError), training_hooks(model) as run:
        run(fields, torch.full((1, 3), 5), torch.ones(1, 3), predictor, 2, rates_of(predictor), lambda logits: 1 / 0)
    assert fingerprint(model) == before
    with dk.patch(model), pytest.raises(RuntimeError, match="unpatch"), training_hooks(model):
        pass
    with pytest.raises(TypeError, match="must be a transformers"), training_hooks(torch.nn.Linear(2, 2)):
        pass
