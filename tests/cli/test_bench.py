"""``dyrate bench e2e`` at toy size: what it prints and writes, its floor, its gate, and the search for the largest batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dyrate_kernels.cli.main import main
from dyrate_kernels.measuring import end_to_end, random_models
from dyrate_kernels.patching import cpu_step

ROOT = Path(__file__).parents[2]
FAST = ["--rounds", "1", "--max-new-tokens", "12", "--json"]


def rows_of(capsys, *arguments: str, status: int = 0) -> dict:
    assert main(["bench", "e2e", *FAST, *arguments]) == status
    return json.loads(capsys.readouterr().out)


def test_every_set_up_is_measured_beside_its_floor(capsys, tmp_path):
    out = tmp_path / "rows.json"
    told = rows_of(capsys, "--config", "toy", "--batch", "1", "3", "--out", str(out))
    assert json.loads(out.read_text()) == told["rows"]
    rows = [row for row in told["rows"] if row["group"] == "model"]
    assert len(rows) == 12 and all(row["median_us"] > 0 and row["first_token_us"] > 0 for row in rows)
    assert {row["B"] for row in rows} == {1, 3}
    names = {row["name"] for row in rows}
    assert end_to_end.UNPATCHED in names and "dyrate generate(), schedule, evict" in names
    assert any("StaticCache" in name for name in names) and any("FastV" in name for name in names)
    for row in rows:
        assert row["p20_us"] <= row["p80_us"]
        assert row["tokens_per_s"] == pytest.approx(1e6 * row["B"] / row["median_us"], rel=1e-3)
        whole = row["first_token_us"] + 11 * row["median_us"]
        assert row["images_per_s"] == pytest.approx(1e6 * row["B"] * 5 / whole, rel=1e-3)
        if row["name"].startswith("dyrate"):
            assert row["correct"]["passed"]
    evict, dense = (next(r for r in rows if r["name"] == f"dyrate generate(), {n}") for n in ("schedule, evict", "dense (policy none)"))
    assert evict["kv_live_bytes"] < dense["kv_live_bytes"] <= dense["kv_reserved_bytes"]
    assert evict["kept_by_step"] == [0.5] * 5 + [0.25] * 5 + [0.1] * 2
    assert len(told["verdicts"]) == 8 and all("unpatched model" in line for line in told["verdicts"])


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
    text = 10 + 11 / 2  # the prompt's, and the mean of what eleven steps add
    for row in told["rows"]:
        if row["group"] != "model":
            continue
        kept = 20.0 if row["name"].startswith("unpatched") or "dense" in row["name"] else 5.0
        k = 3 if "dense" in row["name"] else 2
        rows = k * (20 + text) + (4 - k) * (kept + text)
        expected = weights + 2 * 4 * 2 * 16 * rows
        assert row["bytes"] == pytest.approx(expected, abs=1), row["name"]
        assert row["floor_us"] == pytest.approx(1e6 * expected / (told["bandwidth_GB_per_s"] * 1e9), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("config", ["toy-onevision", "bundled"])
def test_other_models(capsys, config):
    told = rows_of(capsys, "--config", config, "--policy", "fastv:k=2:rate=0.5")
    rows = [row for row in told["rows"] if row["group"] == "model"]
    assert {row["N"] for row in rows} == {24 if config == "toy-onevision" else 144}
    assert all(row["median_us"] for row in rows)
    assert sum("FastV" in row["name"] for row in rows) == 0, "the policy itself is FastV: one is enough"


def test_what_is_wrong_has_no_speed(capsys, monkeypatch):
    monkeypatch.setattr(cpu_step.CpuStep, "attend", lambda self, layer, query, scale, window: torch.zeros_like(query).transpose(1, 2))
    told = rows_of(capsys, "--config", "toy", status=1)
    ours = [row for row in told["rows"] if row["name"].startswith("dyrate")]
    assert ours and all(row["median_us"] is None and "no speed" in row["note"] for row in ours)
    assert told["verdicts"] == []
    assert main(["bench", "e2e", *FAST[:-1], "--config", "toy"]) == 1
    printed = capsys.readouterr().out
    assert "not measured" in printed and "as fast" not in printed


def test_table_says_plainly_what_is_lost(capsys):
    assert main(["bench", "e2e", *FAST[:-1], "--config", "toy"]) == 0
    printed = capsys.readouterr().out
    assert "copy bandwidth" in printed and "of unpatched" in printed and "its own floor" in printed
    assert "SLOWER" in printed, "at this size the patch costs more than it saves"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "llava-9b"], "config: expected one of llava-1.5-7b"),
        (["--config", "toy", "--visual", "6"], "visual_tokens: expected a multiple of 4"),
        (["--config", "bundled", "--layers", "2"], "leave out --visual and --layers"),
        (["--config", "toy", "--out", "/no/such/folder/x.json"], "does not exist"),
        (["--config", "toy", "--policy", "fixd"], "fixd"),
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


@pytest.mark.parametrize("name", ["toy", "toy-onevision"])
def test_random_models_count_their_own_tokens(name):
    model = random_models.build(name, torch.device("cpu"))
    fields = random_models.inputs(model, 2)
    found = (fields["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert found == [random_models.tokens_per_picture(model)] * 2
    assert model.generate(**fields, max_new_tokens=2).shape == (2, fields["input_ids"].shape[1] + 2)
