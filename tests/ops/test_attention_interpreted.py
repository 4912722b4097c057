"""decode_attention and score_last_query in Triton against float64 loops (tests/ops/spec.py)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.ops import layers
from dyrate_kernels.triton_kernels import backend, plan
from tests.interpreter import harness
from tests.ops import spec

pytestmark = [pytest.mark.backends("interpreter"), pytest.mark.usefixtures("backend")]

SHAPES = [
    # batch, heads, kv_heads, dim, visual capacity, text capacity, visual lengths, text lengths
    (1, 1, 1, 1, 1, 1, [1], [1]),
    (3, 2, 2, 16, 24, 9, [24, 7, 0], [9, 1, 5]),  # G = 1, unequal rows, no visual token
    (2, 4, 2, 20, 37, 6, [33, 1], [3, 6]),  # G = 2, odd head dim
    (2, 7, 1, 5, 40, 3, [0, 39], [1, 0]),  # G = 7
    (2, 8, 1, 12, 6, 30, [3, 6], [30, 12]),  # G = 8
    (1, 8, 2, 32, 70, 40, [65], [33]),  # G = 4
    (3, 2, 2, 4, 5, 4, [0, 5, 0], [0, 0, 3]),  # nothing to read at all
    (2, 2, 1, 4, 0, 5, [0, 0], [5, 2]),  # no visual region
    (2, 2, 2, 4, 9, 150, [9, 0], [150, 65]),  # more text than its mass is summed of at once, G = 1
    (2, 6, 2, 4, 21, 150, [20, 3], [150, 129]),  # and G = 3
]


def problem(case, dtype, **options):
    arguments = spec.problem(*case, dtype=dtype, **options)
    return {name: value for name, value in arguments.items() if name not in ("position", "query_position")}, arguments


def check(arguments, dtype, window=None, **lists):
    got = harness.run("decode_attention", **arguments, window=window, mass=True, importance=True, **lists)
    want = spec.attention(**arguments, window=window, **lists)
    tolerance = harness.TOLERANCE[dtype]
    for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
        harness.close(value, expected, tolerance if what == "output" else min(tolerance, 1e-5), what)
    return got


FORMS = {
    "float32, splits": (torch.float32, harness.SMALL),
    "float32, one split": (torch.float32, harness.ONE_SPLIT),
    "float32, two launches": (torch.float32, harness.TWO_LAUNCHES),
    "float32, three splits": (torch.float32, harness.THREE_SPLITS),
    "float16, splits": (torch.float16, harness.SMALL),
}


@pytest.mark.parametrize("case, form", harness.cells(SHAPES, list(FORMS)), ids=str)
def test_statistics(case, form):
    dtype, chosen = FORMS[form]
    arguments, _ = problem(case, dtype)
    with harness.settings(chosen):
        check(arguments, dtype)


@pytest.mark.parametrize("case, share", harness.cells(SHAPES[1:7], [0.4, 0.0, 1.0]), ids=str)
def test_kept_list(case, share):
    counts = [int(n * share) for n in case[6]]
    kept, n_kept = spec.lists(case[6], counts, max(counts))
    arguments, _ = problem(case, torch.float32)
    for b, n in enumerate(case[6]):  # rows that are not listed hold NaN
        others = sorted({*range(n)} - {*kept[b, : counts[b]].tolist()})
        arguments["key"][b, :, others] = arguments["value"][b, :, others] = float("nan")
    with harness.settings():
        check(arguments, torch.float32, kept=kept, n_kept=n_kept)


@pytest.mark.parametrize("with_list", [False, True], ids=["all", "list"])
@pytest.mark.parametrize("window", [1, 20])
@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[2], SHAPES[5]], ids=str)
def test_sliding_window(case, window, with_list):
    _, arguments = problem(case, torch.float32)
    lists = {}
    if with_list:
        counts = [n // 2 for n in case[6]]
        lists = dict(zip(("kept", "n_kept"), spec.lists(case[6], counts, max(counts)), strict=True))
    with harness.settings():
        check(arguments, torch.float32, window=window, **lists)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "all -inf", "nan value"])
def test_special_logits(kind, group):
    arguments, _ = problem((2, 2 * group, 2, 4, 20, 5, [20, 9], [5, 3]), torch.float32)
    arguments["query"].abs_()
    number = {"nan": float("nan"), "inf": float("inf")}.get(kind, -float("inf"))
    if kind == "nan value":
        arguments["value"][0, 0, 3] = float("nan")
    elif kind == "all -inf":
        arguments["key"][0, 0] = number
    else:
        arguments["key"][0, 0, 3] = number
        arguments["key"][1, 1, 22] = number
    with harness.settings():
        got = harness.run("decode_attention", **arguments, mass=True, importance=True)
    # the loops take the lowest number where softmax sees only -inf; torch is the judge here
    want = ops.decode_attention(**arguments, mass=True, importance=True, backend="reference")
    for value, expected, what in zip(got, want, ("output", "mass", "importance"), strict=True):
        harness.close(value, expected, 3e-6, what)
    assert got.output.isnan().any() == (kind != "-inf")


def test_large_and_small_logits():
    arguments, _ = problem((2, 4, 4, 8, 33, 7, [33, 20], [7, 1]), torch.float32)
    for factor in (1e-30, 1e3, 1e15):
        scaled = arguments | {"scale": factor}
        with harness.settings():
            got = harness.run("decode_attention", **scaled, mass=True, importance=True)
        want = ops.decode_attention(**scaled, mass=True, importance=True, backend="reference")
        for value, expected in zip(got, want, strict=True):
            harness.close(value, expected, 1e-4, f"scale {factor}")


@pytest.mark.parametrize("mass, importance", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[2], SHAPES[8]], ids=str)
def test_each_statistic_alone(case, mass, importance):
    arguments, _ = problem(case, torch.float32)
    if not mass:
        del arguments["text_type"]
    with harness.settings():
        got = harness.run("decode_attention", **arguments, mass=mass, importance=importance)
    want = ops.decode_attention(**arguments, mass=mass, importance=importance, backend="reference")
    assert (got.mass is None, got.importance is None) == (not mass, not importance)
    for value, expected in zip(got, want, strict=True):
        if value is not None:
            harness.close(value, expected, 3e-6, "result")


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[5], SHAPES[9]], ids=str)
def test_mass_alone_reads_text_rows_alone(case, listed):
    """Logits are kept of text rows only, whose places begin at the sequence's own number of visual rows, or of listed ones."""
    arguments, _ = problem(case, torch.float32)
    lists = {}
    if listed:
        counts = [n // 3 for n in case[6]]
        lists = dict(zip(("kept", "n_kept"), spec.lists(case[6], counts, max(counts)), strict=True))
    for chosen in (harness.SMALL, harness.ONE_SPLIT):
        with harness.settings(chosen):
            got = harness.run("decode_attention", **arguments, mass=True, **lists)
        output, mass, _ = spec.attention(**arguments, **lists)
        harness.close(got.output, output, 3e-6, "output")
        harness.close(got.mass, mass, 3e-6, "mass")


def test_mass_of_an_image_without_weight_is_no_number_below_zero():
    """Sums of probabilities may exceed one by their rounding; what they leave to an image does not."""
    arguments, _ = problem((4, 2, 2, 16, 6, 60, [6, 6, 6, 6], [60, 59, 31, 17]), torch.float32)
    arguments["key"][:, :, :6] = -100 * arguments["query"][:, :, None].sign()
    for chosen in (harness.SMALL, harness.ONE_SPLIT):
        with harness.settings(chosen):
            mass = harness.run("decode_attention", **arguments, mass=True).mass
        assert (mass[..., 1] >= 0).all() and (mass[..., 1] < 1e-6).all()


@pytest.mark.parametrize("chosen", [harness.SMALL, harness.TWO_LAUNCHES], ids=["one launch", "two launches"])
@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[5]], ids=str)
def test_importance_in_tiles_of_columns(case, chosen, monkeypatch):
    """More visual tokens than a tile of the sum over heads has columns; the tile is made small so that the interpreter can follow."""
    whole = plan.importance
    monkeypatch.setattr(plan, "importance", lambda heads: (whole(heads)[0], 16))
    monkeypatch.setattr(backend, "_attentions", {})
    arguments, _ = problem(case, torch.float32)
    kept, n_kept = spec.lists(case[6], [n * 4 // 5 for n in case[6]], case[4])
    with harness.settings(chosen):
        check(arguments, torch.float32)
        check(arguments, torch.float32, kept=kept, n_kept=n_kept)


@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[3], SHAPES[5], SHAPES[6]], ids=str)
def test_score_last_query(case):
    arguments, _ = problem(case, torch.float32)
    with harness.settings():
        got = harness.run("score_last_query", **arguments)
    _, *want = spec.attention(**arguments)
    for value, expected in zip(got, want, strict=True):
        harness.close(value, expected, 3e-6, "statistic")


@pytest.mark.parametrize("case", [SHAPES[1], SHAPES[2], SHAPES[6]], ids=str)
def test_new_row(case):
    arguments, _ = problem(case, torch.float32)
    n_text = arguments["n_text"]
    batch, _, kv_heads, dim = case[:4]
    new = {name: torch.randn(batch, kv_heads, dim) for name in ("new_key", "new_value")}
    want = {name: arguments[name].clone() for name in ("key", "value")}
    for b in range(batch):
        if n_text[b] > 0:
            for name in want:
                want[name][b, :, case[4] + int(n_text[b]) - 1] = new[f"new_{name}"][b]
    with harness.settings():
        got = harness.run("decode_attention", **arguments, mass=True, importance=True, **new)
    for name, rows in want.items():
        assert harness.same(arguments[name], rows), f"{name}: other rows than the newest were changed"
    for value, expected in zip(got, spec.attention(**arguments), strict=True):
        harness.close(value, expected, 3e-6, "result")


def test_strides():
    """Heads before rows, rows before heads, slices of wider tensors."""
    case = (2, 4, 2, 8, 20, 9, [20, 11], [9, 4])
    arguments, _ = problem(case, torch.float32)
    moved = dict(arguments)
    for name in ("key", "value"):
        wide = torch.full((2, 29, 3, 11), float("nan"))
        wide[:, :, :2, :8] = arguments[name].transpose(1, 2)
        moved[name] = wide[:, :, :2, :8].transpose(1, 2)
    moved["query"] = torch.stack([arguments["query"], torch.full_like(arguments["query"], float("nan"))], 2)[:, :, 0]
    moved["text_type"] = torch.cat([arguments["text_type"], arguments["text_type"]], 1)[:, :9]
    with harness.settings():
        straight = harness.run("decode_attention", **arguments, mass=True, importance=True)
        other = harness.run("decode_attention", **moved, mass=True, importance=True)
    for a, b in zip(straight, other, strict=True):
        assert harness.same(a, b)


def test_rows_of_a_batch_do_not_meet():
    case = SHAPES[1]
    arguments, _ = problem(case, torch.float32)
    with harness.settings(harness.ONE_SPLIT):
        together = harness.run("decode_attention", **arguments, mass=True, importance=True)
        for b in range(case[0]):
            one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            alone = harness.run("decode_attention", **one, mass=True, importance=True)
            for a, t in zip(alone, together, strict=True):
                assert harness.same(a[0], t[b])


def test_lengths_may_change_under_a_fixed_launch():
    """The same capacities serve every length: what a captured graph relies on."""
    case = (2, 2, 2, 8, 70, 40, [70, 3], [40, 1])
    for lengths in (([70, 3], [40, 1]), ([0, 70], [1, 40]), ([17, 16], [0, 16])):
        arguments, _ = problem((*case[:6], *lengths), torch.float32)
        with harness.settings():
            check(arguments, torch.float32)


def rotation(batch, dim, dtype, kind):
    """cos and sin of every sequence, of all of them at once, or in a wider tensor."""
    angle = 3 * torch.randn(1 if kind == "shared" else batch, dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = angle.cos().to(dtype), angle.sin().to(dtype)
    return tuple(torch.stack([t, torch.full_like(t, float("nan"))], 1)[:, 0] for t in found) if kind == "strided" else found


@pytest.mark.parametrize(
    "case, dtype, chosen, kind",
    [
        (SHAPES[1], torch.float32, harness.SMALL, "own"),
        (SHAPES[2], torch.float16, harness.THREE_SPLITS, "strided"),  # 20 elements a head, 32 in a tile
        (SHAPES[4], torch.float16, dataclasses.replace(harness.SMALL, num_warps=2, warp_rows=True), "own"),
        (SHAPES[6], torch.float16, harness.ONE_SPLIT, "shared"),
    ],
    ids=["heads", "groups", "rows of each warp", "nothing to read"],
)
def test_rotary_embedding_inside(case, dtype, chosen, kind):
    """Bit for bit what ``ops.layers.rotate`` and the operator make one after the other, the row that is written too."""
    arguments, _ = problem(case, dtype)
    batch, _, kv_heads, dim = case[:4]
    cos, sin = rotation(batch, dim, dtype, kind)
    new = {name: torch.randn(batch, kv_heads, dim).to(dtype) for name in ("new_key", "new_value")}
    query, new_key = layers.rotate(arguments["query"][:, :, None], new["new_key"][:, :, None], cos[:, None], sin[:, None])
    apart = {**arguments, **new, "query": query[:, :, 0], "new_key": new_key[:, :, 0], "mass": True, "importance": True}
    apart |= {name: arguments[name].clone() for name in ("key", "value")}
    inside = {**arguments, **new, "mass": True, "importance": True, "cos": cos, "sin": sin}
    with harness.settings(chosen):
        want = harness.run("decode_attention", **apart)
        got = harness.run("decode_attention", **inside)
        for a, b in zip(got, want, strict=True):
            assert harness.same(a, b)
        assert harness.same(inside["key"], apart["key"]) and harness.same(inside["value"], apart["value"])
        decision = {"count": torch.ones(batch, dtype=torch.int32)}
        statistics = ("mass", "importance")
        steps = [{k: v for k, v in a.items() if k not in statistics and not k.startswith("new_")} for a in (inside, apart)]
        for a, b in zip(*(harness.run("decode_step", **step, **decision) for step in steps), strict=True):
            assert harness.same(a, b)  # without a new row: the query alone is rotated
    inside["n_text"] = torch.zeros_like(inside["n_text"])  # where no new row is written
    with harness.settings(chosen):
        got = harness.run("decode_attention", **inside)
    want = ops.decode_attention(**inside, backend="reference")
    for value, expected in zip(got, want, strict=True):
        harness.close(value, expected, harness.TOLERANCE[dtype], "result")
