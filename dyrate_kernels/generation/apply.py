"""The effects of a decision: a list to read through, rows that move, a prompt that goes on shorter, a mask for draft tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.generation.decide import Choice, Stage
from dyrate_kernels.generation.index import marked, right_aligned
from dyrate_kernels.generation.kv_store import RowGroup, RowStore
from dyrate_kernels.generation.layout import SlotMapping, appended
from dyrate_kernels.generation.passes import MultiTokenPass
from dyrate_kernels.generation.turn import Turn


@dataclass
class Shrunk:
    """The part of a prompt that a pruned group receives.

    Attributes:
        slots: of its columns.
        source: int64 ``[B, s]``, which columns of ``MultiTokenPass.joined`` these are.
        filled: bool ``[B, s]``, False for the filler of shorter sequences.
        merge: ``Decision.merge``, or None.
    """

    slots: SlotMapping
    source: Tensor
    filled: Tensor
    merge: Tensor | None


class Effects:
    """The effects so far of the decisions of a multi-token pass, in force for the layers after them; by layer group.

    Attributes:
        shrunk: what a group receives of the prompt.
        allowed: bool ``[B, d, N]``: visual tokens that each draft token may read.
        gathered: what else a group's layers are given at its columns, kept here for those who give it; nobody here looks into it.
    """

    def __init__(self) -> None:
        self.gathered: dict[Any, Any] = {}
        self.shrunk: dict[int, Shrunk] = {}
        self.allowed: dict[int, Tensor] = {}

    def slots(self, passing: MultiTokenPass, index: int) -> SlotMapping | None:
        """Returns the slots of what a group receives; None: nothing, it waits for the prompt's last chunk."""
        slots = passing.slots.get(index)
        return self.shrunk[index].slots if slots is None and index in self.shrunk else slots

    def shrink(self, store: RowStore, turn: Turn, passing: MultiTokenPass, groups: range, kept: list[Tensor], merge: Tensor | None) -> None:
        """Each group (there are lists of tokens, int ``[B, n]``, for) keeps these of the prompt: rows that it has are compacted, new
        columns get slots. One host read for all.

        Args:
            merge: ``Decision.merge``, of the first group.
        """
        joined = passing.joined
        assert joined is not None, "only a pass that ends a prompt shrinks it"
        keeps, stays = [], []
        for listed in kept:
            mark = marked(listed, store.token_column.shape[1] + 1)
            keep = torch.where(joined.visual, mark.gather(1, joined.token.clamp(min=0)), joined.stored)
            stay = keep.clone()  # the last prompt column's hidden state gives the next token: it stays even where its own key is dropped
            stay[:, stay.shape[1] - passing.drafted - 1] = True
            keeps.append(keep)
            stays.append(stay)
        sizes = [torch.stack([s.sum(1).max(), s.sum(1).min(), k.sum(1).min()]) for s, k in zip(stays, keeps, strict=True)]
        fresh = turn.start == 0
        for index, listed, keep, stay, (size, least, real) in zip(groups, kept, keeps, stays, torch.stack(sizes).tolist(), strict=True):
            group = store.groups[index]
            if not fresh and store.moves_rows:  # else what it holds stays
                store.evict(group, listed)
            source, filled = right_aligned(stay, size)
            plain = fresh and passing.blocks is None and least == size == real
            slots = replace(joined, stored=keep, fresh=fresh).at(source, filled, plain)
            first = index == groups[0]
            self.shrunk[index] = Shrunk(appended(store, group, slots, plain), source, filled, merge if first else None)

    def computed(self, store: RowStore, turn: Turn) -> Tensor:
        """int64 ``[G, B]``: visual tokens of this prompt that each group computes, in the last column also where it is dropped."""
        assert turn.before is not None
        visual, text = store.full.n_visual - turn.before.visual, store.n_text - turn.before.text
        groups = range(len(store.groups) > 1, len(store.groups))
        return torch.stack([self.shrunk[g].filled.sum(1) - text if g in self.shrunk else visual.long() for g in groups])

    def allow(self, store: RowStore, stage: Stage, choice: Choice, width: int) -> None:
        """Draft tokens read what was chosen for each; the last one's choice is left behind for what comes after them."""
        for index, (kept, n_kept) in zip(stage.groups, choice.lists, strict=True):
            self.allowed[index] = marked(kept.flatten(0, 1), store.full.capacity).view(kept.shape)
            group = store.groups[index]
            read_list(group, store.rows_of(group, kept[:, -1, :width].contiguous()), n_kept[:, -1].contiguous())

    def allow_kept(self, store: RowStore, stage: Stage, drafted: int) -> None:
        """Draft tokens read what the groups keep."""
        for index in stage.groups:
            kept = store.tokens_kept(store.groups[index])
            if kept is not None:
                self.allowed[index] = kept[:, None].expand(-1, drafted, -1)


def of_step(store: RowStore, stage: Stage, choice: Choice, width: int, later: bool, on_host: bool = False) -> None:
    """A decode step's choice: lists, at most ``width`` long, to read through, or rows that move; ``later``: in the next step.
    ``on_host``: as of ``RowStore.evict``.
    """
    for index, (kept, n_kept) in zip(stage.groups, choice.lists, strict=True):
        group = store.groups[index]
        if store.moves_rows and later:
            store.postpone(group, kept)
        elif store.moves_rows:
            store.evict(group, kept, on_host)
        else:
            read_list(group, store.rows_of(group, kept[:, : min(width, max(group.bound, 1))]), n_kept)


def list_of_prompt(store: RowStore, stage: Stage, choice: Choice, width: int, fresh: Tensor | None) -> None:
    """A prompt's choice, where nothing is evicted and nothing decided again: lists to read through.

    Args:
        fresh: bool ``[B]``: sequences with new images; others keep their old choice. None: nothing was chosen before.
    """
    for index, (kept, n_kept) in zip(stage.groups, choice.lists, strict=True):
        group, kept = store.groups[index], kept[:, :width]
        if group.kept is not None and group.n_kept is not None and fresh is not None:
            longest = max(kept.shape[1], group.kept.shape[1])
            old = torch.full((kept.shape[0], longest), -1, dtype=torch.int32, device=kept.device)
            new = old.clone()
            old[:, : group.kept.shape[1]], new[:, : kept.shape[1]] = group.kept, kept
            kept, n_kept = torch.where(fresh[:, None], new, old), torch.where(fresh, n_kept, group.n_kept)
        read_list(group, kept, n_kept)


def read_list(group: RowGroup, kept: Tensor, n_kept: Tensor) -> None:
    """From now on the group's layers read these rows alone (``RowGroup.kept``)."""
    group.kept, group.n_kept = kept, n_kept
