"""The choice of the visual tokens of each picture that make a pool (retention ``pool``): from tensors alone, no host read."""

from __future__ import annotations

import torch
from torch import Tensor

from dyrate_kernels.generation.index import scattered
from dyrate_kernels.spacing import spaced

_ROUNDING = 1e-6  # as of ``ops.keep_count``: 0.29 * 50 is 14.5 - tiny and counts as 14.5


def pictures(column: Tensor, new: Tensor) -> Tensor:
    """Numbers the pictures: runs of visual tokens in adjacent columns.

    Args:
        column: int ``[B, N]``, of each visual token, ascending.
        new: bool ``[B, N]``, those that are looked at.

    Returns:
        int64 ``[B, N]``: which picture each is of, from 0; -1 for others.
    """
    follows = torch.zeros_like(new)
    follows[:, 1:] = new[:, :-1] & (column[:, 1:] == column[:, :-1] + 1)
    return torch.where(new, (new & ~follows).cumsum(1) - 1, -1)


def members(score: Tensor, picture: Tensor, fraction: float, share: float) -> Tensor:
    """Chooses the pool: of each picture of n tokens ``floor(fraction n + 1/2)``, at least one.

    Args:
        score: ``[B, N]``: the highest are chosen, ties to the smaller index, NaN last.
        picture: int64 ``[B, N]``, as :func:`pictures` gives it.
        fraction: in (0, 1].
        share: in [0, 1]: ``floor(share q)`` of a picture's q are evenly spaced over it, the others the highest of the rest.

    Returns:
        bool ``[B, N]``.
    """
    new = picture >= 0
    ones = new.long()
    size = _of_each(picture, ones)
    wanted = (size.double() * fraction + 0.5 + _ROUNDING).floor().long().clamp(min=1).minimum(size)
    even = (wanted.double() * share + _ROUNDING).floor().long()
    place = ones.cumsum(1) - _before(picture, ones)
    evenly = spaced(place, even, size) & new
    ranked = torch.where(evenly, -1, picture)
    return evenly | ((ranked >= 0) & (_rank(score, ranked) < wanted - even))


def _totals(picture: Tensor, value: Tensor) -> Tensor:
    """int64 ``[B, N]``: by picture, the sum of ``value`` (int64 ``[B, N]``) over its tokens."""
    return torch.zeros_like(value).scatter_add_(1, picture.clamp(min=0), torch.where(picture < 0, 0, value))


def _of_each(picture: Tensor, value: Tensor) -> Tensor:
    """The same for each token of a picture."""
    return _totals(picture, value).gather(1, picture.clamp(min=0))


def _before(picture: Tensor, value: Tensor) -> Tensor:
    """int64 ``[B, N]``: for each token the sum over all pictures before its own."""
    totals = _totals(picture, value)
    return (totals.cumsum(1) - totals).gather(1, picture.clamp(min=0))


def _rank(score: Tensor, picture: Tensor) -> Tensor:
    """int64 ``[B, N]``: the place of each token among those of its picture, the highest score first; of others any value."""
    order = torch.argsort(-(score.double() + 0.0), dim=1, stable=True)  # NaN sorts last
    last = torch.where(picture < 0, picture.shape[1], picture).gather(1, order)
    order = order.gather(1, torch.argsort(last, dim=1, stable=True))
    place = torch.arange(picture.shape[1], device=picture.device).expand_as(order)
    return scattered(order, place, picture.shape[1]) - _before(picture, torch.ones_like(picture))
