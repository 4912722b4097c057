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
    total = total.clamp(min=1)
    chosen = (rank * wanted).div(total, rounding_mode="floor") > ((rank - 1) * wanted).div(total, rounding_mode="floor")
    return chosen & able
