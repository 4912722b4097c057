"""Captions of many pictures in one process: every picture once, whatever it is like; nothing lost, nothing twice."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dyrate_kernels import chat, load_demo, patch, shapes
from dyrate_kernels.captioning import inputs, on_ray
from dyrate_kernels.captioning.captioner import Captioner, Task
from dyrate_kernels.cli.main import main
from dyrate_kernels.pictures import UnreadableError, read_picture

TOKENS = 12


def drawn(seed):
    return shapes.draw(shapes.make_scene(seed))


@pytest.fixture
def folder(tmp_path):
    """Good pictures of every kind, and every kind of bad one."""
    place = tmp_path / "pictures"
    (place / "a b").mkdir(parents=True)
    (place / "ü").mkdir()
    drawn(1).save(place / "a b" / "one.png")
    drawn(2).save(place / "ü" / "one.png")  # the same name elsewhere
    drawn(3).convert("L").save(place / "grey.png")
    drawn(4).convert("CMYK").save(place / "cmyk.jpg")
    drawn(5).convert("P").save(place / "palette.gif", save_all=True, append_images=[drawn(6).convert("P")])
    drawn(7).convert("RGBA").save(place / "alpha.webp")
    Image.fromarray((torch.arange(90 * 90).view(90, 90) * 8).numpy().astype("uint16")).save(place / "deep.tif")
    drawn(8).resize((3, 900)).save(place / "thin.bmp")
    (place / "zero.png").touch()
    (place / "words.jpg").write_bytes(b"this is no picture")
    data = io.BytesIO()
    drawn(9).resize((600, 600)).save(data, "png")
    (place / "cut.png").write_bytes(data.getvalue()[:900])
    Image.new("L", (20_000, 9_000)).save(place / "huge.png")
    (place / "notes.txt").write_text("hello")
    (place / ".hidden.png").touch()
    return place


GOOD = {"a b/one.png", "ü/one.png", "grey.png", "cmyk.jpg", "palette.gif", "alpha.webp", "deep.tif", "thin.bmp"}
BAD = {"zero.png": "empty", "words.jpg": "not a picture", "cut.png": "broken", "huge.png": "too large"}


def lines(out):
    found = [json.loads(line) for line in (out / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "setting" in found[0]
    return found[1:]


def caption(capsys, images, out, *more):
    status = main(["caption", "--images", str(images), "--out", str(out), "--engine", "local", "--max-new-tokens", str(TOKENS), *more])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_kind_of_file(capsys, folder, tmp_path):
    out = folder / "captions"  # below the pictures
    status, text, _ = caption(capsys, folder, out, "--batch-size", "3", "--json")
    assert status == 0
    report = json.loads(text)
    found = {line["name"]: line for line in lines(out)}
    assert len(lines(out)) == len(found) == 12
    assert {name for name, line in found.items() if line["caption"]} == GOOD
    assert {name: line["kind"] for name, line in found.items() if line["error"]} == BAD
    assert (report["captioned"], report["failed"], report["other_files"], report["new"]) == (8, 4, 1, 12)
    assert report["failures"] == {"empty": 1, "not a picture": 1, "broken": 1, "too large": 1}
    assert json.loads((out / "report.json").read_text())["captioned"] == 8
    again, text, _ = caption(capsys, folder, out, "--batch-size", "5", "--json")  # nothing is left to do
    assert again == 0 and json.loads(text)["new"] == 0 and len(lines(out)) == 12
    (folder / "zero.png").write_bytes((folder / "grey.png").read_bytes())
    status, text, _ = caption(capsys, folder, out, "--retry-failed")
    assert status == 0 and "captioned:  9 of 12 pictures (4 in this run" in text and "1 not a picture" in text
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(out / "captions.parquet").to_pylist()
    assert len(table) == 12 and {row["name"]: row["caption"] for row in table}["zero.png"] == found["grey.png"]["caption"]


def test_captions_are_those_of_one_picture_alone(capsys, folder, tmp_path):
    """Batched, padded, sorted: the text that `dyrate generate` gives."""
    assert caption(capsys, folder, tmp_path / "out", "--policy", "fixed", "--k", "2", "--rate", "0.6", "--retention", "evict")[0] == 0
    for line in lines(tmp_path / "out"):
        if line["caption"] is None:
            continue
        status = main(["generate", "--image", str(folder / line["name"]), "--policy", "fixed", "--k", "2", "--rate", "0.6", "--retention",
                       "evict", "--max-new-tokens", str(TOKENS), "--json"])  # fmt: skip
        result = json.loads(capsys.readouterr().out)
        assert status == 0 and line["caption"] == result["text"]
        assert line["visual_tokens"] == 144 and line["read"] == pytest.approx(144 * result["visual_share"])
        assert line["tokens"] == result["new_tokens"] and line["seconds"] > 0


def test_another_setting_and_another_run_are_refused(capsys, folder, tmp_path):
    out = tmp_path / "out"
    assert caption(capsys, folder, out, "--limit", "2")[0] == 0 and len(lines(out)) == 2
    status, _, err = caption(capsys, folder, out, "--policy", "fastv")
    assert status == 1 and "holds answers of" in err and "give another folder" in err
    (tmp_path / "elsewhere").mkdir()
    drawn(30).save(tmp_path / "elsewhere" / "grey.png")  # a name that both places have
    status, _, err = caption(capsys, tmp_path / "elsewhere", out)
    assert status == 1 and "holds answers of" in err and "elsewhere" in err
    status, _, err = caption(capsys, folder, out, "--max-pixels", "99")
    assert status == 1 and "holds answers of" in err
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = caption(capsys, folder, out)
        assert status == 1 and "another run is writing to" in err
    assert caption(capsys, folder, out)[0] == 0 and len(lines(out)) == 12


def test_a_model_in_a_folder_is_told_by_its_whole_path(tmp_path, monkeypatch):
    found = []
    for name in ("a", "b"):
        (tmp_path / name / "final").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        found += [Task(model="final").setting()["model"], Task(model=str(tmp_path / name / "final")).setting()["model"]]
    assert found[0] == found[1] != found[2] == found[3]
    assert [Task(model=name).setting()["model"] for name in (None, "org/name")] == ["bundled", "org/name"]
    pools = [Task(retention=text).setting() for text in ("pool", "pool=0.25:by=policy", "pool=0.5", "pool:by=uniform", "evict")]
    assert pools[0] == pools[1] and len({each["retention"] for each in pools}) == 4


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    """The process is killed in the middle, its last line cut; the next run leaves each picture there once."""
    place, out = tmp_path / "pictures", tmp_path / "out"
    place.mkdir()
    for seed in range(16):
        drawn(seed).save(place / f"{seed}.png")
    command = [sys.executable, "-m", "dyrate_kernels.cli.main", "caption", "--images", str(place), "--out", str(out), "--engine", "local",
               "--max-new-tokens", "40", "--batch-size", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    written = out / "captions.jsonl"
    while time.monotonic() < deadline and not (written.exists() and written.read_bytes().count(b"\n") > 4):  # the first line is the head
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written.write_bytes(written.read_bytes()[: written.read_bytes().rindex(b"\n") + 1])  # whatever it was writing is cut off below
    done = len(lines(out))
    assert 4 <= done < 16
    with (out / "captions.jsonl").open("a") as file:
        file.write('{"name": "15.png", "capt')
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert f"captioned:  16 of 16 pictures ({16 - done} in this run" in finished.stdout
    assert sorted(line["name"] for line in lines(out)) == sorted(f"{seed}.png" for seed in range(16))


# -- Parquet -------------------------------------------------------------------------------------------------------------------------------


def test_parquet(capsys, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def data(seed):
        buffer = io.BytesIO()
        drawn(seed).save(buffer, "png")
        return buffer.getvalue()

    drawn(3).save(tmp_path / "beside.png")
    rows = [{"bytes": data(1), "path": "x.png"}, {"bytes": data(2), "path": None}, {"bytes": None, "path": "beside.png"}, None,
            {"bytes": b"", "path": None}]  # fmt: skip
    parquet.write_table(pa.table({"image": rows, "key": ["a", "b", "c", None, None]}), tmp_path / "t.parquet", row_group_size=2)
    status, _, err = caption(capsys, tmp_path / "t.parquet", tmp_path / "out")
    assert status == 0, err
    found = {line["name"]: line for line in lines(tmp_path / "out")}
    assert list(found) == [f"t.parquet:{row}" for row in range(5)]
    assert [line["kind"] for line in found.values()] == [None, None, None, "empty", "empty"]
    assert (
        found["t.parquet:2"]["caption"]
        == Captioner(Task(max_new_tokens=TOKENS))([inputs.Source("x", str(tmp_path / "beside.png"))])[0].caption
    )
    assert caption(capsys, tmp_path / "t.parquet", tmp_path / "keyed", "--id-column", "key")[0] == 0
    assert [line["name"] for line in lines(tmp_path / "keyed")] == ["a", "b", "c", "t.parquet:3", "t.parquet:4"]
    parquet.write_table(pa.table({"pic": [data(1)], "key": ["a"]}), tmp_path / "u.parquet")
    status, _, err = caption(capsys, tmp_path / "u.parquet", tmp_path / "other")
    assert status == 1 and "none of the columns image, jpg" in err and "--image-column" in err
    assert caption(capsys, tmp_path / "u.parquet", tmp_path / "other", "--image-column", "pic")[0] == 0
    parquet.write_table(pa.table({"image": [data(1)] * 2, "key": ["a", "a"]}), tmp_path / "v.parquet")
    status, _, err = caption(capsys, tmp_path / "v.parquet", tmp_path / "more", "--id-column", "key")
    assert status == 1 and "'a' stands in two rows" in err


def png(seed):
    buffer = io.BytesIO()
    drawn(seed).save(buffer, "png")
    return buffer.getvalue()


def test_cells_of_every_arrow_type(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data, text = png(1), base64.b64encode(png(1)).decode()
    (tmp_path / "a.png").write_bytes(data)
    good = {
        "binary": pa.array([data], pa.binary()), "large_binary": pa.array([data], pa.large_binary()),
        "fixed_size_binary": pa.array([data], pa.binary(len(data))), "dictionary": pa.array([data]).dictionary_encode(),
        "texts in a dictionary": pa.array([text]).dictionary_encode(), "base64": pa.array([text]),
        "large_string": pa.array([text], pa.large_string()),
        "data URL": pa.array(["data:image/png;base64," + text]), "path": pa.array(["a.png"]), "bytes of base64": pa.array([text.encode()]),
        "uint8": pa.array([list(data)], pa.list_(pa.uint8())), "int64": pa.array([list(data)]),
        "fixed_size_list": pa.array([list(data)], pa.list_(pa.uint8(), len(data))), "struct": pa.array([{"bytes": data, "path": None}]),
        "struct of a path": pa.array([{"bytes": None, "path": "a.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "list of struct": pa.array([[{"bytes": data, "path": None}, {"bytes": png(2), "path": None}]]),
        "list of binary": pa.array([[data, png(2)]]),
        "pixels": pa.array([np.asarray(drawn(1)).tolist()]), "map": pa.array([[("bytes", data)]], pa.map_(pa.string(), pa.binary())),
    }  # fmt: skip
    bad = {
        "null": ("empty", pa.nulls(1)), "null text": ("empty", pa.array([None], pa.string())), "number": ("not a picture", pa.array([5])),
        "nan": ("not a picture", pa.array([float("nan")])), "truth": ("not a picture", pa.array([True])),
        "address": ("not a picture", pa.array(["https://host/a.png"])),
        "struct of null": ("empty", pa.array([{"bytes": None, "path": None}])),
        "empty list": ("empty", pa.array([[]], pa.list_(pa.binary()))), "no such path": ("missing", pa.array(["b.png"])),
        "long text": ("not a picture", pa.array(["word " * 200])), "time": ("not a picture", pa.array([1], pa.timestamp("s"))),
        "text that is none": ("broken", pa.Array.from_buffers(
            pa.string(), 1, pa.array([b"caf\xe9"]).buffers())),
    }  # fmt: skip
    for name, column in good.items():
        parquet.write_table(pa.table({"image": column, "image.more": ["x"]}), tmp_path / "t.parquet")
        sources = inputs.find(tmp_path / "t.parquet")
        (payload,) = inputs.payloads(sources.sources, sources.column)
        assert np.array_equal(read_picture(payload), drawn(1)), name
    for name, (kind, column) in bad.items():
        parquet.write_table(pa.table({"image": column}), tmp_path / "t.parquet")
        sources = inputs.find(tmp_path / "t.parquet")
        (found,) = inputs.payloads(sources.sources, sources.column)
        assert isinstance(found, UnreadableError) and found.kind == kind, (name, found)


def test_a_bad_file_among_parquet_files_is_named_before_the_first_picture(capsys, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    odd = tmp_path / "in" / os.fsdecode(b"caf\xe9.parquet")
    with odd.open("wb") as file:
        parquet.write_table(pa.table({"image": [png(1)], "id": ["a"]}), file)
    whole = odd.read_bytes()
    twice = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays([pa.array([png(1)])] * 2, ["image", "image"]), twice)
    no_id, other = io.BytesIO(), io.BytesIO()
    parquet.write_table(pa.table({"image": [png(1)]}), no_id)
    parquet.write_table(pa.table({"picture": [png(1)], "id": ["b"]}), other)
    for content in (b"", whole[:-30], whole[30:], b"words" * 99, twice.getvalue(), other.getvalue(), no_id.getvalue()):
        (tmp_path / "in" / "part-1.PARQUET").write_bytes(content)
        status, _, err = caption(capsys, tmp_path / "in", tmp_path / "out", "--id-column", "id")
        assert status == 1 and "part-1.PARQUET: " in err and not (tmp_path / "out").exists()
    (tmp_path / "in" / "part-1.PARQUET").unlink()
    assert caption(capsys, tmp_path / "in", tmp_path / "out")[0] == 0
    assert [line["name"] for line in lines(tmp_path / "out")] == ["caf\\xe9.parquet:0"]


def test_damaged_rows_of_a_parquet_file_are_failures(tmp_path):
    """The file's end, where the groups of rows are listed, is whole; what one of them holds is not."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"image": [png(seed) for seed in range(6)]}), file, row_group_size=2, compression="snappy")
    column = parquet.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 200] = b"\xff" * 200
    file.write_bytes(content)
    sources = inputs.find(file)
    found = list(inputs.payloads(sources.sources, sources.column))
    assert [getattr(each, "kind", None) for each in found] == [None, None, "broken", "broken", None, None]
    assert "row 2 of t.parquet" in str(found[2])
    file.unlink()
    assert [each.kind for each in inputs.payloads(sources.sources[:2], sources.column)] == ["broken"] * 2


# -- names and folders ---------------------------------------------------------------------------------------------------------------------


def test_names_that_are_no_utf8(capsys, tmp_path):
    place = tmp_path / os.fsdecode(b"pictures \xff")
    place.mkdir()
    names = [b"caf\xe9.png", b"caf\\xe9.png", b"\xe9 words.jpg", b"line\nbreak.png", "ü\u2028.png".encode()]
    for seed, name in enumerate(names):
        (place / os.fsdecode(name)).write_bytes(png(seed) if name.endswith(b"png") else b"no picture")
    out = tmp_path / os.fsdecode(b"out \xff")
    for new in (5, 0):
        status, text, err = caption(capsys, place, out, "--json")
        assert status == 0 and json.loads(text)["new"] == new, err
    with (out / "captions.jsonl").open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file][1:]
    wanted = {"caf\\xe9.png", "caf\\\\xe9.png", "\\xe9 words.jpg", "line\nbreak.png", "ü\u2028.png"}
    assert {line["name"] for line in found} == wanted and sum(line["caption"] is not None for line in found) == 4
    parquet = pytest.importorskip("pyarrow.parquet")
    with (out / "captions.parquet").open("rb") as file:
        assert set(parquet.read_table(file).column("name").to_pylist()) == wanted
    (place / os.fsdecode(names[0])).rename(place / "new.png")
    status, text, _ = caption(capsys, place, out)
    assert status == 0 and "written:" in text and "\\xff" in text


def test_links_are_followed_and_loops_are_not(tmp_path):
    inside, outside = tmp_path / "pictures", tmp_path / "elsewhere"
    (inside / "b" / "c").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    for place in (inside, inside / "b", inside / "b" / "c", outside, outside / "deep"):
        drawn(1).save(place / "x.png")
    (inside / "a loop").symlink_to(inside, target_is_directory=True)
    (inside / "b" / "up").symlink_to("..", target_is_directory=True)
    (inside / "a twin").symlink_to(inside / "b", target_is_directory=True)
    (inside / "one").symlink_to(outside, target_is_directory=True)
    (inside / "two").symlink_to(outside, target_is_directory=True)
    (outside / "back").symlink_to(inside, target_is_directory=True)
    (inside / "gone").symlink_to(tmp_path / "nowhere", target_is_directory=True)
    (inside / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (inside / "file.png").symlink_to(outside / "x.png")
    found = inputs.find(inside)
    assert sorted(source.name for source in found.sources) == [
        "b/c/x.png", "b/x.png", "file.png", "gone.png", "one/deep/x.png", "one/x.png", "x.png",
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(inside, target_is_directory=True)
    assert inputs.find(tmp_path / "link").sources[0].name == "file.png"


def test_folders_that_cannot_be_listed_are_told(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    drawn(1).save(tmp_path / "x.png")
    scandir = os.scandir

    def scan(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    found = inputs.find(tmp_path)
    assert len(found.sources) == 1 and found.closed == (str(tmp_path / "closed"),)


def test_what_a_run_has_written_is_no_picture(capsys, tmp_path):
    """Captions beside the pictures, below them, and those of other runs there."""
    for seed in range(2):
        drawn(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "one").mkdir()
    drawn(5).save(tmp_path / "one" / "report.json.png")  # a picture in the folder that is written to
    for out in (tmp_path, tmp_path / "one", tmp_path / "two"):
        assert caption(capsys, tmp_path, out, "--limit", "2")[0] == 0
        status, text, _ = caption(capsys, tmp_path, out, "--json")
        report = json.loads(text)
        assert status == 0 and (report["pictures"], report["new"], report["other_files"]) == (3, 1, 0)


def test_parquet_files_beside_what_a_run_has_written(capsys, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"image": [png(1)]}), tmp_path / "a.parquet")
    (tmp_path / "mine").mkdir()
    parquet.write_table(pa.table({"image": [png(2)]}), tmp_path / "mine" / "captions.parquet")  # no run's: there is no journal beside it
    parquet.write_table(pa.table({"image": [png(3)]}), tmp_path / "z.parquet")
    for new in (3, 0):
        status, text, _ = caption(capsys, tmp_path, tmp_path, "--json")
        assert status == 0 and (json.loads(text)["pictures"], json.loads(text)["new"]) == (3, new)


@pytest.mark.parametrize("name", ["captions.parquet", "report.json"])
def test_files_of_others_are_not_overwritten(capsys, tmp_path, name):
    for folder in ("pictures", "out"):
        (tmp_path / folder).mkdir()
    drawn(1).save(tmp_path / "pictures" / "x.png")
    (tmp_path / "out" / name).write_bytes(b"mine")
    status, _, err = caption(capsys, tmp_path / "pictures", tmp_path / "out")
    assert status == 1 and f"{name} " in err and (tmp_path / "out" / name).read_bytes() == b"mine"


def test_a_run_without_a_caption_fails(capsys, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_bytes(b"words")
    for more in ((), ("--json",), ("--retry-failed",)):
        status, text, err = caption(capsys, tmp_path / "pictures", tmp_path / "out", *more)
        assert status == 1 and "none of the 1 pictures has a caption; the first: x.png: not a picture" in err
        assert json.loads(text)["failed"] == 1 if more == ("--json",) else "failed:     1 (1 not a picture)" in text
    drawn(1).save(tmp_path / "pictures" / "y.png")
    assert caption(capsys, tmp_path / "pictures", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.pop("read"), lambda line: line.pop("name"), lambda line: line.update(tokens="3"),
        lambda line: line.update(error="both"),
        lambda line: line.update(caption=None), lambda line: line.update(more=1),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(capsys, tmp_path, change):
    drawn(1).save(tmp_path / "x.png")
    out = tmp_path / "out"
    assert caption(capsys, tmp_path, out)[0] == 0
    first, line = (out / "captions.jsonl").read_text().splitlines()
    changed = json.loads(line)
    change(changed)
    (out / "captions.jsonl").write_text(f"{first}\n{line}\n{json.dumps(changed)}\n")
    status, _, err = caption(capsys, tmp_path, out)
    assert status == 1 and "captions.jsonl line 3 is no answer of this version" in err


# -- parts ---------------------------------------------------------------------------------------------------------------------------------


def test_a_batch_that_fails_is_halved_and_one_picture_is_its_own_failure(folder, monkeypatch):
    worker = Captioner(Task(max_new_tokens=3, batch_size=4))
    asked, ask = [], worker._ask

    def failing(names, pictures):
        asked.append(len(names))
        if len(names) > 2:
            raise torch.OutOfMemoryError("no room")
        if "grey.png" in names:
            raise RuntimeError("cannot")
        return ask(names, pictures)

    monkeypatch.setattr(worker, "_ask", failing)
    found = worker([inputs.Source(name, str(folder / name)) for name in sorted(GOOD)])
    assert [caption.name for caption in found] == sorted(GOOD)
    assert {caption.name: caption.error for caption in found if caption.error} == {"grey.png": "RuntimeError: cannot"}
    assert asked.count(4) == 2 and max(asked) == 4 and 1 in asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", " "), "--prompt is empty"),
        (("--workers", "2"), "--workers and --address go with --engine ray"),
        (("--policy", "fastv", "--rate", "2"), "rate must be"),
        (("--vision", "himmel"), "reducer must be one of"),
        (("--image-column", "x"), None),
    ],
)
def test_mistakes(capsys, folder, tmp_path, arguments, words):
    status, _, err = caption(capsys, folder, tmp_path / "out", "--limit", "1", *arguments)
    assert (status == 0) if words is None else (status == 1 and words in err and not (tmp_path / "out").exists())


def test_another_column_is_another_setting(capsys, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"image": [png(1), png(2)], "other": [png(3), png(4)], "a": ["x", "y"], "b": ["y", "x"]}
    parquet.write_table(pa.table(table), tmp_path / "t.parquet")
    given = (capsys, tmp_path / "t.parquet", tmp_path / "out")
    assert caption(*given, "--id-column", "a")[0] == 0
    before = (tmp_path / "out" / "captions.jsonl").read_bytes()
    for more in (("--id-column", "b"), ("--id-column", "a", "--image-column", "other"), ()):
        status, _, err = caption(*given, *more)
        assert status == 1 and "holds answers of" in err and "give another folder" in err, more
    assert (tmp_path / "out" / "captions.jsonl").read_bytes() == before
    status, text, _ = caption(*given, "--id-column", "a", "--image-column", "image", "--json")  # the one that was found by its name
    assert status == 0 and json.loads(text)["new"] == 0


def test_ids_that_are_no_values_are_named_by_file_and_row(capsys, tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    odd = {
        "texts": pa.Array.from_buffers(pa.string(), 3, pa.array([b"x", b"caf\xe9", b"y"]).buffers()),
        "times": pa.array([0, 2**60, 1], pa.timestamp("ms")),
    }
    for name, ids in odd.items():
        parquet.write_table(pa.table({"image": [png(1)] * 3, "id": ids}), tmp_path / f"{name}.parquet")
        first, second, third = inputs.find(tmp_path / f"{name}.parquet", None, "id").sources
        assert second.name == f"{name}.parquet:1" and ":0" not in (first.name, third.name), name
    assert [source.row for source in (first, second, third)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.parquet", "report.json", "captions.part", "report.part"])
def test_folders_that_cannot_be_written_are_refused_before_the_model_runs(capsys, folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr("dyrate_kernels.captioning.run.run", lambda *_, **__: pytest.fail("the run began"))
    (tmp_path / "file").touch()
    (tmp_path / "out" / name).mkdir(parents=True)
    for out, words in (("file", "is a file; give a folder"), ("a\0b", "cannot be written"), ("out", f"{name} is a folder, but a")):
        status, _, err = caption(capsys, folder, tmp_path / out)
        assert status == 1 and f"--out {tmp_path / out}: " in err and words in err


def test_places_without_pictures(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").touch()
    for place, words in ((tmp_path / "empty", "no picture in this folder (1 other files)"), (tmp_path / "none", "no such folder or file"),
                         (tmp_path / "empty" / "x.txt", "must be a folder of pictures or a Parquet file")):  # fmt: skip
        status, _, err = caption(capsys, place, tmp_path / "out")
        assert status == 1 and words in err


def test_pictures_are_read_upright_and_whole():
    picture = drawn(1)
    data = io.BytesIO()
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.rotate(90, expand=True).save(data, "png", exif=exif)
    assert np.array_equal(read_picture(data.getvalue()), picture)
    deep = io.BytesIO()
    Image.fromarray((torch.arange(256).view(16, 16) * 257).numpy().astype("uint16")).save(deep, "png")
    assert np.asarray(read_picture(deep.getvalue()))[..., 0].flatten().tolist() == list(range(256))  # scaled, not clipped
    with pytest.raises(UnreadableError) as error:
        read_picture(data.getvalue(), max_pixels=100)
    assert error.value.kind == "too large"


def test_the_callers_limit_is_the_limit(tmp_path, monkeypatch):
    """Not Pillow's, which holds for the whole process and stays as it was."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    data = io.BytesIO()
    drawn(1).save(data, "png")
    assert read_picture(data.getvalue()).size == drawn(1).size and Image.MAX_IMAGE_PIXELS == 50


def test_what_cannot_be_read_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.linspace(0, 1, 64, dtype="float32").reshape(8, 8)).save(tmp_path / "float.tif")
    for name, kind, words in [("pipe.png", "not a picture", "not a file"), ("float.tif", "not a picture", "floating point"),
                              ("none.png", "missing", "no such file")]:  # fmt: skip
        with pytest.raises(UnreadableError, match=words) as error:
            read_picture(tmp_path / name)
        assert error.value.kind == kind


# -- Ray -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not on_ray.has_ray(), reason="ray is not installed")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_worker_on_ray(folder, tmp_path):
    """One of two workers is killed in the middle: each picture is captioned once in the end, as in one process."""
    for seed in range(60):
        drawn(seed).save(folder / f"more {seed}.png")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dyrate_kernels.cli.main", "caption", "--images", str(folder), "--out", str(out), "--engine", "ray",
               "--workers", "2", "--max-new-tokens", "40", "--batch-size", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not ((out / "captions.jsonl").exists() and len(lines(out)) >= 4):
        time.sleep(0.02)
    victim = next(line["worker"] for line in lines(out))
    os.kill(victim, signal.SIGKILL)
    at = len(lines(out))
    text, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    found = lines(out)
    assert at < 72 and len(found) == 72 == len({line["name"] for line in found})
    assert len({line["worker"] for line in found if line["caption"]}) == 3  # two, and the one that took the place of the victim
    assert "captioned:  68 of 72" in text and "4 (" in text
    model, processor = load_demo()
    with patch(model, "dyrate"):
        for line in found[::15]:
            if line["caption"] is not None:
                text = chat.render(processor, [chat.user("Describe the picture.", images=1)])
                given = processor(images=read_picture(folder / line["name"]), text=text, return_tensors="pt")
                tokens = model.generate(**given, do_sample=False, max_new_tokens=40)[0, given["input_ids"].shape[1] :]
                assert line["caption"] == processor.decode(tokens, skip_special_tokens=True).strip()


def test_ray_is_named_where_it_is_missing(monkeypatch, capsys, folder, tmp_path):
    monkeypatch.setattr(on_ray, "has_ray", lambda: False)
    status = main(["caption", "--images", str(folder), "--out", str(tmp_path / "out"), "--engine", "ray"])
    assert status == 1 and "pip install 'dyrate-kernels[caption]'" in capsys.readouterr().err
