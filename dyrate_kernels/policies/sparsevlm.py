"""SparseVLM (arXiv 2410.04417): words of the question that fit the picture rate the visual tokens, at several depths; some of the tokens
that go are merged into a few that stay.

Facts from the paper (sections 3.2 to 3.4) and the authors' code, version 1 of it. What they call SparseVLM+ (a correction of the attention
by its positional part, half of the heads, no merging) is another method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels import ops
from dyrate_kernels.policies.base import (
    Decision,
    ModelShape,
    Policy,
    View,
    bound_for_rate,
    check_fraction,
    check_k,
    check_k_range,
    constant_rate,
)

_ROWS = 128  # visual rows at a time where their similarity to every text token is materialised
_FIRST, _LAYERS = (3, 7, 16), 32  # first layers of the stages, of the model they were chosen for

# ``keep`` of the published budgets: how many of 576 tokens stay in each stage, by their mean over all layers
PUBLISHED: dict[int, tuple[float, float, float]] = {
    mean: (a / 576, b / 576, c / 576)
    for mean, (a, b, c) in {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}.items()
}


@dataclass(frozen=True)
class SparseVLM(Policy):
    """Decided once, at prefill, stage by stage:

    - *Raters* (3.2): the text tokens after the picture whose relevance exceeds its mean over them. Relevance is the softmax over text
      tokens of visual x text embeddings (what enters layer 0), mean over visual tokens. Chosen once a prompt. Without any, the last row
      rates [choice]. With several pictures: the text after the first; a later turn of a chat: its own text and pictures [choice].
    - *Rating* (3.2): attention of the raters' rows, mean over heads and raters, in the layer before each stage. The code scores layers
      2, 6 and 15 of 32 and prunes their output, so the stages begin at 3, 7 and 16; other depths scale these [choice].
    - *How many stay* (3.3): fixed shares, as in the code. The paper derives them from the rank of the attention matrix.
    - *Recycling* (3.4; only under retention ``evict``): of the tokens that go, the best rated share ``recycle`` is clustered by density
      peaks with nearest neighbours, and a share ``clusters`` of those, at least one, are centres. (The code adds one to both numbers.) A
      centre stays, as the mean of its cluster, as in the code. Its position is its own; the code puts merged tokens behind the others and
      renumbers all [choice]. What is averaged is the output of the layer that rates, as in the code; distances are taken between what
      enters its attention, where the code takes them between outputs, too [choice].

    Centres are part of a stage's count, at most half of it, so that ``recycle`` does not change the cost [choice]; the code adds them.
    Neighbours are as many as centres, the token itself among them, as in the code, but at least two, since all densities would be equal
    with one [choice]. Ties go to the smaller index, where the code adds noise [choice].

    Attributes:
        k: first pruned layer; None: 3 of 32, scaled.
        keep: share of the visual tokens that stay in each stage, merged ones included, never rising. ``PUBLISHED`` has those of the code;
            the default is its 192 of 576.
        layers: first layer of each stage; None: as published, scaled to the layers from k on (then ``keep`` has three entries). Stages for
            which the model has no layer fall away.
        recycle: share of the dropped that is recycled; 0: none.
        clusters: share of the recycled that stays, as centres.
        num_layers: L, filled by ``bind``.
    """

    k: int | None = None  # type: ignore[assignment]  # an int once bound
    keep: Sequence[float] = PUBLISHED[192]
    layers: Sequence[int] | None = None
    recycle: float = 0.3
    clusters: float = 0.1
    num_layers: int | None = field(default=None, repr=False, metadata={"bound": True})

    name: ClassVar[str] = "sparsevlm"
    at_decode: ClassVar[bool] = False
    constant: ClassVar[bool] = True
    rescores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k is not None:
            check_k(self.k)
        keep = _as_tuple("keep", self.keep, "the share of the visual tokens that stays in each stage, e.g. [0.5, 0.35, 0.2]")
        for share in keep:
            check_fraction("keep", share, "the share of the visual tokens that stays in a stage")
        if not keep or any(later > earlier for earlier, later in zip(keep, keep[1:], strict=False)):
            raise ValueError(f"keep must have one share a stage, none higher than the one before it, got {list(keep)}")
        object.__setattr__(self, "keep", tuple(float(share) for share in keep))
        for name, meaning in (("recycle", "the share of the dropped tokens"), ("clusters", "the share of the recycled tokens that stays")):
            check_fraction(name, getattr(self, name), meaning)
        if self.layers is None:
            if len(keep) != len(_FIRST):
                raise ValueError(f"keep must have {len(_FIRST)} shares, got {len(keep)}; for another number of stages give layers too")
            return
        layers = _as_tuple("layers", self.layers, "the first layer of each stage, e.g. [3, 7, 16]")
        if any(isinstance(layer, bool) or not isinstance(layer, Integral) for layer in layers):
            raise TypeError(f"layers must be integers (the first layer of each stage), got {list(layers)}")
        if len(layers) != len(keep) or layers[0] < 1 or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be {len(keep)} ascending layers from 1 on, one for each share of keep, got {list(layers)}")
        if self.k is not None and self.k != layers[0]:
            raise ValueError(f"k must be the first of layers, {layers[0]}, or None, got {self.k}")
        object.__setattr__(self, "layers", layers)

    def bind(self, shape: ModelShape) -> Self:
        first = self._first(shape.num_layers)
        bound = replace(self, k=first, num_layers=shape.num_layers)
        check_k_range(first, shape.num_layers)
        if self.layers is not None and self.layers[-1] >= shape.num_layers:
            last = shape.num_layers - 1
            raise ValueError(f"layers must be in [1, {last}] for a model of {shape.num_layers} layers, got {list(self.layers)}")
        return bound

    def at_strength(self, strength: float, num_layers: int) -> Self:
        """``keep ** (s / (1 - s))``: what it was set to at one half, everything at 0, nothing at 1."""
        check_fraction("strength", strength, "how much to prune")
        power = strength / (1.0 - strength) if strength < 1 else float("inf")
        return replace(self, keep=tuple(0.0 if strength == 1 else share**power for share in self.keep))

    def layer_groups(self, num_layers: int) -> list[int]:
        if self.layers is not None:
            return list(self.layers)
        first = self._first(num_layers)
        starts: list[int] = []
        for published in _FIRST:
            start = first + (num_layers - first) * (published - _FIRST[0]) // (_LAYERS - _FIRST[0])
            starts.append(max(start, starts[-1] + 1) if starts else start)
        return [start for start in starts if start < num_layers] or [first]

    def _first(self, num_layers: int) -> int:
        if self.layers is not None:
            return self.layers[0]
        return max(num_layers * _FIRST[0] // _LAYERS, 1) if self.k is None else self.k

    @property
    def query_rows(self) -> Literal["raters"]:
        return "raters"

    @property
    def drops(self) -> bool:
        return min(self.keep) < 1

    @property
    def merges(self) -> bool:
        return self.drops and self.recycle > 0 and 0 < self.clusters < 1

    def kept_bound(self, n_visual: int) -> int:
        return bound_for_rate(n_visual, 1.0 - self.keep[0])

    def raters(self, hidden: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        hidden = hidden.float()
        relevance = hidden.new_zeros(text.shape)
        for start in range(0, hidden.shape[1], _ROWS):
            block = slice(start, start + _ROWS)
            logits = (hidden[:, block] @ hidden.mT).masked_fill(~text[:, None], torch.finfo(hidden.dtype).min)
            relevance += (logits.softmax(-1) * visual[:, block, None]).sum(1)
        relevance = torch.where(text, relevance / visual.sum(1, keepdim=True).clamp(min=1), 0.0)
        return text & (relevance > relevance.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1))

    def decide(self, view: View) -> Decision:
        rate = constant_rate(1.0 - self.keep[view.group], view.n_visual)
        count = ops.keep_count(view.n_visual, rate)
        if view.visual is None or not self.merges:
            return Decision(rate, count)
        return Decision(rate, count, *self._recycled(view, count))

    def _recycled(self, view: View, count: Tensor) -> tuple[Tensor, Tensor]:
        """Score and merge of a decision that keeps ``count``."""
        visual, mergeable = view.visual, view.mergeable
        assert visual is not None and mergeable is not None
        batch, tokens = view.importance.shape
        index = torch.arange(tokens, device=count.device).expand(batch, -1)
        alive = index < view.n_visual[:, None]
        if view.alive is not None:
            alive = alive & view.alive
        able = alive.sum(1)
        count = torch.minimum(count, able)
        recycled = ((able - count) * self.recycle + 1e-6).long()
        centres = torch.minimum((recycled * self.clusters - 1e-6).ceil().long().clamp(min=0), count // 2)
        score = torch.where(alive, view.importance.float().nan_to_num(0.0), -1.0)
        selected = _rank(score) < (count - centres)[:, None]
        pool = alive & ~selected & mergeable
        chosen = pool & (_rank(torch.where(pool, score, -2.0)) < recycled[:, None])
        # the recycled tokens side by side, ascending
        width = min(int(tokens * self.recycle + 1e-6) + 1, tokens)
        target = torch.where(chosen, chosen.cumsum(1) - 1, width)
        member = index.new_zeros(batch, width + 1).scatter_(1, target, index)[:, :-1]
        real = torch.arange(width, device=count.device) < chosen.sum(1, keepdim=True)
        states = visual.gather(1, member[:, :, None].expand(-1, -1, visual.shape[2]))
        most = max(-int(-width * self.clusters // 1), 1)
        nearest, peak = density_peaks(states, real, torch.minimum(centres, real.sum(1)), most)
        centre = member.gather(1, nearest)
        spare = torch.full((batch, tokens + 1), -1, dtype=torch.int64, device=count.device)
        merge = spare.scatter_(1, torch.where(real & (centres > 0)[:, None], member, tokens), centre)[:, :-1]
        mark = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=count.device)
        mark.scatter_(1, torch.where(peak, member, tokens), True)
        score = torch.where(selected | mark[:, :-1], 2.0, score)  # above every attention weight
        kept = _rank(score) < count[:, None]
        return score, torch.where(kept, index, merge)


def density_peaks(states: Tensor, real: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Clusters by density peaks with nearest neighbours (DPC-KNN). Tensor operations only; ties go to the smaller index.

    A token's density is ``exp(-mean squared distance)`` to its ``max(count, 2)`` nearest tokens, itself among them; distances are divided
    by the square root of d. The centres are the ``count`` tokens of highest density times distance to the nearest denser token.

    Args:
        states: ``[B, R, d]``.
        real: bool ``[B, R]``, which of them are tokens.
        count: int64 ``[B]``, centres, at most as many as there are tokens.
        most: no entry of ``count`` is higher.

    Returns:
        int64 ``[B, R]``, the nearest centre of each token (itself for centres), and bool ``[B, R]``, which are centres.
    """
    size, far = states.shape[1], float("inf")
    states = states.float()
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / states.shape[2] ** 0.5
    pair = real[:, None] & real[:, :, None]
    neighbours = torch.minimum(count.clamp(min=2), real.sum(1).clamp(min=1))
    near = distance.masked_fill(~pair, far).topk(min(max(most, 2), size), largest=False).values.square().cumsum(-1)
    spread = near.gather(2, (neighbours - 1)[:, None, None].expand(-1, size, 1))[:, :, 0] / neighbours[:, None]
    spread = spread.masked_fill(~real, far)
    earlier = torch.ones(size, size, dtype=torch.bool, device=states.device).tril(-1)
    denser = (spread[:, None] < spread[:, :, None]) | ((spread[:, None] == spread[:, :, None]) & earlier)
    widest = distance.masked_fill(~pair, 0.0).amax((1, 2))[:, None]
    apart = torch.minimum(distance.masked_fill(~(denser & pair), far).amin(2), widest)
    peak = real & (_rank(torch.where(real, apart * (-spread).exp(), -1.0)) < count[:, None])
    nearest = distance.masked_fill(~peak[:, None], far).argmin(2)
    return torch.where(peak, torch.arange(size, device=states.device), nearest), peak


def _rank(score: Tensor) -> Tensor:
    """int64, the place of each entry of ``[B, N]`` from the highest down; ties to the smaller index."""
    order = score.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(score.shape[1], device=score.device).expand_as(order))


def _as_tuple(name: str, value: object, meaning: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list ({meaning}), got {value!r}")
    return tuple(value)
