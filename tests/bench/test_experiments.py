"""``bench.experiments``: the runner, its table and what it proposes, with calls and times that are made up."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch

from bench.experiments import chain, counters, generations, problems, propose, registry, runner, sanitizers, session, table, whole
from bench.experiments.__main__ import NUMBERS
from bench.experiments.runner import BASE, FAILED, FASTER, NOT_REACHED, SAME, SLOWER, WRONG, Case, Context, Experiment, Planned, Variant
from dyrate_kernels import devices
from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import cuda, layer_settings
from dyrate_kernels.triton_kernels import plan

KEY = "gn-d128-b2-list"
ROUNDS = (1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0)  # of a machine that is not quite still


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A folder of device files of its own, and rows that count as measured."""
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    facts = {**timing.environment(), "gpu": "ACME GPU", "measurement": True}
    monkeypatch.setattr(timing, "environment", lambda: facts)
    forget()
    yield
    forget()


def forget():
    for cached in (devices.measured, plan.settings):
        cached.cache_clear()


def right(got, number):
    return timing.correctness(0.0, off=float(got != 1))


def planned(name, speeds, changes, section="settings", key=KEY, wrong=(), broken=(), right=right):
    """A case whose variants take ``speeds`` and leave 1, or 2 where they are wrong."""

    def call(variant):
        def run():
            if variant in broken:
                raise RuntimeError("out of resource: shared memory\nRequired: 1")
            return 2 if variant in wrong else 1

        return run

    def make(context):
        names = {"as it is": {}, **changes}
        variants = [Variant(one, [call(one)] * 2, right, change) for one, change in names.items()]
        context.speeds = {id(variant.calls): speed for variant, speed in zip(variants, speeds, strict=True)}
        return Case(variants, 1000, {"B": 1}, dataclasses.asdict(plan.Settings(block_n=64)))

    return Planned(name, make, section, key)


def clock(context, speeds):
    """Series of made-up seconds: those that the case's variants are said to take, in their order."""
    return lambda work, budget: [[speed * share for share in ROUNDS] for speed in [*speeds[: len(work) - 1], speeds[0]]]


def rows_of(*cases, number=7, deadline=float("inf")):
    """Rows of an experiment of (planned case, speeds of those variants that are timed)."""
    found = []
    context = Context(True, 1e9, deadline)
    for one, speeds in cases:
        context.clock = clock(context, speeds)
        context.number = number
        found += list(runner.compare(context, one, 1.0))
    return found


WAVES = {"2 waves": {"waves": 2}}


def test_a_clear_win_is_proposed_and_the_launcher_takes_it(tmp_path):
    rows = rows_of((planned("a", (1, 1), WAVES), (10e-6, 8e-6)), (planned("b", (1, 1), WAVES), (20e-6, 19e-6)))
    assert [row["verdict"] for row in rows] == [BASE, FASTER, BASE, FASTER]
    assert [row["ratio"] for row in rows] == [1.0, 0.8, 1.0, 0.95]
    path, body = propose.write(tmp_path, rows, "ACME GPU")
    assert path == tmp_path / "ACME_GPU.json" and json.loads(path.read_text()) == body
    forget()
    assert devices.measured("ACME GPU")["settings"].keys() == {KEY}
    chosen = plan.settings("ACME GPU", 7, 128, 2, "list")
    assert chosen == plan.Settings(block_n=64, waves=2), "the base's settings stay where nothing was changed"
    figures = body["figures"]["settings"][KEY]
    assert figures["ratio"] == pytest.approx((0.8 * 0.95) ** 0.5, abs=1e-4) and figures["experiment"] == 7
    assert figures["cases"]["a"] == {"base_us": 10.0, "us": 8.0, "ratio": 0.8}


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ((planned("b", (1, 1), WAVES), (20e-6, 19.95e-6)), None),
        ((planned("b", (1, 1), WAVES), (20e-6, 22e-6)), "slower in b"),
        ((planned("b", (1, 1), WAVES, wrong=("2 waves",)), (20e-6,)), "a result was wrong"),
        ((planned("b", (1, 1), WAVES, broken=("2 waves",)), (20e-6,)), "it did not run in every case"),
        ((planned("b", (1, 1), WAVES, wrong=("as it is",)), (19e-6,)), "it did not run in every case"),
    ],
)
def test_one_case_can_speak_against_a_change(tmp_path, second, why):
    rows = rows_of((planned("a", (1, 1), WAVES), (10e-6, 8e-6)), second)
    (candidate,) = propose.candidates(rows)
    assert candidate.against == why
    path, body = propose.write(tmp_path, rows, "ACME GPU")
    assert (path is None) == (why is not None) and ("settings" in body) == (why is None)


def test_noise_is_no_gain():
    """Neither a small difference nor one as large as the base's from itself."""
    rows = rows_of((planned("a", (1, 1), WAVES), (10e-6, 9.97e-6)))
    assert rows[1]["verdict"] == SAME and propose.chosen(rows) == []
    context = Context(True, 1e9, clock=lambda work, budget: [[10e-6] * 7, [9.2e-6] * 7, [11e-6] * 7])
    rows = list(runner.compare(context, planned("a", (1, 1), WAVES), 1.0))
    assert rows[1]["verdict"] == SAME and rows[1]["noise"] == pytest.approx(0.1) and propose.chosen(rows) == []
    uneven = [9e-6, 9e-6, 9e-6, 9e-6, 12e-6, 12e-6, 12e-6]
    assert runner.judge([10e-6] * 7, uneven, 0.005)["verdict"] == SAME, "faster in four rounds of seven"
    assert runner.judge([10e-6] * 7, [11e-6] * 7, 0.005)["verdict"] == SLOWER


def test_the_table_tells_what_is_proposed_from_what_another_change_beat():
    changes = {"2 waves": {"waves": 2}, "both": {"waves": 2, "min_blocks": 4}, "other": {"most_splits": 8}}
    rows = rows_of((planned("a", (1, 1, 1, 1), changes), (10e-6, 9e-6, 7e-6, 8e-6)))
    assert propose.chosen(rows)[0].changes == changes["both"]
    text = table.markdown(rows, [], list(propose.candidates(rows)), "ACME_GPU.json")
    fates = {line.split(" | ")[2]: line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| settings |")}
    assert fates == {
        "waves=2": "part of what is proposed |",
        "waves=2, min_blocks=4": "proposed |",
        "most_splits=8": "faster, but another change is proposed |",
    }


def test_what_is_wrong_has_no_speed_and_fails_the_run(tmp_path, capsys, monkeypatch):
    rows = rows_of((planned("a", (1, 1, 1), {**WAVES, "4": {"waves": 4}}, wrong=("4",)), (10e-6, 8e-6)))
    assert [row["median_us"] is None for row in rows] == [False, False, True] and rows[2]["verdict"] == WRONG
    assert propose.chosen(rows)[0].changes == {"waves": 2}
    text = table.markdown(rows, [], list(propose.candidates(rows)), "ACME_GPU.json")
    line = next(line for line in text.splitlines() if line.startswith("| 7 | a | 4 |"))
    assert "| NO | WRONG; wrong, so it has no speed" in line
    assert "a result was wrong" in text and "waves=2 | 7 | 0.8 | 0.5 % | 1 | proposed |" in text
    monkeypatch.setattr(registry, "EXPERIMENTS", [Experiment(2, "one", 1, lambda toy: [planned("a", (1, 1), WAVES, wrong=("2 waves",))])])
    monkeypatch.setattr(runner.clock, "interleaved", None)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: (1e9, None))
    monkeypatch.setattr(session, "compile_all", lambda *args, **more: None)
    context_clock = clock(None, (10e-6,))
    monkeypatch.setattr(runner.Context.__init__, "__defaults__", (None, float("inf"), None, context_clock))
    assert session.measure(tmp_path, [2], True, 100.0) == 1
    assert "not good: a: 2 waves: wrong" in capsys.readouterr().out


def test_logits_in_float16_are_held_to_what_they_can_be():
    """And to the usual limit in everything else."""
    for errors, passed in (({"output": 0.0, "importance": 1e-3}, True), ({"output": 1e-3, "importance": 0.0}, False),
                           ({"output": 0.0, "mass": 3e-3}, False), ({"output": 0.0, "kept_wrong": 1.0}, False),
                           ({"output": 0.0, "importance": float("nan")}, False)):  # fmt: skip
        found = timing.correctness(1e-5, **errors)
        assert problems.logits_in_float16(lambda got, number, found=found: found)(None, 0)["passed"] == passed, errors


def test_a_gate_looks_once_more_after_the_clock():
    """A result that changes under replays is seen."""
    seen = []

    def gate(got, number):
        seen.append(number)
        return timing.correctness(0.0, off=float(len(seen) > 3))  # two gates before, one after it

    rows = rows_of((planned("a", (1, 1), WAVES, right=gate), (10e-6, 8e-6)))
    assert [row["correct"]["passed"] for row in rows] == [True, False] and seen == [0, 0, 1, 1]
    assert rows[1]["median_us"] is None and rows[1]["verdict"] == WRONG


def test_a_base_that_does_not_run_gives_no_ratio():
    rows = rows_of((planned("a", (1, 1), WAVES, broken=("as it is",)), (8e-6, 8e-6)))
    assert rows[0]["verdict"] == FAILED and rows[0]["fails"] and rows[0]["note"] == "RuntimeError: out of resource: shared memory"
    assert rows[1]["ratio"] is None and propose.chosen(rows) == []


def test_a_base_that_is_wrong_after_the_clock_gives_no_ratio():
    calls = []

    def gate(got, number):
        calls.append(number)
        return timing.correctness(0.0, off=float(len(calls) == 3))  # the base's second look

    rows = rows_of((planned("a", (1, 1), WAVES, right=gate), (10e-6, 8e-6)))
    assert rows[0]["verdict"] == WRONG and rows[1]["ratio"] is None and rows[1]["verdict"] is None
    assert propose.chosen(rows) == []


def test_time_that_is_over_is_said_and_what_one_leaves_goes_to_the_next(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def takes(seconds):
        def make(context):
            now[0] += seconds
            return Case([Variant("as it is", [lambda: 1], right)])

        return make

    def experiment(number, share, *seconds):
        return Experiment(number, "", share, lambda toy: [Planned(f"{number}{place}", takes(one)) for place, one in enumerate(seconds)])

    context = Context(True, 1e9, deadline=100.0, clock=clock(None, (1e-6,)))
    rows = []
    done = runner.run([experiment(1, 30, 5), experiment(2, 10, 10, 10, 10), experiment(3, 60, 30, 20, 50, 1)], context, rows.append)
    assert [one["budget"] for one in done] == [30.0, pytest.approx(95 / 7, abs=0.1), 75.0]
    said = [(row["name"], row["verdict"]) for row in rows]
    assert said == [("10: as it is", BASE), ("20: as it is", BASE), ("21: as it is", BASE), ("22", NOT_REACHED),
                    ("30: as it is", BASE), ("31: as it is", BASE), ("32: as it is", BASE), ("33", NOT_REACHED)]  # fmt: skip
    text = table.markdown(rows, done, [], None)
    assert "Not reached: 1 of experiment 2, 1 of experiment 3." in text and "| 3 | 33 |" in text


def test_a_key_with_a_case_that_was_not_reached_gets_nothing():
    context = Context(True, 1e9)
    context.number = 7
    left_out = context.row("b", None, case="b", verdict=NOT_REACHED, section="settings", key=KEY)
    rows = rows_of((planned("a", (1, 1), WAVES), (10e-6, 8e-6)))
    assert len(propose.chosen(rows)) == 1 and propose.chosen([*rows, left_out]) == []


def test_an_experiment_that_fails_does_not_stop_the_others(capsys):
    def broken(context):
        raise RuntimeError("no such thing")
        yield

    rows = []
    context = Context(True, 1e9, clock=clock(None, (1e-6,)))
    fine = Experiment(2, "fine", 1, lambda toy: [Planned("a", lambda context: Case([Variant("as it is", [lambda: 1], right)]))])
    runner.run([Experiment(1, "broken", 1, rows=broken), fine], context, rows.append)
    assert [row["verdict"] for row in rows] == [FAILED, BASE] and rows[0]["fails"] and "no such thing" in rows[0]["note"]


def test_winners_of_several_experiments_are_confirmed_together(tmp_path):
    first = rows_of((planned("a", (1, 1), WAVES), (10e-6, 8e-6)))
    second = rows_of((planned("a", (1, 1), {"8192": {"combined": 8192, "waves": 1}}), (10e-6, 9e-6)), number=9)
    (found,) = propose.winners(first + second).values()
    assert [one.experiment for one in found] == [7, 9] and propose.together(found) == {"combined": 8192, "waves": 2}
    (chosen,) = propose.chosen(first + second)
    assert chosen.changes == {"waves": 2}, "two changes that nobody measured together are not proposed together"
    both = {"the best alone": {"waves": 2}, "together": propose.together(found)}
    third = rows_of((planned("c", (1, 1, 1), both), (10e-6, 8e-6, 7e-6)), number=propose.CONFIRMING)
    assert propose.chosen(first + second + third)[0].changes == {"combined": 8192, "waves": 2}
    worse = rows_of((planned("c", (1, 1, 1), both), (10e-6, 8e-6, 8.5e-6)), number=propose.CONFIRMING)
    assert propose.chosen(first + second + worse)[0].changes == {"waves": 2}
    cases = registry.confirming(first + second).cases(True)
    assert cases == [], "no toy problem has that key"
    key = problems.key_of(problems.shape(True, "gqa", 1, 24), "list")
    rows = [row | {"key": key} for row in first + second]
    assert [one.key for one in registry.confirming(rows).cases(True)] == [key]


def test_switches_and_products_stand_where_they_are_read_and_what_is_shipped_stays(tmp_path):
    shipped = {"backend": {"compact_": "cuda"}, "settings": {"other": {"waves": 1}}, "layers": {"products": {"gated 8x8": []}}}
    (tmp_path / "ACME_GPU.json").write_text(json.dumps(shipped))
    both = {"both": chain.DEPENDENT | {"residual_norm": True}}
    switch = planned("chain", (1, 1), both, propose.SWITCHES, chain.KEY)
    tiles = {"4 splits": {"tile": {"splits": 4}}}
    few = [planned(f"product {rows}", (1, 1), tiles, propose.PRODUCTS, f"linear 64x32, {rows} rows") for rows in (64, 2, 8, 16)]
    speeds = [(10e-6, 5e-6), (10e-6, 9e-6), (10e-6, 9e-6), (10e-6, 10e-6)]
    rows = rows_of((switch, (10e-6, 9e-6)), (planned("a", (1, 1), WAVES), (10e-6, 8e-6)), *zip(few, speeds, strict=True))
    body = propose.device_file(rows, "ACME GPU", {})
    assert body["dependent_launch"] is True and body["backend"] == {"compact_": "cuda"}
    assert body["settings"].keys() == {"other", KEY} and body["figures"].keys() == {"settings", "switches", "products"}
    native = planned("native", (1, 1), {"4 stages": {"stages": 4}}, propose.CUDA, "attention")
    assert propose.device_file(rows_of((native, (10e-6, 8e-6))), "ACME GPU", {})["cuda"] == {"stages": 4}
    ranges = [(2, 2), (5, 8), (33, 64)]
    assert [tuple(one["rows"]) for one in body["layers"]["products"]["linear 64x32"]] == ranges
    read = layer_settings.LayerSettings.from_file(body["layers"])
    assert read.residual_norm and not read.norm_prologue
    tile = layer_settings.Tile(splits=4)
    assert [read.tile("linear", 64, 32, rows) for rows in (1, 2, 3, 5, 8, 9, 33, 64)] == [None, tile, None, tile, tile, None, tile, tile]


def test_switches_together_are_not_proposed_where_one_of_them_is_slower_or_wrong():
    changes = {"one": {"dependent_launch": True}, "both": {"dependent_launch": True, "residual_norm": True}}
    first = (planned("chain", (1, 1, 1), changes, propose.SWITCHES, chain.KEY), (10e-6, 9e-6, 8e-6))
    step = planned("step", (1, 1), {"one": changes["one"]}, propose.SWITCHES, chain.KEY)
    assert propose.chosen(rows_of(first))[0].changes == changes["both"]
    assert propose.chosen(rows_of(first, (step, (10e-6, 11e-6)))) == []
    assert propose.chosen(rows_of(first, (step, (10e-6, 10e-6))))[0].changes == changes["both"]


def test_every_experiment_of_the_issue_is_there_and_fits_its_time():
    assert sorted(one.number for one in registry.EXPERIMENTS) == sorted(registry.ORDER)
    assert {one.number for one in registry.EXPERIMENTS} <= set(NUMBERS) and propose.CONFIRMING not in NUMBERS
    beside = sum(one.seconds for one in registry.EXPERIMENTS if one.beside_compiling)
    assert beside <= session.COMPILING and sum(one.seconds for one in registry.EXPERIMENTS) - beside <= 470 - session.COMPILING + 120
    for one in registry.EXPERIMENTS:
        for toy in (True, False):
            cases = one.cases(toy) if one.cases else []
            assert bool(cases) != bool(one.rows), one.title
            names = [case.name for case in cases]
            assert len(set(names)) == len(names), "a case is named once"
            assert all((case.section is None) == (case.key is None) for case in cases)


def test_every_change_is_one_that_the_launcher_takes():
    """On real shapes, whose cases are not made here."""
    tried = 0
    for one in registry.EXPERIMENTS:
        for case in one.cases(False) if one.cases else []:
            assert case.section in (None, "settings", propose.SWITCHES, propose.PRODUCTS, propose.CUDA)
            if case.section == propose.PRODUCTS:
                assert all(layer_settings.Tile(**change["tile"]) for change in case.changes.values())
                problem = case.key.split(", ")[0]
                assert layer_settings.LayerSettings.from_file({"products": {problem: [{"rows": [2, 2]}]}}).tile
            if case.section == propose.CUDA:
                assert case.changes and all(cuda.Settings(**change) != cuda.Settings() for change in case.changes.values())
            if case.section == "settings":
                assert case.changes and "as it is" not in case.changes
                for change in case.changes.values():
                    assert plan.Settings(**change) != plan.Settings()
                    tried += 1
    assert tried > 50


def lengths(cases, wrong=(), missing=()):
    """Rows of experiment 14: (new tokens, ratio of each of two models)."""
    context, found = Context(True, 1e9), []
    context.number = 14
    for new_tokens, *ratios in cases:
        for model, ratio in zip("ab", ratios, strict=True):
            about = {"case": f"{new_tokens} of {model}", "section": propose.CAPTURE, "key": propose.CAPTURE, "new_tokens": new_tokens}
            if (new_tokens, model) in missing:
                found.append(context.row("x", None, verdict=NOT_REACHED, **about))
                continue
            ways = [
                generations.Way("eager steps", {}, lambda: 1.0),
                generations.Way("captured steps", {propose.CAPTURE: new_tokens}, lambda ratio=ratio: ratio),
            ]
            gate = timing.correctness(0.0, off=float((new_tokens, model) in wrong))
            found += generations.compared(context, ways, gate, 0.0, **about)
    return found


@pytest.mark.parametrize(
    ("cases", "more", "want"),
    [
        ([(16, 0.5, 0.6), (8, 0.9, 0.8), (4, 0.95, 1.2), (2, 1.5, 2.0)], {}, 8),
        ([(16, 0.5, 0.6), (8, 0.9, 1.0), (4, 0.9, 0.9)], {}, 16),
        ([(4, 0.9, 0.9), (16, 0.5, 0.6)], {}, 4),
        ([(16, 0.5, 0.6), (8, 0.9, 0.8), (4, 0.9, 0.9)], {"missing": [(4, "b")]}, 8),
        ([(16, 0.5, 0.6), (8, 0.9, 0.8), (4, 0.9, 0.9)], {"wrong": [(8, "a")]}, 16),
        ([(16, 0.5, 1.1), (8, 0.9, 0.8)], {}, "not faster: 16 of b"),
        ([(16, 0.5, 0.5), (8, 0.9, 0.8)], {"missing": [(16, "a")]}, "a case was not reached"),
        ([(16, 0.5, 0.5), (8, 0.9, 0.8)], {"wrong": [(16, "a")]}, "a result was wrong"),
    ],
)
def test_from_how_many_tokens_on_a_capture_is_proposed(tmp_path, cases, more, want):
    rows = lengths(cases, **more)
    (one,) = propose.candidates(rows)
    path, body = propose.write(tmp_path, rows, "ACME GPU")
    if isinstance(want, str):
        assert one.against == want and path is None and "capture_from" not in body
    else:
        assert one.against is None and body["capture_from"] == want
        forget()
        assert devices.measured("ACME GPU")["capture_from"] == want
        assert body["figures"]["capture_from"]["capture_from"]["experiment"] == 14
        assert all(int(case.split()[0]) >= want for case in one.cases)
    assert "capture_from=" in table.markdown(rows, [], [one], None)


@pytest.mark.parametrize(("ratios", "proposed"), [((0.9, 1.0), True), ((0.9, 1.1), False), ((1.0, 1.0), False)])
def test_the_decision_aside_is_proposed_where_it_is_slower_in_no_case(tmp_path, ratios, proposed):
    context, rows = Context(True, 1e9), []
    context.number = 15
    for ratio in ratios:
        ways = [
            generations.Way("in its place", {}, lambda: 1.0),
            generations.Way("aside", {propose.ASIDE: True}, lambda ratio=ratio: ratio),
        ]
        about = {"case": f"case {len(rows)}", "section": propose.SWITCHES, "key": propose.ASIDE}
        rows += generations.compared(context, ways, right(1, 0), 0.0, **about)
    body = propose.device_file(rows, "ACME GPU", {})
    assert body.get("decision_aside", False) is proposed and "decision_aside" not in body.get("layers", {})


def test_ways_take_turns_and_the_first_one_once_more():
    calls, context = [], Context(False, 1e9)
    ways = [generations.Way(name, {}, lambda name=name: calls.append(name) or 1.0) for name in ("a", "b")]
    rows = list(generations.compared(context, ways, right(1, 0), 0.0, case="c"))
    assert calls == ["a", "b", *["a", "b", "a"] * generations.ROUNDS[0]]
    assert [row["verdict"] for row in rows] == [BASE, SAME] and rows[0]["median_us"] == 1e6
    assert [row["median_us"] for row in generations.compared(context, ways, right(2, 0), 0.0, case="c")] == [None, None]


@pytest.mark.parametrize("rows_of_one", [generations.captures, generations.decisions])
def test_generations_are_rehearsed_and_a_wrong_one_has_no_speed(monkeypatch, rows_of_one):
    context = Context(True, 1e9)
    rows = list(rows_of_one(context))
    assert len(rows) == (4 if rows_of_one is generations.captures else 6)
    assert all(row["correct"]["passed"] and row["median_us"] and row["B"] == 1 and row["layers"] for row in rows)
    answer = generations.decoding.answer

    def off(model, fields, like=None, new_tokens=None, **more):
        found = answer(model, fields, like, new_tokens, **more)
        return found if like is None else found._replace(logits=tuple(logits * 1.1 for logits in found.logits))

    monkeypatch.setattr(generations.decoding, "answer", off)
    assert {(row["verdict"], row["median_us"]) for row in rows_of_one(context)} == {(WRONG, None)}
    context.deadline = time.monotonic() - 1
    assert {row["verdict"] for row in rows_of_one(context)} == {NOT_REACHED}


NCU = """some line of the program
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","decode_attention_kernel","dram__bytes_read.sum","byte","1,577,058,304"
"0","1","decode_attention_kernel","gpu__time_duration.sum","nsecond","370,000"
"1","1","decide_kernel","dram__bytes_write.sum","byte","128"
"1","1","decide_kernel","unknown","byte","1"
"""


def test_counters_are_read_off_ncu():
    assert counters.parse(NCU) == [
        ("decode_attention_kernel", {"dram__bytes_read.sum": 1577058304.0, "gpu__time_duration.sum": 370000.0}),
        ("decide_kernel", {"dram__bytes_write.sum": 128.0}),
    ]
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM - no permission") == []
    assert counters.why_not("x\n==ERROR== ERR_NVGPUCTRPERM - no permission\n").startswith("==ERROR== ERR_NVGPUCTRPERM")
    context = Context(True, 1e9)
    rows = list(counters._rows(context, counters.parse(NCU), {"case": "c"}))
    assert rows[0]["median_us"] == 370.0 and rows[1]["median_us"] is None and rows[1]["note"] == "dram__bytes_write.sum 128"


def test_what_a_sanitizer_says():
    clean = "========= COMPUTE-SANITIZER\nok     triton\n========= RACECHECK SUMMARY: 0 hazards displayed\n"
    assert sanitizers.said(clean, 0) == {"verdict": sanitizers.CLEAN, "note": "RACECHECK SUMMARY: 0 hazards displayed"}
    found = sanitizers.said("========= Error: Race reported\n========= RACECHECK SUMMARY: 1 hazard\n", 9)
    assert found["verdict"] == WRONG and "Race reported" in found["note"]
    assert sanitizers.said("Error: Device not supported", 1)["verdict"] == sanitizers.SKIPPED
    assert sanitizers.results("ok     a\nok     b\n")["passed"] and not sanitizers.results("ok     a\nWRONG  b\n")["passed"]
    assert not sanitizers.results("")["passed"], "nothing compared is nothing passed"


def test_a_step_is_profiled_kernel_by_kernel():
    class Event:
        def __init__(self, key, total, count):
            self.key, self.self_device_time_total, self.self_cpu_time_total, self.count = key, total, 0, count

    events = [Event("small", 6.0, 6), Event("nothing", 0.0, 6), Event("large", 600.0, 12)]
    assert whole.kernels(events, 6, cuda=True) == [("large", 100.0, 2.0), ("small", 1.0, 1.0)]
    profiled = whole.Profiled(2, 3)
    for _ in range(8):
        torch.ones(2) + 1
        profiled(None, torch.ones(1))
    assert sum(event.count for event in profiled.profiler.key_averages() if event.key == "aten::add") == 3
