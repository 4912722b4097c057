"""The figures of README.md and bench/results/README.md, each beside its record: one that changes in either fails, and so does one of
README.md's measured sections that no rule covers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dyrate_kernels import devices, flops, request_model

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results"
H200, CPU = RESULTS / "2026-11-27-h200", RESULTS / "2026-11-28-cpu"
MEASURED = ("On a GPU", "What it costs and what it can buy")  # sections whose every figure with a unit needs a rule
FIGURE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?: ?%| (?:ms|us|s|GB/s)\b|x\b)")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Rule:
    """A rule for what a piece of README.md says.

    Attributes:
        text: the piece, with ``#`` for each figure; spaces and line breaks are alike.
        values: the figures from the record, in the order of the text; None: they are no results (settings, targets, what a command prints
            on the reader's machine).
    """

    text: str
    values: Callable[[], list[float]] | None = None

    def found(self, page: str) -> re.Match[str]:
        pattern = r"\s+".join(re.escape(word).replace(r"\#", "#").replace("#", r"(\d+(?:\.\d+)?)") for word in self.text.split())
        matches = list(re.finditer(pattern, page))
        assert len(matches) == 1, f"README.md holds {len(matches)} times: {self.text!r}"
        return matches[0]


# ---- records ----------------------------------------------------------------------------------------------------------------------------


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


def predicted() -> list[float]:
    """Pictures, new tokens and seconds of a request to LLaVA-NeXT-7B, dense and under ``evict`` with a quarter kept."""
    request, rates = request_model.named_request("llava-next-7b", 32, 256), request_model.named_rates("h200")
    plans = (request_model.Plan(), request_model.Plan("evict", 3, 0.25))
    return [request.batch, request.new_tokens, *(request_model.predict(request, plan, rates).seconds for plan in plans)]


def shares(page: str, *labels: str) -> list[float]:
    """Percent of the unpruned score, with its interval, by ``docs/results/<page>/shapes.md``."""
    text = (ROOT / "docs" / "results" / page / "shapes.md").read_text(encoding="utf-8")
    values = []
    for label in labels:
        line = next(line for line in text.splitlines() if line.startswith(f"| {label} |"))  # the first table: descriptions
        values += [float(number) for number in NUMBER.findall(line.split("|")[3])]
    return values


def bundled_model() -> list[float]:
    text = (ROOT / "dyrate_kernels" / "bundled" / "model" / "README.md").read_text(encoding="utf-8")
    lines = re.finditer(r"^\| (\w+).*? \| (\S+) % \|.*\| (\d+) \|$", text, re.MULTILINE)
    parts = {line[1]: (float(line[2]), float(line[3])) for line in lines}
    order = [parts["describe"], *(parts[name] for name in ("colour", "shape", "place", "count", "existence"))]
    return [*order[0], *(value for value, _ in order[1:]), order[1][1]]


MODELS = (
    "| unpatched | # ms (StaticCache) | # ms | # ms (DynamicCache, eager) | "
    "| patched, policy `none` (dense), `fuse=True` | # ms | # ms | # ms | "
    "| patched, DyRate keeping 12.5 %, `fuse=True` | **# ms** | # ms | **# ms** | | the same, `evict` | # ms | # ms | # ms | "
    "| FastV at 12.5 % under this patch, `evict`, `fuse=True` | # ms | # ms | # ms | "
    "| DyRate keeping 12.5 %, without `fuse` | # ms | # ms | # ms |"
)
RULES = [
    Rule("as long (28 heads over 4, B=1) or up to # % longer", same_launch),
    Rule(
        f"{MODELS} | LLaVA-1.5-7B shape",
        lambda: models(32, 2880),
    ),
    Rule(
        f"{MODELS} ![time per token]",
        lambda: models(1, 576),
    ),
    Rule(
        "At B=32 pruning makes the step #x as fast",
        lambda: [times_faster(CAPTURED + DENSE, CAPTURED + "DyRate at 12.5 %, recoverable, fused")],
    ),
    Rule(
        "**At B=1 pruning itself buys # %**",
        lambda: [
            100 * times_faster(CAPTURED + DENSE, CAPTURED + "DyRate at 12.5 %, recoverable, fused", batch=1, visual=576) - 100,
        ],
    ),
    Rule(
        "took # ms a token at B=1 where the patched dense model took # (",
        lambda: [
            row(name, 1, 576, path=H200 / "e2e.json")["median_us"] / 1e3
            for name in ("unpatched generate(), StaticCache, compiled", "dyrate generate(), dense (policy none), fused")
        ],
    ),
    Rule(
        "reads at # % of the measured copy bandwidth (B=32, N=2880) and is #x as fast as torch's SDPA",
        lambda: [
            100 * row("dyrate decode_attention with statistics", heads=MHA)["share_of_copy"],
            times_faster("dense torch SDPA", "dyrate decode_attention with statistics", heads=MHA),
        ],
    ),
    Rule(
        "is #x as fast as FastV's eager step there, #x at B=1 and N=576, where Python launches are most of FastV's time (#x with",
        against_fastv,
    ),
    Rule(
        "with 32 heads our attention is #x to #x as fast without statistics, #x to #x with them, and the whole step #x to #x",
        lambda: [
            value
            for name in ("dyrate decode_attention", "dyrate decode_attention with statistics", "dyrate decode_step")
            for value in over_sdpa(name, MHA)
        ],
    ),
    Rule(
        "with 28 heads over 4 #x to #x, #x to #x and #x to #x.",
        lambda: [
            value
            for name in ("dyrate decode_attention", "dyrate decode_attention with statistics", "dyrate decode_step")
            for value in over_sdpa(name, GQA)
        ],
    ),
    Rule(
        "costs the host # us (attention), # (with statistics) or # (step) beside SDPA's #;",
        lambda: [host(name) for name in ("decode_attention", "decode_attention with statistics", "decode_step", "torch SDPA (for scale)")],
    ),
    Rule(
        "# to # % of the copy bandwidth, # % over all of a layer's (a 7B model of Llama's shape, the tiles that are shipped,",
        shipped_tiles,
    ),
    Rule("`bench/results/2026-11-27-h200/layers.txt`; # to # % and # % in that folder's", layer_products),
    Rule(
        "| unpatched over a static cache | # % | # % | | patched, `none` | # % | # % | | schedule, recoverable | # % | # % | "
        "| schedule, evict | # % | # % | | FastV at the same mean, evict | # % | # % |",
        cpu_table,
    ),
    Rule("is # to # % on a CPU and # to # % as on a GPU", host_time),
    Rule("with batch 1 on LLaVA-1.5-7B it is #x, so", lambda: [bound("llava-1.5-7b", 1)]),
    Rule("with batch 32 on LLaVA-NeXT-7B it is #x.", lambda: [bound("llava-next-7b", 32)]),
    Rule(
        "descriptions keep # % of their score with `downsample`, # with `uniform`, # with `aim`, # with `visionzip`, # with `fastervlm`, "
        "# with `divprune`; `dyrate`, which drops while generating, keeps # (",
        lambda: shares(
            "reducers", *(f"+{name}@33.3" for name in ("downsample", "uniform", "aim", "visionzip", "fastervlm", "divprune")), "dyrate@33.3"
        )[::3],
    ),  # fmt: skip
    Rule(
        "| dyrate, trained, recoverable | # [#, #] | | `fastv` | # [#, #] | "
        "| dyrate, trained, evict | # [#, #] | | `fastv`, evict | # [#, #] | "
        "| down-sampled picture | # [#, #] | | dyrate in the paper's form | # [#, #] |",
        lambda: shares("k1", *(f"{name}@33.3" for name in ("dyrate", "fastv", "dyrate@evict", "fastv@evict", "downsample", "dyrate-mass"))),
    ),
    Rule("| `uniform` | # [#, #] |", lambda: shares("k1", "uniform@33.3")),
    Rule("| `random` | # [#, #] |", lambda: shares("k1", "random@33.3")),
    Rule(
        "`depth`, `st3`, `threshold`, `layerwise` | # to # |",
        lambda: (lambda found: [min(found), max(found)])(
            shares("k1", "depth@evict@33.3", "st3@33.3", "threshold@33.3", "layerwise@33.3")[::3]
        ),
    ),
    Rule(
        "`pyramiddrop`, `sparsevlm`, `vtw` | #, #, # |",
        lambda: shares("k1", "pyramiddrop@evict@33.3", "sparsevlm@evict@33.3", "vtw@evict@33.3")[::3],
    ),
    Rule(
        "it names # % of the attributes (place, size, colour, shape of every object; n = #) and answers # % of the questions on "
        "colour and # % on shape; questions that search the picture are weak: place # %, count # %, existence # % (n = # each;",
        bundled_model,
    ),
    # no results
    Rule("takes # s of a core with nvcc 13.0"),
    Rule("our target is # % at most"),
    Rule("# pictures on LLaVA-NeXT-7B with # new tokens take at least # s dense and # s under `evict` with a quarter kept", predicted),
]
SETTING = re.compile(r"12\.5 %")  # the kept share of the measurements


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.values is not None], ids=lambda rule: rule.text[:60])
def test_figures_are_those_of_their_record(rule: Rule) -> None:
    quoted = rule.found(README).groups()
    values = rule.values()
    assert len(quoted) == len(values)
    for text, value in zip(quoted, values, strict=True):
        digits = len(text.partition(".")[2])
        assert float(text) == round(value, digits), f"README.md says {text}, the record {value}, in: {rule.text}"


def section(page: str, title: str) -> tuple[int, int]:
    begin = page.index(f"\n## {title}\n")
    return begin, page.index("\n## ", begin + 1)


def uncovered(page: str) -> Iterator[str]:
    """Figures of the measured sections that no rule and no setting covers; blocks of output are compared whole, elsewhere."""
    spans = [rule.found(page).span() for rule in RULES] + [found.span() for found in SETTING.finditer(page)]
    spans += [found.span() for found in re.finditer(r"^```.*?^```$", page, re.MULTILINE | re.DOTALL)]
    for title in MEASURED:
        begin, end = section(page, title)
        for found in FIGURE.finditer(page, begin, end):
            if not any(first <= found.start() and found.end() <= last for first, last in spans):
                yield page[max(found.start() - 60, 0) : found.end() + 20]


def test_every_figure_of_a_measured_section_has_a_rule() -> None:
    assert list(uncovered(README)) == []
    for more in ("and 3.1x as fast", "within 40 us", "takes 12 ms", "at 88.8 % of it"):
        assert len(list(uncovered(README.replace("\n**The path.**", f" {more}\n\n**The path.**")))) == 1, more


def test_a_changed_figure_is_seen() -> None:
    """In the text, and in a table."""
    for rule, old, new in ((RULES[0], "36 % longer", "35 % longer"), (RULES[1], "**7.80 ms**", "**7.81 ms**")):
        changed = rule.found(README.replace(old, new)).groups()
        assert any(float(a) != round(b, len(a.partition(".")[2])) for a, b in zip(changed, rule.values(), strict=True))


def test_printed_blocks_are_those_of_the_record() -> None:
    block = re.search(r"^```\n(host time a call.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]
    assert block.strip() == (RESULTS / "2026-11-29-cpu" / "launch_overhead.txt").read_text(encoding="utf-8").strip()


def test_what_the_readme_says_of_device_files_is_true() -> None:
    """It says that none holds launch settings, and which operators the H200's gives to CUDA C++."""
    assert "(no file has any yet; the H200's names the faster backends)" in README
    for path in devices.FOLDER.glob("*.json"):
        assert not json.loads(path.read_text(encoding="utf-8")).get("settings")
    chosen = devices.measured("NVIDIA H200")["backend"]
    assert [name for name, backend in chosen.items() if backend == "cuda"] == ["reorder_"]
    assert "on an H200 that is CUDA C++ for `reorder_`, Triton for all else" in README


# ---- bench/results/README.md ------------------------------------------------------------------------------------------------------------

TARGETS = {  # line of the newest table -> (what report.json calls it, factor)
    "attention with statistics >= 90 %": ("decode_attention with statistics", 100),
    "no slower than torch SDPA": ("the same against dense torch SDPA", 1),
    "statistics on against off": ("statistics on against off", 100),
    "the decision <= 10 us": ("the decision on top", 1),
    "`decode_step` >= 10x FastV's eager step": ("decode_step against FastV's eager step", 1),
    "compaction >= 80 %": ("compact_ of 29 layers", 100),
    "LLaVA-NeXT-7B, B=32, 12.5 % kept": ("LLaVA-NeXT-7B, B=32", 1),
    "the same >= 2.2x dense": ("the same against the dense model", 1),
    "LLaVA-1.5-7B, B=1: captured step": ("LLaVA-1.5-7B, B=1: captured step", 1),
    "through `generate()` <= 1.4x floor": ("LLaVA-1.5-7B, B=1: a token through generate()", 1),
}
NEWEST = (RESULTS / "README.md").read_text(encoding="utf-8").split("\n## ")[1]


def rounds_to(quoted: str, value: float) -> bool:
    return float(quoted) == round(value, len(quoted.partition(".")[2]))


@pytest.mark.parametrize("line", TARGETS)
def test_the_targets_are_those_of_both_records(line: str) -> None:
    what, factor = TARGETS[line]
    cells = next(text for text in NEWEST.splitlines() if text.startswith(f"| {line}")).split("|")
    for folder, cell in (("2026-11-26-h200", cells[2]), ("2026-11-27-h200", cells[3])):
        targets = json.loads((RESULTS / folder / "report.json").read_text(encoding="utf-8"))["targets"]
        target = next(t for t in targets if t["what"].startswith(what) and t["backend"] != "cuda" and t["measured"] is not None)
        assert rounds_to(NUMBER.findall(cell)[0], factor * target["measured"]), (cell, target)
    assert ("missed" in cells[4] or "cannot be met" in cells[4]) == (not target["met"])


def test_every_line_of_the_newest_table_is_checked() -> None:
    lines = [line for line in NEWEST.splitlines() if line.startswith("| ")][2:]
    others = [line for line in lines if not line.startswith(tuple(f"| {begin}" for begin in TARGETS))]
    assert len(others) == 1 and others[0].startswith("| grouped-query attention (28 heads over 4) against SDPA")
    cells = others[0].split("|")
    for folder, cell in (("2026-11-26-h200", cells[2]), ("2026-11-27-h200", cells[3])):
        path = RESULTS / folder / "report.json"
        for quoted, (batch, visual) in zip(NUMBER.findall(cell), ((32, 2880), (8, 2880), (1, 576)), strict=True):
            facts = {"batch": batch, "visual": visual, "heads": GQA, "path": path}
            assert rounds_to(quoted, times_faster("dense torch SDPA", "dyrate decode_attention", **facts))


def test_how_much_slower_the_other_backend_is() -> None:
    measured = devices.measured("NVIDIA H200")["backend_measured"]
    found = re.search(
        r"(\S+)x the time of Triton's attention, (\S+)x its whole step .*?faster by it \((\S+)x\)", NEWEST, re.DOTALL
    ).groups()
    for quoted, operator in zip(found, ("decode_attention", "decode_step", "reorder_"), strict=True):
        assert rounds_to(quoted, measured[operator]["cuda_over_triton"])


def test_where_the_time_of_a_step_goes() -> None:
    text = (H200 / "models.txt").read_text(encoding="utf-8")

    def ms(*kernels: str) -> float:
        return sum(float(re.search(rf"^ *(\S+) us +\S+ {re.escape(kernel)}", text, re.MULTILINE)[1]) for kernel in kernels) / 1e3

    whole = float(re.search(r"total us/step (\S+)", text)[1]) / 1e3
    products = ms("linear_kernel", "gated_kernel")
    found = re.search(
        r"products take (\S+) of (\S+) ms at (\S+) % of the copy bandwidth, attention (\S+) \(one launch a layer\), the head\s+(\S+), "
        r"the norms (\S+), residual additions (\S+), rotary embedding (\S+)\. At",
        NEWEST,
    ).groups()
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 2  # bytes, LLaVA-1.5-7B
    copy = float(re.search(r"^copy (\S+)", (H200 / "layers.txt").read_text(encoding="utf-8"), re.MULTILINE)[1])
    values = [products, whole, 100 * weights / (products * 1e-3) / 1e9 / copy, ms("decode_attention_kernel"), ms("nvjet_sm90_tst_256x8"),
              ms("rms_norm_kernel"), ms("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add"),
              ms("rotate_kernel")]  # fmt: skip
    for quoted, value in zip(found, values, strict=True):
        assert rounds_to(quoted, value), (quoted, value)
