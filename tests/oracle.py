"""An independent reference for patched generation: masks of minus infinity, nothing cached, everything recomputed.

The oracle copies an unpatched model, gives its text attention an explicit float32 softmax and lets transformers generate with
``use_cache=False``.
So every forward pass sees the whole sequence, and which visual columns a row may read in layers >= k is a function of that sequence alone:
it is worked out anew, row by row, from the probabilities of layer k-1. Beams, sampling and several answers per prompt need no further code.

Nothing of ``dyrate_kernels`` is imported here; the rules are written down again from docs/methods and the papers.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "tests_oracle"
SYSTEM, IMAGE, INSTRUCTION, RESPONSE = 0, 1, 2, 3


@dataclass(frozen=True)
class Rule:
    """One method's options, as docs/methods words them.

    Attributes:
        name: none, fixed, fastv, vtw, depth, schedule, uniform, dyrate, threshold, st3, dycoke, pyramiddrop, layerwise,
            sparsevlm (without recycling) or aim.
        k: first layer that sees the pruned set; None: the method's own default.
        rate: fraction removed (fixed, fastv, uniform).
        ranking: which prompt rows FastV ranks by, ``last`` or ``mean``.
        kept: (step, count) pairs of a schedule.
        prune, growth: of depth; growth of st3 too.
        share: of threshold.
        least, horizon, stages: of st3; stages of pyramiddrop and layerwise too.
        keep: of pyramiddrop.
        end: of aim, the first layer that holds nothing.
        shares: of sparsevlm, what stays in each stage.
        similarity: of dycoke.
        rates: ``half_open`` or ``closed`` (dyrate).
        buckets: K (dyrate).
        spread: of what is kept, evenly spaced (dyrate).
        weight, bias: a linear predictor ``[K, Hq*4]``, ``[K]``; None: the closed form.
    """

    name: str
    k: int | None = None
    rate: float = 0.5
    ranking: str = "last"
    kept: Sequence[tuple[int, int]] = ()
    prune: float = 0.5
    growth: float = 0.25
    share: float = 0.9
    least: float = 0.25
    horizon: int = 64
    stages: int = 3
    keep: float = 0.5
    end: int | None = None
    shares: Sequence[float] = (0.7, 0.4, 0.2)
    similarity: float = 0.9
    rates: str = "half_open"
    buckets: int = 5
    spread: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None

    def first_layer(self, num_layers: int) -> int:
        if self.k is not None:
            return self.k
        return {
            "vtw": max(num_layers // 2, 1),
            "depth": 4,
            "pyramiddrop": max(num_layers // 4, 1),
            "sparsevlm": max(num_layers * 3 // 32, 1),
            "aim": max(num_layers * 15 // 28, 1),
        }.get(self.name, 3)

    def stage_starts(self, num_layers: int) -> list[int]:
        """First layers of the stages that are decided one by one; one entry for methods that decide once for all layers."""
        first = self.first_layer(num_layers)
        if self.name == "aim":
            return list(range(first, min(self.last_layer(num_layers), num_layers - 1) + 1))
        if self.name == "sparsevlm":  # 3, 7 and 16 of 32, scaled to what lies after the first
            starts = [first]
            for part in (4, 13):
                starts.append(max(first + (num_layers - first) * part // 29, starts[-1] + 1))
            return [start for start in starts if start < num_layers]
        count = min(self.stages, num_layers - first) if self.name in ("pyramiddrop", "layerwise") else 1
        return [first + (num_layers - first) * i // count for i in range(count)]

    def last_layer(self, num_layers: int) -> int:
        return math.ceil(num_layers * 22 / 28) if self.end is None else self.end

    @property
    def decides_while_decoding(self) -> bool:
        return self.name in ("layerwise", "fixed", "schedule", "uniform", "dyrate", "threshold", "st3", "dycoke")


@dataclass(frozen=True)
class Turn:
    """One call of ``generate``: its new prompt rows are ``[start, end)``."""

    start: int
    end: int


@dataclass
class Step:
    """The decision of one step of one sequence: the columns that stay, by layer, and why."""

    step: int
    rates: dict[int, float]  # by layer
    kept: dict[int, list[int]]
    mass: Tensor  # float64 [4], mean over heads
    importance: Tensor  # float64 [N]

    @property
    def rate(self) -> float:
        """The mean over pruned layers."""
        return sum(self.rates.values()) / len(self.rates)

    @property
    def count(self) -> int:
        """How many stay, the mean over pruned layers, rounded."""
        return round(sum(len(kept) for kept in self.kept.values()) / len(self.kept))


@dataclass
class _Sequence:
    """The state of one sequence within one generation."""

    survivors: dict[int, list[int]] = field(default_factory=dict)  # by layer
    first_mass: float = 0.0
    selected_by: dict[int, float] = field(default_factory=dict)  # dycoke: the importance that it last selected by


def keep_count(n: int, rate: float) -> int:
    return min(max(math.floor(n * (1.0 - rate) + 1e-6), 0), n)


def rate_values(kind: str, buckets: int) -> list[float]:
    if kind == "closed":
        return [i / (buckets - 1) for i in range(buckets)]
    return [i / buckets for i in range(buckets)]


def closed_form_index(mass: float, first_mass: float, buckets: int) -> int:
    """The bucket whose affine function of the visual mass is highest; ties to the smaller one."""
    bias, best, at = 0.0, -math.inf, 0
    for j in range(buckets):
        value = (buckets - 1 - j) * mass + bias
        if value > best:
            best, at = value, j
        bias += (2.0 * (buckets - 1 - j) + 0.5) / buckets * first_mass
    return at


def top(columns: Sequence[int], scores: Sequence[float], count: int) -> list[int]:
    """The ``count`` columns of highest score, ascending; ties to the earlier one."""
    order = sorted(range(len(columns)), key=lambda i: (-scores[i], i))
    return sorted(columns[i] for i in order[:count])


def holding(scores: Sequence[float], share: float) -> int:
    """The size of the smallest set of the highest scores that sums to ``share`` of the total."""
    held, count = 0.0, 0
    for score in sorted(scores, reverse=True):
        if held >= share * sum(scores) * (1 - 1e-9):
            break
        held, count = held + score, count + 1
    return count


def cosine(a: dict[int, float], b: dict[int, float]) -> float:
    """1 where one of them is nothing but zeros (every token is behind a window): the selection stays."""
    dot, norm = sum(a[c] * b[c] for c in a), math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
    return dot / norm if norm else 1.0


def evenly(columns: Sequence[int], count: int) -> list[int]:
    total = len(columns)
    return [c for i, c in enumerate(columns) if (i + 1) * count // total > i * count // total]


def runs(columns: Sequence[int]) -> list[list[int]]:
    """Columns that follow each other, together."""
    found: list[list[int]] = []
    for column in columns:
        if found and found[-1][-1] == column - 1:
            found[-1].append(column)
        else:
            found.append([column])
    return found


def pool_options(retention: str) -> tuple[str, float, float]:
    """``pool=0.5:by=uniform`` -> its name, the fraction and the share that is evenly spaced."""
    name, _, by = retention.partition(":by=")
    name, _, fraction = name.partition("=")
    return name, float(fraction or 0.25), {"": 0.0, "policy": 0.0, "uniform": 1.0}[by] if by.isalpha() or not by else float(by)


class Oracle:
    """A pruned model by masks.

    Args:
        model: an unpatched model; it is copied.
        rule: the method.
        retention: ``recoverable``, ``evict`` or ``pool``, the last one with options if wanted: ``pool=0.5:by=uniform``.
        frozen: evict only at the prompt (what assisted decoding does).
    """

    def __init__(self, model: Any, rule: Rule, retention: str = "recoverable", *, frozen: bool = False) -> None:
        retention, self.pool, self.evenly_share = pool_options(retention)
        assert retention in ("recoverable", "evict", "pool")
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, eager_mask)
        self.rule, self.retention, self.frozen = rule, retention, frozen
        self.model = copy.deepcopy(model)
        text = self.model.get_decoder()
        text.config._attn_implementation = NAME
        for layer in text.layers:
            layer.self_attn.config._attn_implementation = NAME
            layer.self_attn.oracle = self
        self.num_layers = len(text.layers)
        self.k = rule.first_layer(self.num_layers)
        starts = rule.stage_starts(self.num_layers)
        self.stages = {start - 1: range(start, end) for start, end in zip(starts, [*starts[1:], self.num_layers], strict=True)}
        config = self.model.config
        self.visual_ids = [i for i in (getattr(config, "image_token_id", None), getattr(config, "video_token_id", None)) if i is not None]
        self.turns: list[Turn] | None = None
        self.trace: list[list[Step]] = []
        self.model.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        text.register_forward_pre_hook(self._enter, with_kwargs=True)

    # -- what a test calls -----------------------------------------------------------------------------------------------------------------

    def generate(self, *, before: Sequence[Turn] = (), start: int = 0, **inputs: Any) -> Any:
        """``model.generate`` under the rule.

        Args:
            before: the turns of the chat so far, if any; ``inputs`` hold the whole chat.
            start: first row that this turn's prefill computes (earlier ones were in the cache).
            inputs: of ``generate``.
        """
        self.turns = [*before, Turn(start, inputs["input_ids"].shape[1])]
        try:
            return self.model.generate(**inputs, use_cache=False)
        finally:
            self.turns = None

    @torch.no_grad()
    def forward(self, turns: Sequence[Turn], **inputs: Any) -> Any:
        """One pass over a complete sequence."""
        self.turns = list(turns)
        try:
            return self.model(**inputs, use_cache=False)
        finally:
            self.turns = None

    # -- inside a forward pass -------------------------------------------------------------------------------------------------------------

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        self.ids = ids
        self.real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.visual = torch.isin(ids, torch.tensor(self.visual_ids)) & self.real
        self.hidden: dict[int, Tensor] = {}

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.embeddings = kwargs["inputs_embeds"].double()

    def _raters(self, b: int, turn: Turn, visual: Sequence[int]) -> list[int]:
        """Text rows of the turn, from the first picture on, whose mean share of the visual tokens' similarity is above the mean."""
        new = [c for c in visual if c >= turn.start]
        first = turn.start if turn.start else visual[0]
        text = [c for c in range(first, turn.end) if self.real[b, c] and not self.visual[b, c]]
        share = dict.fromkeys(text, 0.0)
        for v in new:
            dots = [float(self.embeddings[b, v] @ self.embeddings[b, t]) for t in text]
            weights = [math.exp(dot - max(dots)) for dot in dots]
            for t, weight in zip(text, weights, strict=True):
                share[t] += weight / sum(weights) / len(new)
        return [t for t in text if share[t] > sum(share.values()) / len(text)]

    def decide(self, probabilities: Tensor, layer: int) -> None:
        """Works out which columns each row of the layers that ``layer`` decides for may not read. ``probabilities``: its own, float
        ``[B, Hq, S, S]``.
        """
        assert self.turns is not None
        batch, _, length, _ = probabilities.shape
        layers = self.stages[layer]
        if layer == self.k - 1:
            self.hidden = {each: torch.zeros(batch, length, length, dtype=torch.bool) for each in range(self.k, self.num_layers)}
            self.decided: list[list[list[Step]]] = [[[] for _ in self.turns] for _ in range(batch)]
            self.pools: list[list[int]] = [[] for _ in range(batch)]
        for b in range(batch):
            state = _Sequence()
            for i, turn in enumerate(self.turns):
                until = self.turns[i + 1].start if i + 1 < len(self.turns) else length
                before = self.decided[b][i]
                steps = self._turn(b, turn, until, probabilities[b].double(), state, layers, before)
                if before:
                    for step, more in zip(before, steps, strict=True):
                        step.rates |= more.rates
                        step.kept |= more.kept
                else:
                    self.decided[b][i] = steps
        self.trace = [turns[-1] for turns in self.decided]

    def _turn(
        self, b: int, turn: Turn, until: int, probabilities: Tensor, state: _Sequence, layers: range, before: list[Step]
    ) -> list[Step]:  # fmt: skip
        """The steps of a turn for these layers; ``before``: the same steps for the stages before them."""
        visual = [c for c in self.visual[b].nonzero()[:, 0].tolist() if c < turn.end]
        if not visual:
            return []
        new = [c for c in visual if c >= turn.start]
        alive = {layer: sorted({*state.survivors.get(layer, []), *new}) for layer in layers}
        candidates = dict.fromkeys(layers, visual) if self.retention == "recoverable" else alive
        candidates = self._within(candidates, before, 0)
        rows = [r for r in range(turn.start, turn.end) if self.real[b, r]] if self.rule.ranking == "mean" else [turn.end - 1]
        if self.rule.name == "sparsevlm":
            rows = self._raters(b, turn, visual) or rows
        ranked = self._page_rank(b, turn, probabilities, visual, candidates[layers[0]]) if self.rule.name == "aim" else None
        at_prompt = self._choose(b, 0, turn, probabilities, rows, visual, candidates, state, ranked)
        if self.retention == "pool":
            at_prompt = self._pooled(b, at_prompt, visual, new, candidates[layers[0]], before)
        if self.retention != "recoverable":
            self._hide(b, range(turn.start, turn.end), visual, at_prompt)
            state.survivors = at_prompt.kept
        steps = [at_prompt]
        for row in range(turn.end, until):
            step = row - turn.end + 1
            if not self.rule.decides_while_decoding or (self.retention == "evict" and self.frozen):
                mass = self._mass(b, turn, probabilities[:, row], visual).mean(0)
                importance = probabilities[:, row][..., list(visual)].mean(0)
                chosen = replace(at_prompt, step=step, mass=mass, importance=importance, rates={**at_prompt.rates}, kept={**at_prompt.kept})
            else:
                able = dict.fromkeys(layers, visual) if self.retention == "recoverable" else state.survivors
                able = self._within(able, before, step)
                chosen = self._choose(b, step, turn, probabilities, [row], visual, able, state)
                if self.retention == "evict":
                    state.survivors = chosen.kept
            self._hide(b, [row], visual, chosen)
            steps.append(chosen)
        return steps

    def _pooled(self, b: int, asked: Step, visual: Sequence[int], new: list[int], able: Sequence[int], before: list[Step]) -> Step:
        """Step 0 of a prompt that keeps, in all pruned layers, what it held before and a part of each new picture."""
        if not before:  # the first stage chooses for all
            score = self._scores(asked, visual, able)
            for picture in runs(new):
                size = min(max(math.floor(self.pool * len(picture) + 0.5 + 1e-6), 1), len(picture))
                spaced = evenly(picture, math.floor(self.evenly_share * size + 1e-6))
                rest = [c for c in picture if c not in spaced]
                self.pools[b] += spaced + top(rest, [score[c] for c in rest], size - len(spaced))
        pool = [c for c in visual if c in self.pools[b]]
        rates = dict.fromkeys(asked.rates, 1 - len(pool) / len(visual))
        return replace(asked, rates=rates, kept=dict.fromkeys(asked.kept, pool))

    def _scores(self, asked: Step, visual: Sequence[int], able: Sequence[int]) -> dict[int, float]:
        """What the method ranks a prompt's tokens by."""
        score = dict(zip(visual, asked.importance.tolist(), strict=True))
        if self.rule.name == "uniform":
            spaced = evenly(able, min(keep_count(len(visual), asked.rates[self.k]), len(able)))
            return {c: float(c in spaced) for c in visual}
        if self.rule.spread:
            count = min(keep_count(len(visual), asked.rates[self.k]), len(able))
            return score | dict.fromkeys(evenly(able, math.floor(self.rule.spread * count + 1e-6)), 2.0)
        return score

    @staticmethod
    def _within(candidates: dict[int, Sequence[int]], before: list[Step], step: int) -> dict[int, Sequence[int]]:
        """Returns what the stage before keeps in the same step."""
        if not before:
            return candidates
        kept = {*before[step].kept[min(candidates) - 1]}
        return {layer: [c for c in columns if c in kept] for layer, columns in candidates.items()}

    def _hide(self, b: int, rows: Sequence[int], visual: Sequence[int], step: Step) -> None:
        if not rows:
            return
        for layer, kept in step.kept.items():
            gone = sorted({*visual} - {*kept})
            if gone:
                self.hidden[layer][b][torch.tensor(list(rows))[:, None], torch.tensor(gone)] = True

    def _choose(
        self,
        b: int,
        step: int,
        turn: Turn,
        probabilities: Tensor,
        rows: Sequence[int],
        visual: Sequence[int],
        candidates: dict[int, Sequence[int]],
        state: _Sequence,
        ranked: Tensor | None = None,
    ) -> Step:
        rule, last = self.rule, turn.end - 1 if step == 0 else rows[-1]
        n = len(visual)
        mass = self._mass(b, turn, probabilities[:, last], visual)
        importance = probabilities[:, rows][..., list(visual)].mean((0, 1)) if ranked is None else ranked
        total = float(mass[:, IMAGE].mean())
        if step == 0:
            state.first_mass = total
        score = dict(zip(visual, importance.tolist(), strict=True))
        rates = {layer: rate for layer, rate in self._rates(step, n, mass, total, state).items() if layer in candidates}
        if rule.name == "threshold":
            rates = dict.fromkeys(rates, 1.0 - holding([score[c] for c in candidates[self.k]], rule.share) / n)
        if rule.name == "dycoke":
            if step == 0 or set(state.selected_by) != set(score) or cosine(score, state.selected_by) < rule.similarity:
                state.selected_by = score
            score = state.selected_by
        kept = {}
        for layer, rate in rates.items():
            able = candidates[layer]
            count = min(keep_count(n, rate), len(able))
            if rule.name == "uniform":
                kept[layer] = evenly(able, count) if able else []
            elif rule.spread:
                spaced = evenly(able, math.floor(rule.spread * count + 1e-6)) if able else []
                rest = [c for c in able if c not in spaced]
                kept[layer] = sorted({*spaced, *top(rest, [score[c] for c in rest], count - len(spaced))})
            else:
                kept[layer] = top(able, [score[c] for c in able], count)
        return Step(step, rates, kept, mass.mean(0), importance)

    def _page_rank(self, b: int, turn: Turn, probabilities: Tensor, visual: Sequence[int], there: Sequence[int]) -> Tensor:
        """AIM's importance of the visual columns: weight is handed on five times along attention at a temperature of 0.1."""
        gone = {*visual} - {*there} if self.retention == "evict" else set()
        rows = [r for r in range(turn.start, turn.end) if self.real[b, r] and r not in gone]
        squares = torch.zeros(probabilities.shape[-1], dtype=torch.double)
        for head in probabilities:
            sharp = head[rows] ** 10
            sharp = sharp / sharp.sum(1, keepdim=True)
            weight = torch.full((len(rows),), 1 / len(rows), dtype=torch.double)
            for _ in range(4):
                weight = weight @ sharp[:, rows]
            squares += (weight @ sharp) ** 2 / len(probabilities)
        return squares.float().sqrt()[list(visual)]  # what is too small for float32 is 0

    def _rates(self, step: int, n: int, mass: Tensor, total: float, state: _Sequence) -> dict[int, float]:
        rule = self.rule
        layers = range(self.k, self.num_layers)
        if rule.name == "depth":
            span = max(self.num_layers - 1 - self.k, 1)
            return {layer: min(rule.prune + rule.growth * (layer - self.k) / span, 1.0) for layer in layers}
        if rule.name == "st3":
            stages = min(rule.stages, len(layers))
            firsts = [self.k + len(layers) * stage // stages for stage in range(stages)]
            fading = max(rule.least, 1 - (1 - rule.least) * step / rule.horizon)
            stage_of = {layer: sum(first <= layer for first in firsts) - 1 for layer in layers}
            return {layer: 1 - max(1 - rule.rate - rule.growth * stage_of[layer] / max(stages - 1, 1), 0) * fading for layer in layers}
        if rule.name == "pyramiddrop":
            return {layer: 1 - rule.keep ** (stage + 1) for stage, group in enumerate(self.stages.values()) for layer in group}
        if rule.name == "aim":
            end = rule.last_layer(self.num_layers)
            return {layer: min((layer - self.k + 1) / (end - self.k + 1), 1.0) for layer in layers}
        if rule.name == "sparsevlm":
            return {layer: 1 - share for share, group in zip(rule.shares, self.stages.values(), strict=False) for layer in group}
        if rule.name == "none":
            rate = 0.0
        elif rule.name == "vtw":
            rate = 1.0
        elif rule.name == "schedule":
            counts = [count for first, count in rule.kept if first <= step]
            rate = 1.0 - min(counts[-1], n) / n if counts else 0.0
        elif rule.name in ("dyrate", "layerwise"):
            if rule.weight is None:
                index = closed_form_index(total, state.first_mass, rule.buckets)
            else:
                assert rule.bias is not None
                index = int((rule.weight.double() @ mass.flatten() + rule.bias.double()).argmax())
            rate = rate_values(rule.rates, rule.buckets)[index]
        else:
            rate = rule.rate
        return dict.fromkeys(layers, rate)

    def _mass(self, b: int, turn: Turn, row: Tensor, visual: Sequence[int]) -> Tensor:
        types = torch.full((row.shape[-1],), INSTRUCTION)
        types[: visual[0]] = SYSTEM
        types[turn.end :] = RESPONSE
        for before, after in itertools.pairwise(self.turns[: self.turns.index(turn) + 1]):
            types[before.end : after.start] = RESPONSE  # what was generated in an earlier turn
        types[list(visual)] = IMAGE
        return torch.stack([row[:, types == kind].sum(-1) for kind in range(4)], dim=-1)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    oracle: Oracle = module.oracle
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).float(), value.repeat_interleave(groups, 1).float()
    scores = query.float() @ key.transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
    assert attention_mask is not None  # the model's own: causal, sliding windows, prompts that are read in both directions
    allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    allowed = allowed.expand(batch, 1, length, length) & oracle.real[:, None, None, :]
    if module.layer_idx in oracle.hidden:
        allowed = allowed & ~oracle.hidden[module.layer_idx][:, None]
    scores = scores.masked_fill(~allowed, -math.inf)
    probabilities = torch.softmax(scores, -1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)  # rows of padding read nothing
    if module.layer_idx in oracle.stages:
        oracle.decide(probabilities, module.layer_idx)
    return (probabilities @ value).to(query.dtype).transpose(1, 2).contiguous(), None
