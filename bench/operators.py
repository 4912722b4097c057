"""Operators, each beside its floor and its dense twin: the first rows of the table in docs/design.md, section 10.

    python -m bench.operators OUT.json [--toy] [--seconds 100]
    python -m bench.operators --compile      # builds every kernel that the other call launches, into Triton's cache

``--toy`` goes through everything at a tiny size, on a CPU in Triton's interpreter; its times are no measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dyrate_kernels as dk
from bench import expected, fastv, layers, vllm_kernel
from dyrate_kernels import ops
from dyrate_kernels.files import check_file, write_json
from dyrate_kernels.measuring import timing
from dyrate_kernels.measuring.timing import Times
from tests.ops import spec

LIMIT = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of ||out - ref|| / ||ref|| against float64
OURS = "dyrate"
NEW_ROW = "with a new row"
Gate = Callable[[Any, int], dict[str, Any]]  # (a call's result, which set of inputs it is of) -> timing.correctness


def label(backend: str) -> str:
    """Returns what the rows of a backend begin with: ``"dyrate"``, ``"dyrate cuda"``."""
    return f"{OURS} cuda" if backend == "cuda" else OURS


@dataclass(frozen=True)
class Shape:
    """One decode-attention problem: B sequences with N visual and T text rows each."""

    name: str
    batch: int
    visual: int
    text: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    def word(self) -> str:
        """The name as ``pytest -k`` can say it, e.g. ``mha-B1-N576``."""
        return self.name.replace("=", "").replace(" ", "-")

    @property
    def rows(self) -> int:
        return self.visual + self.text

    @property
    def brief(self) -> bool:
        """Only the rows that say most are timed at it (:func:`brief_attention_rows`)."""
        return self.visual > 4096 or self.name not in ("mha", "gqa")

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all sequences."""
        return 2 * self.batch * self.rows * self.kv_heads * self.dim * self.dtype.itemsize

    @property
    def attention_bytes(self) -> int:
        """Returns the bytes that attention must move: keys, values and query in, output out."""
        return self.kv_bytes + 2 * self.batch * self.heads * self.dim * self.dtype.itemsize

    @property
    def statistics_bytes(self) -> int:
        """Returns the bytes that the statistics must move on top: types in, mass and importance out."""
        return self.batch * (self.text + 16 * self.heads + 4 * self.visual)

    @property
    def new_row_bytes(self) -> int:
        """Returns the bytes that a new row moves on top: read where the layer made it, written to the cache."""
        return 4 * self.batch * self.kv_heads * self.dim * self.dtype.itemsize

    @property
    def kept(self) -> int:
        """12.5 %."""
        return self.visual // 8

    def facts(self) -> dict[str, Any]:
        return {
            "shape": self.name,
            "B": self.batch,
            "N": self.visual,
            "text": self.text,
            "heads": f"{self.heads}/{self.kv_heads}x{self.dim}",
            "dtype": str(self.dtype).removeprefix("torch."),
        }


HEADS = {  # query heads, key/value heads, elements of a head: one, and two to eight query heads a key/value head
    "mha": (32, 32, 128),
    "gqa": (28, 4, 128),
    "gqa2": (32, 16, 128),
    "gqa4": (32, 8, 128),
    "gqa5": (40, 8, 128),
    "gqa8": (64, 8, 128),
}


def shapes(toy: bool) -> list[Shape]:
    """The most telling ones first: time may run out."""
    if toy:
        return [
            Shape("mha", 2, 24, 8, 2, 2, 16, torch.float32), Shape("gqa", 1, 24, 8, 4, 2, 16, torch.float32),
            Shape("gqa5", 1, 24, 8, 5, 1, 16, torch.float32),
        ]  # fmt: skip
    order = [("mha", 32, 2880), ("mha", 1, 576), ("gqa", 32, 2880), ("mha", 8, 2880), ("mha", 32, 576), ("mha", 1, 2880), ("gqa", 1, 576),
             ("gqa", 8, 2880), ("mha", 8, 576), ("gqa", 32, 576), ("gqa", 1, 2880), ("gqa", 8, 576),
             ("gqa", 32, 16384), ("gqa", 1, 16384), ("mha", 1, 16384), ("gqa", 8, 16384), ("mha", 8, 16384), ("gqa4", 32, 2880),
             ("gqa8", 32, 2880), ("gqa5", 32, 2880), ("gqa2", 32, 2880), ("gqa4", 1, 2880), ("gqa8", 1, 2880), ("gqa5", 1, 2880),
             ("gqa2", 1, 2880), ("mha", 32, 16384)]  # fmt: skip
    return [Shape(kind, batch, visual, 128, *HEADS[kind], torch.bfloat16) for kind, batch, visual in order]


class Data:
    """Random inputs of one shape, several sets where one would stay in the L2 cache."""

    def __init__(self, shape: Shape, backend: str, device: torch.device, sets: int | None = None) -> None:
        self.shape, self.backend = shape, backend
        self.sets = timing.copies_for_cold_cache(shape.kv_bytes) if sets is None else sets
        g = torch.Generator(device=device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device, dtype=shape.dtype)

        self.query = [random(shape.batch, shape.heads, shape.dim) for _ in range(self.sets)]
        self.key = [random(shape.batch, shape.kv_heads, shape.rows, shape.dim) for _ in range(self.sets)]
        self.value = [random(shape.batch, shape.kv_heads, shape.rows, shape.dim) for _ in range(self.sets)]
        self.new: list[dict[str, Any]] = [  # the last text row, as a layer gives it to the operator
            {"new_key": key[:, :, -1].clone(), "new_value": value[:, :, -1].clone()}
            for key, value in zip(self.key, self.value, strict=True)
        ]

        def whole(number: int) -> Tensor:
            return torch.full((shape.batch,), number, dtype=torch.int32, device=device)

        self.n_visual, self.n_text, self.count = whole(shape.visual), whole(shape.text), whole(shape.kept)
        self.text_type = torch.randint(0, 3, (shape.batch, shape.text), generator=g, device=device)
        self.text_type = torch.where(self.text_type == 1, 3, self.text_type).to(torch.uint8)
        self.linear: dict[str, Any] = {  # a predictor whose bias asks for 12.5 %: a rate of 0.875
            "weight": 1e-3 * torch.randn(5, 4 * shape.heads, generator=g, device=device),
            "bias": torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0], device=device),
            "rates": torch.tensor([0.0, 0.25, 0.5, 0.75, 0.875], dtype=torch.float64, device=device),
        }
        picked = torch.rand(shape.batch, shape.visual, generator=g, device=device).topk(shape.kept, dim=1).indices
        self.kept, self.n_kept = picked.sort(dim=1).values.int(), self.count.clone()

    def calls(self, call: Callable[..., Any], **more: Any) -> list[Callable[[], Any]]:
        """One call a set: ``call(query, key, value, **more)``."""
        return [partial(call, self.query[s], self.key[s], self.value[s], **more) for s in range(self.sets)]

    def ours(self, operator: Callable[..., Any], new_row: bool = False, **more: Any) -> list[Callable[[], Any]]:
        """One call a set. ``new_row``: the operator stores the last text row first, as in a model."""
        shared = {**self.shared(), **more}
        if not new_row:
            return self.calls(operator, **shared)
        return [partial(operator, self.query[s], self.key[s], self.value[s], **self.new[s], **shared) for s in range(self.sets)]

    def forget_last_rows(self) -> None:
        """NaN where the new rows go: an operator that does not store them is wrong from then on."""
        for rows in (*self.key, *self.value):
            rows[:, :, -1] = float("nan")

    def put_last_rows_back(self) -> None:
        """For operators that take no new row."""
        for key, value, new in zip(self.key, self.value, self.new, strict=True):
            key[:, :, -1], value[:, :, -1] = new["new_key"], new["new_value"]

    def shared(self) -> dict[str, Any]:
        """Returns the arguments of every attention call beside the rows."""
        return {"visual_capacity": self.shape.visual, "backend": self.backend, "n_visual": self.n_visual, "n_text": self.n_text}

    def reference(self, kept: Tensor | None = None, number: int = 0) -> tuple[list[int], expected.Attention]:
        """(sequences, what is right) of a set of inputs for the first and the last sequence."""
        picked = sorted({0, self.shape.batch - 1})
        query, key, value = (tensor[number][picked] for tensor in (self.query, self.key, self.value))  # copies
        key[:, :, -1], value[:, :, -1] = (self.new[number][name][picked] for name in ("new_key", "new_value"))
        rows = (query, key, value)
        kept = None if kept is None else kept[picked]
        return picked, expected.attention(*rows, self.shape.visual, self.text_type[picked], kept)


def gate(shape: Shape, picked: list[int], want: expected.Attention, got: Any) -> dict[str, Any]:
    """Against ``bench.expected``."""
    if isinstance(got, Tensor):
        return timing.correctness(LIMIT[shape.dtype], output=timing.relative(got[picked], want.output))
    errors = {"output": timing.relative(got.output[picked], want.output)}
    for name in ("mass", "importance"):
        if getattr(got, name) is not None:
            errors[name] = timing.relative(getattr(got, name)[picked], getattr(want, name))
    return timing.correctness(LIMIT[shape.dtype], **errors)


def step_gate(shape: Shape, attention: dict[str, Any], step: ops.DecodeStep, linear: dict[str, Tensor]) -> dict[str, Any]:
    """``attention`` is right, the rate is what the predictor gives for the step's own mass, and the kept list is the highest of its own
    importance.
    """
    rates = float((step.rate != expected.rate(step.mass, **linear)).sum())
    count = spec.keep_count(shape.visual, float(linear["rates"][-1]))
    wrong = selection_wrong(step.importance, count, step.kept, step.n_kept)
    errors = {"kept_wrong": wrong, "rates_wrong": rates}
    return {**attention, "passed": attention["passed"] and not any(errors.values()), "errors": attention["errors"] | errors}


def selection_wrong(score: Tensor, count: int, kept: Tensor, n_kept: Tensor) -> float:
    """Returns how many entries of a kept list are not those of the ``count`` highest of ``score``."""
    wrong = (kept[:, :count] != expected.highest(score, count)).sum() + (kept[:, count:] != -1).sum() + (n_kept != count).sum()
    return float(wrong)


def fastv_gate(shape: Shape, attention: dict[str, Any], step: fastv.FastVStep, key: Tensor, value: Tensor) -> dict[str, Any]:
    """``attention`` is right, and what FastV chose by its own weights, and gathered, too."""
    score = step.attention.mean(1)[:, : shape.visual]
    wrong = expected.fastv_wrong(score, step.stays, shape.kept, shape.visual, shape.rows)
    for gathered, rows in ((step.key, key), (step.value, value)):
        for sequence, index in enumerate(step.stays):
            wrong += int((gathered[sequence] != rows[sequence][:, index]).any())
    return {**attention, "passed": attention["passed"] and wrong == 0, "errors": attention["errors"] | {"choice_wrong": float(wrong)}}


def both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """A gate that was passed before the clock ran, on the first set of inputs, and after it, on the last."""
    errors = {name: max(first["errors"][name], second["errors"][name]) for name in first["errors"]}
    return {**first, "passed": first["passed"] and second["passed"], "errors": errors}


def row(name: str, times: Times, gate: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """``timing.row``; what is wrong has no speed."""
    if gate["passed"]:
        return timing.row(name, times, gate=gate, **facts)
    return timing.row(name, None, gate=gate, **{**facts, "note": f"wrong, so it has no speed: {gate['errors']}"[:300]})


def attention_rows(shape: Shape, backends: list[str], bandwidth: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Everything about one shape: attention and the decision of each backend, the dense twins, FastV."""
    data = Data(shape, backends[0], device)
    facts = {"bandwidth": bandwidth, "sets": data.sets, **shape.facts()}
    base = shape.attention_bytes
    for backend in backends[:1] if shape.brief else backends:
        data.backend = backend
        rows = brief_attention_rows if shape.brief else our_attention_rows
        yield from rows(data, {"backend": backend, **facts})

    # dense twins
    right = attention_gate(data)
    for name, make in dense_twins(data):
        if shape.brief and name in ("torch SDPA, math", "torch SDPA, efficient"):
            continue
        try:
            times, passed = measured(data.calls(make()), right)
            yield row(f"dense {name}", times, passed, group="attention", moved=base, **facts)
        except Exception as error:  # another package's kernel that does not run here is no failure of this one
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            yield timing.row(f"dense {name}", None, group="attention", note=note, **facts)
    if shape.brief:
        return
    eager = data.calls(fastv.step, n_visual=shape.visual, n_keep=shape.kept, scale=shape.dim**-0.5)

    def chosen(got: fastv.FastVStep, number: int) -> dict[str, Any]:
        return fastv_gate(shape, right(got.output, number), got, data.key[number], data.value[number])

    name = "FastV eager step (attention matrix, mean, topk, gather)"
    yield row(name, *measured(eager, chosen, timing.time_launched), group="attention", moved=base, **facts)
    yield row("FastV eager step, in a CUDA graph", *measured(eager, chosen), group="attention", moved=base, **facts)


def attention_gate(data: Data, kept: Tensor | None = None) -> Gate:
    """For results of attention over all rows, or over the ``kept`` ones of set 0 alike in every set."""
    found: dict[int, tuple[list[int], expected.Attention]] = {}

    def right(got: Any, number: int) -> dict[str, Any]:
        if number not in found:
            found[number] = data.reference(kept, number)
        return gate(data.shape, *found[number], got)

    return right


def measured(
    calls: list[Callable[[], Any]], right: Gate, clock: Callable[..., Times] = timing.time_captured
) -> tuple[Times, dict[str, Any]]:  # fmt: skip
    """Times, and whether the results are right: of the first set of inputs before the clock runs, of the last after it."""
    before = right(calls[0](), 0)
    times = clock(calls)
    return times, both(before, right(calls[-1](), len(calls) - 1))


def our_attention_rows(data: Data, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Attention plain, with statistics, through a kept list, and the decision, on ``data.backend``; all of it with a new row, too."""
    shape, ours = data.shape, label(data.backend)
    base, extra = shape.attention_bytes, shape.statistics_bytes

    def timed(name: str, calls: list[Callable[[], Any]], right: Gate, moved: int) -> tuple[Times, dict[str, Any], dict[str, Any]]:
        times, passed = measured(calls, right)
        return times, passed, row(f"{ours} {name}", times, passed, group="attention", moved=moved, **facts)

    right = attention_gate(data)
    statistics: dict[str, Any] = {"text_type": data.text_type, "mass": True, "importance": True}
    yield timed("decode_attention", data.ours(ops.decode_attention), right, base)[2]
    seen, _, found = timed("decode_attention with statistics", data.ours(ops.decode_attention, **statistics), right, base + extra)
    yield found
    steps = data.ours(ops.decode_step, text_type=data.text_type, **data.linear)
    whole, passed, found = timed(
        "decode_step",
        steps,
        lambda got, number: step_gate(shape, right(got, number), got, data.linear),
        base + extra + 4 * shape.batch * shape.visual,
    )
    yield found
    alone = Times(*(max(a - b, 0.0) for a, b in zip(whole, (seen.median,) * 3, strict=True)))
    yield row(
        f"{ours} decision (decode_step minus attention with statistics)", alone, passed, group="attention", note="difference of medians",
        **facts,
    )  # fmt: skip

    # its parts alone
    scores = data.ours(ops.score_last_query, text_type=data.text_type)

    def scored(got: Any, number: int) -> dict[str, Any]:
        picked, want = data.reference(number=number)
        errors = {name: timing.relative(a[picked], getattr(want, name)) for name, a in zip(("mass", "importance"), got, strict=True)}
        return timing.correctness(LIMIT[shape.dtype], **errors)

    yield timed("score_last_query", scores, scored, base // 2 + extra)[2]
    first = steps[0]()
    score, mass = first.importance, first.mass
    selection = [lambda: ops.select_tokens(score, data.count, data.n_visual, backend=data.backend)]

    def selected(got: Any, number: int) -> dict[str, Any]:
        return timing.correctness(0.0, kept_wrong=selection_wrong(score, shape.kept, *got))

    yield timed("select_tokens", selection, selected, 8 * shape.batch * shape.visual)[2]
    prediction = [lambda: ops.predict_rate(mass, **data.linear, backend=data.backend)]
    rates = expected.rate(mass, **data.linear)

    def predicted(got: Any, number: int) -> dict[str, Any]:
        return timing.correctness(0.0, rates_wrong=float((got[0] != rates).sum()))

    yield timed("predict_rate", prediction, predicted, 16 * shape.batch * shape.heads)[2]

    # the pruned layers: 12.5 % of the rows through the kept list
    listed = data.ours(ops.decode_attention, kept=data.kept, n_kept=data.n_kept)
    few = dataclasses.replace(shape, visual=shape.kept)
    through_list = attention_gate(data, data.kept)
    yield timed("decode_attention, 12.5 % kept", listed, through_list, few.attention_bytes)[2]

    # as a model calls them: the newest row comes with the call (more registers, another kernel)
    for name, (operator, more, passes, moved) in forms(data).items():
        yield with_new_row(data, facts, name, operator, more, passes, moved)
    yield from paged_rows(data, facts)


FORMS = ("decode_attention", "decode_attention with statistics", "decode_attention, 12.5 % kept", "decode_step")
Form = tuple[Callable[..., Any], dict[str, Any], Gate, int]  # operator, arguments beside the shared ones, gate, bytes that it moves


def forms(data: Data) -> dict[str, Form]:
    """Returns what a model calls, by the names of the rows."""
    shape, right = data.shape, attention_gate(data)
    base, extra = shape.attention_bytes, shape.statistics_bytes
    few, types = dataclasses.replace(shape, visual=shape.kept), {"text_type": data.text_type}

    def decided(got: Any, number: int) -> dict[str, Any]:
        return step_gate(shape, right(got, number), got, data.linear)

    listed = {"kept": data.kept, "n_kept": data.n_kept}
    return {
        "decode_attention": (ops.decode_attention, {}, right, base),
        "decode_attention with statistics": (ops.decode_attention, {**types, "mass": True, "importance": True}, right, base + extra),
        "decode_attention, 12.5 % kept": (ops.decode_attention, listed, attention_gate(data, data.kept), few.attention_bytes),
        "decode_step": (ops.decode_step, {**types, **data.linear}, decided, base + extra + 4 * shape.batch * shape.visual),
    }


def with_new_row(
    data: Data, facts: dict[str, Any], name: str, operator: Callable[..., Any], more: dict[str, Any], passes: Gate, moved: int
) -> dict[str, Any]:
    """The row of a form whose newest row comes with the call; it is not in the cache before."""
    data.forget_last_rows()
    try:
        times, passed = measured(data.ours(operator, new_row=True, **more), passes)
    finally:
        data.put_last_rows_back()
    name = f"{label(data.backend)} {name}, {NEW_ROW}"
    return row(name, times, passed, group="attention", moved=moved + data.shape.new_row_bytes, **facts)


def brief_attention_rows(data: Data, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Attention plain and with statistics, and what a model calls, with a new row."""
    found = forms(data)
    for name in ("decode_attention", "decode_attention with statistics"):
        operator, more, passes, moved = found[name]
        times, passed = measured(data.ours(operator, **more), passes)
        yield row(f"{label(data.backend)} {name}", times, passed, group="attention", moved=moved, **facts)
    for name in ("decode_attention", "decode_attention, 12.5 % kept", "decode_step"):
        yield with_new_row(data, facts, name, *found[name])


SDPA = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
PACKAGES = {
    "flash_attn": "FlashAttention with_kvcache", "flashinfer": "FlashInfer paged decode", "vllm": "vLLM unified_attention (Triton), paged",
}  # fmt: skip


BLOCK = 16  # rows of a block of the paged forms
PAGED = ("paged_attention", "paged_attention, 12.5 % kept", "paged_step")


def paged_forms(data: Data) -> dict[str, tuple[list[Callable[[], Any]], Gate, int]]:
    """The same work over paged rows, by the names of the rows: (calls, gate, bytes). Blocks lie in random order; copies made here."""
    shape, right = data.shape, attention_gate(data)
    blocks = shape.rows // BLOCK
    if shape.rows % BLOCK:
        raise ValueError(f"{shape.name}: expected a multiple of {BLOCK} rows, got {shape.rows}")
    device = data.query[0].device
    g = torch.Generator(device=device).manual_seed(2)
    order = torch.randperm(shape.batch * blocks, generator=g, device=device)

    def pool(rows: Tensor) -> Tensor:
        paged = torch.empty(shape.batch * blocks, BLOCK, shape.kv_heads, shape.dim, dtype=shape.dtype, device=device)
        paged[order] = rows.transpose(1, 2).reshape(paged.shape)
        return paged

    pools = [(pool(key), pool(value)) for key, value in zip(data.key, data.value, strict=True)]
    place = torch.arange(shape.rows, dtype=torch.int32, device=device).expand(shape.batch, -1)
    shared = {
        "block_table": order.view(shape.batch, blocks).int(), "n_rows": torch.full_like(data.count, shape.rows), "n_visual": data.n_visual,
        "text_position": place[:, shape.visual :].contiguous(), "text_type": data.text_type, "backend": data.backend,
    }  # fmt: skip
    visual = {"visual_position": place[:, : shape.visual].contiguous()}
    found = forms(data)

    def calls(operator: Callable[..., Any], **more: Any) -> list[Callable[[], Any]]:
        pairs = zip(data.query, pools, strict=True)
        return [partial(operator, query, *rows, **shared, **more) for query, rows in pairs]

    def moved(name: str) -> int:
        return found[name][3] + 4 * shape.batch * blocks

    listed = {"kept": data.kept, "n_kept": data.n_kept}
    return {
        "paged_attention": (calls(ops.paged_attention, **visual), right, moved("decode_attention")),
        "paged_attention, 12.5 % kept": (
            calls(ops.paged_attention, **listed), attention_gate(data, data.kept), moved("decode_attention, 12.5 % kept"),
        ),
        "paged_step": (calls(ops.paged_step, **visual, **data.linear), found["decode_step"][2], moved("decode_step")),
    }  # fmt: skip


def paged_rows(data: Data, facts: dict[str, Any], names: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Rows of ``paged_forms``, or of those named; nothing for CUDA C++, which has no paged form."""
    if data.backend == "cuda" or data.shape.rows % BLOCK:
        return
    for name, (calls, passes, moved) in paged_forms(data).items():
        if not names or name in names:
            times, passed = measured(calls, passes)
            yield row(f"{label(data.backend)} {name}", times, passed, group="attention", moved=moved, **facts)


def dense_twins(data: Data) -> Iterator[tuple[str, Callable[[], Callable[..., Tensor]]]]:
    """(name, what makes ``call(query, key, value) -> [B, Hq, D]``) of the dense decode kernels that can be imported."""
    yield "torch SDPA", lambda: _sdpa(data)
    for name, backend in SDPA.items():
        yield f"torch SDPA, {name}", partial(_sdpa, data, backend)
    if why_no_twin("flash_attn") is None:
        yield PACKAGES["flash_attn"], lambda: _flash_attention(data)
    for package, make in {"flashinfer": _flashinfer, "vllm": _vllm}.items():
        if why_no_twin(package) is None and data.shape.rows % BLOCK == 0:
            yield PACKAGES[package], partial(make, data)


def why_no_twin(package: str) -> str | None:
    """Why a package's kernels have no rows here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if package == "vllm":
        return vllm_kernel.why_not()
    return None if importlib.util.find_spec(package) is not None else f"{package} is not installed"


def twins_left_out() -> Iterator[dict[str, Any]]:
    """A row a package whose kernels have none."""
    for package, name in PACKAGES.items():
        reason = why_no_twin(package)
        if reason is not None:
            yield timing.row(f"dense {name}", None, group="attention", note=f"skipped: {reason}")


def _sdpa(data: Data, backend: str | None = None) -> Callable[..., Tensor]:
    """torch's attention, by the backend that it takes by itself or by a named one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = torch.nn.functional.scaled_dot_product_attention
    groups = data.shape.heads != data.shape.kv_heads

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query[:, :, None], key, value, enable_gqa=groups)[:, :, 0]

    if backend is None:
        return call
    only = getattr(SDPBackend, backend)

    def by_name(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with warnings.catch_warnings(), sdpa_kernel(only):
            warnings.simplefilter("ignore")  # why the others do not run
            return call(query, key, value)

    return by_name


def _flash_attention(data: Data) -> Callable[..., Tensor]:
    """Its decode kernel wants ``[B, S, Hkv, D]``; the copies are made before the clock runs."""
    from flash_attn import flash_attn_with_kvcache

    pairs = zip(data.key, data.value, strict=True)
    layouts = {id(key): (key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()) for key, value in pairs}
    return lambda query, key, value: flash_attn_with_kvcache(query[:, None], *layouts[id(key)])[:, 0]


def _flashinfer(data: Data) -> Callable[..., Tensor]:
    """FlashInfer's batch decode."""
    import flashinfer

    shape = data.shape
    device = data.query[0].device
    pages = shape.rows // BLOCK
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=shape.heads != shape.kv_heads)
    decode.plan(
        torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(shape.batch * pages, dtype=torch.int32, device=device),
        torch.full((shape.batch,), BLOCK, dtype=torch.int32, device=device),
        shape.heads, shape.kv_heads, shape.dim, BLOCK, q_data_type=shape.dtype, kv_data_type=shape.dtype,
    )  # fmt: skip
    layouts = _blocks_in_order(data)
    return lambda query, key, value: decode.run(query, layouts[id(key)])


def _vllm(data: Data) -> Callable[..., Tensor]:
    """vLLM's kernel, over blocks in order."""
    batch, blocks, device = data.shape.batch, data.shape.rows // BLOCK, data.query[0].device
    table = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
    call = vllm_kernel.decode(vllm_kernel.load(), data.query[0], table, torch.full_like(data.count, data.shape.rows), data.shape.rows)
    layouts = _blocks_in_order(data)
    return lambda query, key, value: call(query, *layouts[id(key)])


def _blocks_in_order(data: Data) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values ``[blocks, BLOCK, Hkv, D]``, by the identity of the contiguous keys; copies."""

    def paged(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).reshape(-1, BLOCK, data.shape.kv_heads, data.shape.dim).contiguous()

    return {id(key): (paged(key), paged(value)) for key, value in zip(data.key, data.value, strict=True)}


def compaction_rows(toy: bool, backend: str, bandwidth: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """``evict``: 29 layers, B=32, 2880 -> 720, in one call; the same with nothing to do; reordering for beams."""
    layers, batch, heads, tokens, kept_tokens, text, dim = (3, 2, 2, 24, 6, 4, 16) if toy else (29, 32, 32, 2880, 720, 128, 128)
    dtype = torch.float32 if toy else torch.bfloat16
    size = 2 * layers * batch * heads * (tokens + text) * dim * dtype.itemsize
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < size + (4 << 30):
        layers = max(int(layers * (torch.cuda.mem_get_info()[0] - (4 << 30)) / size), 1)
    g = torch.Generator(device=device).manual_seed(1)
    rows = [torch.empty(batch, heads, tokens + text, dim, dtype=dtype, device=device) for _ in range(2 * layers)]
    for tensor in rows:
        tensor.normal_(generator=g)
    kept = torch.rand(batch, tokens, generator=g, device=device).topk(kept_tokens, dim=1).indices.sort(dim=1).values.int()
    n_kept = torch.full((batch,), kept_tokens, dtype=torch.int32, device=device)
    n_visual = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    moves = int((kept >= kept_tokens).sum())
    moved = 2 * moves * heads * dim * dtype.itemsize * len(rows)
    facts = {
        "group": "rows",
        "backend": backend,
        "bandwidth": bandwidth,
        "B": batch,
        "N": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
    }

    checked = [rows[0], rows[-1]]
    want = [expected.compacted(tensor, kept) for tensor in checked]
    ops.compact_(rows, kept, n_kept, n_visual, backend=backend)
    wrong = float(sum((a != b).sum() for a, b in zip(checked, want, strict=True)))
    del want
    passed = timing.correctness(0.0, elements_wrong=wrong)
    times = timing.time_captured([lambda: ops.compact_(rows, kept, n_kept, n_visual, backend=backend)])
    yield row(f"{label(backend)} compact_, {tokens} -> {kept_tokens}", times, passed, moved=moved, **facts)
    times = timing.time_captured([lambda: ops.compact_(rows, kept, n_kept, n_kept, backend=backend)])
    yield row(f"{label(backend)} compact_ where nothing changed", times, passed, **facts)

    index = torch.arange(batch, device=device).roll(1)
    few = rows[:2]
    before = [tensor.clone() for tensor in few]
    ops.reorder_(few, index, backend=backend)
    wrong = float(sum((a != b[index]).sum() for a, b in zip(few, before, strict=True)))
    del before
    times = timing.time_captured([lambda: ops.reorder_(few, index, backend=backend)])
    moved = 2 * sum(tensor.numel() * tensor.element_size() for tensor in few)
    yield row(f"{label(backend)} reorder_ of one layer", times, timing.correctness(0.0, elements_wrong=wrong), moved=moved, **facts)


def overhead_rows(backend: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Python time of a call, at a size the device answers at once."""
    cuda = device.type == "cuda"
    shape = Shape("overhead", 1, 64, 16, 8, 8, 64, torch.bfloat16) if cuda else Shape("overhead", 1, 16, 4, 2, 2, 16, torch.float32)
    data = Data(shape, backend, device)
    rows = [data.key[0], data.value[0]]
    statistics: dict[str, Any] = {"text_type": data.text_type, "mass": True, "importance": True}
    score = torch.rand(1, shape.visual, device=device)
    calls = {
        "decode_attention": data.ours(ops.decode_attention)[0],
        "decode_attention with statistics": data.ours(ops.decode_attention, **statistics)[0],
        "decode_step": data.ours(ops.decode_step, text_type=data.text_type, **data.linear)[0],
        "select_tokens": lambda: ops.select_tokens(score, data.count, data.n_visual, backend=backend),
        "compact_": lambda: ops.compact_(rows, data.kept, data.n_kept, data.n_kept, backend=backend),
    }
    if cuda:
        calls["torch SDPA (for scale)"] = data.calls(_sdpa(data))[0]
    for name, call in calls.items():
        with torch.inference_mode():
            yield timing.row(f"host time of {name}", timing.host_time(call), group="launch overhead", backend=backend, **shape.facts())


def operators_backends(toy: bool) -> list[str]:
    """The compiled backends that run here, the first of ``auto`` first; in a rehearsal without any the reference.

    Raises:
        SystemExit: real sizes without a GPU, or without a compiled backend, where rows under our name would measure something else.
    """
    states = dk.backends()
    if not toy and not timing.environment()["measurement"]:
        raise SystemExit("nothing can be measured here: no CUDA device, or TRITON_INTERPRET is set; --toy rehearses")
    found = [name for name in ("triton", "cuda") if states[name] == "available"]
    if not toy and not found:
        raise SystemExit(f"no compiled kernels can run: {states}")
    return found or ["reference"]


def collect(toy: bool, seconds: float, save: Callable[[dict[str, Any]], None]) -> None:
    """Measures everything in order of weight and stops, with a row that says so, when the time is over."""
    device = timing.here()
    backends = operators_backends(toy)
    deadline = time.monotonic() + seconds
    bandwidth, times = timing.copy_bandwidth()
    size = bandwidth * times.median
    save(timing.row("device-to-device copy", times, group="copy", bandwidth=bandwidth, moved=size))
    for left_out in twins_left_out():
        save(left_out)
    every = shapes(toy)
    work: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = [
        (f"{shape.name} B={shape.batch} N={shape.visual}", partial(attention_rows, shape, backends, bandwidth, device)) for shape in every
    ]
    extra = {f"{shape.name} B={shape.batch} N={shape.visual}" for shape in every if shape.brief}
    work[3:3] = [
        ("fused layers", lambda: layers.rows(toy, bandwidth, device)),
        *((f"compaction, {name}", lambda name=name: compaction_rows(toy, name, bandwidth, device)) for name in backends),
        *((f"launch overhead, {name}", lambda name=name: overhead_rows(name, device)) for name in backends),
    ]
    for name, rows in work:
        if time.monotonic() > deadline:
            group = "left out" if name in extra else "not measured"  # what is there for completeness is no failure where time ran out
            save(timing.row(name, None, group=group, note=f"skipped: the {seconds:.0f} s of this part were over"))
            continue
        begin = time.monotonic()
        try:
            for found in rows():
                save(found)
        except Exception as error:
            traceback.print_exc()
            save(timing.row(name, None, group="failed", note=f"{type(error).__name__}: {error}"[:500]))
        timing.release()
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)


def main() -> None:
    """Command line. Exit status 1 where a row failed or a gate did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    if given.compile:
        compile_all(given.toy)
        return
    if given.out is None:
        parser.error("OUT.json is missing")
    raise SystemExit(run_and_save(given.out, lambda save: collect(given.toy, given.seconds, save)))


def compile_all(toy: bool) -> None:
    """Launches what :func:`attention_rows` launches, once, without a clock; a process a shape."""
    every = shapes(toy)
    with multiprocessing.get_context("spawn").Pool(min(len(every), os.cpu_count() or 1)) as pool:
        for line in pool.imap_unordered(_compile, [(shape, toy) for shape in every]):
            print(line, flush=True)


def _compile(work: tuple[Shape, bool]) -> str:
    shape, toy = work
    begin = time.monotonic()
    data = Data(shape, operators_backends(toy)[0], timing.here(), sets=1)
    with torch.no_grad():
        for name, (operator, more, _, _) in forms(data).items():
            for new_row in (False, True):
                result = data.ours(operator, new_row=new_row, **more)[0]()
                step = result if name == "decode_step" else None
        if not shape.rows % BLOCK:
            for calls, _, _ in paged_forms(data).values():
                calls[0]()
        if not shape.brief:
            data.ours(ops.score_last_query, text_type=data.text_type)[0]()
            assert step is not None
            ops.select_tokens(step.importance, data.count, data.n_visual, backend=data.backend)
            ops.predict_rate(step.mass, **data.linear, backend=data.backend)
    return f"compiled for {shape.name} B={shape.batch} N={shape.visual}: {time.monotonic() - begin:.1f} s"


def run_and_save(out: Path, run: Callable[[Callable[[dict[str, Any]], None]], None]) -> int:
    """Writes the rows after each one, prints them, and returns the exit status."""
    check_file("OUT", out)
    rows: list[dict[str, Any]] = []

    def save(row: dict[str, Any]) -> None:
        rows.append(row)
        write_json(out, rows)
        what = f"{row['median_us']} us" if row["median_us"] is not None else row.get("note", "")
        extra = f", {row['times_floor']} x floor, {row['share_of_copy']} of copy" if row["times_floor"] else ""
        state = "" if row["correct"] is None else ", correct" if row["correct"]["passed"] else f", WRONG {row['correct']}"
        print(f"[{row['group']}] {row['name']} B={row['B']} N={row['N']} {row.get('heads', '')}: {what}{extra}{state}", flush=True)

    if not timing.environment()["measurement"]:
        print(timing.REHEARSAL)
    with torch.no_grad():
        run(save)
    bad = [row for row in rows if row["group"] in ("failed", "not measured") or (row["correct"] and not row["correct"]["passed"])]
    for row in bad:
        print(f"not good: {row['name']} {row.get('note', row['correct'])}")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
