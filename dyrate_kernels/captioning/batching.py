"""Which pictures are generated together: those of like numbers of visual tokens, whose captions will be of like length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

_SIDE = 32  # of the small copy that a picture's detail is measured on
_TRUST = 4  # captions of like pictures that count as much as all captions together
_STEPS = 8  # kinds of visual tokens from one number to twice as many


class Lengths:
    """Expected length of a caption: the mean of those of pictures of like detail so far, drawn towards the mean of all where those are few.

    With ``n`` captions of like pictures it is ``(their sum + 4 * mean of all) / (n + 4)``, and 0 before the first caption. Nothing but the
    captions seen and the pictures goes in, so the same pictures in the same order give the same batches.
    """

    def __init__(self) -> None:
        self._sums: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    def see(self, detail: int, tokens: int) -> None:
        """A picture of this detail has a caption of so many tokens."""
        self._sums[detail] = self._sums.get(detail, 0) + tokens
        self._counts[detail] = self._counts.get(detail, 0) + 1

    def expected(self, detail: int) -> float:
        """Returns how many tokens the caption of a picture of this detail will have; 0 where no caption was seen."""
        if not self._counts:
            return 0.0
        mean = sum(self._sums.values()) / sum(self._counts.values())
        return (self._sums.get(detail, 0) + _TRUST * mean) / (self._counts.get(detail, 0) + _TRUST)


def detail(picture: Any) -> int:
    """Returns how much there is to see in a PIL picture, a small whole number: twice the binary logarithm of how much neighbouring
    points of a grey copy of 32 x 32 differ, in levels of 256, mean over all.
    """
    import numpy as np

    grey = np.asarray(picture.resize((_SIDE, _SIDE), reducing_gap=2.0).convert("L"), dtype=np.float64)
    differs = (np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2
    return round(2 * math.log2(1 + differs))


def key(visual_tokens: int, detail: int, lengths: Lengths) -> tuple[int, float, int]:
    """Returns what pictures are sorted by: the kind of their number of visual tokens (eight from one number to twice as many, so that
    little is padded), the expected length, and the detail while no length is known.
    """
    return round(_STEPS * math.log2(1 + visual_tokens)), lengths.expected(detail), detail


def batches(pictures: dict[int, Any], key: Callable[[int], Any], size: int) -> Iterator[list[int]]:
    """The keys of ``pictures``, at most ``size`` at a time, sorted by ``key`` and then by themselves."""
    order = sorted(pictures, key=lambda index: (key(index), index))
    for start in range(0, len(order), size):
        yield order[start : start + size]
