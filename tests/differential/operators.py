"""Random calls of attention, decision and the rows that move, and what must be true of their results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.ops import reference
from tests.differential.draw import SPECIAL, Draw
from tests.ops import spec

ROUNDING = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DENORMAL = {torch.float64: 0.0, torch.float32: 1e-44, torch.float16: 6e-8, torch.bfloat16: 1e-40}  # the smallest steps of a dtype
HEADS = [(1, 1), (2, 2), (3, 3), (2, 1), (4, 2), (3, 1), (5, 1), (6, 2), (7, 1), (8, 1), (16, 1), (12, 4), (28, 4)]
DIMS = [1, 5, 8, 16, 16, 24, 64, 80]


@dataclasses.dataclass
class Call:
    """One call.

    Attributes:
        run: calls the operator with a backend's name and returns what it returns.
        check: raises AssertionError for a result that is wrong.
    """

    run: Callable[[str], Any]
    check: Callable[[Any], None]


def close(got: Tensor, want: Tensor, tolerance: float, what: str, *, numbers: bool = True) -> None:
    """NaN in the same places, infinity in the same places (``numbers``: else the two count as one), the others within ``tolerance``."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    got, want = got.double(), want.double()
    if numbers:
        assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places"
    assert torch.equal(got.isfinite(), want.isfinite()), f"{what}: infinity in other places"
    error = torch.where(want.isfinite(), got - want, 0.0).abs()
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= tolerance, f"{what}: off by {worst:.2e}, allowed {tolerance:.2e}"


def equal(got: Tensor, want: Tensor, what: str) -> None:
    """Equal integers."""
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}"
    )
    assert torch.equal(torch.nan_to_num(got.double(), nan=7e300), torch.nan_to_num(want.double(), nan=7e300)), f"{what}: {got}, not {want}"


def finite(numbers: Tensor) -> Tensor:
    """In float64, with zeros in place of what is none."""
    return torch.nan_to_num(numbers.double(), 0.0, 0.0, 0.0)


def nothing_else_changed(draw: Draw, changed: dict[int, Tensor] | None = None) -> None:
    """No memory around a tensor and no argument, but for those in ``changed``: id of the tensor -> its content now."""
    for placed in draw.placed:
        placed.check((changed or {}).get(id(placed.tensor)))


# ---- attention -----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Problem:
    """Arguments that the operators of attention share."""

    draw: Draw
    given: dict[str, Any]  # arguments by name
    dtype: torch.dtype
    infinite_values: bool  # infinity times a probability that rounds to zero is NaN
    steepest: float  # no logit is larger, and no term of its sum
    largest: float  # of the values

    def tolerance(self) -> float:
        """Of a probability."""
        return ROUNDING[torch.float64 if self.dtype == torch.float64 else torch.float32] * (1 + self.steepest)


@dataclasses.dataclass
class Rows:
    """Sizes, lengths and contents of a problem of attention as they are drawn, before they lie in memory."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    visual: int
    text: int
    n_visual: Tensor
    n_text: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    kind: str
    infinite: bool = False  # a value is

    @property
    def rows(self) -> int:
        return self.visual + self.text

    @property
    def everyone_full(self) -> bool:
        """No sequence has fewer visual rows than the capacity."""
        return bool((self.n_visual == self.visual).all())


def drawn_rows(draw: Draw) -> Rows:
    batch = draw.one(0, 1, 1, 1, 2, 2, 3, 3)
    heads, kv_heads = draw.pick.choice(HEADS)
    small = heads > 12
    dim = draw.pick.choice(DIMS[:5] if small else DIMS)
    value_dim = draw.pick.choice(DIMS[:5]) if draw.chance(0.15) else dim
    dtype = draw.dtype()
    visual = draw.one(0, 1, 2, 15, 16, 17, 33, 40) if small else draw.one(0, 1, 3, 16, 31, 33, 48, 70, 131)
    text = draw.one(0, 1, 2, 7, 16, 20) if small else draw.one(0, 1, 2, 9, 16, 33, 70, 140)
    n_visual, n_text = draw.lengths(batch, visual), draw.lengths(batch, text)
    draw.tell(f"B={batch} {heads}/{kv_heads} D={dim}/{value_dim} {dtype} V={n_visual.tolist()}/{visual} T={n_text.tolist()}/{text}")

    query, key = draw.normal(batch, heads, dim), draw.normal(batch, kv_heads, visual + text, dim)
    value = draw.normal(batch, kv_heads, visual + text, value_dim)
    kind = draw.one("normal", "normal", "normal", "steep", "flat", "small", "biased", "special")
    draw.tell(kind)
    if kind == "steep":
        query *= 30
    elif kind == "flat":
        query *= 0.0
    elif kind == "small":
        key *= 1e-6
        value *= 1e-6
    elif kind == "biased":
        key += 0.5
        value += draw.one(-3.0, 100.0)
    return Rows(batch, heads, kv_heads, dim, value_dim, dtype, visual, text, n_visual, n_text, query, key, value, kind)


def write_special_numbers(draw: Draw, rows: Rows) -> None:
    """NaN and infinities in queries, keys or values of rows that may be live."""
    for _ in range(draw.pick.randint(1, 3)):
        where = draw.one("key", "key", "key row", "value", "query", "keys")
        number = draw.one(math.nan, math.inf, -math.inf)
        b, h, row = draw.pick.randrange(rows.batch), draw.pick.randrange(rows.kv_heads), draw.pick.randrange(rows.rows)
        if where == "key":
            rows.key[b, h, row, draw.pick.randrange(rows.dim)] = number
        elif where == "key row":
            rows.key[b, h, row] = number
        elif where == "keys":  # with a query above zero: no row but such ones
            rows.query[b].abs_()
            rows.key[b, h] = -math.inf
        elif where == "value":
            rows.value[b, h, row, draw.pick.randrange(rows.value_dim)] = number
            rows.infinite = rows.infinite or math.isinf(number)
        else:
            rows.query[b, draw.pick.randrange(rows.heads), draw.pick.randrange(rows.dim)] = number
        draw.tell(f"{where} {number}")


def write_dead_rows(draw: Draw, rows: Rows, position: Tensor, types: Tensor, clean: bool) -> None:
    """Writes anything to rows that no sequence has; ``clean``: but to their values, which are zero there."""
    for b in range(rows.batch):
        dead = [*range(int(rows.n_visual[b]), rows.visual), *range(rows.visual + int(rows.n_text[b]), rows.rows)]
        rows.key[b, :, dead] = math.nan
        rows.value[b, :, dead] = 0.0 if clean else draw.one(math.nan, math.inf)
        position[b, dead] = draw.integers(-(2**31), 2**31 - 1, len(dead)).int()
        types[b, int(rows.n_text[b]) :] = draw.one(200, 4, 1)


def settings_of(draw: Draw, rows: Rows) -> dict[str, Any]:
    """Scale and bounds of the lengths, each there or not."""
    given: dict[str, Any] = {}
    scale = draw.one(None, rows.dim**-0.5, 1.0, 0.3) if rows.kind != "steep" else None
    if scale is not None or draw.chance(0.5):
        given["scale"] = scale
    for name, lengths in (("visual_bound", rows.n_visual), ("text_bound", rows.n_text)):
        if draw.chance(0.3):
            given[name] = (int(lengths.max()) if rows.batch else 0) + draw.one(0, 1, 99)
    return given


def window_of(draw: Draw, rows: Rows, position: Tensor) -> dict[str, Any]:
    """A sliding window and the positions that it needs."""
    far = draw.chance(0.2)  # differences of which only those of live rows fit 32 bits
    placed = draw.place(position + (2**31 - 1 - max(rows.rows, 1) if far else 0), expand=() if far else (0,))
    last = torch.full((rows.batch,), 2**31 - 1 if far else rows.rows, dtype=torch.int32)
    query_position = draw.place(last - draw.integers(0, max(rows.rows // 2, 1), rows.batch).int())
    window = draw.one(1, 2, 3, 20, 33, 1000)
    draw.tell(f"window {window}")
    return {"position": placed, "query_position": query_position, "window": window}


def largest_numbers(rows: Rows, given: dict[str, Any]) -> tuple[float, float]:
    """``steepest`` and ``largest`` of a :class:`Problem`."""
    products = torch.zeros((), dtype=torch.float64)
    if rows.rows and rows.batch:
        products = finite(given["query"]).abs().amax((0, 1)) @ finite(given["key"]).abs().amax((0, 1, 2))
    largest = finite(given["value"]).abs().max().item() if given["value"].numel() else 0.0
    if "new_value" in given:
        largest = max(largest, given["new_value"].abs().max().item() if rows.batch else 0.0)
        products = products.maximum(products.new_tensor(60.0 * rows.dim))
    factor = rows.dim**-0.5 if given.get("scale") is None else given["scale"]
    return products.item() * factor, max(largest, 1e-30)


def attention_problem(draw: Draw, *, new_row: bool = True, values: bool = True) -> Problem:
    rows = drawn_rows(draw)
    batch, dtype = rows.batch, rows.dtype
    if rows.kind == "special" and rows.rows and batch:
        write_special_numbers(draw, rows)
    clean = draw.chance(0.2) and bool(rows.value.isfinite().all())
    position = torch.stack([torch.randperm(rows.rows, generator=draw.generator) for _ in range(max(batch, 1))])[:batch].int()
    any_type, last_two = draw.integers(0, 4, batch, rows.text), draw.integers(2, 4, batch, rows.text)
    types = draw.one(any_type, last_two, torch.full((batch, rows.text), 3)).to(torch.uint8)
    write_dead_rows(draw, rows, position, types, clean)

    appended = new_row and rows.rows > 0 and draw.chance(0.35)
    given: dict[str, Any] = {
        "query": draw.place(rows.query.to(dtype), expand=(0,)),
        "key": draw.place(rows.key.to(dtype), adjacent=draw.chance(0.8), expand=(0,) if rows.everyone_full and not appended else ()),
        "value": draw.place(rows.value.to(dtype), adjacent=draw.chance(0.8)),
        "n_visual": draw.place(rows.n_visual),
        "n_text": draw.place(rows.n_text),
        "visual_capacity": rows.visual,
    }
    given |= settings_of(draw, rows)
    if clean and values:
        given["clean"] = True
    given["text_type"] = draw.place(types)
    if draw.chance(0.3):
        given |= window_of(draw, rows, position)
    if appended:
        given["new_key"] = draw.place(draw.normal(batch, rows.kv_heads, rows.dim).to(dtype), expand=(0,))
        given["new_value"] = draw.place(draw.normal(batch, rows.kv_heads, rows.value_dim).to(dtype), expand=(0, 1))
        draw.tell("new row")
    if new_row and rows.dim % 2 == 0 and draw.chance(0.25):
        angle = 6 * draw.uniform(draw.one(1, batch) if batch else 1, rows.dim)
        given |= {"cos": draw.place(angle.cos().to(dtype), expand=(0,)), "sin": draw.place(angle.sin().to(dtype), expand=(0,))}
        draw.tell("rotary")
    return Problem(draw, given, dtype, rows.infinite, *largest_numbers(rows, given))


def in_float64(given: dict[str, Any]) -> dict[str, Any]:
    """Copies for the reference: nothing that it does is seen by the call under test."""
    wide = ("query", "key", "value", "new_key", "new_value")
    given = turned(given)
    return {
        name: (part.double() if name in wide else part).clone(memory_format=torch.contiguous_format) if isinstance(part, Tensor) else part
        for name, part in given.items()
    }


def turned(given: dict[str, Any]) -> dict[str, Any]:
    """With query and new key rotated in their dtype, as a call with cos and sin rounds them."""
    if "cos" not in given:
        return given
    rows = ops.Rows(**{"scale": 1.0, **{name: part for name, part in given.items() if name in ops.Rows._fields}})
    rows = reference.rotate(rows)
    rest = {name: part for name, part in given.items() if name not in ("cos", "sin")}
    return {**rest, "query": rows.query, **({} if rows.new_key is None else {"new_key": rows.new_key})}


def appended_rows(draw: Draw, problem: Problem) -> dict[int, Tensor]:
    """Key and value as the call must leave them."""
    given = problem.given
    if "new_key" not in given:
        return {}
    changed, new = {}, turned(given)
    for name in ("key", "value"):
        rows = given[name].clone(memory_format=torch.contiguous_format)
        for b, n in enumerate(given["n_text"].tolist()):
            if n > 0:
                rows[b, :, given["visual_capacity"] + n - 1] = new[f"new_{name}"][b]
        changed[id(given[name])] = rows
    return changed


def check_attention(problem: Problem, got: tuple, want: tuple) -> None:
    statistics = torch.float64 if problem.dtype == torch.float64 else torch.float32
    for what, value, expected in zip(("output", "mass", "importance"), got, want, strict=True):
        assert (value is None) == (expected is None), f"{what}: {value is None}"
        if value is None:
            continue
        assert value.dtype == (problem.dtype if what == "output" else statistics), f"{what}: {value.dtype}"
        tolerance = problem.tolerance()
        if what != "output" and problem.draw.short_logits:
            tolerance += min(2**-11 * (1 + problem.steepest), 1.0)
        if what == "output":
            tolerance = (tolerance + ROUNDING[problem.dtype]) * problem.largest + DENORMAL[problem.dtype]
        close(value, expected, tolerance, what, numbers=not problem.infinite_values or what != "output")


def decode_attention(draw: Draw) -> Call:
    problem = attention_problem(draw)
    given = problem.given
    batch, visual = given["query"].shape[0], given["visual_capacity"]
    mass, importance = draw.one((False, False), (True, True), (True, False), (False, True))
    if not mass and draw.chance(0.7):
        del given["text_type"]
    given |= {"mass": mass, "importance": importance}
    if draw.chance(0.4):
        lengths = given["n_visual"].tolist()
        counts = [draw.size(n) for n in lengths]
        width = max([*counts, 0]) + draw.one(0, 0, 1, 7)
        width = min(width, visual) if draw.chance(0.5) else width
        kept, n_kept = spec.lists(lengths, counts, width, seed=draw.pick.getrandbits(30))
        given |= {"kept": draw.place(kept), "n_kept": draw.place(n_kept)}
        draw.tell(f"list {counts}/{width}")
    changed = appended_rows(draw, problem)
    want = ops.decode_attention(**in_float64(given), backend="reference") if batch else None

    def check(got: Any) -> None:
        nothing_else_changed(draw, changed)
        if want is not None:
            check_attention(problem, got, want)

    return Call(lambda backend: ops.decode_attention(**given, backend=backend), check)


def score_last_query(draw: Draw) -> Call:
    problem = attention_problem(draw, new_row=False, values=False)
    given = problem.given
    want = ops.score_last_query(**in_float64(given), backend="reference") if given["query"].shape[0] else None

    def check(got: Any) -> None:
        nothing_else_changed(draw)
        if want is not None:
            check_attention(problem, (None, *got), (None, *want))

    return Call(lambda backend: ops.score_last_query(**given, backend=backend), check)


def decode_step(draw: Draw) -> Call:
    problem = attention_problem(draw)
    given = problem.given
    batch, heads = given["query"].shape[:2]
    visual = given["visual_capacity"]
    if draw.chance(0.5):
        given |= predictor(draw, batch, heads)
    else:
        given["count"] = draw.place(draw.integers(-2, visual + 3, batch).int())
    if draw.chance(0.4):
        given["score"] = draw.place(draw.scores(batch, visual).to(draw.one(torch.float64, torch.float32, *draw.floats)), expand=(0,))
    if draw.chance(0.4):
        given["alive"] = draw.place(draw.uniform(batch, visual) < draw.one(0.0, 0.5, 0.9), expand=(0,))
    if draw.chance(0.4):
        given["max_kept"] = draw.place(draw.integers(-1, visual + 2, batch).int())
    changed = appended_rows(draw, problem)
    want = ops.decode_attention(
        **in_float64({name: part for name, part in given.items() if name not in DECISION}), mass=True, importance=True, backend="reference"
    ) if batch else None  # fmt: skip

    def check(got: Any) -> None:
        nothing_else_changed(draw, changed)
        if want is None:
            return
        check_attention(problem, got[:3], want)
        check_decision(given, got)

    return Call(lambda backend: ops.decode_step(**given, backend=backend), check)


DECISION = ("weight", "bias", "rates", "count", "score", "alive", "max_kept")


def check_decision(given: dict[str, Any], got: Any) -> None:
    """Rate, count and list follow from the mass and the importance that the call returned; those are within rounding only."""
    n_visual = given["n_visual"]
    if "count" in given:
        count = given["count"]
    else:
        expected_rate(got.mass, given["weight"], given["bias"], given["rates"], got.rate)
        count = reference.keep_count(n_visual, got.rate)
    if "max_kept" in given:
        count = torch.minimum(count, given["max_kept"])
    score = given.get("score", got.importance)
    kept, n_kept = reference.select_tokens(score, count, n_visual, alive=given.get("alive"))
    equal(got.n_kept, n_kept, "n_kept")
    equal(got.kept, kept, "kept")
    if "count" in given:
        rate = torch.where(n_visual > 0, 1.0 - n_kept.double() / n_visual.clamp(min=1), 0.0)
        close(got.rate, rate, 1e-15, "rate")


def predictor(draw: Draw, batch: int, heads: int) -> dict[str, Tensor]:
    """A linear layer over the mass with ties, numbers that are none, and rates beside [0, 1]."""
    classes = draw.one(1, 2, 4, 5, 9, 10)
    kinds = [torch.float32, *draw.floats]
    weight = draw.normal(classes, heads * 4) * draw.one(0.0, 1.0, 8.0)
    bias = draw.scores(batch, classes).clamp(-1e4, 1e4) if draw.chance(0.4) else draw.normal(batch, classes)
    if draw.chance(0.1):
        weight[draw.pick.randrange(classes), 0] = draw.one(math.nan, math.inf, -math.inf)
    rates = draw.uniform(classes)
    if draw.chance(0.3):
        rates = torch.tensor(SPECIAL[:3] + [0.1, 0.4, 0.7, 0.8, 0.9, -0.5, 1.5, math.nan], dtype=torch.float64)
        rates = rates[draw.integers(0, len(rates), classes)]
    offset = bias if draw.chance(0.6) or batch == 0 else bias[0]
    return {
        "weight": draw.place(weight.to(draw.pick.choice(kinds))),
        "bias": draw.place(offset.to(draw.pick.choice(kinds)), expand=(0,) if offset.dim() == 2 else ()),
        "rates": draw.place(rates),
    }


def expected_rate(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, rate: Tensor, index: Tensor | None = None) -> None:
    """The rate (and class) of the highest logit, the first of equal ones; of logits within rounding any may be the highest."""
    terms = mass.double().flatten(1)
    logits = terms @ weight.double().t() + bias.double()
    slack = 2e-6 * (
        terms.abs() @ torch.nan_to_num(weight.double(), 0.0, 0.0, 0.0).abs().t() + torch.nan_to_num(bias.double(), 0.0, 0.0, 0.0).abs()
    )
    for b in range(mass.shape[0]):
        row = torch.where(logits[b].isnan(), -math.inf, logits[b])
        numbers = ~logits[b].isnan()
        top = row.max()
        allowed = [0] if not numbers.any() else (numbers & ((row == top) | (row >= top - 2 * slack[b].max()))).nonzero()[:, 0].tolist()
        exact = (weight == 0).all() or len(allowed) == 1
        if exact and numbers.any():  # nothing rounds: the first of equal ones
            allowed = [int((numbers & (row == top)).nonzero()[0])]
        if index is not None:
            assert int(index[b]) in allowed, f"class {int(index[b])} of {logits[b].tolist()}"
            allowed = [int(index[b])]
        assert any(bool(rates[c] == rate[b]) or bool(rates[c].isnan() & rate[b].isnan()) for c in allowed), (
            f"rate {rate[b]} of classes {allowed}"
        )


def predict_rate(draw: Draw) -> Call:
    batch, heads = draw.one(0, 1, 2, 3, 5), draw.one(1, 2, 3, 7, 28, 40)
    given = predictor(draw, batch, heads)
    mass = draw.uniform(batch, heads, 4)
    if draw.chance(0.1) and batch:
        mass[0, 0] = math.nan
    given["mass"] = draw.place(mass.to(draw.dtype()), expand=(0,))
    draw.tell(f"mass {list(mass.shape)} {given['mass'].dtype} weight {list(given['weight'].shape)} {given['weight'].dtype}")

    def check(got: Any) -> None:
        nothing_else_changed(draw)
        rate, index = got
        assert rate.dtype == torch.float64 and index.dtype == torch.int64
        expected_rate(given["mass"], given["weight"], given["bias"], given["rates"], rate, index)

    return Call(lambda backend: ops.predict_rate(**given, backend=backend), check)


def select_tokens(draw: Draw) -> Call:
    batch, tokens = draw.one(0, 1, 2, 3), draw.one(0, 1, 2, 13, 16, 17, 33, 64, 90, 257)
    score = draw.scores(batch, tokens).to(draw.one(torch.float64, torch.float32, torch.float32, *draw.floats))
    given = {
        "score": draw.place(score, expand=(0,)),
        "count": draw.place(draw.integers(-2, tokens + 4, batch).int()),
        "n_visual": draw.place(draw.lengths(batch, tokens)),
    }
    if draw.chance(0.5):
        given["alive"] = draw.place(draw.uniform(batch, tokens) < draw.one(0.0, 0.3, 0.9), expand=(0,))
    draw.tell(f"{list(score.shape)} {score.dtype} count {given['count'].tolist()} of {given['n_visual'].tolist()}")
    kept, n_kept = reference.select_tokens(**{name: part.clone() for name, part in given.items()})

    def check(got: Any) -> None:
        nothing_else_changed(draw)
        equal(got[1], n_kept, "n_kept")
        equal(got[0], kept, "kept")

    return Call(lambda backend: ops.select_tokens(**given, backend=backend), check)


# ---- rows that move ------------------------------------------------------------------------------------------------------------------

ANY_TYPE = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int16, torch.int64, torch.bool]


def any_rows(draw: Draw, *shape: int) -> Tensor:
    dtype = draw.pick.choice(ANY_TYPE)
    return draw.integers(0, 2 if dtype == torch.bool else 120, *shape).to(dtype)


def compact_(draw: Draw) -> Call:
    batch, capacity = draw.one(1, 1, 2, 3), draw.one(1, 2, 7, 16, 33, 70, 130, 300)
    lengths = draw.lengths(batch, capacity)
    counts = [draw.size(int(n)) for n in lengths]
    width = max(counts) + draw.one(0, 0, 1, 5)
    kept, n_kept = spec.lists(lengths.tolist(), counts, width, seed=draw.pick.getrandbits(30))
    rows, want = [], []
    for _ in range(draw.one(0, 1, 1, 2, 4, 6)):
        room = capacity + draw.one(0, 0, 3)
        flat = draw.chance(0.3)
        content = any_rows(draw, batch, room) if flat else any_rows(draw, batch, draw.one(1, 2, 3), room, draw.one(1, 2, 5, 8, 16, 64, 130))
        rows.append(draw.place(content, adjacent=draw.chance(0.7) and not flat))
        want.append(torch.stack([spec.compact(rows[-1][b], kept[b, : counts[b]].tolist()) for b in range(batch)]))
    placed = [draw.place(part) for part in (kept, n_kept, lengths)]
    draw.tell(f"{counts} of {lengths.tolist()}/{capacity}: {[(list(part.shape), part.stride(), part.dtype) for part in rows]}")

    def check(got: Any) -> None:
        nothing_else_changed(draw, {id(part): content for part, content in zip(rows, want, strict=True)})

    return Call(lambda backend: ops.compact_(rows, *placed, backend=backend), check)


def reorder_(draw: Draw) -> Call:
    batch = draw.one(0, 1, 2, 3, 5, 17)
    index = draw.one(draw.integers(0, max(batch, 1), batch), torch.arange(batch), torch.randperm(batch, generator=draw.generator))
    rows, want = [], []
    for _ in range(draw.one(0, 1, 2, 4)):
        shape = draw.one((batch,), (batch, 7), (batch, 700), (batch, 3, 5), (batch, 2, 9, 16), (batch, 2, 0, 4))
        rows.append(draw.place(any_rows(draw, *shape), plain=0.7))
        want.append(rows[-1][index].clone())
    placed = draw.place(index)
    draw.tell(f"{index.tolist()}: {[(list(part.shape), part.stride(), part.dtype) for part in rows]}")

    def check(got: Any) -> None:
        nothing_else_changed(draw, {id(part): content for part, content in zip(rows, want, strict=True)})

    return Call(lambda backend: ops.reorder_(rows, placed, backend=backend), check)
