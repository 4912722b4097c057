"""decode_attention, score_last_query and decode_step against loops in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from dyrate_kernels import ops
from tests.ops import spec

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [
    # batch, heads, kv_heads, dim, visual capacity, text capacity, visual lengths, text lengths
    (1, 1, 1, 1, 1, 1, [1], [1]),
    (3, 4, 4, 16, 24, 9, [24, 7, 0], [9, 1, 5]),
    (2, 4, 2, 20, 13, 6, [13, 1], [3, 6]),
    (2, 8, 2, 8, 33, 17, [20, 33], [17, 2]),
    (2, 7, 1, 5, 40, 3, [0, 39], [1, 0]),
    (2, 8, 1, 12, 6, 30, [3, 6], [30, 12]),
    (3, 2, 2, 4, 5, 4, [0, 5, 0], [0, 0, 3]),
    (2, 2, 1, 4, 0, 5, [0, 0], [5, 2]),
]


def run(case, dtype=torch.float64, keys=("scale", "text_type"), **more):
    arguments = spec.problem(*case, dtype=dtype)
    taken = {name: arguments[name] for name in ("query", "key", "value", "n_visual", "n_text", "visual_capacity", *keys)}
    return arguments, ops.decode_attention(**taken, mass=True, importance=True, **more)


def check(result, expected, dtype):
    output, mass, importance = expected
    tolerance = TOLERANCE[dtype]
    assert result.output.dtype == dtype
    assert torch.allclose(result.output.double(), output, atol=tolerance, rtol=tolerance)
    for got, want in ((result.mass, mass), (result.importance, importance)):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.allclose(got.double(), want, atol=min(tolerance, 1e-5), rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_against_loops(case, dtype):
    arguments, result = run(case, dtype)
    check(result, spec.attention(**{k: arguments[k] for k in arguments if k not in ("position", "query_position")}), dtype)
    live = (arguments["n_visual"] + arguments["n_text"]) > 0
    assert torch.allclose(result.mass.sum(-1), live[:, None].to(result.mass.dtype).expand_as(result.mass[..., 0]), atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_kept_list(case, share, narrow):
    counts = [int(n * share) for n in case[6]]
    width = max(counts, default=0) if narrow else case[4] + 3
    kept, n_kept = spec.lists(case[6], counts, width)
    arguments, result = run(case, kept=kept, n_kept=n_kept)
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    check(result, spec.attention(**plain, kept=kept, n_kept=n_kept), torch.float64)


def test_short_list_of_a_wide_layer_reads_only_its_rows():
    case = (2, 4, 2, 8, 64, 5, [64, 30], [5, 2])
    kept, n_kept = spec.lists(case[6], [7, 3], 8)
    arguments = spec.problem(*case)
    for b in range(2):
        others = sorted({*range(64)} - {*kept[b, : n_kept[b]].tolist()})
        arguments["key"][b, :, others] = arguments["value"][b, :, others] = float("nan")
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    check(ops.decode_attention(**plain, kept=kept, n_kept=n_kept, mass=True, importance=True),
          spec.attention(**plain, kept=kept, n_kept=n_kept), torch.float64)  # fmt: skip


@pytest.mark.parametrize("with_list", [False, True])
@pytest.mark.parametrize("window", [1, 8, 25, 1000])
@pytest.mark.parametrize("case", SHAPES[1:6], ids=str)
def test_sliding_window(case, window, with_list):
    lists = {}
    if with_list:
        counts = [n // 2 for n in case[6]]
        lists = dict(zip(("kept", "n_kept"), spec.lists(case[6], counts, max(counts)), strict=True))
    arguments, result = run(case, keys=("scale", "text_type", "position", "query_position"), window=window, **lists)
    check(result, spec.attention(**arguments, window=window, **lists), torch.float64)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_bounds_change_nothing(case):
    _, free = run(case)
    _, bounded = run(case, visual_bound=max(case[6]), text_bound=max(case[7]))
    for a, b in zip(free, bounded, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("with_list", [False, True])
def test_clean_rows_change_nothing(with_list):
    for case in SHAPES:
        arguments = spec.problem(*case)
        plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
        counts = [n // 3 for n in case[6]]
        lists = dict(zip(("kept", "n_kept"), spec.lists(case[6], counts, max(counts)), strict=True)) if with_list else {}
        want = ops.decode_attention(**plain, **lists, mass=True, importance=True)
        plain["value"] = plain["value"].nan_to_num(1e30)
        got = ops.decode_attention(**plain, **lists, mass=True, importance=True, clean=True)
        assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(got, want, strict=True))


def test_a_row_of_a_batch_equals_the_row_alone():
    case = SHAPES[1]
    arguments, together = run(case)
    for b in range(3):
        one = {
            k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items() if k not in ("position", "query_position")
        }
        alone = ops.decode_attention(**one, mass=True, importance=True)
        for a, t in zip(alone, together, strict=True):
            assert torch.allclose(a[0], t[b], atol=1e-13)


def test_strided_inputs_equal_contiguous_ones():
    case = (2, 4, 2, 8, 20, 6, [20, 5], [6, 3])
    arguments = spec.problem(*case)
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    kept, n_kept = spec.lists(case[6], [6, 2], 7)
    for extra, inner in itertools.product(({}, {"kept": kept, "n_kept": n_kept}), (True, False)):
        strided = dict(plain)
        strided["query"] = plain["query"].transpose(0, 1).contiguous().transpose(0, 1)
        for name in ("key", "value"):
            wide = torch.full((2, 2, 26, 16), float("nan"), dtype=torch.float64)
            wide[..., ::2] = plain[name]
            strided[name] = wide[..., ::2] if inner else plain[name].transpose(1, 2).contiguous().transpose(1, 2)
        strided["text_type"] = torch.stack([plain["text_type"]] * 2, -1)[..., 0]
        for a, b in zip(ops.decode_attention(**plain, **extra, mass=True, importance=True),
                        ops.decode_attention(**strided, **extra, mass=True, importance=True), strict=True):  # fmt: skip
            assert torch.allclose(a, b, atol=1e-13)


def test_default_scale_and_statistics_off():
    arguments = spec.problem(*SHAPES[2])
    plain = {k: arguments[k] for k in ("query", "key", "value", "n_visual", "n_text", "visual_capacity")}
    result = ops.decode_attention(**plain)
    assert result.mass is None and result.importance is None
    expected, _, _ = spec.attention(**plain, scale=20**-0.5)
    assert torch.allclose(result.output, expected, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_logit_stays_in_its_sequence_and_head(bad):
    case = (2, 2, 2, 4, 6, 3, [6, 6], [3, 3])
    arguments = spec.problem(*case)
    arguments["query"][:] = arguments["query"].abs()
    arguments["key"][0, 1, 2, 0] = bad
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    result = ops.decode_attention(**plain, mass=True, importance=True)
    output, mass, _ = spec.attention(**plain)
    assert torch.allclose(result.output, output, atol=1e-12, equal_nan=True)
    assert torch.allclose(result.mass, mass, atol=1e-12, equal_nan=True)
    assert torch.isfinite(result.output[1]).all() and torch.isfinite(result.importance[1]).all()


def test_score_last_query_gives_the_statistics():
    for case in SHAPES:
        arguments, result = run(case)
        plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
        mass, importance = ops.score_last_query(**plain)
        assert torch.allclose(mass, result.mass, atol=1e-13) and torch.allclose(importance, result.importance, atol=1e-13)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_decode_step_is_the_composition(case):
    arguments = spec.problem(*case)
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    batch, heads = case[:2]
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(5, heads * 4, generator=g, dtype=torch.float64)
    bias = torch.randn(5, generator=g, dtype=torch.float64)
    rates = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    step = ops.decode_step(**plain, weight=weight, bias=bias, rates=rates)
    output, mass, importance = spec.attention(**plain)
    assert torch.allclose(step.output, output, atol=1e-12)
    classes = spec.predict(mass, weight, bias)
    assert step.rate.tolist() == rates[classes].tolist()
    for b in range(batch):
        count = spec.keep_count(case[6][b], rates[classes[b]].item())
        want = spec.select(step.importance[b].tolist(), count, case[6][b])
        assert step.n_kept[b] == len(want) == count
        assert step.kept[b].tolist() == want + [-1] * (case[4] - len(want))


def test_decode_step_with_count_score_alive_and_a_ceiling():
    case = (3, 4, 2, 8, 12, 4, [12, 5, 0], [4, 4, 2])
    arguments = spec.problem(*case)
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    g = torch.Generator().manual_seed(4)
    score = torch.rand(3, 12, generator=g)
    alive = torch.rand(3, 12, generator=g) < 0.7
    count = torch.tensor([9, 2, 3], dtype=torch.int32)
    ceiling = torch.tensor([4, 9, 9], dtype=torch.int32)
    step = ops.decode_step(**plain, count=count, score=score, alive=alive, max_kept=ceiling)
    for b in range(3):
        want = spec.select(score[b].tolist(), min(int(count[b]), int(ceiling[b])), case[6][b], alive[b].tolist())
        assert step.kept[b, : step.n_kept[b]].tolist() == want
        assert step.rate[b].item() == pytest.approx(1 - len(want) / case[6][b] if case[6][b] else 0.0)


def test_twice_the_same():
    arguments = spec.problem(*SHAPES[3], dtype=torch.float32)
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    first, second = (ops.decode_attention(**plain, mass=True, importance=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_host_sync(no_host_sync):
    case = SHAPES[1]
    arguments = spec.problem(*case)
    kept, n_kept = spec.lists(case[6], [5, 2, 0], 24)
    short, n_short = spec.lists(case[6], [5, 2, 0], 5)
    rates = torch.tensor([0.0, 0.5], dtype=torch.float64)
    weight, bias = torch.randn(2, 16), torch.zeros(2)
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    with no_host_sync():
        ops.decode_attention(**plain, kept=kept, n_kept=n_kept, mass=True, importance=True)
        ops.decode_attention(**plain, kept=short, n_kept=n_short, mass=True, importance=True)
        ops.decode_attention(**arguments, window=3, mass=True)
        ops.score_last_query(**plain)
        step = ops.decode_step(**plain, weight=weight, bias=bias, rates=rates)
        ops.compact_([plain["key"], plain["value"]], step.kept, step.n_kept, plain["n_visual"])


WRONG = [
    ("query", lambda a: a["query"][0], ValueError),
    ("query", lambda a: a["query"].int(), TypeError),
    ("query", lambda a: "q", TypeError),
    ("key", lambda a: a["key"][:, :, :, :-1], ValueError),
    ("key", lambda a: a["key"].float(), TypeError),
    ("value", lambda a: a["value"][:, :1], ValueError),
    ("n_visual", lambda a: a["n_visual"].long(), TypeError),
    ("n_visual", lambda a: a["n_visual"][:1], ValueError),
    ("n_text", lambda a: a["n_text"].tolist(), TypeError),
    ("visual_capacity", lambda a: 10_000, ValueError),
    ("visual_capacity", lambda a: -1, ValueError),
    ("text_type", lambda a: None, ValueError),
    ("text_type", lambda a: a["text_type"].int(), TypeError),
    ("text_type", lambda a: a["text_type"][:, 1:], ValueError),
    ("n_kept", lambda a: torch.zeros(2, dtype=torch.int32), ValueError),
    ("kept", lambda a: torch.zeros(2, 3, dtype=torch.int32), ValueError),
    ("window", lambda a: 4, ValueError),
    ("visual_bound", lambda a: -1, ValueError),
    ("backend", lambda a: "cudnn", ValueError),
    ("backend", lambda a: "triton", RuntimeError),
]


@pytest.mark.parametrize(("name", "wrong", "error"), WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)])
def test_bad_arguments_are_named(name, wrong, error):
    arguments = spec.problem(2, 4, 2, 8, 10, 5, [10, 3], [5, 2])
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    with pytest.raises(error, match=name):
        ops.decode_attention(**{**plain, name: wrong(plain)}, mass=True)


def test_a_new_row_is_written_then_read():
    arguments = spec.problem(3, 4, 2, 8, 10, 5, [10, 3, 0], [5, 2, 0])
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    new = {name: torch.randn(3, 2, 8, dtype=torch.float64) for name in ("new_key", "new_value")}
    want = {name: plain[name].clone() for name in ("key", "value")}
    for b, n in enumerate([5, 2, 0]):
        for name in want:
            if n:
                want[name][b, :, 10 + n - 1] = new[f"new_{name}"][b]
    got = ops.decode_attention(**plain, **new, mass=True, importance=True)
    for name, rows in want.items():
        assert torch.equal(plain[name].nan_to_num(7.0), rows.nan_to_num(7.0))
    check(got, spec.attention(**plain), torch.float64)
    with pytest.raises(ValueError, match="new_key, new_value: expected both"):
        ops.decode_attention(**plain, new_key=new["new_key"])
    with pytest.raises(ValueError, match="new_value: expected shape"):
        ops.decode_attention(**plain, new_key=new["new_key"], new_value=new["new_value"][:, :1])
    nothing = plain | {"visual_capacity": 0, "key": plain["key"][:, :, :0], "value": plain["value"][:, :, :0]}
    with pytest.raises(ValueError, match="key: expected room for the new row"):
        ops.decode_attention(**{**nothing, "text_type": None}, **new)


def test_a_nan_visual_row_makes_the_whole_heads_mass_nan():
    """Also where the sequence has no text row that the NaN could reach the other types by."""
    arguments = spec.problem(2, 4, 2, 8, 10, 5, [10, 3], [0, 2])
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    plain["key"][:, 0, 1] = float("nan")
    got = ops.decode_attention(**plain, mass=True).mass
    assert got[:, :2].isnan().all() and not got[:, 2:].isnan().any()


def test_an_empty_batch_with_an_empty_list():
    arguments = spec.problem(1, 2, 1, 8, 5, 4, [3], [2])
    plain = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in arguments.items() if k not in ("position", "query_position")}
    for width in (0, 1):
        got = ops.decode_attention(**plain, kept=torch.zeros(0, width, dtype=torch.int32), n_kept=torch.zeros(0, dtype=torch.int32))
        assert got.output.shape == (0, 2, 8)


def test_key_heads_must_divide_query_heads():
    arguments = spec.problem(2, 4, 2, 8, 10, 5, [10, 3], [5, 2])
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    plain |= {name: plain[name][:, [0, 1, 1]] for name in ("key", "value")}
    with pytest.raises(ValueError, match="key: expected a number of heads that divides the 4 heads of query, got 3"):
        ops.decode_attention(**plain)


@pytest.mark.parametrize("shared", [False, True], ids=["each sequence's", "one for all"])
def test_rotary_embedding_comes_before_the_new_row_is_written(shared):
    arguments = spec.problem(3, 4, 2, 8, 10, 5, [10, 3, 0], [5, 2, 0])
    plain = {k: arguments[k] for k in arguments if k not in ("position", "query_position")}
    new = {name: torch.randn(3, 2, 8, dtype=torch.float64) for name in ("new_key", "new_value")}
    angle = torch.randn(1 if shared else 3, 8, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()

    def turned(x):
        low, high = x[..., :4], x[..., 4:]
        return torch.cat([low * cos[:, None, :4] - high * sin[:, None, :4], high * cos[:, None, 4:] + low * sin[:, None, 4:]], -1)

    apart = plain | {"query": turned(plain["query"]), "new_value": new["new_value"], "new_key": turned(new["new_key"])}
    apart |= {name: plain[name].clone() for name in ("key", "value")}
    want = ops.decode_attention(**apart, mass=True, importance=True)
    got = ops.decode_attention(**plain, **new, mass=True, importance=True, cos=cos, sin=sin)
    assert torch.allclose(plain["key"], apart["key"], atol=1e-14, rtol=0, equal_nan=True)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)
    count = torch.ones(3, dtype=torch.int32)
    step = ops.decode_step(**plain, **new, count=count, cos=cos, sin=sin)
    assert torch.allclose(step.output, want.output, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="cos, sin: expected both"):
        ops.decode_attention(**plain, cos=cos)
    with pytest.raises(ValueError, match="sin: expected shape"):
        ops.decode_attention(**plain, cos=cos, sin=sin[:, :4])
    with pytest.raises(ValueError, match="cos: expected shape"):
        ops.decode_step(**plain, count=count, cos=torch.ones(2, 8).double(), sin=sin)
    with pytest.raises(TypeError, match="cos: expected float64"):
        ops.decode_attention(**plain, cos=cos.float(), sin=sin.float())
    odd = plain | {name: plain[name][..., :7] for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="cos: expected an even head dim"):
        ops.decode_attention(**odd, cos=cos[:, :7], sin=sin[:, :7])
