"""predict_rate, select_tokens and decode_step in CUDA C++, emulated, against the loops of tests/ops/spec.py and the reference backend."""

from __future__ import annotations

import math

import pytest
import torch

from dyrate_kernels import ops
from tests.emulated import harness
from tests.ops import spec

SPECIAL = [0.0, -0.0, 1.0, 1.5, -2.0, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 0.1]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def check_selection(score, counts, lengths, alive=None):
    kept, n_kept = harness.run("select_tokens", score, int32(counts), int32(lengths), alive=alive)
    tokens = score.shape[1]
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        want = spec.select(score[b].tolist(), count, length, None if alive is None else alive[b].tolist())
        assert n_kept[b] == len(want)
        assert kept[b].tolist() == want + [-1] * (tokens - len(want))


@pytest.mark.parametrize("dtype", harness.some(DTYPES, 2), ids=str)
@pytest.mark.parametrize("tokens", harness.some([513, 1, 13, 255, 256, 257]))
def test_select_special_scores(tokens, dtype):
    g = torch.Generator().manual_seed(tokens)
    for trial in range(3):
        score = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(0, len(SPECIAL), (4, tokens), generator=g)].to(dtype)
        lengths = torch.randint(0, tokens + 1, (4,), generator=g).tolist()
        alive = torch.rand(4, tokens, generator=g) < 0.6 if trial else None
        check_selection(score, [-1, tokens // 3, tokens // 2 + 1, tokens + 5], lengths, alive)


@pytest.mark.parametrize("dtype", harness.some([torch.float32, torch.float64], 2), ids=str)
def test_select_close_scores(dtype):
    """Scores that differ in one byte only, so that every pass of the radix matters."""
    g = torch.Generator().manual_seed(0)
    base = torch.tensor([1.0, -1.0, 1e-30], dtype=dtype)[torch.randint(0, 3, (3, 300), generator=g)]
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    for byte in range(torch.empty((), dtype=dtype).element_size() - 1):
        score = (base.view(bits) + (torch.randint(0, 5, (3, 300), generator=g).to(bits) << 8 * byte)).view(dtype)
        check_selection(score, [100, 150, 299], [300, 270, 300])


@pytest.mark.parametrize("dtype", harness.some(DTYPES), ids=str)
def test_select_zeros_of_either_sign_tie(dtype):
    """The earlier token wins, whichever sign its zero has."""
    score = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 2.0, 0.0], [0.0, -0.0, -0.0, 0.0, -3.0, -0.0]], dtype=dtype)
    for count in range(1, 6):
        check_selection(score, [count, count], [6, 6])


@pytest.mark.parametrize("dtype", harness.some([torch.float32, torch.float64, torch.float16], 2), ids=str)
def test_select_all_equal(dtype):
    """Ties across every warp and every pass of the collection."""
    score = torch.full((4, 700), 0.25, dtype=dtype)
    check_selection(score, [1, 256, 511, 699], [700, 700, 640, 700], torch.rand(4, 700, generator=torch.Generator().manual_seed(1)) < 0.9)


LONG = [(torch.float64, 2049), (torch.float64, 2048), (torch.float32, 4097), (torch.float16, 4096)]


@pytest.mark.parametrize("dtype, tokens", harness.some(LONG), ids=str)
def test_select_more_than_the_cache_holds(dtype, tokens):
    """16 KiB of keys lie in shared memory; longer rows are read again in every pass."""
    score = torch.randint(0, 300, (2, tokens), generator=torch.Generator().manual_seed(2)).to(dtype)
    check_selection(score, [tokens // 3, 7], [tokens, tokens - 1])


def test_select_strided_scores():
    score = torch.randn(2, 33, generator=torch.Generator().manual_seed(3))
    alive = torch.rand(2, 33, generator=torch.Generator().manual_seed(4)) < 0.7
    counts, lengths = int32([9, 4]), int32([33, 20])
    straight = harness.run("select_tokens", score, counts, lengths, alive=alive)
    moved = {
        "score": torch.stack([score, -score], 2)[:, :, 0],
        "count": torch.stack([counts, counts + 1], 1)[:, 0],
        "n_visual": torch.stack([lengths, lengths - 5], 1)[:, 0],
        "alive": torch.stack([alive, ~alive], 2)[:, :, 0],
    }
    other = harness.run("select_tokens", **moved)
    broadcast = harness.run("select_tokens", score[:1].expand(2, -1), counts, lengths, alive=alive[:1].expand(2, -1))
    assert all(harness.same(a, b) for a, b in zip(straight, other, strict=True))
    assert broadcast[0][1].tolist() == spec.select(score[0].tolist(), 4, 20, alive[0].tolist()) + [-1] * 29


@pytest.mark.parametrize("classes", harness.some([9, 1, 2, 5, 10, 40], 1))
def test_predict_rate(classes):
    g = torch.Generator().manual_seed(classes)
    for heads in (3, 40):  # fewer and more features than lanes
        mass = torch.rand(4, heads, 4, generator=g)
        weight, bias = torch.randn(classes, heads * 4, generator=g), torch.randn(4, classes, generator=g)
        rates = torch.linspace(0, 1, classes, dtype=torch.float64)
        for offset in (bias, bias[0], bias[:1].expand(4, -1)):
            rate, index = harness.run("predict_rate", mass, weight, offset, rates)
            assert index.tolist() == spec.predict(mass, weight, offset)
            assert torch.equal(rate, rates[index])


@pytest.mark.parametrize("dtype", harness.some([torch.float16, torch.bfloat16, torch.float64]), ids=str)
def test_predict_rate_dtypes_and_strides(dtype):
    g = torch.Generator().manual_seed(1)
    mass = torch.rand(3, 4, 5, generator=g).to(dtype)[..., :4]
    weight = torch.randn(16, 7, generator=g).to(dtype).t()
    bias = torch.randn(3, 14, generator=g).to(dtype)[:, ::2]
    rates = torch.linspace(0, 1, 14, dtype=torch.float64)[::2]
    rate, index = harness.run("predict_rate", mass, weight, bias, rates)
    assert index.tolist() == spec.predict(mass, weight, bias)
    assert torch.equal(rate, rates[index])


def test_predict_rate_ties_and_nan():
    nan, inf = math.nan, math.inf
    table = [[1.0, 1.0, 0.0], [nan, -inf, nan], [nan, nan, nan], [-0.0, 0.0, 0.0], [-inf, inf, inf], [-1.0, -2.0, -1.0], [nan, nan, -inf]]
    _, index = harness.run("predict_rate", torch.ones(7, 1, 4), torch.zeros(3, 4), torch.tensor(table), torch.zeros(3, dtype=torch.float64))
    assert index.tolist() == [0, 1, 0, 0, 1, 0, 2]


def test_predict_rate_ties_across_warps():
    """Equal logits in classes that different warps look after, and in those that one looks after in turn."""
    bias = torch.full((6, 30), -5.0)
    for b, equal in enumerate([[3, 11, 19], [12, 5], [29, 1], [8, 16, 9], [7, 15], [26, 25, 24]]):
        bias[b, equal] = 2.0
    bias[1, :5] = math.nan
    _, index = harness.run("predict_rate", torch.ones(6, 1, 4), torch.zeros(30, 4), bias, torch.zeros(30, dtype=torch.float64))
    assert index.tolist() == [3, 5, 1, 8, 7, 24]


STEPS = [
    # batch, heads, kv_heads, dim, visual capacity, text capacity, visual lengths, text lengths
    (3, 2, 2, 8, 140, 9, [140, 65, 0], [9, 1, 5]),
    (2, 7, 1, 5, 33, 3, [0, 33], [1, 2]),
    (2, 12, 1, 16, 64, 20, [64, 50], [20, 1]),
    (2, 4, 2, 16, 300, 20, [257, 300], [20, 0]),
]


def step_problem(case, dtype=torch.float32, window=False):
    arguments = spec.problem(*case, dtype=dtype)
    for name in ("key", "value"):
        arguments[name] = harness.spread(arguments[name])
    if not window:
        del arguments["position"], arguments["query_position"]
    return arguments


def check_step(arguments, **how):
    got = harness.run("decode_step", **arguments, **how)
    want = ops.decode_step(**arguments, **how, backend="reference")
    dtype = arguments["query"].dtype
    for name, value, expected in zip(got._fields, got, want, strict=True):
        assert value.dtype == expected.dtype, name
        if value.dtype == torch.int32:
            assert torch.equal(value, expected), f"{name}: {value} instead of {expected}"
        else:
            tolerance = {"output": harness.TOLERANCE[dtype], "rate": 1e-15}.get(name, harness.STATISTICS)
            harness.close(value, expected, tolerance, name)
    return got


@pytest.mark.parametrize("case", harness.some(STEPS), ids=str)
def test_step_with_predictor(case):
    arguments = step_problem(case)
    heads = case[1]
    g = torch.Generator().manual_seed(5)
    rates = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    seen = set()
    for trial in range(3):
        biases = [torch.randn(case[0], 5, generator=g), torch.randn(5, generator=g).expand(case[0], -1), torch.randn(5, generator=g)]
        predictor = {"weight": 8 * torch.randn(5, heads * 4, generator=g), "bias": biases[trial], "rates": rates}
        score = torch.rand(case[0], case[4], generator=g)  # the importance has ties within rounding
        with harness.splits(3, 8):
            got = check_step(arguments, **predictor, score=score)
            seen.update(got.rate.tolist())
            own = harness.run("decode_step", **arguments, **predictor)
        counts = [spec.keep_count(n, rate) for n, rate in zip(case[6], own.rate.tolist(), strict=True)]
        for b, (n, count) in enumerate(zip(case[6], counts, strict=True)):
            want = spec.select(own.importance[b].tolist(), count, n)
            assert own.kept[b].tolist() == want + [-1] * (case[4] - len(want)) and own.n_kept[b] == len(want)
    assert len(seen) > 1, "this test saw one rate only"


def test_step_rates_just_below_a_whole_token():
    """40 * (1 - 0.8) is 7.999... in float64 and 10 * (1 - 0.9) is 0.999...: the count is 8 and 1 all the same."""
    arguments = step_problem((4, 2, 2, 8, 40, 9, [40, 10, 20, 30], [9, 1, 5, 2]))
    rates = torch.tensor([0.1, 0.4, 0.7, 0.8, 0.9], dtype=torch.float64)
    for first in range(5):
        bias = torch.zeros(4, 5)
        for b in range(4):
            bias[b, (first + b) % 5] = 100.0
        with harness.splits(2, 8):
            got = check_step(arguments, weight=torch.zeros(5, 8), bias=bias, rates=rates)
        assert got.n_kept.tolist() == [round(n * (1 - rates[(first + b) % 5].item())) for b, n in enumerate((40, 10, 20, 30))]


def test_step_strange_rates():
    """NaN keeps all, as does a rate below 0; one above 1 keeps none."""
    arguments = step_problem((4, 2, 2, 8, 40, 9, [40, 10, 20, 30], [9, 1, 5, 2]))
    rates = torch.tensor([math.nan, -0.5, 1.5, math.inf], dtype=torch.float64)
    bias = torch.eye(4) * 100
    with harness.splits(2, 8):
        got = harness.run("decode_step", **arguments, weight=torch.zeros(4, 8), bias=bias, rates=rates)
    assert got.n_kept.tolist() == [40, 10, 0, 0]
    assert harness.same(got.rate, rates)


@pytest.mark.parametrize("dtype", harness.some([torch.float16, torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("case", harness.some(STEPS), ids=str)
def test_step_with_count(case, dtype):
    arguments = step_problem(case, dtype, window=True)
    batch, capacity = case[0], case[4]
    g = torch.Generator().manual_seed(6)
    alive = torch.rand(batch, capacity, generator=g) < 0.5
    for how in (
        {"count": int32([capacity // 3] * batch)},
        {"count": int32([0] * batch), "alive": alive},
        {"count": int32([capacity] * batch), "max_kept": int32([5] * batch), "score": torch.rand(batch, capacity, generator=g)},
        {"count": int32([-3, 9, 4][:batch]), "max_kept": int32([2, 9, -1][:batch]), "alive": alive},
        {"count": int32([9] * batch), "score": torch.randint(0, 4, (batch, capacity), generator=g).double(), "window": 30},
        {"count": int32([9] * batch), "score": torch.randn(batch, capacity, generator=g).to(dtype), "alive": alive},
        {"count": int32([8] * batch), "score": torch.randn(batch, 2 * capacity, generator=g)[:, ::2], "alive": alive[:1].expand(batch, -1)},
        {"count": int32([7] * batch), "alive": torch.stack([alive, ~alive], 2)[:, :, 0]},
    ):
        with harness.splits(3, 16):
            if how.get("score") is not None:
                check_step(arguments, **how)
                continue
            # importance is compared too, so it must be the kernel's own: ties within rounding would differ
            got = harness.run("decode_step", **arguments, **how)
            count = how["count"] if "max_kept" not in how else torch.minimum(how["count"], how["max_kept"])
            kept, n_kept = ops.select_tokens(got.importance, count, arguments["n_visual"], alive=how.get("alive"), backend="reference")
            assert torch.equal(got.kept, kept) and torch.equal(got.n_kept, n_kept)
            n = arguments["n_visual"].double()
            assert torch.equal(got.rate, torch.where(n > 0, 1 - n_kept.double() / n.clamp(min=1), 0.0))


def test_step_longer_than_the_cache():
    """More visual tokens than the selection holds in shared memory, for keys of 4 and of 8 bytes."""
    arguments = step_problem((1, 2, 1, 4, 4200, 3, [4190], [2]))
    score = torch.randint(0, 50, (1, 4200), generator=torch.Generator().manual_seed(8))
    for dtype in harness.some([torch.float32, torch.float64]):
        with harness.splits(4, 64):
            check_step(arguments, count=int32([1900]), score=score.to(dtype))


def test_step_with_nan_importance():
    """A NaN logit makes its head's probabilities NaN, and so every importance of the sequence: the earliest tokens stay."""
    arguments = step_problem(STEPS[0])
    arguments["key"][0, 0, 3] = float("nan")
    with harness.splits(3, 16):
        got = check_step(arguments, count=int32([4, 0, 2]))
    assert got.kept[0, :5].tolist() == [0, 1, 2, 3, -1]


def test_step_without_visual_tokens():
    arguments = step_problem((2, 4, 2, 8, 0, 12, [0, 0], [12, 5]))
    predictor = {"weight": torch.zeros(2, 16), "bias": torch.tensor([0.0, 1.0]), "rates": torch.tensor([0.1, 0.7]).double()}
    for how in ({"count": int32([3, 0])}, predictor):
        with harness.splits(2, 4):
            got = check_step(arguments, **how)
        assert got.kept.shape == (2, 0)


@pytest.mark.parametrize("window", [None, 40])
def test_step_appends(window):
    arguments = step_problem(STEPS[0], window=True)
    new = {"new_key": torch.randn(3, 2, 8), "new_value": torch.randn(3, 2, 8)}
    with harness.splits(3, 16):
        got = harness.run("decode_step", **arguments, window=window, count=int32([4, 4, 4]), **new)
    for b in range(3):
        assert torch.equal(arguments["key"][b, :, 140 + int(arguments["n_text"][b]) - 1], new["new_key"][b])
        assert torch.equal(arguments["value"][b, :, 140 + int(arguments["n_text"][b]) - 1], new["new_value"][b])
    want = spec.attention(**arguments, window=window)
    for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=False):
        harness.close(value, expected, harness.STATISTICS, what)


def test_importance_of_a_list_longer_than_a_tile():
    """One block sums 64 columns after the other into memory that it shares."""
    arguments = step_problem((1, 6, 2, 8, 200, 5, [190], [4]))
    kept, n_kept = spec.lists([190], [150], 160)
    got = harness.run("decode_attention", **arguments, kept=kept, n_kept=n_kept, importance=True)
    harness.close(got.importance, spec.attention(**arguments, kept=kept, n_kept=n_kept)[2], harness.STATISTICS, "importance")
