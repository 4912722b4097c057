"""Writing results so that a kill loses none of them, and names so that none stops a run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """A JSON file that is whole or not there."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


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
