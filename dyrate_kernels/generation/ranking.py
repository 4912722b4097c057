"""By which rows of a prompt its visual tokens are ranked: the last one, the mean over all, the mean over raters that the policy chooses, or
all by PageRank; and the states that a policy merges tokens by.

Raters are chosen when the last chunk of a prompt comes, from the embeddings of all of it. So earlier chunks leave what is needed then:
their embeddings, and at each score layer their queries, and the attention's input where the policy merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.generation.attend import Seen, attention_weights, by_token, per_query_head, seen_softmax
from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.generation.index import joined, marked, numbered, resized, scattered
from dyrate_kernels.generation.layout import KeyRows, SlotMapping, visibility
from dyrate_kernels.generation.passes import MultiTokenPass
from dyrate_kernels.generation.turn import Turn
from dyrate_kernels.ops.contract import accumulator
from dyrate_kernels.ops.reference import INSTRUCTION
from dyrate_kernels.policies.base import Policy

_QUERY_BLOCK = 128  # rows at a time where attention weights are materialised
_PAGE_RANK_WEIGHTS = 2**26  # attention weights held at a time


@dataclass
class Chunk:
    """The part of one pass of a prompt that its end still needs, at one layer.

    Attributes:
        column, token: int64 ``[B, q]``, as in ``SlotMapping``; -1 for columns that are not stored.
        query: ``[B, Hq, q, D]``.
        hidden: ``[B, q, d]``, what goes into the attention, or None.
    """

    column: Tensor
    token: Tensor
    query: Tensor
    hidden: Tensor | None


class Ranker:
    """The ranking of the prompt that is read.

    Args:
        policy: whose ``query_rows`` it is.
        merges: tokens can be merged (``Policy.merges`` under ``evict``).
        heads: the processes that share the model's heads; None: all are here.

    Attributes:
        column_sum: by layer, ``[B, N]``: attention received from all rows of this prompt so far (``query_rows == "mean"``).
        column: int64 ``[B, r]``, columns of the chosen raters; None before the prompt's last pass, or where no sequence has any.
        real: bool ``[B, r]``, False past a sequence's own number of them.
    """

    def __init__(self, policy: Policy, merges: bool, heads: HeadShards | None) -> None:
        self.policy, self.merges, self.heads = policy, merges, heads
        self.query_rows = policy.query_rows
        self.keeps_chunks = self.query_rows in ("raters", "pagerank") or merges
        self.forget()

    def forget(self) -> None:
        """The prompt came to its end, or another one begins."""
        self.column_sum: dict[int, Tensor] = {}
        self.embedded: list[tuple[Tensor, ...]] = []
        self.chunks: dict[int, list[Chunk]] = {}
        self.column: Tensor | None = None
        self.real: Tensor | None = None

    @property
    def reads_embeddings(self) -> bool:
        """``read`` is to be called."""
        return self.query_rows == "raters"

    def read(self, embeddings: Tensor, slots: SlotMapping, turn: Turn, last: bool) -> None:
        """A pass with prompt rows enters the first layer with ``embeddings`` ``[B, q, d]``. At a prompt's ``last`` one a host read."""
        visual = slots.visual
        text = slots.stored & (slots.type == INSTRUCTION) & ~visual & (slots.column < turn.end)
        self.embedded.append((embeddings.detach().to(visual.device), visual, text, slots.column))
        if not last:
            return
        parts, self.embedded = self.embedded, []
        if not turn.new_images:
            return
        embeddings, visual, text, column = (joined(each, 1) for each in zip(*parts, strict=True))
        chosen = self.policy.raters(embeddings, visual, text)
        count = chosen.sum(1, keepdim=True)
        size = int(count.max())
        if size == 0:
            return
        self.column = scattered(numbered(chosen), column, size, turn.start)
        self.real = torch.arange(size, device=chosen.device) < count

    def move(self, columns: Tensor) -> None:
        """Moves what came in earlier chunks on by that many columns, int64 ``[B, 1]``."""
        self.embedded = [(*chunk[:3], chunk[3] + columns) for chunk in self.embedded]
        for chunk in (each for chunks in self.chunks.values() for each in chunks):
            chunk.column = torch.where(chunk.column < 0, -1, chunk.column + columns)

    def note(self, layer: int, slots: SlotMapping, query: Tensor, hidden: Tensor | None) -> None:
        """A score layer of a pass with prompt rows: query ``[B, Hq, q, D]`` of the columns of ``slots``."""
        if self.keeps_chunks:
            column = torch.where(slots.stored, slots.column, -1)
            kept = None if hidden is None else hidden.detach()
            self.chunks.setdefault(layer, []).append(Chunk(column, slots.stored_token, query.detach(), kept))

    def add(self, layer: int, passing: MultiTokenPass, seen: Seen, tokens: int) -> None:
        """The prompt rows of a pass vote; ``tokens``: N."""
        prompt, slots = slice(0, passing.width - passing.drafted), passing.slots[0]
        real = slots.stored[:, prompt].to(seen.query.device)
        added = sum_of_rows(seen.query[:, :, prompt], seen.rows, seen.mask[:, prompt], real, seen.scale, tokens)
        added = (added if self.heads is None else self.heads.mean(added)).to(slots.stored.device)
        before = self.column_sum.get(layer)
        self.column_sum[layer] = added if before is None else resized(before, tokens) + added

    def importance(self, layer: int, seen: Seen, turn: Turn, last: Tensor) -> Tensor:
        """``[B, N]``: attention that each visual token receives in ``layer``; ``last``, the last row's, for sequences without a rater."""
        if self.query_rows == "mean":
            return self.column_sum.get(layer, last)
        if self.query_rows not in ("raters", "pagerank") or (self.query_rows == "raters" and self.column is None):
            return last
        chunks = self.chunks[layer]
        column, query = joined([chunk.column for chunk in chunks], 1), joined([chunk.query for chunk in chunks], 2)
        if self.query_rows == "pagerank":
            return self._page_rank(column.to(query.device), query, seen, turn, last)
        return self._mean_of_raters(column, query, seen, turn, last)

    def _mean_of_raters(self, column: Tensor, query: Tensor, seen: Seen, turn: Turn, last: Tensor) -> Tensor:
        assert self.column is not None and self.real is not None
        inside = (column >= turn.start) & (column < turn.end)
        every = torch.arange(column.shape[1], device=column.device).expand_as(column)
        query_of = scattered(torch.where(inside, column - turn.start, -1), every, turn.end - turn.start)
        query_of = query_of.gather(1, self.column - turn.start).to(query.device)
        query = query.gather(2, query_of[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        real = self.real.to(query.device)
        mask = visibility(seen.rows, self.column.to(query.device), seen.window)
        total = sum_of_rows(query, seen.rows, mask, real, seen.scale, last.shape[1])
        total = total if self.heads is None else self.heads.mean(total)
        count = real.sum(1, keepdim=True)
        return torch.where(count.to(last.device) > 0, (total / count.clamp(min=1)).to(last.device), last)

    def _page_rank(self, column: Tensor, query: Tensor, seen: Seen, turn: Turn, last: Tensor) -> Tensor:
        real = (column >= turn.start) & (column < turn.end)
        of: Any = self.policy  # such a policy has these options
        rank = page_rank(
            query, seen.rows, column, real, (turn.start, turn.end), seen.scale, seen.window, of.temperature, of.iterations, last.shape[1]
        )
        return (rank if self.heads is None else self.heads.root_mean_square(rank)).to(last.device)

    def states(self, layer: int, tokens: int, home: torch.device) -> tuple[Tensor, Tensor] | None:
        """``View.visual`` and ``View.mergeable``, if tokens can be merged. What the chunks left at this layer is not needed any longer."""
        chunks = self.chunks.pop(layer, [])
        if not self.merges:
            return None
        token = joined([chunk.token for chunk in chunks], 1)
        hidden = joined([chunk.hidden for chunk in chunks if chunk.hidden is not None], 1).to(home)
        return scattered(token, hidden, tokens), marked(token, tokens)


def sum_of_rows(query: Tensor, rows: KeyRows, mask: Tensor, real: Tensor, scale: float, tokens: int) -> Tensor:
    """Attention each visual token receives from all the query rows (FastV's ranking in its paper, section 3).

    Args:
        query: ``[B, Hq, q, D]``.
        real: bool ``[B, q]``, False for padding, which must not vote.

    Returns:
        ``[B, N]``, mean over heads, sum over rows.
    """
    total = query.new_zeros(query.shape[0], tokens, dtype=accumulator(query))
    for start in range(0, query.shape[2], _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        weights = attention_weights(query[:, :, block], rows, mask[:, block], scale).mean(1) * real[:, block, None]
        total += by_token(weights.sum(1, keepdim=True), rows.token, tokens)[:, 0]
    return total


def page_rank(
    query: Tensor, rows: KeyRows, column: Tensor, real: Tensor, span: tuple[int, int], scale: float, window: int | None,
    temperature: float, iterations: int, tokens: int,
) -> Tensor:  # fmt: skip
    """PageRank of a prompt's rows on its own attention (AIM, arXiv 2412.03248, section 3).

    Every row of the prompt starts with the same weight and hands it on by softmax(logits / temperature), ``iterations`` times.

    Args:
        query: ``[B, Hq, q, D]``; column int64 ``[B, q]``, its columns; real bool ``[B, q]``, False for what is no row of the prompt.
        span: columns of the prompt, from the first up to but not including the last.
        tokens: N, width of the result.

    Returns:
        ``[B, N]``: root of the mean over heads of the squared weight.
    """
    batch, heads, length, _ = query.shape
    size, (first, end) = rows.column.shape[1], span
    inside = rows.live & (rows.column >= first) & (rows.column < end)
    # where each query's own row lies among the keys; the spare row holds the weight of those that have none
    index = torch.arange(size, device=query.device).expand(batch, -1)
    key_of = scattered(torch.where(inside, rows.column - first, -1), index, end - first, size)
    own = torch.where(real, key_of.gather(1, torch.where(real, column - first, 0)), size)
    mask = visibility(rows, column, window)
    start = inside / inside.sum(1, keepdim=True).clamp(min=1)
    dtype = accumulator(query)
    total = query.new_zeros(batch, size, dtype=dtype)
    block = max(_PAGE_RANK_WEIGHTS // max(batch * length * size, 1), 1)  # heads at a time
    key = per_query_head(query, rows.key)
    for head in range(0, heads, block):
        part = slice(head, head + block)
        logits = query[:, part].to(dtype) @ key[:, part].to(dtype).transpose(-1, -2) * (scale / temperature)
        step = seen_softmax(logits, mask) * real[:, None, :, None]
        weight = start.to(dtype)[:, None].expand(-1, step.shape[1], -1)
        for _ in range(iterations):
            held = torch.nn.functional.pad(weight, (0, 1)).gather(2, own[:, None].expand(-1, step.shape[1], -1))
            weight = (held[:, :, None] @ step)[:, :, 0]
        total += weight.square().sum(1)
    return by_token((total / heads).sqrt()[:, None], rows.token, tokens)[:, 0]
