"""Reducers in CLIP and SigLIP towers: one pass through tower and projector, watched by hooks for what the reducers ask for."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyrate_kernels import ops
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
from dyrate_kernels.vision.tome import Merging, ToMe

FAMILIES = ("llava", "llava_next", "llava_onevision", "paligemma", "video_llava", "vipllava")
TOWERS = ("clip_vision_model", "siglip_vision_model")
_ROWS = 128  # query rows at a time where a tower without [CLS] is asked for the attention of all


def reads(model: Any) -> bool:
    """Whether reducers can watch this model's tower."""
    return model.config.model_type in FAMILIES and model.config.vision_config.model_type in TOWERS


class TowerRun(Run):
    """One pass through the tower and the projector, watched.

    Args:
        kind: ``image`` or ``video``.
    """

    def __init__(self, model: Any, kind: str, reducers: Sequence[Reducer], backend: str) -> None:
        super().__init__(model, kind, reducers, backend)
        name = {"image": "image_tower", "video": "video_tower"}[kind] if hasattr(self.base, "image_tower") else "vision_tower"
        self.tower = getattr(self.base, name)
        self.layers = _encoder_layers(self.tower)
        config = self.tower.config
        self.grid = config.image_size // config.patch_size
        self.has_cls = config.model_type == "clip_vision_model"
        self.needs = {need for reducer in reducers for need in reducer.needs}
        self.seen: dict[int, Tensor] = {}  # what goes into the attention of these layers
        self.cls: Tensor | None = None
        self.projected: Tensor | None = None
        self.packed: tuple[Any, ...] | None = None  # arguments of the model's own packing
        self.pooling: Callable | None = None
        self.merged: Any = None
        self.merging: Merging | None = None
        self.offset = 0  # rows in front of a crop's patches
        self.scores: dict[str, Tensor] = {}  # by name, [C, T]
        self.frames = 0

    # -- watching

    def encode(self, encoder: Callable, fields: dict[str, Any], pixels: Tensor) -> Any:
        """With everything in place that the reducers need."""
        chosen = fields.get("vision_feature_layer")
        if chosen is None:
            config = self.model.config
            chosen = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
        depth = len(self.layers)
        chosen = max(index if index >= 0 else index + depth + 1 for index in ([chosen] if isinstance(chosen, int) else chosen))
        self.making, self.reading = max(chosen - 1, 0), min(chosen, depth - 1)
        if self.kind == "video":
            self.frames = pixels.shape[1]
        with contextlib.ExitStack() as stack:
            for layer in self._watched_layers():
                self._hook(stack, self.layers[layer].self_attn.register_forward_pre_hook(self._see(layer), with_kwargs=True))
            self._hook(stack, self.layers[self.making].register_forward_hook(self._see_cls))
            projector = self.base.multi_modal_projector
            self._hook(stack, projector.register_forward_pre_hook(self._before_projector))
            self._hook(stack, projector.register_forward_hook(self._after_projector))
            for name in ("pack_image_features", "apply_pooling"):
                if hasattr(self.base, name):
                    replace_on(stack, self.base, name, self._watched_call(name, getattr(self.base, name)))
            if isinstance(self.reducers[0], ToMe):
                self._merge_in_tower(stack)
            return encoder(**fields, return_dict=True)

    def _watched_layers(self) -> set[int]:
        found = set()
        if self.needs & {ATTENTION, KEYS}:
            found.add(self.making)
        if ATTENTION_FIRST in self.needs:
            found.add(0)
        if self.needs & {WHOLE_ATTENTION, WHOLE_KEYS}:
            found.add(self.reading)
        return found

    @staticmethod
    def _hook(stack: contextlib.ExitStack, handle: Any) -> None:
        stack.callback(handle.remove)

    def _see(self, layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.seen[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _see_cls(self, module: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.cls = hidden[:, 0] if self.has_cls else None

    def _watched_call(self, name: str, original: Callable) -> Callable:
        @functools.wraps(original)
        def call(features: Any = None, *args: Any, **kwargs: Any) -> Any:
            features = kwargs.pop("image_features", features)
            if name == "pack_image_features":
                sizes = kwargs.pop("image_sizes", None)
                sizes, args = (args[0], args[1:]) if sizes is None else (sizes, args)
                self.packed = (original, [len(item) for item in features], sizes, args, kwargs)
                return original(features, sizes, *args, **kwargs)
            self.pooling = original
            return original(features, *args, **kwargs)

        return call

    def _before_projector(self, module: nn.Module, args: tuple) -> tuple | None:
        features = args[0]
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
            return (torch.cat([features[:, : self.offset], found.features], dim=1), *args[1:])
        return None

    def _cls_like(self, features: Tensor) -> Tensor | None:
        """[CLS] of the same layers as the features; None where features of several layers are joined, of which one alone is at hand."""
        return self.cls if self.cls is not None and self.cls.shape[-1] == features.shape[-1] else None

    def _after_projector(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.projected = output

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

    def _merge_in_tower(self, stack: contextlib.ExitStack) -> None:
        plan = self.reducers[0].plan(self.grid**2, self.making + 1)
        for index, layer in enumerate(self.layers):
            replace_on(stack, layer, "forward", self._merging_forward(layer, plan[index] if index < len(plan) else 0, index == 0))

    def _merging_forward(self, layer: nn.Module, r: int, first: bool) -> Callable:
        """A layer that works on merged tokens; from outside it takes and gives one row for each original token."""

        @functools.wraps(layer.forward)
        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            if first:
                crops, tokens, _ = hidden_states.shape
                self.merging = Merging(crops, tokens, int(self.has_cls), hidden_states.device)
            merging = self.merging
            index = merging.place.to(hidden_states.device)[..., None].expand(-1, -1, hidden_states.shape[2])
            hidden = hidden_states.gather(1, index)
            normed = layer.layer_norm1(hidden)
            attended, _ = layer.self_attn(hidden_states=normed, attention_mask=merging.bias(hidden.dtype), **kwargs)
            hidden = hidden + attended
            if r:
                keys = _heads(layer.self_attn.k_proj(normed), layer.self_attn.num_heads).mean(1)
                hidden = merging.merge(hidden, keys, r)
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
            return hidden.gather(1, merging.source[..., None].expand(-1, -1, hidden.shape[2]))

        return forward

    # -- reducing

    def from_tower(self, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """What merging in the tower left."""
        visual = layout.visual
        inside = visual.patch
        if self.merging is None and self.merged is None:
            return torch.ones_like(inside), None
        if not layout.exact:
            raise ValueError(
                f"reducer {self.reducers[0].name!r} merges in the tower, but {self.model.config.model_type} interpolates this "
                f"{self.kind}'s patches afterwards; use aim, divprune or a reducer that selects"
            )
        crop, patch = layout.first + visual.crop[inside], layout.patch[inside]
        keep, order = torch.ones_like(inside), None
        if self.merged is not None:
            chosen, places = self.merged.keep, self.merged.order
        else:
            skip = int(self.has_cls)
            chosen = torch.zeros(self.merging.source.shape, dtype=torch.bool, device=self.merging.place.device)
            chosen, places = chosen.scatter(1, self.merging.place, True)[:, skip:], None
        keep[inside] = chosen.to(keep.device)[crop, patch]
        if places is not None:
            rank = torch.zeros(len(keep), dtype=torch.int64, device=keep.device)
            rank[inside] = 2 * places.to(keep.device)[crop, patch].sign()
            if not visual.video:
                rank = torch.where((visual.segment == 1) & (rank < 0), 1, rank)
            part = torch.where(visual.segment < 0, visual.segment.max() + 1, visual.segment)
            order = part * 5 + rank
        return keep, order

    def whole_crop(self, layout: Layout, index: int) -> Crop:
        """With what the reducers asked the tower for."""
        place = torch.arange(self.grid**2, device=layout.patch.device)
        scores = {name: score[layout.first + index].to(place.device) for name, score in self.scores.items() if score.dim() == 2}
        return Crop(scores, place // self.grid, place % self.grid, self.grid, self.grid)

    # -- where rows come from

    def layouts(self, output: Any) -> list[Layout]:
        """One for each picture or video."""
        if self.packed is not None:
            return self._packed_layouts(output.pooler_output)
        if self.pooling is not None:
            return self._pooled_layouts(output.pooler_output)
        rows = self.projected.shape[1]
        values = output.pooler_output
        values = values if isinstance(values, Tensor) else torch.stack(list(values))
        crops = max(self.frames, 1)
        index = torch.arange(crops * rows, device=values.device)
        found = []
        for number, item in enumerate(values.reshape(-1, crops * rows, values.shape[-1])):
            crop, patch = index // rows, index % rows - self.offset
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
        rows = self.projected.shape[1]
        device = self.projected.device
        index = torch.arange(crops * rows, device=device, dtype=torch.float32)
        names = [name for name, score in self.scores.items() if score.dim() == 2]
        columns = [index, (index * 7919) % 10007]  # interpolated rows cannot have both right
        for name in names:
            score = self.scores[name][first : first + crops].float().to(device)
            columns.append(torch.cat([score.new_zeros(crops, self.offset), score], dim=1).flatten())
        crop = torch.nn.functional.one_hot(torch.arange(crops, device=device), crops).float().repeat_interleave(rows, 0)
        return torch.cat([torch.stack(columns, dim=1), crop], dim=1).view(crops, rows, -1), names

    def _packed_layouts(self, pooled: Sequence[Tensor]) -> list[Layout]:
        original, counts, sizes, args, options = self.packed
        config, found, first = self.model.config, [], 0
        rows = self.projected.shape[1]
        grid_shape = inspect.getmodule(type(self.base)).get_anyres_image_grid_shape
        for number, crops in enumerate(counts):
            channels, names = self._channels(crops, first)
            newline = torch.full((channels.shape[2],), torch.nan, device=channels.device)
            packed = original([channels], sizes[number : number + 1], *args, **{**options, "image_newline": newline})[0][0]
            tiles = None
            if crops > 1:
                tiles = tuple(int(n) for n in grid_shape(sizes[number], config.image_grid_pinpoints, config.vision_config.image_size))
            is_newline = packed[:, 0].isnan()
            index = packed[:, 0].nan_to_num(0.0).round().long().clamp(0, crops * rows - 1)
            flat = channels.flatten(0, 1)
            exact = bool((is_newline | ((packed[:, 0] == flat[index, 0]) & (packed[:, 1] == flat[index, 1]))).all())
            layout = self._packed_one(pooled[number], packed, is_newline, index, tiles, first, exact)
            if not exact:
                layout.scores = {name: packed[:, 2 + place] for place, name in enumerate(names)}
            found.append(layout)
            first += crops
        return found

    def _packed_one(
        self, values: Tensor, packed: Tensor, is_newline: Tensor, index: Tensor, tiles: tuple[int, int] | None, first: int, exact: bool
    ) -> Layout:  # fmt: skip
        rows, side = self.projected.shape[1], self.grid
        place = torch.arange(len(index), device=index.device)
        base = place < rows
        crops = 1 if tiles is None else tiles[0] * tiles[1] + 1
        if exact:
            crop, patch = index // rows, index % rows - self.offset
        else:
            crop = torch.where(base, 0, packed[:, -crops:].nan_to_num(0.0).argmax(1))
            patch = torch.where(base, place - self.offset, 0)
        y, x = patch // side, patch % side
        segment = torch.where(base, 0, 1)
        # the joined grid of the tiles, line by line: each ends with a newline
        line = torch.where(is_newline & ~base, 1, 0).cumsum(0) - torch.where(is_newline, 1, 0)
        starts = torch.where(is_newline, place + 1, rows).cummax(0).values
        starts = torch.cat([starts.new_full((1,), rows), starts[:-1]])
        if tiles is not None:
            y, x = torch.where(base, y, line), torch.where(base, x, place - starts)
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

    def _pooled_layouts(self, pooled: Tensor) -> list[Layout]:
        """OneVision's videos: every frame is interpolated to half its side; in newer versions of transformers a newline follows."""
        videos, frames = pooled.shape[0], self.frames
        found = []
        for number in range(videos):
            channels, names = self._channels(frames, number * frames)
            small = self.pooling(channels)
            each = small.shape[1]
            side = round(each**0.5)
            values = pooled[number]
            extra = values.shape[0] - frames * each
            place = torch.arange(frames * each, device=values.device)
            tail = place.new_full((extra,), -1)
            crop = torch.cat([place // each, tail])
            y, x = torch.cat([place % each // side, tail]), torch.cat([place % each % side, tail])
            visual = Visual(values, crop, y, x, crop, True)
            flat = small.flatten(0, 1)
            nan = flat.new_full((extra,), torch.nan)
            scores = {name: torch.cat([flat[:, 2 + place], nan]) for place, name in enumerate(names)}
            found.append(Layout(visual, torch.where(crop < 0, -1, 0), scores, False, None, number * frames, tail=1 - extra))
        return found


def _encoder_layers(tower: nn.Module) -> nn.ModuleList:
    encoder = getattr(tower, "encoder", None)
    return tower.vision_model.encoder.layers if encoder is None else encoder.layers


def _heads(rows: Tensor, heads: int) -> Tensor:
    """``[C, T, E]`` -> ``[C, heads, T, E / heads]``."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_received(module: nn.Module, hidden: Tensor, has_cls: bool, backend: str, whole: bool = False) -> Tensor:
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
        return found.importance
    total = key.new_zeros(crops, tokens, dtype=torch.float32)
    for start in range(0, query.shape[2], _ROWS):
        logits = query[:, :, start : start + _ROWS].float() @ key.float().transpose(-1, -2) * scale
        total += logits.softmax(-1).mean(1).sum(1)
    return total / query.shape[2]


def replace_on(stack: contextlib.ExitStack, owner: nn.Module, name: str, function: Callable) -> None:
    """Gives an instance a function of its own until ``stack`` ends; one that it had already (accelerate's) comes back then."""
    own = vars(owner)
    stack.callback(functools.partial(own.__setitem__, name, own[name]) if name in own else functools.partial(own.pop, name, None))
    own[name] = function
