"""Prompt rows that a policy ranks by (``Policy.query_rows`` of ``"raters"`` and ``"pagerank"``), and the states that a policy merges by.

Raters are chosen when the last chunk of a prompt comes, from the embeddings of all of it. So earlier chunks keep what is needed then: their
embeddings, and at each score layer their queries, and the attention's input where the policy merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyrate_kernels.cache import INSTRUCTION
from dyrate_kernels.patching.wide import KeyRows, page_rank, sum_of_all_rows, visibility

if TYPE_CHECKING:
    from dyrate_kernels.patching.forward import Slot
    from dyrate_kernels.patching.session import Session
    from dyrate_kernels.policies.base import View


@dataclass
class Chunk:
    """What one pass of a prompt leaves for its end, at one layer.

    Attributes:
        column, token: int64 ``[B, q]``, as in ``Slot``; -1 for columns that are not stored.
        query: ``[B, Hq, q, D]``.
        hidden: ``[B, q, d]``, what goes into the attention, or None.
    """

    column: Tensor
    token: Tensor
    query: Tensor
    hidden: Tensor | None


class Raters:
    """Those of one session.

    Args:
        session: whose.

    Attributes:
        column: int64 ``[B, r]``, columns of the chosen rows; None before the prompt's last pass, or where no sequence has any.
        real: bool ``[B, r]``, False past a sequence's own number of them.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.forget()

    def forget(self) -> None:
        """The prompt came to its end, or another one begins."""
        self.embedded: list[tuple[Tensor, ...]] = []
        self.chunks: dict[int, list[Chunk]] = {}
        self.column: Tensor | None = None
        self.real: Tensor | None = None

    def read(self, embeddings: Tensor) -> None:
        """The pass that has begun enters the first layer with ``embeddings`` ``[B, q, d]``. At a prompt's end one host read."""
        session, forward = self.session, self.session.forward
        if session.policy.query_rows != "raters" or forward.decode or forward.drafted == forward.length:
            return
        slot = forward.slots[0]
        visual = slot.stored & (slot.token >= 0)
        text = slot.stored & (slot.type == INSTRUCTION) & ~visual & (slot.column < session.turn_end)
        self.embedded.append((embeddings.detach().to(visual.device), visual, text, slot.column))
        if not forward.ends_prompt:
            return
        parts, self.embedded = self.embedded, []
        if not session.new_images:
            return
        embeddings, visual, text, column = (_join(each, 1) for each in zip(*parts, strict=True))
        chosen = session.policy.raters(embeddings, visual, text)
        count = chosen.sum(1, keepdim=True)
        size = int(count.max())
        if size == 0:
            return
        place = torch.where(chosen, chosen.cumsum(1) - 1, size)
        spare = torch.full((chosen.shape[0], size + 1), session.turn_start, dtype=torch.int64, device=chosen.device)
        self.column = spare.scatter_(1, place, column)[:, :-1]
        self.real = torch.arange(size, device=chosen.device) < count

    def move(self, columns: Tensor) -> None:
        """What came in earlier chunks stands this many columns further on: int64 ``[B, 1]``."""
        self.embedded = [(*chunk[:3], chunk[3] + columns) for chunk in self.embedded]
        for chunk in (each for chunks in self.chunks.values() for each in chunks):
            chunk.column = torch.where(chunk.column < 0, -1, chunk.column + columns)

    def note(self, layer: int, slot: Slot, query: Tensor) -> None:
        """A score layer of a pass with prompt rows: query ``[B, Hq, q, D]`` of the columns of ``slot``."""
        session = self.session
        hidden = session.hidden.detach() if session.keeps_hidden else None
        column, token = (torch.where(slot.stored, each, -1) for each in (slot.column, slot.token))
        self.chunks.setdefault(layer, []).append(Chunk(column, token, query.detach(), hidden))

    def importance(self, layer: int, rows: KeyRows, scale: float, window: int | None, last: Tensor) -> Tensor:
        """``[B, N]``: attention that each visual token receives in ``layer``, mean over heads and raters; ``last``, the last row's, for
        sequences without a rater.
        """
        if self.session.policy.query_rows == "pagerank":
            return self._page_rank(layer, rows, scale, window, last)
        if self.column is None:
            return last
        session, chunks = self.session, self.chunks[layer]
        column, query = _join([chunk.column for chunk in chunks], 1), _join([chunk.query for chunk in chunks], 2)
        first, width = session.turn_start, session.turn_end - session.turn_start
        batch, length = column.shape
        place = torch.zeros(batch, width + 1, dtype=torch.int64, device=column.device)
        inside = (column >= first) & (column < session.turn_end)
        place.scatter_(1, torch.where(inside, column - first, width), torch.arange(length, device=column.device).expand(batch, -1))
        place = place.gather(1, self.column - first).to(query.device)
        query = query.gather(2, place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        real = self.real.to(query.device)
        mask = visibility(rows, self.column.to(query.device), window)
        total = sum_of_all_rows(query, rows, mask, real, scale, last.shape[1])
        total = total if session.heads is None else session.heads.mean(total)
        count = real.sum(1, keepdim=True)
        return torch.where(count.to(last.device) > 0, (total / count.clamp(min=1)).to(last.device), last)

    def _page_rank(self, layer: int, rows: KeyRows, scale: float, window: int | None, last: Tensor) -> Tensor:
        session, policy, chunks = self.session, self.session.policy, self.chunks[layer]
        column, query = _join([chunk.column for chunk in chunks], 1), _join([chunk.query for chunk in chunks], 2)
        column = column.to(query.device)
        real = (column >= session.turn_start) & (column < session.turn_end)
        span = (session.turn_start, session.turn_end)
        rank = page_rank(query, rows, column, real, span, scale, window, policy.temperature, policy.iterations, last.shape[1])
        rank = rank if session.heads is None else session.heads.root_mean_square(rank)
        return rank.to(last.device)

    def show(self, layer: int, view: View) -> None:
        """Adds to what the policy sees at ``layer`` the states of the visual tokens, if it merges and tokens can be merged. What the chunks
        left at this layer is not needed any longer.
        """
        chunks = self.chunks.pop(layer)
        if not (self.session.evict and self.session.policy.merges):
            return
        home = view.importance.device
        token, hidden = _join([chunk.token for chunk in chunks], 1), _join([chunk.hidden for chunk in chunks], 1).to(home)
        batch, tokens = view.importance.shape
        index = torch.where(token < 0, tokens, token)
        states = hidden.new_zeros(batch, tokens + 1, hidden.shape[2])
        view.visual = states.scatter_(1, index[:, :, None].expand_as(hidden), hidden)[:, :-1]
        view.mergeable = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=home).scatter_(1, index, True)[:, :-1]


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts in a row; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
