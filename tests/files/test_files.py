"""Folders that one run writes to, and names that are looked at before work begins."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dyrate_kernels.files import check_file, check_folder, locked, replaced, write_json

HOLD = """import sys, time, pathlib
from dyrate_kernels.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_writes_to_a_folder_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "new" / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=r"another run is writing to .*run; wait for it"), locked(folder):
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with locked(folder):
        assert (folder / ".lock").exists()
    with locked(folder):
        pass


def test_a_name_that_can_be_written_is_left_as_it_is(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("old")
    os.symlink(tmp_path / "far.json", tmp_path / "link.json")
    for name in ("there.json", "new.json", "link.json", "ünïcode ☃.json"):
        check_file("--out", tmp_path / name)
    assert there.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["link.json", "there.json"]
    check_folder("--report", tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_a_name_that_cannot_be_written_is_refused_with_why(tmp_path):
    (tmp_path / "file").touch()
    os.symlink("loop", tmp_path / "loop")
    for name, why in (
        ("missing/x.json", "the folder .*missing does not exist; make it first"),
        (".", "is a folder; give the name of a file"),
        ("new.png/", "cannot be written"),
        ("new.png/.", "cannot be written"),
        ("file/x.json", "the folder .*file does not exist"),
        ("loop", "cannot be written"),
        ("x" * 300, "cannot be written"),
        ("nul\0.json", "cannot be written"),
    ):
        with pytest.raises(ValueError, match=f"--out .*{why}"):
            check_file("--out", f"{tmp_path}/{name}")
    for name, why in (("file", "is a file; give a folder"), ("file/below", "cannot be written"), ("x" * 300, "cannot be written")):
        with pytest.raises(ValueError, match=f"--out .*{why}"):
            check_folder("--out", tmp_path / name)
    (tmp_path / "run" / "table.part").mkdir(parents=True)
    with pytest.raises(ValueError, match="--out .*run: table.part is a folder, but a file will be written there; move it"):
        check_folder("--out", tmp_path / "run", ["table", "table.part"])
    with pytest.raises(ValueError, match="--out .*cannot be written|does not exist"):
        check_file("--out", "/proc/nothing.json")


def test_a_json_file_is_replaced_whole_and_a_link_stays_one(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("[1]\n")
    link.symlink_to(real)
    write_json(link, {"a": [1, 2]})
    assert link.is_symlink() and json.loads(real.read_text()) == {"a": [1, 2]}
    with pytest.raises(TypeError):
        write_json(real, {"a": object()})
    with pytest.raises(RuntimeError, match="killed"), replaced(real) as part:
        part.write_text("half")
        raise RuntimeError("killed")
    assert json.loads(real.read_text()) == {"a": [1, 2]}
    write_json("/dev/null", [1])
    assert not Path("/dev/null").is_file()
