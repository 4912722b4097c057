"""The main loop's other forms, and every number of query heads a key/value head with every head dim, against tests/ops/spec.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.ops import workspace
from dyrate_kernels.triton_kernels import backend, plan
from tests.interpreter import harness
from tests.ops import spec
from tests.ops.attention_problems import SHAPES, assert_close, lists, new_row, problem, unlisted

pytestmark = [pytest.mark.backends("interpreter"), pytest.mark.usefixtures("backend")]

TWO_WARPS = dataclasses.replace(harness.SMALL, num_warps=2, warp_rows=True)  # blocks of 32 rows, each warp's are 16
FOUR_WARPS = dataclasses.replace(harness.TWO_LAUNCHES, num_warps=4, warp_rows=True)
ONE_SPLIT = dataclasses.replace(harness.ONE_SPLIT, num_warps=2, warp_rows=True)
TENSOR_CORES = dataclasses.replace(harness.SMALL, tensor_cores=True)
BOTH = dataclasses.replace(harness.TWO_LAUNCHES, tensor_cores=True, num_warps=2, warp_rows=True)
GROUPS = (2, 3, 4, 5, 6, 7, 8, 16)
DIMS = (64, 80, 96, 128, 256)
FULL = harness.FULL


def check(arguments, window=None, **lists):
    got = harness.run("decode_attention", **arguments, window=window, mass=True, importance=True, **lists)
    assert_close(got, spec.attention(**arguments, window=window, **lists), arguments["query"].dtype)


def test_settings_choose_the_form():
    def form(group, **chosen):
        made = plan.attention("x", 4, 1, 1, group, 64, 64, 2, 200, "plain", plan.Settings(block_n=16, **chosen))
        return made.dot, made.row_warps, made.block_n

    assert form(1) == (False, 1, 16) == form(1, warp_rows=True)
    assert form(4) == (True, 1, 16) == form(1, tensor_cores=True)
    assert form(4, warp_rows=True) == (True, 4, 64) == form(1, warp_rows=True, tensor_cores=True)
    assert form(4, warp_rows=True, num_warps=2) == (True, 2, 32)


@pytest.mark.parametrize(
    "name, chosen",
    [
        (name, how)
        for name in ("pairs", "longer", "much text of threes")
        for how in (TWO_WARPS, FOUR_WARPS, ONE_SPLIT)
        if name != "much text of threes" or how is ONE_SPLIT or FULL
    ],
    ids=str,
)
def test_rows_of_each_warp(name, chosen):
    for dtype in (torch.float32, torch.float16):
        arguments = problem(name, dtype)
        with harness.settings(chosen):
            check(arguments)


@pytest.mark.parametrize("chosen", [TENSOR_CORES, BOTH], ids=["shared rows", "rows of each warp"])
@pytest.mark.parametrize("name", ["heads", "much text"], ids=str)
def test_one_head_through_the_tensor_cores(name, chosen):
    for dtype in (torch.float32, torch.float16):
        arguments = problem(name, dtype)
        with harness.settings(chosen):
            check(arguments)


@pytest.mark.parametrize(
    "name, chosen",
    [("heads", BOTH), ("heads", TENSOR_CORES), ("longer", TWO_WARPS)],
    ids=["both", "tensor cores", "rows of each warp"],
)
def test_lists_and_windows(name, chosen):
    """Rows that are not listed hold NaN, and so do those past a length."""
    arguments = problem(name, torch.float32, window=True)
    how = lists(arguments, 0.5)
    with harness.settings(chosen):
        check(arguments, window=20)
        unlisted(arguments, **how)
        check(arguments, **how)
        check(arguments, window=17, **how)


@pytest.mark.parametrize("name, chosen", [("heads", BOTH), ("longer", TWO_WARPS)], ids=["both", "rows of each warp"])
def test_new_row(name, chosen):
    arguments = problem(name, torch.float32)
    new = new_row(arguments)
    with harness.settings(chosen):
        got = harness.run("decode_attention", **arguments, mass=True, importance=True, **new)
    for b, n in enumerate(SHAPES[name][7]):
        for part in ("key", "value"):
            assert n == 0 or torch.equal(arguments[part][b, :, SHAPES[name][4] + n - 1], new[f"new_{part}"][b])
    assert_close(got, spec.attention(**arguments), torch.float32)


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "all -inf"])
@pytest.mark.parametrize("group, chosen", [(1, TENSOR_CORES), (2, TWO_WARPS)], ids=["tensor cores", "rows of each warp"])
def test_special_logits(kind, group, chosen):
    arguments = problem((2, 2 * group, 2, 4, 20, 5, [20, 9], [5, 3]), torch.float32)
    arguments["query"].abs_()
    number = {"nan": float("nan"), "inf": float("inf")}.get(kind, -float("inf"))
    if kind == "all -inf":
        arguments["key"][0, 0] = number
    else:
        arguments["key"][0, 0, 3] = arguments["key"][1, 1, 22] = number
    with harness.settings(chosen):
        got = harness.run("decode_attention", **arguments, mass=True, importance=True)
    assert_close(got, spec.attention(**arguments), torch.float32)


COMBINED_APART = {
    "all": dataclasses.replace(harness.TWO_LAUNCHES, combine="second_launch"),
    "a few at a time": dataclasses.replace(harness.THREE_SPLITS, combine="second_launch"),
    "apart": dataclasses.replace(harness.APART, combine="second_launch"),
    "one launch decides": dataclasses.replace(harness.SMALL, combine="second_launch"),
}


@pytest.mark.parametrize(
    "name, chosen",
    [
        ("heads", "all"),
        ("pairs", "a few at a time"),
        ("longer", "apart"),
        ("sevens", "one launch decides"),
        *[("much text of threes", "all")] * FULL,
    ],
)
def test_splits_combined_in_a_launch_of_their_own(name, chosen, monkeypatch):
    """With all statistics, with each alone and with none, through a list, with a decision."""
    case = SHAPES[name]
    monkeypatch.setattr(plan, "COMBINED_APART", 32)
    monkeypatch.setattr(backend, "_attentions", {})
    arguments = problem(name, torch.float32)
    listed = lists(arguments, 0.5, case[4])  # room for all rows: a launch has more splits than the lists fill
    with harness.settings(COMBINED_APART[chosen]):
        check(arguments)
        for given, asked in (({}, {}), ({}, {"mass": True}), (listed, {"mass": True})):
            got = harness.run("decode_attention", **arguments, **given, **asked)
            assert_close(got, spec.attention(**arguments, **given), torch.float32)
        count = {"count": torch.full((case[0],), 2, dtype=torch.int32)}
        step = harness.run("decode_step", **arguments, **count)
        want = ops.decode_step(**arguments, **count, backend="reference")
        assert torch.equal(step.kept, want.kept) and torch.equal(step.n_kept, want.n_kept)
    apart = [prepared.combine is not None for prepared in backend._attentions.values()]
    assert any(apart) and all(apart) == (chosen != "one launch decides")


HALF_LOGITS = {
    "same launch": dataclasses.replace(harness.SMALL, logit_bytes=2),
    "one split": dataclasses.replace(harness.ONE_SPLIT, logit_bytes=2, decision="second_launch"),
    "rows of each warp": dataclasses.replace(FOUR_WARPS, logit_bytes=2),
}


@pytest.mark.parametrize(
    "name, chosen",
    [
        (name, how)
        for name in ("heads", "nothing", "much text of threes")
        for how in HALF_LOGITS
        if name != "much text of threes" or how == "one split" or FULL
    ],
)
def test_logits_in_float16(name, chosen):
    """Every importance and mass is off by 2^-11 |z| ln 2 of itself at most, z being a logit in base 2; the output knows nothing of it."""
    arguments = problem(name, torch.float32)
    case = SHAPES[name]
    arguments["query"] *= 3
    with harness.settings(dataclasses.replace(HALF_LOGITS[chosen], logit_bytes=4)):
        exact = harness.run("decode_attention", **arguments, mass=True, importance=True)
    with harness.settings(HALF_LOGITS[chosen]):
        got = harness.run("decode_attention", **arguments, mass=True, importance=True)
    assert harness.same(got.output, exact.output)
    largest = 0.0
    for b in range(case[0]):
        rows = [*range(case[6][b]), *range(case[4], case[4] + case[7][b])]
        keys = arguments["key"][b, :, rows].double().repeat_interleave(case[1] // case[2], 0)
        z = arguments["scale"] * torch.einsum("hd,hrd->hr", arguments["query"][b].double(), keys) / math.log(2)
        largest = max(largest, z.abs().max().item() if rows else 0.0)
    bound = 2**-11 * largest * math.log(2) + 2**-11  # and of a sum that is kept in float16
    assert largest > 4
    error = (got.importance - exact.importance).abs()
    assert (error <= bound * exact.importance + 1e-9).all() and error.max() > 1e-6
    text = [0, 2, 3]
    assert ((got.mass - exact.mass)[..., text].abs() <= bound * exact.mass[..., text] + 1e-6).all()
    harness.close(got.mass.sum(-1), exact.mass.sum(-1), bound, "sum of mass")


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "all -inf", "large"])
@pytest.mark.parametrize("group, chosen", [(1, "same launch"), (1, "one split"), (2, "same launch"), (2, "rows of each warp")])
def test_special_logits_in_float16(kind, group, chosen):
    """Logits that are no number, dead rows, and logits that float16 does not hold."""
    arguments = problem((2, 2 * group, 2, 4, 20, 5, [20, 9], [5, 3]), torch.float32)
    arguments["query"].abs_()
    number = {"nan": float("nan"), "inf": float("inf"), "large": -1e6}.get(kind, -float("inf"))
    if kind == "all -inf":
        arguments["key"][0, 0] = number
    else:
        arguments["key"][0, 0, 3] = arguments["key"][1, 1, 22] = number
    with harness.settings(HALF_LOGITS[chosen]):
        got = harness.run("decode_attention", **arguments, mass=True, importance=True)
    want = ops.decode_attention(**arguments, mass=True, importance=True, backend="reference")
    for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
        harness.close(value, expected, 3e-6 if what == "output" else 2e-3, what)


def test_scratch_memory_of_logits_in_float16(monkeypatch):
    monkeypatch.setattr(workspace, "_workspaces", {})
    arguments = problem("heads", torch.float32)
    with harness.settings(HALF_LOGITS["same launch"]):
        ops.decode_attention(**arguments, mass=True, importance=True, backend="triton")
    (space,) = workspace._workspaces.values()
    buffers = space.buffers()
    assert "logits" not in buffers and buffers["logits16"].dtype == torch.float16
    with pytest.raises(ValueError, match="logit_bytes: expected 2 or 4, got 8"):
        plan.Settings(logit_bytes=8)


def grid():
    """Every group and head dim once; all forms of all of them where asked for."""
    for number, (group, dim) in enumerate((g, d) for g in GROUPS for d in DIMS):
        for dtype in (torch.float32, torch.float16):
            for chosen in (harness.SMALL, TWO_WARPS):
                if FULL or (dtype == torch.float16, chosen is TWO_WARPS) == (number % 2 == 1, number % 4 > 1):
                    yield pytest.param(group, dim, dtype, chosen, id=f"{group}-{dim}-{dtype}-{chosen.warp_rows}")


@pytest.mark.parametrize("group, dim, dtype, chosen", [*grid()])
def test_groups_and_head_dims(group, dim, dtype, chosen):
    arguments = problem((1, group, 1, dim, 20, 13, [19], [13]), dtype)
    with harness.settings(chosen):
        check(arguments)
