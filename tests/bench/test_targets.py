"""``bench.targets``: a sentence on each target, with the cause that the rows show. The rows here are made up."""

from __future__ import annotations

import json

import pytest

from bench import report, targets

RIGHT, WRONG = {"passed": True, "errors": {}}, {"passed": False, "errors": {}}
MHA, GQA = targets.heads("mha"), targets.heads("gqa")


def row(name, median, batch=32, visual=2880, heads=MHA, backend="triton", correct=RIGHT, measured=True, **facts):
    same = {"B": batch, "N": visual, "heads": heads, "group": "attention", "backend": backend, "note": None}
    return {**same, "name": name, "median_us": median, "correct": correct, "measurement": measured, "case": None, "share_of_copy": 0.9,
            "times_floor": 1.1, "floor_us": 0.9 * (median or 0), "bytes": 1000 * visual, **facts}  # fmt: skip


def said(rows, what, backend="triton"):
    (line,) = (line for line in targets.targets(rows) if line["what"].startswith(what) and line["backend"] == backend)
    assert set(line) == {"what", "backend", "target", "measured", "met", "says"}
    return line


def test_without_a_row_it_says_what_is_missing():
    lines = targets.targets([])
    assert len(lines) > 12 and all(line["met"] is None and line["says"].startswith("Not measured: ") for line in lines)
    note = [row("dense FlashInfer paged decode", None, note="skipped: flashinfer is not installed")]
    assert said(note, "the same against dense FlashInfer")["says"] == "Not measured: skipped: flashinfer is not installed."
    assert "no profile" in said([], "the decision in a captured step")["says"]
    assert "Qwen2.5-VL-7B at B=32" in said([], "Qwen2.5-VL-7B", "auto")["says"]


@pytest.mark.parametrize("change", [{"correct": WRONG}, {"measured": False}, {"correct": None}])
def test_only_measured_rows_that_are_right_count(change):
    good = row("dyrate decode_attention with statistics", 100.0, share_of_copy=0.96)
    assert said([good], "decode_attention with statistics")["met"] is True
    assert said([{**good, **row(good["name"], 100.0, **change)}], "decode_attention with statistics")["met"] is None


def test_the_share_of_the_copy_and_what_statistics_cost():
    rows = [
        row("dyrate decode_attention with statistics", 110.0, share_of_copy=0.91, floor_us=100.0),
        row("dyrate decode_attention", 104.0, floor_us=99.5),
    ]
    line = said(rows, "decode_attention with statistics")
    assert line["met"] is False and line["measured"] == 0.91
    assert line["says"] == (
        "Missed: 0.91 where >= 0.95 is asked; 10.0 us over its floor of 100.0: attention alone lies 4.5 over its own, statistics add 6.0."
    )
    cost = said(rows, "statistics on against off, MHA")
    assert cost["measured"] == pytest.approx(6 / 104)
    assert "6.0 us, of which what must move takes 0.5; no experiment 4" in cost["says"]
    case = {"case": "what statistics cost, mha B=32 N=2880"}
    pieces = [
        row("", us, **case, variant=name) for name, us in (("attention alone", 104.0), ("with mass", 105.0), ("with importance", 109.5))
    ]
    says = said(rows + pieces, "statistics on against off, MHA")["says"]
    assert says.endswith("by experiment 4 with mass +1.0 us, with importance +5.5 us.")
    assert said(rows, "statistics on against off, GQA")["met"] is None
    cheap = [row("dyrate decode_attention with statistics", 106.0), row("dyrate decode_attention", 104.0)]
    assert said(cheap, "statistics on against off, MHA")["says"].startswith("Met: 0.01923 where <= 0.03 is asked")


def grid(ours, theirs, heads=GQA):
    """Times of a fixed part and a rate: (us, us a row)."""
    return [
        row(name, fixed + slope * visual, batch, visual, heads)
        for name, (fixed, slope) in (("dyrate decode_attention", ours), ("dense torch SDPA", theirs))
        for batch, visual in targets.GRID
    ]


def test_against_sdpa_the_worst_shape_and_its_cause_are_told():
    line = said(grid((5.0, 0.01), (8.0, 0.01)), "attention, GQA")
    assert line["met"] is True and line["measured"] == pytest.approx((8 + 163.84) / (5 + 163.84))
    line = said(grid((9.0, 0.01), (5.0, 0.01)), "attention, GQA")
    assert line["met"] is False and line["measured"] == pytest.approx((5 + 5.76) / (9 + 5.76))
    assert "a launch costs 9.0 us against 5.0, and streams 100 GB/s against 100" in line["says"]
    assert "slower at B=1 N=576 0.73x, " in line["says"] and "not measured" not in line["says"]
    few = [one for one in grid((5.0, 0.01), (8.0, 0.01)) if one["N"] < 16384]
    line = said(few, "attention, GQA")
    assert line["met"] is None and line["says"].startswith("Not decided: at least") and "B=32 N=16384" in line["says"]
    few = [one for one in grid((9.0, 0.01), (5.0, 0.01)) if one["N"] < 16384]
    assert said(few, "attention, GQA")["met"] is False, "one shape that is slower decides it"
    assert said(grid((5.0, 0.01), (8.0, 0.01)), "attention, MHA")["met"] is None


def test_the_decision_alone_and_in_a_step():
    rows = [
        row("dyrate decision (decode_step minus attention with statistics)", 9.0),
        row("dyrate select_tokens", 7.0),
        row("dyrate predict_rate", 2.0),
    ]
    assert said(rows, "the decision on top")["says"].endswith("launch of its own, take select_tokens 7.0 us, predict_rate 2.0 us.")
    case = {"case": "a step of LLaVA-NeXT-7B, B=32 N=2880, 32 layers"}
    kernels = [row("", us, **case, variant=name) for name, us in (("all kernels", 6000.0), ("decide_kernel", 8.0), ("nvjet_x", 4000.0))]
    line = said(kernels, "the decision in a captured step")
    assert line["measured"] == 8.0 and line["met"] is False and "decide_kernel on its way" in line["says"]
    assert said(kernels[::2], "the decision in a captured step")["met"] is True, "nothing of it on the way"


def test_models_and_where_their_time_goes():
    facts = {"model": "LLaVA-NeXT-7B", "N": 2880, "floor_us": 5700.0}
    rows = [
        row("dyrate captured step, DyRate at 12.5 %, recoverable, fused", 7800.0, times_floor=1.36, **facts),
        row("dyrate captured step, dense (policy none), fused", 16500.0, times_floor=1.12, **facts),
    ]
    line = said(rows, "LLaVA-NeXT-7B, B=32", "auto")
    assert line["met"] is False and "2100 us over it; no profile in this record" in line["says"]
    against = said(rows, "the same against the dense model", "auto")
    assert against["measured"] == pytest.approx(16500 / 7800) and "takes 1.12 of its floor, this one 1.36" in against["says"]
    case = {"case": "a step of LLaVA-NeXT-7B, B=32 N=2880, 32 layers"}
    parts = {
        "all kernels": 7700.0,
        "nvjet_sm90": 5000.0,
        "few_rows_kernel": 500.0,
        "decode_attention_kernel": 1900.0,
        "rms_norm_kernel": 200.0,
    }
    kernels = [row("", us, **case, variant=name) for name, us in (parts | {"fill": 100.0}).items()]
    says = said(rows + kernels, "LLaVA-NeXT-7B, B=32", "auto")["says"]
    assert says.endswith(
        "by experiment 1 its kernels take 7700 us: matrix products 5500, attention 1900, norms, residuals, rotation 200, the rest 100."
    )
    small = {"model": "LLaVA-1.5-7B", "batch": 1, "visual": 576}
    one = [
        row("dyrate captured step, DyRate at 12.5 %, recoverable, fused", 3500.0, times_floor=1.12, **small),
        row("dyrate generate(), DyRate at 12.5 %, recoverable, fused", 3900.0, times_floor=1.25, **small),
    ]
    through = next(line for line in targets.targets(one) if "through generate()" in line["what"])
    assert through["met"] is False and "400 us beside the captured step" in through["says"]
    assert said(one, "LLaVA-1.5-7B, B=1, N=576, 12.5 %: captured", "auto")["met"] is True


def test_cuda_has_its_lines_and_one_against_triton():
    rows = grid((5.0, 0.01), (8.0, 0.01), MHA)
    rows += [row("dyrate cuda decode_attention", 2 * one["median_us"], one["B"], one["N"], MHA, "cuda") for one in rows[:9]]
    line = said(rows, "CUDA C++ against Triton, MHA", "cuda")
    assert line["measured"] == pytest.approx(0.5) and line["met"] is False
    assert "the worst is 0.50x" in line["says"] and "a launch costs 10.0 us against 5.0, and streams 50 GB/s against 100" in line["says"]
    assert said(rows, "CUDA C++ against Triton, GQA", "cuda")["met"] is None
    assert said(rows, "attention, MHA", "cuda")["met"] is False
    assert not any(line["backend"] == "cuda" for line in targets.targets(rows[:18]))


def test_the_report_says_the_sentences_and_takes_rows_of_experiments(tmp_path):
    case = {"case": "a step of LLaVA-NeXT-7B, B=32", "group": "experiment 1", "dtype": None}
    kernels = [row("a kernel", us, **case, variant=name) for name, us in (("all kernels", 6000.0), ("decide_kernel", 8.0))]
    (tmp_path / "experiments.json").write_text(json.dumps({"rows": kernels}))
    (tmp_path / "parts").write_text("")
    report.write(tmp_path, tmp_path / "parts", [tmp_path / "experiments.json", tmp_path / "none"])
    text = (tmp_path / "report.md").read_text()
    assert "- the decision in a captured step, LLaVA-NeXT-7B, B=32, N=2880 (us) (triton). Missed: 8 where <= 2 is asked" in text
    assert "## Rows: experiment" not in text
    older = json.loads((tmp_path / "report.json").read_text())
    for line in older["targets"]:
        del line["says"]
    assert targets.sentences(older["targets"]) == []


ASKED = {"model": "LLaVA-NeXT-7B", "batch": 32, "visual": 2880, "new_tokens": 256}
QUARTER = "dyrate generate(), DyRate at 12.5 %, pool of 25 %, fused"
UNPATCHED = "unpatched generate(), DynamicCache"
PEERS = {
    UNPATCHED: ("against unpatched generate()", 4.0),
    "unpatched generate(), StaticCache, compiled": ("against its compiled static cache", 2.0),
    "dyrate generate(), dense (policy none), fused": ("against dense under this patch", 1.8),
}  # fmt: skip


def request(name, images, **facts):
    """A row of a whole request; encode 100, prefill 900, decode 2000 ms where half is predicted."""
    times = {"encode_us": 1e5, "first_token_us": 1e6, "decode_us": 2e6}
    predicted = {f"predicted_{key}": us / 2 for key, us in times.items()}
    return row(name, 5000.0, **{**ASKED, "images_per_s": images, **times, **predicted, **facts})


def requests_said(rows, how):
    (line,) = (line for line in targets.targets(rows) if line["what"].startswith("whole requests") and line["what"].endswith(how))
    return line


@pytest.mark.parametrize("peer", PEERS)
def test_whole_requests_are_held_against_each_peer(peer):
    how, times = PEERS[peer]
    gate = {"correct": None} if peer == UNPATCHED else {}
    other = request(peer, 2.0, **gate)
    assert requests_said([request(QUARTER, 2.0 * times), other], how)["met"] is True
    line = requests_said([request(QUARTER, 2.0 * times - 0.1), other], how)
    assert line["met"] is False and line["measured"] == pytest.approx(times - 0.05)
    assert (
        f"prefill 900 ms where 450 is predicted, decode 2000 ms where 1000 is predicted ({QUARTER})" in line["says"]
        and peer in line["says"]
    )
    evict = request("dyrate generate(), DyRate at 25 %, evict", 100.0)
    assert requests_said([request(QUARTER, 1.0), evict, other], how)["measured"] == 50.0, "the better one of pool and evict"
    for none in (
        request(f"{QUARTER}, behind tome:keep=0.5", 100.0), request(QUARTER, 100.0, new_tokens=64), request(QUARTER, 100.0, correct=WRONG),
        request(QUARTER, 100.0, measured=False), request("dyrate generate(), DyRate at 12.5 %, evict, fused", 100.0),
    ):  # fmt: skip
        line = requests_said([none, other], how)
        assert line["met"] is None and "no row of ours there; bench/gpu.sh OUT --only end_to_end --config llava-next-7b" in line["says"]
    assert f"no row of {peer.removesuffix(', fused')} there" in requests_said([request(QUARTER, 1.0)], how)["says"]
    if peer != UNPATCHED:
        assert requests_said([request(QUARTER, 100.0), request(peer, 2.0, correct=WRONG)], how)["met"] is None


def test_no_switch_is_held_against_the_best_switches():
    name = "dyrate generate(), DyRate at 12.5 %, recoverable"

    def found(*rows):
        return said(list(rows), "patch(model) with no switch", "auto")

    plain, fused = request(name, 5.0), request(f"{name}, fused", 10.0)
    assert found(plain, fused)["met"] is None
    assert found(plain, fused, request(f"{name}, no switch", 9.9))["measured"] == pytest.approx(0.99)
    line = found(plain, fused, request(f"{name}, no switch", 9.0, path="eager steps (why)"))
    assert line["met"] is False and f"with eager steps (why); the best is {name}, fused" in line["says"]
    other = {"model": "LLaVA-1.5-7B", "batch": 1, "visual": 576}
    worse = [request(f"{name}, no switch", 5.0, **other), request(name, 10.0, **other)]
    line = found(plain, fused, request(f"{name}, no switch", 9.9), *worse)
    assert line["measured"] == 0.5 and "the worst of 2 requests" in line["what"] and "at LLaVA-1.5-7B, B=1" in line["says"]


def test_host_time_is_what_a_token_takes_beside_its_captured_step():
    def found(step, token, **facts):
        label = "DyRate at 12.5 %, recoverable, fused"
        small = {"model": "LLaVA-1.5-7B", "batch": 1, "visual": 576, **facts}
        rows = [row(f"dyrate captured step, {label}", step, **small), row(f"dyrate generate(), {label}", token, **small)]
        return said(rows, "host time of a token", "auto")

    assert found(910.0, 1000.0)["met"] is True and found(910.0, 1000.0)["measured"] == pytest.approx(0.09)
    line = found(800.0, 1000.0)
    assert line["met"] is False and "LLaVA-1.5-7B, B=1" in line["says"]
    assert found(800.0, 1000.0, correct=WRONG)["met"] is None
