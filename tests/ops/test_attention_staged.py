"""Attention of 16-bit rows through tiles in shared memory (csrc/attention_staged.h) in every setting, against float64 loops.

``DYRATE_EMULATION=full`` tries every combination.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.ops import cuda
from tests.emulated import harness
from tests.guarded import guarded
from tests.ops import spec
from tests.ops.attention_problems import assert_close, problem, spread, unlisted

pytestmark = [pytest.mark.backends("emulated"), pytest.mark.usefixtures("backend")]

# (tensor_cores, stages, bulk) and the query heads of a unit that follow from 1, 2, 7, 8, 12 and 20 heads a key/value head
HALVES = [torch.float16, torch.bfloat16]
SETTINGS = [(2, 0, 0), (1, 2, 0), (2, 3, 1), (1, 4, 1)]
GROUPS = [1, 7, 12]
# batch, kv_heads, visual capacity, text capacity, visual lengths, text lengths: tiles of 32 and 64 rows, in part, in many rounds of a ring
ROWS = [
    (2, 1, 300, 90, [299, 7], [85, 0]),
    (3, 2, 40, 30, [40, 0, 33], [30, 25, 1]),
    (1, 1, 64, 1, [64], [0]),
]
FEW = (2, 1, 30, 9, [30, 11], [9, 4])


@contextlib.contextmanager
def settings(tensor_cores: int, stages: int, bulk: int) -> Iterator[None]:
    cuda.override = cuda.Settings(tensor_cores, stages, bulk)
    cuda._attentions.clear()
    try:
        yield
    finally:
        cuda.override = None


def check(arguments, window=None):
    got = harness.run("decode_attention", **arguments, window=window, mass=True, importance=True)
    assert_close(got, spec.attention(**arguments, window=window), arguments["query"].dtype)


def unit(group: int, tensor_cores: int) -> int:
    return (8 if group <= 8 else 16) if group >= tensor_cores else 1


def ran(group: int, tensor_cores: int, stages: int, bulk: int) -> None:
    """The calls of this test took the kernel that it is about."""
    made = [known.attention for known in cuda._attentions.values()]
    heads = unit(group, tensor_cores)
    assert made and all(call.unit == heads and call.bulk == (bulk if heads <= 8 else 0) for call in made)
    assert all(call.stages == stages if stages else 2 <= call.stages <= 4 for call in made)


def case_of(rows: tuple, group: int, dim: int) -> tuple:
    batch, kv_heads, visual, text, *lengths = rows
    return (batch, kv_heads * group, kv_heads, dim, visual, text, *lengths)


@pytest.mark.parametrize(
    "rows, how, group, number", harness.cells(4, harness.some(ROWS), harness.some(SETTINGS, 4), GROUPS, harness.some([0, 1])), ids=str
)
def test_rows(rows, how, group, number):
    with settings(*how), harness.splits(2, 32):
        check(problem(case_of(rows, group, (128, 64)[number]), HALVES[number]))
        ran(group, *how)


@pytest.mark.parametrize(
    "dim, group, how",
    harness.cells(
        4, harness.some([8, 16, 72, 80, 96, 128], 1), harness.some([1, 2, 8, 16, 20], 5), harness.some([SETTINGS[0], SETTINGS[3]])
    ),
)
def test_dims_and_groups(dim, group, how):
    with settings(*how), harness.splits(2, 32):
        check(problem(case_of(ROWS[1], group, dim), torch.float16))
        ran(group, *how)


@pytest.mark.parametrize("value_dim, group, how", harness.cells(4, harness.some([8, 40, 120]), [1, 4], SETTINGS), ids=str)
def test_values_of_another_dim(value_dim, group, how):
    arguments = problem(case_of(ROWS[1], group, 96), torch.bfloat16)
    g = torch.Generator().manual_seed(value_dim)
    arguments["value"] = spread(torch.randn(3, 2, 70, value_dim, generator=g).to(torch.bfloat16))
    with settings(*how), harness.splits(2, 32):
        check(arguments)
        ran(group, *how)


@pytest.mark.parametrize("wide", ["key", "value"])
def test_rows_of_one_tensor_follow_each_other_alone(wide):
    """Neighbours among the keys (values) come in one bulk copy only where the values (keys) are neighbours too."""
    arguments = problem(case_of(ROWS[1], 1, 64), torch.float16)
    arguments[wide] = spread(arguments[wide], columns=8)
    with settings(2, 0, 1), harness.splits(2, 32):
        check(arguments)
        ran(1, 2, 0, 1)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("how", harness.some(SETTINGS, 4), ids=str)
def test_kept_list(how, group):
    """Lists with runs of neighbours, beside rows of NaN; the new row behind them; then a window."""
    case = case_of(ROWS[0], group, 64)
    counts = [170, 3]
    kept, n_kept = spec.lists(case[6], counts, 190)
    kept[0, :100] = torch.cat([torch.arange(40, 90), torch.arange(110, 160)]).int()
    kept[0, 100:170] = torch.arange(200, 270)
    arguments = problem(case, torch.float16)
    unlisted(arguments, kept, n_kept)
    new = {name: torch.randn(2, 1, 64).half() for name in ("new_key", "new_value")}
    for name in ("key", "value"):
        arguments[name][0, :, 300 + 84] = float("nan")
    with settings(*how), harness.splits(3, 16):
        got = harness.run("decode_attention", **arguments, kept=kept, n_kept=n_kept, mass=True, importance=True, **new)
        ran(group, *how)
    want = spec.attention(**arguments, kept=kept, n_kept=n_kept)  # the new row is in place now
    assert torch.equal(arguments["key"][0, :, 384], new["new_key"][0])
    assert_close(got, want, torch.float16)


@pytest.mark.parametrize("how, group, window", harness.cells(2, harness.some(SETTINGS, 4), GROUPS, harness.some([20, 1])), ids=str)
def test_sliding_window(how, group, window):
    """Rows outside the window hold NaN."""
    arguments = problem(case_of(ROWS[1], group, 128), torch.float16, window=True)
    outside = arguments["query_position"][:, None] - arguments["position"] >= window
    for name in ("key", "value"):
        arguments[name].masked_fill_(outside[:, None, :, None], float("nan"))
    with settings(*how), harness.splits(2, 16):
        check(arguments, window=window)
        ran(group, *how)


@pytest.mark.parametrize("group", GROUPS)
def test_settings_agree(group):
    """How many tiles are on their way, and how they come, changes no bit."""
    arguments = problem(case_of(ROWS[0], group, 128), torch.float16)
    new = {name: torch.randn(2, 1, 128).half() for name in ("new_key", "new_value")}
    seen = []
    for stages, bulk in harness.some([(2, 0), (3, 0), (4, 0), (2, 1), (3, 1), (4, 1)]):
        with settings(2, stages, bulk), harness.splits(3, 32):
            seen.append(harness.run("decode_attention", **arguments, mass=True, importance=True, **new))
            ran(group, 2, stages, bulk)
    assert all(harness.same(a, b) for other in seen for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize(
    "kind, group, how",
    harness.cells(4, harness.some(["nan", "-inf", "all -inf", "nan value"]), [1, 2, 12], harness.some(SETTINGS)),
    ids=str,
)
def test_special_logits(kind, group, how):
    arguments = problem(case_of(ROWS[1], group, 8), torch.float16)
    arguments["query"].abs_()
    if kind == "nan value":
        arguments["value"][0, 0, 3] = float("nan")
    elif kind == "all -inf":
        arguments["key"][0, 0] = -float("inf")
    else:
        arguments["key"][0, 0, 3] = float(kind)
        arguments["key"][1, 1, 45] = float(kind)
    want = ops.decode_attention(**arguments, mass=True, importance=True, backend="reference")
    with settings(*how), harness.splits(2, 16):
        got = harness.run("decode_attention", **arguments, mass=True, importance=True)
    assert_close(got, want, torch.float16)
    assert got.output.isnan().any() == (kind != "-inf")


@pytest.mark.parametrize("group", GROUPS)
def test_score_last_query(group):
    arguments = problem(case_of(ROWS[1], group, 64), torch.bfloat16)
    _, *want = spec.attention(**arguments)
    for how in harness.some(SETTINGS):
        with settings(*how), harness.splits(2, 16):
            got = harness.run("score_last_query", **arguments)
            ran(group, *how)
        assert_close((None, *got), (None, *want), torch.bfloat16)


def test_other_rows_go_through_registers():
    """float32, heads above 128, an address that is no multiple of 16, a row that is no whole number of 16 bytes; and when asked for."""
    for dtype, dim, stages in ((torch.float32, 64, 0), (torch.float16, 136, 0), (torch.float16, 64, 1)):
        with settings(1, stages, 1), harness.splits(2, 32):
            check(problem(case_of(FEW, 2, dim), dtype))
            assert {known.attention.unit for known in cuda._attentions.values()} == {0}
    arguments = problem(case_of(FEW, 12, 64), torch.float16)
    for name in ("query", "key"):
        moved, _ = guarded(arguments[name], shift=1)
        with settings(2, 0, 0), harness.splits(2, 32):
            check(arguments | {name: moved})
    with settings(2, 0, 0), harness.splits(2, 32):
        check(problem(case_of(FEW, 12, 60), torch.float16))
