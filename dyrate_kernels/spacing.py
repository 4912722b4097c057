"""Evenly spaced tokens: the control of policies and reducers, and a part of DyRate's choice."""

from __future__ import annotations

from torch import Tensor


def evenly_spaced(count: Tensor, able: Tensor) -> Tensor:
    """Chooses tokens as evenly apart as can be: the i-th of M able ones iff floor((i+1) n / M) > floor(i n / M). Reads nothing on the host.

    Args:
        count: int ``[B]``, n; at most as many as are able are chosen.
        able: bool ``[B, N]``, the tokens that can be chosen.

    Returns:
        bool ``[B, N]``.
    """
    rank = able.cumsum(1)  # 1-based among those that can be chosen
    total = rank[:, -1:] if rank.shape[1] else rank.new_zeros(rank.shape[0], 1)
    wanted = count[:, None].long().minimum(total)
    return spaced(rank, wanted, total) & able


def spaced(rank: Tensor, count: Tensor, total: Tensor) -> Tensor:
    """Says which are among the ``count`` evenly spaced of ``total``; shapes that broadcast.

    Args:
        rank: int64, from 1.
        count, total: int64, count at most total.
    """
    total = total.clamp(min=1)
    return (rank * count).div(total, rounding_mode="floor") > ((rank - 1) * count).div(total, rounding_mode="floor")
