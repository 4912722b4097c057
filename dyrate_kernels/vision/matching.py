"""Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): which tokens merge into which. From the paper."""

from __future__ import annotations

import torch
from torch import Tensor


def match(metric: Tensor, r: int, protected: int = 0) -> tuple[Tensor, Tensor]:
    """The ``r`` best pairs between tokens of alternating sets A (even indices) and B (odd indices).

    Each token of A has one edge, to the token of B of highest cosine similarity; the ``r`` highest edges merge. Ties go to the smaller
    index.

    Args:
        metric: ``[.., t, D]``.
        r: pairs to merge, at most the tokens of A that are not protected, with B not empty.
        protected: this many tokens at the front never merge into others.

    Returns:
        source and target, int64 ``[.., r]``, indices in ``[0, t)``; every source is in A, every target in B.
    """
    metric = torch.nn.functional.normalize(metric.float(), dim=-1)
    a, b = metric[..., ::2, :], metric[..., 1::2, :]
    scores = a @ b.transpose(-1, -2)
    scores[..., : (protected + 1) // 2, :] = float("-inf")
    scores[..., :, : protected // 2] = float("-inf")
    best, partner = scores.max(-1)
    source = best.argsort(dim=-1, descending=True, stable=True)[..., :r]
    return 2 * source, 2 * partner.gather(-1, source) + 1


def room(tokens: int, protected: int = 0) -> int:
    """Returns how many pairs :func:`match` can merge at most."""
    return 0 if tokens < 2 else (tokens + 1) // 2 - (protected + 1) // 2 if tokens // 2 > protected // 2 else 0
