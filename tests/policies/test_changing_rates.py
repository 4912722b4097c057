"""Policies whose rate changes with depth, with steps or with attention, each against an independent computation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dyrate_kernels import policies
from tests.policies.kit import SHAPE, make, random_view, select, started


def test_vtw_withdraws_all_at_half_of_the_layers():
    policy = make("vtw")
    assert policy.k == 3 and policy.layer_groups(6) == [3]
    assert policies.VTW().bind(SHAPE.replace(num_layers=32)).k == 16  # the published one
    assert policies.VTW(k=16).bind(SHAPE.replace(num_layers=32)).k == 16
    assert policies.VTW().bind(SHAPE.replace(num_layers=2)).k == 1
    assert policy.decide(random_view([12, 0])).count.tolist() == [0, 0]


def test_depth_formula():
    policy = policies.Depth(k=4, prune=0.4, growth=0.5)
    expected = [1, 1, 1, 1, 0.6, 0.6 - 0.5 / 5, 0.6 - 1.0 / 5, 0.6 - 1.5 / 5, 0.6 - 2.0 / 5, 0.6 - 0.5]
    assert [1 - rate for rate in policy.rates(10)] == pytest.approx(expected)
    assert policy.layer_groups(10) == [4, 5, 6, 7, 8, 9]
    bound = policy.bind(SHAPE.replace(num_layers=10))
    view = started(bound, random_view([100, 10, 0]))
    decision = bound.decide(view)
    counts = [[math.floor(n * fraction + 1e-6) for n in (100, 10, 0)] for fraction in expected[4:]]
    assert decision.count.tolist() == counts
    assert decision.rate.tolist() == pytest.approx([1 - sum(expected[4:]) / 6] * 3)
    kept = select(view, decision)
    for shallow, deep in zip(kept, kept[1:], strict=False):
        assert all(set(b) <= set(a) for a, b in zip(shallow, deep, strict=True))


def test_depth_clamps_and_merges_layers_of_equal_rate():
    assert policies.Depth(k=2, prune=0.8, growth=0.6).rates(6) == pytest.approx([0, 0, 0.8, 1, 1, 1])
    assert policies.Depth(k=2, prune=0.8, growth=0.6).layer_groups(6) == [2, 3]
    assert policies.Depth(k=2, prune=0.8, growth=0.0).layer_groups(6) == [2]
    # a single pruned layer: R'(k) = 0
    assert policies.Depth(k=5, prune=0.2, growth=0.5).rates(6) == pytest.approx([0] * 5 + [0.2])
    assert not policies.Depth(prune=0, growth=0).drops
    for option in ("prune", "growth"):
        with pytest.raises(ValueError, match=rf"{option} must be in \[0, 1\]"):
            policies.get("depth", **{option: 1.5})
    with pytest.raises(RuntimeError, match="bound to a model"):
        policies.Depth().start(torch.zeros(1, dtype=torch.int32))


def test_schedule_over_steps():
    policy = policies.Schedule(k=3, kept=[(0, 288), (5, 144), (10, 72)]).bind(SHAPE)
    view = started(policy, random_view([576, 100, 0]))
    for step in range(13):
        view.step.fill_(step)
        count = 288 if step < 5 else 144 if step < 10 else 72
        decision = policy.decide(view)
        assert decision.count.tolist() == [count, min(count, 100), 0]
        assert decision.rate.tolist() == pytest.approx([1 - count / 576, 1 - min(count, 100) / 100, 0.0])
    assert policy.kept_bound(576) == 288 and policy.kept_bound(100) == 100 and policy.kept_bound(0) == 0
    assert not policy.constant


def test_schedule_keeps_everything_before_its_first_pair():
    policy = policies.Schedule(kept=[(2, 3)]).bind(SHAPE)
    view = started(policy, random_view([10]))
    counts = []
    for step in range(4):
        view.step.fill_(step)
        counts.append(policy.decide(view).count.item())
    assert counts == [10, 10, 3, 3]
    assert policy.kept_bound(10) == 10
    assert policies.Schedule(kept=[(0, 3)]).constant


def test_schedule_is_checked():
    for kept in ([], [(0, -1)], [(-1, 3)], [(0, 5), (0, 4)], [(5, 5), (1, 4)], [(0, 2**31)]):
        with pytest.raises(ValueError, match="kept must be a list of"):
            policies.Schedule(kept=kept)
    for kept in (7, None, [5], [(0, 1.5)], [(0, True)], ["ab"], [(1, 2, 3)], "288"):
        with pytest.raises(TypeError, match="kept must be a list of"):
            policies.Schedule(kept=kept)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_threshold_holds_its_share(share):
    """The smallest set: the share is reached, and one token fewer does not reach it."""
    policy = make("threshold", share=share)
    view = started(policy, random_view([37, 0, 5]))
    view.importance[0] = view.importance[0] ** 6  # a few tokens have most of it
    for row, kept in enumerate(select(view, policy.decide(view))[0]):
        weights = view.importance[row].double()
        held, total = weights[kept].sum().item(), weights.sum().item()
        assert held >= share * total * (1 - 1e-8)
        if kept and share:
            assert held - weights[kept].min().item() < share * total * (1 + 1e-8)
        assert (len(kept) == 0) == (share == 0 or row == 1)


def test_threshold_counts_only_the_living():
    policy = make("threshold", share=0.5)
    view = started(policy, random_view([4]))
    view.importance[0] = torch.tensor([8.0, 4.0, 2.0, 1.0])
    assert policy.decide(view).count.tolist() == [1]
    view.alive = torch.tensor([[False, True, True, True]])
    assert select(view, policy.decide(view)) == [[[1]]]
    view.alive = torch.tensor([[False, False, True, True]])
    assert policy.decide(dataclasses.replace(view, importance=torch.tensor([[9.0, 9.0, 1.0, 1.0]]))).count.tolist() == [1]


def test_threshold_by_quantile():
    view = random_view([10, 0, 4])
    view.importance[0, :10] = torch.arange(10.0)[torch.randperm(10)]
    view.importance[2, :4] = torch.tensor([1.0, 1.0, 1.0, 5.0])
    for quantile, counts in ((0.0, [9, 0, 1]), (0.5, [5, 0, 1]), (0.9, [1, 0, 0]), (1.0, [0, 0, 0])):
        policy = make("threshold", quantile=quantile)
        assert policy.decide(started(policy, view)).count.tolist() == counts, quantile


def test_st3_anneals_both_ways():
    policy = make("st3", k=2, rate=0.2, growth=0.4, least=0.5, horizon=10, stages=3)
    assert policy.layer_groups(6) == [2, 3, 4]
    view = started(policy, random_view([100, 50]))
    for step, factor in ((0, 1.0), (5, 0.75), (10, 0.5), (99, 0.5)):
        view.step.fill_(step)
        decision = policy.decide(view)
        want = [[math.floor(n * share * factor + 1e-6) for n in (100, 50)] for share in (0.8, 0.6, 0.4)]
        assert decision.count.tolist() == want
        # layers 2 | 3 | 4, 5 of six
        assert decision.rate[0].item() == pytest.approx(1 - factor * (0.8 + 0.6 + 0.4 + 0.4) / 4)


def test_st3_options():
    for name, value, error in (
        ("horizon", 0, ValueError),
        ("stages", 1.5, TypeError),
        ("least", 2, ValueError),
        ("growth", -1, ValueError),
    ):
        with pytest.raises(error, match=name):
            policies.get("st3", **{name: value})
    assert not policies.get("st3", rate=0, growth=0, least=1).drops
    assert policies.get("st3", k=5, stages=7).bind(SHAPE).layer_groups(6) == [5]


def test_dycoke_reuses_its_selection_until_attention_moves():
    policy = make("dycoke", rate=0.5, similarity=0.9)
    view = started(policy, random_view([6, 6]))
    first = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]).repeat(2, 1)
    near, far = first.clone(), first.flip(1)
    near[0, 3] = 4.5  # ranked third now, but hardly moved
    steps = [(first, [[0, 1, 2], [0, 1, 2]]), (near, [[0, 1, 2], [0, 1, 2]])]
    steps += [(torch.stack([far[0], first[1]]), [[3, 4, 5], [0, 1, 2]]), (first, [[0, 1, 2], [0, 1, 2]])]
    for step, (importance, want) in enumerate(steps):
        view.step.fill_(step)
        view.importance = importance
        assert select(view, policy.decide(view))[0] == want, step
    cosine = torch.nn.functional.cosine_similarity(first[0], far[0], dim=0).item()
    loose = make("dycoke", rate=0.5, similarity=cosine - 1e-3)
    view = started(loose, view)
    for step, importance in enumerate((first, far)):
        view.step.fill_(step)
        view.importance = importance
        assert select(view, loose.decide(view))[0] == [[0, 1, 2], [0, 1, 2]]


def test_pyramiddrop_is_the_published_pyramid():
    deep = SHAPE.replace(num_layers=32)
    policy = policies.get("pyramiddrop").bind(deep)
    assert (policy.k, policy.layer_groups(32)) == (8, [8, 16, 24])
    view = started(policy, random_view([576, 64, 0]))
    counts = [policy.decide(dataclasses.replace(view, group=group)).count.tolist() for group in range(3)]
    assert counts == [[288, 32, 0], [144, 16, 0], [72, 8, 0]]
    assert policies.get("pyramiddrop", k=31).bind(deep).layer_groups(32) == [31]
    assert not policies.get("pyramiddrop", keep=1.0).drops
    for wrong in ({"keep": 1.5}, {"stages": 0}, {"stages": 1.5}, {"k": 0}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            policies.get("pyramiddrop", **wrong)


def test_layerwise_is_the_closed_form_of_each_group():
    policy = make("layerwise", k=1, groups=2, num_rates=4)
    alone = make("dyrate", k=1, num_rates=4, predictor="closed-form")
    states = [alone.start(torch.tensor([40, 40], dtype=torch.int32)) for _ in range(2)]
    view = started(policy, random_view([40, 40]))
    chosen = set()
    for step in range(6):
        for group in range(2):
            now = random_view([40, 40], seed=10 * step + group, step=step)
            now.mass[:, :, 1] *= 0.3 + step / 4
            got = policy.decide(dataclasses.replace(now, state=view.state, group=group))
            want = alone.decide(dataclasses.replace(now, state=states[group]))
            assert got.rate.tolist() == want.rate.tolist() and got.count.tolist() == want.count.tolist()
            chosen |= set(got.rate.tolist())
    assert len(chosen) > 2
    for wrong in ({"groups": 0}, {"groups": True}, {"num_rates": 0}, {"rates": "poem"}):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            policies.get("layerwise", **wrong)
