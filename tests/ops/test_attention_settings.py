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
from tests.ops.test_attention_interpreted import SHAPES, check, problem

pytestmark = [pytest.mark.backends("interpreter"), pytest.mark.usefixtures("backend")]

TWO_WARPS = dataclasses.replace(harness.SMALL, num_warps=2, warp_rows=True)  # blocks of 32 rows, each warp's are 16
FOUR_WARPS = dataclasses.replace(harness.TWO_LAUNCHES, num_warps=4, warp_rows=True)
ONE_SPLIT = dataclasses.replace(harness.ONE_SPLIT, num_warps=2, warp_rows=True)
TENSOR_CORES = dataclasses.replace(harness.SMALL, tensor_cores=True)
BOTH = dataclasses.replace(harness.TWO_LAUNCHES, tensor_cores=True, num_warps=2, warp_rows=True)
GROUPS = (2, 3, 4, 5, 6, 7, 8, 16)
DIMS = (64, 80, 96, 128, 256)
FULL = harness.FULL


def test_settings_choose_the_form():
    def form(group, **chosen):
        made = plan.attention("x", 4, 1, 1, group, 64, 64, 2, 200, "plain", plan.Settings(block_n=16, **chosen))
        return made.dot, made.row_warps, made.block_n

    assert form(1) == (False, 1, 16) == form(1, warp_rows=True)
    assert form(4) == (True, 1, 16) == form(1, tensor_cores=True)
    assert form(4, warp_rows=True) == (True, 4, 64) == form(1, warp_rows=True, tensor_cores=True)
    assert form(4, warp_rows=True, num_warps=2) == (True, 2, 32)


@pytest.mark.parametrize(
    "case, chosen",
    [(SHAPES[n], how) for n in (2, 5, 9) for how in (TWO_WARPS, FOUR_WARPS, ONE_SPLIT) if n != 9 or how is ONE_SPLIT or FULL],
    ids=str,
)
def test_rows_of_each_warp(case, chosen):
    for dtype in (torch.float32, torch.float16):
        arguments, _ = problem(case, dtype)
        with harness.settings(chosen):
            check(arguments, dtype)


@pytest.mark.parametrize("chosen", [TENSOR_CORES, BOTH], ids=["shared rows", "rows of each warp"])
@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[8]], ids=str)
def test_one_head_through_the_tensor_cores(case, chosen):
    for dtype in (torch.float32, torch.float16):
        arguments, _ = problem(case, dtype)
        with harness.settings(chosen):
            check(arguments, dtype)


@pytest.mark.parametrize(
    "case, chosen",
    [(SHAPES[1], BOTH), (SHAPES[1], TENSOR_CORES), (SHAPES[5], TWO_WARPS)],
    ids=["both", "tensor cores", "rows of each warp"],
)
def test_lists_and_windows(case, chosen):
    """Rows that are not listed hold NaN, and so do those past a length."""
    _, arguments = problem(case, torch.float32)
    counts = [n // 2 for n in case[6]]
    kept, n_kept = spec.lists(case[6], counts, max(counts))
    with harness.settings(chosen):
        check(arguments, torch.float32, window=20)
        for b, n in enumerate(case[6]):
            others = sorted({*range(n)} - {*kept[b, : counts[b]].tolist()})
            arguments["key"][b, :, others] = arguments["value"][b, :, others] = float("nan")
        check(arguments, torch.float32, kept=kept, n_kept=n_kept)
        check(arguments, torch.float32, window=17, kept=kept, n_kept=n_kept)


@pytest.mark.parametrize("case, chosen", [(SHAPES[1], BOTH), (SHAPES[5], TWO_WARPS)], ids=["both", "rows of each warp"])
def test_new_row(case, chosen):
    arguments, _ = problem(case, torch.float32)
    batch, _, kv_heads, dim = case[:4]
    new = {name: torch.randn(batch, kv_heads, dim) for name in ("new_key", "new_value")}
    with harness.settings(chosen):
        got = harness.run("decode_attention", **arguments, mass=True, importance=True, **new)
    for b, n in enumerate(case[7]):
        for name in ("key", "value"):
            assert n == 0 or torch.equal(arguments[name][b, :, case[4] + n - 1], new[f"new_{name}"][b])
    for value, expected in zip(got, spec.attention(**arguments), strict=True):
        harness.close(value, expected, 3e-6, "result")


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "all -inf"])
@pytest.mark.parametrize("group, chosen", [(1, TENSOR_CORES), (2, TWO_WARPS)], ids=["tensor cores", "rows of each warp"])
def test_special_logits(kind, group, chosen):
    arguments, _ = problem((2, 2 * group, 2, 4, 20, 5, [20, 9], [5, 3]), torch.float32)
    arguments["query"].abs_()
    number = {"nan": float("nan"), "inf": float("inf")}.get(kind, -float("inf"))
    if kind == "all -inf":
        arguments["key"][0, 0] = number
    else:
        arguments["key"][0, 0, 3] = arguments["key"][1, 1, 22] = number
    with harness.settings(chosen):
        got = harness.run("decode_attention", **arguments, mass=True, importance=True)
    want = ops.decode_attention(**arguments, mass=True, importance=True, backend="reference")
    for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
        harness.close(value, expected, 3e-6, what)


COMBINED_APART = {
    "all": dataclasses.replace(harness.TWO_LAUNCHES, combine="second_launch"),
    "a few at a time": dataclasses.replace(harness.THREE_SPLITS, combine="second_launch"),
    "apart": dataclasses.replace(harness.APART, combine="second_launch"),
    "one launch decides": dataclasses.replace(harness.SMALL, combine="second_launch"),
}


@pytest.mark.parametrize(
    "number, chosen",
    [(1, "all"), (2, "a few at a time"), (5, "apart"), (3, "one launch decides"), *[(9, "all")] * FULL],
)
def test_splits_combined_in_a_launch_of_their_own(number, chosen, monkeypatch):
    """With all statistics, with each alone and with none, through a list, with a decision."""
    case = SHAPES[number]
    monkeypatch.setattr(plan, "COMBINED_APART", 32)
    monkeypatch.setattr(backend, "_attentions", {})
    arguments, _ = problem(case, torch.float32)
    counts = [n // 2 for n in case[6]]
    # room for all rows: a launch has more splits than the lists fill
    lists = dict(zip(("kept", "n_kept"), spec.lists(case[6], counts, case[4]), strict=True))
    with harness.settings(COMBINED_APART[chosen]):
        check(arguments, torch.float32)
        for given, asked in (({}, {}), ({}, {"mass": True}), (lists, {"mass": True})):
            got = harness.run("decode_attention", **arguments, **given, **asked)
            for name, value, expected in zip(got._fields, got, spec.attention(**arguments, **given), strict=True):
                if value is not None:
                    harness.close(value, expected, 3e-6, name)
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
    "case, chosen", [(SHAPES[n], how) for n in (1, 6, 9) for how in HALF_LOGITS if n != 9 or how == "one split" or FULL], ids=str
)
def test_logits_in_float16(case, chosen):
    """Every importance and mass is off by 2^-11 |z| ln 2 of itself at most, z being a logit in base 2; the output knows nothing of it."""
    arguments, _ = problem(case, torch.float32)
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
    arguments, _ = problem((2, 2 * group, 2, 4, 20, 5, [20, 9], [5, 3]), torch.float32)
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
    arguments, _ = problem(SHAPES[1], torch.float32)
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
    arguments, _ = problem((1, group, 1, dim, 20, 13, [19], [13]), dtype)
    with harness.settings(chosen):
        check(arguments, dtype)
