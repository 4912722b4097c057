"""Decisions from tensors alone, as an engine that owns its cache makes them: no model, no cache, no session."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import policies
from dyrate_kernels.generation.decide import Decider, Measured, Scope, choose
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.policies.base import ModelShape, View
from dyrate_kernels.retention import Retention

SHAPE = ModelShape(6, 4, 2, 8, 32, 64, 100)
TOKENS = torch.tensor([10, 7], dtype=torch.int32)


def measured(batch: int = 2, tokens: int = 10, seed: int = 0) -> Measured:
    draw = torch.Generator().manual_seed(seed)
    mass = torch.rand(batch, 4, 4, generator=draw)
    return Measured(mass / mass.sum(-1, keepdim=True), torch.rand(batch, tokens, generator=draw))


def view_of(found: Measured, state: dict, step: int = 1, alive: torch.Tensor | None = None) -> View:
    return View(torch.full((2,), step), found.mass, found.importance, TOKENS, alive, state)


def highest(importance: torch.Tensor, count: int, of: list[int]) -> list[int]:
    return sorted(sorted(of, key=lambda token: -float(importance[token]))[:count])


def test_the_most_important_tokens_are_chosen():
    policy, found = policies.Fixed(k=2, rate=0.5).bind(SHAPE), measured()
    choice = choose(policy, view_of(found, {}), Scope(None, [None]))
    ((kept, n_kept),) = choice.lists
    assert n_kept.tolist() == [5, 3] and choice.rate.tolist() == [0.5, 0.5]
    for row, (count, total) in enumerate(((5, 10), (3, 7))):
        assert kept[row, :count].tolist() == highest(found.importance[row], count, list(range(total)))
        assert (kept[row, count:] == -1).all()


def test_only_what_is_able_and_no_more_than_most():
    policy, found = policies.Fixed(k=2, rate=0.5).bind(SHAPE), measured()
    able = torch.zeros(2, 10, dtype=torch.bool)
    able[:, 2:6] = True
    ((kept, n_kept),) = choose(policy, view_of(found, {}), Scope(able, [able], [torch.tensor([2, 9], dtype=torch.int32)])).lists
    assert n_kept.tolist() == [2, 3] and kept[0, :2].tolist() == highest(found.importance[0], 2, [2, 3, 4, 5])


def test_a_policy_that_keeps_a_state_changes_it_in_place():
    policy = policies.DyRate(k=2).bind(SHAPE)
    state = policy.start(TOKENS)
    before = state["first_mass"].clone()
    choose(policy, view_of(measured(), state, step=0), Scope(None, [None]))
    assert not torch.equal(state["first_mass"], before)


def test_groups_that_differ_get_a_list_each():
    policy = policies.Depth(k=2).bind(SHAPE)
    groups = len(policy.layer_groups(SHAPE.num_layers))
    choice = choose(policy, view_of(measured(), policy.start(TOKENS)), Scope(None, [None] * groups))
    assert groups > 1 and len(choice.lists) == groups


def test_nothing_is_selected_where_nothing_is_asked_for():
    assert choose(policies.Fixed(k=2, rate=0.5).bind(SHAPE), view_of(measured(), {}), Scope(None, [])).lists == []


@pytest.mark.parametrize(
    ("policy", "layers"),
    [(policies.Fixed(k=2, rate=0.5), [1]), (policies.Depth(k=2), [1]), (policies.PyramidDrop(k=2, stages=3), [1, 2, 4])],
)
def test_stages_are_where_a_policy_measures(policy, layers):
    decider = Decider(policy.bind(SHAPE), SHAPE.num_layers, Retention(), "reference")
    starts = decider.starts
    expected = [start - 1 for start in starts] if policy.rescores else [starts[0] - 1]
    assert [*decider.stages] == expected and len(expected) == len(layers)
    assert [stage.last for stage in decider.stages.values()] == [False] * (len(expected) - 1) + [True]
    assert [group for stage in decider.stages.values() for group in stage.groups] == [*range(1, len(starts) + 1)]


@pytest.mark.parametrize("evict", [False, True])
def test_a_later_stage_chooses_among_what_the_one_before_kept(evict):
    retention = Retention("evict" if evict else "recoverable")
    decider = Decider(policies.PyramidDrop(k=2, stages=2).bind(SHAPE), SHAPE.num_layers, retention, "reference")
    store = RowStore(SHAPE.num_layers, decider.starts, shared_rows=not evict, backend="reference")
    store.start(2, torch.device("cpu"))
    store.reserve_tokens(10)
    store.full.n_visual.copy_(TOKENS)
    first, second = decider.stages.values()
    if evict:
        for group in store.groups[1:]:
            group.alive[:, :8] = True
            group.n_visual.fill_(8)
        store.groups[1].alive[:, 3:] = False
    else:
        store.groups[1].kept, store.groups[1].n_kept = torch.tensor([[0, 1, 2], [0, 2, -1]], dtype=torch.int32), torch.tensor([3, 2])
    scope = decider.scope_of_step(store, second)
    found = measured(tokens=store.full.capacity)
    ((kept, n_kept),) = decider.decide(second, torch.ones(2, dtype=torch.int64), found, store.full.n_visual, scope).lists
    chosen = [row[:count].tolist() for row, count in zip(kept, n_kept.tolist(), strict=True)]
    assert all(set(row) <= {0, 1, 2} for row in chosen) and any(chosen)
    assert decider.scope_of_step(store, first).alive is None or evict


def test_drafts_decide_as_if_each_had_come_alone():
    """Also for a policy that remembers: rewound, the state is what it was before the drafts that were refused."""
    for policy in (policies.Fixed(k=2, rate=0.5), policies.DyCoke(k=2), policies.Recycle(policy=policies.FastV(k=2, rate=0.5))):
        decider = Decider(policy.bind(SHAPE), SHAPE.num_layers, Retention(), "reference")
        (stage,) = decider.stages.values()
        each = [measured(seed=seed) for seed in range(3)]
        drafts = Measured(*(torch.stack([getattr(one, name) for one in each], 1) for name in ("mass", "importance")))
        decider.state = decider.policy.start(TOKENS)
        decider.decide(stage, torch.zeros(2, dtype=torch.int64), measured(seed=9), TOKENS, Scope(None, [None]))
        state = {name: tensor.clone() for name, tensor in decider.state.items()}
        together = decider.decide_drafts(stage, 1, drafts, TOKENS, None)
        decider.rewind(2)
        after_one = {name: tensor.clone() for name, tensor in decider.state.items()}
        decider.state = state
        for place, one in enumerate(each):
            alone = decider.decide(stage, torch.full((2,), place + 1), one, TOKENS, Scope(None, [None]))
            assert torch.equal(together.lists[0][0][:, place], alone.lists[0][0]) and torch.equal(together.rate[:, place], alone.rate)
            if place == 0 and decider.policy.remembers:
                assert all(torch.equal(after_one[name], tensor) for name, tensor in decider.state.items())
