"""Policies that decide group by group (``Policy.rescores``): each group of layers at the layer before it, by what that layer attends to,
among the tokens that the group before it keeps.

The first group is decided at layer ``k-1`` by the session, as for every other policy; what is here decides for the groups after it. What a
step decided is written down when the last of them has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.patching.wide import KeyRows, row_statistics
from dyrate_kernels.policies.base import Decision, View

if TYPE_CHECKING:
    from dyrate_kernels.cache import RowGroup
    from dyrate_kernels.patching.session import Session


@dataclass
class Noted:
    """What the first group's decision saw, until the last one's is made.

    Attributes:
        mass: ``[.., Hq, 4]``, importance: ``[.., N]``, at layer ``k-1``; for drafts with a dimension of rows after the first.
        rates: of the groups so far, float64 ``[B]`` or ``[B, d]`` each.
        kept: of drafts: how many tokens the groups so far keep, int32 ``[B, d]`` each.
    """

    mass: Tensor
    importance: Tensor
    rates: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


class Stages:
    """The decisions after the first of one session.

    Args:
        session: whose.
        starts: first layer of each pruned group.

    Attributes:
        groups: score layer -> index in ``cache.groups`` of the group that it decides for.
    """

    def __init__(self, session: Session, starts: list[int]) -> None:
        self.session = session
        self.groups = {start - 1: index for index, start in enumerate(starts[1:], 2)}
        self.last = starts[-1] - 1
        ends = [*starts[1:], session.shape.num_layers]
        self.layers = [end - start for start, end in zip(starts, ends, strict=True)]

    def mean_rate(self, rates: list[Tensor]) -> Tensor:
        """Over the pruned layers."""
        return sum(rate * count for rate, count in zip(rates, self.layers, strict=True)) / sum(self.layers)

    # ---- decode step --------------------------------------------------------------------------------------------------------------

    def first(self, mass: Tensor, importance: Tensor, decision: Decision) -> None:
        """Layer ``k-1`` of a decode step: the first group's choice."""
        session = self.session
        session.forward.noted = Noted(mass, importance, [decision.rate])
        self._choose(session.cache.groups[1], decision, importance, None)

    def decode(self, layer: int, rows: dict) -> Tensor:
        """A later score layer of a decode step: its attention ``[B, Hq, Dv]``, and the choice for the group after it."""
        session, cache = self.session, self.session.cache
        index = self.groups[layer]
        before, home = cache.groups[index - 1], cache.n_text.device
        output, mass, importance = ops.trusted("decode_attention", session.backend, rows["query"].device)(
            **rows, mass=True, importance=True
        )
        mass, importance = session.of_all_heads(mass, importance)
        importance = importance.to(home)
        within = before.alive
        if session.evict:  # rows of this group are fewer than tokens
            live = torch.arange(importance.shape[1], device=home) < before.n_visual[:, None]
            place = torch.where(live, before.token[:, : importance.shape[1]], cache.full.capacity)
            spare = importance.new_zeros(importance.shape[0], cache.full.capacity + 1)
            importance = spare.scatter_(1, place, importance)[:, :-1]
            within = before.alive[:, : cache.full.capacity]
        else:
            within = session.mark(before.kept)
        hidden = session.hidden_of(slice(-1, None))
        view = View(
            session.step.expand(importance.shape[0]), mass.to(home), importance, cache.full.n_visual, within, session.state,
            None if hidden is None else hidden[:, 0], index - 1,
        )  # fmt: skip
        decision = session.policy.decide(view)
        noted = session.forward.noted
        noted.rates.append(decision.rate)
        self._choose(cache.groups[index], decision, importance, within)
        if layer == self.last:
            session.last_rate = self.mean_rate(noted.rates)
            session.write_record(noted.mass, noted.importance)
        return output

    def _choose(self, group: RowGroup, decision: Decision, importance: Tensor, within: Tensor | None) -> None:
        session = self.session
        score = importance if decision.score is None else decision.score
        alive, count = session.alive_of(group), decision.count
        if session.evict:
            alive = alive if within is None else alive & within
            count = torch.minimum(count, group.n_visual)
        else:
            alive = within
        kept, n_kept = ops.select_tokens(score, count, session.cache.full.n_visual, alive=alive, backend=session.backend)
        session.apply(group, kept, n_kept)

    # ---- wide pass ----------------------------------------------------------------------------------------------------------------

    def wide(self, layer: int, query: Tensor, rows: KeyRows, mask: Tensor, scale: float, window: int | None) -> None:
        """A later score layer of a wide pass; ``query`` ``[B, Hq, q, D]`` may hold fewer columns than the pass (the prompt was shrunk)."""
        session, cache = self.session, self.session.cache
        forward, tokens, home = session.forward, cache.full.capacity, cache.n_text.device
        index, drafted, raters = self.groups[layer], forward.drafted, session.raters
        if raters is not None and drafted < forward.length:
            raters.note(layer, forward.slots[index - 1], query)
        if forward.ends_prompt and forward.noted is not None:
            last = slice(query.shape[2] - drafted - 1, query.shape[2] - drafted)
            mass, importance = session.of_all_heads(*row_statistics(query[:, :, last], rows, mask[:, last], scale, tokens))
            mass, importance, hidden = mass[:, 0].to(home), importance[:, 0].to(home), session.hidden_of(last)
            if raters is not None:
                importance = raters.importance(layer, rows, scale, window, importance)
            self._prompt(layer, mass, importance, None if hidden is None else hidden[:, 0])
        if drafted and forward.drafts is not None:
            new = slice(query.shape[2] - drafted, query.shape[2])
            if session.policy.at_decode and not session.evict and cache.full.bound > 0:
                mass, importance = session.of_all_heads(*row_statistics(query[:, :, new], rows, mask[:, new], scale, tokens))
                self._drafts(index, mass.to(home), importance.to(home), session.hidden_of(new))
            elif not session.evict and cache.groups[index].kept is not None:
                forward.allowed[index] = session.mark(cache.groups[index].kept)[:, None].expand(-1, drafted, -1)
        if layer == self.last:
            self._write(forward)

    def _prompt(self, layer: int, mass: Tensor, importance: Tensor, hidden: Tensor | None) -> None:
        session, cache, index = self.session, self.session.cache, self.groups[layer]
        group, before, n_visual = cache.groups[index], cache.groups[index - 1], cache.full.n_visual
        within = None
        if session.evict:
            within = before.alive[:, : cache.full.capacity]
            within = within & session.prompt.candidates(group)
        elif before.kept is not None and not session.policy.at_decode:
            within = session.mark(before.kept)
        step = torch.zeros(mass.shape[0], dtype=torch.int64, device=mass.device)
        view = View(step, mass, importance, n_visual, within, session.state, hidden, index - 1)
        if session.raters is not None:
            session.raters.show(layer, view)
        decision = session.policy.decide(view)
        session.forward.noted.rates.append(decision.rate)
        score = importance if decision.score is None else decision.score
        session.prompt.choose([group], score, decision.count[None], within, decision.merge)

    def _drafts(self, index: int, mass: Tensor, importance: Tensor, hidden: Tensor | None) -> None:
        session, forward = self.session, self.session.forward
        within = forward.allowed[index - 1].flatten(0, 1)
        session.drafts.choose([index], mass, importance, hidden, within, index - 1)

    def _write(self, forward) -> None:
        session = self.session
        if forward.noted is not None:
            if session.evict or not session.policy.at_decode:
                session.last_rate = self.mean_rate(forward.noted.rates)
            session.write_record(forward.noted.mass, forward.noted.importance, step=0)
        if forward.drafts is not None:
            noted = forward.drafts
            if noted.rates:
                session.last_rate = self.mean_rate(noted.rates)[:, -1].contiguous()
            session.drafts.write(noted.mass, noted.importance, torch.stack(noted.kept) if noted.kept else None)
