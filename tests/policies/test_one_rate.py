"""Policies of one fixed rate: ``none``, ``fixed``, ``fastv``, ``uniform``, ``random``, each against an independent computation."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from dyrate_kernels import ops, policies
from dyrate_kernels.policies.base import constant_count
from dyrate_kernels.policies.random import mix
from tests.policies.kit import make, random_view, select, started


def test_none_keeps_all():
    policy = make("none")
    view = random_view([12, 0, 7])
    assert policy.decide(view).count.tolist() == [12, 0, 7]
    assert not policy.drops


def test_the_count_of_one_rate_is_keep_counts():
    n_visual = torch.arange(3000, dtype=torch.int32)
    for rate in (0, 1, 0.1, 0.3, 0.875, 0.9, 1 / 3, 0.999999, 1e-9, Fraction(7, 10), torch.rand(()).item()):
        expected = ops.keep_count(n_visual, torch.full((3000,), float(rate), dtype=torch.float64))
        found = constant_count(rate, n_visual)
        assert torch.equal(found, expected) and found.dtype == expected.dtype


def test_fixed_ranks_by_each_steps_importance():
    policy = make("fixed", rate=0.75)
    for seed in range(3):
        view = random_view([16], seed=seed, step=seed)
        best = sorted(sorted(range(16), key=lambda i: (-view.importance[0, i].item(), i))[:4])
        assert select(view, policy.decide(view)) == [[best]]


def test_fastv_rankings():
    assert make("fastv").query_rows == "last"
    assert make("fastv", ranking="mean").query_rows == "mean"
    for wrong in ("max", None, ["last"]):
        with pytest.raises(ValueError, match="ranking must be one of 'last', 'mean'"):
            policies.get("fastv", ranking=wrong)


def test_uniform_is_evenly_spaced():
    for n in (1, 2, 7, 12, 57):
        for rate in (0.0, 0.25, 0.5, 0.9, 1.0):
            policy = make("uniform", rate=rate)
            view = random_view([n], width=60)
            count = math.floor(n * (1 - rate) + 1e-6)
            expected = [i for i in range(n) if math.floor(Fraction((i + 1) * count, n)) > math.floor(Fraction(i * count, n))]
            assert len(expected) == count
            assert select(view, policy.decide(view)) == [[expected]]


def test_uniform_spreads_over_the_living_and_leaves_its_own_choice_alone():
    policy = make("uniform", rate=0.5)
    view = random_view([20])
    first = select(view, policy.decide(view))[0][0]
    view.alive = torch.zeros(1, 20, dtype=torch.bool)
    view.alive[0, first] = True
    assert select(view, policy.decide(view))[0][0] == first
    view.alive = torch.arange(20)[None] >= 8  # 12 left, 10 of them to keep
    chosen = select(view, policy.decide(view))[0][0]
    dropped = sorted(set(range(8, 20)) - set(chosen))
    assert len(chosen) == 10 and dropped == [8, 14]


def test_random_changes_with_step_and_seed_only():
    policy = make("random", rate=0.5)
    view = random_view([64, 64, 40], width=64)
    kept = {}
    for step in range(4):
        view.step.fill_(step)
        rows = select(view, policy.decide(view))[0]
        assert rows[0] == rows[1]
        kept[step] = tuple(rows[0])
        other = random_view([64, 64, 40], seed=9, step=step, width=64)
        assert select(other, policy.decide(other))[0] == rows  # nothing of the model's statistics enters
    assert len(set(kept.values())) == 4
    reseeded = make("random", rate=0.5, seed=1)
    view.step.fill_(0)
    assert tuple(select(view, reseeded.decide(view))[0][0]) != kept[0]


def test_random_is_fair():
    """Over 400 steps every token is kept about half of the time, and neighbours are not kept together."""
    policy = make("random", rate=0.5)
    view = random_view([48], width=48)
    kept = torch.zeros(400, 48)
    for step in range(400):
        view.step.fill_(step)
        kept[step, select(view, policy.decide(view))[0][0]] = 1
    share = kept.mean(0)
    assert 0.4 < share.min() and share.max() < 0.6  # 4 standard deviations of 400 fair draws
    together = (kept[:, 1:] * kept[:, :-1]).mean(0)
    assert 0.14 < together.min() and together.max() < 0.36
    correlation = torch.corrcoef(kept)[~torch.eye(400, dtype=torch.bool)]  # between steps
    assert correlation.abs().mean() < 0.16


def test_random_hash_is_a_bijection_of_words():
    words = torch.arange(1 << 16) * 65521
    hashed = mix(words)
    assert hashed.unique().numel() == words.numel()
    assert int(hashed.min()) >= 0 and int(hashed.max()) < 2**32

    def reference(x: int) -> int:
        for _ in range(2):
            x = (x ^ (x >> 16)) * 0x45D9F3B % 2**32
        return x ^ (x >> 16)

    picks = [0, 1, 77, 65535]
    assert hashed[picks].tolist() == [reference(int(words[i]) % 2**32) for i in picks]


def test_random_seed_is_checked():
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed must be in"):
            policies.get("random", seed=seed)
    for seed in (0.5, "1", True, None):
        with pytest.raises(TypeError, match="seed must be an integer"):
            policies.get("random", seed=seed)
    policy = make("random", seed=2**32 - 1)
    policy.decide(started(policy, random_view([4])))
