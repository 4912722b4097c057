"""predict_rate, select_tokens and decode_step in Triton against the loops of tests/ops/spec.py and the reference backend."""

from __future__ import annotations

import math

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.triton_kernels import backend, plan
from tests.interpreter import harness
from tests.ops import spec

SPECIAL = [0.0, -0.0, 1.0, 1.5, -2.0, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 0.1]


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def check_selection(score, counts, lengths, alive=None):
    kept, n_kept = harness.run("select_tokens", score, int32(counts), int32(lengths), alive=alive)
    tokens = score.shape[1]
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        want = spec.select(score[b].tolist(), count, length, None if alive is None else alive[b].tolist())
        assert n_kept[b] == len(want)
        assert kept[b].tolist() == want + [-1] * (tokens - len(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 13, 64])
def test_select_special_scores(tokens, dtype):
    g = torch.Generator().manual_seed(tokens)
    for trial in range(3):
        score = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(0, len(SPECIAL), (4, tokens), generator=g)].to(dtype)
        lengths = torch.randint(0, tokens + 1, (4,), generator=g).tolist()
        alive = torch.rand(4, tokens, generator=g) < 0.6 if trial else None
        with harness.settings():
            check_selection(score, [-1, tokens // 3, tokens // 2 + 1, tokens + 5], lengths, alive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_select_close_scores(dtype):
    """Scores that differ in their last bit only, so that every pass of the radix matters."""
    g = torch.Generator().manual_seed(0)
    base = torch.tensor([1.0, -1.0, 1e-30], dtype=dtype)[torch.randint(0, 3, (3, 90), generator=g)]
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    score = (base.view(bits) + torch.randint(0, 5, (3, 90), generator=g)).view(dtype)
    with harness.settings():
        check_selection(score, [30, 45, 89], [90, 80, 90])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_select_zeros_of_either_sign_tie(dtype):
    """The earlier token wins, whichever sign its zero has."""
    score = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 2.0, 0.0], [0.0, -0.0, -0.0, 0.0, -3.0, -0.0]], dtype=dtype)
    for count in range(1, 6):
        with harness.settings():
            check_selection(score, [count, count], [6, 6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alive", [False, True], ids=["all", "some"])
def test_select_scores_that_share_their_highest_bits(dtype, alive):
    """The search starts at the first bit in which candidates differ, even or odd; tokens that cannot be chosen have no say."""
    width, integer = (32, torch.int32) if dtype == torch.float32 else (64, torch.int64)
    g = torch.Generator().manual_seed(7)
    places = torch.tensor([0, 1, 2, 3, 10, 11, width - 13, width - 12, width - 2, width - 1])
    flips = torch.randint(0, 2, (len(places), 21), generator=g).to(integer) << places[:, None].to(integer)
    low = torch.arange(21).to(integer) % 4 * (places[:, None] > 1)
    score = (torch.ones((), dtype=dtype).view(integer) ^ flips ^ low.to(integer)).view(dtype)
    chosen = torch.rand(len(places), 21, generator=g) < 0.7 if alive else None
    if alive:
        score[~chosen] = math.inf  # the highest of all, if they were asked
    for count in (0, 7, 20):
        with harness.settings():
            check_selection(score, [count] * len(places), [21, 21, 13, 20, 21] * 2, chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_select_among_equal_scores(dtype):
    """Every candidate at the threshold: the first ones stay; also with one token above, below, or no number."""
    pairs = [(value, other) for value in (0.0, 1e-45, -1.0, math.inf, -math.inf, math.nan) for other in (value, 2.0, -2.0, math.nan)]
    score = torch.tensor([[value] * 9 + [other] + [value] * 7 for value, other in pairs], dtype=torch.float64).to(dtype)
    for count in (0, 1, 9, 17) if harness.FULL or dtype == torch.float32 else (9,):
        with harness.settings():
            check_selection(score, [count] * len(pairs), [17, 17, 16] * (len(pairs) // 3))


def test_select_every_count():
    """Counts from none to all of them, so that every round of the search ends one of them."""
    score = torch.softmax(3 * torch.randn(1, 35, generator=torch.Generator().manual_seed(11)), 1).expand(36, -1)
    with harness.settings():
        check_selection(score, list(range(36)), [35] * 36)


def test_select_in_chunks(monkeypatch):
    """Rows longer than what one pass holds; the limit is lowered so that the interpreter can follow."""
    whole = plan.select
    monkeypatch.setattr(backend.plan, "select", lambda tokens, largest=0: whole(tokens, 16))
    g = torch.Generator().manual_seed(1)
    for tokens in (17, 48, 70):
        score = torch.randint(0, 9, (3, tokens), generator=g).float()
        with harness.settings():
            check_selection(score, [tokens // 2, 3, tokens], [tokens, tokens - 1, 16], torch.rand(3, tokens, generator=g) < 0.8)


@pytest.mark.slow
def test_select_16384_tokens():  # in two chunks
    score = torch.randint(0, 3000, (1, 16384), generator=torch.Generator().manual_seed(2)).float()
    with harness.settings():
        check_selection(score, [4097], [16300])


def test_select_strided_scores():
    score = torch.randn(2, 33, generator=torch.Generator().manual_seed(3))
    with harness.settings():
        straight = harness.run("select_tokens", score, int32([9, 4]), int32([33, 20]))
        other = harness.run("select_tokens", torch.stack([score, -score], 2)[:, :, 0], int32([9, 4]), int32([33, 20]))
    assert harness.same(straight[0], other[0])


@pytest.mark.parametrize("classes", [1, 2, 5, 10])
def test_predict_rate(classes):
    g = torch.Generator().manual_seed(classes)
    mass = torch.rand(4, 3, 4, generator=g)
    weight, bias = torch.randn(classes, 12, generator=g), torch.randn(4, classes, generator=g)
    rates = torch.linspace(0, 1, classes, dtype=torch.float64)
    for offset in (bias, bias[0], bias[:1].expand(4, -1)):
        with harness.settings():
            rate, index = harness.run("predict_rate", mass, weight, offset, rates)
        assert index.tolist() == spec.predict(mass, weight, offset)
        assert torch.equal(rate, rates[index])


def test_predict_rate_ties_and_nan():
    mass = torch.ones(5, 1, 4)
    weight = torch.zeros(3, 4)
    nan, inf = math.nan, math.inf
    bias = torch.tensor([[1.0, 1.0, 0.0], [nan, -inf, nan], [nan, nan, nan], [-0.0, 0.0, 0.0], [-inf, inf, inf]])
    with harness.settings():
        _, index = harness.run("predict_rate", mass, weight, bias, torch.zeros(3, dtype=torch.float64))
    assert index.tolist() == [0, 1, 0, 0, 1]


STEPS = [
    # batch, heads, kv_heads, dim, visual capacity, text capacity, visual lengths, text lengths
    (3, 2, 2, 8, 40, 9, [40, 7, 0], [9, 1, 5]),
    (2, 7, 1, 5, 33, 3, [0, 33], [1, 2]),
    (2, 4, 2, 16, 64, 20, [64, 50], [20, 1]),
]
DECISIONS = dict(zip(plan.DECISIONS, (harness.SMALL, harness.TWO_LAUNCHES, harness.APART), strict=True))


def check_step(arguments, **how):
    got = harness.run("decode_step", **arguments, **how)
    want = ops.decode_step(**arguments, **how, backend="reference")
    for name, value, expected in zip(got._fields, got, want, strict=True):
        if value.dtype == torch.int32:
            assert torch.equal(value, expected), f"{name}: {value} instead of {expected}"
        else:
            harness.close(value, expected, 1e-12 if name == "rate" else 2e-3 if value.dtype == torch.float16 else 3e-6, name)
    return got


@pytest.mark.parametrize("case, decision", harness.cells(STEPS, list(DECISIONS)), ids=str)
def test_step_with_predictor(case, decision):
    arguments = spec.problem(*case, dtype=torch.float32)
    del arguments["position"], arguments["query_position"]
    heads = case[1]
    g = torch.Generator().manual_seed(5)
    rates = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    for trial in range(2):
        predictor = {
            "weight": 8 * torch.randn(5, heads * 4, generator=g),
            "bias": torch.randn(5, generator=g).expand(case[0], -1) if trial else torch.randn(case[0], 5, generator=g),
            "rates": rates,
        }
        with harness.settings(DECISIONS[decision]):
            check_step(arguments, **predictor)


@pytest.mark.parametrize("chosen", [harness.SMALL, harness.TWO_LAUNCHES], ids=["one launch", "two launches"])
def test_step_rates_just_below_a_whole_token(chosen):
    """40 * (1 - 0.8) is 7.999... in float64 and 10 * (1 - 0.9) is 0.999...: the count is 8 and 1 all the same."""
    arguments = spec.problem(4, 1, 1, 8, 40, 9, [40, 10, 20, 30], [9, 1, 5, 2], dtype=torch.float32)
    del arguments["position"], arguments["query_position"]
    rates = torch.tensor([0.1, 0.4, 0.7, 0.8, 0.9], dtype=torch.float64)
    below = [n for n in (40, 10, 20, 30) for rate in rates.tolist() if int(n * (1 - rate)) != round(n * (1 - rate))]
    assert below, "no rate of this test needs the 1e-6"
    for first in range(5):
        bias = torch.zeros(4, 5)
        for b in range(4):
            bias[b, (first + b) % 5] = 100.0
        with harness.settings(chosen):
            got = check_step(arguments, weight=torch.zeros(5, 4), bias=bias, rates=rates)
        assert got.n_kept.tolist() == [round(n * (1 - rates[(first + b) % 5].item())) for b, n in enumerate((40, 10, 20, 30))]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_step_with_count(case):
    arguments = spec.problem(*case, dtype=torch.float16)
    batch, capacity = case[0], case[4]
    g = torch.Generator().manual_seed(6)
    for how in (
        {"count": int32([capacity // 3] * batch)},
        {"count": int32([0] * batch), "alive": torch.rand(batch, capacity, generator=g) < 0.5},
        {"count": int32([capacity] * batch), "max_kept": int32([5] * batch), "score": torch.rand(batch, capacity, generator=g)},
        {"count": int32([9] * batch), "score": torch.randint(0, 4, (batch, capacity), generator=g).double(), "window": 30},
        {"count": int32([8] * batch), "score": torch.randn(batch, 2 * capacity, generator=g)[:, ::2]},
    ):
        with harness.settings():
            # importance is compared too, so it must be the reference's own when scores are not given: ties within rounding would differ
            score = how.get("score")
            if score is None:
                got = harness.run("decode_step", **arguments, **how)
                kept, n_kept = ops.select_tokens(
                    got.importance, how["count"], arguments["n_visual"], alive=how.get("alive"), backend="reference"
                )
                assert torch.equal(got.kept, kept) and torch.equal(got.n_kept, n_kept)
            else:
                check_step(arguments, **how)


def test_importance_orders_like_the_reference():
    """The list made in the launch is the reference's own selection of the importance that the launch returns."""
    arguments = spec.problem(*STEPS[2], dtype=torch.float32)
    del arguments["position"], arguments["query_position"]
    for count in (0, 1, 17, 64):
        with harness.settings():
            got = harness.run("decode_step", **arguments, count=int32([count] * 2))
        kept, n_kept = ops.select_tokens(got.importance, int32([count] * 2), arguments["n_visual"], backend="reference")
        assert torch.equal(got.kept, kept) and torch.equal(got.n_kept, n_kept)
        assert torch.allclose(got.rate, 1 - n_kept.double() / arguments["n_visual"])


@pytest.mark.parametrize("decision", DECISIONS)
def test_step_in_chunks(decision, monkeypatch):
    """More visual tokens than the selection inside the launch holds at once."""
    whole = plan.select
    monkeypatch.setattr(backend.plan, "select", lambda tokens, largest=0: whole(tokens, 16))
    monkeypatch.setattr(backend, "_attentions", {})
    arguments = spec.problem(*STEPS[0], dtype=torch.float32)
    del arguments["position"], arguments["query_position"]
    score = torch.randint(0, 5, (3, 40), generator=torch.Generator().manual_seed(8)).float()
    with harness.settings(DECISIONS[decision]):
        check_step(arguments, count=int32([19, 7, 3]), score=score)


def test_step_appends():
    arguments = spec.problem(*STEPS[0], dtype=torch.float32)
    del arguments["position"], arguments["query_position"]
    new = {"new_key": torch.randn(3, 2, 8), "new_value": torch.randn(3, 2, 8)}
    with harness.settings():
        got = harness.run("decode_step", **arguments, count=int32([4, 4, 4]), **new)
    want = spec.attention(**arguments)
    harness.close(got.output, want[0], 3e-6, "output")
    for b in range(3):
        assert torch.equal(arguments["key"][b, :, 40 + int(arguments["n_text"][b]) - 1], new["new_key"][b])
