"""``dyrate bench e2e`` at toy size: what it prints and writes, its floor, its gate, and the search for the largest batch."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from dyrate_kernels import policies, specs
from dyrate_kernels.cli.main import main
from dyrate_kernels.generation import cpu_step
from dyrate_kernels.generation.session import Session
from dyrate_kernels.measuring import decoding, end_to_end, random_models, timing
from dyrate_kernels.ops import reference

ROOT = Path(__file__).parents[2]
FAST = ["--rounds", "1", "--max-new-tokens", "12", "--json"]


@pytest.fixture(autouse=True, scope="module")
def bandwidth_measured_once():
    """256 MiB are copied again and again for it: seconds in every command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "copy_bandwidth", functools.cache(timing.copy_bandwidth))
        yield


def rows_of(capsys, *arguments: str, status: int = 0) -> dict:
    assert main(["bench", "e2e", *FAST, *arguments]) == status
    return json.loads(capsys.readouterr().out)


def test_every_set_up_is_measured_beside_its_floor(capsys, tmp_path):
    out = tmp_path / "rows.json"
    told = rows_of(capsys, "--config", "toy", "--batch", "1", "3", "--out", str(out))
    assert json.loads(out.read_text()) == told["rows"]
    rows = [row for row in told["rows"] if row["group"] == "model"]
    assert len(rows) == 2 * (7 + ("pool" in specs.RETENTIONS)) and all(row["median_us"] > 0 and row["first_token_us"] > 0 for row in rows)
    assert {row["B"] for row in rows} == {1, 3}
    names = {row["name"] for row in rows}
    assert end_to_end.UNPATCHED in names and "dyrate generate(), schedule, evict" in names
    assert any("StaticCache" in name for name in names) and any("FastV" in name for name in names)
    for row in rows:
        assert row["p20_us"] <= row["p80_us"]
        assert row["tokens_per_s"] == pytest.approx(1e6 * row["B"] / row["median_us"], rel=1e-3)
        assert row["images_per_s"] == pytest.approx(1e6 * row["B"] * 5 / row["request_us"], rel=1e-3)
        assert row["request_tokens_per_s"] == pytest.approx(1e6 * row["B"] * 12 / row["request_us"], rel=1e-3)
        assert 0 < row["encode_us"] < row["first_token_us"] < row["first_token_us"] + row["decode_us"] <= row["request_us"] + 0.01
        if row["name"] != end_to_end.UNPATCHED:
            assert row["correct"]["passed"]
    evict, dense = (next(r for r in rows if r["name"] == f"dyrate generate(), {n}") for n in ("schedule, evict", "dense (policy none)"))
    assert evict["kv_live_bytes"] < dense["kv_live_bytes"] <= dense["kv_reserved_bytes"]
    assert evict["kept_by_step"] == [0.5] * 5 + [0.25] * 5 + [0.1] * 2
    assert evict["kept"] == pytest.approx((5 * 0.25 + 2 * 0.1) / 7), "of steps 5 to 11, whose times count"
    assert "dyrate generate(), FastV at 20.7 %, evict" in names
    assert len(told["verdicts"]) == len(rows) - 4 and all("unpatched model" in line for line in told["verdicts"])


def test_the_committed_rows_of_a_gpu_are_shown(capsys):
    """They hold what a CPU's never do: captured steps, a captured twin that knows no kept share."""
    from dyrate_kernels.cli import bench

    rows = json.loads((ROOT / "bench" / "results" / "2026-11-27-h200" / "e2e.json").read_text())
    bench._show(rows, rows[0]["GB_per_s"] * 1e9)
    shown = capsys.readouterr().out
    assert "NVIDIA H200" in shown and "as fast a token as the unpatched model" in shown
    assert shown.count("6.95") >= 1 and "3.95" in shown  # the twin's milliseconds and a captured step's


def test_floor_is_recomputed_from_the_config(capsys):
    """Weights and rows from the shape's numbers: 4 layers, 2 heads of 16, width 32, gated MLP of 64, 200 words, float32."""
    told = rows_of(capsys, "--config", "toy", "--text", "10", "--policy", "fixed:k=2:rate=0.75")
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    weights = 4 * (4 * layer + 32 + 32 * 200)
    text = 10 + (4 + 11) / 2  # the prompt's, and the mean of what those of eleven steps add whose times count, all but four
    for row in told["rows"]:
        if row["group"] != "model":
            continue
        kept = 20.0 if row["name"].startswith("unpatched") or "dense" in row["name"] else 5.0
        k = 3 if "dense" in row["name"] else 2
        rows = k * (20 + text) + (4 - k) * (kept + text)
        expected = weights + 2 * 4 * 2 * 16 * rows
        assert row["bytes"] == pytest.approx(expected, abs=1), row["name"]
        assert row["floor_us"] == pytest.approx(1e6 * expected / (told["bandwidth_GB_per_s"] * 1e9), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("config", ["toy-onevision", "toy-qwen", "bundled"])
def test_other_models(capsys, config):
    told = rows_of(capsys, "--config", config, "--policy", "fastv:k=2:rate=0.5")
    rows = [row for row in told["rows"] if row["group"] == "model"]
    assert {row["N"] for row in rows} == {{"toy-onevision": 24, "toy-qwen": 20, "bundled": 144}[config]}
    assert all(row["median_us"] for row in rows)
    assert sum("FastV" in row["name"] for row in rows) == 0, "the policy itself is FastV: one is enough"


def test_what_is_wrong_has_no_speed(capsys, monkeypatch):
    monkeypatch.setattr(cpu_step.CpuStep, "attend", lambda self, layer, query, *_: torch.zeros_like(query).transpose(1, 2))
    told = rows_of(capsys, "--config", "toy", "--vision", "uniform:keep=0.5", status=1)
    ours = [row for row in told["rows"] if row["name"].startswith("dyrate")]
    assert ours and all(row["median_us"] is None and "no speed" in row["note"] for row in ours)
    assert told["verdicts"] == []
    assert main(["bench", "e2e", *FAST[:-1], "--config", "toy"]) == 1
    printed = capsys.readouterr().out
    assert "not measured" in printed and "as fast" not in printed
    assert f"{ours[0]['name']}: {ours[0]['note']}\n" in printed, "the note is whole, on a line of its own"


def moves_nothing(rows, kept, n_kept, n_visual):
    pass


def moves_the_wrong_rows(rows, kept, n_kept, n_visual, right=reference.compact_):
    right(rows, torch.where(kept < 0, kept, (kept - 1).clamp(min=0)), n_kept, n_visual)


def moves_only_the_list(rows, kept, n_kept, n_visual, right=reference.compact_):
    right([tensor for tensor in rows if tensor.dim() == 2], kept, n_kept, n_visual)


def forgets_the_last_buffer(rows, kept, n_kept, n_visual, right=reference.compact_):
    right(rows if len(rows) == 1 else rows[:-1], kept, n_kept, n_visual)


@pytest.fixture(scope="module")
def toy():
    model = random_models.build("toy", torch.device("cpu"))
    return model, random_models.inputs(model, 2, 20, 10)


@pytest.mark.parametrize("broken", [moves_nothing, moves_the_wrong_rows, moves_only_the_list, forgets_the_last_buffer])
def test_the_gate_sees_a_broken_compaction(monkeypatch, toy, broken):
    policy = end_to_end.falling_schedule(20, 2)
    assert decoding.compaction_error(*toy, 2, "reference") == 0.0
    monkeypatch.setattr(reference, "compact_", broken)
    gate = decoding.logits_gate(*toy, policy, "evict", "reference")
    assert not gate["passed"] and gate["errors"]["compacted_rows"] > 0.1
    assert decoding.logits_gate(*toy, policy, "recoverable", "reference")["passed"], "there nothing moves"


def test_a_broken_compaction_has_no_speed(capsys, monkeypatch):
    monkeypatch.setattr(reference, "compact_", moves_nothing)
    told = rows_of(capsys, "--config", "toy", status=1)
    speeds = {row["name"]: row["median_us"] for row in told["rows"] if row["name"].startswith("dyrate")}
    assert len(speeds) == 5 + ("pool" in specs.RETENTIONS) and all(
        (speed is None) == name.endswith("evict") for name, speed in speeds.items()
    )
    assert not any("evict" in line for line in told["verdicts"])


def test_the_gate_compares_with_the_unpatched_model_and_looks_at_every_shrink(monkeypatch, toy):
    policy = end_to_end.falling_schedule(20, 3)
    gate = decoding.logits_gate(*toy, policy, "evict", "reference")
    assert gate["passed"] and gate["steps_compared"] == 12 > policy.kept[-1][0]
    attend = Session.attend
    monkeypatch.setattr(Session, "attend", lambda self, *arguments: 1.5 * attend(self, *arguments))  # wrong in the same way everywhere
    for wrong in (policy, policies.KeepAll(k=3)):
        gate = decoding.logits_gate(*toy, wrong, "evict", "reference")
        assert not gate["passed"]
        assert [name for name, error in gate["errors"].items() if error > gate["limit"]] == ["keeping_all_of_unpatched"]


def test_a_difference_that_is_no_number_is_not_lost():
    tokens, numbers = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 4)
    got, want = (decoding.Answer(tokens, (numbers, bad, numbers)) for bad in (numbers * float("nan"), numbers))
    error, steps = decoding.difference(got, want)
    assert error != error and steps == 3 and not timing.correctness(1.0, logits=error)["passed"]


def test_a_static_cache_that_is_wrong_has_no_speed(capsys, monkeypatch):
    answer = decoding.answer

    def wrong(*arguments, **options):
        found = answer(*arguments, **options)
        return found._replace(logits=[2 * step for step in found.logits]) if "cache_implementation" in options else found

    monkeypatch.setattr(decoding, "answer", wrong)
    rows = {row["name"]: row for row in rows_of(capsys, "--config", "toy", status=1)["rows"]}
    static = next(row for name, row in rows.items() if "StaticCache" in name)
    assert static["median_us"] is None and "no speed: of_dynamic_cache 1" in static["note"] and not static["correct"]["passed"]
    assert rows[end_to_end.UNPATCHED]["median_us"]


def test_a_captured_twin_that_is_wrong_has_no_speed(monkeypatch, toy):
    problem = end_to_end.Problem("toy", toy[0], lambda batch: toy[1], 2, 4, "reference")
    right = end_to_end._twin_row(problem, toy[1], 1e9)
    assert right["median_us"] and right["correct"]["passed"]
    twin = decoding.static_twin

    def wrong(*arguments):
        times, first = twin(*arguments)
        return times, 2 * first

    monkeypatch.setattr(decoding, "static_twin", wrong)
    row = end_to_end._twin_row(problem, toy[1], 1e9)
    assert row["median_us"] is None and row["GB_per_s"] is None and not row["correct"]["passed"] and "no speed" in row["note"]


@pytest.mark.parametrize(("tokens", "first"), [(2, 1), (3, 2), (9, 2), (10, 5), (64, 5)])
def test_shares_are_of_the_steps_whose_times_count(tokens, first):
    timeline = decoding.Timeline(0.0, tuple(float(token) ** 2 for token in range(tokens)), tokens**2 + 1.0)
    gaps = timeline.gaps()
    assert gaps == [step**2 - (step - 1) ** 2 for step in range(first, tokens)]
    assert end_to_end.kept_while_timed([1.0] * first + [0.5] * (tokens - first)) == 0.5


def test_few_layers_and_what_a_cpu_ignores(capsys):
    """Policy none, which the rows are beside and the gate uses, takes a k that the model has layers for."""
    arguments = ["--config", "toy", "--layers", "2", "--policy", "fixed:k=1:rate=0.5", "--largest-batch"]
    assert main(["bench", "e2e", *FAST, *arguments]) == 0
    printed = capsys.readouterr()
    assert all(row["median_us"] for row in json.loads(printed.out)["rows"])
    assert "--largest-batch is ignored on a CPU" in printed.err


def test_table_says_plainly_what_is_lost(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # xdist gives its workers those of its own terminal
    assert main(["bench", "e2e", *FAST[:-1], "--config", "toy"]) == 0
    printed = capsys.readouterr().out
    assert "copy bandwidth" in printed and "of unpatched" in printed and "its own floor" in printed
    assert end_to_end.PAIRED in printed and end_to_end.COUNTED in printed
    assert "SLOWER" in printed, "at this size the patch costs more than it saves"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "llava-9b"], "config: expected one of llava-1.5-7b"),
        (["--config", "llava-next-7b"], "25.10 GiB of weights, and there is no GPU: this would take hours. `dyrate doctor --config"),
        (["--config", "toy", "--visual", "6"], "visual_tokens: expected a multiple of 4"),
        (["--config", "bundled", "--layers", "2"], "leave out --visual and --layers"),
        (["--config", "toy", "--out", "/no/such/folder/x.json"], "does not exist"),
        (["--config", "toy", "--policy", "fixd"], "fixd"),
        (["--config", "toy", "--max-new-tokens", "1"], "ask for 2 or more"),
        (["--config", "toy", "--device", "meta"], "--device meta: expected cpu, or cuda"),
        (["--config", "toy", "--device", "gpu"], "--device gpu: expected cpu, or cuda"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["bench", "e2e", *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 31, 32, 100, 1023, 1024, 5000])
def test_largest_batch_is_found_within_a_sixteenth(limit):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = end_to_end.largest_batch(fits, 1024)
    best = min(limit, 1024)
    assert found <= best and best - found <= best / 16
    assert len(tried) <= 20 and max(tried) <= 1024


@pytest.mark.parametrize("name", ["toy", "toy-onevision", "toy-qwen"])
def test_random_models_count_their_own_tokens(name):
    model = random_models.build(name, torch.device("cpu"))
    fields = random_models.inputs(model, 2)
    found = (fields["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert found == [random_models.tokens_per_picture(model) or 20] * 2
    assert model.generate(**fields, max_new_tokens=2).shape == (2, fields["input_ids"].shape[1] + 2)
