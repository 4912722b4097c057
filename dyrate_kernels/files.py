"""Writing results so that a kill loses none of them, and names so that none stops a run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields the name of a file to write, which takes the place of ``path`` at the end: a kill leaves the earlier one or the new one."""
    target = Path(os.path.realpath(path))  # a link stays one
    part = target.with_suffix(".part")
    yield part
    os.replace(part, target)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file that is whole or as it was; what is no regular file (``/dev/stdout``) is written to as it is."""
    text, target = json.dumps(value, indent=1) + "\n", Path(path)
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    with replaced(target) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While it lasts this process alone writes to ``folder``, which is made where it is missing. The lock goes with the process: one that
    was killed leaves none.

    Raises:
        RuntimeError: another run is writing there.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another run is writing to {folder}; wait for it, or give another --out") from None
        yield


def check_file(name: str, path: str | os.PathLike[str]) -> None:
    """Checks that a file can be written there, by opening it; its contents stay.

    Args:
        name: of the option or argument, for messages.

    Raises:
        ValueError: it cannot; says why.
    """
    file = Path(path)
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{name} {path}: the folder {file.parent} does not exist; make it first")
    if not file.name or os.path.isdir(file):
        raise ValueError(f"{name} {path}: is a folder; give the name of a file")
    there = os.path.exists(file)
    try:
        with open(path, "ab"):  # the name as it was given: a Path would lose a slash at its end
            pass
        if not there:
            Path(os.path.realpath(file)).unlink()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} {path}: cannot be written ({getattr(error, 'strerror', None) or error}); give another file") from None


def check_folder(name: str, path: str | os.PathLike[str], files: Iterable[str] = ()) -> None:
    """Checks that files can be written to a folder, which is made where it is missing.

    Args:
        name: of the option or argument, for messages.
        files: that will be written there, and over those of their names.

    Raises:
        ValueError: they cannot, or there is a folder with the name of one of ``files``; says why.
    """
    folder = Path(path)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ValueError(f"{name} {path}: is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_file(name, folder / ".dyrate-check")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} {path}: cannot be written ({getattr(error, 'strerror', None) or error}); give another folder") from None
    for each in files:
        if os.path.isdir(folder / each):
            raise ValueError(f"{name} {path}: {each} is a folder, but a file will be written there; move it, or give another folder")


def printable(text: str) -> str:
    r"""A text that any file and any terminal takes: bytes of a file name that are no UTF-8 become ``\xe9``, lone surrogates ``\ud800``."""
    text = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_file(path: Path) -> bool:
    """As ``Path.is_file``; False for what cannot be a name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False
