"""One call of a model's own ``get_*_features``, reduced: where each row comes from (``Layout``), and what is left (``Unit``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.vision.base import Crop, FeatureReducer, Reducer, Selector, Visual


@dataclass
class Unit:
    """One picture or video, reduced.

    Attributes:
        values: ``[n, d]``; keep bool ``[n]``; order int64 ``[n]`` or None, as in ``Merged``.
        tail: placeholders after the rows that the model fills later (a video's newline in older versions of transformers).
    """

    values: Tensor
    keep: Tensor
    order: Tensor | None
    tail: int

    def arranged(self, last: bool) -> tuple[Tensor, Tensor]:
        """Values ``[n, d]`` at the placeholders that stay, zeros elsewhere, and which stay, bool ``[n + tail]``.

        Args:
            last: the prompt ends with the last placeholder, which must stay then: the next token is read off there.
        """
        kept = self.keep.nonzero()[:, 0]
        if self.order is not None:
            columns, kept = kept, kept[self.order[kept].argsort(stable=True)]
        else:
            columns = kept
        if last and not self.tail and len(columns) and int(columns[-1]) != len(self.keep) - 1:
            columns = columns.clone()
            columns[-1] = len(self.keep) - 1
        keep = torch.zeros_like(self.keep)
        keep[columns] = True
        values = torch.zeros_like(self.values)
        values[columns] = self.values[kept]
        return values, torch.cat([keep, keep.new_ones(self.tail)])


@dataclass
class Layout:
    """Where the rows of one picture or video come from.

    Attributes:
        visual: the rows.
        patch: int64 ``[n]``, index of the patch in its crop's grid; -1 for rows that are none, and where rows are mixed.
        scores: by name, float ``[n]``.
        exact: each patch row is one patch of the tower, whose scores are at hand; False: the model mixes patches, or the tower is not read.
        tiles: rows and columns of tiles, or None.
        first: ordinal of its first crop among all crops of the call.
    """

    visual: Visual
    patch: Tensor
    scores: dict[str, Tensor]
    exact: bool
    tiles: tuple[int, int] | None
    first: int
    tail: int = 0


class Run:
    """One call for the features of all pictures, or of all videos. What differs between models is ``encode`` and ``layouts``.

    Args:
        kind: ``image`` or ``video``.
        backend: name of the operator backend.
    """

    def __init__(self, model: Any, kind: str, reducers: Sequence[Reducer], backend: str) -> None:
        self.model, self.base, self.kind, self.reducers, self.backend = model, model.base_model, kind, reducers, backend

    def encode(self, encoder: Callable, fields: dict[str, Any], pixels: Tensor) -> Any:
        """Calls ``encoder``, the model's ``get_*_features``, with ``fields``, of which ``pixels`` are one."""
        return encoder(**fields, return_dict=True)

    def layouts(self, output: Any) -> list[Layout]:
        """One for each picture or video, in the order of the model's output."""
        raise NotImplementedError(f"{type(self).__name__} must define layouts(output)")

    def reduce(self, layouts: Sequence[Layout], sequences: Sequence[int] | None = None) -> list[Unit]:
        """The reduced pictures or videos, in the order of the model's output.

        Args:
            layouts: of that output.
            sequences: the one that each is in, so that what happens to it does not depend on the batch; None: all are in one.
        """
        sequences = [0] * len(layouts) if sequences is None else sequences
        seen: Counter[int] = Counter()
        found = []
        for layout, sequence in zip(layouts, sequences, strict=True):
            found.append(self._reduce_one(layout, seen[sequence]))
            seen[sequence] += 1
        return found

    def from_tower(self, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """``keep`` and ``order`` of ``Unit`` as the tower left them: here, whole."""
        return torch.ones_like(layout.visual.patch), None

    def whole_crop(self, layout: Layout, index: int) -> Crop:
        """Every patch of a crop, where a layout is ``exact``."""
        raise NotImplementedError(f"{type(self).__name__} makes exact layouts, so it must define whole_crop(layout, index)")

    def _reduce_one(self, layout: Layout, number: int) -> Unit:
        visual, values = layout.visual, layout.visual.values
        keep, order = self.from_tower(layout)
        for index, reducer in enumerate(self.reducers):
            if isinstance(reducer, Selector):
                keep = keep & self._select(reducer, layout, keep, number, whole=index == 0 and layout.exact)
            elif isinstance(reducer, FeatureReducer):
                left = keep.nonzero()[:, 0]
                found = reducer.reduce(visual.take(keep, values))
                values = values.index_copy(0, left, found.values.to(values.dtype))
                keep = keep.index_copy(0, left, found.keep)
        return Unit(values, keep, order, layout.tail)

    def _select(self, reducer: Selector, layout: Layout, alive: Tensor, number: int, whole: bool) -> Tensor:
        visual = layout.visual
        keep = torch.ones_like(alive)
        ids = range(int(visual.crop.max()) + 1)
        crops = [self.whole_crop(layout, index) if whole else self._crop_of(layout, index, alive) for index in ids]
        if visual.video:
            chosen = [reducer.choose([crop], None, number * len(crops) + index)[0] for index, crop in enumerate(crops)]
        else:
            chosen = reducer.choose(crops, layout.tiles, number)
        for index, mark in enumerate(chosen):
            patches = visual.patch & (visual.crop == index)
            if whole:
                keep[patches] = mark.to(keep.device)[layout.patch[patches]]
            else:
                keep[patches & alive] = mark.to(keep.device)
        return keep

    def _crop_of(self, layout: Layout, index: int, alive: Tensor) -> Crop:
        visual = layout.visual
        every = visual.patch & (visual.crop == index)
        present = every & alive
        height, width = (int(coordinate[every].max()) + 1 if bool(every.any()) else 1 for coordinate in (visual.y, visual.x))
        scores = {name: score[present] for name, score in layout.scores.items()}
        return Crop(scores, visual.y[present], visual.x[present], height, width)
