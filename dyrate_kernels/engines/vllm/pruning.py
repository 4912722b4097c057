"""Attention and decisions of the rows of a step, layer by layer: the paged operators, and the policies as everywhere else.

Knows a layer's cache as ``ops.paged_attention`` does, and nothing of vLLM. Answer rows: each decides for itself at the score layers, by its
own attention, as a draft token of assisted decoding does. A prompt's last row: its statistics begin the policy's state (step 0), and a
policy that decides once lists by them what the whole answer reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.engines.vllm.requests import RequestTable
from dyrate_kernels.engines.vllm.steps import Rows, Step
from dyrate_kernels.generation.decide import Choice, Decider, Scope, Stage, choose
from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.policies.base import Policy, View
from dyrate_kernels.retention import Retention


class LayerCache(NamedTuple):
    """A layer's rows as the operators read them: key and value ``[blocks, block_size, Hkv, D]``, block_table int32 ``[requests, M]``."""

    key: Tensor
    value: Tensor
    block_table: Tensor


class Pruning:
    """The decisions of one engine.

    Args:
        policy: bound to the model.
        num_layers: L.
        table: the requests.
        heads: the processes among which the heads are shared out; None: all are here.
        backend: of the operators.

    Attributes:
        stages: of a decision, by the layer that measures.
        starts: first layer of each pruned group.
    """

    def __init__(self, policy: Policy, num_layers: int, table: RequestTable, heads: HeadShards | None, backend: str = "auto") -> None:
        self.policy, self.table, self.heads, self.backend = policy, table, heads, backend
        decider = Decider(policy, num_layers, Retention("recoverable"), backend)
        self.stages: dict[int, Stage] = decider.stages
        self.starts: list[int] = decider.starts
        self._group = [sum(start <= layer for start in self.starts) for layer in range(num_layers)]

    def reads(self, layer: int) -> bool:
        """Answer rows of this layer are read by ``answer``; else by vLLM's own kernel."""
        return self._group[layer] > 0 or (self.policy.at_decode and layer in self.stages)

    # ---- prompts ----------------------------------------------------------------------------------------------------------------

    def end_prompts(self, layer: int, query: Tensor, cache: LayerCache, step: Step, scale: float, window: int | None) -> None:
        """The last rows of prompts decide, at a score layer; elsewhere nothing happens.

        Args:
            query: ``[tokens, Hq, D]`` of the whole step.
        """
        stage, ends = self.stages.get(layer), step.ends
        if stage is None or ends is None or not self.policy.at_prefill:
            return
        table = self.table
        if not stage.index:
            table.begin(ends.slot)
        _, mass, importance = self._measure(query[ends.row], cache, step, ends, scale, window)
        inside = None
        if table.lasts and stage.index:
            before = stage.index - 1
            index = self._index_of(table.kept[before][ends.slot], step.visual_position[ends.sequence])
            inside = _mask(index, importance.shape[1])
        scope = Scope(inside, [inside] * len(stage.groups)) if table.lasts else Scope(None, [])
        choice = self._choose(stage, ends, mass, importance, scope, begins=True)
        for group, (index, count) in zip(stage.groups, choice.lists, strict=False):
            kept = _positions(index, step.visual_position[ends.sequence])
            table.kept[group - 1][ends.slot] = torch.nn.functional.pad(kept, (0, table.width - kept.shape[1]), value=-1)
            table.n_kept[group - 1][ends.slot] = count

    # ---- answers ----------------------------------------------------------------------------------------------------------------

    def answer(self, layer: int, query: Tensor, cache: LayerCache, step: Step, scale: float, window: int | None) -> Tensor:
        """Attention of the answer rows, query ``[R, Hq, D]`` -> ``[R, Hq, D]``; at a score layer each decides what it reads from there."""
        rows, stage = step.answers, self.stages.get(layer)
        assert rows is not None
        group = self._group[layer]
        kept, n_kept = self._lists(group, step, rows) if group else (None, None)
        shared = self._shared(cache, step, rows, scale, window)
        if stage is None or not self.policy.at_decode:
            return ops.paged_attention(query, cache.key, cache.value, **shared, kept=kept, n_kept=n_kept).output
        linear = None
        if len(self.stages) == 1 and self.heads is None and not self.policy.remembers:
            linear = self.policy.predictor_tensors(self.table.state_of(rows.slot), None)
        if linear is not None:
            weight, bias, rates = linear
            found = ops.paged_step(
                query, cache.key, cache.value, **shared, visual_position=step.visual_position, text_type=step.text_type,
                weight=weight, bias=bias, rates=rates,
            )  # fmt: skip
            step.lists[group + 1] = found.kept, found.n_kept
            self._count(step, rows)
            return found.output
        output, mass, importance = self._measure(query, cache, step, rows, scale, window, kept, n_kept)
        visual = step.visual_position[rows.sequence]
        inside = None
        if kept is not None:
            index = self._index_of(kept, visual)
            inside = _mask(index, visual.shape[1])
            importance = _by_token(importance, index, visual.shape[1])
        choice = self._choose(stage, rows, mass, importance, Scope(inside, [inside] * len(stage.groups)))
        width = self.policy.kept_bound(visual.shape[1])
        for number, (index, count) in zip(stage.groups, choice.lists, strict=True):
            step.lists[number] = _positions(index[:, :width], visual), count
        if stage.last:
            self._count(step, rows)
        return output

    def _lists(self, group: int, step: Step, rows: Rows) -> tuple[Tensor, Tensor]:
        """Returns what the answer rows read in a pruned group, int32 ``[R, W]`` and ``[R]``."""
        if group not in step.lists:  # of a group before whose first layer a prompt of this step has decided, too
            table = self.table
            width = min(self.policy.kept_bound(step.visual_position.shape[1]), table.width)
            step.lists[group] = table.kept[group - 1][rows.slot, :width], table.n_kept[group - 1][rows.slot]
            if group == len(self.starts):
                self._count(step, rows)
        return step.lists[group]

    def _count(self, step: Step, rows: Rows) -> None:
        """Adds the answer rows to their requests' figures."""
        table = self.table
        kept = sum(step.lists[number][1].long() * layers for number, layers in enumerate(table.layers, 1))
        assert isinstance(kept, Tensor)
        seen = torch.stack([torch.ones_like(kept), kept, rows.n_rows.long() * table.num_layers], 1)
        table.tally.index_add_(0, rows.slot, seen)

    # ---- both -------------------------------------------------------------------------------------------------------------------

    def _shared(self, cache: LayerCache, step: Step, rows: Rows, scale: float, window: int | None) -> dict[str, Any]:
        return {
            "block_table": cache.block_table, "n_rows": rows.n_rows, "sequence": rows.sequence, "n_visual": rows.n_visual,
            "text_position": step.text_position, "scale": scale, "window": window, "row_bound": step.row_bound, "backend": self.backend,
        }  # fmt: skip

    def _measure(
        self, query: Tensor, cache: LayerCache, step: Step, rows: Rows, scale: float, window: int | None, kept: Tensor | None = None,
        n_kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Output, and mass and importance of all heads; importance by place in the list that is read."""
        output, mass, importance = ops.paged_attention(
            query, cache.key, cache.value, **self._shared(cache, step, rows, scale, window), visual_position=step.visual_position,
            text_type=step.text_type, kept=kept, n_kept=n_kept, mass=True, importance=True,
        )  # fmt: skip
        assert mass is not None and importance is not None
        if self.heads is not None:
            mass, of_all = self.heads.statistics(mass, importance)
            assert of_all is not None
            importance = of_all
        return output, mass, importance

    def _choose(self, stage: Stage, rows: Rows, mass: Tensor, importance: Tensor, scope: Scope, begins: bool = False) -> Choice:
        """The policy's choice for these rows. Of several rows of a request those of a policy that remembers decide one after the other."""
        if rows.turns is None:
            return self._choose_at_once(stage, rows, mass, importance, scope, begins)
        lists = [(torch.full_like(importance, -1, dtype=torch.int32), torch.zeros_like(rows.n_rows)) for _ in scope.able]
        rate = torch.zeros(rows.n_rows.shape, dtype=torch.float64, device=mass.device)
        for turn in rows.turns:
            able = [None if each is None else each[turn] for each in scope.able]
            inside = None if scope.alive is None else scope.alive[turn]
            choice = self._choose_at_once(stage, rows.at(turn), mass[turn], importance[turn], Scope(inside, able), begins)
            rate[turn] = choice.rate
            for (index, count), (found, counted) in zip(lists, choice.lists, strict=True):
                index[turn], count[turn] = found, counted
        return Choice(rate, lists)

    def _choose_at_once(self, stage: Stage, rows: Rows, mass: Tensor, importance: Tensor, scope: Scope, begins: bool) -> Choice:
        state = self.table.state_of(rows.slot)
        view = View(rows.step, mass, importance, rows.n_visual, scope.alive, state, None, stage.index)
        choice = choose(self.policy, view, scope, self.backend)
        if begins or self.policy.remembers:
            self.table.put(state, rows.slot)
        return choice

    @staticmethod
    def _index_of(kept: Tensor, visual: Tensor) -> Tensor:
        """Positions int32 ``[R, W]``, -1 past their end -> places in the list ``[R, N]`` of all visual positions, N past their end."""
        last = visual.shape[1]
        ordered = torch.where(visual < 0, torch.iinfo(torch.int32).max, visual).contiguous()
        return torch.where(kept < 0, last, torch.searchsorted(ordered, kept.contiguous()))


def _positions(index: Tensor, visual: Tensor) -> Tensor:
    """Places in the list of visual positions, -1 past their end -> positions, int32, likewise."""
    return torch.where(index < 0, -1, visual.gather(1, index.clamp(min=0).long()))


def _mask(index: Tensor, tokens: int) -> Tensor:
    """Places ``[R, W]``, N past their end -> bool ``[R, N]``."""
    return torch.zeros(index.shape[0], tokens + 1, dtype=torch.bool, device=index.device).scatter_(1, index, True)[:, :tokens]


def _by_token(importance: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Importance by place in a list ``[R, W]`` -> ``[R, N]`` by visual token, 0 of those that it does not name."""
    return importance.new_zeros(index.shape[0], tokens + 1).scatter_(1, index, importance)[:, :tokens]
