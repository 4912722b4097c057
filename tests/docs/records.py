"""What the records of ``bench/results`` and ``docs/results`` hold, as the figures that the documents quote."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from dyrate_kernels import flops, request_model

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
H200, CPU = RESULTS / "2026-11-27-h200", RESULTS / "2026-11-28-cpu"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@functools.cache
def rows(path: Path) -> list[dict[str, Any]]:
    read = json.loads(path.read_text(encoding="utf-8"))
    return read if isinstance(read, list) else read["rows"]


def row(name: str, batch: int | None = 32, visual: int | None = 2880, path: Path = H200 / "report.json", **facts: Any) -> dict[str, Any]:
    wanted = {"name": name, "B": batch, "N": visual, **facts}
    (found,) = [r for r in rows(path) if all(value is None or r.get(key) == value for key, value in wanted.items())]
    return found


def model(batch: int, visual: int, name: str, twin: str) -> list[float]:
    """Captured step, floor, generate(), in ms."""
    step, whole = row(name, batch, visual), row(twin, batch, visual)
    assert step["floor_us"] == whole["floor_us"]
    return [step["median_us"] / 1e3, step["floor_us"] / 1e3, whole["median_us"] / 1e3]


def pair(batch: int, visual: int, what: str) -> list[float]:
    return model(batch, visual, f"dyrate captured step, {what}", f"dyrate generate(), {what}")


def models(batch: int, visual: int) -> list[float]:
    values = model(batch, visual, "unpatched captured step, StaticCache", "unpatched generate(), DynamicCache")
    for what in ("dense (policy none), fused", "DyRate at 12.5 %, recoverable, fused", "DyRate at 12.5 %, evict, fused",
                 "FastV at 12.5 %, evict, fused", "DyRate at 12.5 %, recoverable"):  # fmt: skip
        values += pair(batch, visual, what)
    return values


def over_sdpa(name: str, heads: str) -> list[float]:
    """Least and most times as fast as torch's SDPA over six shapes."""
    times = []
    for batch in (1, 8, 32):
        for visual in (576, 2880):
            ours = row(name, batch, visual, heads=heads)
            times.append(row("dense torch SDPA", batch, visual, heads=heads)["median_us"] / ours["median_us"])
    return [min(times), max(times)]


MHA, GQA = "32/32x128", "28/4x128"


def times_faster(slow: str, fast: str, **facts: Any) -> float:
    return row(slow, **facts)["median_us"] / row(fast, **facts)["median_us"]


EAGER, GRAPHED = "FastV eager step (attention matrix, mean, topk, gather)", "FastV eager step, in a CUDA graph"
CAPTURED, DENSE = "dyrate captured step, ", "dense (policy none), fused"


def against_fastv() -> list[float]:
    small = {"batch": 1, "visual": 576, "heads": MHA}
    return [
        times_faster(EAGER, "dyrate decode_step", heads=MHA),
        times_faster(EAGER, "dyrate decode_step", **small),
        times_faster(GRAPHED, "dyrate decode_step", **small),
    ]


def host(name: str) -> float:
    return row(f"host time of {name}", 1, 64, backend="triton")["median_us"]


def tiles(shipped: tuple[str, str]) -> list[float]:
    """Percent of the copy bandwidth: least, most, all of a layer's products. From ``layers.txt``, by tile."""
    text = (H200 / "layers.txt").read_text(encoding="utf-8")
    copy = float(re.search(r"^copy (\S+)", text, re.MULTILINE)[1])
    share, moved, time = {}, 0.0, 0.0
    weights = {"qkv": 3 * 4096**2, "o": 4096**2, "down": 11008 * 4096, "gated": 2 * 4096 * 11008}  # as its head says
    for name, tile in (("qkv", shipped[0]), ("o", shipped[0]), ("down", shipped[0]), ("gqa qkv", shipped[0]), ("gated", shipped[1])):
        part = re.search(rf"^{name}: (?:cuBLAS|torch) .*\n((?:  .*\n)*)", text, re.MULTILINE)[1]
        us, rate = map(float, re.search(rf"^  {re.escape(tile)}: (\S+) us (\S+) GB/s", part, re.MULTILINE).groups())
        share[name] = 100 * rate / copy
        if name != "gqa qkv":
            moved, time = moved + 2 * weights[name], time + us  # bytes, us
    return [min(share.values()), max(share.values()), 100 * moved / time / 1e3 / copy]


def shipped_tiles() -> list[float]:
    source = (ROOT / "triton_kernels" / "products.py").read_text(encoding="utf-8")
    return tiles(tuple(re.search(rf"^{name} = RowTile(\(.*\))$", source, re.MULTILINE)[1] for name in ("LINEAR", "GATED")))


def layer_products() -> list[float]:
    names = ("query, key and value products", "output product", "down product", "gate and up products with gated SiLU")
    found = [row(f"dyrate {name}, Vicuna-7B", 1, None) for name in names]
    share = [100 * r["share_of_copy"] for r in found]
    return [min(share), max(share), 100 * sum(r["floor_us"] for r in found) / sum(r["median_us"] for r in found)]


def same_launch() -> list[float]:
    """Percent that a step takes longer where the attention's launch goes on to the decision: at most."""
    text = (RESULTS / "2026-11-26-h200" / "settings.txt").read_text(encoding="utf-8")
    longer = []
    for kind in ("mha", "gqa"):
        before, after = (
            re.findall(r"step\d+=(\S+)", re.search(rf"^{kind} score {re.escape(how)} (.*)", text, re.MULTILINE)[1])
            for how in ("{}", "{'decision': 'same_launch'}")
        )
        longer += [100 * (float(b) / float(a) - 1) for a, b in zip(before, after, strict=True)]
    assert min(longer) == longer[5] < 1  # 28 heads over 4, B=1
    return [max(longer)]


def over_unpatched(name: str) -> list[float]:
    """Percent, batch 4: the bundled model, the larger one."""
    found = [r for r in rows(CPU / "report.json") if r["name"].startswith(name) and r["B"] == 4]
    return [100 * next(r for r in found if r["N"] == visual)["over_unpatched"] for visual in (144, 2880)]


def cpu_table() -> list[float]:
    names = ("unpatched generate(), StaticCache", "dyrate generate(), dense", "dyrate generate(), schedule, recoverable",
             "dyrate generate(), schedule, evict", "dyrate generate(), FastV")  # fmt: skip
    return [value for name in names for value in over_unpatched(name)]


def host_time() -> list[float]:
    """Percent that the patch adds to the host's work: least and most on a CPU, least and most as on a GPU."""
    text = (RESULTS / "2026-11-30-cpu" / "host_time.txt").read_text(encoding="utf-8")
    values = []
    for part in text.split("\n\n")[1:]:
        added = [100 * (float(ratio) - 1) for ratio in re.findall(r"(\S+)x ", part)[1:]]
        values += [min(added), max(added)]
    return [max(value, 0.0) for value in values]


def bound(config: str, batch: int) -> float:
    named = flops.named_model(config)
    return flops.decode_bytes(named.shape, batch=batch, visual=named.visual_tokens, text=128).bound


def predicted(config: str, batch: int, new_tokens: int = 256) -> list[float]:
    """Seconds of a request, dense and under ``evict`` with a quarter kept, and how much faster that is."""
    request, rates = request_model.named_request(config, batch, new_tokens), request_model.named_rates("h200")
    plans = (request_model.Plan(), request_model.Plan("evict", 3, 0.25))
    dense, pruned = (request_model.predict(request, plan, rates).seconds for plan in plans)
    return [dense, pruned, dense / pruned]


GENERATE = "dyrate generate(), "


def first_tokens(batch: int, visual: int) -> list[float]:
    """Seconds: unpatched, patched dense, DyRate at 12.5 % recoverable and evicting."""
    names = ("unpatched generate(), DynamicCache", GENERATE + DENSE, GENERATE + "DyRate at 12.5 %, recoverable, fused",
             GENERATE + "DyRate at 12.5 %, evict, fused")  # fmt: skip
    return [row(name, batch, visual)["first_token_us"] / 1e6 for name in names]


def first_tokens_of_both() -> list[float]:
    """The table of docs/performance.md: seconds for LLaVA-NeXT-7B at B=32 beside milliseconds for LLaVA-1.5-7B at B=1."""
    pairs = zip(first_tokens(32, 2880), first_tokens(1, 576), strict=True)
    return [value for large, small in pairs for value in (large, 1e3 * small)]


def dense_and_evict(batch: int, visual: int) -> tuple[list[float], list[float]]:
    """First token and each token behind it, in ms: dense, evicting at 12.5 %, how much faster."""
    dense, pruned = (row(GENERATE + what, batch, visual) for what in (DENSE, "DyRate at 12.5 %, evict, fused"))
    first, token = ([dense[key] / 1e3, pruned[key] / 1e3, dense[key] / pruned[key]] for key in ("first_token_us", "median_us"))
    return first, token


def what_it_buys() -> list[float]:
    """The table of README.md, line by line."""
    (large_first, large_token), (small_first, small_token) = dense_and_evict(32, 2880), dense_and_evict(1, 576)
    return [
        large_first[0] / 1e3, large_first[1] / 1e3, large_first[2], *large_token,
        *predicted("llava-next-7b", 32), *predicted("llava-next-7b", 8), *predicted("llava-next-7b", 1),
        *small_first, *small_token, *predicted("llava-1.5-7b", 32),
        *predicted("qwen2.5-vl-7b", 32), *predicted("qwen2.5-vl-7b", 1),
        over_unpatched("dyrate generate(), dense")[0], over_unpatched("dyrate generate(), schedule, evict")[0],
    ]  # fmt: skip


def shares(page: str, *labels: str, table: str = "long answers") -> list[float]:
    """Percent of the unpruned score, with its interval, by a table of ``docs/results/<page>/shapes.md``."""
    text = (ROOT / "docs" / "results" / page / "shapes.md").read_text(encoding="utf-8")
    text = text[text.index(f"\n## {table} (") :]
    values = []
    for label in labels:
        line = next(line for line in text.splitlines() if line.startswith((f"| {label} |", f"| {label} (here")))
        values += [float(number) for number in NUMBER.findall(line.split("|")[3])]
    return values


def lead(other: str, column: int) -> float:
    """Points by which the trained dyrate leads another row of ``docs/results/k1/shapes.md`` on long answers, at one of the tuned costs."""
    text = (ROOT / "docs" / "results" / "k1" / "shapes.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith((f"| {other} | +", f"| {other} | -")))
    return float(NUMBER.findall(line.split("|")[2 + column])[0])


def bundled_model() -> list[float]:
    text = (ROOT / "dyrate_kernels" / "bundled" / "model" / "README.md").read_text(encoding="utf-8")
    lines = re.finditer(r"^\| (\w+).*? \| (\S+) % \|.*\| (\d+) \|$", text, re.MULTILINE)
    parts = {line[1]: (float(line[2]), float(line[3])) for line in lines}
    order = [parts["describe"], *(parts[name] for name in ("colour", "shape", "place", "count", "existence"))]
    return [*order[0], *(value for value, _ in order[1:]), order[1][1]]
