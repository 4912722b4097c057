"""``dyrate doctor``: one screen, right about what gains and what does not, by the same predictions as ``dyrate info``."""

from __future__ import annotations

import json

import pytest

from dyrate_kernels.cli import doctor
from dyrate_kernels.cli.main import main

WINS = ("--config", "llava-next-7b", "--batch", "32")
LOSES = ("--config", "llava-1.5-7b")


def told(capsys, *arguments):
    status = main(["doctor", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("arguments", [(), WINS, LOSES, ("--config", "qwen2.5-vl-7b", "--policy", "fastv:rate=0.75")])
def test_it_fits_one_screen(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = told(capsys, *arguments)
    lines = out.splitlines()
    assert status == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80 and "…" not in out
    assert [line.split(":")[0] for line in lines[:3]] == ["model", "request", "this request"]  # the verdict stands before the table
    assert out.index("this request:") < out.index("rates:") < out.index("at least")


def test_a_wrong_name_is_told_with_its_option(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--config", "llava-next"])
    assert "argument --config: model must be one of llava-1.5-7b" in capsys.readouterr().err


def test_the_verdict_follows_the_request(capsys):
    _, out, _ = told(capsys, *WINS)
    assert "this request: gains: up to 2.34x" in out and "with evict" in out and "memory:" in out
    _, out, _ = told(capsys, *LOSES)
    assert "no gain in time: 1.02x at most" in out and "more sequences at once or more visual tokens" in " ".join(out.split())
    _, out, _ = told(capsys, *WINS, "--policy", "none")
    assert "no gain in time: 1.00x" in out
    _, out, _ = told(capsys, *LOSES, "--batch", "8")
    assert "gains little: " in out


def test_json_has_the_predictions_of_info(capsys):
    _, out, _ = told(capsys, *WINS, "--json")
    found = json.loads(out)
    main(["info", "--config", "llava-next-7b", "--batch", "32", "--json"])
    assert found["request"] == json.loads(capsys.readouterr().out)["requests"]
    rows = {row["retention"]: row for row in found["request"]["rows"]}
    best = min(row["seconds"] for row in rows.values())
    assert found["verdict"]["times_as_fast"] == rows["dense"]["seconds"] / best and found["verdict"]["by"] == "decode"


def test_a_model_of_ones_own_by_its_config(capsys, tmp_path):
    _, out, _ = told(capsys, "--json")
    found = json.loads(out)
    assert found["model"] == {"name": "demo_model", "refused": None} and found["request"]["visual_tokens"] == 144
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 4}))
    status, out, err = told(capsys, "--model", str(tmp_path))
    assert status == 1 and "--visual is needed" in err
    status, out, _ = told(capsys, "--model", str(tmp_path), "--visual", "576")
    assert status == 0 and "llama cannot be patched, but: gemma3" in " ".join(out.split())
    status, _, err = told(capsys, "--model", str(tmp_path / "none"))
    assert status == 1 and "no such folder" in err


def test_rates_are_those_of_the_gpu_where_they_are_known(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "_machine", lambda: {
        "device": "NVIDIA A100-SXM4-80GB", "gpu": True, "backends": ["triton"], "path": {"steps": "captured", "layers": "fused"},
        "rates_of": "a100", "rates_are_own": True,
    })  # fmt: skip
    _, out, _ = told(capsys, *WINS)
    assert "2039 GB/s" in out and "has a GPU" in out and "--measure" not in out
    _, out, _ = told(capsys, *WINS, "--device", "l4")
    assert "300 GB/s" in out
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L40S")
    monkeypatch.setattr("dyrate_kernels.backends", lambda: {"triton": "available", "cuda": "unavailable: x"})
    monkeypatch.setattr("dyrate_kernels.patching.path.of_machine", dict)
    assert (doctor._machine()["rates_of"], doctor._machine()["rates_are_own"], doctor._machine()["backends"]) == ("l40s", True, ["triton"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 4090")
    assert (doctor._machine()["rates_of"], doctor._machine()["rates_are_own"]) == ("h200", False)
