"""Which visual tokens each group of pruned layers keeps: the only caller of ``Policy.decide`` and of the selection by rank.

``choose`` is all of it for an engine that keeps its own cache: it needs tensors alone. ``Decider`` adds what a conversation needs: the
policy's state, and the *stages* of a decision. A policy decides in one stage, at layer ``k-1``, for all pruned layers; or, where it
``rescores``, in one for each group of layers, at the layer before it, among the tokens that the group before it keeps. Prompts, decode
steps and draft tokens go through the same stages; what a pass decided is complete when its last stage has decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.generation import pool
from dyrate_kernels.generation.attend import OperatorStep
from dyrate_kernels.generation.index import below, picked, scattered
from dyrate_kernels.generation.kv_store import RowGroup, RowStore
from dyrate_kernels.generation.turn import Reduction, Turn
from dyrate_kernels.policies.base import Policy, View
from dyrate_kernels.retention import Retention


class Choice(NamedTuple):
    """The outcome of a decision.

    Attributes:
        rate: float64 ``[B]``, the fraction removed that the policy asked for.
        lists: of each group, its kept tokens: int32 ``[B, N]`` ascending, -1 past the end, and how many they are, int32 ``[B]``.
        merge: ``Decision.merge``.
        score: ``[B, N]``, by which tokens ranked; None where an operator ranked them.
    """

    rate: Tensor
    lists: list[tuple[Tensor, Tensor]]
    merge: Tensor | None = None
    score: Tensor | None = None


class Scope(NamedTuple):
    """The tokens among which a decision chooses.

    Attributes:
        alive: ``View.alive``.
        able: of each group, bool ``[B, N]``: what it may keep, or None: all. No entry: nothing is selected, the policy is asked alone.
        most: of each group, int32 ``[B]``: no more than that; None: any number.
        pictures: of a prompt that a pool is made from, int64 ``[B, N]``: the picture of each new token, -1 for others (``pool.pictures``).
    """

    alive: Tensor | None
    able: Sequence[Tensor | None]
    most: Sequence[Tensor] | None = None
    pictures: Tensor | None = None


class Measured(NamedTuple):
    """Measurements of a layer that decides: mass ``[B, Hq, 4]``, importance ``[B, N]``, hidden ``[B, d]`` or None (``View``). Of draft
    tokens with a dimension of them after the first.
    """

    mass: Tensor
    importance: Tensor
    hidden: Tensor | None = None


def choose(policy: Policy, view: View, scope: Scope, backend: str = "auto", attention: OperatorStep | None = None) -> Choice:
    """One decision of a policy, and the tokens that follow from it. No host sync, unless ``attention`` makes one.

    Args:
        policy: bound to the model.
        view: what was measured; its state is changed **in place** as the policy does.
        scope: one entry of ``able`` a group of layers; ``Scope(None, [None])`` is one group that may keep any token.
        backend: of ``ops.select_tokens``.
        attention: of the step; what it chooses by itself is not asked of that operator.
    """
    decision = policy.decide(view)
    score = view.importance if decision.score is None else decision.score
    lists = []
    if scope.able:
        counts = decision.count if decision.count.dim() == 2 else decision.count[None].expand(len(scope.able), -1)
        for number, (count, able) in enumerate(zip(counts, scope.able, strict=True)):
            if scope.most is not None:
                count = torch.minimum(count, scope.most[number])
            lists.append(_select(score, count, view.n_visual, able, backend, attention))
    return Choice(decision.rate, lists, decision.merge, score)


def _select(
    score: Tensor, count: Tensor, n_visual: Tensor, alive: Tensor | None, backend: str, attention: OperatorStep | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = None if attention is None else attention.chosen(score, count, n_visual, alive)
    return ops.select_tokens(score, count, n_visual, alive=alive, backend=backend) if found is None else found


@dataclass(frozen=True)
class Stage:
    """One of the layers that decide.

    Attributes:
        index: which one; ``View.group``.
        layer: it measures.
        groups: indices of the layer groups that it decides for.
        last: the decision of a pass is complete after it.
    """

    index: int
    layer: int
    groups: range
    last: bool


@dataclass
class Pending:
    """The decisions of a pass so far.

    Attributes:
        measured: by its first stage.
        rates: of its stages, float64 ``[B]`` each; of draft tokens ``[B, d]``.
        kept: of draft tokens: how many each group keeps, int32 ``[B, d]``.
    """

    measured: Measured
    rates: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


class Decider:
    """The decisions of one conversation.

    Args:
        policy: bound to the model.
        num_layers: L.
        retention: what becomes of tokens that are not kept.
        backend: name of the operator backend.

    Attributes:
        stages: by score layer.
        state: the policy's (``Policy.start``).
        rate: float64 ``[B]``, of the newest decision in force; None: there was none.
        decided: the policy has decided at a prefill of this conversation; decided_in: in which turn, the last time; had_decided: before
            the prefill that is under way.
    """

    def __init__(self, policy: Policy, num_layers: int, retention: Retention, backend: str) -> None:
        self.policy, self.retention, self.backend = policy, retention, backend
        self.starts = policy.layer_groups(num_layers)
        edges = [*self.starts, num_layers]
        self._layers = [end - start for start, end in zip(edges[:-1], edges[1:], strict=True)]
        count = len(self.starts)
        if policy.rescores:
            stages = [Stage(i, start - 1, range(i + 1, i + 2), i == count - 1) for i, start in enumerate(self.starts)]
        else:
            stages = [Stage(0, policy.k - 1, range(1, count + 1), True)]
        self.stages = {stage.layer: stage for stage in stages}
        self.forget()

    def forget(self) -> None:
        """Forgets the conversation."""
        self.state: dict[str, Tensor] = {}
        self.rate: Tensor | None = None
        self.decided = self.had_decided = False
        self.decided_in = -1
        self._after: list[dict[str, Tensor]] = []  # of a policy that remembers: its state before the last pass's drafts, and after each

    # ---- when -------------------------------------------------------------------------------------------------------------------

    def at_prefill(self, turn: Turn) -> bool:
        """A prompt of this turn is decided about."""
        policy = self.policy
        if not policy.at_prefill or (turn.frozen and self.decided_in == turn.number):  # a drafting model reads its last column again
            return False
        # a method that decides once does so again only when new visual tokens came
        return policy.at_decode or not self.decided or turn.new_images

    def at_decode(self, frozen: bool) -> bool:
        """A decode step chooses."""
        return self.policy.at_decode and not (self.retention.moves and (frozen or self.policy.constant))

    def begin_prompt(self, n_visual: Tensor, turn: Turn) -> None:
        """A prompt's end is decided about now."""
        if not self.state or turn.new_images:
            self.state = self.policy.start(n_visual)
        self.had_decided, self.decided, self.decided_in = self.decided, True, turn.number

    # ---- among what -------------------------------------------------------------------------------------------------------------

    def scope_of_step(self, store: RowStore, stage: Stage) -> Scope:
        """Of a decode step."""
        if not self.retention.moves:
            inside = _kept(store, store.groups[stage.index]) if stage.index else self.pool(store)
            return Scope(inside, [inside] * len(stage.groups))
        alive, able, most = store.alive(store.groups[stage.index]) if stage.index else None, [], []
        for index in stage.groups:
            group = store.groups[index]
            able.append(_both(store.alive(group), alive) if stage.index else store.alive(group))
            most.append(group.n_visual)
        return Scope(alive if stage.index else able[0], able, most)

    @staticmethod
    def pool(store: RowStore) -> Tensor | None:
        """bool ``[B, N]``: what all pruned groups hold where rows stay while decoding, the same in each; None: every token."""
        return store.alive(store.groups[-1])

    def scope_of_prompt(self, store: RowStore, stage: Stage, turn: Turn, reduction: Reduction) -> Scope:
        """Of a prompt's end."""
        groups, before = [store.groups[index] for index in stage.groups], store.groups[stage.index]
        if self.retention.pool is not None:
            if stage.index:
                return Scope(self.pool(store), [])
            there, held = candidates(store, groups[0], turn, reduction), store.alive(groups[0])
            new = there if held is None else there & ~held
            return Scope(there, [], pictures=pool.pictures(store.token_column[:, : store.full.capacity], new))
        if self.retention.moves:
            able = [candidates(store, group, turn, reduction) for group in groups]
            if not stage.index:
                return Scope(able[0], able)
            alive = _both(store.alive(before), able[0])
            return Scope(alive, [alive])
        if self.policy.at_decode:
            return Scope(None, [])
        inside = store.tokens_kept(before) if stage.index else None
        return Scope(inside, [inside] * len(groups))

    # ---- what -------------------------------------------------------------------------------------------------------------------

    def decide(
        self, stage: Stage, step: Tensor, measured: Measured, n_visual: Tensor, scope: Scope, states: tuple[Tensor, Tensor] | None = None,
        attention: OperatorStep | None = None,
    ) -> Choice:  # fmt: skip
        """A stage of a prompt's end or of a decode step.

        Args:
            step: int64 ``[B]``.
            states: ``View.visual`` and ``View.mergeable``.
            attention: as of ``choose``.
        """
        mass, importance, hidden = measured
        view = View(step, mass, importance, n_visual, scope.alive, self.state, hidden, stage.index, *(states or ()))
        choice = choose(self.policy, view, scope, self.backend, attention)
        return choice if scope.pictures is None else self._with_pool(choice, scope, n_visual)

    def _with_pool(self, choice: Choice, scope: Scope, n_visual: Tensor) -> Choice:
        """The prompt's choice where all pruned groups keep a pool: what they held before, and a part of each new picture."""
        assert choice.score is not None and scope.alive is not None and scope.pictures is not None and self.retention.pool is not None
        chosen = pool.members(choice.score, scope.pictures, self.retention.pool, self.retention.spaced)
        chosen |= scope.alive & (scope.pictures < 0)
        listed = ops.select_tokens(chosen.float(), chosen.sum(1, dtype=torch.int32), n_visual, backend=self.backend)
        rate = 1.0 - listed[1].double() / n_visual.clamp(min=1)
        return Choice(rate.masked_fill(n_visual == 0, 0.0), [listed] * len(self.starts))

    def linear(self, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Weight, bias and rates if a decode step of this policy is a linear predictor's (``Policy.predictor_tensors``), else None."""
        return self.policy.predictor_tensors(self.state, hidden) if len(self.starts) == 1 else None

    def decide_linear(
        self, attention: OperatorStep, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scale: float, window: int | None,
        linear: tuple[Tensor, Tensor, Tensor], scope: Scope,
    ) -> tuple[Tensor, Measured, Choice]:  # fmt: skip
        """A decode step that scores and decides at once, by ``linear``: the attention's output ``[B, Hq, Dv]``, and so on."""
        (weight, bias, rates), n_visual = linear, attention.store.full.n_visual
        able, most = scope.able[0], None if scope.most is None else scope.most[0]
        if attention.fuses:
            output, mass, importance, kept, n_kept, rate = attention.step(
                layer, query, *new, scale, window, ops.Decide(weight, bias, rates, alive=able, max_kept=most)
            )
            return output, Measured(mass, importance), Choice(rate, [(kept, n_kept)])
        output, mass, importance = attention.score(layer, query, *new, scale, window, True)
        measured = Measured(mass, importance)
        return output, measured, self.select_linear(measured, n_visual, linear, scope, attention)

    def select_linear(
        self, measured: Measured, n_visual: Tensor, linear: tuple[Tensor, Tensor, Tensor], scope: Scope,
        attention: OperatorStep | None = None,
    ) -> Choice:  # fmt: skip
        """The decision of a step by ``linear``, of what was measured; ``attention`` as of ``choose``."""
        found = None if attention is None else attention.predicted(measured.mass, *linear)
        if found is None:
            rate, _ = ops.predict_rate(measured.mass, *linear, backend=self.backend)
            found = rate, ops.keep_count(n_visual, rate)
        rate, count = found
        count = count if scope.most is None else torch.minimum(count, scope.most[0])
        return Choice(rate, [_select(measured.importance, count, n_visual, scope.able[0], self.backend, attention)])

    def decide_drafts(self, stage: Stage, first: int, measured: Measured, n_visual: Tensor, alive: Tensor | None) -> Choice:
        """Draft tokens, each exactly as if it had come alone.

        Args:
            first: step of the first one.
            alive: bool ``[B, d, N]``, what each can choose from; None: all.

        Returns:
            ``Choice`` with a dimension of drafts after the first in all that it holds.
        """
        mass, importance, hidden = measured
        batch, drafted = mass.shape[:2]
        if self.policy.remembers and len(self.stages) == 1:  # each changes the state for the next one
            self._after = [_copy(self.state)]
            found = []
            for row in range(drafted):
                step = torch.full((batch,), first + row, dtype=torch.int64, device=n_visual.device)
                there = None if alive is None else alive[:, row]
                view = View(step, mass[:, row], importance[:, row], n_visual, there, self.state, None if hidden is None else hidden[:, row])
                found.append(choose(self.policy, view, Scope(there, [there] * len(stage.groups)), self.backend))
                self._after.append(_copy(self.state))
            of_groups = zip(*(choice.lists for choice in found), strict=True)
            lists = [(torch.stack([kept for kept, _ in group], 1), torch.stack([n_kept for _, n_kept in group], 1)) for group in of_groups]
            return Choice(torch.stack([choice.rate for choice in found], 1), lists)
        steps = torch.arange(first, first + drafted, device=n_visual.device).repeat(batch)
        state = {name: tensor.repeat_interleave(drafted, 0) for name, tensor in self.state.items()}
        flat = None if alive is None else alive.flatten(0, 1)
        view = View(
            steps, mass.flatten(0, 1), importance.flatten(0, 1), n_visual.repeat_interleave(drafted), flat, state,
            None if hidden is None else hidden.flatten(0, 1), stage.index,
        )  # fmt: skip
        choice = choose(self.policy, view, Scope(flat, [flat] * len(stage.groups)), self.backend)
        lists = [(kept.view(batch, drafted, -1), n_kept.view(batch, drafted)) for kept, n_kept in choice.lists]
        return Choice(choice.rate.view(batch, drafted), lists)

    def finish(self, rate: Tensor) -> None:
        """A decision is in force whose stages asked for this rate, float64 ``[B]``."""
        self.rate = rate

    def mean_rate(self, rates: Sequence[Tensor]) -> Tensor:
        """Of a decision's stages, over the pruned layers."""
        if len(rates) == 1:
            return rates[0]
        total = rates[0] * self._layers[0]
        for rate, count in zip(rates[1:], self._layers[1:], strict=True):
            total = total + rate * count
        return total / sum(self._layers)

    # ---- what was decided and is not any more -----------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Another pass begins: its predecessor's drafts stay."""
        self._after = []

    def rewind(self, columns: int) -> None:
        """The newest ``columns`` drafts were refused: the policy's state is what it was before them."""
        if 0 < columns < len(self._after):
            self.state = _copy(self._after[-1 - columns])
            del self._after[-columns:]

    def select(self, index: Tensor) -> None:
        """Sequences were reordered."""
        self.state = {name: picked(tensor, index) for name, tensor in self.state.items()}
        if self.rate is not None:
            self.rate = picked(self.rate, index)


def candidates(store: RowStore, group: RowGroup, turn: Turn, reduction: Reduction) -> Tensor:
    """bool ``[B, N]``: tokens that a group with rows of its own holds already or would receive in this turn."""
    columns = store.token_column[:, : store.full.capacity]
    token = torch.arange(columns.shape[1], device=columns.device)
    assert turn.before is not None
    new = token >= turn.before.visual[:, None] if reduction.active else columns >= turn.start
    held = store.alive(group)
    return (new if held is None else held | new) & below(store.full.n_visual, columns.shape[1])


def importance_by_token(store: RowStore, group: RowGroup, importance: Tensor) -> Tensor:
    """Importance of rows -> ``[B, N]`` of tokens: in a group with rows of its own, a row is no token."""
    if store.shared_rows:
        return importance
    held = importance.shape[1]
    return scattered(torch.where(below(group.n_visual, held), group.token[:, :held], -1), importance, store.full.capacity)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a & b


def _kept(store: RowStore, group: RowGroup) -> Tensor:
    kept = store.tokens_kept(group)
    assert kept is not None, "the group before it has decided"
    return kept


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
