"""Rows that are dropped in one step and move in the next: between the two they are read through a list, and whoever looks settles them."""

from __future__ import annotations

import copy

import pytest
import torch

from dyrate_kernels.generation.index import below
from dyrate_kernels.generation.kv_store import RowStore

TOKENS = 9


def filled() -> RowStore:
    """Two sequences with 9 and 6 visual tokens in layers 2 and 3, in an order that an earlier step left behind."""
    g = torch.Generator().manual_seed(3)
    store = RowStore(4, [2], shared_rows=False, backend="reference")
    store.start(2, torch.device("cpu"))
    store.reserve_text(4)
    store.reserve_tokens(TOKENS)
    store.token_column[:, :TOKENS] = torch.arange(TOKENS)
    tokens = torch.tensor([[8, 1, 2, 3, 4, 5, 6, 7, 0], [5, 1, 0, 3, 4, 2, -1, -1, -1]])
    group = store.groups[1]
    rows = store.append(group, tokens, tokens >= 0)
    for layer in (2, 3):
        key = torch.randn(2, 1, TOKENS, 4, generator=g)
        store.write(layer, key, -key, rows)
    store.full.bound = TOKENS
    store.full.n_visual.copy_(torch.tensor([9, 6]))
    return store


def live(store: RowStore) -> list:
    """What a layer reads: tokens and keys by sequence, in the order of the tokens."""
    group = store.groups[1]
    found = []
    for sequence in range(store.batch):
        rows = torch.arange(int(group.n_visual[sequence]))
        if group.kept is not None and group.n_kept is not None:
            rows = group.kept[sequence, : int(group.n_kept[sequence])].long()
        token = group.token[sequence, rows]
        found.append((token.sort().values.tolist(), store.buffers(3)[0][sequence, 0, rows[token.argsort()]].tolist()))
    return found


KEPT = torch.tensor([[1, 3, 8, -1], [0, 2, 4, 5]], dtype=torch.int32)


def test_postponed_is_evicted():
    want, store = filled(), filled()
    want.evict(want.groups[1], KEPT)
    group, keys = store.groups[1], store.buffers(3)[0].clone()
    store.expect()
    assert live(store) == live(filled()) and store.held(group).tolist() == [9, 6]
    store.postpone(group, KEPT)
    assert torch.equal(store.buffers(3)[0], keys), "no row has moved"
    assert live(store) == live(want) and torch.equal(group.alive, want.groups[1].alive)
    assert store.held(group).tolist() == [3, 4] and group.n_visual.tolist() == [9, 6]
    assert (group.kept >= 0).sum(1).tolist() == [3, 4]
    store.settle()
    assert group.kept is None and group.n_kept is None and store.held(group).tolist() == group.n_visual.tolist() == [3, 4]
    assert live(store) == live(want)
    for a, b in zip((*store.keys, group.token), (*want.keys, want.groups[1].token), strict=True):
        assert a is b is None or torch.equal(a, b)
    settled = [tensor.clone() for tensor in (*store.buffers(2), group.token)]
    store.settle()
    assert all(map(torch.equal, (*store.buffers(2), group.token), settled)), "there is nothing left to do"


def test_a_step_that_expects_rows_to_wait_moves_none_where_none_does():
    store = filled()
    group = store.groups[1]
    before = [tensor.clone() for tensor in (*store.buffers(2), group.token, group.n_visual)]
    store.expect()
    place = [tensor.data_ptr() for tensor in group.waiting]
    store.settle()
    assert all(map(torch.equal, (*store.buffers(2), group.token, group.n_visual), before))
    store.expect()
    store.postpone(group, KEPT)
    store.expect()  # what waits stays
    assert store.held(group).tolist() == [3, 4]
    assert [tensor.data_ptr() for tensor in group.waiting] == place, "a captured step reads them there"


def test_a_copy_waits_for_itself():
    store = filled()
    store.expect()
    store.postpone(store.groups[1], KEPT)
    twin = copy.deepcopy(store)
    store.settle()
    assert twin.held(twin.groups[1]).tolist() == [3, 4] and twin.groups[1].n_visual.tolist() == [9, 6]
    twin.settle()
    assert live(twin) == live(store)


def test_what_was_postponed_goes_with_a_reset():
    store = filled()
    store.expect()
    store.postpone(store.groups[1], KEPT)
    store.reset()
    store.settle()
    assert store.held(store.groups[1]).tolist() == [0, 0] and below(store.groups[1].n_visual, 3).sum() == 0


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_waits_without_visual_tokens_or_where_rows_are_shared(shared):
    store = RowStore(4, [2], shared_rows=shared, backend="reference")
    store.start(2, torch.device("cpu"))
    if shared:
        store.groups[1].bound = 5
    store.expect()
    assert store.groups[1].waiting is None and store.groups[1].kept is None


@pytest.mark.parametrize("index", [[1, 0], [1, 1], [0], [1, 0, 1]], ids=str)
def test_sequences_are_reordered_while_rows_wait(index):
    store = filled()
    want = filled()
    want.evict(want.groups[1], KEPT)
    wanted = live(want)
    store.expect()
    place = [tensor.data_ptr() for tensor in store.groups[1].waiting]
    store.postpone(store.groups[1], KEPT)
    store.select(torch.tensor(index))
    assert live(store) == [wanted[each] for each in index]
    store.expect()
    assert (place == [tensor.data_ptr() for tensor in store.groups[1].waiting]) == (len(index) == 2)
    store.settle()
    assert live(store) == [wanted[each] for each in index] and store.groups[1].kept is None
