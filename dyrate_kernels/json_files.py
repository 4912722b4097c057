"""JSON and JSON-lines files as people write them: the one reader of all commands."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *_LINE_SUFFIXES)
_ERRORS = (ValueError, RecursionError)  # of json.loads; the second where brackets are nested too deeply


@dataclass(frozen=True)
class Broken:
    """A line that is no JSON.

    Attributes:
        why: in a parser's words.
    """

    why: str


def read_json(path: Path) -> Any:
    """The content of a JSON file, or the list of a JSON-lines file's values.

    Raises:
        ValueError: it is neither, or is empty; names the file, and the line.
        OSError: it cannot be read.
    """
    content, lines = _read(path)
    for line, value in zip(lines, content if lines else (), strict=True):
        if isinstance(value, Broken):
            raise ValueError(f"{path} line {line} is not JSON ({value.why}); mend the line, or remove it")
    return content


def read_entries(path: Path) -> list[tuple[str, Any]]:
    """The entries of a JSON list, or of a JSON-lines file, each with the place where it stands: ``entry 3``, ``line 5``.

    A line that is no JSON is an entry of type :class:`Broken`.

    Raises:
        ValueError: the file is neither of them; names the file.
        OSError: it cannot be read.
    """
    content, lines = _read(path)
    if lines:
        return [(f"line {line}", value) for line, value in zip(lines, content, strict=True)]
    if isinstance(content, dict) and path.suffix.lower() in _LINE_SUFFIXES:
        return [("line 1", content)]
    if not isinstance(content, list):
        raise ValueError(f"{path} must be a JSON list, or JSON lines, got {str(content)[:80]}")
    return [(f"entry {number}", value) for number, value in enumerate(content)]


def _read(path: Path) -> tuple[Any, list[int]]:
    """(content, no lines), or (values or Broken, the number of the line that each stands in)."""
    raw = path.read_bytes()
    if not raw.strip():
        raise ValueError(f"{path} is empty")
    encoding = json.detect_encoding(raw)
    encoding = "utf-8-sig" if encoding.startswith("utf-8") else encoding
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        whole: Exception = error
    else:
        try:
            return json.loads(text), []
        except _ERRORS as error:
            whole = error
    # U+2028 and its like, which splitlines() would part at, may stand in a text; these may not
    texts = re.split("\r\n|\n|\r", raw.decode(encoding, "surrogateescape" if encoding == "utf-8-sig" else "replace"))
    values = [(number, _value(each)) for number, each in enumerate(texts, 1) if each.strip()]
    if path.suffix.lower() not in _LINE_SUFFIXES and not _are_lines([value for _, value in values], texts):
        kind = "no text file, so no JSON" if isinstance(whole, UnicodeDecodeError) else "not JSON"
        raise ValueError(f"{path} is {kind} ({_words(whole)})")
    if all(isinstance(value, Broken) for _, value in values):
        raise ValueError(f"{path} is not JSON, nor JSON lines ({_words(whole)})")
    return [value for _, value in values], [number for number, _ in values]


def _are_lines(values: list[Any], texts: list[str]) -> bool:
    """Returns whether a file that is no JSON value is JSON lines, some of them broken, rather than one value over many lines that is."""
    objects = sum(isinstance(value, dict) for value in values)
    if not objects:
        return False
    cut = any(re.search(r"[\[{,]\s*$|^[\s\[\]{}]+$", text) for text in texts)  # as lines of one value that goes on
    return isinstance(values[0], dict) or 2 * objects > len(values) or not cut


def _value(text: str) -> Any:
    try:
        text.encode()  # a byte that is no UTF-8 stands for itself
        return json.loads(text)
    except _ERRORS as error:
        return Broken(_words(error))


def _words(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"no UTF-8 at character {error.start + 1}"
    return "brackets are nested too deeply" if isinstance(error, RecursionError) else str(error)
