"""The figures of the documents, each beside its record: one that changes in either fails, and so does one of a measured section that no
rule covers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from dyrate_kernels import devices
from dyrate_kernels.cli.main import main
from tests.docs import records
from tests.docs.records import CAPTURED, DENSE, GQA, H200, MHA, NUMBER, RESULTS, ROOT, bound, row, shares, times_faster

README, PERFORMANCE, CHOOSING, START = "README.md", *(f"docs/{name}.md" for name in ("performance", "choosing", "getting_started"))
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (README, PERFORMANCE, CHOOSING, START)}
# sections whose every figure with a unit needs a rule
MEASURED = {
    README: ("What it buys", "Methods", "How it compares"),
    PERFORMANCE: ("The roofline", "Measured on an H200", "Measured on a CPU", "Host time", "The path", "Backends"),
    CHOOSING: ("Evidence",),
}
FIGURE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?: ?%| (?:ms|us|s|GB/s)\b|x\b)")


@dataclass(frozen=True)
class Rule:
    """A rule for what a piece of a page says.

    Attributes:
        text: the piece, with ``#`` for each figure; spaces and line breaks are alike.
        values: the figures from the record, in the order of the text; None: they are no results (settings, targets, what a command prints
            on the reader's machine).
        page: where it stands.
    """

    text: str
    values: Callable[[], list[float]] | None = None
    page: str = PERFORMANCE

    def found(self, text: str) -> re.Match[str]:
        pattern = r"\s+".join(re.escape(word).replace(r"\#", "#").replace("#", r"(\d+(?:\.\d+)?)") for word in self.text.split())
        matches = list(re.finditer(pattern, text))
        assert len(matches) == 1, f"{self.page} holds {len(matches)} times: {self.text!r}"
        return matches[0]


def bought_at_batch_one() -> list[float]:
    """Percent by which pruning makes a captured step of LLaVA-1.5-7B faster than its dense twin at B=1."""
    return [100 * times_faster(CAPTURED + DENSE, CAPTURED + "DyRate at 12.5 %, recoverable, fused", batch=1, visual=576) - 100]


MODELS = (
    "| unpatched | # ms (StaticCache) | # ms | # ms (DynamicCache, eager) | "
    "| patched, policy `none` (dense), `fuse=True` | # ms | # ms | # ms | "
    "| patched, DyRate keeping 12.5 %, `fuse=True` | **# ms** | # ms | **# ms** | | the same, `evict` | # ms | # ms | # ms | "
    "| FastV at 12.5 % under this patch, `evict`, `fuse=True` | # ms | # ms | # ms | "
    "| DyRate keeping 12.5 %, without `fuse` | # ms | # ms | # ms |"
)
RULES = [
    Rule("as long (28 heads over 4, B=1) or up to # % longer", records.same_launch),
    Rule(
        f"{MODELS} | LLaVA-1.5-7B shape",
        lambda: records.models(32, 2880),
    ),
    Rule(
        f"{MODELS} ![time per token]",
        lambda: records.models(1, 576),
    ),
    Rule(
        "At B=32 pruning makes the step #x as fast",
        lambda: [times_faster(CAPTURED + DENSE, CAPTURED + "DyRate at 12.5 %, recoverable, fused")],
    ),
    Rule(
        "**At B=1 pruning itself buys # %**",
        bought_at_batch_one,
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
        records.against_fastv,
    ),
    Rule(
        "with 32 heads our attention is #x to #x as fast without statistics, #x to #x with them, and the whole step #x to #x",
        lambda: [
            value
            for name in ("dyrate decode_attention", "dyrate decode_attention with statistics", "dyrate decode_step")
            for value in records.over_sdpa(name, MHA)
        ],
    ),
    Rule(
        "with 28 heads over 4 #x to #x, #x to #x and #x to #x.",
        lambda: [
            value
            for name in ("dyrate decode_attention", "dyrate decode_attention with statistics", "dyrate decode_step")
            for value in records.over_sdpa(name, GQA)
        ],
    ),
    Rule(
        "costs the host # us (attention), # (with statistics) or # (step) beside SDPA's #;",
        lambda: [
            records.host(name) for name in ("decode_attention", "decode_attention with statistics", "decode_step", "torch SDPA (for scale)")
        ],
    ),
    Rule(
        "# to # % of the copy bandwidth, # % over all of a layer's (a 7B model of Llama's shape, the tiles that are shipped,",
        records.shipped_tiles,
    ),
    Rule("`bench/results/2026-11-27-h200/layers.txt`; # to # % and # % in that folder's", records.layer_products),
    Rule(
        "| unpatched over a static cache | # % | # % | | patched, `none` | # % | # % | | schedule, recoverable | # % | # % | "
        "| schedule, evict | # % | # % | | FastV at the same mean, evict | # % | # % |",
        records.cpu_table,
    ),
    Rule("is # to # % on a CPU and # to # % as on a GPU", records.host_time),
    Rule("with batch 1 on LLaVA-1.5-7B it is #x, so", lambda: [bound("llava-1.5-7b", 1)]),
    Rule("with batch 32 on LLaVA-NeXT-7B it is #x.", lambda: [bound("llava-next-7b", 32)]),
    Rule(
        "it names # % of the attributes (place, size, colour, shape of every object; n = #) and answers # % of the questions on "
        "colour and # % on shape; questions that search the picture are weak: place # %, count # %, existence # % (n = # each;",
        records.bundled_model,
        START,
    ),
    # no results
    Rule("takes # s of a core with nvcc 13.0"),
    Rule("our target is # % at most"),
    Rule(
        "with # new tokens take at least # s dense and # s under `evict` with a quarter kept",
        lambda: [256, *records.predicted("llava-next-7b", 32)[:2]],
    ),
    Rule(
        "| unpatched | # s | # ms | | patched, policy `none` (dense), `fuse=True` | # s | # ms | "
        "| patched, DyRate keeping 12.5 %, `fuse=True` | # s | # ms | | the same, `evict` | **# s** | **# ms** |",
        records.first_tokens_of_both,
    ),
    Rule(
        "| first token | # s | # s | **#x** | 12.5 % | H200 | | | 32 | each token behind it | # ms | # ms | **#x** | 12.5 % | H200 | "
        "| | 32 | request, 256 new tokens | # s | # s | #x | 25 % | predicted | | | 8 | request | # s | # s | #x | 25 % | predicted | "
        "| | 1 | request | # s | # s | #x | 25 % | predicted | | LLaVA-1.5-7B (576) | 1 | first token | # ms | # ms | #x | 12.5 % | H200 | "
        "| | 1 | each token behind it | # ms | # ms | #x | 12.5 % | H200 | | | 32 | request | # s | # s | #x | 25 % | predicted | "
        "| Qwen2.5-VL-7B (1280) | 32 | request | # s | # s | #x | 25 % | predicted | | | 1 | request | # s | # s | #x | 25 % | predicted | "
        "| bundled toy (144), CPU | 4 | each token, of unpatched | # % | # % |",
        records.what_it_buys,
        README,
    ),
    Rule(
        "unpatched `generate()` took # ms a token on LLaVA-1.5-7B there, transformers' compiled static cache # ms.",
        lambda: [
            row("unpatched generate(), DynamicCache", 1, 576)["median_us"] / 1e3,
            row("unpatched generate(), StaticCache, compiled", 1, 576, path=H200 / "e2e.json")["median_us"] / 1e3,
        ],
        README,
    ),
    Rule(
        "trained `dyrate` keeps # % of the unpruned score, a down-sampled picture # %, `uniform` # %, `fastv` # %, and `dyrate` in the "
        "paper's form # %:",
        lambda: shares("k1", *(f"{name}@33.3" for name in ("dyrate", "downsample", "uniform", "fastv", "dyrate-mass")))[::3],
        README,
    ),
    Rule("the score layer's whole step is #x as fast as FastV's eager one", lambda: records.against_fastv()[:1], README),
    Rule("pruning itself bought # % of a step", bought_at_batch_one, CHOOSING),
    Rule(
        "after # s under `evict` keeping 12.5 %, and after # s with every token; `recoverable`, whose prompt is the unpruned model's, "
        "took # s",
        lambda: [records.first_tokens(32, 2880)[index] for index in (3, 1, 2)],
        CHOOSING,
    ),
    Rule(
        "`uniform` keeps # % of the unpruned score, `random` #, `pyramiddrop` #, `fastv` #",
        lambda: shares("k1", *(f"{name}@evict@33.3" for name in ("uniform", "random", "pyramiddrop", "fastv")), table="short answers")[::3],
        CHOOSING,
    ),
    Rule(
        "gave the trained dyrate # % of the unpruned score, all of it (`recoverable`) # %, and `evict` # %; a pool by the prompt's "
        "ranking # %",
        lambda: shares("pool", "dyrate@pool=0.5_by=uniform@33.3", "dyrate@33.3", "dyrate@evict@33.3", "dyrate@pool=0.5@33.3")[::3],
        CHOOSING,
    ),
    Rule("`recoverable` beats `evict` by # points", lambda: [records.lead("dyrate@evict", 1)], CHOOSING),
    Rule(
        "| `dyrate`, trained, recoverable | # [#, #] | | `dyrate`, trained, evict | # [#, #] | | down-sampled picture | # [#, #] | "
        "| `uniform` | # [#, #] | | `random` | # [#, #] | | `fastv` | # [#, #] | | `dyrate` in the paper's form | # [#, #] | "
        "| `dyrate`, closed form | # [#, #] |",
        lambda: shares(
            "k1",
            *(
                f"{name}@33.3"
                for name in ("dyrate", "dyrate@evict", "downsample", "uniform", "random", "fastv", "dyrate-mass", "dyrate-closed")
            ),
        ),
        CHOOSING,
    ),
    Rule(
        "descriptions keep # % of their score with `downsample`, # with `uniform`, # with `aim`, # with `visionzip`, # with `fastervlm`, "
        "# with `divprune`; `dyrate`, which drops while generating, keeps # (",
        lambda: shares(
            "reducers", *(f"+{name}@33.3" for name in ("downsample", "uniform", "aim", "visionzip", "fastervlm", "divprune")), "dyrate@33.3"
        )[::3],
        CHOOSING,
    ),
]
# kept shares and costs that the measurements were made at
SETTING = re.compile(r"12\.5 %|at\s+33\.3 % of the visual rows|at 20 %|95 % interval|\| 25 % \|")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.values is not None], ids=lambda rule: rule.text[:60])
def test_figures_are_those_of_their_record(rule: Rule) -> None:
    quoted = rule.found(PAGES[rule.page]).groups()
    values = rule.values()
    assert len(quoted) == len(values)
    for text, value in zip(quoted, values, strict=True):
        digits = len(text.partition(".")[2])
        assert float(text) == round(value, digits), f"{rule.page} says {text}, the record {value}, in: {rule.text}"


def section(text: str, title: str) -> tuple[int, int]:
    begin = text.index(f"\n## {title}\n")
    end = text.find("\n## ", begin + 1)
    return begin, end if end >= 0 else len(text)


def uncovered(page: str, text: str) -> Iterator[str]:
    """Figures of a page's measured sections that no rule and no setting covers; blocks of output are compared whole, elsewhere."""
    spans = [rule.found(text).span() for rule in RULES if rule.page == page] + [found.span() for found in SETTING.finditer(text)]
    spans += [found.span() for found in re.finditer(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)]
    for title in MEASURED[page]:
        begin, end = section(text, title)
        for found in FIGURE.finditer(text, begin, end):
            if not any(first <= found.start() and found.end() <= last for first, last in spans):
                yield text[max(found.start() - 60, 0) : found.end() + 20]


@pytest.mark.parametrize("page", MEASURED)
def test_every_figure_of_a_measured_section_has_a_rule(page: str) -> None:
    assert list(uncovered(page, PAGES[page])) == []
    for more in ("and 3.1x as fast", "within 40 us", "takes 12 ms", "at 88.8 % of it"):
        for title in MEASURED[page]:
            assert len(list(uncovered(page, PAGES[page].replace(f"\n## {title}\n", f"\n## {title}\n {more}\n")))) == 1, (title, more)


def test_a_changed_figure_is_seen() -> None:
    """In the text, and in a table."""
    for rule, old, new in ((RULES[0], "36 % longer", "35 % longer"), (RULES[1], "**7.80 ms**", "**7.81 ms**")):
        changed = rule.found(PAGES[PERFORMANCE].replace(old, new)).groups()
        assert any(float(a) != round(b, len(a.partition(".")[2])) for a, b in zip(changed, rule.values(), strict=True))


def test_printed_blocks_are_those_of_the_record() -> None:
    block = re.search(r"^```\n(host time a call.*?)^```$", PAGES[PERFORMANCE], re.MULTILINE | re.DOTALL)[1]
    assert block.strip() == (RESULTS / "2026-11-29-cpu" / "launch_overhead.txt").read_text(encoding="utf-8").strip()


def test_what_is_said_of_device_files_is_true() -> None:
    """That none holds launch settings, and which operators the H200's gives to CUDA C++."""
    assert "(no file has any yet; the H200's names the faster backends)" in PAGES[PERFORMANCE]
    for path in devices.FOLDER.glob("*.json"):
        assert not json.loads(path.read_text(encoding="utf-8")).get("settings")
    chosen = devices.measured("NVIDIA H200")["backend"]
    assert [name for name, backend in chosen.items() if backend == "cuda"] == ["reorder_"]
    assert "on an H200 that is CUDA C++ for `reorder_`, Triton for all else" in PAGES[PERFORMANCE]


def test_the_readme_is_short() -> None:
    assert len(PAGES[README].split()) <= 2000


def test_the_answer_beside_the_picture_is_the_one_that_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"`dyrate (generate [^`]*) --plot docs/kept.webp`", PAGES[README])[1]
    assert main([*shlex.split(command), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    quoted = " ".join(line.removeprefix("> ") for line in PAGES[README].splitlines() if line.startswith("> "))
    assert printed["text"].strip() == quoted
    share = float(re.search(r"with (\S+) % of the visual tokens kept on average", PAGES[README])[1])
    assert abs(share - 100 * printed["kept_mean"]) < 0.5


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
