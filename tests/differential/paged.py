"""Random calls of the operators over paged rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from dyrate_kernels import ops
from dyrate_kernels.ops import reference
from tests.differential.draw import Draw, Placed
from tests.differential.operators import (
    DIMS,
    HEADS,
    Call,
    Problem,
    check_attention,
    equal,
    expected_rate,
    finite,
    in_float64,
    nothing_else_changed,
    predictor,
)
from tests.ops import paged_spec


def prompt(draw: Draw) -> str:
    """Token types of a prompt: runs of system, visual, instruction and response."""
    runs = [f"{draw.one(1, 2, 5, 16, 40)}{kind}" for kind in draw.pick.choices("svvir", k=draw.one(1, 2, 3, 4))]
    return " ".join(runs)


def paged_problem(draw: Draw) -> Problem:
    heads, kv_heads = draw.pick.choice(HEADS)
    dim = draw.pick.choice(DIMS[:5])
    plain = draw.chance(0.3)
    sequences = draw.one(1, 1, 2, 3)
    rows = [(s, -1) for s in range(sequences)]
    if not plain:
        rows = [(draw.pick.randrange(sequences), draw.one(-1, -1, -1, -2, 0)) for _ in range(draw.one(1, 2, 3, 5))]
    shape = paged_spec.Shape(
        heads, kv_heads, dim, draw.one(1, 4, 5, 16), tuple(prompt(draw) for _ in range(sequences)),
        tuple(draw.one(1, 2, 7, 33) for _ in range(sequences)), tuple(rows), draw.one(None, None, 12), plain,
    )  # fmt: skip
    dtype = draw.dtype()
    draw.tell(f"{shape} {dtype}")
    made = paged_spec.problem(shape, dtype, draw.pick.getrandbits(30), share=draw.chance(0.3))
    kind = draw.one("normal", "normal", "steep", "flat", "special")
    draw.tell(kind)
    if kind == "steep":
        made["query"] *= 30
    elif kind == "flat":
        made["query"] *= 0
    elif kind == "special":
        made["key"][draw.pick.randrange(len(made["key"])), 0, :, 0] = draw.one(math.nan, math.inf, -math.inf)
    given = {
        name: draw.place(part, adjacent=draw.chance(0.7) and name in ("key", "value")) if isinstance(part, torch.Tensor) else part
        for name, part in made.items()
    }
    if draw.chance(0.3):
        given["window"] = draw.one(1, 2, 5, 20, 1000)
    if draw.chance(0.3):
        given["row_bound"] = int(made["n_rows"].max()) + draw.one(0, 1, 3)
    if draw.chance(0.4):
        kept = paged_spec.lists(made, draw.one(0.0, 0.3, 0.7, 1.0), seed=draw.pick.getrandbits(30))
        given |= {name: draw.place(part) for name, part in kept.items()}
        draw.tell(f"list {kept['n_kept'].tolist()}/{kept['kept'].shape[1]}")
    products = finite(given["query"]).abs().amax((0, 1)) @ finite(given["key"]).abs().amax((0, 1, 2))
    largest = max(finite(given["value"]).abs().max().item(), 1e-30)
    return Problem(draw, given, dtype, False, products.item() * made["scale"], largest)


def paged_attention(draw: Draw) -> Call:
    problem = paged_problem(draw)
    given = problem.given
    mass, importance = draw.one((False, False), (True, True), (True, False), (False, True))
    if not (mass or importance or "kept" in given) and draw.chance(0.5):
        for name in ("visual_position", "n_visual", "text_position", "text_type"):
            del given[name]
    given |= {"mass": mass, "importance": importance}
    want = ops.paged_attention(**in_float64(given), backend="reference")
    written: dict[int, torch.Tensor] = {}
    if draw.chance(0.3):
        shape = (*given["query"].shape[:2], given["value"].shape[-1])
        placed = Placed(torch.full(shape, math.nan, dtype=problem.dtype), torch.empty(shape).stride(), draw.one(0, 8))
        draw.placed.append(placed)
        given["out"] = placed.tensor
        draw.tell("out")

    def check(got: Any) -> None:
        if "out" in given:
            assert got.output is given["out"], "output is another tensor than out"
            written[id(given["out"])] = got.output.clone()
        nothing_else_changed(draw, written)
        check_attention(problem, got, want)

    return Call(lambda backend: ops.paged_attention(**given, backend=backend), check)


def paged_step(draw: Draw) -> Call:
    problem = paged_problem(draw)
    given = problem.given
    rows, heads = given["query"].shape[:2]
    tokens = given["kept" if "kept" in given else "visual_position"].shape[1]
    want = ops.paged_attention(**in_float64(given), mass=True, importance=True, backend="reference")
    if draw.chance(0.5):
        given |= predictor(draw, rows, heads)
    else:
        given["count"] = draw.place(draw.integers(-2, tokens + 3, rows).int())
    if draw.chance(0.4):
        given["score"] = draw.place(draw.scores(rows, tokens).to(draw.one(torch.float64, torch.float32, *draw.floats)), expand=(0,))
    if draw.chance(0.4):
        given["alive"] = draw.place(draw.uniform(rows, tokens) < draw.one(0.0, 0.5, 0.9), expand=(0,))
    if draw.chance(0.4):
        given["max_kept"] = draw.place(draw.integers(-1, tokens + 2, rows).int())

    def check(got: Any) -> None:
        nothing_else_changed(draw)
        check_attention(problem, got[:3], want)
        read = given["n_kept"] if "kept" in given else given["n_visual"]
        if "count" in given:
            count = given["count"]
        else:
            expected_rate(got.mass, given["weight"], given["bias"], given["rates"], got.rate)
            count = reference.keep_count(read, got.rate)
        if "max_kept" in given:
            count = torch.minimum(count, given["max_kept"])
        places, n_kept = reference.select_tokens(given.get("score", got.importance), count, read, alive=given.get("alive"))
        equal(got.n_kept, n_kept, "n_kept")
        owner = given["sequence"].long() if given.get("sequence") is not None else torch.arange(rows)
        positions = given["kept"] if "kept" in given else given["visual_position"][owner]
        kept = torch.where(places >= 0, positions.gather(1, places.clamp(min=0).long()), -1) if tokens else places
        equal(got.kept, kept, "kept")

    return Call(lambda backend: ops.paged_step(**given, backend=backend), check)
