"""Operations on tables of indices ``[B, n]``. Entries below 0 name nothing; sequences need not be equally long.

No function reads a device value on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def below(count: Tensor, size: int) -> Tensor:
    """bool ``[B, size]``: the first ``count[b]`` (int ``[B]``) of each row."""
    return torch.arange(size, device=count.device) < count[:, None]


def marked(index: Tensor, size: int) -> Tensor:
    """bool ``[B, size]``: what a list (int ``[B, n]``, below 0 past its end) names."""
    mark = torch.zeros(index.shape[0], size + 1, dtype=torch.bool, device=index.device)
    return mark.scatter_(1, torch.where(index < 0, size, index).long(), True)[:, :-1]


def scattered(index: Tensor, value: Tensor, size: int, fill: int | float = 0) -> Tensor:
    """``[B, size, ..]`` with ``value`` ``[B, n, ..]`` at ``index`` (int64 ``[B, n]``; below 0: dropped), ``fill`` elsewhere."""
    out = value.new_full((value.shape[0], size + 1, *value.shape[2:]), fill)
    target = torch.where(index < 0, size, index)
    return out.scatter_(1, target[:, :, None].expand_as(value) if value.dim() == 3 else target, value)[:, :-1]


def scatter_(table: Tensor, index: Tensor, value: Tensor) -> None:
    """Writes ``value`` ``[B, n]`` into ``table`` ``[B, size]`` at ``index`` (int64 ``[B, n]``; below 0: dropped)."""
    spare = torch.cat([table, table[:, :1] if table.shape[1] else table.new_zeros(table.shape[0], 1)], dim=1)
    spare.scatter_(1, torch.where(index < 0, table.shape[1], index), value)
    table.copy_(spare[:, :-1])


def numbered(mark: Tensor) -> Tensor:
    """int64 ``[B, n]``: 0, 1, .. for what is marked (bool ``[B, n]``), in order, -1 for the rest."""
    return torch.where(mark, mark.cumsum(1) - 1, -1)


def right_aligned(stays: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The marked columns (bool ``[B, n]``) at the right end of ``size`` ones.

    Returns:
        int64 ``[B, size]``, which column each is (0 for filler), and bool ``[B, size]``, False for the filler of shorter sequences.
    """
    count = stays.sum(1, keepdim=True)
    target = torch.where(stays, stays.cumsum(1) - 1 + (size - count), -1)
    source = scattered(target, torch.arange(stays.shape[1], device=stays.device).expand_as(stays), size)
    return source, torch.arange(size, device=stays.device) >= size - count


def resized(tensor: Tensor, size: int, fill: int | float | bool = 0, dim: int = 1) -> Tensor:
    """A copy with ``size`` entries along ``dim``, new ones holding ``fill``; the tensor itself where it has so many."""
    shape = list(tensor.shape)
    if shape[dim] == size:
        return tensor
    shape[dim] = size
    out = tensor.new_full(shape, fill)
    common = min(size, tensor.shape[dim])
    out.narrow(dim, 0, common).copy_(tensor.narrow(dim, 0, common))
    return out


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts in a row; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def picked(tensor: Tensor, index: Tensor) -> Tensor:
    """Row ``i`` is the former row ``index[i]`` (int64 ``[n]``); in place where their number stays."""
    chosen = tensor.index_select(0, index.to(tensor.device))
    return tensor.copy_(chosen) if chosen.shape == tensor.shape else chosen
