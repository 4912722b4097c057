"""JSON and JSON-lines files as people write them."""

from __future__ import annotations

import json

import pytest

from dyrate_kernels.json_files import Broken, read_entries, read_json

ODD = "one\u2028two\u2029three\x85four\x0bfive"
ENTRIES = [{"text": ODD}, {"text": "é"}]
LINES = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in ENTRIES)
WHOLE = json.dumps(ENTRIES, ensure_ascii=False, indent=1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text, name", [(WHOLE, "x.json"), (LINES, "x.json"), (LINES, "x.jsonl"), (WHOLE, "x.jsonl")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_and_every_end_of_line(encoding, text, name, end, tmp_path):
    (tmp_path / name).write_bytes(text.replace("\n", end).encode(encoding))
    assert read_json(tmp_path / name) == ENTRIES
    places = ["line 1", "line 2"] if text is LINES else ["entry 0", "entry 1"]
    assert read_entries(tmp_path / name) == list(zip(places, ENTRIES, strict=True))


def test_one_line_is_a_list_of_one_in_a_lines_file(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    assert read_entries(tmp_path / "x.jsonl") == [("line 1", {"a": 1})] and read_json(tmp_path / "x.jsonl") == {"a": 1}


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "line, words", [(b"{oops", "Expecting"), (b'{"a": "caf\xe9"}', "UTF-8"), (DEEP.encode(), "nested too deeply"), (b"1" * 5000, "digit")]
)
def test_a_broken_line_is_one_entry_and_is_named(line, words, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\r\n\r\n' + line + b'\r\n{"a": NaN, "a": 2}\r\n')
    (one, first), (two, broken), (three, last) = read_entries(tmp_path / "x.jsonl")
    assert (one, two, three) == ("line 1", "line 3", "line 4") and first == {"a": 1} and last == {"a": 2}
    assert isinstance(broken, Broken) and words in broken.why
    with pytest.raises(ValueError, match=r"x\.jsonl line 3 is not JSON"):
        read_json(tmp_path / "x.jsonl")


@pytest.mark.parametrize("broken", [b'{"image": ', b'{"a": [', b"words", b'{"a": "caf\xe9"}', b"[" * 9, b"3"])
@pytest.mark.parametrize("name", ["x.json", "x.JSON"])
def test_lines_are_lines_in_any_file_though_the_first_is_broken(name, broken, tmp_path):
    (tmp_path / name).write_bytes(broken + b"\n" + LINES.encode())
    (place, first), *more = read_entries(tmp_path / name)
    assert place == "line 1" and (isinstance(first, Broken) or broken == b"3")
    assert more == [("line 2", ENTRIES[0]), ("line 3", ENTRIES[1])]
    (tmp_path / name).write_bytes(b'words\n{"a": \n\n{"a": 1}\n')  # more of them are broken than not
    assert [place for place, _ in read_entries(tmp_path / name)] == ["line 1", "line 2", "line 4"]


@pytest.mark.parametrize(
    "text",
    ['[\n{"a": 1}\n', '[{"a": 1},\n{"b": 2}\n', '{\n "a": [\n  {"b": 1},\n  {}\n ]\n', '[\n{"a": 1},\n{"a": 2}\n}\n'],
)
def test_one_value_over_many_lines_that_is_broken_is_not_taken_for_lines(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not JSON \("):
        read_entries(tmp_path / "x.json")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"), (b"  \n", "is empty"), (b"{oops", "is not JSON"), (b"[1, 2", "is not JSON"),
        (DEEP.encode(), "nested too deeply"), (b'[{"a": "caf\xe9"}]', "no text file"), (b"\xff\xd8\xff\xe0\0\x10JFIF", "no text file"),
        (b"\x89PNG\r\n\x1a\n\0\0", "no text file"),
    ],
)  # fmt: skip
def test_files_that_are_no_json_are_named(content, words, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    for read in (read_json, read_entries):
        with pytest.raises(ValueError, match=rf"x\.json .*{words}"):
            read(tmp_path / "x.json")


@pytest.mark.parametrize("text", ['{"a": {}}', "3", '"words"', "null", "NaN"])
def test_entries_must_be_a_list(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json must be a JSON list, or JSON lines"):
        read_entries(tmp_path / "x.json")
    (tmp_path / "y.jsonl").write_text("oops\noops\n")
    with pytest.raises(ValueError, match=r"y\.jsonl is not JSON, nor JSON lines"):
        read_entries(tmp_path / "y.jsonl")
