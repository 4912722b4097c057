"""``sparsevlm``: its stages, who rates, and what is merged, each against loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dyrate_kernels import policies
from dyrate_kernels.policies.sparsevlm import PUBLISHED, density_peaks
from tests.policies.kit import SHAPE, make, random_view, select
from tests.recycling import cluster, recycle


def test_sparsevlm_stages_and_counts():
    deep = SHAPE.replace(num_layers=32)
    view = random_view([576, 64, 0])
    for mean, counts in {192: (300, 200, 110), 64: (66, 30, 17)}.items():
        policy = policies.get("sparsevlm", keep=PUBLISHED[mean]).bind(deep)
        assert (policy.k, policy.layer_groups(32)) == (3, [3, 7, 16]) and policy.bind(deep) == policy
        for group, count in enumerate(counts):
            decision = policy.decide(dataclasses.replace(view, group=group))
            assert decision.count.tolist() == [count, count * 64 // 576, 0] and decision.merge is None
        assert policy.kept_bound(576) == counts[0]
    assert [policies.SparseVLM().layer_groups(n) for n in (2, 3, 6, 24, 40)] == [[1], [1, 2], [1, 2, 3], [2, 5, 11], [3, 8, 19]]
    chosen = policies.get("sparsevlm", keep=[0.5, 0.25], layers=[2, 4])
    assert chosen.bind(SHAPE).k == 2 and chosen.layer_groups(6) == [2, 4] and chosen.bind(SHAPE).bind(SHAPE) == chosen.bind(SHAPE)
    default = policies.get("sparsevlm")
    assert default.at_strength(0.5, 6) == default and not default.at_strength(0, 6).drops and default.at_strength(1, 6).keep == (0, 0, 0)
    assert default.merges and not default.at_strength(0, 6).merges
    assert not any(policies.get("sparsevlm", **options).merges for options in ({"recycle": 0}, {"clusters": 0}, {"clusters": 1}))
    for wrong in (
        {"keep": 0.5}, {"keep": [0.5]}, {"keep": []}, {"keep": [0.5, 0.6, 0.1]}, {"keep": [2, 1, 1]}, {"keep": "abc"},
        {"recycle": -1}, {"clusters": 2}, {"layers": [3, 2, 1]}, {"layers": [1, 2]}, {"layers": [0, 2, 3]}, {"layers": [1, 2, 3.5]},
        {"layers": 3}, {"k": 2, "layers": [1, 2, 3]},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            policies.get("sparsevlm", **wrong)
    with pytest.raises(ValueError, match=r"layers must be in \[1, 5\] for a model of 6 layers, got \[2, 4, 6\]"):
        policies.get("sparsevlm", layers=[2, 4, 6]).bind(SHAPE)


def test_sparsevlm_raters(no_host_sync):
    """Ragged, left padded rows against a loop; no picture, no text or one word: nobody rates."""
    generator = torch.Generator().manual_seed(4)
    kinds = ["ssvvvvvvttttt", "ttttttt", "vvv", "svvvt", "vvvtvvvttt"]
    width = 150  # several blocks of rows
    hidden = torch.randn(len(kinds), width, 16, generator=generator)
    hidden[:, : width - 13] = 1e4  # padding
    visual = torch.tensor([[kind == "v" for kind in row.rjust(width)] for row in kinds])
    text = torch.tensor([[kind == "t" for kind in row.rjust(width)] for row in kinds])
    with no_host_sync():
        got = make("sparsevlm").raters(hidden, visual, text)
    want = torch.zeros_like(text)
    for row in range(len(kinds)):
        words, patches = text[row].nonzero()[:, 0].tolist(), visual[row].nonzero()[:, 0].tolist()
        relevance = torch.zeros(len(words), dtype=torch.float64)
        for patch in patches:
            relevance += (hidden[row, words].double() @ hidden[row, patch].double()).softmax(0) / len(patches)
        for word, value in zip(words, relevance.tolist(), strict=True):
            want[row, word] = bool(patches) and value > relevance.mean()
    assert torch.equal(got, want)
    assert [bool(row.any()) for row in want] == [True, False, False, False, True]


@pytest.mark.parametrize("dim", [1, 7])
def test_density_peaks_against_a_loop(dim):
    generator = torch.Generator().manual_seed(dim)
    sizes, counts = [23, 9, 5, 4, 1, 0], [4, 3, 1, 4, 1, 0]
    states = torch.randn(len(sizes), 23, dim, generator=generator)
    real = torch.arange(23) < torch.tensor(sizes)[:, None]
    states[~real] = float("nan")
    nearest, peak = density_peaks(states, real, torch.tensor(counts), 4)
    for row, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        want = cluster({i: states[row, i].double().tolist() for i in range(size)}, count)
        assert {i: nearest[row, i].item() for i in range(size)} == want
        assert peak[row].nonzero()[:, 0].tolist() == sorted({*want.values()}) and len({*want.values()}) == count


def test_density_peaks_break_ties_by_index():
    same = torch.ones(1, 6, 3)
    nearest, peak = density_peaks(same, torch.ones(1, 6, dtype=torch.bool), torch.tensor([2]), 2)
    assert peak[0].tolist() == [True, True, False, False, False, False] and nearest[0].tolist() == [0, 1, 0, 0, 0, 0]
    pairs = torch.tensor([[0.0, 8.0, 0.0, 8.0, 4.0]])[:, :, None]  # two equally dense places and a point half way
    nearest, peak = density_peaks(pairs, torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]), 2)
    assert nearest[0].tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("options", [{}, {"recycle": 1.0, "clusters": 0.3}, {"recycle": 0.5, "clusters": 1e-3}, {"recycle": 0.01}], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_sparsevlm_recycling_against_a_loop(no_host_sync, options, ties):
    policy = make("sparsevlm", keep=[0.6, 0.3, 0.1], **options)
    generator = torch.Generator().manual_seed(8)
    n_visual = [60, 0, 33, 1, 48]
    view = random_view(n_visual, width=64)
    if ties:
        view.importance = (view.importance * 4).round() / 8
    view.visual = torch.randn(5, 64, 6, generator=generator)
    view.mergeable = torch.ones(5, 64, dtype=torch.bool)
    view.mergeable[4, :30] = False  # of an earlier turn
    alive = torch.rand(5, 64, generator=generator) < 0.8
    merged = 0
    for group, alive_now in ((0, None), (0, alive), (1, alive), (2, alive)):
        view.alive, view.group = alive_now, group
        with no_host_sync():
            decision = policy.decide(view)
        assert decision.merge.dtype == torch.int64 and decision.merge.shape == view.importance.shape
        for row, (n, kept) in enumerate(zip(n_visual, select(view, decision)[0], strict=True)):
            able = [t for t in range(n) if alive_now is None or alive[row, t]]
            rating = {t: view.importance[row, t].item() for t in able}
            states = {t: view.visual[row, t].double().tolist() for t in able if view.mergeable[row, t]}
            want, parts = recycle(rating, math.floor(n * policy.keep[group] + 1e-6), states, policy.recycle, policy.clusters)
            assert kept == want and len(kept) == min(decision.count[row].item(), len(able))
            assert decision.merge[row].tolist() == [parts.get(t, -1) for t in range(64)]
            merged += sum(part != t for t, part in parts.items())
    assert merged > 5 or options.get("recycle") == 0.01
