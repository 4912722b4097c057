"""Which tokens make a pool, against the rule written down token by token."""

from __future__ import annotations

import math
import random

import pytest
import torch

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
