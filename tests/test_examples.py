"""The scripts of ``examples/`` run, on the bundled model, and print what they are for."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from dyrate_kernels.bundled import MODEL_FOLDER
from dyrate_kernels.predictor import DyRatePredictor
from dyrate_kernels.training import predictor_training

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("first_steps", "compare_methods", "train_predictor")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where a user may stand: nothing is found by the folder that the script runs in."""
    monkeypatch.chdir(tmp_path)


def test_first_steps(capsys):
    assert script("first_steps").main(["--max-new-tokens", "24"]) == 0
    printed = capsys.readouterr().out
    full, pruned = (re.search(rf"^{name}: (There are five objects.+)$", printed, re.MULTILINE)[1] for name in ("not pruned", "dyrate"))
    assert full.split()[:10] == pruned.split()[:10]
    kept = [int(row) for row in re.findall(r"^ +\d+ +(\d+)  \d\.\d\d ", printed, re.MULTILINE)]
    assert kept[0] == 144 and 0 < max(kept[1:]) < 144
    share = float(re.search(r"([\d.]+) % of 144 visual tokens kept", printed)[1])
    assert 0 < share < 60


def test_first_steps_with_another_model_picture_and_policy(capsys, tmp_path):
    shutil.copy(EXAMPLES / "still_life.jpg", tmp_path / "photo.jpg")
    options = ["--policy", "fixed:rate=0.75", "--retention", "evict", "--prompt", "How many objects are there?", "--max-new-tokens", "4"]
    assert script("first_steps").main(["--model", str(MODEL_FOLDER), "--image", "photo.jpg", *options]) == 0
    assert "25.0 % of 144 visual tokens kept" in capsys.readouterr().out


def test_compare_methods(capsys, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("shapes_1.png", "still_life.jpg"):
        shutil.copy(EXAMPLES / name, tmp_path / "pictures")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    module = script("compare_methods")
    module.METHODS = {"all of it": {"policy": "none"}, **{name: module.METHODS[name] for name in ("fastv, evict", "hired, dyrate")}}
    assert module.main(["--image", "pictures", "--max-new-tokens", "6"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 pictures")
    rows = {
        name.strip(): [float(cell) for cell in re.findall(r"([\d.]+) %", cells)]
        for name, cells in re.findall(r"^(.{16})(.+%)$", printed, re.M)
    }
    assert list(rows) == list(module.METHODS)
    assert rows["all of it"] == [100.0, 100.0, 100.0, 100.0]
    assert rows["fastv, evict"][0] == 62.5  # half of the four layers read a quarter of the rows
    assert rows["hired, dyrate"][0] < 50 and rows["hired, dyrate"][2] < 90


def test_every_method_of_compare_methods_can_be_had():
    import dyrate_kernels as dk

    model, _ = dk.load_demo()
    for name, settings in script("compare_methods").METHODS.items():
        with dk.patch(model, **settings) as handle:
            assert handle is not None, name


def test_a_folder_without_pictures_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="--image: no picture .* in empty"):
        script("compare_methods").main(["--image", "empty"])


def test_train_predictor(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(predictor_training, "CALIBRATION", 4)
    options = ["--out", "run", "--examples", "8", "--steps", "2", "--batch-size", "2", "--k", "2"]
    assert script("train_predictor").main(options) == 0
    printed = capsys.readouterr().out
    assert "8 examples, 0 skipped; saved in run" in printed
    assert re.search(r"^run: [\d.]+ % of the visual tokens kept\n  There are", printed, re.MULTILINE)
    assert DyRatePredictor.from_pretrained(tmp_path / "run").weight.shape[0] == 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_does(name, capsys):
    module = script(name)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"python examples/{name}.py" in said and "--model" in said and "llava-hf/" in said
    assert f"[`{name}.py`]({name}.py)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
