"""predict_rate, keep_count and select_tokens against the loops of ``spec``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_kernels import ops
from tests.ops import spec

SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 1e-45, 3.4e38, math.inf, -math.inf, math.nan, 0.1])
quick = settings(deadline=None, max_examples=150)


@st.composite
def selections(draw):
    tokens, batch = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    rows = [[draw(SCORES) for _ in range(tokens)] for _ in range(batch)]
    counts = [draw(st.integers(-2, tokens + 2)) for _ in range(batch)]
    lengths = [draw(st.integers(0, tokens)) for _ in range(batch)]
    alive = [[draw(st.booleans()) for _ in range(tokens)] for _ in range(batch)] if draw(st.booleans()) else None
    return tokens, rows, counts, lengths, alive


@quick
@given(selections(), st.sampled_from([torch.float32, torch.float64]))
def test_select_tokens(case, dtype):
    tokens, rows, counts, lengths, alive = case
    score = torch.tensor(rows, dtype=dtype).reshape(len(rows), tokens)
    mask = None if alive is None else torch.tensor(alive, dtype=torch.bool).reshape(len(rows), tokens)
    kept, n_kept = ops.select_tokens(score, torch.tensor(counts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), alive=mask)
    assert kept.shape == (len(rows), tokens) and kept.dtype == n_kept.dtype == torch.int32
    for b in range(len(rows)):
        want = spec.select(score[b].tolist(), counts[b], lengths[b], None if alive is None else alive[b])
        assert n_kept[b] == len(want)
        assert kept[b].tolist() == want + [-1] * (tokens - len(want))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_select_tokens_large(dtype):
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 50, (4, 2880), generator=g).to(dtype)  # many ties
    counts, lengths = [360, 2880, 0, 17], [2880, 2000, 2880, 30]
    kept, n_kept = ops.select_tokens(score, torch.tensor(counts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))
    for b in range(4):
        assert kept[b, : n_kept[b]].tolist() == spec.select(score[b].tolist(), counts[b], lengths[b])


def test_zeros_of_either_sign_are_ties():
    score = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    for count, want in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2])):
        kept, _ = ops.select_tokens(score, torch.tensor([count], dtype=torch.int32), torch.tensor([5], dtype=torch.int32))
        assert kept[0, :count].tolist() == want


@quick
@given(st.integers(0, 3000), st.floats(0, 1) | st.sampled_from([0.9, 0.1, 1 / 3, 2 / 3, 1.0, 0.0, math.nan, -1.0, 7.0]))
def test_keep_count(n, rate):
    got = ops.keep_count(torch.tensor([n], dtype=torch.int32), torch.tensor([rate], dtype=torch.float64))
    assert got.dtype == torch.int32
    assert got.item() == spec.keep_count(n, rate)


def test_keep_count_survives_rounding():
    for n in range(0, 1001, 10):
        for tenths in range(11):
            got = ops.keep_count(torch.tensor([n], dtype=torch.int32), torch.tensor([tenths / 10], dtype=torch.float64))
            assert got.item() == n * (10 - tenths) // 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias_kind", ["shared", "per sequence", "expanded"])
def test_predict_rate(dtype, bias_kind):
    g = torch.Generator().manual_seed(2)
    mass = torch.rand(50, 3, 4, generator=g, dtype=dtype)
    weight = torch.randn(6, 12, generator=g, dtype=dtype)
    bias = torch.randn(50, 6, generator=g, dtype=dtype) if bias_kind == "per sequence" else torch.randn(6, generator=g, dtype=dtype)
    if bias_kind == "expanded":
        bias = bias.expand(50, 6)
    rates = torch.linspace(0, 1, 6, dtype=torch.float64)
    rate, index = ops.predict_rate(mass, weight, bias, rates)
    assert index.tolist() == spec.predict(mass, weight, bias)
    assert rate.dtype == torch.float64 and torch.equal(rate, rates[index])


def test_predict_rate_ties_and_nan():
    rates = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    mass = torch.zeros(1, 1, 4)
    nan, inf = math.nan, math.inf
    for bias, want in (
        ([1, 1, 0], 0), ([0, 2, 2], 1), ([nan, 0, 1], 2), ([nan, nan, -5], 2), ([nan, -inf, nan], 1), ([nan] * 3, 0), ([nan, inf, inf], 1),
        ([0.0, -0.0, -1], 0), ([-0.0, 0.0, -1], 0),
    ):  # fmt: skip
        _, index = ops.predict_rate(mass, torch.zeros(3, 4), torch.tensor(bias, dtype=torch.float32), rates)
        assert index.item() == want, bias


def test_no_host_sync(no_host_sync):
    score, count = torch.rand(3, 40), torch.full((3,), 9, dtype=torch.int32)
    lengths = torch.full((3,), 40, dtype=torch.int32)
    with no_host_sync():
        ops.select_tokens(score, count, lengths)
        ops.keep_count(lengths, torch.full((3,), 0.5, dtype=torch.float64))
        ops.predict_rate(torch.rand(3, 2, 4), torch.randn(4, 8), torch.randn(4), torch.zeros(4, dtype=torch.float64))


def test_bad_arguments_are_named():
    score, n = torch.rand(2, 5), torch.full((2,), 3, dtype=torch.int32)
    rates = torch.zeros(3, dtype=torch.float64)
    mass, weight, bias = torch.rand(2, 2, 4), torch.rand(3, 8), torch.rand(3)
    calls = [
        ("score", ValueError, lambda: ops.select_tokens(score[0], n, n)),
        ("score", TypeError, lambda: ops.select_tokens(score.int(), n, n)),
        ("count", TypeError, lambda: ops.select_tokens(score, n.long(), n)),
        ("count", TypeError, lambda: ops.select_tokens(score, 3, n)),
        ("n_visual", ValueError, lambda: ops.select_tokens(score, n, n[:1])),
        ("alive", ValueError, lambda: ops.select_tokens(score, n, n, alive=torch.ones(2, 4, dtype=torch.bool))),
        ("alive", TypeError, lambda: ops.select_tokens(score, n, n, alive=torch.ones(2, 5))),
        ("mass", ValueError, lambda: ops.predict_rate(torch.rand(2, 2, 3), weight, bias, rates)),
        ("weight", ValueError, lambda: ops.predict_rate(mass, torch.rand(3, 7), bias, rates)),
        ("bias", ValueError, lambda: ops.predict_rate(mass, weight, torch.rand(4), rates)),
        ("bias", ValueError, lambda: ops.predict_rate(mass, weight, torch.rand(3, 3), rates)),
        ("rates", TypeError, lambda: ops.predict_rate(mass, weight, bias, rates.float())),
        ("rate", ValueError, lambda: ops.keep_count(n, torch.zeros(3, dtype=torch.float64))),
    ]
    for name, error, call in calls:
        with pytest.raises(error, match=name):
            call()
