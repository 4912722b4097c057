"""predict_rate, keep_count, select_tokens and what a step decides, on every backend, against the loops of ``spec``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_kernels import ops
from tests.gpu import kit
from tests.gpu.kit import ON_GPU
from tests.ops import attention_problems as made
from tests.ops import spec
from tests.ops.attention_problems import F16, F32, F64
from tests.ops.backends import FULL, INTERPRETED, each, some
from tests.ops.compare import close, same

SPECIAL = [0.0, -0.0, 1.0, 1.5, -2.0, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan, 0.1]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WORDS = [torch.float32, torch.float64]  # of keys of 4 and of 8 bytes
quick = settings(deadline=None, max_examples=150)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


# ---- selection --------------------------------------------------------------------------------------------------------------------


def assert_kept(kept, n_kept, score, counts, lengths, alive=None):
    """The list is the one that a loop over the scores gives, -1 behind it."""
    assert kept.dtype == n_kept.dtype == torch.int32
    for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        want = spec.select(score[b].tolist(), count, length, None if alive is None else alive[b].tolist())
        assert n_kept[b] == len(want), b
        assert kept[b].tolist() == want + [-1] * (kept.shape[1] - len(want)), b


def check_selection(backend, score, counts, lengths, alive=None):
    kept, n_kept = backend.run("select_tokens", score, int32(counts), int32(lengths), alive=alive)
    assert kept.shape == score.shape
    assert_kept(kept, n_kept, score, counts, lengths, alive)


@st.composite
def selections(draw):
    tokens, batch = draw(st.integers(0, 12)), draw(st.integers(1, 3))
    rows = [[draw(st.sampled_from(SPECIAL)) for _ in range(tokens)] for _ in range(batch)]
    counts = [draw(st.integers(-2, tokens + 2)) for _ in range(batch)]
    lengths = [draw(st.integers(0, tokens)) for _ in range(batch)]
    alive = [[draw(st.booleans()) for _ in range(tokens)] for _ in range(batch)] if draw(st.booleans()) else None
    return tokens, rows, counts, lengths, alive


@quick
@given(selections(), st.sampled_from(WORDS))
def test_select_tokens_of_any_scores(case, dtype):
    """In the reference alone: the others have the random calls of tests/differential."""
    tokens, rows, counts, lengths, alive = case
    score = torch.tensor(rows, dtype=dtype).reshape(len(rows), tokens)
    mask = None if alive is None else torch.tensor(alive, dtype=torch.bool).reshape(len(rows), tokens)
    kept, n_kept = ops.select_tokens(score, int32(counts), int32(lengths), alive=mask)
    assert kept.shape == (len(rows), tokens)
    assert_kept(kept, n_kept, score, counts, lengths, alive if alive is None else mask)


TOKENS = [64, 1, 13] if INTERPRETED else [513, 1, 13, 64, 255, 256, 257]


@pytest.mark.parametrize("dtype", some(DTYPES, interpreter=3, detector=2), ids=str)
@pytest.mark.parametrize("tokens", some(TOKENS))
def test_select_tokens_of_special_scores(backend, tokens, dtype):
    g = torch.Generator().manual_seed(tokens)
    for trial in range(3):
        score = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(0, len(SPECIAL), (4, tokens), generator=g)].to(dtype)
        lengths = torch.randint(0, tokens + 1, (4,), generator=g).tolist()
        alive = torch.rand(4, tokens, generator=g) < 0.6 if trial else None
        check_selection(backend, score, [-1, tokens // 3, tokens // 2 + 1, tokens + 5], lengths, alive)


SIZES = (0, 1, 2, 15, 16, 17, 31, 33, 144, 576, 1000, 2880, 4095, 4096, 4097, 8193, 16384) if ON_GPU else (0, 1, 17, 33, 144, 4097)


@pytest.mark.backends("reference", "triton", "cuda")
@pytest.mark.parametrize("kind", ["random", "ties", "special", "equal", "denormal"])
@pytest.mark.parametrize("tokens", SIZES)
def test_select_tokens_of_rows_of_any_length(backend, tokens, kind):
    g = torch.Generator().manual_seed(tokens)
    score = {
        "random": lambda: torch.randn(5, tokens, generator=g),
        "ties": lambda: torch.randint(0, 9, (5, tokens), generator=g).float(),
        "special": lambda: torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (5, tokens), generator=g)],
        "equal": lambda: torch.full((5, tokens), -0.25),
        "denormal": lambda: torch.randint(-5, 6, (5, tokens), generator=g) * 1e-44,
    }[kind]()
    counts = [tokens // 8, tokens, 0, tokens // 2 + 1, -3]
    check_selection(backend, score, counts, [tokens, tokens // 2, tokens, max(tokens - 1, 0), tokens])


@pytest.mark.backends("reference", "triton", "cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_tokens_of_a_picture_with_many_ties(backend, dtype):
    g = torch.Generator().manual_seed(1)
    tokens = 300 if INTERPRETED else 2880
    score = torch.randint(0, 40, (4, tokens), generator=g).to(dtype) / 64
    for alive in (None, torch.rand(4, tokens, generator=g) < 0.5):
        check_selection(backend, score, [tokens // 8, tokens, 0, 17], [tokens, tokens - 5, tokens, 30], alive)


@pytest.mark.parametrize("dtype", WORDS, ids=str)
def test_select_tokens_of_close_scores(backend, dtype):
    """Scores that differ in one byte only, so that every pass of the radix matters."""
    g = torch.Generator().manual_seed(0)
    n = 90 if INTERPRETED else 300
    base = torch.tensor([1.0, -1.0, 1e-30], dtype=dtype)[torch.randint(0, 3, (3, n), generator=g)]
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    for byte in range(1 if INTERPRETED else torch.empty((), dtype=dtype).element_size() - 1):
        score = (base.view(bits) + (torch.randint(0, 5, (3, n), generator=g).to(bits) << 8 * byte)).view(dtype)
        check_selection(backend, score, [n // 3, n // 2, n - 1], [n, n - n // 10, n])


def test_select_tokens_of_scores_that_float32_cannot_tell_apart(backend):
    check_selection(backend, 1 + torch.arange(40, dtype=torch.float64).flip(0)[None] * 1e-14, [5], [40])


@pytest.mark.parametrize("dtype", some(DTYPES, interpreter=3), ids=str)
def test_select_tokens_takes_zeros_of_either_sign_for_ties(backend, dtype):
    """The earlier token wins, whichever sign its zero has."""
    score = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 2.0, 0.0], [0.0, -0.0, -0.0, 0.0, -3.0, -0.0]], dtype=dtype)
    for count in range(1, 6):
        check_selection(backend, score, [count, count], [6, 6])


@pytest.mark.parametrize("dtype", some(WORDS), ids=str)
@pytest.mark.parametrize("alive", [False, True], ids=["all", "some"])
def test_select_tokens_of_scores_that_share_their_highest_bits(backend, dtype, alive):
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
        check_selection(backend, score, [count] * len(places), [21, 21, 13, 20, 21] * 2, chosen)


@pytest.mark.parametrize("dtype", some(DTYPES), ids=str)
def test_select_tokens_among_equal_scores(backend, dtype):
    """Every candidate at the threshold: the first ones stay; also with one token above, below, or no number."""
    pairs = [(value, other) for value in (0.0, 1e-45, -1.0, math.inf, -math.inf, math.nan) for other in (value, 2.0, -2.0, math.nan)]
    score = torch.tensor([[value] * 9 + [other] + [value] * 7 for value, other in pairs], dtype=torch.float64).to(dtype)
    for count in (0, 1, 9, 17) if FULL or not INTERPRETED or dtype == torch.float32 else (9,):
        check_selection(backend, score, [count] * len(pairs), [17, 17, 16] * (len(pairs) // 3))


@pytest.mark.backends("reference", "emulated", "triton", "cuda")
@pytest.mark.parametrize("dtype", some([torch.float32, torch.float64, torch.float16], interpreter=1, detector=2), ids=str)
def test_select_tokens_with_ties_across_every_warp(backend, dtype):
    """And every pass of the collection."""
    score = torch.full((4, 700), 0.25, dtype=dtype)
    alive = torch.rand(4, 700, generator=torch.Generator().manual_seed(1)) < 0.9
    check_selection(backend, score, [1, 256, 511, 699], [700, 700, 640, 700], alive)


def test_select_tokens_of_every_count(backend):
    """Counts from none to all of them, so that every round of the search ends one of them."""
    score = torch.softmax(3 * torch.randn(1, 35, generator=torch.Generator().manual_seed(11)), 1).expand(36, -1)
    check_selection(backend, score, list(range(36)), [35] * 36)


@pytest.mark.backends("interpreter")
def test_select_tokens_in_chunks(backend, chunks_of_16):
    """Rows longer than what one pass holds."""
    g = torch.Generator().manual_seed(1)
    for tokens in (17, 48, 70):
        score = torch.randint(0, 9, (3, tokens), generator=g).float()
        check_selection(backend, score, [tokens // 2, 3, tokens], [tokens, tokens - 1, 16], torch.rand(3, tokens, generator=g) < 0.8)


@pytest.mark.slow
@pytest.mark.backends("interpreter")
def test_select_tokens_of_16384_in_two_chunks(backend):
    score = torch.randint(0, 3000, (1, 16384), generator=torch.Generator().manual_seed(2)).float()
    check_selection(backend, score, [4097], [16300])


LONG = [(torch.float64, 2049), (torch.float64, 2048), (torch.float32, 4097), (torch.float16, 4096)]


@pytest.mark.backends("reference", "emulated", "cuda")
@pytest.mark.parametrize("dtype, tokens", some(LONG), ids=str)
def test_select_tokens_of_more_than_the_cache_holds(backend, dtype, tokens):
    """16 KiB of keys lie in shared memory; longer rows are read again in every pass."""
    score = torch.randint(0, 300, (2, tokens), generator=torch.Generator().manual_seed(2)).to(dtype)
    check_selection(backend, score, [tokens // 3, 7], [tokens, tokens - 1])


def test_select_tokens_of_strided_arguments(backend):
    g = torch.Generator().manual_seed(3)
    score, alive = torch.randn(2, 33, generator=g), torch.rand(2, 33, generator=g) < 0.7
    counts, lengths = int32([9, 4]), int32([33, 20])
    straight = backend.run("select_tokens", score, counts, lengths, alive=alive)
    assert_kept(*straight, score, [9, 4], [33, 20], alive)
    moved = {
        "score": torch.stack([score, -score], 2)[:, :, 0],
        "count": torch.stack([counts, counts + 1], 1)[:, 0],
        "n_visual": torch.stack([lengths, lengths - 5], 1)[:, 0],
        "alive": torch.stack([alive, ~alive], 2)[:, :, 0],
    }
    turned = moved | {"score": torch.stack([score, -score], 1)[:, 0], "alive": alive.t().contiguous().t()}
    for arguments in (moved, turned):
        assert all(same(a, b) for a, b in zip(straight, backend.run("select_tokens", **arguments), strict=True))
    broadcast = backend.run("select_tokens", score[:1].expand(2, -1), counts, lengths, alive=alive[:1].expand(2, -1))
    assert broadcast[0][1].tolist() == spec.select(score[0].tolist(), 4, 20, alive[0].tolist()) + [-1] * 29


def test_select_tokens_of_nothing(backend):
    kept, n_kept = backend.run("select_tokens", torch.zeros(2, 0), int32([0, 0]), int32([0, 0]))
    assert kept.shape == (2, 0) and n_kept.tolist() == [0, 0]


@pytest.mark.backends("triton", "cuda")
def test_select_tokens_a_hundred_times_gives_the_same_bits(backend):
    kit = backend.kit
    score = kit.to(torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (4, 3000), generator=torch.Generator().manual_seed(3))])
    count, lengths = kit.to(int32([700, 3000, 1, 1500])), kit.to(int32([3000, 2999, 5, 3000]))
    first = ops.select_tokens(score, count, lengths, backend=backend.name)
    for _ in range(100 if backend.on_gpu else 1):
        again = ops.select_tokens(score, count, lengths, backend=backend.name)
        assert all(same(a, b) for a, b in zip(first, again, strict=True))


# ---- the predictor and the count --------------------------------------------------------------------------------------------------


def check_rate(backend, mass, weight, bias, rates):
    rate, index = backend.run("predict_rate", mass, weight, bias, rates)
    want = spec.predict(mass, weight, bias)
    assert index.dtype == torch.int64 and index.tolist() == want
    assert rate.dtype == torch.float64 and torch.equal(rate, rates[want])


@pytest.mark.parametrize("classes", some([9, 1, 2, 5, 10, 40], interpreter=5))
def test_predict_rate(backend, classes):
    g = torch.Generator().manual_seed(classes)
    for heads in (3,) if INTERPRETED else (3, 40):  # fewer and more features than lanes
        mass = torch.rand(4, heads, 4, generator=g)
        weight, bias = torch.randn(classes, heads * 4, generator=g), torch.randn(4, classes, generator=g)
        rates = torch.linspace(0, 1, classes, dtype=torch.float64)
        for offset in (bias, bias[0], bias[:1].expand(4, -1)):
            check_rate(backend, mass, weight, offset, rates)


@pytest.mark.parametrize("by_sequence", [False, True], ids=["shared", "each"])
@pytest.mark.parametrize("heads", some([7, 1, 32, 64], interpreter=2))
def test_predict_rate_of_mass_that_is_zero_or_no_number(backend, heads, by_sequence):
    g = torch.Generator().manual_seed(heads)
    weight, bias = torch.randn(11, heads * 4, generator=g), torch.randn(11, generator=g) * 0.1
    mass = torch.rand(6, heads, 4, generator=g)
    mass[3] = 0.0
    mass[4] = float("nan")
    if by_sequence:
        bias = torch.randn(6, 11, generator=g)
        bias[3] = torch.tensor([0.0, 2.0, float("nan"), 2.0, *[-1.0] * 7])
    check_rate(backend, mass, weight, bias, torch.linspace(0, 1, 12, dtype=torch.float64)[:11])


@pytest.mark.backends("reference")
@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("bias_kind", ["shared", "per sequence", "expanded"])
def test_predict_rate_of_many_sequences(backend, dtype, bias_kind):
    g = torch.Generator().manual_seed(2)
    mass, weight = torch.rand(50, 3, 4, generator=g, dtype=dtype), torch.randn(6, 12, generator=g, dtype=dtype)
    bias = torch.randn(*((50,) if bias_kind == "per sequence" else ()), 6, generator=g, dtype=dtype)
    if bias_kind == "expanded":
        bias = bias.expand(50, 6)
    check_rate(backend, mass, weight, bias, torch.linspace(0, 1, 6, dtype=torch.float64))


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("dtype", some([torch.float16, torch.bfloat16, torch.float64]), ids=str)
def test_predict_rate_of_other_dtypes_and_strides(backend, dtype):
    g = torch.Generator().manual_seed(1)
    mass = torch.rand(3, 4, 5, generator=g).to(dtype)[..., :4]
    weight, bias = torch.randn(16, 7, generator=g).to(dtype).t(), torch.randn(3, 14, generator=g).to(dtype)[:, ::2]
    check_rate(backend, mass, weight, bias, torch.linspace(0, 1, 14, dtype=torch.float64)[::2])


def test_predict_rate_takes_the_first_of_equal_logits_and_no_nan(backend):
    nan, inf = math.nan, math.inf
    table = {
        (1.0, 1.0, 0.0): 0, (0.0, 2.0, 2.0): 1, (nan, 0.0, 1.0): 2, (nan, nan, -5.0): 2, (nan, -inf, nan): 1, (nan, nan, nan): 0,
        (nan, inf, inf): 1, (0.0, -0.0, -1.0): 0, (-0.0, 0.0, 0.0): 0, (-inf, inf, inf): 1, (-1.0, -2.0, -1.0): 0, (nan, nan, -inf): 2,
    }  # fmt: skip
    bias = torch.tensor(list(table))
    rates = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    for mass in (0.0, 1.0):
        _, index = backend.run("predict_rate", torch.full((len(table), 1, 4), mass), torch.zeros(3, 4), bias, rates)
        assert index.tolist() == list(table.values())


def test_predict_rate_with_ties_across_warps(backend):
    """Equal logits in classes that different warps look after, and in those that one looks after in turn."""
    bias = torch.full((6, 30), -5.0)
    for b, equal in enumerate([[3, 11, 19], [12, 5], [29, 1], [8, 16, 9], [7, 15], [26, 25, 24]]):
        bias[b, equal] = 2.0
    bias[1, :5] = math.nan
    _, index = backend.run("predict_rate", torch.ones(6, 1, 4), torch.zeros(30, 4), bias, torch.zeros(30, dtype=torch.float64))
    assert index.tolist() == [3, 5, 1, 8, 7, 24]


@quick
@given(st.integers(0, 3000), st.floats(0, 1) | st.sampled_from([0.9, 0.1, 1 / 3, 2 / 3, 1.0, 0.0, math.nan, -1.0, 7.0]))
def test_keep_count(n, rate):
    got = ops.keep_count(int32([n]), torch.tensor([rate], dtype=torch.float64))
    assert got.dtype == torch.int32
    assert got.item() == spec.keep_count(n, rate)


def test_keep_count_survives_rounding():
    for n in range(0, 1001, 10):
        for tenths in range(11):
            got = ops.keep_count(int32([n]), torch.tensor([tenths / 10], dtype=torch.float64))
            assert got.item() == n * (10 - tenths) // 10


# ---- a step -----------------------------------------------------------------------------------------------------------------------

STEPS = [
    # batch, heads, kv_heads, dim, visual capacity, text capacity, visual lengths, text lengths
    (3, 2, 2, 8, 40, 9, [40, 7, 0], [9, 1, 5]) if INTERPRETED else (3, 2, 2, 8, 140, 9, [140, 65, 0], [9, 1, 5]),
    (2, 7, 1, 5, 33, 3, [0, 33], [1, 2]),
    (2, 4, 2, 16, 64, 20, [64, 50], [20, 1]) if INTERPRETED else (2, 12, 1, 16, 64, 20, [64, 50], [20, 1]),
    *([] if INTERPRETED else [(2, 4, 2, 16, 300, 20, [257, 300], [20, 0])]),
]
OF_REFERENCE = [*STEPS, *(made.SHAPES[name] for name in ("one number", "heads", "eights", "nothing", "no visual region"))]
ON_DEVICE = [made.SHAPES[name] for name in made.ON_DEVICE]


def step_problem(backend, case, dtype=None, window=False):
    """dtype: that in which the backend is nearest to float64."""
    return made.problem(case, dtype or (F64 if backend.name == "reference" else F32), window)


def check_step(backend, arguments, window=None, **how):
    """A step's numbers are those of the loops, and its rate and its list are what follows from the mass and the importance that it returns,
    or from the scores it was given: between two backends ties within rounding would differ."""
    got = backend.run("decode_step", **arguments, window=window, **how)
    dtype, lengths = arguments["query"].dtype, arguments["n_visual"]
    made.assert_close(got[:3], spec.attention(**arguments, window=window), dtype, backend.name in kit.BACKENDS)
    assert got.rate.dtype == F64
    if "count" in how:
        counts = (how["count"] if "max_kept" not in how else torch.minimum(how["count"], how["max_kept"])).tolist()
        n = lengths.double()
        rate = torch.where(n > 0, 1 - got.n_kept.double() / n.clamp(min=1), 0.0)
        assert torch.equal(got.rate, rate) if backend.name not in kit.BACKENDS else torch.allclose(got.rate, rate, atol=1e-12, rtol=0)
    else:
        assert torch.equal(got.rate, how["rates"][spec.predict(got.mass, how["weight"], how["bias"])])
        counts = [spec.keep_count(n, rate) for n, rate in zip(lengths.tolist(), got.rate.tolist(), strict=True)]
    score = how["score"] if how.get("score") is not None else got.importance
    assert_kept(got.kept, got.n_kept, score, counts, lengths.tolist(), how.get("alive"))
    return got


PREDICTED = each(
    reference=[(case, F64) for case in OF_REFERENCE],
    interpreter=[(case, F32) for case in STEPS],
    emulated=[(case, F32) for case in STEPS],
    # both dtypes of the rehearsal in turn
    device=[(case, dtype) for n, case in enumerate(ON_DEVICE) for m, dtype in enumerate(kit.DTYPES) if ON_GPU or (n + m) % 2 == 0],
)


@pytest.mark.parametrize("case, dtype", PREDICTED, ids=str)
def test_step_with_predictor(backend, case, dtype):
    arguments = step_problem(backend, case, dtype)
    batch, heads, tokens = case[0], case[1], case[4]
    number = STEPS.index(case) if case in STEPS else 0
    # everywhere in the first case, in turn in the others
    places = [place for column, place in enumerate(backend.decisions) if FULL or column == 0 or (number + column) % 2 == 0]
    words = F64 if dtype == F64 else F32
    for place in places:
        g = torch.Generator().manual_seed(5)
        seen = set()
        for trial in range(2 if INTERPRETED else 3):
            biases = [torch.randn(batch, 5, generator=g), torch.randn(5, generator=g).expand(batch, -1), torch.randn(5, generator=g)]
            rates = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=F64)
            weight = 8 * torch.randn(5, heads * 4, generator=g)
            predictor = {"weight": weight.to(words), "bias": biases[trial].to(words), "rates": rates}
            with backend.cut(3, 8), backend.decided(place):
                seen.update(check_step(backend, arguments, **predictor).rate.tolist())
                if not INTERPRETED:
                    check_step(backend, arguments, **predictor, score=torch.rand(batch, tokens, generator=g))
        assert len(seen) > 1 or batch == 1, "this test saw one rate only"


def test_step_rates_just_below_a_whole_token(backend):
    """40 * (1 - 0.8) is 7.999... in float64 and 10 * (1 - 0.9) is 0.999...: the count is 8 and 1 all the same."""
    arguments = step_problem(backend, (4, 2, 2, 8, 40, 9, [40, 10, 20, 30], [9, 1, 5, 2]))
    rates = torch.tensor([0.1, 0.4, 0.7, 0.8, 0.9], dtype=torch.float64)
    below = [n for n in (40, 10, 20, 30) for rate in rates.tolist() if int(n * (1 - rate)) != round(n * (1 - rate))]
    assert below, "no rate of this test needs the 1e-6"
    for place in backend.decisions[:2]:
        for first in range(5):
            bias = torch.zeros(4, 5)
            for b in range(4):
                bias[b, (first + b) % 5] = 100.0
            with backend.cut(2, 8), backend.decided(place):
                got = check_step(backend, arguments, weight=torch.zeros(5, 8), bias=bias, rates=rates)
            assert got.n_kept.tolist() == [round(n * (1 - rates[(first + b) % 5].item())) for b, n in enumerate((40, 10, 20, 30))]


def test_step_of_strange_rates(backend):
    """NaN keeps all, as does a rate below 0; one above 1 keeps none."""
    arguments = step_problem(backend, (4, 2, 2, 8, 40, 9, [40, 10, 20, 30], [9, 1, 5, 2]))
    rates = torch.tensor([math.nan, -0.5, 1.5, math.inf], dtype=torch.float64)
    with backend.cut(2, 8):
        got = backend.run("decode_step", **arguments, weight=torch.zeros(4, 8), bias=torch.eye(4) * 100, rates=rates)
    assert got.n_kept.tolist() == [40, 10, 0, 0]
    assert same(got.rate, rates)


COUNTED = each(
    reference=[(case, F64) for case in OF_REFERENCE],
    interpreter=[(case, F16) for case in STEPS],
    emulated=[(case, dtype) for dtype in (F16, F32, torch.bfloat16) for case in STEPS],
    device=[(case, kit.HALF) for case in ON_DEVICE],
)


@pytest.mark.parametrize("case, dtype", COUNTED, ids=str)
def test_step_with_count(backend, case, dtype):
    arguments = step_problem(backend, case, dtype, window=True)
    batch, capacity = case[0], case[4]
    g = torch.Generator().manual_seed(6)
    alive = torch.rand(batch, capacity, generator=g) < 0.5
    counts, most = int32(([-3, 9, 4] * 2)[:batch]), int32(([2, 9, -1] * 2)[:batch])
    hows = [
        {"count": int32([capacity // 3] * batch)},
        {"count": int32([0] * batch), "alive": alive},
        {"count": int32([capacity] * batch), "max_kept": int32([5] * batch), "score": torch.rand(batch, capacity, generator=g)},
        {"count": int32([9] * batch), "score": torch.randint(0, 4, (batch, capacity), generator=g).double(), "window": 30},
        {"count": int32([8] * batch), "score": torch.randn(batch, 2 * capacity, generator=g)[:, ::2], "alive": alive[:1].expand(batch, -1)},
        {"count": counts, "max_kept": most, "alive": alive},
        {"count": int32([9] * batch), "score": torch.randn(batch, capacity, generator=g).to(dtype), "alive": alive},
        {"count": int32([7] * batch), "alive": torch.stack([alive, ~alive], 2)[:, :, 0]},
        {"count": counts, "max_kept": most, "alive": alive, "score": torch.rand(batch, capacity, generator=g)},
    ]
    if kit.REHEARSAL:
        hows = hows[:3]
    elif INTERPRETED and not FULL:
        hows = hows[:6]
    for place in backend.decisions if backend.name in kit.BACKENDS else backend.decisions[:1]:
        for how in hows:
            with backend.cut(3, 16), backend.decided(place):
                check_step(backend, arguments, **how)


@pytest.mark.parametrize("count", some([17, 0, 1, 64]))
def test_step_lists_its_own_importance(backend, count):
    check_step(backend, step_problem(backend, STEPS[2]), count=int32([count] * 2))


@pytest.mark.parametrize("dtype", each(reference=WORDS, interpreter=[F32], emulated=WORDS, device=[F32, F64, kit.HALF]), ids=str)
def test_step_with_scores_full_of_ties_and_no_numbers(backend, dtype):
    case = made.SHAPES["heads"]
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, math.inf, -math.inf, math.nan])
    score = values[torch.randint(0, 7, (case[0], case[4]), generator=torch.Generator().manual_seed(8))].to(dtype)
    check_step(backend, step_problem(backend, case), count=int32([11, 3, 2]), score=score)


def test_step_of_equal_importance_keeps_the_earliest(backend):
    """Equal keys give equal importance."""
    arguments = step_problem(backend, (1, 4, 2, 16, 64, 8, [50], [8]))
    arguments["key"][:, :, :50] = 0.25
    got = check_step(backend, arguments, count=int32([7]))
    assert got.importance[0, :50].unique().numel() == 1
    assert got.kept[0, :8].tolist() == [*range(7), -1]


@pytest.mark.backends("interpreter")
def test_step_in_chunks(backend, chunks_of_16):
    """More visual tokens than the selection inside the launch holds at once."""
    score = torch.randint(0, 5, (3, 40), generator=torch.Generator().manual_seed(8)).float()
    for place in backend.decisions:
        with backend.decided(place):
            check_step(backend, step_problem(backend, STEPS[0]), count=int32([19, 7, 3]), score=score)


@pytest.mark.backends("emulated")
def test_step_longer_than_the_cache(backend):
    """More visual tokens than the selection holds in shared memory, for keys of 4 and of 8 bytes."""
    arguments = step_problem(backend, (1, 2, 1, 4, 4200, 3, [4190], [2]))
    score = torch.randint(0, 50, (1, 4200), generator=torch.Generator().manual_seed(8))
    for dtype in some(WORDS):
        with backend.cut(4, 64):
            check_step(backend, arguments, count=int32([1900]), score=score.to(dtype))


def test_step_with_nan_importance(backend):
    """A NaN logit makes its head's probabilities NaN, and so every importance of the sequence: the earliest tokens stay."""
    arguments = step_problem(backend, STEPS[0])
    arguments["key"][0, 0, 3] = float("nan")
    with backend.cut(3, 16):
        got = check_step(backend, arguments, count=int32([4, 0, 2]))
    assert got.kept[0, :5].tolist() == [0, 1, 2, 3, -1]


def test_step_without_visual_tokens(backend):
    arguments = step_problem(backend, (2, 4, 2, 8, 0, 12, [0, 0], [12, 5]))
    predictor = {"weight": torch.zeros(2, 16), "bias": torch.tensor([0.0, 1.0]), "rates": torch.tensor([0.1, 0.7]).double()}
    for how in ({"count": int32([3, 0])}, predictor):
        with backend.cut(2, 4):
            got = check_step(backend, arguments, **how)
        assert got.kept.shape == (2, 0)


@pytest.mark.parametrize("window, predicted", [(None, False), (40, False), (None, True)], ids=["all", "window", "predictor"])
def test_step_appends_before_it_reads(backend, window, predicted):
    arguments = step_problem(backend, STEPS[0], window=True)
    words, heads = arguments["query"].dtype, STEPS[0][1]
    new = made.new_row(arguments)
    how = {"count": int32([4, 4, 4])}
    if predicted:
        g = torch.Generator().manual_seed(2)
        weight, bias = torch.randn(5, heads * 4, generator=g).to(words), 3 * torch.randn(3, 5, generator=g).to(words)
        how = {"weight": weight, "bias": bias, "rates": torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=F64)}
    with backend.cut(3, 16):
        check_step(backend, arguments, window=window, **how, **new)
    for b in range(3):
        written = STEPS[0][4] + int(arguments["n_text"][b]) - 1
        assert torch.equal(arguments["key"][b, :, written], new["new_key"][b])
        assert torch.equal(arguments["value"][b, :, written], new["new_value"][b])


def test_importance_of_a_list_longer_than_a_tile(backend):
    """One block sums 64 columns after the other into memory that it shares."""
    arguments = step_problem(backend, (1, 6, 2, 8, 200, 5, [190], [4]))
    kept, n_kept = spec.lists([190], [150], 160)
    got = backend.run("decode_attention", **arguments, kept=kept, n_kept=n_kept, importance=True)
    close(got.importance, spec.attention(**arguments, kept=kept, n_kept=n_kept)[2], 3e-6 if not backend.on_gpu else 2e-5, "importance")


# ---- what is the same whatever the backend ----------------------------------------------------------------------------------------


def test_no_operator_of_a_decision_waits_for_a_device(no_host_sync):
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
