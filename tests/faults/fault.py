"""A planted fault, and where the lists of them are."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """A small change of one source file that makes results wrong.

    Attributes:
        file: path in the repository.
        old: text that stands in the file once.
        new: what takes its place.
        races: a missing barrier or the like, which the race detector of the emulation sees, where nothing else may.
    """

    file: str
    old: str
    new: str
    races: bool = False

    def applied(self, text: str) -> str:
        """The file's text with the fault; ValueError where ``old`` does not stand in it once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: expected this text once, found it {text.count(self.old)} times:\n{self.old}")
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        short = [" ".join(text.split()) for text in (self.old, self.new)]
        return f"{self.file}: {short[0]}  ->  {short[1]}"


@dataclass(frozen=True)
class Family:
    """Faults of one family of kernels, and the tests of which one must see each.

    Attributes:
        backend: of ``tests.differential``.
        operators: those of them that the family runs.
        calls: of ``tests.differential``, first of all.
        cases: case files (pytest), after that.
        faults: the list.
        compiled: of ``csrc``, the files that are compiled with the fault in them; the others, that is most of the time, are without it.
    """

    backend: str
    operators: tuple[str, ...]
    calls: int
    cases: tuple[str, ...]
    faults: tuple[Fault, ...]
    compiled: tuple[str, ...] = ()


NAMES = ("attention", "paged", "decision", "rows", "layers", "cuda-attention", "cuda-staged", "cuda-decision", "cuda-rows")


def load(name: str) -> Family:
    """A family by name."""
    family = importlib.import_module(f"tests.faults.{name.replace('-', '_')}").FAMILY
    assert isinstance(family, Family)
    return family
