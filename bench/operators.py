"""Operators, each beside its floor and its dense twin: the first rows of the table in design.md, section 10.

    python -m bench.operators OUT.json [--toy] [--seconds 100]
    python -m bench.operators --compile      # builds every kernel that the other call launches, into Triton's cache

``--toy`` goes through everything at a tiny size, on a CPU in Triton's interpreter; its times are no measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dyrate_kernels as dk
from bench import fastv, layers
from dyrate_kernels import ops
from dyrate_kernels.measuring import timing
from dyrate_kernels.measuring.timing import Times

LIMIT = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # of ||out - ref|| / ||ref|| against float64
OURS = "dyrate"


def label(backend: str) -> str:
    """What the rows of a backend begin with: ``"dyrate"``, ``"dyrate cuda"``."""
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
    def kv_bytes(self) -> int:
        """Keys and values of all sequences."""
        return 2 * self.batch * self.rows * self.kv_heads * self.dim * self.dtype.itemsize

    @property
    def attention_bytes(self) -> int:
        """What attention must move: keys, values and query in, output out."""
        return self.kv_bytes + 2 * self.batch * self.heads * self.dim * self.dtype.itemsize

    @property
    def statistics_bytes(self) -> int:
        """What the statistics must move on top: types in, mass and importance out."""
        return self.batch * (self.text + 16 * self.heads + 4 * self.visual)

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


def shapes(toy: bool) -> list[Shape]:
    """The most telling ones first: time may run out."""
    if toy:
        return [Shape("mha", 2, 24, 8, 2, 2, 16, torch.float32), Shape("gqa", 1, 24, 8, 4, 2, 16, torch.float32)]
    kinds = {"mha": (32, 32, 128), "gqa": (28, 4, 128)}
    order = [("mha", 32, 2880), ("mha", 1, 576), ("gqa", 32, 2880), ("mha", 8, 2880), ("mha", 32, 576), ("mha", 1, 2880), ("gqa", 1, 576),
             ("gqa", 8, 2880), ("mha", 8, 576), ("gqa", 32, 576), ("gqa", 1, 2880), ("gqa", 8, 576)]  # fmt: skip
    return [Shape(kind, batch, visual, 128, *kinds[kind], torch.bfloat16) for kind, batch, visual in order]


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

        def whole(number: int) -> Tensor:
            return torch.full((shape.batch,), number, dtype=torch.int32, device=device)

        self.n_visual, self.n_text, self.count = whole(shape.visual), whole(shape.text), whole(shape.kept)
        self.text_type = torch.randint(0, 3, (shape.batch, shape.text), generator=g, device=device)
        self.text_type = torch.where(self.text_type == 1, 3, self.text_type).to(torch.uint8)
        self.linear = {  # a predictor whose bias asks for 12.5 %: a rate of 0.875
            "weight": 1e-3 * torch.randn(5, 4 * shape.heads, generator=g, device=device),
            "bias": torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0], device=device),
            "rates": torch.tensor([0.0, 0.25, 0.5, 0.75, 0.875], dtype=torch.float64, device=device),
        }
        picked = torch.rand(shape.batch, shape.visual, generator=g, device=device).topk(shape.kept, dim=1).indices
        self.kept, self.n_kept = picked.sort(dim=1).values.int(), self.count.clone()

    def calls(self, call: Callable[..., Any], **more: Any) -> list[Callable[[], Any]]:
        """One call a set: ``call(query, key, value, **more)``."""
        return [lambda s=s: call(self.query[s], self.key[s], self.value[s], **more) for s in range(self.sets)]

    def ours(self, operator: Callable[..., Any], **more: Any) -> list[Callable[[], Any]]:
        return self.calls(operator, **self.shared(), **more)

    def shared(self) -> dict[str, Any]:
        """What every attention call takes beside the rows."""
        return {"visual_capacity": self.shape.visual, "backend": self.backend, "n_visual": self.n_visual, "n_text": self.n_text}

    def reference(self, **more: Any) -> tuple[list[int], ops.DecodeAttention]:
        """(sequences, float64 reference) of set 0 for the first and the last sequence."""
        picked = sorted({0, self.shape.batch - 1})
        fields = {name: value[picked] if isinstance(value, Tensor) else value for name, value in more.items()}
        want = ops.decode_attention(
            *(tensor[0][picked].double() for tensor in (self.query, self.key, self.value)),
            self.n_visual[picked], self.n_text[picked], visual_capacity=self.shape.visual, text_type=self.text_type[picked],
            mass=True, importance=True, backend="reference", **fields,
        )  # fmt: skip
        return picked, want


def gate(shape: Shape, picked: list[int], want: ops.DecodeAttention, got: Any) -> dict[str, Any]:
    """Against the float64 reference. Statistics are held to a tighter limit by scaling their error."""
    if isinstance(got, Tensor):
        return timing.correctness(LIMIT[shape.dtype], output=timing.relative(got[picked], want.output))
    errors = {"output": timing.relative(got.output[picked], want.output)}
    for name in ("mass", "importance"):
        if getattr(got, name) is not None:
            errors[name] = timing.relative(getattr(got, name)[picked], getattr(want, name))
    return timing.correctness(LIMIT[shape.dtype], **errors)


def kept_gate(shape: Shape, attention: dict[str, Any], step: ops.DecodeStep) -> dict[str, Any]:
    """The kept list is what a stable sort of the step's own importance gives."""
    order = step.importance.double().argsort(dim=1, descending=True, stable=True)[:, : shape.kept].sort(dim=1).values
    rest = step.kept[:, shape.kept :]
    wrong = float((step.kept[:, : shape.kept] != order).sum() + (rest != -1).sum() + (step.n_kept != shape.kept).sum())
    return {**attention, "passed": attention["passed"] and wrong == 0, "errors": attention["errors"] | {"kept_wrong": wrong}}


def attention_rows(shape: Shape, backends: list[str], bandwidth: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Everything about one shape: attention and the decision of each backend, the dense twins, FastV."""
    data = Data(shape, backends[0], device)
    picked, want = data.reference()
    facts = {"bandwidth": bandwidth, "sets": data.sets, **shape.facts()}
    base = shape.attention_bytes
    for backend in backends:
        data.backend = backend
        yield from our_attention_rows(data, picked, want, {"backend": backend, **facts})

    # dense twins
    for name, make in dense_twins(data):
        try:
            calls = data.calls(make())
            passed, times = gate(shape, picked, want, calls[0]()), timing.time_captured(calls)
            yield timing.row(f"dense {name}", times, group="attention", moved=base, gate=passed, **facts)
        except Exception as error:  # another package's kernel that does not run here is no failure of this one
            yield timing.row(f"dense {name}", None, group="attention", note=f"{type(error).__name__}: {error}"[:300], **facts)
    scale = shape.dim**-0.5
    eager = data.calls(fastv.step, n_visual=shape.visual, n_keep=shape.kept, scale=scale)
    passed = gate(shape, picked, want, eager[0]().output)
    name = "FastV eager step (attention matrix, mean, topk, gather)"
    yield timing.row(name, timing.time_launched(eager), group="attention", gate=passed, moved=base, **facts)
    times = timing.time_captured(eager)
    yield timing.row("FastV eager step, in a CUDA graph", times, group="attention", gate=passed, moved=base, **facts)


def our_attention_rows(data: Data, picked: list[int], want: Any, facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Attention plain, with statistics, through a kept list, and the decision, on ``data.backend``."""
    shape, ours = data.shape, label(data.backend)
    base, extra = shape.attention_bytes, shape.statistics_bytes

    def timed(name: str, calls: list[Callable[[], Any]], passed: dict[str, Any], moved: int) -> tuple[Times, dict[str, Any]]:
        times = timing.time_captured(calls)
        return times, timing.row(f"{ours} {name}", times, group="attention", moved=moved, gate=passed, **facts)

    statistics = {"text_type": data.text_type, "mass": True, "importance": True}
    plain, with_statistics = data.ours(ops.decode_attention), data.ours(ops.decode_attention, **statistics)
    yield timed("decode_attention", plain, gate(shape, picked, want, plain[0]()), base)[1]
    passed = gate(shape, picked, want, with_statistics[0]())
    seen, found = timed("decode_attention with statistics", with_statistics, passed, base + extra)
    yield found
    steps = data.ours(ops.decode_step, text_type=data.text_type, **data.linear)
    first = steps[0]()
    passed = kept_gate(shape, gate(shape, picked, want, first), first)
    whole, found = timed("decode_step", steps, passed, base + extra + 4 * shape.batch * shape.visual)
    yield found
    alone = Times(*(max(a - b, 0.0) for a, b in zip(whole, (seen.median,) * 3, strict=True)))
    yield timing.row(
        f"{ours} decision (decode_step minus attention with statistics)", alone, group="attention", gate=passed,
        note="difference of medians", **facts,
    )  # fmt: skip

    # its parts alone
    score, statistics = first.importance, {"text_type": data.text_type}
    scores = data.ours(ops.score_last_query, **statistics)
    got = zip(("mass", "importance"), scores[0](), (want.mass, want.importance), strict=True)
    errors = {name: timing.relative(ours[picked], theirs) for name, ours, theirs in got}
    yield timed("score_last_query", scores, timing.correctness(LIMIT[shape.dtype], **errors), base // 2 + extra)[1]
    selection = [lambda: ops.select_tokens(score, data.count, data.n_visual, backend=data.backend)]
    chosen, _ = selection[0]()
    agree = timing.correctness(0.0, kept_wrong=float((chosen != first.kept).sum()))
    yield timed("select_tokens", selection, agree, 8 * shape.batch * shape.visual)[1]
    prediction = [lambda: ops.predict_rate(first.mass, **data.linear, backend=data.backend)]
    agree = timing.correctness(0.0, rates_wrong=float((prediction[0]()[0] != first.rate).sum()))
    yield timed("predict_rate", prediction, agree, 16 * shape.batch * shape.heads)[1]

    # the pruned layers: 12.5 % of the rows through the kept list
    some = {"kept": data.kept, "n_kept": data.n_kept}
    _, want_some = data.reference(**some)
    listed = data.ours(ops.decode_attention, **some)
    few = dataclasses.replace(shape, visual=shape.kept)
    yield timed("decode_attention, 12.5 % kept", listed, gate(shape, picked, want_some, listed[0]()), few.attention_bytes)[1]


def dense_twins(data: Data) -> Iterator[tuple[str, Callable[[], Callable[..., Tensor]]]]:
    """(name, what makes ``call(query, key, value) -> [B, Hq, D]``) of the dense decode kernels that can be imported."""
    yield "torch SDPA", lambda: _sdpa(data)
    if torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None:
        yield "FlashAttention with_kvcache", lambda: _flash_attention(data)
    if torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None and data.shape.rows % 16 == 0:
        yield "FlashInfer paged decode", lambda: _flashinfer(data)


def _sdpa(data: Data) -> Callable[..., Tensor]:
    attention = torch.nn.functional.scaled_dot_product_attention
    groups = data.shape.heads != data.shape.kv_heads
    return lambda query, key, value: attention(query[:, :, None], key, value, enable_gqa=groups)[:, :, 0]


def _flash_attention(data: Data) -> Callable[..., Tensor]:
    """Its decode kernel wants ``[B, S, Hkv, D]``; the copies are made before the clock runs."""
    from flash_attn import flash_attn_with_kvcache

    pairs = zip(data.key, data.value, strict=True)
    layouts = {id(key): (key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()) for key, value in pairs}
    return lambda query, key, value: flash_attn_with_kvcache(query[:, None], *layouts[id(key)])[:, 0]


def _flashinfer(data: Data) -> Callable[..., Tensor]:
    """FlashInfer's batch decode over pages of 16 rows."""
    import flashinfer

    shape = data.shape
    device = data.query[0].device
    pages = shape.rows // 16
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=shape.heads != shape.kv_heads)
    decode.plan(
        torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(shape.batch * pages, dtype=torch.int32, device=device),
        torch.full((shape.batch,), 16, dtype=torch.int32, device=device),
        shape.heads, shape.kv_heads, shape.dim, 16, q_data_type=shape.dtype, kv_data_type=shape.dtype,
    )  # fmt: skip

    def paged(rows: Tensor) -> Tensor:
        return rows.transpose(1, 2).reshape(shape.batch * pages, 16, shape.kv_heads, shape.dim).contiguous()

    layouts = {id(key): (paged(key), paged(value)) for key, value in zip(data.key, data.value, strict=True)}
    return lambda query, key, value: decode.run(query, layouts[id(key)])


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
    before = [tensor.clone() for tensor in checked]
    ops.compact_(rows, kept, n_kept, n_visual, backend=backend)
    ops.compact_(before, kept, n_kept, n_visual, backend="reference")
    wrong = float(sum((a != b).sum() for a, b in zip(checked, before, strict=True)))
    del before
    passed = timing.correctness(0.0, elements_wrong=wrong)
    times = timing.time_captured([lambda: ops.compact_(rows, kept, n_kept, n_visual, backend=backend)])
    yield timing.row(f"{label(backend)} compact_, {tokens} -> {kept_tokens}", times, moved=moved, gate=passed, **facts)
    times = timing.time_captured([lambda: ops.compact_(rows, kept, n_kept, n_kept, backend=backend)])
    yield timing.row(f"{label(backend)} compact_ where nothing changed", times, gate=passed, **facts)

    index = torch.arange(batch, device=device).roll(1)
    few = rows[:2]
    before = [tensor.clone() for tensor in few]
    ops.reorder_(few, index, backend=backend)
    wrong = float(sum((a != b[index]).sum() for a, b in zip(few, before, strict=True)))
    del before
    times = timing.time_captured([lambda: ops.reorder_(few, index, backend=backend)])
    moved = 2 * sum(tensor.numel() * tensor.element_size() for tensor in few)
    yield timing.row(
        f"{label(backend)} reorder_ of one layer", times, moved=moved, gate=timing.correctness(0.0, elements_wrong=wrong), **facts
    )


def overhead_rows(backend: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Python time of a call, at a size the device answers at once."""
    cuda = device.type == "cuda"
    shape = Shape("overhead", 1, 64, 16, 8, 8, 64, torch.bfloat16) if cuda else Shape("overhead", 1, 16, 4, 2, 2, 16, torch.float32)
    data = Data(shape, backend, device)
    rows = [data.key[0], data.value[0]]
    statistics = {"text_type": data.text_type, "mass": True, "importance": True}
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
    every = shapes(toy)
    work: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = [
        (f"{shape.name} B={shape.batch} N={shape.visual}", lambda shape=shape: attention_rows(shape, backends, bandwidth, device))
        for shape in every
    ]
    work[3:3] = [
        ("fused layers", lambda: layers.rows(toy, bandwidth, device)),
        *((f"compaction, {name}", lambda name=name: compaction_rows(toy, name, bandwidth, device)) for name in backends),
        *((f"launch overhead, {name}", lambda name=name: overhead_rows(name, device)) for name in backends),
    ]
    for name, rows in work:
        if time.monotonic() > deadline:
            save(timing.row(name, None, group="not measured", note=f"skipped: the {seconds:.0f} s of this part were over"))
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
    types = {"text_type": data.text_type}
    with torch.no_grad():
        data.ours(ops.decode_attention)[0]()
        data.ours(ops.decode_attention, **types, mass=True, importance=True)[0]()
        data.ours(ops.decode_attention, kept=data.kept, n_kept=data.n_kept)[0]()
        data.ours(ops.score_last_query, **types)[0]()
        step = data.ours(ops.decode_step, **types, **data.linear)[0]()
        ops.select_tokens(step.importance, data.count, data.n_visual, backend=data.backend)
        ops.predict_rate(step.mass, **data.linear, backend=data.backend)
    return f"compiled for {shape.name} B={shape.batch} N={shape.visual}: {time.monotonic() - begin:.1f} s"


def run_and_save(out: Path, run: Callable[[Callable[[dict[str, Any]], None]], None]) -> int:
    """Writes the rows after each one, prints them, and returns the exit status."""
    rows: list[dict[str, Any]] = []

    def save(row: dict[str, Any]) -> None:
        rows.append(row)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
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
