"""A second line of calls for what follows from a decode step's decision, beside the layers that do not wait for it.

A score layer itself needs its attention's output alone: rate, count, selection, effect and record are for the layers after it. Whoever runs
a step may lend an :class:`Aside`, on which all of that then runs (a captured step: a second stream), while the score layer goes on with its
products. Without one everything runs in its place. Knows no device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor


class Aside(Protocol):
    """A second line of calls beside the step's own one, the main line."""

    def fork(self) -> AbstractContextManager[Any]:
        """Within: calls run in the second line, behind what either line was given before, and beside what the main line is given next."""

    def join(self) -> None:
        """Makes what the main line is given from now on wait for the second line."""


class Branch:
    """The calls of a step that run aside, and until when.

    Between a fork and its join the main line neither reads nor writes what was made or written aside, writes nothing that is read there,
    and what it made for there stays referenced: else its memory would be given to the next tensor of the main line.

    Attributes:
        aside: None: everything runs in its place.
    """

    def __init__(self) -> None:
        self.aside: Aside | None = None
        self._open = False
        self._before: int | None = None
        self._held: list[Tensor | None] = []

    @property
    def apart(self) -> bool:
        """Returns whether what is forked really runs aside."""
        return self.aside is not None

    @contextlib.contextmanager
    def fork(self, before: int | None, *read: Tensor | None) -> Iterator[None]:
        """Within: calls run aside, if there is one.

        Args:
            before: the first layer that waits for them; None: the end of the step does.
            read: what the main line made and they read.
        """
        if self.aside is None:
            yield
            return
        self._held += read
        if before is not None:
            self._before = before if self._before is None else min(before, self._before)
        self._open = True
        with self.aside.fork():
            yield

    def reach(self, layer: int) -> None:
        """The main line comes to ``layer``: joins what it waits for."""
        if self._before is not None and layer >= self._before:
            self.join()

    def join(self) -> None:
        """Joins what is aside."""
        if self._open and self.aside is not None:
            self.aside.join()
        self._open, self._before, self._held = False, None, []
