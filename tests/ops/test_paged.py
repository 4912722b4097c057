"""paged_attention and paged_step on every backend that has them: against float64 numpy over a dense mask (``paged_spec``), against the same
rows one after the other, and what the arguments must be.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dyrate_kernels import ops
from tests.gpu import kit
from tests.ops import paged_spec, spec
from tests.ops.backends import each
from tests.ops.compare import close, same
from tests.ops.paged_spec import PLAIN

pytestmark = pytest.mark.backends("reference", "interpreter", "triton")  # CUDA C++ has no paged form

SHAPES = [*paged_spec.SHAPES, *(paged_spec.LARGE if kit.ON_GPU else ())]
NUMBERS = range(len(paged_spec.SHAPES))
ON_DEVICE = range(len(SHAPES))
MIDDLE_AND_LAST = (1, len(SHAPES) - 1)
F64, F32, F16 = torch.float64, torch.float32, torch.float16
TOLERANCE = {F64: 1e-12, F32: 3e-6, F16: 2e-3, torch.bfloat16: 2e-2}
LAUNCHES = ("splits", "one split", "two launches", "three splits", "apart", "rows of each warp")


def usual(backend):
    """The dtype in which a backend is nearest to float64."""
    return F64 if backend.name == "reference" else F32


def plain(arguments):
    """The arguments of a layer without list and statistics."""
    return {name: arguments[name] for name in PLAIN}


def assert_close(backend, got, want, dtype):
    """output, mass and importance, where they were asked for."""
    statistics = min(TOLERANCE[dtype], 1e-5)
    for what, value, expected in zip(("output", "mass", "importance"), got, map(torch.from_numpy, want), strict=False):
        if value is None:
            continue
        if backend.name != "triton":
            close(value, expected, TOLERANCE[dtype] if what == "output" else statistics, what)
        elif what == "output":
            kit.assert_output(value, expected, dtype)
        else:
            kit.assert_statistics(value, expected)
    assert got[0].dtype == dtype


def check(backend, arguments, mass=True, importance=True, **how):
    given = arguments if mass or importance or "kept" in how else plain(arguments)
    got = backend.run("paged_attention", **given, **how, mass=mass, importance=importance)
    assert ((got.mass is None), (got.importance is None)) == (not mass, not importance)
    assert_close(backend, got, paged_spec.attention(**arguments, **how), arguments["query"].dtype)
    return got


STATISTICS = each(
    reference=itertools.product(NUMBERS, TOLERANCE, [False, True], ["usual"]),
    interpreter=[
        (0, F32, False, "splits"), (1, F32, True, "two launches"), (2, F32, False, "one split"), (3, F32, False, "splits"),
        (4, F32, False, "one split"), (2, F32, False, "rows of each warp"),
    ],
    full=[(number, F32, number == 1, launch) for number in NUMBERS for launch in LAUNCHES],
    triton=[(number, dtype, number % 2 == 1, "usual") for number in ON_DEVICE for dtype in kit.DTYPES],
)  # fmt: skip


@pytest.mark.parametrize("number, dtype, share, launch", STATISTICS, ids=str)
def test_statistics(backend, number, dtype, share, launch):
    arguments = paged_spec.problem(SHAPES[number], dtype, share=share)
    with backend.launched(launch):
        got = check(backend, arguments)
    live = (arguments["n_rows"] > 0).to(got.mass.dtype)
    assert torch.allclose(got.mass.sum(-1), live[:, None].expand(-1, SHAPES[number].heads), atol=1e-5 if backend.name != "triton" else 4e-5)


ALL_ROWS = each(
    reference=itertools.product(NUMBERS, TOLERANCE, [False, True]),
    interpreter=[(1, F16, False), (2, F16, True)],
    full=[(number, F16, number == 2) for number in NUMBERS],
    triton=[(number, dtype, number % 2 == 1) for number in ON_DEVICE for dtype in kit.DTYPES],
)


@pytest.mark.parametrize("number, dtype, share", ALL_ROWS, ids=str)
def test_all_rows(backend, number, dtype, share):
    check(backend, paged_spec.problem(SHAPES[number], dtype, share=share), mass=False, importance=False)


SHARES = (0.0, 0.4, 1.0)
LISTS = each(
    reference=itertools.product(NUMBERS, SHARES, [False, True], [F64]),
    interpreter=[(0, 0.0, False, F32), (1, 0.4, False, F32), (2, 0.4, True, F32), (3, 1.0, False, F32)],
    full=itertools.product([0, 1, 2, 3], SHARES, [False, True], [F32]),
    triton=itertools.product(ON_DEVICE, [0.3], [False, True], kit.DTYPES),
)


@pytest.mark.parametrize("number, share, statistics, dtype", LISTS, ids=str)
def test_kept_list(backend, number, share, statistics, dtype):
    arguments = paged_spec.problem(SHAPES[number], dtype, share=backend.name == "triton" and number % 2 == 1)
    how = paged_spec.lists(arguments, share, 31 if share == 0.0 or (share == 1.0 and backend.name == "interpreter") else None)
    check(backend, arguments, mass=statistics, importance=statistics, **how)


@pytest.mark.parametrize("mass", [False, True], ids=["importance", "mass"])
def test_one_of_the_statistics_alone(backend, mass):
    check(backend, paged_spec.problem(SHAPES[0], usual(backend)), mass=mass, importance=not mass)


def test_rows_that_no_list_names_are_not_read(backend):
    arguments = paged_spec.problem(SHAPES[1], usual(backend))
    how = paged_spec.lists(arguments, 0.3)
    size = SHAPES[1].block
    lines = zip(paged_spec.owners(arguments), how["kept"].tolist(), how["n_kept"], strict=True)
    named = {(s, p) for s, line, n in lines for p in line[: int(n)]}
    for s, line in enumerate(arguments["visual_position"].tolist()):
        for p in line:
            if p != paged_spec.GARBAGE and (s, p) not in named:
                arguments["key"][arguments["block_table"][s, p // size], p % size] = float("nan")
                arguments["value"][arguments["block_table"][s, p // size], p % size] = float("nan")
    got = backend.run("paged_attention", **arguments, **how)
    assert got.output.isfinite().all()


FORMS = ("all", "list", "statistics")
WINDOWS = each(
    reference=itertools.product(NUMBERS, FORMS, [1, 7, 40, 1000], [F64]),
    interpreter=[(1, "all", 7, F32), (1, "list", 7, F32), (4, "all", 40, F32), (0, "statistics", 7, F32)],
    full=itertools.product([1, 4], FORMS, [1, 7, 40], [F32]),
    triton=[(number, form, 300 if number > 4 else 9, kit.HALF) for number in MIDDLE_AND_LAST for form in FORMS],
)


@pytest.mark.parametrize("number, form, window, dtype", WINDOWS, ids=str)
def test_sliding_window(backend, number, form, window, dtype):
    arguments = paged_spec.problem(SHAPES[number], dtype)
    how = paged_spec.lists(arguments, 0.5) if form == "list" else {}
    check(backend, arguments, mass=form == "statistics", importance=form == "statistics", window=window, **how)


def test_a_window_begins_where_it_begins(backend):
    """Blocks that lie before it may have been given back: what stands there is not read."""
    arguments = paged_spec.problem(SHAPES[4], usual(backend))
    size, table = SHAPES[4].block, arguments["block_table"]
    for s, total in enumerate((159, 135)):
        gone = (total - 20 - 3) // size
        assert 0 not in table[s, gone : -(-total // size)].tolist(), "block 0 is in use"
        table[s, :gone] = 0
    arguments["key"][0] = float("nan")
    with backend.launched("one split"):
        got = backend.run("paged_attention", **plain(arguments), window=20)
    assert got.output.isfinite().all()


@pytest.mark.parametrize("number", each(reference=NUMBERS, interpreter=[4], triton=ON_DEVICE))
def test_a_bound_on_rows_changes_nothing(backend, number):
    arguments = paged_spec.problem(SHAPES[number], usual(backend))
    with backend.launched("one split"):
        free = backend.run("paged_attention", **arguments, mass=True, importance=True)
        bounded = backend.run("paged_attention", **arguments, mass=True, importance=True, row_bound=int(arguments["n_rows"].max()))
    for a, b in zip(free, bounded, strict=True):
        if backend.name == "interpreter":  # the same launch
            assert same(a, b)
        else:
            assert torch.allclose(a, b, atol=1e-13 if backend.name == "reference" else 2e-5, rtol=0)


@pytest.mark.backends("interpreter", "triton")
@pytest.mark.parametrize("launch", ["one split", "splits", "two launches", "apart"])
@pytest.mark.parametrize("number", [2, 4])
def test_rows_past_a_bound_that_is_too_small_are_left_out(backend, number, launch):
    """There is no room for their logits."""
    arguments = paged_spec.problem(SHAPES[number], F32)
    visual, rows, room = arguments["n_visual"], arguments["n_rows"], 16
    assert (rows > room).any()
    few = visual.clamp(max=room)
    fitting = arguments | {"n_visual": few, "n_rows": few + torch.minimum(rows - visual, room - few)}
    want = ops.paged_attention(**fitting, mass=True, importance=True, backend="reference")
    with backend.launched(launch):
        got = backend.run("paged_attention", **arguments, mass=True, importance=True, row_bound=9)
    for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
        close(value, expected.double(), 2e-5, what)


def test_the_output_goes_where_it_is_asked_for(backend):
    shape = SHAPES[0 if backend.name == "interpreter" else 2]
    arguments = paged_spec.problem(shape, usual(backend))
    rows = len(shape.rows)
    every = torch.full((rows + 4, shape.heads, shape.value_dim or shape.dim), 7.0, dtype=usual(backend))  # an engine's, of more rows
    for importance in (True,) if backend.name == "interpreter" else (True, False):
        with backend.launched("one split"):
            want = backend.run("paged_attention", **arguments, mass=True, importance=importance)
            got = backend.run("paged_attention", **arguments, mass=True, importance=importance, out=every[2 : 2 + rows])
        assert all(one is other is None or same(one, other) for one, other in zip(got, want, strict=True))
        assert same(every[2 : 2 + rows], want.output)
        assert backend.name == "triton" or got.output.data_ptr() == every[2].data_ptr()
        assert (every[:2] == 7).all() and (every[2 + rows :] == 7).all()


@pytest.mark.backends("reference", "triton")  # in the interpreter it is the next test that has vLLM's layout
def test_vllms_layout_and_other_strides(backend):
    arguments = paged_spec.problem(SHAPES[1], usual(backend))
    want = backend.run("paged_attention", **arguments, mass=True, importance=True)
    key, value = arguments["key"], arguments["value"]
    pool = torch.full((key.shape[0], 2, 16, 40), float("nan"), dtype=key.dtype)  # blocks, heads, rows, keys | values
    pool[..., :20], pool[..., 20:] = key.transpose(1, 2), value.transpose(1, 2)
    both = torch.stack([key, value])  # FlashAttention's
    wide = torch.cat([arguments["block_table"]] * 2, 1)[:, : arguments["block_table"].shape[1]]
    for k, v in ((pool[..., :20].transpose(1, 2), pool[..., 20:].transpose(1, 2)), (both[0], both[1])):
        got = check(backend, arguments | {"key": k, "value": v, "block_table": wide})
        assert backend.on_gpu or all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_order_of_blocks_changes_nothing(backend):
    """The same sequences in another pool, other blocks, other sizes of block and layouts: the same bits."""
    results = []
    dtype = usual(backend)
    for block, seed in ((4, 0), (16, 0), (5, 0), (1, 0)):
        shape = paged_spec.Shape(4, 2, 8, block, ("2s 9v 3i 11v 1i", "7v 2i"), (3, 9), ((0, -1), (1, -3), (1, -1)))
        arguments = paged_spec.problem(shape, dtype, seed=seed, spare=block)
        rng = torch.Generator().manual_seed(9)
        dense = [torch.randn(2, 40, 2, 8, generator=rng).to(dtype) for _ in range(2)]
        for pool, rows in zip((arguments["key"], arguments["value"]), dense, strict=True):
            for s, total in enumerate((29, 18)):
                for p in range(total):
                    pool[arguments["block_table"][s, p // block], p % block] = rows[s, p]
        if block == 16:  # one pool of keys and values, heads before rows: vLLM's
            both = torch.full((arguments["key"].shape[0], 2, block, 16), float("nan"), dtype=dtype)
            both[..., :8], both[..., 8:] = arguments["key"].transpose(1, 2), arguments["value"].transpose(1, 2)
            arguments |= {"key": both[..., :8].transpose(1, 2), "value": both[..., 8:].transpose(1, 2)}
        arguments["query"] = torch.randn(3, 4, 8, generator=rng).to(dtype)
        with backend.launched("one split"):
            results.append(check(backend, arguments))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same(a, b) if not backend.on_gpu else torch.allclose(a, b, atol=2e-5)  # there a launch may follow the capacities


def gathered(arguments, how, statistics):
    """The same rows one after the other, as ``ops.decode_attention`` takes them, in the order in which the paged form reads them."""
    from dyrate_kernels.ops import reference

    paged = ops.PagedRows(**arguments, kept=how.get("kept"), n_kept=how.get("n_kept"))
    rows, _ = reference.gather(paged, statistics, statistics)
    return {
        "query": rows.query, "key": rows.key.contiguous(), "value": rows.value.contiguous(), "n_visual": rows.n_visual,
        "n_text": rows.n_text, "visual_capacity": rows.visual_capacity, "scale": rows.scale, "text_type": rows.text_type,
    }  # fmt: skip


STRAIGHT = each(
    interpreter=[(0, "list, statistics", ["three splits"]), (1, "all", ["three splits"]), (2, "statistics", ["three splits"]),
                 (1, "list", ["three splits"])],
    full=itertools.product([0, 1, 2, 4], ["all", "list", "statistics", "list, statistics"], [["one split", "three splits"]]),
)  # fmt: skip


@pytest.mark.backends("interpreter")  # the reference gathers the same rows, and on a GPU the launch of either form is its own
@pytest.mark.parametrize("number, form, launches", STRAIGHT, ids=str)
def test_equals_rows_in_a_row_bit_for_bit(backend, number, form, launches):
    """Blocks in whatever order, the same numbers in the same order: with the same launch the same bits as over contiguous rows."""
    arguments = paged_spec.problem(SHAPES[number], F32, seed=number)
    statistics, how = "statistics" in form, paged_spec.lists(arguments, 0.6) if "list" in form else {}
    given = plain(arguments) if form == "all" else arguments
    straight = gathered(arguments, how, statistics)
    for launch in launches:
        with backend.launched(launch):
            got = backend.run("paged_attention", **given, **how, mass=statistics, importance=statistics)
            want = backend.run("decode_attention", **straight, mass=statistics, importance=statistics)
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or same(a, b)


@pytest.mark.backends("interpreter")  # a GPU has the captured graphs of tests/gpu/test_paged.py
def test_lengths_and_tables_may_change_under_a_fixed_launch(backend):
    """The same capacities serve every length and every order of blocks: what a captured graph relies on."""
    from dyrate_kernels.triton_kernels import backend as triton

    with backend.launched("one split"):
        check(backend, paged_spec.problem(SHAPES[0], F32))
        known = len(triton._attentions)
        check(backend, paged_spec.problem(dataclasses.replace(SHAPES[0], rows=((0, 12), (1, 0))), F32, seed=1))
        assert len(triton._attentions) == known


# ---- a step -----------------------------------------------------------------------------------------------------------------------


def decision(arguments, lists, kind, seed=2):
    """What a step decides by: a predictor, a count of scores, one of scores among fewer tokens, one of its own importance."""
    rows, heads, _ = arguments["query"].shape
    tokens = (lists["kept"] if lists else arguments["visual_position"]).shape[1]
    g = torch.Generator().manual_seed(seed)
    if kind == "predictor":
        dtype = F64 if arguments["query"].dtype == F64 else F32
        rates = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=F64)
        weight, bias = 8 * torch.randn(5, heads * 4, generator=g), torch.randn(rows, 5, generator=g)
        return {"weight": weight.to(dtype), "bias": bias.to(dtype), "rates": rates}
    if kind == "own":
        return {"count": torch.full((rows,), tokens // 4, dtype=torch.int32)}
    how = {"count": torch.randint(0, tokens + 2, (rows,), generator=g, dtype=torch.int32)}
    how["score"] = torch.randint(0, 6, (rows, tokens), generator=g).float()
    if kind == "narrow":
        how |= {"alive": torch.rand(rows, tokens, generator=g) < 0.6, "max_kept": torch.tensor([4] + [9] * (rows - 1), dtype=torch.int32)}
    return how


def check_step(backend, arguments, lists, how):
    """The statistics are those of ``paged_spec``, and the list is what follows from them, or from the scores given, by ``spec``."""
    got = backend.run("paged_step", **arguments, **lists, **how)
    assert_close(backend, got, paged_spec.attention(**arguments, **lists), arguments["query"].dtype)
    assert got.kept.dtype == got.n_kept.dtype == torch.int32 and got.rate.dtype == F64
    visuals = paged_spec.visual_of(arguments)
    if lists:
        visuals = [line[:n] for line, n in zip(lists["kept"].tolist(), lists["n_kept"].tolist(), strict=True)]
    if "rates" in how:
        rates = how["rates"][spec.predict(got.mass, how["weight"], how["bias"])]
        assert torch.equal(got.rate, rates)
        counts = [spec.keep_count(len(visual), rate) for visual, rate in zip(visuals, rates.tolist(), strict=True)]
    else:
        counts = torch.minimum(how["count"], how.get("max_kept", how["count"])).tolist()
    alive = how["alive"].tolist() if "alive" in how else [None] * len(visuals)
    for r, visual in enumerate(visuals):
        kept = [visual[i] for i in spec.select(how.get("score", got.importance)[r].tolist(), counts[r], len(visual), alive[r])]
        assert got.n_kept[r] == len(kept) and got.kept[r].tolist() == kept + [-1] * (got.kept.shape[1] - len(kept))
        assert "rates" not in how or len(kept) == counts[r]
        assert "rates" in how or got.rate[r].item() == pytest.approx(1 - len(kept) / len(visual) if visual else 0.0, abs=1e-12)
    return got


STEPS = each(
    reference=itertools.product(NUMBERS, ["predictor", "count", "narrow", "own"], ["usual"], [False, True], [F64]),
    interpreter=[
        (0, "predictor", "splits", False, F32), (2, "predictor", "two launches", True, F32), (1, "narrow", "one split", True, F32),
        (1, "narrow", "two launches", False, F32), (2, "predictor", "apart", True, F32), (2, "count", "one split", False, F32),
    ],
    full=itertools.product(
        [0, 1, 2], ["predictor", "count", "narrow"], ["one split", "splits", "two launches", "apart"], [False, True], [F32]
    ),
    triton=[
        *((number, "own", "usual", False, kit.HALF) for number in MIDDLE_AND_LAST),
        *((2, kind, "usual", True, F32) for kind in ("predictor", "count", "narrow")),
    ],
)  # fmt: skip


@pytest.mark.parametrize("number, kind, launch, listed, dtype", STEPS, ids=str)
def test_step(backend, number, kind, launch, listed, dtype):
    arguments = paged_spec.problem(SHAPES[number], dtype, share=True)
    lists = paged_spec.lists(arguments, 0.7) if listed else {}
    with backend.launched(launch):
        check_step(backend, arguments, lists, decision(arguments, lists, kind))


@pytest.mark.backends("interpreter")
def test_a_step_of_many_tokens_names_positions(backend, chunks_of_16):
    """More of them than the selection holds at once."""
    arguments = paged_spec.problem(paged_spec.Shape(2, 1, 4, 8, ("1s 30v 2i", "9v 1i"), (1, 2), ((0, -1), (1, -1))), F32)
    for place in ("second_launch", "same_launch"):
        with backend.launched("one split"), backend.decided(place):
            check_step(backend, arguments, {}, decision(arguments, {}, "count"))


def test_the_list_of_a_step_goes_into_the_next_layer(backend):
    arguments = paged_spec.problem(SHAPES[2], usual(backend))
    with backend.launched("one split"):
        step = backend.run("paged_step", **arguments, count=torch.full((5,), 5, dtype=torch.int32))
        check(backend, arguments, mass=False, importance=False, kept=step.kept, n_kept=step.n_kept)


# ---- what is the same whatever the backend ----------------------------------------------------------------------------------------


def test_an_output_that_is_given_is_checked():
    arguments = paged_spec.problem(SHAPES[2])
    every = torch.full((9, 8, 12), 7.0, dtype=F64)
    call = (*ops.PagedRows(**arguments | {"scale": 0.25}), True, False, "auto")
    assert set(torch.library.opcheck(torch.ops.dyrate.paged_attention_out.default, call, {"out": every[2:7]}).values()) == {"SUCCESS"}
    with pytest.raises(ValueError, match="out: expected shape"):
        ops.paged_attention(**arguments, out=every)
    with pytest.raises(ValueError, match="out: expected a contiguous tensor"):
        ops.paged_attention(**arguments, out=torch.empty(5, 12, 8, dtype=F64).transpose(1, 2))


def test_no_paged_operator_waits_for_a_device(no_host_sync):
    arguments = paged_spec.problem(SHAPES[1])
    lists = paged_spec.lists(arguments, 0.5)
    count = torch.full((6,), 4, dtype=torch.int32)
    with no_host_sync():
        ops.paged_attention(**plain(arguments), window=5)
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
    rest = plain(arguments)
    ops.paged_attention(**rest)
    lists = paged_spec.lists(arguments, 0.5)
    ops.paged_attention(**rest, **lists, n_visual=arguments["n_visual"], text_position=arguments["text_position"])
    with pytest.raises(ValueError, match="text_position"):
        ops.paged_attention(**rest, **lists, n_visual=arguments["n_visual"])
