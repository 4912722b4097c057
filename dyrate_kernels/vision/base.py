"""The interface of every reducer: how many visual tokens reach the language model at all, and what they hold.

A reducer knows torch, ``ops`` and nothing of a model. It runs once, at prefill, at one of three places:

- :class:`Selector`: chooses tokens of each crop or frame by what the tower attended to. A choice commutes with the projector.
- :class:`TowerMerger`: changes the tower's features before the projector, then chooses (merged tokens stand where a token stood).
- :class:`FeatureReducer`: works on the projected features of one picture or video, in the language model's order.

Rows that belong to no patch (the newline of LLaVA-NeXT, the [CLS] of Video-LLaVA's frames) always stay and are no part of a budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

# what a reducer can ask the tower for (``Reducer.needs``)
ATTENTION = "attention"  # received from [CLS], in the layer that makes the features; mean over heads
ATTENTION_FIRST = "attention_first"  # the same in layer 0
KEYS = "keys"  # of the layer that makes the features, mean over heads
WHOLE_ATTENTION = "whole_attention"  # received from [CLS] in the layer that reads the features, all heads taken as one
WHOLE_KEYS = "whole_keys"  # of that layer, all heads side by side


@dataclass
class Crop:
    """The tokens of one crop or frame that are still there, as a selector sees them.

    Attributes:
        scores: by name of ``Reducer.needs``, float ``[n]``.
        y, x: int64 ``[n]``, position in the crop's grid of patches.
        height, width: of that grid.
    """

    scores: dict[str, Tensor]
    y: Tensor
    x: Tensor
    height: int
    width: int

    def __len__(self) -> int:
        return self.y.shape[0]


@dataclass
class TowerFeatures:
    """All crops and frames of one pass of the tower, before the projector.

    Attributes:
        features: ``[C, T, D]``, one row a patch.
        cls: ``[C, D]``, the [CLS] token of the same layer, which is not among the features; None where there is none.
        scores: by name of ``Reducer.needs``: attention float ``[C, T]``, keys ``[C, T, E]``.
    """

    features: Tensor
    cls: Tensor | None
    scores: dict[str, Tensor]


@dataclass
class Merged:
    """Answer of a :class:`TowerMerger`.

    Attributes:
        features: ``[C, T, D]``; rows that are not kept may hold anything.
        keep: bool ``[C, T]``.
        order: int64 ``[C, T]`` or None (all 0): of the kept rows of a crop those below 0 come first, then those at 0, then those above,
            each in the order of their indices. Tiles are joined to one grid: there those at 0 come first, then those below, then those
            above.
    """

    features: Tensor
    keep: Tensor
    order: Tensor | None = None


@dataclass
class Visual:
    """One picture or video as the language model would receive it.

    Attributes:
        values: ``[n, d]``, projected.
        crop: int64 ``[n]``, crop (0 = the whole picture, then tiles) or frame; -1 for rows outside of any (newlines).
        y, x: int64 ``[n]``, position in the grid of ``segment``; x is -1 for rows that are no patch.
        segment: int64 ``[n]``: a frame, or 0 for the whole picture and 1 for the joined grid of its tiles.
        video: whether crops are frames.
    """

    values: Tensor
    crop: Tensor
    y: Tensor
    x: Tensor
    segment: Tensor
    video: bool

    @property
    def patch(self) -> Tensor:
        """bool ``[n]``: rows that are patches."""
        return (self.x >= 0) & (self.crop >= 0)

    def take(self, keep: Tensor, values: Tensor) -> Visual:
        """The rows ``keep`` (bool ``[n]``), with these values ``[n, d]``."""
        return Visual(values[keep], self.crop[keep], self.y[keep], self.x[keep], self.segment[keep], self.video)


@dataclass
class Reduced:
    """Answer of a :class:`FeatureReducer`: values ``[n, d]``, of which the rows ``keep`` (bool ``[n]``) count."""

    values: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Reducer:
    """Base of every reducer. Subclasses are frozen dataclasses: options are fields, checked when made.

    Attributes:
        name: registry name.
        needs: what it asks the tower for.
        first: must be the first of a chain (it needs whole grids).
        in_layers: works between the tower's layers, which then see merged tokens (``vision.tome``).
        videos_only: changes nothing but videos.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    first: ClassVar[bool] = False
    in_layers: ClassVar[bool] = False
    videos_only: ClassVar[bool] = False

    @property
    def drops(self) -> bool:
        """Returns whether these options ask for any token to be dropped at all."""
        return True

    @property
    def reads_tower(self) -> bool:
        """Returns whether it needs to look into the vision tower; else what comes out of the projector is enough."""
        return bool(self.needs)

    def plan(self, patches: int, layers: int) -> Sequence[int]:
        """Returns how many pairs of ``patches`` tokens merge in each of ``layers`` layers, where the reducer works ``in_layers``."""
        raise NotImplementedError(f"{type(self).__name__} works in the tower's layers, so it must define plan(patches, layers)")


@dataclass(frozen=True)
class Selector(Reducer):
    """Chooses tokens crop by crop.

    Attributes:
        keep: share of a crop's or frame's patches that stays, in (0, 1]; at least one patch stays.
        tokens: how many of each crop or frame stay instead; None: ``keep`` says it.
    """

    keep: float = 0.25
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_budget(self.keep, self.tokens)

    @property
    def drops(self) -> bool:
        return self.tokens is not None or self.keep < 1

    def choose(self, crops: Sequence[Crop], tiles: tuple[int, int] | None, unit: int) -> list[Tensor]:
        """Chooses what stays.

        Args:
            crops: of one picture (the whole picture first, then its tiles), or one frame.
            tiles: rows and columns of tiles; None: there are none.
            unit: ordinal of the picture or frame within its sequence.

        Returns:
            bool ``[n]`` for each crop.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose(crops, tiles, unit)")


@dataclass(frozen=True)
class TowerMerger(Reducer):
    """Merges in the tower's feature space. Options ``keep`` and ``tokens`` as of :class:`Selector`."""

    keep: float = 0.25
    tokens: int | None = None

    first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_budget(self.keep, self.tokens)

    @property
    def drops(self) -> bool:
        return self.tokens is not None or self.keep < 1

    @property
    def reads_tower(self) -> bool:
        return True

    def merge(self, tower: TowerFeatures) -> Merged:
        """See :class:`Merged`."""
        raise NotImplementedError(f"{type(self).__name__} must define merge(tower)")


@dataclass(frozen=True)
class FeatureReducer(Reducer):
    """Works on what the language model would receive."""

    def reduce(self, visual: Visual) -> Reduced:
        """See :class:`Reduced`."""
        raise NotImplementedError(f"{type(self).__name__} must define reduce(visual)")


def budget(n: int, keep: float, tokens: int | None = None) -> int:
    """Returns how many of ``n`` stay: ``tokens``, or ``floor(n * keep + 1e-6)``; at least 1 and at most n, 0 of none."""
    count = math.floor(n * keep + 1e-6) if tokens is None else tokens
    return min(max(count, 1), n)


def top(score: Tensor, count: int) -> Tensor:
    """bool like ``score`` ``[n]``: the ``count`` highest; ties to the smaller index, NaN ranks last."""
    order = score.float().nan_to_num(nan=float("-inf")).argsort(descending=True, stable=True)
    mark = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    mark[order[:count]] = True
    return mark


def check_budget(keep: Any, tokens: Any) -> None:
    """keep in (0, 1]; tokens a positive integer or None.

    Raises:
        TypeError, ValueError: they are not.
    """
    check_share("keep", keep, "the share of the visual tokens that stays")
    if tokens is not None:
        check_count("tokens", tokens, "how many visual tokens of each crop or frame stay")


def check_share(name: str, value: Any, meaning: str) -> None:
    """``value`` must be a number in (0, 1].

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in (0, 1] ({meaning}), got {value!r}")
    if not 0.0 < float(value) <= 1.0:  # also refuses NaN
        raise ValueError(f"{name} must be in (0, 1] ({meaning}), got {value!r}")


def check_count(name: str, value: Any, meaning: str, least: int = 1) -> None:
    """``value`` must be an integer of at least ``least``.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer ({meaning}), got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least} ({meaning}), got {value!r}")
