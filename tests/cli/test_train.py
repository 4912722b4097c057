"""``dyrate train`` from the command line, and the predictor that lies beside a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import dyrate_kernels as dk
from dyrate_kernels.bundled import MODEL_FOLDER
from dyrate_kernels.cli.main import main
from dyrate_kernels.policies.base import ModelShape
from dyrate_kernels.predictor import CONFIG_FILE, WEIGHTS_FILE
from dyrate_kernels.shapes import draw, make_scene
from dyrate_kernels.training import predictor_training as training

SHORT = ("--steps", "3", "--batch-size", "2", "--max-answer", "12", "--examples", "20", "--log-every", "1")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(training, "CALIBRATION", 4)


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_train_then_generate(capsys, tmp_path):
    out = str(tmp_path / "run")
    status, text, _ = run(capsys, "train", "--out", out, "--target-keep", "0.5", "--k", "2", *SHORT)
    assert status == 0
    start = "with:       k=2 of 6 layers, rates 0 0.2 0.4 0.6 0.8, spread 0.0, reads attention mass, target keep 0.5"
    assert text.splitlines()[0] == start
    for word in ("saved:", "budget:", "examples:   20, 0 skipped", "memory:", f"--predictor {out} --k 2"):
        assert word in text
    draw(make_scene(-3)).save(tmp_path / "a.png")
    status, text, _ = run(
        capsys, "generate", "--image", str(tmp_path / "a.png"), "--predictor", out, "--k", "2", "--max-new-tokens", "3", "--json"
    )
    assert status == 0 and json.loads(text)["predictor"] == out


def test_train_on_conversations(capsys, tmp_path):
    draw(make_scene(1)).save(tmp_path / "1.png")
    entry = {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red square."}]}
    lost = {**entry, "image": "lost.png"}
    (tmp_path / "data.json").write_text(json.dumps([entry, lost, entry, entry, entry]))
    status, text, _ = run(
        capsys, "train", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "data.json"), "--target-cost", "0.8", "--json", *SHORT
    )
    result = json.loads(text)
    assert status == 0 and result["examples"] == 5 and result["skipped"] == 1 and "lost.png" in result["reasons"][0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--target-keep", "2"), "target_keep must be in"),
        (("--target-keep", "0.5", "--data", "nothing.json"), "nothing.json"),
        (("--target-keep", "0.5", "--k", "9"), "k must be in"),
        (("--target-keep", "0.5", "--rates", "[0.5, 0.1]"), "ascending"),
        (("--target-keep", "0.5", "--steps", "0"), "steps"),
    ],
)
def test_mistakes(capsys, tmp_path, arguments, words):
    status, _, err = run(capsys, "train", "--out", str(tmp_path / "run"), *arguments)
    assert status == 1 and words in err and len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The bundled model in a folder of its own, with a predictor for k=2 beside it."""
    folder = tmp_path_factory.mktemp("model") / "copy"
    shutil.copytree(MODEL_FOLDER, folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).unlink(missing_ok=True)
    shape = ModelShape.from_config(dk.load_demo()[0].config)
    predictor = dk.DyRatePredictor.for_model(shape, (0.0, 0.5, 0.75), k=2)
    with torch.no_grad():
        predictor.bias[2] = 1.0
    predictor.save_pretrained(folder)
    return folder


def test_a_predictor_in_the_models_folder(copy):
    model = LlavaForConditionalGeneration.from_pretrained(copy)
    processor = AutoProcessor.from_pretrained(copy)
    inputs = processor(images=draw(make_scene(-3)), text="USER: <image>\nDescribe the picture. ASSISTANT:", return_tensors="pt")

    def predictor(**options):
        with dk.patch(model, "dyrate", **options) as handle:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
            stats = handle.stats()
        return stats.predictor, stats.steps[-1].rate[0]

    assert predictor(k=2) == ("trained, k=2", 0.75)
    assert predictor(k=3)[0] == "closed-form"  # it is for another k
    assert predictor(k=2, predictor="closed-form")[0] == "closed-form"
    other = dk.policies.DyRate(k=2, num_rates=4)
    with dk.patch(model, other) as handle:  # somebody who names rates wants those
        assert handle.policy.predictor is None
    (copy / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        dk.patch(model, "dyrate", k=2)
