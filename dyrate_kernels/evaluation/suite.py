"""The interface of suites of questions, and the one that needs no files: drawn scenes. Public data sets: ``evaluation.suites``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dyrate_kernels import chat, shapes


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        name: unique in its suite.
        group: questions of a group are summed up together, e.g. ``"describe"``.
        messages, images: as ``chat.render`` and a processor take them; pictures may be decoded only when they are taken out.
        most: tokens that an answer may have.
    """

    name: str
    group: str
    messages: list[chat.Message]
    images: Sequence[Any]
    most: int


class Suite(Protocol):
    """Questions that can be asked one by one and scored one by one.

    Attributes:
        name: for files and headings.
        long: groups whose answers are long; they are summed up together, and apart from the short ones.
    """

    name: str

    @property
    def long(self) -> frozenset[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def score(self, index: int, text: str) -> tuple[float, float]:
        """(points, points that could be had) of an answer."""
        ...


class Subset:
    """Some questions of a suite.

    Args:
        suite: whose.
        indices: theirs in it.
    """

    def __init__(self, suite: Suite, indices: Sequence[int]) -> None:
        self.suite, self.indices = suite, list(indices)
        self.name, self.long = suite.name, suite.long

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Item:
        return self.suite[self.indices[index]]

    def score(self, index: int, text: str) -> tuple[float, float]:
        """As the suite does."""
        return self.suite.score(self.indices[index], text)


class ShapesSuite:
    """Held-out scenes, which no training ever sees (their seeds are negative): descriptions, and short questions of each kind.

    Args:
        scenes: questions of each task.
        seed: 0 is the published set; every other one is a set of its own.
        tasks: of ``dyrate_kernels.shapes.TASKS``.
        size: of the pictures.
    """

    name = "shapes"
    long = frozenset({"describe"})

    def __init__(self, scenes: int = 100, seed: int = 0, tasks: Sequence[str] = shapes.TASKS, size: int = 96) -> None:
        if scenes < 1:
            raise ValueError(f"scenes must be at least 1, got {scenes}")
        if not 0 <= seed < 10**6:
            raise ValueError(f"seed must be in [0, {10**6 - 1}], got {seed}")
        unknown = [task for task in tasks if task not in shapes.TASKS]
        if unknown or not tasks:
            raise ValueError(f"tasks must be some of {', '.join(shapes.TASKS)}, got {', '.join(unknown) or 'none'}")
        self.scenes, self.seed, self.size = scenes, seed, size
        first = -1 - seed * 10**6
        self.samples = [shapes.make_sample(first - i, task) for task in tasks for i in range(scenes)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        most = 160 if sample.task == "describe" else 12
        name = f"{sample.task} {sample.scene.seed}"
        return Item(name, sample.task, [chat.user(sample.prompt, images=1)], [sample.image(self.size)], most)

    def score(self, index: int, text: str) -> tuple[float, float]:
        found = shapes.score(self.samples[index], text)
        return float(found.right), float(found.total)
