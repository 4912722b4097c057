"""Every policy of the registry through the same checks."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch

from dyrate_kernels import ops, policies
from dyrate_kernels.policies.base import Policy, View
from tests.checks import METHODS
from tests.policies.kit import SHAPE, make, random_view, select, started

METHODS_PAGE = Path(__file__).resolve().parents[2] / "docs/methods/README.md"
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


def when_its_page_says(name):
    """The second column of the table in docs/methods/README.md."""
    rows = re.findall(rf"^\| \[{name}\]\({name}\.md\) \| ([^|]+) \|", METHODS_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 1, f"docs/methods/README.md must have one row `| [{name}]({name}.md) | when it decides | source |`, got {len(rows)}"
    return rows[0]


@every
def test_when_it_decides(name):
    policy = make(name)
    said = when_its_page_says(name)
    when = "never" if not policy.at_prefill else "every step" if policy.at_decode else "once, at the prompt"
    assert said.startswith(when), f"docs/methods/README.md says {said!r} of {name}, whose at_prefill and at_decode say {when!r}"
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


def test_every_method_is_known_to_the_oracle():
    """But those that draw numbers of their own, and those that wrap another policy by its logits (tests/recycling.py)."""
    known = {rule.name for rule in METHODS.values()}
    missing = set(policies.names()) - known - {"random", "recycle", "klguard"}
    assert not missing, f"METHODS of tests/checks.py must hold a rule for {sorted(missing)}, which tests/oracle.py works out once more"
    assert known <= set(policies.names())


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


def test_a_policy_must_decide():
    @dataclasses.dataclass(frozen=True)
    class Lazy(Policy):
        name = "lazy"

    with pytest.raises(NotImplementedError, match="Lazy must define decide"):
        Lazy().bind(SHAPE).decide(random_view([3]))
