"""Attention over paged rows in Triton: against float64 numpy over a dense mask (tests/ops/paged_spec.py), and bit for bit against the
same kernel over rows that lie one after the other.

``DYRATE_INTERPRETER=full`` runs every combination (five minutes).
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dyrate_kernels import ops
from tests.interpreter import harness
from tests.ops import paged_spec as spec
from tests.ops.paged_spec import SHAPES

EVERY = ("output", "mass", "importance")
FULL = harness.FULL
SETTINGS = {
    "splits": harness.SMALL,
    "one split": harness.ONE_SPLIT,
    "two launches": harness.TWO_LAUNCHES,
    "three splits": harness.THREE_SPLITS,
    "apart": harness.APART,
    "rows of each warp": dataclasses.replace(harness.SMALL, num_warps=2, warp_rows=True, tensor_cores=True),
}


def grid(*axes, usual):
    """Every combination, or the usual few."""
    return list(itertools.product(*axes)) if FULL else usual


def plain(arguments):
    """Returns the arguments of a layer without list and statistics."""
    return {name: arguments[name] for name in ("query", "key", "value", "block_table", "n_rows", "sequence", "scale")}


def check(arguments, dtype=torch.float32, statistics=True, **how):
    given = arguments if statistics or "kept" in how else plain(arguments)
    got = harness.run("paged_attention", **given, **how, mass=statistics, importance=statistics)
    want = spec.attention(**arguments, **how)
    tolerance = harness.TOLERANCE[dtype]
    for value, expected, what in zip(got, want, EVERY, strict=True):
        if value is not None:
            harness.close(value, expected, tolerance if what == "output" else min(tolerance, 1e-5), what)
    return got


def gathered(arguments, how, statistics):
    """The same rows one after the other, as ``ops.decode_attention`` takes them, in the order in which the paged form reads them."""
    from dyrate_kernels.ops import reference

    paged = ops.PagedRows(**arguments, kept=how.get("kept"), n_kept=how.get("n_kept"))
    rows, _ = reference.gather(paged, statistics, statistics)
    return {
        "query": rows.query, "key": rows.key.contiguous(), "value": rows.value.contiguous(), "n_visual": rows.n_visual,
        "n_text": rows.n_text, "visual_capacity": rows.visual_capacity, "scale": rows.scale, "text_type": rows.text_type,
    }  # fmt: skip


@pytest.mark.parametrize(
    "number, chosen",
    grid(
        range(len(SHAPES)), SETTINGS,
        usual=[(0, "splits"), (1, "two launches"), (2, "one split"), (3, "splits"), (4, "one split"), (2, "rows of each warp")],
    ),
)  # fmt: skip
def test_statistics(number, chosen):
    with harness.settings(SETTINGS[chosen]):
        check(spec.problem(SHAPES[number], torch.float32, share=number == 1))


@pytest.mark.parametrize("number", range(len(SHAPES)) if FULL else [1, 2])
def test_all_rows(number):
    arguments = spec.problem(SHAPES[number], torch.float16, share=number == 2)
    with harness.settings():
        check(arguments, torch.float16, statistics=False)


@pytest.mark.parametrize(
    "number, share, statistics",
    grid([0, 1, 2, 3], [0.0, 0.4, 1.0], [False, True], usual=[(0, 0.0, False), (1, 0.4, False), (2, 0.4, True), (3, 1.0, False)]),
)
def test_kept_list(number, share, statistics):
    arguments = spec.problem(SHAPES[number], torch.float32)
    how = spec.lists(arguments, share, None if share == 0.4 else 31)
    with harness.settings():
        check(arguments, statistics=statistics, **how)


def test_rows_that_no_list_names_are_not_read():
    arguments = spec.problem(SHAPES[1], torch.float32)
    how = spec.lists(arguments, 0.3)
    size = SHAPES[1].block
    named = {(s, p) for s, line, n in zip(spec.owners(arguments), how["kept"].tolist(), how["n_kept"], strict=True) for p in line[: int(n)]}
    for s, line in enumerate(arguments["visual_position"].tolist()):
        for p in line:
            if p != spec.GARBAGE and (s, p) not in named:
                arguments["key"][arguments["block_table"][s, p // size], p % size] = float("nan")
                arguments["value"][arguments["block_table"][s, p // size], p % size] = float("nan")
    with harness.settings():
        got = harness.run("paged_attention", **arguments, **how)
    assert got.output.isfinite().all()


@pytest.mark.parametrize(
    "number, form, window",
    grid([1, 4], ["all", "list", "statistics"], [1, 7, 40], usual=[(1, "all", 7), (1, "list", 7), (4, "all", 40), (0, "statistics", 7)]),
)
def test_sliding_window(number, form, window):
    arguments = spec.problem(SHAPES[number], torch.float32)
    how = spec.lists(arguments, 0.5) if form == "list" else {}
    with harness.settings():
        check(arguments, statistics=form == "statistics", window=window, **how)


def test_a_window_begins_where_it_begins():
    """Blocks that lie before it may have been given back: what stands there is not read."""
    arguments = spec.problem(SHAPES[4], torch.float32)
    for s, total in enumerate((159, 135)):
        arguments["block_table"][s, : (total - 20 - 3) // SHAPES[4].block] = 0
    arguments["key"][0] = float("nan")
    used = {int(b) for line in arguments["block_table"].tolist() for b in line if 0 < b < spec.GARBAGE}
    if 0 in used:
        pytest.skip("block 0 is in use")
    with harness.settings(harness.ONE_SPLIT):
        got = harness.run("paged_attention", **plain(arguments), window=20)
    assert got.output.isfinite().all()


@pytest.mark.parametrize(
    "number, form",
    grid(
        [0, 1, 2, 4], ["all", "list", "statistics", "list, statistics"],
        usual=[(0, "list, statistics"), (1, "all"), (2, "statistics"), (1, "list")],
    ),
)  # fmt: skip
def test_equals_rows_in_a_row_bit_for_bit(number, form):
    """Blocks in whatever order, the same numbers in the same order: the same bits as over contiguous rows."""
    arguments = spec.problem(SHAPES[number], torch.float32, seed=number)
    statistics, how = "statistics" in form, spec.lists(arguments, 0.6) if "list" in form else {}
    given = plain(arguments) if form == "all" else arguments
    straight = gathered(arguments, how, statistics)
    for chosen in (harness.ONE_SPLIT, harness.THREE_SPLITS) if FULL else (harness.THREE_SPLITS,):
        with harness.settings(chosen):
            got = harness.run("paged_attention", **given, **how, mass=statistics, importance=statistics)
            want = harness.run("decode_attention", **straight, mass=statistics, importance=statistics)
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or harness.same(a, b)


def test_order_of_blocks_changes_nothing():
    """The same sequences in another pool, other blocks, other sizes of block and layouts: the same bits."""
    results = []
    for block, seed in ((4, 0), (16, 0), (5, 0), (1, 0)):
        shape = spec.Shape(4, 2, 8, block, ("2s 9v 3i 11v 1i", "7v 2i"), (3, 9), ((0, -1), (1, -3), (1, -1)))
        arguments = spec.problem(shape, torch.float32, seed=seed, spare=block)
        rng = torch.Generator().manual_seed(9)
        dense = [torch.randn(2, 40, 2, 8, generator=rng) for _ in range(2)]
        for pool, rows in zip((arguments["key"], arguments["value"]), dense, strict=True):
            for s, total in enumerate((29, 18)):
                for p in range(total):
                    pool[arguments["block_table"][s, p // block], p % block] = rows[s, p]
        if block == 16:  # one pool of keys and values, heads before rows: vLLM's
            both = torch.full((arguments["key"].shape[0], 2, block, 16), float("nan"))
            both[..., :8], both[..., 8:] = arguments["key"].transpose(1, 2), arguments["value"].transpose(1, 2)
            arguments |= {"key": both[..., :8].transpose(1, 2), "value": both[..., 8:].transpose(1, 2)}
        arguments["query"] = torch.randn(3, 4, 8, generator=rng)
        with harness.settings(harness.ONE_SPLIT):
            results.append(harness.run("paged_attention", **arguments, mass=True, importance=True))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert harness.same(a, b)


def test_a_bound_on_rows_changes_nothing_nor_does_a_given_output():
    arguments = spec.problem(SHAPES[4], torch.float32)
    out = torch.full((5, 2, 4), float("nan"))
    with harness.settings(harness.ONE_SPLIT):
        free = harness.run("paged_attention", **arguments, mass=True, importance=True)
        bounded = ops.paged_attention(**arguments, mass=True, importance=True, row_bound=159, out=out[1:4], backend="triton")
    assert out[0].isnan().all() and out[4].isnan().all() and harness.same(out[1:4], free.output)
    for a, b in zip(free, bounded, strict=True):
        assert harness.same(a, b)


def decision(arguments, tokens, kind, seed=2):
    rows, heads, _ = arguments["query"].shape
    g = torch.Generator().manual_seed(seed)
    if kind == "predictor":
        rates = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
        return {"weight": 8 * torch.randn(5, heads * 4, generator=g), "bias": torch.randn(rows, 5, generator=g), "rates": rates}
    count = torch.randint(0, tokens + 2, (rows,), generator=g, dtype=torch.int32)
    how = {"count": count, "score": torch.randint(0, 6, (rows, tokens), generator=g).float()}
    if kind == "narrow":
        how |= {"alive": torch.rand(rows, tokens, generator=g) < 0.6, "max_kept": torch.full((rows,), 4, dtype=torch.int32)}
    return how


@pytest.mark.parametrize(
    "number, kind, chosen, listed",
    grid(
        [0, 1, 2], ["predictor", "count", "narrow"], ["one split", "splits", "two launches", "apart"], [False, True],
        usual=[
            (0, "predictor", "splits", False), (2, "predictor", "two launches", True), (1, "narrow", "one split", True),
            (1, "narrow", "two launches", False), (2, "predictor", "apart", True), (2, "count", "one split", False),
        ],
    ),
)  # fmt: skip
def test_step(number, kind, chosen, listed):
    arguments = spec.problem(SHAPES[number], torch.float32, share=True)
    lists = spec.lists(arguments, 0.7) if listed else {}
    tokens = lists["kept"].shape[1] if lists else arguments["visual_position"].shape[1]
    how = decision(arguments, tokens, kind)
    with harness.settings(SETTINGS[chosen]):
        got = harness.run("paged_step", **arguments, **lists, **how)
    want = ops.paged_step(**arguments, **lists, **how, backend="reference")
    for name, value, expected in zip(got._fields, got, want, strict=True):
        if value.dtype == torch.int32:
            assert torch.equal(value, expected), f"{name}: {value} instead of {expected}"
        else:
            harness.close(value, expected, 1e-12 if name == "rate" else 3e-6, name)


def test_a_step_of_many_tokens_names_positions(monkeypatch):
    """More of them than the selection holds at once."""
    from dyrate_kernels.triton_kernels import backend

    whole = backend.plan.select
    monkeypatch.setattr(backend.plan, "select", lambda tokens, largest=0: whole(tokens, 16))
    monkeypatch.setattr(backend, "_attentions", {})
    arguments = spec.problem(spec.Shape(2, 1, 4, 8, ("1s 30v 2i", "9v 1i"), (1, 2), ((0, -1), (1, -1))), torch.float32)
    how = decision(arguments, 30, "count")
    for chosen in (harness.ONE_SPLIT, dataclasses.replace(harness.ONE_SPLIT, decision="same_launch")):
        with harness.settings(chosen):
            got = harness.run("paged_step", **arguments, **how)
        want = ops.paged_step(**arguments, **how, backend="reference")
        assert torch.equal(got.kept, want.kept) and torch.equal(got.n_kept, want.n_kept)


def test_the_list_of_a_step_goes_into_the_next_layer():
    arguments = spec.problem(SHAPES[2], torch.float32)
    with harness.settings(harness.ONE_SPLIT):
        step = harness.run("paged_step", **arguments, count=torch.full((5,), 5, dtype=torch.int32))
        check(arguments, statistics=False, kept=step.kept, n_kept=step.n_kept)


def test_lengths_and_tables_may_change_under_a_fixed_launch():
    """The same capacities serve every length and every order of blocks: what a captured graph relies on."""
    from dyrate_kernels.triton_kernels import backend

    with harness.settings(harness.ONE_SPLIT):
        check(spec.problem(SHAPES[0], torch.float32))
        known = len(backend._attentions)
        check(spec.problem(dataclasses.replace(SHAPES[0], rows=((0, 12), (1, 0))), torch.float32, seed=1))
        assert len(backend._attentions) == known
