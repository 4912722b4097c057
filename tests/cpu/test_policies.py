"""Policies: every one in the registry through the same checks, then each one's own rule against an independent
computation.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from dyrate_kernels import ops, policies
from dyrate_kernels.policies.base import Decision, ModelShape, Policy, View
from dyrate_kernels.policies.random import mix
from dyrate_kernels.policies.sparsevlm import PUBLISHED, density_peaks
from tests.recycling import cluster, recycle

SHAPE = ModelShape(6, 8, 4, 16, 128, 256, 100)
HEADS = SHAPE.num_heads

# small k and counts, so that the test model has layers and tokens enough
OPTIONS = {"vtw": {}, "depth": {"k": 2, "prune": 0.3, "growth": 0.5}, "schedule": {"kept": [(0, 20), (2, 11), (3, 0)]}}


def make(name: str, **options) -> Policy:
    return policies.get(name, **{**OPTIONS.get(name, {}), **options}).bind(SHAPE)


def random_view(n_visual: list[int], seed: int = 0, step: int = 0, width: int | None = None) -> View:
    generator = torch.Generator().manual_seed(seed)
    batch = len(n_visual)
    width = max(n_visual) if width is None else width
    mass = torch.rand(batch, HEADS, 4, generator=generator)
    importance = torch.rand(batch, width, generator=generator)
    count = torch.tensor(n_visual, dtype=torch.int32)
    importance[torch.arange(width) >= count[:, None]] = 0
    return View(torch.full((batch,), step), mass / mass.sum(-1, keepdim=True), importance, count, None, {})


def started(policy: Policy, view: View) -> View:
    view.state = policy.start(view.n_visual)
    return view


def select(view: View, decision: Decision) -> list[list[list[int]]]:
    """[group][sequence] -> kept tokens."""
    score = view.importance if decision.score is None else decision.score
    counts = decision.count if decision.count.dim() == 2 else decision.count[None]
    out = []
    for count in counts:
        kept, n_kept = ops.select_tokens(score, count.contiguous(), view.n_visual, alive=view.alive)
        out.append([row[:n].tolist() for row, n in zip(kept, n_kept.tolist(), strict=True)])
    return out


# ---- every policy of the registry ----------------------------------------------------------------------------------

every = pytest.mark.parametrize("name", policies.names())


def test_registry_lists_the_published_methods():
    assert set(policies.names()) >= {
        "none",
        "dyrate",
        "fastv",
        "fixed",
        "random",
        "uniform",
        "vtw",
        "depth",
        "schedule",
        "threshold",
        "st3",
        "dycoke",
        "pyramiddrop",
        "layerwise",
        "sparsevlm",
        "aim",
        "recycle",
        "klguard",
    }


ONCE = ("fastv", "vtw", "depth", "pyramiddrop", "sparsevlm", "aim")  # at prefill


@every
def test_when_it_decides(name):
    policy = make(name)
    assert (policy.at_prefill, policy.at_decode) == (name != "none", name != "none" and name not in ONCE)
    assert policy.decides == (name != "none") and policy.name == name
    assert policy.query_rows == {"sparsevlm": "raters", "aim": "pagerank"}.get(name, "last")


@every
def test_counts_are_in_range_and_typed(name):
    policy = make(name)
    groups = len(policy.layer_groups(SHAPE.num_layers))
    for n_visual in ([37, 0, 5, 1], [0, 0], [64]):
        view = started(policy, random_view(n_visual))
        for step in (0, 1, 2, 7):
            view.step.fill_(step)
            decision = policy.decide(view)
            count = decision.count
            assert count.dtype == torch.int32 and tuple(count.shape) in {(len(n_visual),), (groups, len(n_visual))}
            assert bool((count >= 0).all()) and bool((count <= view.n_visual).all())
            assert decision.rate.dtype == torch.float64 and decision.rate.shape == (len(n_visual),)
            assert bool(((decision.rate >= 0) & (decision.rate <= 1)).all())
            if decision.score is not None:
                assert decision.score.shape == view.importance.shape and decision.score.dtype == torch.float32
            if policy.at_decode or step == 0:
                assert int(count.max()) <= policy.kept_bound(max(n_visual))


@every
def test_no_host_sync(no_host_sync, name):
    policy = make(name)
    view = started(policy, random_view([37, 0, 5]))
    view.alive = torch.rand(3, 37, generator=torch.Generator().manual_seed(1)) < 0.5
    with no_host_sync():
        for step in (0, 1, 2):
            view.step.fill_(step)
            policy.decide(view)
            policy.predictor_tensors(view.state)


@every
def test_the_same_twice(name):
    runs = []
    for _ in range(2):
        policy = make(name)
        view = started(policy, random_view([37, 0, 5]))
        chosen = []
        for step in (0, 1, 2):
            view.step.fill_(step)
            chosen.append(select(view, policy.decide(view)))
        runs.append(chosen)
    assert runs[0] == runs[1]


@every
def test_a_row_does_not_depend_on_its_batch(name):
    """Neither on its neighbours, nor on its index, nor on how wide the widest row is."""
    n_visual = [37, 9, 0, 23]
    policy = make(name)
    together = started(policy, random_view(n_visual, width=50))
    alone = []
    for row, n in enumerate(n_visual):
        view = View(
            torch.zeros(1, dtype=torch.int64), together.mass[row : row + 1].clone(),
            together.importance[row : row + 1, :n].clone(),
            torch.tensor([n], dtype=torch.int32), None, {},
        )  # fmt: skip
        alone.append(started(policy, view))
    for step in (0, 1, 2, 3):
        together.step.fill_(step)
        joint = select(together, policy.decide(together))
        for row, view in enumerate(alone):
            view.step.fill_(step)
            assert [group[row] for group in joint] == [group[0] for group in select(view, policy.decide(view))]


@every
def test_rows_at_different_steps(name):
    """Drafted rows: (sequence x position) pairs, each with its own step, decide as the plain steps would, and leave
    no trace.
    """
    policy = make(name)
    if policy.remembers:
        pytest.skip("drafted rows decide by what the last plain step left")
    view = started(policy, random_view([30, 17]))
    policy.decide(view)  # step 0
    plain = []
    for step in (1, 2, 3):
        now = dataclasses.replace(random_view([30, 17], seed=step, step=step), state=view.state)
        plain.append((now, select(now, policy.decide(now))))
    drafts = View(
        torch.tensor([1, 2, 3, 1, 2, 3]),
        torch.stack([now.mass for now, _ in plain], 1).flatten(0, 1),
        torch.stack([now.importance for now, _ in plain], 1).flatten(0, 1),
        view.n_visual.repeat_interleave(3),
        None,
        {key: value.repeat_interleave(3, 0) for key, value in view.state.items()},
    )
    before = {key: value.clone() for key, value in drafts.state.items()}
    joint = select(drafts, policy.decide(drafts))
    for position, (_, chosen) in enumerate(plain):
        for sequence in range(2):
            assert [group[3 * sequence + position] for group in joint] == [group[sequence] for group in chosen]
    for key, value in drafts.state.items():
        assert torch.equal(value, before[key])


@every
def test_state_follows_a_reordering_of_sequences(name):
    policy = make(name)
    view = started(policy, random_view([30, 17, 24]))
    policy.decide(view)
    assert all(isinstance(value, torch.Tensor) and value.shape[0] == 3 for value in view.state.values())
    order = torch.tensor([2, 0, 0])
    later = random_view([30, 17, 24], seed=5, step=2)
    straight = select(later, policy.decide(dataclasses.replace(later, state=copy.deepcopy(view.state))))
    picked = View(
        later.step,
        later.mass[order],
        later.importance[order],
        later.n_visual[order],
        None,
        {k: v[order] for k, v in view.state.items()},
    )
    reordered = select(picked, policy.decide(picked))
    assert reordered == [[group[i] for i in order.tolist()] for group in straight]


@every
def test_only_the_living_are_chosen(name):
    policy = make(name)
    view = started(policy, random_view([40, 12]))
    view.alive = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) < 0.4
    for group in select(view, policy.decide(view)):
        for row, kept in enumerate(group):
            assert all(view.alive[row, token] for token in kept)


@every
def test_decides_outside_of_the_inference_mode_it_began_in(name):
    policy = make(name)
    with torch.inference_mode():
        view = started(policy, random_view([20]))
        policy.decide(view)
    later = random_view([20], seed=1)
    later.state = {key: value.clone() if value.is_inference() else value for key, value in view.state.items()}
    policy.decide(later)
    assert not any(value.requires_grad for value in later.state.values())


@every
@pytest.mark.parametrize("k", [6, 7, 100])
def test_k_beyond_the_model(name, k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 5\] for a model of 6 layers, got {k}"):
        policies.get(name, k=k).bind(SHAPE)


@every
def test_bad_k(name):
    for k in (0, -1):
        with pytest.raises(ValueError, match="k must be at least 1"):
            policies.get(name, k=k)
    for k in (1.5, "3", True, float("nan")):
        with pytest.raises(TypeError, match="k must be an integer"):
            policies.get(name, k=k)


@every
def test_extreme_k(name):
    for k in (1, 5):
        policy = policies.get(name, k=k).bind(SHAPE)
        first = policy.layer_groups(6)
        assert first[0] == k and first == sorted(set(first)) and first[-1] <= 5
        policy.decide(started(policy, random_view([12, 0])))


@every
def test_a_model_of_one_layer(name):
    with pytest.raises(ValueError, match="cannot be pruned"):
        policies.get(name).bind(SHAPE.replace(num_layers=1))


@every
def test_frozen_copied_and_compared(name):
    policy = make(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.k = 2
    assert copy.deepcopy(policy) == policy == make(name)
    assert hash(policy) == hash(make(name))
    assert policies.get(name, k=2) != policies.get(name, k=3)


@pytest.mark.parametrize("name", ["fixed", "fastv", "random", "uniform"])
def test_rates_at_the_edges(name):
    for rate, kept in ((0, 10), (0.0, 10), (1, 0), (1.0, 0), (0.999, 0), (0.5, 5), (0.1, 9), (0.9, 1), (1e-9, 10)):
        policy = make(name, rate=rate)
        view = started(policy, random_view([10, 0]))
        decision = policy.decide(view)
        assert decision.count.tolist() == [kept, 0], rate
        assert policy.kept_bound(10) == max(kept, 1)
        assert policy.kept_bound(0) == 0
        assert policy.drops == (rate > 0)
        assert [len(row) for row in select(view, decision)[0]] == [kept, 0]


@pytest.mark.parametrize("name", ["fixed", "fastv", "random", "uniform"])
def test_bad_rates(name):
    for rate in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
            policies.get(name, rate=rate)
    for rate in ("0.5", None, True, [0.5]):
        with pytest.raises(TypeError, match=r"rate must be a number in \[0, 1\]"):
            policies.get(name, rate=rate)


@pytest.mark.parametrize("name", ["fixed", "fastv", "random", "uniform"])
def test_the_bound_of_a_kept_list_is_what_keep_count_gives(name):
    for n in range(130):
        for rate in (0.0, 0.1, 0.2, 0.3, 0.7, 1 / 3, 0.875, 1.0):
            count = ops.keep_count(torch.tensor([n], dtype=torch.int32), torch.tensor([rate], dtype=torch.float64)).item()
            assert policies.get(name, rate=rate).kept_bound(n) == max(count, min(n, 1))


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="policy must be one of none, dyrate, fastv.*got 'pyramid'"):
        policies.get("pyramid")
    with pytest.raises(ValueError, match="policy must be one of"):
        policies.get(None)
    with pytest.raises(TypeError, match="policy 'fixed' has no option 'ranking'; it has k, rate"):
        policies.get("fixed", ranking="last")
    with pytest.raises(TypeError, match="has no option 'num_layers'"):
        policies.get("depth", num_layers=6)
    assert policies.options("dyrate") == ["k", "predictor", "rates", "num_rates", "spread"]


# ---- one by one ----------------------------------------------------------------------------------------------------


def test_none_keeps_all():
    policy = make("none")
    view = random_view([12, 0, 7])
    assert policy.decide(view).count.tolist() == [12, 0, 7]
    assert not policy.drops


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


def test_a_policy_must_decide():
    @dataclasses.dataclass(frozen=True)
    class Lazy(Policy):
        name = "lazy"

    with pytest.raises(NotImplementedError, match="Lazy must define decide"):
        Lazy().bind(SHAPE).decide(random_view([3]))


# ---- shapes --------------------------------------------------------------------------------------------------------


def test_shape_from_a_config_that_is_no_decoder():
    from transformers import CLIPVisionConfig

    with pytest.raises(ValueError, match="config must describe a text model with an integer"):
        ModelShape.from_config(CLIPVisionConfig())
    with pytest.raises(ValueError, match="config must describe a text model"):
        ModelShape.from_config(object())


def test_shape_reads_dtype():
    from transformers import LlamaConfig

    assert ModelShape.from_config(LlamaConfig()).dtype == torch.float32
    assert ModelShape.from_config(LlamaConfig(dtype="bfloat16")).dtype == torch.bfloat16
    assert ModelShape.from_config(LlamaConfig(dtype=torch.float16)).dtype == torch.float16
    assert ModelShape.from_config(LlamaConfig(dtype="bfloat16"), dtype=torch.float16).dtype == torch.float16


# ---- threshold, st3, dycoke ----------------------------------------------------------------------------------------


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


# ---- policies that decide group by group ------------------------------------------------------------------------------------------------


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
