"""pytest-benchmark: what one decode step runs, ours beside torch's dense attention and FastV's eager path, on the same tensors.

    pytest bench                       # a table at the end: time, ratio to FastV, GB/s, share of the copy bandwidth
    pytest bench --benchmark-autosave  # and pytest-benchmark's own files, for pytest-benchmark compare

On a GPU: batches of 1 to 64, 576 to 16384 visual tokens, with and without grouped queries, in bfloat16 with the Triton kernels. The
table's times are those of CUDA graph replays with a cold L2 (``dyrate_kernels.measuring.timing``), FastV's those of its eager launches,
pytest-benchmark's own those of a call that is waited for. Without a GPU: toy sizes with the reference operators (plain PyTorch), which
shows how to run it and no speed worth quoting. A benchmark whose result is not that of ``tests.ops.spec``, on the first set of inputs
before the clock runs and on the last after it, fails and has no line in the table. Run it in one process: pytest-xdist's workers print
no table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import dyrate_kernels as dk
from bench import expected, fastv, operators
from dyrate_kernels import ops
from dyrate_kernels.measuring import timing

ON_GPU = torch.cuda.is_available()
BACKEND = "triton" if ON_GPU and dk.backends()["triton"] == "available" else "reference"
KINDS = {name: operators.HEADS[name] for name in ("mha", "gqa")} if ON_GPU else {"mha": (4, 4, 32), "gqa": (6, 2, 32)}
SIZES = [(batch, visual) for visual in (576, 2880, 16384) for batch in (1, 8, 32, 64)] if ON_GPU else [(2, 144)]
SHAPES = [
    operators.Shape(
        f"{kind} B={batch} N={visual}", batch, visual, 128 if ON_GPU else 16, *sizes, torch.bfloat16 if ON_GPU else torch.float32
    )
    for kind, sizes in KINDS.items()
    for batch, visual in SIZES
]
if ON_GPU:  # other numbers of query heads a key/value head
    SHAPES += [
        operators.Shape(f"{kind} B=8 N=2880", 8, 2880, 128, *sizes, torch.bfloat16)
        for kind, sizes in operators.HEADS.items()
        if kind not in KINDS
    ]
FASTV = "FastV, score layer: eager attention, mean, topk, gather"
STATISTICS = "dyrate decode_attention with statistics"
STEP = "dyrate decode_step: attention, rate, top-k, kept list"
FASTV_PRUNED = "FastV pruned layer, shorter cache"
TOPK = "torch topk and sort"


@pytest.fixture(params=SHAPES, ids=operators.Shape.word, scope="module")
def data(request):
    """Random inputs."""
    shape = request.param
    if ON_GPU:
        needed = 4 * shape.kv_bytes + 16 * shape.batch * shape.heads * shape.rows  # the eager path copies what stays, and repeats keys
        if needed > torch.cuda.mem_get_info()[0]:
            pytest.skip(f"needs about {needed >> 30} GiB of GPU memory")
    yield operators.Data(shape, BACKEND, timing.here())
    timing.release()


@dataclasses.dataclass
class Case:
    """One row.

    Attributes:
        calls: one a set of inputs.
        gate: what the result of a set must pass.
        moved: bytes at least.
        eager: launched by Python, not from a graph.
        peer: the row of the same work that the ratio is to.
    """

    calls: list[Callable[[], Any]]
    gate: operators.Gate
    moved: int | None = None
    eager: bool = False
    peer: str | None = FASTV


def _attention(data: operators.Data, calls: list[Callable[[], Any]], moved: int, eager: bool = False) -> Case:
    return Case(calls, operators.attention_gate(data), moved, eager)


def _pruned(data: operators.Data, calls: list[Callable[[], Any]], eager: bool = False) -> Case:
    few = dataclasses.replace(data.shape, visual=data.shape.kept)
    return Case(calls, operators.attention_gate(data, data.kept), few.attention_bytes, eager, FASTV_PRUNED)


def decode_attention(data):
    return _attention(data, data.ours(ops.decode_attention), data.shape.attention_bytes)


def with_statistics(data):
    calls = data.ours(ops.decode_attention, text_type=data.text_type, mass=True, importance=True)
    return _attention(data, calls, data.shape.attention_bytes + data.shape.statistics_bytes)


def decode_step(data):
    shape, right = data.shape, operators.attention_gate(data)
    moved = shape.attention_bytes + shape.statistics_bytes + 4 * shape.batch * shape.visual
    calls = data.ours(ops.decode_step, text_type=data.text_type, **data.linear)
    return Case(calls, lambda got, number: operators.step_gate(shape, right(got, number), got, data.linear), moved)


def kept_list(data):
    return _pruned(data, data.ours(ops.decode_attention, kept=data.kept, n_kept=data.n_kept))


def last_query(data):
    """Returns the query that a prefill is scored with."""

    def gate(got, number):
        picked, want = data.reference(number=number)
        errors = {name: timing.relative(a[picked], getattr(want, name)) for name, a in zip(("mass", "importance"), got, strict=True)}
        return timing.correctness(operators.LIMIT[data.shape.dtype], **errors)

    moved = data.shape.attention_bytes // 2 + data.shape.statistics_bytes
    return Case(data.ours(ops.score_last_query, text_type=data.text_type), gate, moved, peer=None)


def prediction(data):
    """The decision's first half: mass -> rate."""
    shape = data.shape
    generator = torch.Generator(device=data.query[0].device).manual_seed(6)
    mass = torch.rand(shape.batch, shape.heads, 4, generator=generator, device=data.query[0].device)
    linear = data.linear | {"bias": data.linear["bias"] / 9 * 1e-3}  # every rate has its chance
    want = expected.rate(mass, **linear)
    gate = lambda got, _: timing.correctness(0.0, rates_wrong=float((got[0] != want).sum()))  # noqa: E731
    return Case([lambda: ops.predict_rate(mass, **linear, backend=BACKEND)], gate, 16 * shape.batch * shape.heads, peer=None)


def _scores(data):
    generator = torch.Generator(device=data.query[0].device).manual_seed(5)
    return torch.rand(data.shape.batch, data.shape.visual, generator=generator, device=data.query[0].device)


def selection(data):
    """Its second half: how many -> which."""
    score = _scores(data)

    def gate(got, number):
        return timing.correctness(0.0, kept_wrong=operators.selection_wrong(score, data.shape.kept, *got))

    return Case([lambda: ops.select_tokens(score, data.count, data.n_visual, backend=BACKEND)], gate, 8 * score.numel(), peer=TOPK)


def torch_topk(data):
    score = _scores(data)
    want = expected.highest(score, data.shape.kept)
    call = lambda: score.topk(data.shape.kept, dim=1).indices.sort(dim=1).values  # noqa: E731
    return Case([call], lambda got, _: timing.correctness(0.0, kept_wrong=float((got != want).sum())), 8 * score.numel(), peer=TOPK)


def compaction(data):
    """One layer. Timed again and again, the kept rows move within the same buffer: as many bytes each time, and the same result."""
    rows = [data.key[0].clone(), data.value[0].clone()]
    want = [expected.compacted(tensor, data.kept) for tensor in rows]
    moves = int((data.kept >= data.shape.kept).sum())
    moved = 4 * moves * data.shape.kv_heads * data.shape.dim * data.shape.dtype.itemsize

    def call():
        ops.compact_(rows, data.kept, data.n_kept, data.n_visual, backend=BACKEND)
        return rows

    def gate(got, number):
        return timing.correctness(0.0, wrong=float(sum((a != b).sum() for a, b in zip(got, want, strict=True))))

    return Case([call], gate, moved, peer=None)


def _with_new_row(name):
    """As a model calls it: the newest row comes with the call, and is not in the cache before. :func:`made` puts it back there."""

    def make(data):
        operator, more, gate, moved = operators.forms(data)[name]
        data.forget_last_rows()
        calls = data.ours(operator, new_row=True, **more)

        def stored(got, number):
            """And the new row is in the cache from then on."""
            found = gate(got, number)
            errors = {
                f"new_{what}_wrong": float((rows[number][:, :, -1] != data.new[number][f"new_{what}"]).sum())
                for what, rows in (("key", data.key), ("value", data.value))
            }
            return {**found, "passed": found["passed"] and not any(errors.values()), "errors": found["errors"] | errors}

        return Case(calls, stored, moved + data.shape.new_row_bytes, peer=None)

    return make


def _paged(name):
    def make(data):
        if data.shape.rows % operators.BLOCK:
            pytest.skip(f"rows are no multiple of {operators.BLOCK}")
        return Case(*operators.paged_forms(data)[name], peer=None)

    return make


def sdpa(data):
    return _attention(data, data.calls(dict(operators.dense_twins(data))["torch SDPA"]()), data.shape.attention_bytes)


def _sdpa_by(name):
    def make(data):
        case = _attention(data, data.calls(dict(operators.dense_twins(data))[f"torch SDPA, {name}"]()), data.shape.attention_bytes)
        try:
            case.calls[0]()
        except RuntimeError as error:
            pytest.skip(f"torch has no {name} attention here: {str(error).splitlines()[0]}")
        return case

    return make


def _twin(package):
    def make(data):
        reason = operators.why_no_twin(package)
        if reason is not None:
            pytest.skip(reason)
        twins, name = dict(operators.dense_twins(data)), operators.PACKAGES[package]
        if name not in twins:
            pytest.skip("not for this shape")
        return _attention(data, data.calls(twins[name]()), data.shape.attention_bytes)

    return make


def fastv_score_layer(data):
    shape, right = data.shape, operators.attention_gate(data)
    calls = data.calls(fastv.step, n_visual=shape.visual, n_keep=shape.kept, scale=shape.dim**-0.5)

    def gate(got, number):
        return operators.fastv_gate(shape, right(got.output, number), got, data.key[number], data.value[number])

    return Case(calls, gate, shape.attention_bytes, eager=True)


def fastv_masked(data):
    dropped = fastv.dropped_mask(data.kept, data.shape.visual, data.shape.rows)
    return _pruned(data, data.calls(fastv.masked_layer, dropped=dropped, scale=data.shape.dim**-0.5), eager=True)


def fastv_dropped(data):
    index = fastv.rows_that_stay(data.kept, data.shape.visual, data.shape.rows)
    return _pruned(data, data.calls(fastv.gathering_layer, index=index, scale=data.shape.dim**-0.5), eager=True)


def fastv_cached(data):
    index = fastv.rows_that_stay(data.kept, data.shape.visual, data.shape.rows)
    held = [(q, fastv.gather_rows(k, index), fastv.gather_rows(v, index)) for q, k, v in zip(data.query, data.key, data.value)]

    def attention(query, key, value):
        return fastv.eager_attention(query, key, value, data.shape.dim**-0.5)[0]

    return _pruned(data, [partial(attention, *rows) for rows in held], eager=True)


def kvpress_score(data):
    """TOVA, kvpress's press that ranks by the newest row's attention, mean over heads, as FastV does. It is given the attention matrix."""
    presses = pytest.importorskip("kvpress.presses.tova_press", exc_type=ImportError)
    press, scale = presses.TOVAPress(), data.shape.dim**-0.5

    def call(query, key, value):
        attention = fastv.eager_attention(query, key, value, scale)[1]
        return press.score(None, None, key, value, attention, {})[:, 0, : data.shape.visual]

    def gate(got, number):
        picked, want = data.reference(number=number)
        return timing.correctness(operators.LIMIT[data.shape.dtype], score=timing.relative(got[picked], want.importance))

    return Case(data.calls(call), gate, data.shape.attention_bytes, True, STATISTICS)


CASES: dict[str, Callable[[operators.Data], Case]] = {
    "dyrate decode_attention": decode_attention,
    STATISTICS: with_statistics,
    STEP: decode_step,
    **{f"dyrate {name}, {operators.NEW_ROW}": _with_new_row(name) for name in operators.FORMS},
    **{f"dyrate {name}": _paged(name) for name in operators.PAGED},
    "torch SDPA": sdpa,
    **{f"torch SDPA, {name}": _sdpa_by(name) for name in operators.SDPA},
    **{name: _twin(package) for package, name in operators.PACKAGES.items()},
    FASTV: fastv_score_layer,
    "kvpress TOVAPress.score, with its attention matrix": kvpress_score,
    "dyrate pruned layer: 12.5 % through the kept list": kept_list,
    "FastV pruned layer, masked": fastv_masked,
    "FastV pruned layer, rows gathered": fastv_dropped,
    FASTV_PRUNED: fastv_cached,
    "dyrate score_last_query (prefill)": last_query,
    "dyrate predict_rate (the decision's first half)": prediction,
    "dyrate select_tokens (its second half)": selection,
    TOPK: torch_topk,
    "dyrate compact_, one layer": compaction,
}


def made(data: operators.Data, name: str) -> Case:
    """The case, on rows that are as they were made, whatever ran on them before."""
    data.put_last_rows_back()
    return CASES[name](data)


@pytest.mark.parametrize("name", CASES)
def test_decode(benchmark, data, table, name):
    case = made(data, name)
    calls = case.calls

    def whole():
        result = calls[0]()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    with torch.no_grad():
        first = case.gate(whole(), 0)
        assert first["passed"], first
        benchmark.group = data.shape.name
        benchmark.extra_info.update(timing.environment() | data.shape.facts() | {"backend": BACKEND, "floor_bytes": case.moved})
        benchmark.pedantic(whole, rounds=20 if ON_GPU else 8, warmup_rounds=2)
        times: timing.Times | None
        if ON_GPU:
            times = (timing.time_launched if case.eager else timing.time_captured)(calls, budget=0.05)
        else:
            times = timing.summary(benchmark.stats.stats.data) if benchmark.stats else None
        after = case.gate(calls[-1](), len(calls) - 1)
        assert after["passed"], f"right before it was timed, wrong after: {after}"
    if times is not None:  # None: --benchmark-disable
        table.add(data.shape.name, name, times, case.moved, case.peer)
        benchmark.extra_info.update(median_us=1e6 * times.median, p20_us=1e6 * times.p20, p80_us=1e6 * times.p80)
