"""Reducers in CLIP and SigLIP towers: one pass through tower and projector, watched by hooks for what the reducers ask for.

The hooks are on the model while any pass is watched; each asks for the run of its own thread, so that passes of other threads, reduced
or not, are none of its business.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from dyrate_kernels import ops
from dyrate_kernels.families import TOWERS, names
from dyrate_kernels.patching.modules import Projecting, TowerAttention, TowerLayer
from dyrate_kernels.patching.overrides import Override
from dyrate_kernels.patching.reducing import Layout, Run
from dyrate_kernels.vision.base import (
    ATTENTION,
    ATTENTION_FIRST,
    KEYS,
    WHOLE_ATTENTION,
    WHOLE_KEYS,
    Crop,
    Reducer,
    TowerFeatures,
    TowerMerger,
    Visual,
)
from dyrate_kernels.vision.tome import Merging

_ROWS = 128  # query rows at a time where a tower without [CLS] is asked for the attention of all


def reads(model: Any) -> bool:
    """Returns whether reducers can watch this model's tower."""
    return model.config.model_type in names(lambda family: family.tower) and model.config.vision_config.model_type in TOWERS


class TowerRun(Run):
    """One pass through the tower and the projector, watched.

    Args:
        kind: ``image`` or ``video``.

    Attributes:
        projected: ``[C, T', d]``, what came out of the projector: there once the pass is through.
    """

    projected: Tensor

    def __init__(self, model: Any, kind: str, reducers: Sequence[Reducer], backend: str) -> None:
        super().__init__(model, kind, reducers, backend)
        name = {"image": "image_tower", "video": "video_tower"}[kind] if hasattr(self.base, "image_tower") else "vision_tower"
        self.tower = getattr(self.base, name)
        self.layers = _encoder_layers(self.tower)
        config = self.tower.config
        self.grid = config.image_size // config.patch_size
        self.has_cls = TOWERS[config.model_type].has_cls
        self.needs = {need for reducer in reducers for need in reducer.needs}
        self.watched: set[int] = set()  # the layers whose attention's input is wanted
        self.seen: dict[int, Tensor] = {}  # that input
        self.cls: Tensor | None = None
        self.packed: tuple[Any, ...] | None = None  # arguments of the model's own packing
        self.pooling: Callable | None = None
        self.merged: Any = None
        self.merging: Merging | None = None
        self.plan: Sequence[int] = ()
        self.offset = 0  # rows in front of a crop's patches
        self.scores: dict[str, Tensor] = {}  # by name, [C, T]
        self.frames = 0

    # -- watching

    def encode(self, encoder: Callable, fields: dict[str, Any], pixels: Tensor) -> Any:
        """With everything in place that the reducers need."""
        chosen: Any = fields.get("vision_feature_layer")
        if chosen is None:
            config = self.model.config
            chosen = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
        depth = len(self.layers)
        chosen = max(index if index >= 0 else index + depth + 1 for index in ([chosen] if isinstance(chosen, int) else chosen))
        self.making, self.reading = max(chosen - 1, 0), min(chosen, depth - 1)
        if self.kind == "video":
            self.frames = pixels.shape[1]
        self.watched = self._watched_layers()
        with watched(self.base):
            token = _RUN.set(self)
            try:
                return encoder(**fields, return_dict=True)
            finally:
                _RUN.reset(token)

    def _watched_layers(self) -> set[int]:
        found = set()
        if self.needs & {ATTENTION, KEYS}:
            found.add(self.making)
        if ATTENTION_FIRST in self.needs:
            found.add(0)
        if self.needs & {WHOLE_ATTENTION, WHOLE_KEYS}:
            found.add(self.reading)
        return found

    def see(self, layer: int, hidden: Tensor) -> None:
        """``[C, T, E]``, what goes into the attention of a layer."""
        if layer in self.watched:
            self.seen[layer] = hidden

    def see_output(self, layer: int, hidden: Tensor) -> None:
        """``[C, T, E]``, what comes out of a layer."""
        if layer == self.making:
            self.cls = hidden[:, 0] if self.has_cls else None

    def pack(self, original: Callable, features: Any, sizes: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's ``pack_image_features``."""
        self.packed = (original, [len(item) for item in features], sizes, args, kwargs)
        return original(features, sizes, *args, **kwargs)

    def before_projector(self, features: Tensor) -> Tensor | None:
        """``[C, T, E]``, what goes into the projector. Returns what goes there instead, or None."""
        patches = self.grid**2
        self.offset = features.shape[1] - patches
        if self.offset not in (0, 1) or (self.offset == 1 and not self.has_cls):
            raise ValueError(
                f"vision reducers expect {patches} patches of each crop, with or without [CLS], got {features.shape[1]} rows; "
                "check vision_feature_select_strategy"
            )
        self._score()
        first = self.reducers[0]
        if isinstance(first, TowerMerger):
            among = self.offset == 1
            found = first.merge(TowerFeatures(features[:, self.offset :], None if among else self._cls_like(features), self.scores))
            self.merged = found
            return torch.cat([features[:, : self.offset], found.features], dim=1)
        return None

    def _cls_like(self, features: Tensor) -> Tensor | None:
        """[CLS] of the same layers as the features; None where features of several layers are joined, of which one alone is at hand."""
        return self.cls if self.cls is not None and self.cls.shape[-1] == features.shape[-1] else None

    def _score(self) -> None:
        """Works out what the reducers asked for, without an attention matrix where there is a [CLS]."""
        skip = int(self.has_cls)
        for name, layer, whole in ((ATTENTION, self.making, False), (ATTENTION_FIRST, 0, False), (WHOLE_ATTENTION, self.reading, True)):
            if name in self.needs:
                module = self.layers[layer].self_attn
                self.scores[name] = attention_received(module, self.seen[layer], self.has_cls, self.backend, whole)[:, skip:]
        if KEYS in self.needs:
            module = self.layers[self.making].self_attn
            self.scores[KEYS] = _heads(module.k_proj(self.seen[self.making]), module.num_heads).mean(1)[:, skip:]
        if WHOLE_KEYS in self.needs:
            self.scores[WHOLE_KEYS] = self.layers[self.reading].self_attn.k_proj(self.seen[self.reading])[:, skip:]

    @property
    def merges_in_tower(self) -> bool:
        """The layers work on merged tokens."""
        return self.reducers[0].in_layers

    def layer_forward(
        self, index: int, layer: TowerLayer, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """In place of a layer's own where ``merges_in_tower``: from outside it takes and gives one row for each original token."""
        if index == 0:
            crops, tokens, _ = hidden_states.shape
            self.plan = self.reducers[0].plan(self.grid**2, self.making + 1)
            self.merging = Merging(crops, tokens, int(self.has_cls), hidden_states.device)
        merging, r = self.merging, self.plan[index] if index < len(self.plan) else 0
        assert merging is not None  # since layer 0
        where = merging.first.to(hidden_states.device)[..., None].expand(-1, -1, hidden_states.shape[2])
        hidden = hidden_states.gather(1, where)
        normed = layer.layer_norm1(hidden)
        attended, _ = layer.self_attn(hidden_states=normed, attention_mask=merging.bias(hidden.dtype), **kwargs)
        hidden = hidden + attended
        if r:
            keys = _heads(layer.self_attn.k_proj(normed), layer.self_attn.num_heads).mean(1)
            hidden = merging.merge(hidden, keys, r)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return hidden.gather(1, merging.source[..., None].expand(-1, -1, hidden.shape[2]))

    # -- reducing

    def from_tower(self, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Returns which rows merging in the tower left, and their order."""
        visual = layout.visual
        inside = visual.patch
        merging = self.merging
        if merging is None and self.merged is None:
            return torch.ones_like(inside), None
        if not layout.exact:
            raise ValueError(
                f"reducer {self.reducers[0].name!r} merges in the tower, but {self.model.config.model_type} interpolates this "
                f"{self.kind}'s patches afterwards; use aim, divprune or a reducer that selects"
            )
        crop, patch = layout.first + visual.crop[inside], layout.patch[inside]
        keep, order = torch.ones_like(inside), None
        if self.merged is not None:
            chosen, marks = self.merged.keep, self.merged.order
        else:
            assert merging is not None
            chosen = torch.zeros(merging.source.shape, dtype=torch.bool, device=merging.first.device)
            chosen, marks = chosen.scatter(1, merging.first, True)[:, int(self.has_cls) :], None
        keep[inside] = chosen.to(keep.device)[crop, patch]
        if marks is not None:
            rank = torch.zeros(len(keep), dtype=torch.int64, device=keep.device)
            rank[inside] = 2 * marks.to(keep.device)[crop, patch].sign()
            if not visual.video:
                rank = torch.where((visual.segment == 1) & (rank < 0), 1, rank)
            part = torch.where(visual.segment < 0, visual.segment.max() + 1, visual.segment)
            order = part * 5 + rank
        return keep, order

    def whole_crop(self, layout: Layout, index: int) -> Crop:
        """With what the reducers asked the tower for."""
        patch = torch.arange(self.grid**2, device=layout.patch.device)
        scores = {name: score[layout.first + index].to(patch.device) for name, score in self.scores.items() if score.dim() == 2}
        return Crop(scores, patch // self.grid, patch % self.grid, self.grid, self.grid)

    # -- where rows come from

    def layouts(self, output: Any) -> list[Layout]:
        """One for each picture or video."""
        if self.packed is not None:
            return self._packed_layouts(self.packed, output.pooler_output)
        if self.pooling is not None:
            return self._pooled_layouts(self.pooling, output.pooler_output)
        per_crop = self.projected.shape[1]
        values = output.pooler_output
        values = values if isinstance(values, Tensor) else torch.stack(list(values))
        crops = max(self.frames, 1)
        index = torch.arange(crops * per_crop, device=values.device)
        found = []
        for number, item in enumerate(values.reshape(-1, crops * per_crop, values.shape[-1])):
            crop, patch = index // per_crop, index % per_crop - self.offset
            special = patch < 0
            y, x = torch.where(special, -1, patch // self.grid), torch.where(special, -1, patch % self.grid)
            visual = Visual(item, crop, y, x, crop, self.kind == "video")
            found.append(self._layout(visual, torch.where(special, -1, patch), None, number * crops))
        return found

    def _layout(self, visual: Visual, patch: Tensor, tiles: tuple[int, int] | None, first: int) -> Layout:
        """One whose rows are patches, unmixed."""
        scores = {}
        for name, score in self.scores.items():
            if score.dim() == 2:
                found = score.to(patch.device)[first + visual.crop.clamp(min=0), patch.clamp(min=0)]
                scores[name] = torch.where(patch < 0, torch.nan, found)
        return Layout(visual, patch, scores, True, tiles, first)

    def _channels(self, crops: int, first: int) -> tuple[Tensor, list[str]]:
        """``[crops, T', c]``: what goes through the model's own packing in place of features, and the names of the scores in it."""
        per_crop = self.projected.shape[1]
        device = self.projected.device
        index = torch.arange(crops * per_crop, device=device, dtype=torch.float32)
        names = [name for name, score in self.scores.items() if score.dim() == 2]
        columns = [index, (index * 7919) % 10007]  # interpolated rows cannot have both right
        for name in names:
            score = self.scores[name][first : first + crops].float().to(device)
            columns.append(torch.cat([score.new_zeros(crops, self.offset), score], dim=1).flatten())
        crop = torch.nn.functional.one_hot(torch.arange(crops, device=device), crops).float().repeat_interleave(per_crop, 0)
        return torch.cat([torch.stack(columns, dim=1), crop], dim=1).view(crops, per_crop, -1), names

    def _packed_layouts(self, packing: tuple[Any, ...], pooled: Sequence[Tensor]) -> list[Layout]:
        original, counts, sizes, args, options = packing
        config, found, first = self.model.config, [], 0
        per_crop = self.projected.shape[1]
        grid_shape = sys.modules[type(self.base).__module__].get_anyres_image_grid_shape
        for number, crops in enumerate(counts):
            channels, names = self._channels(crops, first)
            newline = torch.full((channels.shape[2],), torch.nan, device=channels.device)
            packed = original([channels], sizes[number : number + 1], *args, **{**options, "image_newline": newline})[0][0]
            tiles = None
            if crops > 1:
                down, across = grid_shape(sizes[number], config.image_grid_pinpoints, config.vision_config.image_size)
                tiles = int(down), int(across)
            is_newline = packed[:, 0].isnan()
            index = packed[:, 0].nan_to_num(0.0).round().long().clamp(0, crops * per_crop - 1)
            flat = channels.flatten(0, 1)
            exact = bool((is_newline | ((packed[:, 0] == flat[index, 0]) & (packed[:, 1] == flat[index, 1]))).all())
            layout = self._packed_one(pooled[number], packed, is_newline, index, tiles, first, exact)
            if not exact:
                layout.scores = {name: packed[:, 2 + channel] for channel, name in enumerate(names)}
            found.append(layout)
            first += crops
        return found

    def _packed_one(
        self, values: Tensor, packed: Tensor, is_newline: Tensor, index: Tensor, tiles: tuple[int, int] | None, first: int, exact: bool
    ) -> Layout:  # fmt: skip
        per_crop, side = self.projected.shape[1], self.grid
        token = torch.arange(len(index), device=index.device)
        base = token < per_crop
        crops = 1 if tiles is None else tiles[0] * tiles[1] + 1
        if exact:
            crop, patch = index // per_crop, index % per_crop - self.offset
        else:
            crop = torch.where(base, 0, packed[:, -crops:].nan_to_num(0.0).argmax(1))
            patch = torch.where(base, token - self.offset, 0)
        y, x = patch // side, patch % side
        segment = torch.where(base, 0, 1)
        # the joined grid of the tiles, line by line: each ends with a newline
        line = torch.where(is_newline & ~base, 1, 0).cumsum(0) - torch.where(is_newline, 1, 0)
        starts = torch.where(is_newline, token + 1, per_crop).cummax(0).values
        starts = torch.cat([starts.new_full((1,), per_crop), starts[:-1]])
        if tiles is not None:
            y, x = torch.where(base, y, line), torch.where(base, x, token - starts)
        y = torch.where(is_newline, line if tiles is not None else -1, y)
        special = is_newline | (base & (patch < 0))
        x = torch.where(special, -1, x)
        segment = torch.where(is_newline & (tiles is None), -1, segment)
        crop = torch.where(is_newline, -1, crop)
        patch = torch.where(special, -1, patch)
        visual = Visual(values, crop, torch.where(base & special, -1, y), x, segment, False)
        layout = self._layout(visual, patch, tiles, first)
        layout.exact = exact
        return layout

    def _pooled_layouts(self, pooling: Callable, pooled: Tensor) -> list[Layout]:
        """OneVision's videos: every frame is interpolated to half its side; in newer versions of transformers a newline follows."""
        videos, frames = pooled.shape[0], self.frames
        found = []
        for number in range(videos):
            channels, names = self._channels(frames, number * frames)
            small = pooling(channels)
            each = small.shape[1]
            side = round(each**0.5)
            values = pooled[number]
            extra = values.shape[0] - frames * each
            token = torch.arange(frames * each, device=values.device)
            tail = token.new_full((extra,), -1)
            crop = torch.cat([token // each, tail])
            y, x = torch.cat([token % each // side, tail]), torch.cat([token % each % side, tail])
            visual = Visual(values, crop, y, x, crop, True)
            flat = small.flatten(0, 1)
            nan = flat.new_full((extra,), torch.nan)
            scores = {name: torch.cat([flat[:, 2 + channel], nan]) for channel, name in enumerate(names)}
            found.append(Layout(visual, torch.where(crop < 0, -1, 0), scores, False, None, number * frames, tail=1 - extra))
        return found


def _encoder_layers(tower: Any) -> Sequence[TowerLayer]:
    encoder = getattr(tower, "encoder", None)
    return cast(Sequence[TowerLayer], tower.vision_model.encoder.layers if encoder is None else encoder.layers)


def _heads(states: Tensor, heads: int) -> Tensor:
    """``[C, T, E]`` -> ``[C, heads, T, E / heads]``."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_received(module: TowerAttention, hidden: Tensor, has_cls: bool, backend: str, whole: bool = False) -> Tensor:
    """float ``[C, T]``: the attention that each token receives in a tower's layer, mean over heads.

    From [CLS] it is one query row a crop, which ``ops.decode_attention`` answers: no attention matrix is made. Without one it is the mean
    over all rows, a block of them at a time.

    Args:
        module: the layer's attention; hidden ``[C, T, E]``, what goes into it.
        whole: all heads taken as one (PruMerge).
    """
    heads = 1 if whole else module.num_heads
    key = _heads(module.k_proj(hidden), heads)
    query = _heads(module.q_proj(hidden[:, :1] if has_cls else hidden), heads)
    crops, _, tokens, width = key.shape
    scale = width**-0.5
    if has_cls and not whole:
        count = torch.full((crops,), tokens, dtype=torch.int32, device=key.device)
        key = key.contiguous()
        found = ops.decode_attention(
            query[:, :, 0].contiguous(), key, key, count, torch.zeros_like(count), visual_capacity=tokens, scale=scale, importance=True,
            visual_bound=tokens, clean=True, backend=backend,
        )  # fmt: skip
        assert found.importance is not None  # asked for
        return found.importance
    total = key.new_zeros(crops, tokens, dtype=torch.float32)
    for start in range(0, query.shape[2], _ROWS):
        logits = query[:, :, start : start + _ROWS].float() @ key.float().transpose(-1, -2) * scale
        total += logits.softmax(-1).mean(1).sum(1)
    return total / query.shape[2]


# ---- watching ------------------------------------------------------------------------------------------------------------------------

_RUN: ContextVar[TowerRun | None] = ContextVar("dyrate_tower_run", default=None)  # the run under way in this thread
_WATCH = "_dyrate_tower_watch"  # attribute of a base model: its ``_Watch``, while there is one
_LOCK = threading.Lock()


@contextlib.contextmanager
def watched(base: Projecting) -> Iterator[None]:
    """Within: the towers of ``base`` tell the run of their thread what passes through them. Threads may enter at the same time."""
    with _LOCK:
        watch = vars(base).setdefault(_WATCH, None) or _Watch(base)
        vars(base)[_WATCH] = watch
        watch.users += 1
    try:
        yield
    finally:
        with _LOCK:
            watch.users -= 1
            if not watch.users:
                watch.remove()
                vars(base).pop(_WATCH, None)


class _Watch:
    """Hooks and overrides of one model; ``users`` counts who needs them."""

    def __init__(self, base: Projecting) -> None:
        self.base, self.users = base, 0
        projector = base.multi_modal_projector
        self.hooks = [
            projector.register_forward_pre_hook(self._before_projector),
            projector.register_forward_hook(self._after_projector),
        ]
        self.overrides = []
        for name, answer in (("pack_image_features", "pack"), ("apply_pooling", "pool")):
            if hasattr(base, name):
                self.overrides.append(Override(base, name, self, answer))
        for name in ("vision_tower", "image_tower", "video_tower"):
            tower = getattr(base, name, None)
            if tower is None:
                continue
            for index, layer in enumerate(_encoder_layers(tower)):
                watch = _LayerWatch(tower, index, layer)
                self.hooks.append(layer.self_attn.register_forward_pre_hook(watch.see, with_kwargs=True))
                self.hooks.append(layer.register_forward_hook(watch.see_output))
                self.overrides.append(Override(layer, "forward", watch, "forward"))

    def remove(self) -> None:
        """Everything is as it was."""
        for hook in self.hooks:
            hook.remove()
        for override in self.overrides:
            override.remove()

    def _run(self) -> TowerRun | None:
        run = _RUN.get()
        return run if run is not None and run.base is self.base else None

    def _before_projector(self, module: nn.Module, args: tuple) -> tuple | None:
        run = self._run()
        instead = None if run is None else run.before_projector(args[0])
        return None if instead is None else (instead, *args[1:])

    def _after_projector(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        run = self._run()
        if run is not None:
            run.projected = output

    def pack(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Answers ``pack_image_features``, whose first two arguments come by position or by name."""
        run = self._run()
        if run is None:
            return original(*args, **kwargs)
        given = [*args]
        for index, name in enumerate(("image_features", "image_sizes")):
            if name in kwargs:
                given.insert(index, kwargs.pop(name))
        return run.pack(original, *given, **kwargs)

    def pool(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Answers ``apply_pooling``."""
        run = self._run()
        if run is not None:
            run.pooling = original
        return original(*args, **kwargs)


class _LayerWatch:
    """One layer of a tower."""

    def __init__(self, tower: nn.Module, index: int, layer: TowerLayer) -> None:
        self.tower, self.index, self.layer = tower, index, layer

    def _run(self) -> TowerRun | None:
        run = _RUN.get()
        return run if run is not None and run.tower is self.tower else None

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Hook before the layer's attention."""
        run = self._run()
        if run is not None:
            run.see(self.index, args[0] if args else kwargs["hidden_states"])

    def see_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook after the layer."""
        run = self._run()
        if run is not None:
            run.see_output(self.index, output[0] if isinstance(output, tuple) else output)

    def forward(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Answers the layer's ``forward``."""
        run = self._run()
        if run is None or not run.merges_in_tower:
            return original(*args, **kwargs)
        return run.layer_forward(self.index, self.layer, *args, **kwargs)
