"""A decode step on a CPU: its choices are those of the operators, and what it takes over from the step before still holds."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.generation import passes
from dyrate_kernels.generation.cpu_step import CpuStep
from dyrate_kernels.generation.index import marked
from dyrate_kernels.generation.kv_store import RowStore

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def begun(visual: list[int], text: list[int], shared: bool = True) -> RowStore:
    """A store of two groups whose sequences hold that many rows."""
    store = RowStore(4, [2], shared_rows=shared, backend="reference")
    store.start(len(visual), CPU)
    store.reserve_text(max(text) + 8)
    store.reserve_tokens(max(visual))
    for group in store.groups:
        if not shared:
            store.reserve_visual(group, max(visual))
        group.n_visual.copy_(torch.tensor(visual))
        group.bound = max(visual)
        group.token.copy_(torch.arange(group.capacity))
        if group.alive is not None:
            group.alive.copy_(torch.arange(group.alive.shape[1]) < group.n_visual[:, None])
    store.n_text.copy_(torch.tensor(text))
    store.text_bound = store.length = max(text)
    return store


def step_of(store: RowStore) -> CpuStep:
    """The next decode step."""
    attention = passes.decode(store, torch.tensor([store.length], dtype=torch.int32), False, False).attention
    assert type(attention) is CpuStep
    return attention


def tensors(*rows: list) -> torch.Tensor:
    return torch.tensor(rows)


SCORES = {
    "plain": tensors([0.3, 0.1, 0.4, 0.2, 0.0, 9.0], [0.1, 0.5, 0.2, 0.9, 0.4, 9.0]),
    "ties": tensors([0.5, 0.5, 0.1, 0.5, 0.1, 9.0], [0.0, -0.0, 0.0, -0.0, 0.0, 9.0]),
    "NaN": tensors([0.3, NAN, 0.4, 0.2, 0.0, 9.0], [NAN, NAN, -INF, NAN, NAN, 9.0]),
    "infinite": tensors([INF, -INF, 0.4, -INF, INF, NAN], [-INF, -INF, -INF, 0.1, -INF, NAN]),
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("counts", [[3, 3], [0, 0], [5, 5], [9, 9], [-1, -1], [2, 4]], ids=str)
@pytest.mark.parametrize("totals", [[5, 5], [5, 3], [0, 0]], ids=str)
def test_the_highest_are_those_of_the_operator(score, counts, totals):
    count, n_visual = torch.tensor(counts, dtype=torch.int32), torch.tensor(totals, dtype=torch.int32)
    want = ops.select_tokens(score, count, n_visual, backend="reference")
    with torch.no_grad():
        found = step_of(begun([5, 5], [3, 3])).chosen(score, count, n_visual, None)
    alike = len({*counts}) == len({*totals}) == 1
    if found is None:
        assert not alike or score[:, : max(totals)].isnan().any()
        return
    assert alike and found[0].dtype == found[1].dtype == torch.int32
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_all_that_are_left_are_chosen_again():
    store = begun([5, 3], [3, 3], shared=False)
    alive = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0]]).bool()  # the last one of the second is past its end
    score, n_visual = torch.rand(2, 6), store.full.n_visual
    for wanted in ([3, 2], [5, 2], [3, 2], [2, 2], [3, 1]):
        count = torch.tensor(wanted, dtype=torch.int32)
        want = ops.select_tokens(score, count, n_visual, alive=alive, backend="reference")
        found = step_of(store).chosen(score, count, n_visual, alive)
        if wanted[0] < 3 or wanted[1] < 2:
            assert found is None
            continue
        assert found is not None and torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
        found[0].fill_(7)  # whoever is given the list may write it
    alive[0, 0] = False
    found = step_of(store).chosen(score, torch.tensor([3, 2], dtype=torch.int32), n_visual, alive)
    assert found is not None and found[0][0].tolist() == [2, 3, -1, -1, -1, -1] and found[1].tolist() == [2, 2]


def test_rates_and_counts_are_those_of_the_operators():
    draw = torch.Generator().manual_seed(0)
    store = begun([57, 100], [3, 3])
    rates = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    seen = set()
    for _ in range(30):
        mass, weight = torch.rand(2, 4, 4, generator=draw), torch.randn(5, 16, generator=draw)
        bias = torch.randn(2, 5, generator=draw)
        if len(seen) == 3:
            bias[0] = NAN
            bias[1, :2] = NAN
        want, index = ops.predict_rate(mass, weight, bias, rates, backend="reference")
        found = step_of(store).predicted(mass, weight, bias, rates)
        seen.add(tuple(index.tolist()))
        assert found is not None and torch.equal(found[0], want)
        assert torch.equal(found[1], ops.keep_count(store.full.n_visual, want)) and found[1].dtype == torch.int32
        store.n_text.sub_(1)
    assert len(seen) > 5


@pytest.mark.parametrize("text", [[3, 3], [3, 5]], ids=["alike", "ragged"])
def test_rows_that_are_taken_over_are_those_that_would_be_made(text):
    """Over steps that change what they are made of: counts, lists, one list in place, sequences that change places, rows that go."""
    store = begun([5, 4], text)
    listed, keys = store.groups[1], torch.zeros(2, 1, store.full.capacity + store.text_capacity, 4)
    listed.kept, listed.n_kept = torch.tensor([[0, 2, -1], [1, 2, 3]], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)

    def another_list():
        listed.kept, listed.n_kept = torch.tensor([[1, 4, -1], [0, -1, -1]], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.int32)

    def write_the_list():
        listed.kept[0, 0] = 0

    def shorten_the_list():
        listed.n_kept[0] = 1

    def change_places():
        for tensor in (store.n_text, store.full.n_visual, listed.kept, listed.n_kept):
            tensor.copy_(tensor.flip(0))

    def drop_rows():
        store.n_text.sub_(2)

    def drop_visual_rows():
        store.full.n_visual[0] -= 1

    events = [None, None, another_list, None, write_the_list, shorten_the_list, change_places, drop_rows, None, drop_visual_rows, None]
    taken = 0
    for event in events:
        if event is not None:
            event()
        with torch.no_grad():
            step = step_of(store)
            for group in store.groups:
                before = store.left.get(group.first)
                rows = step._make(group, group.kept, keys, torch.float32, None)
                want = step._made(group, group.kept, keys, torch.float32, None, False)
                assert rows.length == want.length and rows.read is None and torch.equal(rows.mask, want.mask), event
                taken += before is not None and before.rows is rows
        store.length += 1
    assert taken >= 12


def test_nothing_is_taken_over_where_autograd_may_have_kept_it():
    store = begun([5, 4], [3, 3])
    keys = torch.zeros(2, 1, store.full.capacity + store.text_capacity, 4)
    masks = [step_of(store)._make(store.full, None, keys, torch.float32, None).mask for _ in range(2)]
    assert not store.left and not torch.equal(*masks)


def test_new_rows_are_written_where_they_belong_step_by_step():
    """More steps than views are made ahead, buffers that are replaced in between, and sequences that part."""
    store, want = begun([2, 2], [1, 1]), {}
    with torch.no_grad():
        for number in range(40):
            if number == 30:
                store.n_text[0] += 1
            if store.text_bound + 2 >= store.text_capacity or number == 20:
                store.reserve_text(2 * store.text_capacity)
            step = step_of(store)
            key, value = torch.full((2, 3, 1, 4), number + 1.0), torch.full((2, 3, 1, 4), -number - 1.0)
            step.attend(0, key, key, value, 1.0, None)
            want |= {(b, int(row)): number + 1.0 for b, row in enumerate(step.row.flatten())}
            store.length += 1
    keys, values = store.buffers(0)
    for b in range(2):
        for row in range(store.text_capacity):
            expected = want.get((b, row), 0.0)
            assert (keys[b, :, store.full.capacity + row] == expected).all() and (
                values[b, :, store.full.capacity + row] == -expected
            ).all()


@pytest.mark.parametrize("on_host", [True, False])
def test_nothing_moves_where_nothing_goes(monkeypatch, on_host):
    store = begun([5, 4], [3, 3], shared=False)
    group, moved = store.groups[1], []
    store.write(2, torch.rand(2, 1, 2, 4), torch.rand(2, 1, 2, 4), torch.tensor([[0, 1], [0, 1]]))
    monkeypatch.setattr(ops, "trusted", lambda *of: lambda *arguments: moved.append(of[0]))
    kept = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, -1]])
    store.evict(group, kept, on_host)
    assert bool(moved) != on_host
    moved.clear()
    kept[0, 4] = -1
    store.evict(group, kept, on_host)
    assert moved and group.n_visual.tolist() == [4, 4] and torch.equal(group.alive, marked(kept, group.alive.shape[1]))


def test_what_is_prepared_to_move_rows_lasts_until_a_buffer_is_replaced(monkeypatch):
    store, prepared = begun([5], [3], shared=False), []
    store.write(2, torch.rand(1, 1, 2, 4), torch.rand(1, 1, 2, 4), torch.tensor([[0, 1]]))
    monkeypatch.setattr(ops, "trusted", lambda *of: lambda *arguments: prepared.extend(of[3:]))
    for number in range(4):
        if number == 2:
            store.reserve_text(2 * store.text_capacity)
        store.evict(store.groups[1], torch.tensor([[0, 1, 2, 3, 4]]))
    first, second, third, fourth = prepared
    assert first is second and second is not third and third is fourth
