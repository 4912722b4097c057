"""The rows of one engine step: which are answer rows, which ends a prompt, and which vLLM's own kernel takes. Made once, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dyrate_kernels.engines.vllm.requests import RequestTable

_ROUND = 64  # widths of lists are rounded up, so that kernels are compiled for few of them


class Rows(NamedTuple):
    """Query rows, one line each.

    Attributes:
        row: int64 ``[R]``, their places among the step's tokens.
        sequence: int32 ``[R]``, their lines of the block table.
        slot: int64 ``[R]``, of their requests.
        n_rows: int32 ``[R]``, cache rows up to their own.
        n_visual: int32 ``[R]``, visual tokens of their prompts.
        step: int64 ``[R]``, 0 for a prompt's last row, 1 for the first row of its answer.
        turns: of a policy that remembers, where a request has several rows: their places in these lines, int64, first ones first; else
            None.
    """

    row: Tensor
    sequence: Tensor
    slot: Tensor
    n_rows: Tensor
    n_visual: Tensor
    step: Tensor
    turns: list[Tensor] | None = None

    def at(self, places: Tensor) -> Rows:
        """The lines ``places``, int64."""
        row, sequence, slot, n_rows, n_visual, step = (each[places] for each in self[:6])
        return Rows(row, sequence, slot, n_rows, n_visual, step)


class Others(NamedTuple):
    """The rows that vLLM's own kernel takes, as a batch of its own: those of prompts, and those of requests without visual tokens.

    Attributes:
        row: int64 ``[T]``, their places among the step's tokens.
        lines: the requests they belong to, by line of the block table; queries: rows of each.
        behind: rows of the step's that follow those of each, which are answer rows.
        lengths: cache rows of each as the host knows them: no request has more, one whose drafts were not yet counted may have fewer.
    """

    row: Tensor
    lines: list[int]
    queries: list[int]
    behind: list[int]
    lengths: list[int]


@dataclass
class Step:
    """One step.

    Attributes:
        lines: how many requests it has.
        answers, ends: rows of answers, and last rows of prompts, of requests with visual tokens; None: there are none.
        others: None: there are no other rows than ``answers``.
        visual_position, text_position, text_type: of its requests (``ops.paged_attention``), as wide as they need.
        row_bound: no row reads more cache rows.
        lists: of each pruned group that was decided for in this step: what the answer rows read, positions and how many.
    """

    lines: int
    answers: Rows | None
    ends: Rows | None
    others: Others | None
    visual_position: Tensor
    text_position: Tensor
    text_type: Tensor
    row_bound: int
    lists: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Planner:
    """Makes steps.

    Args:
        table: the requests.
        device: of the engine's tensors.
    """

    def __init__(self, table: RequestTable, device: torch.device) -> None:
        self.table, self.device = table, device
        self._gathered: tuple[tuple, tuple[Tensor, Tensor, Tensor]] | None = None  # steps of the same requests share their lists

    def plan(self, requests: Sequence[str], computed: Sequence[int], starts: Sequence[int], lengths: Tensor, longest: int) -> Step | None:
        """The step of these requests, in the batch's order; None where nothing is pruned or decided in it, or one is unknown.

        Args:
            computed: rows of each that were computed before it, as the host knows them: exact within a prompt, of an answer at least the
                prompt's length (vLLM counts drafts that may yet be refused).
            starts: first row of each among the step's tokens, and their end.
            lengths: int32 ``[requests or more]`` on the device: cache rows of each, this step's included.
            longest: no request has more.
        """
        table = self.table
        if any(request not in table for request in requests):  # a trial run of the engine
            return None
        slots = table.slots_of(requests)
        answers: list[tuple[int, int, int]] = []  # line, row, rows behind it
        ends: list[tuple[int, int, int]] = []
        rest, lines, queries, after, upto = [], [], [], [], []
        for line, request in enumerate(requests):
            prompt, first, count = table.prompts[request], starts[line], starts[line + 1] - starts[line]
            others = count
            if prompt.visual:
                others = min(max(prompt.length - computed[line], 0), count)
                answers += [(line, first + row, count - 1 - row) for row in range(others, count)]
                if others and computed[line] + others == prompt.length:
                    ends.append((line, first + others - 1, count - others))
            if others:
                rest.append(torch.arange(first, first + others))
                lines.append(line)
                queries.append(others)
                after.append(count - others)
                upto.append(computed[line] + others)
        if not answers and not ends:
            return None
        visual, text, types = self._lists(requests, slots)
        remaining = Others(torch.cat(rest).to(self.device, non_blocking=True), lines, queries, after, upto) if rest else None
        return Step(
            len(requests), self._rows(answers, slots, lengths), self._rows(ends, slots, lengths), remaining, visual, text, types, longest,
        )  # fmt: skip

    def _rows(self, found: list[tuple[int, int, int]], slots: list[int], lengths: Tensor) -> Rows | None:
        if not found:
            return None
        told = torch.tensor([(line, row, behind, slots[line]) for line, row, behind in found], dtype=torch.int64)
        line, row, behind, slot = told.t().contiguous().to(self.device, non_blocking=True)
        n_rows = (lengths[line] - behind).int()
        turns = None
        if self.table.policy.remembers and len({each[0] for each in found}) < len(found):
            place: dict[int, list[int]] = {}
            turn_of = []
            for number, (each, _, _) in enumerate(found):
                place.setdefault(each, []).append(number)
                turn_of.append(len(place[each]) - 1)
            turns = [
                torch.tensor([number for number, turn in enumerate(turn_of) if turn == wanted]).to(self.device)
                for wanted in range(max(turn_of) + 1)
            ]
        table = self.table
        return Rows(row, line.int(), slot, n_rows, table.n_visual[slot], n_rows.long() - table.prompt[slot], turns)

    def _lists(self, requests: Sequence[str], slots: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        key = tuple(requests)
        if self._gathered is None or self._gathered[0] != key:
            table = self.table
            prompts = [table.prompts[request] for request in requests]
            index = torch.tensor(slots).to(self.device)
            visual = table.width  # of a policy that remembers, whose state is as wide as the list
            if not table.policy.remembers:
                visual = self._rounded(max(prompt.n_visual for prompt in prompts))
            text = self._rounded(max(prompt.length - prompt.n_visual for prompt in prompts))
            lists = table.visual_position[index, :visual], table.text_position[index, :text], table.text_type[index, :text]
            self._gathered = key, lists
        return self._gathered[1]

    def _rounded(self, count: int) -> int:
        return min(max(-(-count // _ROUND), 1) * _ROUND, self.table.width)

    def forget(self) -> None:
        """A request's slot was written anew."""
        self._gathered = None
