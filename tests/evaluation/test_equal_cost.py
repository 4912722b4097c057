"""Tuning to a cost, the coarser picture, and the curves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.evaluation import curves
from dyrate_kernels.evaluation.coarse import check_square, downsampled, thin
from dyrate_kernels.evaluation.equal_cost import TOLERANCE, WITHIN, Tuned, mean_cost, search, tune
from dyrate_kernels.evaluation.runner import Contender, ask_all, encode
from dyrate_kernels.evaluation.suite import ShapesSuite
from dyrate_kernels.policies import ModelShape

P = dk.policies


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.mark.parametrize("policy", [P.Fixed(k=1), P.Depth(k=2), P.ST3(k=1), P.Threshold(k=1), P.DyRate(k=2, predictor="closed-form")])
def test_tuned_to_a_cost(demo, policy):
    suite = ShapesSuite(4, seed=3, tasks=("describe",))
    found = tune(*demo, suite, Contender("it", policy), 0.6, batch_size=4)
    assert found.cost == pytest.approx(0.6, abs=0.02) and found.contender.label == "it@60"
    assert mean_cost(*demo, suite, found.contender, 4) == found.cost


def test_a_method_of_few_costs_meets_them_and_refuses_others(demo):
    suite = ShapesSuite(2, tasks=("describe",))
    found = tune(*demo, suite, Contender("vtw", P.VTW(), "evict"), 0.34, batch_size=2)
    assert found.contender.policy.k == 2 and found.cost == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="vtw cannot cost 40 %.* costs 33.3 % or 50.0 %; ask for another cost"):
        tune(*demo, suite, Contender("vtw", P.VTW(), "evict"), 0.4, batch_size=2)
    with pytest.raises(ValueError, match="no one knob"):
        tune(*demo, suite, Contender("schedule", P.Schedule()), 0.5)
    with pytest.raises(ValueError, match="cost must be"):
        tune(*demo, suite, Contender("fixed", P.Fixed()), 0.0)


@pytest.mark.parametrize("retention, least, able", [("recoverable", 0.36, 2), ("evict", 1 / 3, 2)])
def test_a_cost_below_the_layers_that_read_everything_is_refused_with_the_k_that_can(demo, retention, least, able):
    suite = ShapesSuite(2, tasks=("describe",))
    contender = Contender("fastv", P.FastV(k=3), retention)
    with pytest.raises(ValueError, match=f"fastv cannot cost {100 * least:g} %: .*layer 3 of 6.* 50.0 to 100.0 %; with k={able} it can"):
        tune(demo[0], None, None, contender, least)  # no question is asked, so nothing to ask is needed
    other = Contender("fastv", P.FastV(k=able), retention)
    assert tune(*demo, suite, other, least, batch_size=2).cost == pytest.approx(least, abs=WITHIN)


def test_a_cost_that_only_asking_rules_out_is_refused_with_its_range(demo):
    suite = ShapesSuite(2, tasks=("describe",))
    with pytest.raises(ValueError, match=r"guard cannot cost 20 %: .* it costs [234]\d\.\d to \d+\.\d %"):
        tune(*demo, suite, Contender("guard", P.KLGuard(policy=P.Uniform(k=1))), 0.2, batch_size=2)


def test_the_k_that_is_proposed_after_asking_can(demo):
    """An answer of few tokens reads its whole prompt in one of few steps."""
    suite, cost, able = ShapesSuite(3, tasks=("colour",)), 0.6, 1
    with pytest.raises(ValueError, match=rf"fixed cannot cost {100 * cost:g} %: .*layer 2 of 6.*; with k={able} it can"):
        tune(*demo, suite, Contender("fixed", P.Fixed(k=2)), cost, batch_size=3)
    assert tune(*demo, suite, Contender("fixed", P.Fixed(k=able)), cost, batch_size=3).cost == pytest.approx(cost, abs=WITHIN)


def test_search_of_a_steep_and_of_a_stepped_cost():
    asked = []

    def at(cost):
        def tried(strength):
            asked.append(strength)
            return Tuned(None, cost(strength), strength)

        return tried

    assert search(at(lambda x: 0.2 + 0.8 / (1 + np.exp(80 * (x - 0.31)))), 0.4).cost == pytest.approx(0.4, abs=TOLERANCE)
    assert search(at(lambda x: 1.0 - 0.25 * np.floor(4 * x)), 0.45).cost == 0.5
    assert search(at(lambda x: 0.5 - 0.1 * x), 0.9).strength == 0.0 and search(at(lambda x: 0.5 - 0.1 * x), 0.1).strength == 1.0
    assert len(asked) < 50


def has_a_knob(name):
    return "rate" in P.options(name) or type(P.get(name)).at_strength is not P.Policy.at_strength


@pytest.mark.parametrize("name", [name for name in P.names() if has_a_knob(name)])
def test_cost_falls_with_strength(demo, name):
    shape = ModelShape.from_config(demo[0].config)
    policy = P.get(name).bind(shape)
    suite = ShapesSuite(1, seed=8, tasks=("describe",))
    costs = [mean_cost(*demo, suite, Contender("it", policy.at_strength(strength, 6)), 2) for strength in (0.0, 0.5, 1.0)]
    assert all(later <= earlier + 1e-9 for earlier, later in zip(costs, costs[1:], strict=False)), costs
    assert costs[-1] < costs[0] - 0.1
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            policy.at_strength(wrong, 6)


def test_a_coarser_picture(demo):
    model, processor = demo
    suite = ShapesSuite(3, tasks=("describe",))
    whole = ask_all(model, processor, suite, Contender("none", P.KeepAll()), batch_size=3)
    same = ask_all(model, processor, suite, Contender("none", P.KeepAll(), side=12), batch_size=3)
    assert [a.tokens for a in whole] == [a.tokens for a in same]
    coarse = ask_all(model, processor, suite, Contender("none", P.KeepAll(), side=6), batch_size=3)
    for a, b in zip(whole, coarse, strict=True):
        assert (b.n, b.kept, b.visual_share) == (a.n, 0.25, 0.25)
        assert b.flops < b.flops_unpruned and b.paper_cost < 0.5
    blurred = ask_all(model, processor, suite, Contender("none", P.KeepAll(), side=2), batch_size=3)
    assert sum(a.right for a in blurred) < 0.9 * sum(a.right for a in whole)
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with downsampled(model, 4):
        pass
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == before


def test_averaging_and_thinning(demo):
    model, processor = demo
    captured = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: captured.append(output))
    inputs = encode(processor, [ShapesSuite(1)[0]])
    try:
        model.model.get_image_features(pixel_values=inputs["pixel_values"])
        with downsampled(model, 3), torch.no_grad():
            model.model.get_image_features(pixel_values=inputs["pixel_values"])
            got = model.model.multi_modal_projector(torch.zeros(1, 144, model.config.vision_config.hidden_size))
    finally:
        handle.remove()
    assert got.shape[1] == 9
    grid = captured[0].view(12, 12, -1)
    with downsampled(model, 3):
        hook = list(model.model.multi_modal_projector._forward_hooks.values())[-1]
        averaged = hook(None, (), captured[0])
    torch.testing.assert_close(averaged[0, 4], grid[4:8, 4:8].mean((0, 1)))
    ids = torch.tensor([[0, 7, 3, 3, 3, 3, 8, 3, 3, 3, 3, 9], [7, 3, 3, 3, 3, 8, 8, 8, 8, 8, 8, 9]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    thinned = thin({"input_ids": ids, "attention_mask": mask}, 3, 4, 1)
    assert thinned["input_ids"][0].tolist()[-5:] == [7, 3, 8, 3, 9] and thinned["attention_mask"].sum(1).tolist() == [5, 9]
    assert thinned["input_ids"][1].tolist() == [7, 3, 8, 8, 8, 8, 8, 8, 9]
    for tokens, side in ((10, 2), (16, 5), (16, 0)):
        with pytest.raises(ValueError, match="cannot be averaged"):
            check_square(tokens, side)
    with pytest.raises(TypeError, match="multi_modal_projector"), downsampled(torch.nn.Linear(2, 2), 3):
        pass


def test_curves_are_those_of_the_statistics(demo):
    model, processor = demo
    suite = ShapesSuite(3, seed=4, tasks=("describe",))
    found, other = curves.measure(model, processor, suite, [2, 3], share=0.25, batch_size=2, least=1)
    assert found.with_layers[2] == 1.0 and found.with_layers[3] == other.with_layers[2]
    with dk.patch(model, P.KeepAll(k=3), record_importance=True) as handle:
        alone = []
        for index in range(3):
            model.generate(**encode(processor, [suite[index]]), do_sample=False, max_new_tokens=160)
            alone.append(handle.stats())
    with dk.patch(model, P.KeepAll(k=4), record_importance=True) as handle:
        deeper = []
        for index in range(3):
            model.generate(**encode(processor, [suite[index]]), do_sample=False, max_new_tokens=160)
            deeper.append(handle.stats())
    shared = [
        len(set(np.argsort(-np.array(a.importance[0]))[:36]) & set(np.argsort(-np.array(b.importance[0]))[:36])) / 36
        for one, two in zip(alone, deeper, strict=True)
        for a, b in zip(one.steps[1:], two.steps[1:], strict=True)
    ]
    assert found.with_layers[3] == pytest.approx(np.mean(shared), abs=0.01)
    assert found.answers[0] == 3 and found.answers == sorted(found.answers, reverse=True)
    assert len(found.answers) == max(len(stats.steps) for stats in alone)
    tops = [[set(np.argsort(-np.array(step.importance[0]), kind="stable")[:36]) for step in stats.steps] for stats in alone]
    assert found.mass["image"][1] == pytest.approx(np.mean([stats.steps[1].mass[0][1] for stats in alone]), abs=1e-5)
    assert found.with_first[:1] == [1.0] and found.returned[:2] == [0.0, 0.0]
    assert found.with_first[4] == pytest.approx(np.mean([len(top[4] & top[0]) / 36 for top in tops]), abs=0.02)
    assert found.with_last[4] == pytest.approx(np.mean([len(top[4] & top[3]) / 36 for top in tops]), abs=0.02)
    back = [len((top[4] - top[3]) & (top[0] | top[1] | top[2])) / 36 for top in tops]
    assert found.returned[4] == pytest.approx(np.mean(back), abs=0.02) and max(found.returned) > 0
