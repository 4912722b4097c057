"""pytest-benchmark: what one decode step runs, ours beside torch's dense attention and FastV's eager path, on the same tensors.

    pytest bench                       # a table at the end: time, ratio to FastV, GB/s, share of the copy bandwidth
    pytest bench --benchmark-autosave  # and pytest-benchmark's own files, for pytest-benchmark compare

On a GPU: batches of 1 to 64, 576 to 16384 visual tokens, with and without grouped queries, in bfloat16 with the Triton kernels. The
table's times are those of CUDA graph replays with a cold L2 (``dyrate_kernels.measuring.timing``), FastV's those of its eager launches,
pytest-benchmark's own those of a call that is waited for. Without a GPU: toy sizes with the reference operators (plain PyTorch), which
shows how to run it and no speed worth quoting. A benchmark whose result is not that of the float64 reference fails before it is timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dyrate_kernels as dk
from bench import fastv, operators
from dyrate_kernels import ops
from dyrate_kernels.measuring import timing

ON_GPU = torch.cuda.is_available()
BACKEND = "triton" if ON_GPU and dk.backends()["triton"] == "available" else "reference"
KINDS = {"mha": (32, 32, 128), "gqa": (28, 4, 128)} if ON_GPU else {"mha": (4, 4, 32), "gqa": (6, 2, 32)}
SIZES = [(batch, visual) for visual in (576, 2880, 16384) for batch in (1, 8, 32, 64)] if ON_GPU else [(2, 144)]
SHAPES = [
    operators.Shape(
        f"{kind} B={batch} N={visual}", batch, visual, 128 if ON_GPU else 16, *sizes, torch.bfloat16 if ON_GPU else torch.float32
    )
    for kind, sizes in KINDS.items()
    for batch, visual in SIZES
]
FASTV = "FastV, score layer: eager attention, mean, topk, gather"
STATISTICS = "dyrate decode_attention with statistics"
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
        gate: what the result must pass.
        moved: bytes at least.
        eager: launched by Python, not from a graph.
        peer: the row of the same work that the ratio is to.
    """

    calls: list[Callable[[], Any]]
    gate: Callable[[Any], dict[str, Any]]
    moved: int | None = None
    eager: bool = False
    peer: str | None = FASTV


def _attention(data: operators.Data, calls: list[Callable[[], Any]], moved: int, field: str | None = None, eager: bool = False) -> Case:
    picked, want = data.reference()
    return Case(calls, lambda got: operators.gate(data.shape, picked, want, getattr(got, field) if field else got), moved, eager)


def _pruned(data: operators.Data, calls: list[Callable[[], Any]], eager: bool = False) -> Case:
    picked, want = data.reference(kept=data.kept, n_kept=data.n_kept)
    few = dataclasses.replace(data.shape, visual=data.shape.kept)
    return Case(calls, lambda got: operators.gate(data.shape, picked, want, got), few.attention_bytes, eager, FASTV_PRUNED)


def decode_attention(data):
    return _attention(data, data.ours(ops.decode_attention), data.shape.attention_bytes)


def with_statistics(data):
    calls = data.ours(ops.decode_attention, text_type=data.text_type, mass=True, importance=True)
    return _attention(data, calls, data.shape.attention_bytes + data.shape.statistics_bytes)


def decode_step(data):
    shape = data.shape
    case = _attention(data, data.ours(ops.decode_step, text_type=data.text_type, **data.linear), 0)
    gate = case.gate
    moved = shape.attention_bytes + shape.statistics_bytes + 4 * shape.batch * shape.visual
    return dataclasses.replace(case, gate=lambda got: operators.kept_gate(shape, gate(got), got), moved=moved)


def kept_list(data):
    return _pruned(data, data.ours(ops.decode_attention, kept=data.kept, n_kept=data.n_kept))


def last_query(data):
    """What a prefill is scored with."""
    picked, want = data.reference()

    def gate(got):
        errors = {name: timing.relative(a[picked], b) for name, a, b in zip(("mass", "importance"), got, (want.mass, want.importance))}
        return timing.correctness(operators.LIMIT[data.shape.dtype], **errors)

    moved = data.shape.attention_bytes // 2 + data.shape.statistics_bytes
    return Case(data.ours(ops.score_last_query, text_type=data.text_type), gate, moved, peer=None)


def _scores(data):
    generator = torch.Generator(device=data.query[0].device).manual_seed(5)
    return torch.rand(data.shape.batch, data.shape.visual, generator=generator, device=data.query[0].device)


def selection(data):
    score = _scores(data)
    want = score.argsort(dim=1, descending=True, stable=True)[:, : data.shape.kept].sort(dim=1).values

    def gate(got):
        wrong = (got[0][:, : data.shape.kept] != want).sum() + (got[1] != data.shape.kept).sum()
        return timing.correctness(0.0, kept_wrong=float(wrong))

    return Case([lambda: ops.select_tokens(score, data.count, data.n_visual, backend=BACKEND)], gate, 8 * score.numel(), peer=TOPK)


def torch_topk(data):
    score = _scores(data)
    want = score.argsort(dim=1, descending=True, stable=True)[:, : data.shape.kept].sort(dim=1).values
    call = lambda: score.topk(data.shape.kept, dim=1).indices.sort(dim=1).values  # noqa: E731
    return Case([call], lambda got: timing.correctness(0.0, kept_wrong=float((got != want).sum())), 8 * score.numel(), peer=TOPK)


def compaction(data):
    """One layer. Timed again and again, the kept rows move within the same buffer: as many bytes each time."""
    rows = [data.key[0].clone(), data.value[0].clone()]
    want = [tensor.clone() for tensor in rows]
    ops.compact_(want, data.kept, data.n_kept, data.n_visual, backend="reference")
    moves = int((data.kept >= data.shape.kept).sum())
    moved = 4 * moves * data.shape.kv_heads * data.shape.dim * data.shape.dtype.itemsize

    def call():
        ops.compact_(rows, data.kept, data.n_kept, data.n_visual, backend=BACKEND)
        return rows

    return Case([call], lambda got: timing.correctness(0.0, wrong=float(sum((a != b).sum() for a, b in zip(got, want)))), moved, peer=None)


def sdpa(data):
    return _attention(data, data.calls(dict(operators.dense_twins(data))["torch SDPA"]()), data.shape.attention_bytes)


def sdpa_math(data):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention = dict(operators.dense_twins(data))["torch SDPA"]()

    def call(*rows):
        with sdpa_kernel(SDPBackend.MATH):
            return attention(*rows)

    return _attention(data, data.calls(call), data.shape.attention_bytes, eager=True)


def _twin(name):
    def make(data):
        twins = dict(operators.dense_twins(data))
        if name not in twins:
            pytest.skip("not installed, or not for this shape")
        return _attention(data, data.calls(twins[name]()), data.shape.attention_bytes)

    return make


def fastv_score_layer(data):
    shape = data.shape
    calls = data.calls(fastv.step, n_visual=shape.visual, n_keep=shape.kept, scale=shape.dim**-0.5)
    return _attention(data, calls, shape.attention_bytes, "output", eager=True)


def fastv_masked(data):
    dropped = fastv.dropped_mask(data.kept, data.shape.visual, data.shape.rows)
    return _pruned(data, data.calls(fastv.masked_layer, dropped=dropped, scale=data.shape.dim**-0.5), eager=True)


def fastv_dropped(data):
    index = fastv.rows_that_stay(data.kept, data.shape.visual, data.shape.rows)
    return _pruned(data, data.calls(fastv.gathering_layer, index=index, scale=data.shape.dim**-0.5), eager=True)


def fastv_cached(data):
    index = fastv.rows_that_stay(data.kept, data.shape.visual, data.shape.rows)
    held = [(q, fastv.gather_rows(k, index), fastv.gather_rows(v, index)) for q, k, v in zip(data.query, data.key, data.value)]
    scale = data.shape.dim**-0.5
    return _pruned(data, [lambda rows=rows: fastv.eager_attention(*rows, scale)[0] for rows in held], eager=True)


def kvpress_score(data):
    """TOVA, kvpress's press that ranks by the newest row's attention, mean over heads, as FastV does. It is given the attention matrix."""
    presses = pytest.importorskip("kvpress.presses.tova_press", exc_type=ImportError)
    press, (picked, want) = presses.TOVAPress(), data.reference()
    scale = data.shape.dim**-0.5

    def call(query, key, value):
        attention = fastv.eager_attention(query, key, value, scale)[1]
        return press.score(None, None, key, value, attention, {})[:, 0, : data.shape.visual]

    limit = operators.LIMIT[data.shape.dtype]
    moved = data.shape.attention_bytes
    return Case(
        data.calls(call),
        lambda got: timing.correctness(limit, score=timing.relative(got[picked], want.importance)),
        moved,
        True,
        STATISTICS,
    )


CASES: dict[str, Callable[[operators.Data], Case]] = {
    "dyrate decode_attention": decode_attention,
    STATISTICS: with_statistics,
    "dyrate decode_step: attention, rate, top-k, kept list": decode_step,
    "torch SDPA": sdpa,
    "torch SDPA, math": sdpa_math,
    "FlashAttention with_kvcache": _twin("FlashAttention with_kvcache"),
    "FlashInfer paged decode": _twin("FlashInfer paged decode"),
    FASTV: fastv_score_layer,
    "kvpress TOVAPress.score, with its attention matrix": kvpress_score,
    "dyrate pruned layer: 12.5 % through the kept list": kept_list,
    "FastV pruned layer, masked": fastv_masked,
    "FastV pruned layer, rows gathered": fastv_dropped,
    FASTV_PRUNED: fastv_cached,
    "dyrate score_last_query (prefill)": last_query,
    "dyrate select_tokens": selection,
    TOPK: torch_topk,
    "dyrate compact_, one layer": compaction,
}


@pytest.mark.parametrize("name", CASES)
def test_decode(benchmark, data, table, name):
    case = CASES[name](data)
    calls = case.calls

    def whole():
        result = calls[0]()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    with torch.no_grad():
        passed = case.gate(whole())
        assert passed["passed"], passed
        benchmark.group = data.shape.name
        benchmark.extra_info.update(timing.environment() | data.shape.facts() | {"backend": BACKEND, "floor_bytes": case.moved})
        benchmark.pedantic(whole, rounds=20 if ON_GPU else 8, warmup_rounds=2)
        if ON_GPU:
            times = (timing.time_launched if case.eager else timing.time_captured)(calls, budget=0.05)
        else:
            times = timing.summary(benchmark.stats.stats.data) if benchmark.stats else None
    if times is not None:  # None: --benchmark-disable
        table.add(data.shape.name, name, times, case.moved, case.peer)
        benchmark.extra_info.update(median_us=1e6 * times.median, p20_us=1e6 * times.p20, p80_us=1e6 * times.p80)
