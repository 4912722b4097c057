"""paged_attention and paged_step: the reference against float64 numpy over a dense mask, and what the arguments must be."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from tests.ops import paged_spec, spec
from tests.ops.paged_spec import SHAPES

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PLAIN = ("query", "key", "value", "block_table", "n_rows", "sequence", "scale")


def check(result, want, dtype=torch.float64):
    for value, expected, tolerance in zip(result, want, (TOLERANCE[dtype], *[min(TOLERANCE[dtype], 1e-5)] * 2), strict=True):
        if value is not None:
            assert value.shape == expected.shape
            assert torch.allclose(value.double(), torch.from_numpy(expected), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_against_a_dense_mask(number, share, dtype):
    arguments = paged_spec.problem(SHAPES[number], dtype, share=share)
    result = ops.paged_attention(**arguments, mass=True, importance=True)
    check(result, paged_spec.attention(**arguments), dtype)
    live = (arguments["n_rows"] > 0).to(result.mass.dtype)
    assert torch.allclose(result.mass.sum(-1), live[:, None].expand(-1, SHAPES[number].heads), atol=1e-5)
    every = ops.paged_attention(**{name: arguments[name] for name in PLAIN})
    assert every.mass is None and every.importance is None
    assert torch.allclose(every.output, result.output, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_kept_list(number, share, statistics):
    arguments = paged_spec.problem(SHAPES[number])
    lists = paged_spec.lists(arguments, share, None if share else 3)
    result = ops.paged_attention(**arguments, **lists, mass=statistics, importance=statistics)
    check(result, paged_spec.attention(**arguments, **lists))


@pytest.mark.parametrize("window", [1, 7, 40, 1000])
@pytest.mark.parametrize("form", ["all", "list", "statistics"])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_sliding_window(number, form, window):
    arguments = paged_spec.problem(SHAPES[number])
    lists = paged_spec.lists(arguments, 0.5) if form == "list" else {}
    given = {name: arguments[name] for name in PLAIN} if form == "all" else arguments
    statistics = form == "statistics"
    result = ops.paged_attention(**given, **lists, window=window, mass=statistics, importance=statistics)
    check(result, paged_spec.attention(**arguments, **lists, window=window))


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_bound_on_rows_changes_nothing(number):
    arguments = paged_spec.problem(SHAPES[number])
    want = ops.paged_attention(**arguments, mass=True, importance=True)
    got = ops.paged_attention(**arguments, mass=True, importance=True, row_bound=int(arguments["n_rows"].max()))
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_step_is_the_composition(number, listed):
    arguments = paged_spec.problem(SHAPES[number])
    lists = paged_spec.lists(arguments, 0.7) if listed else {}
    rows, heads, _ = arguments["query"].shape
    g = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(5, heads * 4, generator=g).double(), torch.randn(rows, 5, generator=g).double()
    rates = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    step = ops.paged_step(**arguments, **lists, weight=weight, bias=bias, rates=rates)
    want = paged_spec.attention(**arguments, **lists)
    check(step[:3], want)
    classes = spec.predict(torch.from_numpy(want[1]), weight, bias)
    assert step.rate.tolist() == rates[classes].tolist()
    for r, visual in enumerate(paged_spec.visual_of(arguments)):
        if listed:
            visual = lists["kept"][r, : int(lists["n_kept"][r])].tolist()
        count = spec.keep_count(len(visual), rates[classes[r]].item())
        kept = [visual[i] for i in spec.select(step.importance[r].tolist(), count, len(visual))]
        assert step.n_kept[r] == len(kept) == count
        assert step.kept[r].tolist() == kept + [-1] * (step.kept.shape[1] - count)


def test_a_step_with_count_score_alive_and_a_ceiling():
    arguments = paged_spec.problem(SHAPES[2])
    rows, tokens = arguments["query"].shape[0], arguments["visual_position"].shape[1]
    g = torch.Generator().manual_seed(4)
    score, alive = torch.rand(rows, tokens, generator=g), torch.rand(rows, tokens, generator=g) < 0.7
    count, ceiling = torch.tensor([9, 2, 30, 8, 4]).int(), torch.tensor([4, 9, 9, 9, 9]).int()
    step = ops.paged_step(**arguments, count=count, score=score, alive=alive, max_kept=ceiling)
    for r, visual in enumerate(paged_spec.visual_of(arguments)):
        want = spec.select(score[r].tolist(), min(int(count[r]), int(ceiling[r])), len(visual), alive[r].tolist())
        assert step.kept[r, : step.n_kept[r]].tolist() == [visual[i] for i in want]
        assert step.rate[r].item() == pytest.approx(1 - len(want) / len(visual) if visual else 0.0)


def test_vllms_layout_and_other_strides():
    arguments = paged_spec.problem(SHAPES[1])
    want = ops.paged_attention(**arguments, mass=True, importance=True)
    key, value = arguments["key"], arguments["value"]
    pool = torch.full((key.shape[0], 2, 16, 40), float("nan"), dtype=torch.float64)  # blocks, heads, rows, keys | values
    pool[..., :20], pool[..., 20:] = key.transpose(1, 2), value.transpose(1, 2)
    both = torch.stack([key, value])  # FlashAttention's
    wide = torch.cat([arguments["block_table"]] * 2, 1)[:, : arguments["block_table"].shape[1]]
    for k, v in ((pool[..., :20].transpose(1, 2), pool[..., 20:].transpose(1, 2)), (both[0], both[1])):
        got = ops.paged_attention(**arguments | {"key": k, "value": v, "block_table": wide}, mass=True, importance=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_output_goes_where_it_is_asked_for():
    arguments = paged_spec.problem(SHAPES[2])
    want = ops.paged_attention(**arguments, mass=True)
    every = torch.full((9, 8, 12), 7.0, dtype=torch.float64)  # an engine's, of more rows than these
    for _ in range(2):
        got = ops.paged_attention(**arguments, mass=True, out=every[2:7])
        assert got.output.data_ptr() == every[2].data_ptr() and torch.equal(every[2:7], want.output) and torch.equal(got.mass, want.mass)
        assert (every[:2] == 7).all() and (every[7:] == 7).all()
    call = (*ops.PagedRows(**arguments | {"scale": 0.25}), True, False, "auto")
    assert set(torch.library.opcheck(torch.ops.dyrate.paged_attention_out.default, call, {"out": every[2:7]}).values()) == {"SUCCESS"}
    with pytest.raises(ValueError, match="out: expected shape"):
        ops.paged_attention(**arguments, out=every)
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        ops.paged_attention(**arguments, out=torch.empty(5, 12, 8, dtype=torch.float64).transpose(1, 2))


def test_no_host_sync(no_host_sync):
    arguments = paged_spec.problem(SHAPES[1])
    lists = paged_spec.lists(arguments, 0.5)
    count = torch.full((6,), 4, dtype=torch.int32)
    with no_host_sync():
        ops.paged_attention(**{name: arguments[name] for name in PLAIN}, window=5)
        ops.paged_attention(**arguments, **lists, mass=True)
        ops.paged_step(**arguments, count=count)


WRONG = [
    ("query", lambda a: a["query"][0], ValueError),
    ("key", lambda a: a["key"][..., :-1], ValueError),
    ("key", lambda a: a["key"].float(), TypeError),
    ("key", lambda a: a["key"][:0], ValueError),
    ("value", lambda a: a["value"][:, :1], ValueError),
    ("block_table", lambda a: a["block_table"].long(), TypeError),
    ("block_table", lambda a: a["block_table"][0], ValueError),
    ("n_rows", lambda a: a["n_rows"][1:], ValueError),
    ("sequence", lambda a: None, ValueError),
    ("sequence", lambda a: a["sequence"].long(), TypeError),
    ("visual_position", lambda a: None, ValueError),
    ("visual_position", lambda a: a["visual_position"][:1], ValueError),
    ("n_visual", lambda a: None, ValueError),
    ("n_visual", lambda a: a["n_visual"][:2], ValueError),
    ("text_position", lambda a: None, ValueError),
    ("text_type", lambda a: None, ValueError),
    ("text_type", lambda a: a["text_type"][:, 1:], ValueError),
    ("n_kept", lambda a: torch.zeros(6, dtype=torch.int32), ValueError),
    ("kept", lambda a: torch.zeros(6, 3, dtype=torch.int32), ValueError),
    ("window", lambda a: 0, ValueError),
    ("row_bound", lambda a: -1, ValueError),
    ("backend", lambda a: "cudnn", ValueError),
    ("backend", lambda a: "triton", RuntimeError),
]


@pytest.mark.parametrize(("name", "wrong", "error"), WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)])
def test_bad_arguments_are_named(name, wrong, error):
    arguments = paged_spec.problem(SHAPES[1])
    with pytest.raises(error, match=name):
        ops.paged_attention(**{**arguments, name: wrong(arguments)}, mass=True)


def test_bad_arguments_of_a_step_are_named():
    arguments = paged_spec.problem(SHAPES[1])
    count = torch.full((6,), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="count: expected either count or all of weight"):
        ops.paged_step(**arguments)
    with pytest.raises(ValueError, match="score: expected shape \\[6, 20\\]"):
        ops.paged_step(**arguments, count=count, score=torch.rand(6, 19))
    with pytest.raises(ValueError, match="text_type"):
        ops.paged_step(**arguments | {"text_type": None}, count=count)


def test_lists_are_needed_only_where_they_are_read():
    arguments = paged_spec.problem(SHAPES[1])
    rest = {name: arguments[name] for name in PLAIN}
    ops.paged_attention(**rest)
    lists = paged_spec.lists(arguments, 0.5)
    ops.paged_attention(**rest, **lists, n_visual=arguments["n_visual"], text_position=arguments["text_position"])
    with pytest.raises(ValueError, match="text_position"):
        ops.paged_attention(**rest, **lists, n_visual=arguments["n_visual"])
