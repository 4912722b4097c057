"""A file of JSON lines that are written as they come, below a first line that says what they are of; a killed run goes on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """Reads what an earlier run wrote; ``add`` writes behind it.

    Args:
        path: of the file; it and its folder are made with the first line.
        setting: of this run.

    Attributes:
        lines: of the earlier run. A last one that a kill cut in two is dropped, from the file too.

    Raises:
        ValueError: the file is of another setting, or no such file.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path, self.setting = path, setting
        self.lines: list[dict[str, Any]] = []
        texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if texts and not texts[-1].endswith("\n"):
            texts.pop()
            path.write_text("".join(texts), encoding="utf-8")
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
                made = line["setting"] if number == 1 else None
            except (KeyError, TypeError, ValueError) as error:
                raise self.wrong(number, error) from None
            if number > 1:
                self.lines.append(line)
            elif made != setting:
                raise ValueError(f"{path} holds answers of {made}, this run is of {setting}; give another folder, or remove the file")

    def wrong(self, number: int, error: Exception) -> ValueError:
        """What to raise where a line does not hold what it should; the first one has number 1."""
        return ValueError(f"{self.path} line {number} is no answer of this version ({error}); give another folder, or remove the file")

    def add(self, *lines: dict[str, Any]) -> None:
        """Writes lines; they are in the file when it returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                print(json.dumps({"setting": self.setting}), file=file)
            for line in lines:
                print(json.dumps(line), file=file)
