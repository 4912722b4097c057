"""The goals of docs/design.md, section 10, held against a record's rows: met or not, and a sentence on each with the cause that they show.

Only measured rows that are right count. Causes come from other rows of the same record: a row's floor, the same work at other sizes, the
pieces of a step alone, and the experiments (``bench.experiments``) where their rows are there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bench import plots
from bench.operators import HEADS, OURS, label
from dyrate_kernels.measuring import end_to_end

Row = dict[str, Any]
FASTV = "FastV eager step (attention matrix, mean, topk, gather)"
GRID = [(batch, visual) for visual in (576, 2880, 16384) for batch in (1, 8, 32)]
NAMES = {"mha": "MHA", "gqa": "GQA (28 over 4)"}
NO_PROFILE = "no profile in this record: bench/gpu.sh OUT --only experiments makes one"


def heads(kind: str) -> str:
    """As rows have it: ``"32/32x128"``."""
    query, kv, dim = HEADS[kind]
    return f"{query}/{kv}x{dim}"


MAIN = {"B": 32, "N": 2880, "heads": heads("mha")}


def find(rows: Iterable[Row], name: str, **facts: Any) -> Row | None:
    """The timed row of that name (or that begins with it, where it ends in ``*``)."""
    for row in rows:
        same = row["name"].startswith(name[:-1]) if name.endswith("*") else row["name"] == name
        if same and row["median_us"] is not None and all(row.get(key) == value for key, value in facts.items()):
            return row
    return None


def passed(row: Row | None) -> bool:
    """Returns whether it was timed and its result is right."""
    return row is not None and bool(row["measurement"]) and row["correct"] is not None and plots.right(row)


def speed_up(ours: Row | None, other: Row | None) -> float | None:
    """Returns how many times as fast it is; None unless both are measured and right."""
    if ours is None or other is None or not (passed(ours) and passed(other)) or not ours["median_us"]:
        return None
    return other["median_us"] / ours["median_us"]


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """Returns what was asked and measured, a backend at a time, whether it is met (None: not measured), and a sentence."""
    found = _Targets(rows, "triton")
    _operators(found)
    every = found.lines
    if any(row.get("backend") == "cuda" for row in rows):
        cuda = _Targets(rows, "cuda")
        _operators(cuda)
        every += cuda.lines
        both = _Targets(rows, "cuda")
        _cuda_against_triton(both)
        every += both.lines
    models = _Targets(rows, "auto")
    _models(models)
    _requests(models)
    _no_switch(models)
    _host_time(models)
    return every + models.lines


class _Targets:
    """Lines about one backend."""

    def __init__(self, rows: list[Row], backend: str) -> None:
        self.rows, self.backend = rows, backend
        self.ours = OURS if backend == "auto" else label(backend)
        self.lines: list[dict[str, Any]] = []

    def find(self, name: str, **facts: Any) -> Row | None:
        """One of ours that counts."""
        row = find(self.rows, f"{self.ours} {name}", **facts)
        return row if passed(row) else None

    def other(self, name: str, **facts: Any) -> Row | None:
        """One of somebody else's that counts."""
        row = find(self.rows, name, **facts)
        return row if passed(row) else None

    def add(self, what: str, wanted: str, value: float | None, why: str = "", missing: str = "no such row") -> None:
        """wanted: ``"<= 0.03"``; why: the cause, said where it is missed; missing: what a record would need."""
        sign, bound = wanted.split()
        holds = (lambda x, y: x <= y) if sign == "<=" else lambda x, y: x >= y
        met = None if value is None else holds(value, float(bound.rstrip("x")))
        if met is None:
            says = f"Not measured: {missing}."
        elif met:
            says = f"Met: {value:.4g} where {wanted} is asked."
        else:
            says = f"Missed: {value:.4g} where {wanted} is asked; {why or 'no row of this record shows why'}."
        self.lines.append({"what": what, "backend": self.backend, "target": wanted, "measured": value, "met": met, "says": says})


def _over_floor(row: Row) -> float:
    return row["median_us"] - (row.get("floor_us") or 0.0)


def _operators(found: _Targets) -> None:
    where = "B=32, N=2880 + 128 text"
    names = ("decode_attention with statistics", "decode_attention", "decode_step")
    statistics, plain, step = (found.find(name, **MAIN) for name in names)
    why = ""
    if statistics and plain and statistics.get("floor_us") is not None:
        why = (
            f"{_over_floor(statistics):.1f} us over its floor of {statistics['floor_us']:.1f}: attention alone lies "
            f"{_over_floor(plain):.1f} over its own, statistics add {statistics['median_us'] - plain['median_us']:.1f}"
        )
    share = statistics["share_of_copy"] if statistics else None
    found.add(f"decode_attention with statistics, {where}: share of copy bandwidth", ">= 0.95", share, why)
    for twin in ("dense FlashAttention*", "dense FlashInfer*", "dense torch SDPA"):
        peer = found.other(twin, **MAIN)
        name = twin.rstrip("*")
        found.add(f"the same against {name} without statistics", ">= 1.0x", speed_up(statistics, peer), why, _left_out(found.rows, name))
    for kind, most in (("mha", "<= 0.03"), ("gqa", "<= 0.06")):
        _statistics_cost(found, kind, where, most)
    _decision(found, where)
    fastv = speed_up(step, find(found.rows, FASTV, **MAIN))
    found.add(f"decode_step against FastV's eager step, {where}", ">= 10x", fastv, _against(step, found.other(FASTV, **MAIN)))
    for kind in ("gqa", "mha"):
        _against_sdpa(found, kind)
    moved = found.find("compact_, 2880 -> 720")
    share = moved["share_of_copy"] if moved else None
    found.add("compact_ of 29 layers, B=32, 2880 -> 720: share of copy bandwidth", ">= 0.80", share)


def _left_out(rows: list[Row], name: str) -> str:
    """Why a peer has no row, as the record says."""
    notes = [row["note"] for row in rows if row["name"].startswith(name) and row["median_us"] is None and row.get("note")]
    return notes[0] if notes else "no such row"


def _against(ours: Row | None, other: Row | None) -> str:
    return f"{ours['median_us']:.1f} us against {other['median_us']:.1f}" if ours and other else ""


def _statistics_cost(found: _Targets, kind: str, where: str, most: str) -> None:
    facts = {**MAIN, "heads": heads(kind)}
    on, off = found.find("decode_attention with statistics", **facts), found.find("decode_attention", **facts)
    value = on["median_us"] / off["median_us"] - 1 if on and off else None
    why = ""
    if on and off:
        floor, without = on.get("floor_us"), off.get("floor_us")
        bytes_us = f", of which what must move takes {floor - without:.1f}" if floor is not None and without is not None else ""
        why = f"{on['median_us'] - off['median_us']:.1f} us{bytes_us}; {_pieces(found, kind)}"
    found.add(f"statistics on against off, {NAMES[kind]}, {where}", most, value, why)


def _pieces(found: _Targets, kind: str) -> str:
    """Returns a sentence on what mass and importance cost alone, by experiment 4."""
    case = f"what statistics cost, {kind} B=32 N=2880"
    rows = {row["variant"]: row for row in found.rows if row.get("case") == case and passed(row)}
    base = rows.get("attention alone")
    if found.backend != "triton" or base is None:
        return "no experiment 4 in this record, which tells mass from importance"
    cost = {name: row["median_us"] - base["median_us"] for name, row in rows.items() if row is not base}
    return "by experiment 4 " + ", ".join(f"{name} {us:+.1f} us" for name, us in cost.items())


def _decision(found: _Targets, where: str) -> None:
    row = found.find("decision*", **MAIN)
    value = row["median_us"] if row else None
    alone = {name: found.find(name, **MAIN) for name in ("select_tokens", "predict_rate")}
    parts = ", ".join(f"{name} {part['median_us']:.1f} us" for name, part in alone.items() if part)
    why = f"its parts, each in a launch of its own, take {parts}" if parts else ""
    found.add(f"the decision on top of the attention, {where} (us)", "<= 8", value, why)
    if found.backend != "triton":
        return
    steps = [row for row in found.rows if str(row.get("case")).startswith("a step of LLaVA-NeXT-7B") and passed(row)]
    deciding = [row for row in steps if "decide" in row["variant"] or "select_tokens" in row["variant"]]
    value = sum(row["median_us"] for row in deciding) if steps else None
    names = ", ".join(row["variant"] for row in deciding)
    found.add("the decision in a captured step, LLaVA-NeXT-7B, B=32, N=2880 (us)", "<= 2", value, f"{names} on its way", NO_PROFILE)


def _line(rows: list[Row | None]) -> tuple[float, float] | None:
    """(fixed us, GB/s) of a straight line through the first and the last row's bytes and times."""
    known = sorted((row for row in rows if row and row.get("bytes")), key=lambda row: row["bytes"])
    if len(known) < 2 or known[-1]["median_us"] <= known[0]["median_us"]:
        return None
    slope = (known[-1]["median_us"] - known[0]["median_us"]) / (known[-1]["bytes"] - known[0]["bytes"])
    return known[0]["median_us"] - slope * known[0]["bytes"], 1e-3 / slope


def _against_sdpa(found: _Targets, kind: str) -> None:
    """The worst of the grid, and by what: a fixed time, or the rate."""
    pairs = {}
    for batch, visual in GRID:
        facts = {"B": batch, "N": visual, "heads": heads(kind)}
        pairs[batch, visual] = found.find("decode_attention", **facts), found.other("dense torch SDPA", **facts)
    ratios = {place: ratio for place, pair in pairs.items() if (ratio := speed_up(*pair)) is not None}
    unseen = [f"B={batch} N={visual}" for batch, visual in GRID if (batch, visual) not in ratios]
    note = f"; not measured: {', '.join(unseen)}" if unseen else ""
    why, value = "", None
    if ratios:
        worst = min(ratios, key=lambda place: ratios[place])
        value = ratios[worst]
        slower = sorted((place for place in ratios if ratios[place] < 1), key=lambda place: ratios[place])
        lost = ", ".join(f"B={batch} N={visual} {ratios[batch, visual]:.2f}x" for batch, visual in slower)
        why = f"slower at {lost}"
        our_line, their_line = (_line([pair[side] for place, pair in pairs.items() if place[0] == worst[0]]) for side in (0, 1))
        if our_line is not None and their_line is not None:
            (ours, rate), (theirs, peer) = our_line, their_line
            why += f"; at B={worst[0]} a launch costs {ours:.1f} us against {theirs:.1f}, and streams {rate:.0f} GB/s against {peer:.0f}"
    what = f"attention, {NAMES[kind]}, against torch SDPA, the worst of {len(ratios) or len(GRID)} shapes"
    found.add(what, ">= 1.0x", value, why + note)
    if found.lines[-1]["met"] and unseen:  # only everywhere is met
        found.lines[-1] |= {"met": None, "says": f"Not decided: at least {value:.4g} where measured{note}."}


def _cuda_against_triton(found: _Targets) -> None:
    for kind, least in (("mha", ">= 0.9x"), ("gqa", ">= 0.7x")):
        logs, worst = [], None
        for batch, visual in GRID:
            facts = {"B": batch, "N": visual, "heads": heads(kind)}
            ratio = speed_up(found.find("decode_attention", **facts), found.other(f"{label('triton')} decode_attention", **facts))
            if ratio is not None:
                logs.append(math.log(ratio))
                worst = min(worst, (ratio, batch, visual)) if worst else (ratio, batch, visual)
        value = math.exp(sum(logs) / len(logs)) if logs else None
        why = f"the worst is {worst[0]:.2f}x at B={worst[1]} N={worst[2]}" if worst else ""
        our_line, their_line = (
            _line([find(found.rows, f"{name} decode_attention", B=32, N=visual, heads=heads(kind)) for visual in (576, 2880)])
            for name in (label("cuda"), label("triton"))
        )
        if our_line is not None and their_line is not None:
            (ours, rate), (theirs, peer) = our_line, their_line
            why += f"; at B=32 a launch costs {ours:.1f} us against {theirs:.1f}, and streams {rate:.0f} GB/s against {peer:.0f}"
        found.add(f"CUDA C++ against Triton, {NAMES[kind]}: decode_attention, mean over {len(logs)} shapes", least, value, why)


MODELS = (  # name, B, visual tokens, over the floor, against dense, a token through generate() over the floor
    ("LLaVA-NeXT-7B", 32, 2880, "<= 1.10x", ">= 2.4x", None),
    ("LLaVA-1.5-7B", 1, 576, "<= 1.12x", None, "<= 1.2x"),
    ("Qwen2.5-VL-7B", 32, 4096, "<= 1.15x", None, None),
)


def _models(found: _Targets) -> None:
    """Whole models, on the backend that ``auto`` takes first."""
    for name, batch, visual, floor, against, through in MODELS:
        facts = {"model": name, "B": batch}
        step, dense = (found.find(f"captured step, {what}*", **facts) for what in ("DyRate at 12.5 %", "dense"))
        what = f"{name}, B={batch}, N={visual}, 12.5 %"
        missing = f"no row of {name} at B={batch}"
        why = f"{_over_floor(step):.0f} us over it; {_profile(found, name)}" if step else ""
        found.add(f"{what}: captured step over its floor", floor, step["times_floor"] if step else None, why, missing)
        if against:
            why = (
                f"the dense step takes {dense['times_floor']} of its floor, this one {step['times_floor']} of its" if step and dense else ""
            )
            found.add("the same against the dense model, same capture", against, speed_up(step, dense), why, missing)
        if through:
            token = found.find("generate(), DyRate at 12.5 %*", **facts)
            why = f"{token['median_us'] - step['median_us']:.0f} us beside the captured step" if token and step else ""
            found.add(f"{what}: a token through generate() over the floor", through, token["times_floor"] if token else None, why, missing)


REQUEST = {"model": "LLaVA-NeXT-7B", "B": 32, "N": 2880, "new_tokens": 256}
QUARTER = ("generate(), DyRate at 12.5 %, pool of 25 %", "generate(), DyRate at 25 %, evict")  # what layers >= k hold behind the prompt
PEERS = (
    ("against unpatched generate()", "unpatched generate(), DynamicCache", ">= 4x"),
    ("against its compiled static cache", "unpatched generate(), StaticCache, compiled", ">= 2x"),
    ("against dense under this patch", f"{OURS} generate(), dense (policy none)", ">= 1.8x"),
)
NO_SWITCH = f", {end_to_end.NO_SWITCH}"


def _every(rows: Iterable[Row], name: str, **facts: Any) -> list[Row]:
    """Timed rows whose names are this one, or this one fused; none that comes behind reducers."""
    names = (name, f"{name}, fused")
    return [row for row in rows if row["name"] in names and row["median_us"] and all(row.get(key) == each for key, each in facts.items())]


def _counts(row: Row) -> bool:
    """Returns whether it was measured and is right, or is the unpatched model, which the others are compared with."""
    return passed(row) or (bool(row["measurement"]) and row["name"] == end_to_end.UNPATCHED)


def _best(rows: list[Row]) -> Row | None:
    return max((row for row in rows if _counts(row) and row.get("images_per_s")), key=lambda row: row["images_per_s"], default=None)


def _requests(found: _Targets) -> None:
    """Whole requests with a quarter of the visual tokens behind the prompt, the better of the two ways to hold it."""
    ours = _best([row for name in QUARTER for row in _every(found.rows, f"{OURS} {name}", **REQUEST)])
    what = "whole requests, LLaVA-NeXT-7B, B=32, N=2880, 256 new tokens, 25 % kept at the prompt, images/s"
    command = "bench/gpu.sh OUT --only end_to_end --config llava-next-7b"
    for how, peer, wanted in PEERS:
        other = _best(_every(found.rows, peer, **REQUEST))
        ratio = ours["images_per_s"] / other["images_per_s"] if ours and other else None
        why = f"{_phases(ours)} ({ours['name']}), {_phases(other)} ({other['name']})" if ours and other else ""
        found.add(f"{what}: {how}", wanted, ratio, why, f"no row of {'ours' if ours is None else peer} there; {command} makes one")


def _phases(row: Row) -> str:
    """Encode, prefill and decode in ms, each beside its prediction."""
    parts = []
    for name, key, before in (("encode", "encode_us", None), ("prefill", "first_token_us", "encode_us"), ("decode", "decode_us", None)):
        took, said = (row[f"{kind}{key}"] - (row[f"{kind}{before}"] if before else 0.0) for kind in ("", "predicted_"))
        parts.append(f"{name} {took / 1e3:.0f} ms where {said / 1e3:.0f} is predicted")
    return ", ".join(parts)


def _no_switch(found: _Targets) -> None:
    """``patch(model)`` alone against the best switches, the worst of all requests that were measured both ways."""
    worst, count = None, 0
    for row in (row for row in found.rows if row["name"].endswith(NO_SWITCH) and row["median_us"] and _counts(row)):
        facts = {key: row.get(key) for key in ("model", "B", "N", "new_tokens")}
        best = _best(_every(found.rows, row["name"].removesuffix(NO_SWITCH), **facts))
        if best is None:
            continue
        count += 1
        ratio = row["images_per_s"] / best["images_per_s"]
        if worst is None or ratio < worst[0]:
            worst = ratio, row, best
    why = ""
    if worst:
        _, row, best = worst
        why = f"at {row['model']}, B={row['B']}, {row['new_tokens']} new tokens, with {row.get('path')}; the best is {best['name']}"
    what = f"patch(model) with no switch against the best switches, images/s, the worst of {count} requests"
    found.add(what, ">= 0.98x", worst[0] if worst else None, why, f"no row ends in {NO_SWITCH!r}")


def _host_time(found: _Targets) -> None:
    """Adds what a token through ``generate()`` takes beside its captured step, the worst of the models."""
    worst = None
    for model, batch, _, *_ in MODELS:
        for way in ("DyRate at 12.5 %, recoverable, fused", "DyRate at 12.5 %, recoverable"):
            step = found.find(f"captured step, {way}", model=model, B=batch)
            token = found.find(f"generate(), {way}", model=model, B=batch)
            if step and token:
                share = max(1 - step["median_us"] / token["median_us"], 0.0)
                worst = max(worst, (share, model, batch)) if worst else (share, model, batch)
                break
    why = f"{worst[1]}, B={worst[2]}" if worst else ""
    found.add("host time of a token through generate(), its share, the worst of the models", "<= 0.10", worst[0] if worst else None, why,
              "no captured step beside its generate()")  # fmt: skip


KINDS = {  # of kernels, by what their names hold
    "matrix products": ("nvjet", "gemm", "gemv", "splitk", "linear", "gated", "product", "few_rows", "cutlass"),
    "attention": ("attention",),
    "the decision": ("decide", "select_tokens", "predict_rate", "compact"),
    "norms, residuals, rotation": ("norm", "rotate", "silu", "gate_mul", "add"),
}


def _profile(found: _Targets, name: str) -> str:
    """Where a captured step's time goes, by experiment 1."""
    rows = [row for row in found.rows if str(row.get("case")).startswith(f"a step of {name}") and passed(row)]
    total = next((row for row in rows if row["variant"] == "all kernels"), None)
    if total is None:
        return NO_PROFILE
    sums: dict[str, float] = {}
    for row in rows:
        if row is not total:
            lower = row["variant"].lower()
            kind = next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "the rest")
            sums[kind] = sums.get(kind, 0.0) + row["median_us"]
    parts = ", ".join(f"{kind} {us:.0f}" for kind, us in sorted(sums.items(), key=lambda one: -one[1]))
    return f"by experiment 1 its kernels take {total['median_us']:.0f} us: {parts}"


def sentences(found: list[dict[str, Any]]) -> list[str]:
    """A line of a list each; nothing of older records, which have none."""
    return [f"- {line['what']} ({line['backend']}). {line['says']}" for line in found if line.get("says")]
