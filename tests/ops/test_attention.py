"""decode_attention and score_last_query on every backend, against loops in float64 (``spec``), and what their arguments must be."""

from __future__ import annotations

import itertools

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.ops import layers
from tests.gpu import kit
from tests.guarded import guarded
from tests.ops import attention_problems as made
from tests.ops import spec
from tests.ops.attention_problems import BF16, F16, F32, F64, LARGE, ON_DEVICE, SHAPES
from tests.ops.backends import each
from tests.ops.compare import close, same

DTYPES = [F32, F16, BF16]
HALF = kit.HALF
REFERENCE = [name for name in SHAPES if not name.startswith("large")]
INTERPRETED = [
    "one number",
    "heads",
    "pairs",
    "sevens",
    "eights",
    "longer",
    "nothing",
    "no visual region",
    "much text",
    "much text of threes",
]
EMULATED = ["heads", "one number", "pairs", "sevens", "eights", "nothing", "no visual region", "no text region", "longer", "many tiles"]


def product(*axes):
    return list(itertools.product(*axes))


def checkered(first, others):
    """Of the pairs of two lists all with the first of ``others`` and every second one of the rest."""
    pairs = itertools.product(enumerate(first), enumerate(others))
    return [(one, other) for (row, one), (column, other) in pairs if column == 0 or (row + column) % 2 == 0]


def usual(backend):
    """The dtype in which a backend is nearest to float64."""
    return F64 if backend.name == "reference" else F32


def on_device(backend):
    return backend.name in kit.BACKENDS


def check(backend, arguments, launch="splits", mass=True, importance=True, **how):
    """Every number of a call is that of the loops, and what was not asked for is not there."""
    with backend.launched(launch):
        got = backend.run("decode_attention", **arguments, mass=mass, importance=importance, **how)
    assert (got.mass is None, got.importance is None) == (not mass, not importance)
    rows = {name: how[name] for name in ("kept", "n_kept", "window") if name in how}  # a new row is in place now
    made.assert_close(got, spec.attention(**arguments, **rows), arguments["query"].dtype, on_device(backend))
    return got


def agree(backend, got, want, dtype):
    """Bit for bit where a backend promises it, else within rounding."""
    for one, other in zip(got, want, strict=True):
        if backend.exact:
            assert same(one, other)
        else:
            assert torch.allclose(one, other, atol=1e-13 if dtype == F64 else 2e-5, rtol=0, equal_nan=True)


# ---- statistics -------------------------------------------------------------------------------------------------------------------

FORMS = [(F32, "splits"), (F32, "one split"), (F32, "two launches"), (F32, "three splits"), (F16, "splits")]
STATISTICS = each(
    reference=product(REFERENCE, made.TOLERANCE, ["splits"]),
    interpreter=[(name, *form) for name, form in checkered(INTERPRETED, FORMS)],
    full=[(name, *form) for name, form in product(INTERPRETED, FORMS)],
    emulated=product(EMULATED, [F32, F16], ["five splits", "one split", "a split a row"]),
    detector=product(EMULATED[:7], [F32], ["five splits", "one split"]),
    device=product(ON_DEVICE, kit.DTYPES, ["usual"]),
)


@pytest.mark.parametrize("name, dtype, launch", STATISTICS, ids=str)
def test_statistics(backend, name, dtype, launch):
    arguments = made.problem(name, dtype)
    got = check(backend, arguments, launch)
    live = (arguments["n_visual"] + arguments["n_text"] > 0).to(got.mass.dtype)
    assert torch.allclose(got.mass.sum(-1), live[:, None].expand(got.mass.shape[:2]), atol=4e-5 if on_device(backend) else 1e-5)


DIMS = [16, 32, 64, 80, 96, 128, 256, 1, 5, 8, 72]
GROUPS = [1, 4, 7, 8, 12]
HEADS = each(
    emulated=product(DIMS, [2], DTYPES) + product([16, 80], GROUPS, DTYPES),
    detector=product(DIMS[:7], [2], DTYPES) + product([16, 80], GROUPS, DTYPES[:2]),
    device=product(DIMS[:7] if kit.ON_GPU else (16, 80, 256), (1, 2, 4, 7, 8) if kit.ON_GPU else (1, 7), kit.DTYPES),
)


@pytest.mark.backends("emulated", "triton", "cuda")  # of the interpreter all pairs are in test_attention_settings.py
@pytest.mark.parametrize("dim, group, dtype", HEADS)
def test_head_dims_and_groups(backend, dim, group, dtype):
    rows = 70 if backend.on_gpu else 45
    check(backend, made.problem((2, 2 * group, 2, dim, rows, 21, [rows, 4], [21, 0]), dtype, seed=dim + group))


@pytest.mark.parametrize("dtype", each(reference=DTYPES, interpreter=[F32], emulated=DTYPES, device=kit.DTYPES[:1] + (HALF,)), ids=str)
@pytest.mark.parametrize("value_dim", each(reference=[40], interpreter=[40], emulated=[1, 4, 16, 40, 130], detector=5, device=[40]))
def test_values_of_another_dim(backend, value_dim, dtype):
    arguments = made.problem((2, 4, 2, 24, 30, 9, [30, 11], [9, 4]), dtype)
    g = torch.Generator().manual_seed(value_dim)
    arguments["value"] = made.spread(torch.randn(2, 2, 39, value_dim, generator=g).to(dtype))
    check(backend, arguments)


LENGTHS = [*range(9), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
MOVING = each(
    interpreter=[(70, 40, [([70, 3], [40, 1]), ([0, 70], [1, 40]), ([17, 16], [0, 16])])],
    emulated=[(129, 33, [([n, 129 - n], [n // 4, 33 - n // 4]) for n in LENGTHS])],
    detector=[(129, 33, [([n, 129 - n], [n // 4, 33 - n // 4]) for n in (0, 1, 63, 64, 65)])],
)


@pytest.mark.backends("interpreter", "emulated")  # a GPU has the captured graphs of tests/gpu/test_graphs.py
@pytest.mark.parametrize("visual, text, lengths", MOVING, ids=["capacities"])
def test_lengths_may_change_under_a_fixed_launch(backend, visual, text, lengths):
    """The same capacities serve every length, those around the edges of tiles and splits too: what a captured graph relies on."""
    for pair in lengths:
        check(backend, made.problem((2, 4, 2, 16, visual, text, *pair), F32))


ALONE = [(False, False), (True, False), (False, True)]
STATISTICS_ALONE = each(
    reference=product(["heads", "pairs", "longer", "much text of threes"], ALONE, [False, True], [F64], ["splits"]),
    interpreter=[
        *product(["heads", "pairs", "much text"], ALONE, [False], [F32], ["splits"]),
        *product(["longer", "much text of threes"], [(True, False)], [False, True], [F32], ["splits", "one split"]),
        ("heads", (True, False), False, F32, "one split"),
        *product(["heads"], [(True, False)], [True], [F32], ["splits", "one split"]),
    ],
    emulated=[
        *product(["heads", "pairs", "no visual region"], ALONE, [False], [F32], ["splits"]),
        *product(["longer"], [(True, False)], [False, True], [F32], ["splits", "one split"]),
    ],
    detector=3,
    device=[
        *product(ON_DEVICE, [(False, False)], [False], kit.DTYPES, ["usual"]),
        *product(["heads", "eights"], ALONE[1:], [False, True], [F32], ["usual"]),
    ],
)


@pytest.mark.parametrize("name, asked, listed, dtype, launch", STATISTICS_ALONE, ids=str)
def test_each_statistic_alone(backend, name, asked, listed, dtype, launch):
    """With mass alone logits are kept of text rows only: their places begin at a sequence's own number of visual or listed rows."""
    arguments = made.problem(name, dtype)
    if not asked[0]:
        del arguments["text_type"]
    check(backend, arguments, launch, *asked, **made.lists(arguments, 1 / 3) if listed else {})


def test_mass_of_an_image_without_weight_is_no_number_below_zero(backend):
    """Sums of probabilities may exceed one by their rounding; what they leave to an image does not."""
    arguments = made.problem((4, 2, 2, 16, 6, 60, [6, 6, 6, 6], [60, 59, 31, 17]), usual(backend))
    arguments["key"][:, :, :6] = -100 * arguments["query"][:, :, None].sign()
    for launch in ("splits", "one split"):
        with backend.launched(launch):
            mass = backend.run("decode_attention", **arguments, mass=True).mass
        assert (mass[..., 1] >= 0).all() and (mass[..., 1] < 1e-6).all()


@pytest.mark.backends("interpreter")
@pytest.mark.parametrize("launch", ["splits", "two launches"])
@pytest.mark.parametrize("name", ["heads", "longer"])
def test_importance_in_tiles_of_columns(backend, name, launch, monkeypatch):
    """More visual tokens than a tile of the sum over heads has columns; the tile is made small so that the interpreter can follow."""
    from dyrate_kernels.triton_kernels import backend as triton
    from dyrate_kernels.triton_kernels import plan

    whole = plan.importance
    monkeypatch.setattr(plan, "importance", lambda heads: (whole(heads)[0], 16))
    monkeypatch.setattr(triton, "_attentions", {})
    arguments = made.problem(name, F32)
    check(backend, arguments, launch)
    check(backend, arguments, launch, **made.lists(arguments, 0.8, SHAPES[name][4]))


LAST = each(
    reference=product(REFERENCE, [None, 20], [F64]),
    interpreter=[*product(["heads", "sevens", "longer", "nothing"], [None], [F32]), ("heads", 20, F32)],
    emulated=[*product(["heads", "pairs", "sevens", "eights", "nothing", "no visual region"], [None], [F32]), ("heads", 20, F32)],
    device=[*product(ON_DEVICE, [None], kit.DTYPES), *product(["heads"], [3, 30], [HALF])],
)


@pytest.mark.parametrize("name, window, dtype", LAST, ids=str)
def test_score_last_query_gives_the_statistics(backend, name, window, dtype):
    arguments = made.problem(name, dtype, window=window is not None)
    with backend.launched("splits"):
        got = backend.run("score_last_query", **arguments, window=window)
    _, *want = spec.attention(**arguments, window=window)
    made.assert_close((None, *got), (None, *want), dtype, on_device(backend))


# ---- which rows -------------------------------------------------------------------------------------------------------------------

SHARES = [0.4, 0.0, 1.0]
LISTS = each(
    reference=product(REFERENCE, SHARES, [False, True], [F64], ["splits"]),
    interpreter=[(name, share, False, F32, "splits") for name, share in checkered(INTERPRETED[1:7], SHARES)],
    full=product(INTERPRETED[1:7], SHARES, [False, True], [F32], ["splits"]),
    emulated=[
        *product(["heads", "pairs", *EMULATED[3:9]], SHARES, [False], [F32], ["splits"]),
        ("many tiles", 0.7, True, BF16, "one split"),
        ("many tiles", 0.7, True, BF16, "five splits"),
    ],
    detector=[*product(["heads", "pairs"], SHARES, [False], [F32], ["splits"]), ("many tiles", 0.7, True, BF16, "one split")],
    device=product(ON_DEVICE, SHARES, [False, True], [HALF], ["usual"]),
)


@pytest.mark.parametrize("name, share, wide, dtype, launch", LISTS, ids=str)
def test_kept_list(backend, name, share, wide, dtype, launch):
    """Rows that it does not name are not read: they hold NaN."""
    arguments = made.problem(name, dtype)
    how = made.lists(arguments, share, SHAPES[name][4] + 3 if wide else None)
    made.unlisted(arguments, **how)
    check(backend, arguments, launch, **how)


WINDOWS = each(
    reference=product(["heads", "pairs", "fours", "sevens", "eights"], [1, 8, 25, 1000], [False, True], [F64]),
    interpreter=product(["heads", "pairs", "longer"], [1, 20], [False, True], [F32]),
    emulated=product(["pairs", "heads", "nothing", "longer"], [1, 20], [False, True], [F32]),
    detector=4,
    device=product(
        ["heads", "pairs", "fours", "sevens", "eights", *LARGE], [1, 8, 25, 1000] if kit.ON_GPU else [8, 25], [False, True], [HALF]
    ),
)


@pytest.mark.parametrize("name, window, listed, dtype", WINDOWS, ids=str)
def test_sliding_window(backend, name, window, listed, dtype):
    arguments = made.problem(name, dtype, window=True)
    check(backend, arguments, window=window, **made.lists(arguments, 0.5) if listed else {})


def test_sliding_window_far_away(backend):
    """The difference of two positions does not fit 32 bits for rows that may not be looked at; it does for live ones."""
    arguments = made.problem("heads", usual(backend), window=True)
    arguments["query_position"].fill_(2**31 - 1)
    for b, (n, t) in enumerate(zip(*SHAPES["heads"][6:], strict=True)):
        live = [*range(n), *range(24, 24 + t)]
        arguments["position"][b, live] = torch.tensor([2**31 - 1 - 3 * i for i in range(len(live))], dtype=torch.int32)
    check(backend, arguments, window=10)


@pytest.mark.parametrize("name", each(reference=REFERENCE, interpreter=["heads"], emulated=["heads"], device=["heads", *LARGE]))
def test_bounds_change_nothing(backend, name):
    arguments = made.problem(name, usual(backend))
    check(backend, arguments, visual_bound=max(SHAPES[name][6]), text_bound=max(SHAPES[name][7]))


@pytest.mark.parametrize("listed", [False, True], ids=["all", "list"])
@pytest.mark.parametrize("name", each(reference=REFERENCE, interpreter=["pairs"], emulated=["pairs"], device=["pairs"]))
def test_clean_rows_change_nothing(backend, name, listed):
    arguments = made.problem(name, usual(backend))
    how = made.lists(arguments, 1 / 3) if listed else {}
    arguments["value"] = arguments["value"].nan_to_num(1e30)
    check(backend, arguments, clean=True, **how)


@pytest.mark.backends("reference", "interpreter", "emulated")  # on a GPU a launch may follow the size of the batch
def test_a_row_of_a_batch_equals_the_row_alone(backend):
    arguments = made.problem("heads", usual(backend))
    with backend.launched("one split"):
        together = backend.run("decode_attention", **arguments, mass=True, importance=True)
        for b in range(3):
            one = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            alone = backend.run("decode_attention", **one, mass=True, importance=True)
            agree(backend, alone, [part[b : b + 1] for part in together], usual(backend))


# ---- memory -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [False, True], ids=["all", "list"])
@pytest.mark.parametrize("dtype", each(reference=[F64], interpreter=[F32], emulated=[F32, BF16], device=[F32]), ids=str)
def test_strides(backend, dtype, listed):
    """Heads before rows, rows before heads, sequences inside of heads, slices of wider tensors: the numbers of contiguous ones."""
    case = (2, 4, 2, 8, 20, 9, [20, 11], [9, 4])
    arguments = spec.problem(*case, dtype=dtype)
    moved = dict(arguments)
    for name, apart in (("key", 16), ("value", 24)):
        wide = torch.full((2, 29, 3, apart), float("nan"), dtype=dtype)
        wide[:, :, :2, :8] = arguments[name].transpose(1, 2)
        moved[name] = wide[:, :, :2, :8].transpose(1, 2)
    query = torch.stack([arguments["query"], torch.full_like(arguments["query"], float("nan"))], 2)
    moved["query"] = query.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 0]
    for name, columns in (("text_type", 9), ("position", 29)):
        moved[name] = torch.cat([arguments[name], arguments[name]], 1)[:, :columns]
    moved["query_position"] = torch.stack([arguments["query_position"]] * 3, 1)[:, 1]
    for name in ("n_visual", "n_text"):
        moved[name] = torch.stack([arguments[name], arguments[name] + 9], 1)[:, 0]
    lists, moved_lists = {}, {}
    if listed:
        kept, n_kept = spec.lists(case[6], [7, 5], 9)
        lists = {"kept": kept, "n_kept": n_kept}
        moved_lists = {"kept": torch.cat([kept, kept], 1)[:, :9], "n_kept": torch.stack([n_kept, n_kept + 9], 1)[:, 0]}
    straight = check(backend, arguments, window=25, **lists)
    agree(backend, check(backend, moved, window=25, **moved_lists), straight, dtype)


@pytest.mark.parametrize("name", ["query", "key", "value", "text_type"])
def test_elements_that_lie_apart(backend, name):
    """A last stride that no kernel reads: copied, or left to the reference."""
    arguments = made.problem((2, 4, 2, 8, 20, 9, [20, 11], [9, 4]), usual(backend))
    arguments[name] = torch.stack([arguments[name]] * 2, -1)[..., 0]
    for lists in ({}, made.lists(arguments, 0.4)):
        check(backend, arguments, **lists)


SHIFTED = ["query", "key", "value", "new_key", "new_value"]
SHIFTS = each(
    emulated=product(SHIFTED, [72, 8, 128, 256], DTYPES),
    detector=product(SHIFTED, [72], [F32]),
    device=product(SHIFTED, [32], [HALF]),
)


@pytest.mark.backends("emulated", "triton", "cuda")  # the interpreter knows no alignment
@pytest.mark.parametrize("moved, dim, dtype", SHIFTS, ids=str)
def test_addresses_that_are_not_aligned(backend, moved, dim, dtype):
    """One element past a multiple of 16 bytes: the results of aligned memory within rounding."""
    arguments = spec.problem(2, 4, 2, dim, 30, 9, [30, 11], [9, 4], dtype=dtype)
    del arguments["position"], arguments["query_position"]
    how = made.new_row(arguments)
    where = how if moved in how else arguments
    where[moved], memory = guarded(where[moved], shift=1)
    check(backend, arguments, **how)
    memory.check()


def test_an_empty_batch(backend):
    arguments = spec.problem(1, 2, 1, 8, 5, 4, [3], [2], dtype=usual(backend))
    arguments = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    got = backend.run("decode_attention", **arguments, mass=True, importance=True)
    assert [list(part.shape) for part in got] == [[0, 2, 8], [0, 2, 4], [0, 5]]
    for width in (0, 1):
        lists = {"kept": torch.zeros(0, width, dtype=torch.int32), "n_kept": torch.zeros(0, dtype=torch.int32)}
        assert backend.run("decode_attention", **arguments, **lists).output.shape == (0, 2, 8)


# ---- numbers ----------------------------------------------------------------------------------------------------------------------

KINDS = ["nan", "inf", "-inf", "all -inf", "nan value", "inf value"]
SPECIAL = each(
    reference=product(KINDS, [1, 2], ["splits"]),
    interpreter=product(KINDS[:5], [1, 2], ["splits"]),
    emulated=product(KINDS, [1, 2], ["splits", "one split"]),
    detector=product(KINDS, [1, 2], ["splits"]),
    device=product(KINDS[:5], [1, 4], ["usual"]),
)


@pytest.mark.parametrize("kind, group, launch", SPECIAL)
def test_special_logits(backend, kind, group, launch):
    """What is no number stays in its sequence and heads; softmax over nothing but -inf is NaN."""
    arguments = made.problem((2, 2 * group, 2, 4, 20, 5, [20, 9], [5, 3]), usual(backend))
    arguments["query"].abs_()
    number = {"nan": float("nan"), "inf": float("inf")}.get(kind.split()[0], -float("inf"))
    if kind.endswith("value"):
        arguments["value"][0, 0, 3] = number
    elif kind == "all -inf":
        arguments["key"][0, 0] = number
    else:
        arguments["key"][0, 0, 3] = number
        arguments["key"][1, 1, 22] = number
    if kind == "inf value":
        with backend.launched(launch):
            got = backend.run("decode_attention", **arguments, mass=True, importance=True)
        want = spec.attention(**arguments)
        assert torch.equal(got.output.isfinite(), want.output.isfinite())
        made.assert_close((None, *got[1:]), (None, *want[1:]), usual(backend))
    else:
        got = check(backend, arguments, launch)
    assert got.output.isnan().any() == (kind not in ("-inf", "inf value"))


def test_a_nan_visual_row_makes_the_whole_heads_mass_nan(backend):
    """Also where the sequence has no text row that the NaN could reach the other types by."""
    arguments = made.problem((2, 4, 2, 8, 10, 5, [10, 3], [0, 2]), usual(backend))
    arguments["key"][:, 0, 1] = float("nan")
    got = check(backend, arguments, importance=False).mass
    assert got[:, :2].isnan().all() and not got[:, 2:].isnan().any()


@pytest.mark.parametrize("factor", [1e-30, 1e3, 1e15])
def test_large_and_small_logits(backend, factor):
    """Only their differences count."""
    arguments = made.problem((2, 4, 4, 8, 33, 7, [33, 20], [7, 1]), usual(backend)) | {"scale": factor}
    with backend.launched("splits"):
        got = backend.run("decode_attention", **arguments, mass=True, importance=True)
    tolerance = 1e-9 if backend.name == "reference" else 1e-4
    for value, expected, what in zip(got, spec.attention(**arguments), ("output", "mass", "importance"), strict=True):
        close(value, expected, tolerance, what)


def test_large_logits_of_many_terms(backend):
    """Queries of thousands: float32 logits are good to about 1e-3."""
    arguments = made.problem((2, 4, 2, 32, 50, 9, [50, 17], [9, 2]), usual(backend))
    arguments["query"].mul_(1e3).abs_()
    arguments["key"].add_(3.0)
    with backend.launched("splits"):
        got = backend.run("decode_attention", **arguments, mass=True)
    assert torch.allclose(got.mass.sum(-1), torch.ones_like(got.mass[..., 0]), atol=1e-5)
    close(got.mass, spec.attention(**arguments).mass, 2e-2, "mass")


def test_the_usual_scale(backend):
    arguments = made.problem("pairs", usual(backend))
    del arguments["scale"], arguments["text_type"]
    got = backend.run("decode_attention", **arguments)
    assert got.mass is None and got.importance is None
    made.assert_close(got, spec.attention(**arguments, scale=20**-0.5), usual(backend), on_device(backend))


ROUNDED = each(reference=[F16, BF16], interpreter=[F16], emulated=[F16, BF16], device=kit.DTYPES[1:])


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_output_rounds_to_even(backend, dtype):
    """The mean of two neighbouring numbers lies half way between them."""
    arguments = made.problem((1, 1, 1, 16, 2, 0, [2], [0]), dtype)
    arguments["query"].zero_()
    whole = 1 + torch.arange(16, dtype=F64) * torch.finfo(dtype).eps
    pair = torch.stack([whole, whole + torch.finfo(dtype).eps])
    arguments["value"][0, 0] = pair
    got = backend.run("decode_attention", **arguments).output
    assert same(got[0, 0], pair.mean(0).to(dtype))
    assert len(got.unique()) < 16


@pytest.mark.backends("interpreter", "emulated")
@pytest.mark.parametrize("dim, dtype", each(interpreter=[(8, F64)], emulated=[(300, F32), (8, F64)], detector=2))
def test_what_the_reference_does(backend, dim, dtype):
    """float64, and with CUDA C++ heads of more than 256 elements."""
    check(backend, made.problem((2, 4, 2, dim, 20, 9, [20, 11], [9, 4]), dtype))


# ---- the new row ------------------------------------------------------------------------------------------------------------------

NEW = each(
    reference=product(REFERENCE, [F64, F32], ["splits"]),
    interpreter=product(["heads", "pairs", "nothing"], [F32], ["splits"]),
    emulated=product(["heads", "pairs", "nothing", "no visual region", "twelves"], DTYPES, ["splits", "one split"]),
    device=product(ON_DEVICE[1:], kit.DTYPES, ["usual"]),
)


@pytest.mark.parametrize("name, dtype, launch", NEW, ids=str)
def test_a_new_row_is_written_then_read(backend, name, dtype, launch):
    """Nothing of what the row held before is read, and nothing but that row changes, behind the capacity neither."""
    arguments = made.problem(name, dtype)
    new, want, buffers = made.new_row(arguments), {}, {}
    for part in ("key", "value"):
        buffers[part] = made.buffer_of(arguments[part])
        rows = [(b, SHAPES[name][4] + length - 1) for b, length in enumerate(SHAPES[name][7]) if length]
        for b, row in rows:
            arguments[part][b, :, row] = float("nan")
        want[part] = buffers[part].clone()
        view = want[part].as_strided(arguments[part].shape, arguments[part].stride())
        for b, row in rows:
            view[b, :, row] = new[f"new_{part}"][b]
    check(backend, arguments, launch, **new)
    for part, rows in want.items():
        assert same(buffers[part], rows), f"{part}: other rows than the newest were changed"


@pytest.mark.parametrize("window", each(reference=[3, 30, 100], interpreter=[30], emulated=[3, 30, 100], detector=3, device=[3, 30]))
def test_a_new_row_behind_a_list_in_a_window(backend, window):
    arguments = made.problem("pairs", usual(backend), window=True)
    kept, n_kept = spec.lists([33, 1], [11, 0], 20)
    check(backend, arguments, window=window, kept=kept, n_kept=n_kept, **made.new_row(arguments))


ROTATIONS = each(
    reference=product(["heads", "pairs", "nothing"], [F64], ["splits"], ["own", "shared", "strided"]),
    interpreter=[
        ("heads", F32, "splits", "own"), ("pairs", F16, "three splits", "strided"),  # 20 elements a head, 32 in a tile
        ("eights", F16, "rows of each warp", "own"), ("nothing", F16, "one split", "shared"),
    ],
    emulated=[
        ("pairs", F32, "splits", "own"), ("heads", BF16, "splits", "shared"), ("eights", F16, "one split", "strided"),
        ("nothing", F16, "splits", "shared"),
    ],
    detector=1,
    device=[("heads", F32, "usual", "own"), ("pairs", F32, "usual", "strided"), ("nothing", F32, "usual", "shared")],
)  # fmt: skip


def rotation(batch, dim, dtype, kind):
    """cos and sin of every sequence, of all of them at once, or in a wider tensor."""
    angle = 3 * torch.randn(1 if kind == "shared" else batch, dim, generator=torch.Generator().manual_seed(9), dtype=F64)
    found = angle.cos().to(dtype), angle.sin().to(dtype)
    return tuple(torch.stack([t, torch.full_like(t, float("nan"))], 1)[:, 0] for t in found) if kind == "strided" else found


def turned(x, cos, sin):
    """``[B, H, D]`` turned by angles ``[B or 1, D]``."""
    half = x.shape[-1] // 2
    low, high, cos, sin = x[..., :half], x[..., half:], cos[:, None], sin[:, None]
    return torch.cat([low * cos[..., :half] - high * sin[..., :half], high * cos[..., half:] + low * sin[..., half:]], -1)


@pytest.mark.parametrize("name, dtype, launch, kind", ROTATIONS, ids=str)
def test_rotary_embedding_comes_before_the_new_row_is_written(backend, name, dtype, launch, kind):
    """What ``ops.layers.rotate`` and the operator make one after the other, the row that is written too."""
    arguments = made.problem(name, dtype)
    batch, _, _, dim = SHAPES[name][:4]
    cos, sin = rotation(batch, dim, dtype, kind)
    new = made.new_row(arguments)
    query, new_key = layers.rotate(arguments["query"][:, :, None], new["new_key"][:, :, None], cos[:, None], sin[:, None])
    assert torch.allclose(query[:, :, 0], turned(arguments["query"], cos, sin), atol=made.TOLERANCE[dtype])
    assert torch.allclose(new_key[:, :, 0], turned(new["new_key"], cos, sin), atol=made.TOLERANCE[dtype])
    apart = {**arguments, **new, "query": query[:, :, 0], "new_key": new_key[:, :, 0]}
    apart |= {part: made.spread(arguments[part]) for part in ("key", "value")}
    inside = {**arguments, **new, "cos": cos, "sin": sin}
    with backend.launched(launch):
        want = backend.run("decode_attention", **apart, mass=True, importance=True)
        got = backend.run("decode_attention", **inside, mass=True, importance=True)
        agree(backend, got, want, dtype)
        agree(backend, [inside["key"], inside["value"]], [apart["key"], apart["value"]], dtype)
        # with a new row, and without: the query alone is rotated
        steps = [{k: v for k, v in a.items() if kind == "shared" or not k.startswith("new_")} for a in (inside, apart)]
        count = torch.ones(batch, dtype=torch.int32)
        agree(backend, *(backend.run("decode_step", **step, count=count) for step in steps), dtype)
    nothing = torch.zeros_like(arguments["n_text"])  # no new row is written
    with backend.launched(launch):
        got = backend.run("decode_attention", **inside | {"n_text": nothing}, mass=True, importance=True)
    want = spec.attention(**arguments | {"query": query[:, :, 0], "n_text": nothing})
    made.assert_close(got, want, dtype, on_device(backend))


# ---- what is the same whatever the backend ----------------------------------------------------------------------------------------


def plain(*case, **options):
    """Arguments without window."""
    arguments = spec.problem(*case, **options)
    return {name: value for name, value in arguments.items() if name not in ("position", "query_position")}


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
    arguments = plain(2, 4, 2, 8, 10, 5, [10, 3], [5, 2])
    with pytest.raises(error, match=name):
        ops.decode_attention(**{**arguments, name: wrong(arguments)}, mass=True)


def test_key_heads_must_divide_query_heads():
    arguments = plain(2, 4, 2, 8, 10, 5, [10, 3], [5, 2])
    arguments |= {name: arguments[name][:, [0, 1, 1]] for name in ("key", "value")}
    with pytest.raises(ValueError, match="key: expected a number of heads that divides the 4 heads of query, got 3"):
        ops.decode_attention(**arguments)


def test_bad_arguments_of_a_new_row_are_named():
    arguments = plain(3, 4, 2, 8, 10, 5, [10, 3, 0], [5, 2, 0])
    new = {name: torch.randn(3, 2, 8, dtype=F64) for name in ("new_key", "new_value")}
    with pytest.raises(ValueError, match="new_key, new_value: expected both"):
        ops.decode_attention(**arguments, new_key=new["new_key"])
    with pytest.raises(ValueError, match="new_value: expected shape"):
        ops.decode_attention(**arguments, new_key=new["new_key"], new_value=new["new_value"][:, :1])
    nothing = arguments | {"visual_capacity": 0, "key": arguments["key"][:, :, :0], "value": arguments["value"][:, :, :0]}
    with pytest.raises(ValueError, match="key: expected room for the new row"):
        ops.decode_attention(**{**nothing, "text_type": None}, **new)


def test_bad_arguments_of_a_rotary_embedding_are_named():
    arguments = plain(3, 4, 2, 8, 10, 5, [10, 3, 0], [5, 2, 0])
    cos, sin = rotation(3, 8, F64, "own")
    with pytest.raises(ValueError, match="cos, sin: expected both"):
        ops.decode_attention(**arguments, cos=cos)
    with pytest.raises(ValueError, match="sin: expected shape"):
        ops.decode_attention(**arguments, cos=cos, sin=sin[:, :4])
    with pytest.raises(ValueError, match="cos: expected shape"):
        ops.decode_step(**arguments, count=torch.ones(3, dtype=torch.int32), cos=torch.ones(2, 8).double(), sin=sin)
    with pytest.raises(TypeError, match="cos: expected float64"):
        ops.decode_attention(**arguments, cos=cos.float(), sin=sin.float())
    odd = arguments | {name: arguments[name][..., :7] for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="cos: expected an even head dim"):
        ops.decode_attention(**odd, cos=cos[:, :7], sin=sin[:, :7])


def test_twice_the_same():
    """The reference; every other backend runs each call of this file twice."""
    arguments = plain(*SHAPES["fours"], dtype=F32)
    first, second = (ops.decode_attention(**arguments, mass=True, importance=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_operator_of_attention_waits_for_a_device(no_host_sync):
    case = SHAPES["heads"]
    windowed, arguments = spec.problem(*case), plain(*case)
    kept, n_kept = spec.lists(case[6], [5, 2, 0], 24)
    short, n_short = spec.lists(case[6], [5, 2, 0], 5)
    rates = torch.tensor([0.0, 0.5], dtype=F64)
    weight, bias = torch.randn(2, 8), torch.zeros(2)
    with no_host_sync():
        ops.decode_attention(**arguments, kept=kept, n_kept=n_kept, mass=True, importance=True)
        ops.decode_attention(**arguments, kept=short, n_kept=n_short, mass=True, importance=True)
        ops.decode_attention(**windowed, window=3, mass=True)
        ops.score_last_query(**arguments)
        step = ops.decode_step(**arguments, weight=weight, bias=bias, rates=rates)
        ops.compact_([arguments["key"], arguments["value"]], step.kept, step.n_kept, arguments["n_visual"])
