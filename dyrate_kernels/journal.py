"""A file of JSON lines that are written as they come, below a first line that says what they are of; a killed run goes on with it."""

from __future__ import annotations

import json
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from dyrate_kernels.files import is_file

Line = TypeVar("Line")
_MOST = {int: 2**63 - 1, float: sys.float_info.max}
_FIRST = b'{"setting"'


class Journal:
    """Reads what an earlier run wrote; ``add`` writes behind it.

    Args:
        path: of the file; it and its folder are made with the first line.
        setting: of this run.

    Attributes:
        lines: of the earlier run. A last one that a kill cut in two is dropped, from the file too.

    Raises:
        ValueError: the file is of another setting, or no such file; it is left as it is.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path, self.setting = path, setting
        self.lines: list[dict[str, Any]] = []
        *whole, rest = (path.read_bytes() if path.exists() else b"").split(b"\n")
        for number, line in enumerate(whole, 1):
            value = self._parsed(number, line)
            if number > 1:
                self.lines.append(value)
            elif value.get("setting") != setting:
                made = value.get("setting", "another version")
                raise ValueError(f"{path} holds answers of {made}, this run is of {setting}; give another folder, or remove the file")
        if not whole and not rest.startswith(_FIRST[: len(rest)]):
            raise self.wrong(1, ValueError("it does not begin with a setting"))
        if rest:
            os.truncate(path, path.stat().st_size - len(rest))

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if not isinstance(value, dict):
                raise TypeError(f"it is {str(value)[:40]}")
            if number == 1 and "setting" not in value:
                raise ValueError("it has no setting")
        except (TypeError, ValueError, RecursionError) as error:
            raise self.wrong(number, error) from None
        return value

    def read(self, kind: type[Line]) -> list[Line]:
        """The lines as objects of a dataclass.

        Raises:
            ValueError: one lacks a field, has another, or a value of another type; names the file and the line.
        """
        types_of, found = typing.get_type_hints(kind), []
        for number, line in enumerate(self.lines, 2):
            try:
                for name, hint in types_of.items():
                    if name not in line or not _fits(line[name], hint):
                        raise ValueError(f"{name!r} is {str(line[name])[:40]!r}" if name in line else f"it has no {name!r}")
                found.append(kind(**line))
            except (TypeError, ValueError) as error:
                raise self.wrong(number, error) from None
        return found

    def wrong(self, number: int, error: Exception) -> ValueError:
        """Returns the error to raise where a line does not hold what it should; the first one has number 1."""
        return ValueError(f"{self.path} line {number} is no answer of this version ({error}); give another folder, or remove the file")

    def add(self, *lines: dict[str, Any]) -> None:
        """Writes lines; they are in the file when it returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                print(json.dumps({"setting": self.setting}), file=file)
            for line in lines:
                print(json.dumps(line), file=file)


def is_journal(path: Path) -> bool:
    """Returns whether a file begins as a journal does."""
    if not is_file(path):
        return False
    with path.open("rb") as file:
        return file.read(len(_FIRST) + 3).removeprefix(b"\xef\xbb\xbf").startswith(_FIRST)


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value of JSON is of a dataclass's type: plain ones, lists of them, ``X | None``; others are not looked at.
    Numbers must fit into 64 bits, as in the tables that are made of them.
    """
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if hint in (int, float):
        if not isinstance(value, int | float if hint is float else int) or isinstance(value, bool):
            return False
        return not abs(value) > _MOST[hint]
    return not isinstance(hint, type) or isinstance(value, hint)
