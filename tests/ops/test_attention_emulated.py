"""decode_attention and score_last_query in CUDA C++, emulated, against float64 loops (tests/ops/spec.py)."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.ops import layers
from tests.emulated import harness
from tests.ops import spec

pytestmark = [pytest.mark.backends("emulated"), pytest.mark.usefixtures("backend")]

# batch, heads, kv_heads, dim, visual capacity, text capacity, visual lengths, text lengths
LENGTHS = [
    (3, 2, 2, 16, 24, 9, [24, 7, 0], [9, 1, 5]),  # unequal rows, no visual token
    (1, 1, 1, 1, 1, 1, [1], [1]),
    (2, 4, 2, 20, 37, 6, [33, 1], [3, 6]),
    (2, 7, 1, 5, 40, 3, [0, 39], [1, 0]),
    (2, 8, 1, 12, 6, 30, [3, 6], [30, 12]),
    (3, 2, 2, 4, 5, 4, [0, 5, 0], [0, 0, 3]),  # nothing to read at all
    (2, 2, 1, 4, 0, 5, [0, 0], [5, 2]),  # no visual region
    (2, 2, 2, 8, 6, 0, [6, 2], [0, 0]),  # no text region
    (1, 8, 2, 32, 70, 40, [65], [33]),
    (2, 3, 3, 24, 700, 133, [697, 257], [131, 64]),  # many tiles
]
DIMS = [16, 32, 64, 80, 96, 128, 256, 1, 5, 8, 72]
GROUPS = [1, 2, 4, 7, 8, 12]


def problem(case, dtype, window=False, **options):
    arguments = spec.problem(*case, dtype=dtype, **options)
    for name in ("key", "value"):
        arguments[name] = harness.spread(arguments[name])
    if not window:
        del arguments["position"], arguments["query_position"]
    return arguments


def check(arguments, window=None, **lists):
    got = harness.run("decode_attention", **arguments, window=window, mass=True, importance=True, **lists)
    want = spec.attention(**arguments, window=window, **lists)
    dtype = arguments["query"].dtype
    assert got.output.dtype == dtype
    for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
        harness.close(value, expected, harness.TOLERANCE[dtype] if what == "output" else harness.STATISTICS, what)
    return got


def unlisted(arguments, kept, lengths, counts):
    """Rows that are not listed hold NaN."""
    for b, n in enumerate(lengths):
        others = sorted({*range(n)} - {*kept[b, : counts[b]].tolist()})
        arguments["key"][b, :, others] = arguments["value"][b, :, others] = float("nan")


@pytest.mark.parametrize("dtype", harness.some(list(harness.FLOATS), 3), ids=str)
@pytest.mark.parametrize("dim", harness.some(DIMS, 7))
def test_dims(dim, dtype):
    with harness.splits(3):
        check(problem((2, 4, 2, dim, 45, 21, [45, 30], [21, 6]), dtype))


@pytest.mark.parametrize("dim", [16, 80])
@pytest.mark.parametrize("dtype", harness.some(list(harness.FLOATS), 2), ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_groups(group, dtype, dim):
    with harness.splits(2):
        check(problem((2, 2 * group, 2, dim, 40, 21, [37, 4], [0, 20]), dtype))


@pytest.mark.parametrize("most, min_rows", harness.some([(5, 8), (1, 64), (64, 1)], 2))
@pytest.mark.parametrize("dtype", harness.some([torch.float32, torch.float16]), ids=str)
@pytest.mark.parametrize("case", harness.some(LENGTHS, 7), ids=str)
def test_lengths(case, dtype, most, min_rows):
    with harness.splits(most, min_rows):
        check(problem(case, dtype))


def test_every_length():
    """All live lengths around the edges of tiles and splits, under one launch shape: what a captured graph relies on."""
    lengths = [*range(9), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129] if harness.PLAIN else [0, 1, 63, 64, 65]
    for n in lengths:
        with harness.splits(4, 16):
            check(problem((2, 2, 1, 16, 129, 33, [n, 129 - n], [n // 4, 33 - n // 4]), torch.float32))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", harness.some([LENGTHS[0], *LENGTHS[2:9]], 2), ids=str)
def test_kept_list(case, share):
    counts = [int(n * share) for n in case[6]]
    kept, n_kept = spec.lists(case[6], counts, max(counts))
    arguments = problem(case, torch.float32)
    unlisted(arguments, kept, case[6], counts)
    with harness.splits(3, 4):
        check(arguments, kept=kept, n_kept=n_kept)


def test_kept_list_in_many_tiles():
    case = LENGTHS[-1]
    counts = [500, 3]
    kept, n_kept = spec.lists(case[6], counts, 600)
    arguments = problem(case, torch.bfloat16)
    unlisted(arguments, kept, case[6], counts)
    for most in harness.some([1, 7]):
        with harness.splits(most):
            check(arguments, kept=kept, n_kept=n_kept)


@pytest.mark.parametrize("with_list", [False, True], ids=["all", "list"])
@pytest.mark.parametrize("window", [1, 20])
@pytest.mark.parametrize("case", harness.some([LENGTHS[2], LENGTHS[0], LENGTHS[5], LENGTHS[8]]), ids=str)
def test_sliding_window(case, window, with_list):
    arguments = problem(case, torch.float32, window=True)
    lists = {}
    if with_list:
        counts = [n // 2 for n in case[6]]
        lists = dict(zip(("kept", "n_kept"), spec.lists(case[6], counts, max(counts)), strict=True))
    with harness.splits(3, 8):
        check(arguments, window=window, **lists)


def test_sliding_window_far_away():
    """The difference of two positions does not fit 32 bits for rows that may not be looked at; it does for live ones."""
    arguments = problem(LENGTHS[0], torch.float32, window=True)
    arguments["query_position"].fill_(2**31 - 1)
    for b, (n, t) in enumerate(zip(LENGTHS[0][6], LENGTHS[0][7], strict=True)):
        live = [*range(n), *range(24, 24 + t)]
        arguments["position"][b, live] = torch.tensor([2**31 - 1 - 3 * i for i in range(len(live))], dtype=torch.int32)
    with harness.splits(2, 8):
        check(arguments, window=10)


@pytest.mark.parametrize("dtype", harness.some(list(harness.FLOATS)), ids=str)
@pytest.mark.parametrize("dim", harness.some([72, 8, 128, 256]))
@pytest.mark.parametrize("moved", ["query", "key", "value", "new_key", "new_value"])
def test_unaligned_addresses(moved, dim, dtype):
    """One element past a multiple of 16 bytes: the results of aligned memory within rounding."""
    arguments = spec.problem(2, 4, 2, dim, 30, 9, [30, 11], [9, 4], dtype=dtype)
    del arguments["position"], arguments["query_position"]
    g = torch.Generator().manual_seed(1)
    new = {name: torch.randn(2, 2, dim, generator=g).to(dtype) for name in ("new_key", "new_value")}
    everything = arguments | new
    everything[moved], memory = harness.guarded(everything[moved], shift=1)
    with harness.splits(2, 8):
        got = harness.run("decode_attention", **everything, mass=True, importance=True)
    memory.check()
    want = spec.attention(**{name: everything[name] for name in arguments})  # the new row is in place now
    for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
        harness.close(value, expected, harness.TOLERANCE[dtype] if what == "output" else harness.STATISTICS, what)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "all -inf", "nan value", "inf value"])
def test_special_logits(kind, group):
    arguments = problem((2, 2 * group, 2, 4, 20, 5, [20, 9], [5, 3]), torch.float32)
    arguments["query"].abs_()
    number = {"nan": float("nan"), "inf": float("inf")}.get(kind, -float("inf"))
    if kind.endswith("value"):
        arguments["value"][0, 0, 3] = float("nan") if kind == "nan value" else float("inf")
    elif kind == "all -inf":
        arguments["key"][0, 0] = number
    else:
        arguments["key"][0, 0, 3] = number
        arguments["key"][1, 1, 22] = number
    for most in harness.some([3, 1]):
        with harness.splits(most, 4):
            got = harness.run("decode_attention", **arguments, mass=True, importance=True)
        # the loops take the lowest number where softmax sees only -inf; torch is the judge here
        want = ops.decode_attention(**arguments, mass=True, importance=True, backend="reference")
        for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
            if kind == "inf value" and what == "output":
                assert torch.equal(value.isfinite(), expected.isfinite())
                continue
            harness.close(value, expected, harness.STATISTICS, what)
        assert got.output.isnan().any() == (kind not in ("-inf", "inf value"))


def test_large_and_small_logits():
    arguments = problem((2, 4, 4, 8, 33, 7, [33, 20], [7, 1]), torch.float32)
    for factor in (1e-30, 1e3, 1e15):
        scaled = arguments | {"scale": factor}
        with harness.splits(3, 4):
            got = harness.run("decode_attention", **scaled, mass=True, importance=True)
        want = ops.decode_attention(**scaled, mass=True, importance=True, backend="reference")
        for value, expected in zip(got, want, strict=True):
            harness.close(value, expected, 1e-4, f"scale {factor}")


@pytest.mark.parametrize("mass, importance", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("case", harness.some([LENGTHS[0], LENGTHS[2], LENGTHS[6]]), ids=str)
def test_each_statistic_alone(case, mass, importance):
    arguments = problem(case, torch.float32)
    if not mass:
        del arguments["text_type"]
    with harness.splits(2, 8):
        got = harness.run("decode_attention", **arguments, mass=mass, importance=importance)
    want = ops.decode_attention(**arguments, mass=mass, importance=importance, backend="reference")
    assert (got.mass is None, got.importance is None) == (not mass, not importance)
    for value, expected in zip(got, want, strict=True):
        if value is not None:
            harness.close(value, expected, harness.STATISTICS, "result")


@pytest.mark.parametrize("value_dim", [1, 4, 16, 40, 130])
def test_values_of_another_dim(value_dim):
    for dtype in harness.some(list(harness.FLOATS)):
        arguments = problem((2, 4, 2, 24, 30, 9, [30, 11], [9, 4]), dtype)
        g = torch.Generator().manual_seed(value_dim)
        arguments["value"] = harness.spread(torch.randn(2, 2, 39, value_dim, generator=g).to(dtype))
        with harness.splits(2, 8):
            check(arguments)


@pytest.mark.parametrize("case", harness.some([LENGTHS[0], *LENGTHS[2:7]]), ids=str)
def test_score_last_query(case):
    arguments = problem(case, torch.float32)
    with harness.splits(3, 8):
        got = harness.run("score_last_query", **arguments)
    _, *want = spec.attention(**arguments)
    for value, expected in zip(got, want, strict=True):
        harness.close(value, expected, harness.STATISTICS, "statistic")


@pytest.mark.parametrize("dtype", harness.some(list(harness.FLOATS)), ids=str)
@pytest.mark.parametrize(
    "case", harness.some([LENGTHS[0], LENGTHS[2], LENGTHS[5], LENGTHS[6], (1, 12, 1, 16, 70, 40, [65], [33])]), ids=str
)
def test_new_row(case, dtype):
    arguments = problem(case, dtype)
    n_text = arguments["n_text"]
    batch, _, kv_heads, dim = case[:4]
    new = {name: torch.randn(batch, kv_heads, dim).to(dtype) for name in ("new_key", "new_value")}
    want = {name: arguments[name].clone() for name in ("key", "value")}
    for b in range(batch):
        if n_text[b] > 0:
            # nothing of what the row held before may be read
            row = case[4] + int(n_text[b]) - 1
            for name in want:
                arguments[name][b, :, row] = float("nan")
                want[name][b, :, row] = new[f"new_{name}"][b]
    for most in harness.some([4, 1]):
        with harness.splits(most, 8):
            got = harness.run("decode_attention", **arguments, mass=True, importance=True, **new)
        for name, rows in want.items():
            assert harness.same(arguments[name], rows), f"{name}: other rows than the newest were changed"
        for value, expected, what in zip(got, spec.attention(**arguments), ("output", "mass", "importance"), strict=True):
            harness.close(value, expected, harness.TOLERANCE[dtype] if what == "output" else harness.STATISTICS, what)


def test_new_row_with_list_and_window():
    case = LENGTHS[2]
    arguments = problem(case, torch.float32, window=True)
    kept, n_kept = spec.lists(case[6], [11, 0], 20)
    new = {name: torch.randn(2, 2, 20) for name in ("new_key", "new_value")}
    for window in (3, 30, 100):
        with harness.splits(3, 4):
            got = harness.run("decode_attention", **arguments, window=window, mass=True, importance=True, kept=kept, n_kept=n_kept, **new)
        want = spec.attention(**arguments, window=window, kept=kept, n_kept=n_kept)
        for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
            harness.close(value, expected, harness.STATISTICS, what)


def test_rotary_embedding():
    """The query and the new key arrive before it: what ``ops.layers.rotate`` makes of them goes in."""
    arguments = problem(LENGTHS[2], torch.float32)
    new = {name: torch.randn(2, 2, 20) for name in ("new_key", "new_value")}
    cos, sin = torch.randn(2, 20), torch.randn(2, 20)
    query, key = layers.rotate(arguments["query"][:, :, None], new["new_key"][:, :, None], cos[:, None], sin[:, None])
    with harness.splits(3, 4):
        want = harness.run("decode_attention", **{**arguments, "query": query[:, :, 0]}, **{**new, "new_key": key[:, :, 0]})
        got = harness.run("decode_attention", **arguments, **new, cos=cos, sin=sin)
    assert torch.equal(got.output, want.output)


@pytest.mark.parametrize("dtype", harness.some([torch.float32, torch.bfloat16]), ids=str)
def test_strides(dtype):
    """Heads before rows, rows before heads, slices of wider tensors: the very numbers of contiguous ones."""
    case = (2, 4, 2, 8, 20, 9, [20, 11], [9, 4])
    arguments = spec.problem(*case, dtype=dtype)
    moved = dict(arguments)
    for name, apart in (("key", 16), ("value", 24)):
        wide = torch.full((2, 29, 3, apart), float("nan"), dtype=dtype)
        wide[:, :, :2, :8] = arguments[name].transpose(1, 2)
        moved[name] = wide[:, :, :2, :8].transpose(1, 2)
    moved["query"] = torch.stack([arguments["query"], torch.full_like(arguments["query"], float("nan"))], 2)[:, :, 0]
    moved["text_type"] = torch.cat([arguments["text_type"], arguments["text_type"]], 1)[:, :9]
    moved["position"] = torch.cat([arguments["position"], arguments["position"]], 1)[:, :29]
    moved["query_position"] = torch.stack([arguments["query_position"]] * 3, 1)[:, 1]
    for name in ("n_visual", "n_text"):
        moved[name] = torch.stack([arguments[name], arguments[name] + 9], 1)[:, 0]
    kept, n_kept = spec.lists(case[6], [7, 5], 9)
    wide_list = {"kept": torch.cat([kept, kept], 1)[:, :9], "n_kept": torch.stack([n_kept, n_kept + 9], 1)[:, 0]}
    how = {"mass": True, "importance": True, "window": 25}
    for lists, moved_lists in (({}, {}), ({"kept": kept, "n_kept": n_kept}, wide_list)):
        with harness.splits(2, 8):
            straight = harness.run("decode_attention", **arguments, **lists, **how)
            other = harness.run("decode_attention", **moved, **moved_lists, **how)
        for a, b in zip(straight, other, strict=True):
            assert harness.same(a, b)


def test_elements_that_lie_apart():
    """A last stride that no kernel reads: copied, or left to the reference."""
    case = (2, 4, 2, 8, 20, 9, [20, 11], [9, 4])
    arguments = problem(case, torch.float32)
    want = spec.attention(**arguments)
    for name in ("query", "key", "value", "text_type"):
        moved = arguments | {name: torch.stack([arguments[name]] * 2, -1)[..., 0]}
        with harness.splits(2, 8):
            got = harness.run("decode_attention", **moved, mass=True, importance=True)
        for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
            harness.close(value, expected, harness.STATISTICS, what)


@pytest.mark.parametrize("dim, dtype", [(300, torch.float32), (8, torch.float64)])
def test_what_the_reference_does(dim, dtype):
    """Dims above 256 and float64."""
    arguments = problem((2, 4, 2, dim, 20, 9, [20, 11], [9, 4]), dtype)
    got = harness.run("decode_attention", **arguments, mass=True, importance=True)
    for value, expected in zip(got, spec.attention(**arguments), strict=True):
        harness.close(value, expected, harness.TOLERANCE[dtype], "result")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_output_rounds_to_even(dtype):
    """The mean of two neighbouring numbers lies half way between them."""
    arguments = problem((1, 1, 1, 16, 2, 0, [2], [0]), dtype)
    arguments["query"].zero_()
    whole = 1 + torch.arange(16, dtype=torch.float64) * torch.finfo(dtype).eps
    pair = torch.stack([whole, whole + torch.finfo(dtype).eps])
    arguments["value"][0, 0] = pair
    got = harness.run("decode_attention", **arguments).output
    assert harness.same(got[0, 0], pair.mean(0).to(dtype))
    assert len(got.unique()) < 16


def test_sequences_do_not_meet():
    case = LENGTHS[0]
    arguments = problem(case, torch.float32)
    with harness.splits(1, 64):
        together = harness.run("decode_attention", **arguments, mass=True, importance=True)
        for b in range(case[0]):
            one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            alone = harness.run("decode_attention", **one, mass=True, importance=True)
            for a, t in zip(alone, together, strict=True):
                assert harness.same(a[0], t[b])


def test_empty_batch():
    arguments = spec.problem(1, 2, 1, 8, 5, 4, [3], [2], dtype=torch.float32)
    arguments = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    got = harness.run("decode_attention", **arguments, mass=True, importance=True)
    assert [list(part.shape) for part in got] == [[0, 2, 8], [0, 2, 4], [0, 5]]
