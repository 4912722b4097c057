"""Answers of an earlier run: what a kill left is gone on with, what is damaged is named and left as it is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dyrate_kernels.files import printable
from dyrate_kernels.journal import Journal

SETTING = {"of": "caf\udce9"}


@dataclass
class Line:
    name: str
    count: int
    share: float
    tokens: list[int]
    text: str | None = None


LINE = {"name": "a", "count": 1, "share": 1, "tokens": [1, 2], "text": None}


def written(tmp_path, *lines):
    journal = Journal(tmp_path / "x.jsonl", SETTING)
    journal.add(*lines)
    return tmp_path / "x.jsonl"


def test_what_was_written_is_read(tmp_path):
    path = written(tmp_path, LINE, {**LINE, "name": "b\u2028c"})
    assert [line.name for line in Journal(path, SETTING).read(Line)] == ["a", "b\u2028c"]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # saved by an editor
    assert len(Journal(path, SETTING).read(Line)) == 2


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_a_kill_cut_is_dropped_and_all_others_stay(cut, tmp_path):
    path = written(tmp_path, LINE, LINE)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert len(Journal(path, SETTING).lines) == 1 and whole.startswith(path.read_bytes())
    Journal(path, SETTING).add(LINE)
    assert path.read_bytes() == whole
    path.write_bytes(whole[: min(cut, 20)])  # in the middle of the first line
    assert Journal(path, SETTING).lines == [] and path.read_bytes() == b""


CHANGED = {
    "a field is missing": {name: value for name, value in LINE.items() if name != "share"},
    "another field": {**LINE, "more": 1},
    "no number": {**LINE, "count": "1"},
    "no truth": {**LINE, "count": True},
    "a list of others": {**LINE, "tokens": ["a"]},
    "null": {**LINE, "name": None},
    "too large a count": {**LINE, "count": 10**30},
    "too large a token": {**LINE, "tokens": [1, -(10**30)]},
    "too large a share": {**LINE, "share": 10**400},
    "an endless share": {**LINE, "share": float("inf")},
}


@pytest.mark.parametrize("line", CHANGED.values(), ids=CHANGED)
def test_a_line_of_another_version_is_named(line, tmp_path):
    path = written(tmp_path, LINE, line)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"x\.jsonl line 3 is no answer of this version"):
        Journal(path, SETTING).read(Line)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"null", b"[]", b"3", b'"x"', b"{", b"", b'{"name": "caf\xe9"}', b"[" * 50_000, b"\0\0"])
def test_a_damaged_line_is_named_and_left(line, tmp_path):
    path = written(tmp_path, LINE)
    path.write_bytes(path.read_bytes() + line + b"\n" + b'{"cut')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"x\.jsonl line 3 is no answer of this version"):
        Journal(path, SETTING)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["utf-16", "utf-32", b"words without an end", b"{}\n", b'["setting"]\n', b"\xff\xfe\n"])
def test_a_file_that_is_no_journal_is_named_and_left(content, tmp_path):
    path = written(tmp_path, LINE)
    path.write_bytes(content if isinstance(content, bytes) else path.read_text().encode(content))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"x\.jsonl line 1 is no answer of this version"):
        Journal(path, SETTING)
    assert path.read_bytes() == before


def test_another_setting_is_refused(tmp_path):
    path = written(tmp_path, LINE)
    with pytest.raises(ValueError, match="holds answers of"):
        Journal(path, {"of": "another"})


def test_names_that_are_no_utf8_are_written_out():
    assert printable("caf\udce9 \ud800 é") == "caf\\xe9 \\ud800 é"
