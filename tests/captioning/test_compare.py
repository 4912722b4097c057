"""Speeds beside the unpruned model's: which rows there are, on what, and what is told while a run goes on. No time is asserted."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from dyrate_kernels import chat, load_demo, shapes
from dyrate_kernels.captioning import compare
from dyrate_kernels.captioning.captioner import Captioner, Task
from dyrate_kernels.captioning.inputs import Source
from dyrate_kernels.captioning.run import Progress
from dyrate_kernels.cli import caption as command
from dyrate_kernels.cli.main import main
from dyrate_kernels.pictures import read_picture

ROWS = {"this run", "unpruned, patched", "unpatched"}
TASK = Task(policy="fixed:k=2:rate=0.6", retention="evict", vision=None, max_new_tokens=12, batch_size=2)


@pytest.fixture
def sources(tmp_path):
    found = []
    for seed in range(5):
        shapes.draw(shapes.make_scene(seed)).save(tmp_path / f"{seed}.png")
        found.append(Source(f"{seed}.png", str(tmp_path / f"{seed}.png")))
    return found


def test_rows(sources):
    found = compare.compare(TASK, sources, rounds=1)
    assert set(found["rows"]) == ROWS and (found["pictures"], found["batch_size"], found["dtype"]) == (5, 2, "float32")
    for row in found["rows"].values():
        assert row["captioned"] == 5 and row["generated_tokens"] > 5
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("seconds", "pictures_per_second"))
        assert row["pictures_per_second"] == pytest.approx(5 / row["seconds"])
    speed = {name: row["pictures_per_second"] for name, row in found["rows"].items()}
    assert found["speed_to_unpruned"] == {name: pytest.approx(speed["this run"] / speed[name]) for name in ROWS - {"this run"}}
    assert found["equal_unpruned_captions"] == 5
    with pytest.raises(ValueError, match="there must be a picture and a round to compare, got 0 pictures"):
        compare.compare(TASK, [])


def test_turns_and_what_each_runs_under(sources, monkeypatch):
    turns = []

    def note(self, names, pictures, ask=Captioner._ask):
        turns.append(
            (None if self.handle is None else (self.handle.policy.name, self.handle.retention, len(self.handle.vision)), len(names))
        )
        return ask(self, names, pictures)

    monkeypatch.setattr(Captioner, "_ask", note)
    compare.compare(Task(**{**vars(TASK), "vision": "aim:keep=0.5"}), sources[:3], rounds=2)
    each = [("fixed", "evict", 1), ("none", "evict", 0), None]
    assert turns == [(row, 2) for row in each] + 2 * [(row, size) for row in each for size in (2, 1)]


def test_unpruned_captions_are_the_models_own(sources):
    model, processor = load_demo()
    text = chat.render(processor, [chat.user(TASK.prompt, images=1)])
    want = []
    for source in sources:
        fields = processor(images=read_picture(source.file), text=text, return_tensors="pt")
        tokens = model.generate(**fields, do_sample=False, max_new_tokens=TASK.max_new_tokens)[0, fields["input_ids"].shape[1] :]
        want.append(processor.decode(tokens, skip_special_tokens=True).strip())
    for name in (compare.NONE, compare.PLAIN):
        _, captions = compare._measured(compare._task_of(name, TASK), (model, processor), name != compare.PLAIN, sources)
        assert [caption.caption for caption in captions] == want, name
    assert not [name for name in vars(model) if name.startswith("_dyrate")]  # unpatched again


def test_a_pictures_failure_is_no_caption(sources, tmp_path):
    (tmp_path / "0.png").write_bytes(b"words")
    found = compare.compare(TASK, sources[:3], rounds=1)
    assert {row["captioned"] for row in found["rows"].values()} == {2}


def test_the_report_and_the_command(capsys, tmp_path, sources):
    given = ["caption", "--images", str(tmp_path), "--out", str(tmp_path / "out"), "--engine", "local", "--max-new-tokens", "6"]
    (tmp_path / "00.png").write_bytes(b"words")  # the first, and no captioned one
    assert main([*given, "--json"]) == 0
    assert "dense" not in json.loads(capsys.readouterr().out)
    assert main([*given, "--json", "--compare-dense", "2"]) == 0  # nothing is left to do, and the speeds are told
    report = json.loads(capsys.readouterr().out)
    assert report["new"] == 0 and report["dense"]["pictures"] == 2 and set(report["dense"]["rows"]) == ROWS
    assert {row["captioned"] for row in report["dense"]["rows"].values()} == {2}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dense"] == report["dense"]
    assert main([*given, "--compare-dense", "--retry-failed"]) == 0
    text = capsys.readouterr().out
    assert "dense:      the first 5 captioned pictures again" in text and "speed:" in text
    assert text.count("this run's speed is") == 2 and all(f"            {row} " in text for row in ROWS)
    assert main([*given, "--engine", "ray", "--address", "auto", "--compare-dense"]) == 1
    assert "--compare-dense measures in this process" in capsys.readouterr().err


def test_progress_tells_speeds(capsys, monkeypatch):
    say = command._Say(quiet=False)
    monkeypatch.setattr(say, "tty", True)
    texts = []
    for seconds, new in ((10.0, 20), (100.0, 40), (200.0, 340)):
        say.progress(Progress(new + 5, 1005, 1, new, seconds))
        texts.append(capsys.readouterr().err.strip())
    assert texts == [
        "25 of 1005 (1 failed), 2.0 pictures/s, 2.0 in the last minute, 8 min left",
        "45 of 1005 (1 failed), 0.4 pictures/s, 0.2 in the last minute, 72 min left",
        "345 of 1005 (1 failed), 1.7 pictures/s, 3.0 in the last minute, 4 min left",
    ]
    say.progress(SimpleNamespace(done=1005, total=1005, failed=1, new=1000, seconds=201.0))
    assert capsys.readouterr().err.strip().endswith("in the last minute, 0 s left")
    quiet = command._Say(quiet=True)
    quiet.progress(Progress(1, 2, 0, 1, 1.0))
    assert capsys.readouterr().err == ""
