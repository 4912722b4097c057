"""An engine without a model: requests batched step by step over a paged pool, with random queries, keys and values in place of layers.

What a token's query, key and value are in a layer follows from its request, its position and whether it is a draft that is refused. So
whatever way a request's rows are batched, chunked or computed again, each row has one right output; ``alone`` gives it by a ``Session``.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dyrate_kernels.engines.vllm.pruning import LayerCache, Pruning
from dyrate_kernels.engines.vllm.requests import Prompt, RequestTable
from dyrate_kernels.engines.vllm.steps import Planner, Step
from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.generation.session import Session
from dyrate_kernels.policies.base import ModelShape, Policy

SHAPE = ModelShape(6, 4, 2, 8, 32, 64, 100)
SCALE = 8**-0.5
WIDTH = 96
CPU = torch.device("cpu")


class Load(NamedTuple):
    """A request to serve: its prompt, and how many tokens its answer has."""

    prompt: Prompt
    answer: int

    @property
    def total(self) -> int:
        """Rows that are computed: the last token is no input."""
        return self.prompt.length + self.answer


@functools.cache
def drawn(request: str, draft: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer, query ``[WIDTH, Hq, D]``, key and value ``[WIDTH, Hkv, D]`` of a request, or of its refused drafts."""
    draw = torch.Generator().manual_seed(sum(map(ord, request)) * 2 + draft)
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    made = []
    for _ in range(SHAPE.num_layers):
        query, key, value = (torch.randn(WIDTH, each, SHAPE.head_dim, generator=draw, dtype=torch.float64) for each in heads)
        made.append((1.5 * query, key, value))
    return made


# ---- one request alone --------------------------------------------------------------------------------------------------------------


@dataclass
class Alone:
    """A request's answer as a ``Session`` has it.

    Attributes:
        output: of each layer ``[total, Hq, D]``.
        kept: of each answer row, of each pruned group: positions.
    """

    output: list[Tensor]
    kept: list[list[list[int]]] = field(default_factory=list)


def alone(request: str, load: Load, policy: Policy, window: int | None = None) -> Alone:
    """The request by itself, its prompt in one pass, its answer token by token; ``policy``: bound."""
    session = Session(policy, SHAPE, "recoverable", "reference")
    prompt, made = load.prompt, drawn(request)
    visual = torch.zeros(1, prompt.length, dtype=torch.bool)
    for first, last in prompt.visual:
        visual[0, first : last + 1] = True
    positions = visual[0].nonzero().flatten().tolist()
    found = Alone([torch.zeros(load.total, SHAPE.num_heads, SHAPE.head_dim, dtype=torch.float64) for _ in made])
    session.begin_turn(prompt.length, load.total, frozen=False)
    session.stage(visual)
    for first, after in [(0, prompt.length), *((row, row + 1) for row in range(prompt.length, load.total))]:
        session.begin_forward(1, after - first, None, CPU)
        for layer, tensors in enumerate(made):
            query, key, value = (each[None, first:after].transpose(1, 2) for each in tensors)
            session.write(layer, key, value)
            found.output[layer][first:after] = session.attend(layer, query, key, value, SCALE, window)[0]
        session.finish_forward()
        if first:
            groups = session.store.groups[1:]
            lists = [[] if group.kept is None else group.kept[0, : int(group.n_kept[0])].tolist() for group in groups]
            found.kept.append([[positions[token] for token in tokens] for tokens in lists])
    return found


# ---- many at once -------------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A request's part of a step: rows computed before, rows in it, and how many of these, at the end, are drafts that are refused."""

    request: str
    computed: int
    count: int
    refused: int = 0


class Paged:
    """The cache of a layer with blocks in random order. NaN where nothing was written."""

    def __init__(self, blocks: int, size: int, kv_heads: int) -> None:
        self.size = size
        self.key, self.value = (torch.full((blocks, size, kv_heads, SHAPE.head_dim), torch.nan, dtype=torch.float64) for _ in range(2))

    def write(self, blocks: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Rows of these positions of the request whose blocks, int ``[M]``, these are."""
        block, place = blocks[positions // self.size].long(), positions % self.size
        self.key[block, place], self.value[block, place] = key, value


class Engine:
    """Serves.

    Args:
        policy: bound.
        loads: the requests.
        slots: of the table.
        window: of every layer.
        heads, shard: this process's part of the heads, the ``shard``-th of ``heads.size``; None: all.

    Attributes:
        kept: by request and position of an answer row, of each pruned group: positions.
    """

    def __init__(
        self, policy: Policy, loads: dict[str, Load], slots: int = 8, window: int | None = None, heads: HeadShards | None = None,
        shard: int = 0,
    ) -> None:  # fmt: skip
        self.policy, self.loads, self.window = policy, loads, window
        self.table = RequestTable(policy, policy.layer_groups(SHAPE.num_layers), SHAPE.num_layers, slots, WIDTH, CPU)
        self.planner, self.pruning = Planner(self.table, CPU), Pruning(policy, SHAPE.num_layers, self.table, heads, "reference")
        size = 1 if heads is None else heads.size
        query_heads, kv_heads = SHAPE.num_heads // size, SHAPE.num_kv_heads // size
        of_query = slice(shard * query_heads, (shard + 1) * query_heads)
        of_key = slice(shard * kv_heads, (shard + 1) * kv_heads)
        self.drawn = {
            (request, draft): [(query[:, of_query], key[:, of_key], value[:, of_key]) for query, key, value in drawn(request, draft)]
            for request in loads
            for draft in (False, True)
        }
        self.output = {
            request: [
                torch.full((load.total, query_heads, SHAPE.head_dim), torch.nan, dtype=torch.float64) for _ in range(SHAPE.num_layers)
            ]
            for request, load in loads.items()
        }
        self.kept: dict[tuple[str, int], list[list[int]]] = {}
        self._blocks = WIDTH // 4
        order = torch.randperm(self._blocks * len(loads), generator=torch.Generator().manual_seed(1)).int()
        self._block_table = dict(zip(loads, order.view(len(loads), -1), strict=True))
        self._pool = [Paged(len(order), 4, kv_heads) for _ in range(SHAPE.num_layers)]

    def add(self, request: str) -> None:
        """It comes."""
        self.table.add(request, self.loads[request].prompt)
        self.planner.forget()

    def forget(self, request: str, positions: range, layers: range) -> None:
        """What these rows hold is lost."""
        rows = torch.tensor(positions)
        lost = torch.full((len(rows), 1, 1), torch.nan, dtype=torch.float64)
        for layer in layers:
            self._pool[layer].write(self._block_table[request], rows, lost, lost)

    def step(self, parts: Sequence[Part]) -> Step | None:
        """One step of these requests, all layers."""
        starts, lengths = [0], []
        for part in parts:
            starts.append(starts[-1] + part.count)
            lengths.append(part.computed + part.count)
        requests, computed = [part.request for part in parts], [part.computed for part in parts]
        step = self.planner.plan(requests, computed, starts, torch.tensor(lengths, dtype=torch.int32), max(lengths))
        table = torch.stack([self._block_table[request] for request in requests])
        for layer, pool in enumerate(self._pool):
            queries = []
            for part, blocks in zip(parts, table, strict=True):
                query, key, value = self._rows(layer, part)
                pool.write(blocks, torch.arange(part.computed, part.computed + part.count), key, value)
                queries.append(query)
            query = torch.cat(queries)
            output = torch.full_like(query, torch.nan)
            if step is not None:
                cache = LayerCache(pool.key, pool.value, table)
                self.pruning.end_prompts(layer, query, cache, step, SCALE, self.window)
                if step.answers is not None and self.pruning.reads(layer):
                    output[step.answers.row] = self.pruning.answer(layer, query[step.answers.row], cache, step, SCALE, self.window)
            self._note(layer, parts, starts, output)
        if step is not None and step.answers is not None:
            self._note_kept(parts, step)
        return step

    def _rows(self, layer: int, part: Part) -> tuple[Tensor, ...]:
        """Query, key and value of a part's rows."""
        first, after = part.computed, part.computed + part.count
        true, refused = self.drawn[part.request, False][layer], self.drawn[part.request, True][layer]
        edge = after - part.refused
        return tuple(torch.cat([one[first:edge], other[edge:after]]) for one, other in zip(true, refused, strict=True))

    def _note(self, layer: int, parts: Sequence[Part], starts: Sequence[int], output: Tensor) -> None:
        for part, start in zip(parts, starts, strict=False):
            count = part.count - part.refused
            self.output[part.request][layer][part.computed : part.computed + count] = output[start : start + count]

    def _note_kept(self, parts: Sequence[Part], step: Step) -> None:
        assert step.answers is not None
        for number, (line, n_rows) in enumerate(zip(step.answers.sequence.tolist(), step.answers.n_rows.tolist(), strict=True)):
            part = parts[line]
            if n_rows <= part.computed + part.count - part.refused:
                lists = [step.lists[group] for group in range(1, len(self.pruning.starts) + 1)]
                self.kept[part.request, n_rows - 1] = [kept[number, : int(n_kept[number])].tolist() for kept, n_kept in lists]


# ---- mixes of requests --------------------------------------------------------------------------------------------------------------


@dataclass
class Mix:
    """How a scheduler goes about it.

    Attributes:
        seed: of its choices.
        batch: requests in a step at most.
        drafts: rows of an answer come several at once, some of them refused.
        preempts: a request may lose its rows: all, or those past a point of its prompt; ``within``: or of its answer.
    """

    seed: int = 0
    batch: int = 6
    drafts: bool = False
    preempts: bool = False
    within: bool = False

    def serve(self, engine: Engine) -> list[list[Part]]:
        """Serves all requests of an engine to their ends; returns the steps."""
        draw = random.Random(self.seed)
        waiting, running = list(engine.loads), []
        done = dict.fromkeys(engine.loads, 0)
        known = {request: load.prompt.length for request, load in engine.loads.items()}  # tokens that are there to compute rows of
        losses = dict.fromkeys(engine.loads, 2 if self.preempts else 0)
        steps = []
        while waiting or running:
            for _ in range(draw.randint(1, 2)):
                if waiting:
                    running.append(waiting.pop(0))
                    engine.add(running[-1])
            parts = []
            for request in draw.sample(running, min(len(running), draw.randint(2, self.batch))):
                load = engine.loads[request]
                if losses[request] and done[request] > load.prompt.length + 1 and draw.random() < 0.5:
                    losses[request] -= 1
                    done[request] = self._left(draw, load, done[request])
                before = done[request]
                count, refused = draw.randint(1, known[request] - before), 0
                if self.drafts and before + count == known[request] and before >= load.prompt.length:
                    drafted = draw.randint(0, min(3, load.total - before - count))
                    count, refused = count + drafted, draw.randint(0, drafted)
                done[request] = before + count - refused
                known[request] = min(max(known[request], done[request] + 1), load.total)
                parts.append(Part(request, before, count, refused))
            if parts:
                engine.step(parts)
                steps.append(parts)
            for request in [request for request in running if done[request] == engine.loads[request].total]:
                running.remove(request)
                engine.table.remove(request)
        return steps

    def _left(self, draw: random.Random, load: Load, done: int) -> int:
        """Rows that a request which is preempted finds again."""
        end = load.prompt.length
        if self.within and draw.random() < 0.4:
            return draw.randint(end, done - 1)
        return draw.choice([0, draw.randint(0, end - 1), end - 1])
