"""Which tokens make a pool, against the rule written down token by token."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.pool import members, pictures


def by_hand(score: list[float], picture: list[int], fraction: float, share: float) -> set[int]:
    chosen: set[int] = set()
    for number in {*picture} - {-1}:
        tokens = [token for token, of in enumerate(picture) if of == number]
        n = len(tokens)
        wanted = min(max(math.floor(fraction * n + 0.5 + 1e-6), 1), n)
        even = math.floor(share * wanted + 1e-6)
        spaced = [token for i, token in enumerate(tokens) if (i + 1) * even // n > i * even // n]
        rest = [token for token in tokens if token not in spaced]
        rest.sort(key=lambda token: (math.isnan(score[token]), 0.0 if math.isnan(score[token]) else -score[token], token))
        chosen |= {*spaced, *rest[: wanted - even]}
    return chosen


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("fraction", [1e-9, 0.15, 0.29, 0.5, 1.0])
def test_members(fraction, share):
    draw = random.Random(f"{fraction} {share}")
    score, picture = [], []
    for _ in range(20):
        sizes = [draw.choice([1, 1, 2, 3, 10, 50]) for _ in range(draw.randint(1, 4))]
        row = [-1] * draw.randint(0, 3) + [number for number, size in enumerate(sizes) for _ in range(size)]
        picture.append((row + [-1] * 220)[:220])
        odd = [math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, 0.5]
        score.append([draw.choice(odd) if draw.random() < 0.3 else draw.random() for _ in range(220)])
    found = members(torch.tensor(score, dtype=torch.float64), torch.tensor(picture), fraction, share)
    for got, want in zip(found, (by_hand(*each, fraction, share) for each in zip(score, picture, strict=True)), strict=True):
        assert {*got.nonzero()[:, 0].tolist()} == want


def test_a_picture_is_a_run_of_adjacent_columns():
    column = torch.tensor([[2, 3, 4, 9, 10, 20, 0, 0], [1, 3, 5, 6, 7, 8, 9, 10]])
    new = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert pictures(column, new).tolist() == [[0, 0, 0, 1, 1, 2, -1, -1], [-1, -1, -1, 0, 0, 0, 0, 0]]


def test_no_token_at_all():
    nothing = torch.zeros(2, 0)
    picture = pictures(nothing.int(), nothing.bool())
    assert members(nothing, picture, 0.5, 0.5).shape == (2, 0)


def test_rows_of_a_pool_are_known_after_tokens_came_and_went():
    store = RowStore(4, [2], shared_rows=False, backend="reference", moves_rows=False)
    store.start(2, torch.device("cpu"))
    store.reserve_tokens(10)
    group, columns = store.groups[1], torch.arange(10).expand(2, -1)
    store.add_tokens(columns, columns)
    store.full.n_visual.fill_(10)
    for first, last, picks in ((0, 6, ([0, 3, 5], [1, 2])), (6, 10, ([6, 9], [7, 8]))):
        marks = torch.stack([torch.isin(columns[0, first:last], torch.tensor(each)) for each in picks])
        store.append(group, columns[:, first:last], marks)
    assert group.row[:, :10].tolist() == [[0, -1, -1, 1, -1, 2, 3, -1, -1, 4], [-1, 0, 1, -1, -1, -1, -1, 2, 3, -1]]
    kept = torch.tensor([[3, 6, -1], [1, 2, 8]], dtype=torch.int32)
    rows = store.rows_of(group, kept)
    assert rows.tolist() == [[1, 3, -1], [0, 1, 3]] and rows.dtype == torch.int32
    group.kept = rows
    assert [row.nonzero()[:, 0].tolist() for row in store.tokens_kept(group)] == [[3, 6], [1, 2, 8]]
    store.drop_from(6)
    assert group.row[:, :10].tolist() == [[0, -1, -1, 1, -1, 2, -1, -1, -1, -1], [-1, 0, 1, -1, -1, -1, -1, -1, -1, -1]]
    store.reset()
    assert (group.row == -1).all()
