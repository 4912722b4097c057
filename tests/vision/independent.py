"""Reducers once more, from docs/vision and the papers: loops over rows, nothing of ``dyrate_kernels``.

A picture is a list of rows in the language model's order; a reducer turns it into a shorter list. What the tower attended to comes from
transformers' eager attention, the place of tiles and newlines from a canvas of labels.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Row:
    """One visual token: what it holds, and where it is from."""

    value: Tensor
    crop: int = -1  # -1: a newline
    patch: int = -1  # -1: a newline, or the [CLS] of a frame
    line: int = -1  # of a newline: which line of the canvas it ends
    canvas: tuple[int, int] | None = None  # of a tile's patch: where it stands on the canvas of all tiles


@dataclass
class Facts:
    """Facts that the tower makes of the crops of one call; per crop, patches only."""

    features: Tensor  # [C, T, D], before the projector
    cls: Tensor | None
    attention: Tensor  # [C, T], head mean
    attention_first: Tensor
    keys: Tensor  # [C, T, Dh], head mean
    whole_attention: Tensor
    whole_keys: Tensor
    side: int
    grouped: list[list[list[int]]] = field(default_factory=list)  # ToMe: of each crop the patches of each token


# ---- towers ------------------------------------------------------------------------------------------------------------------------------


def _tower(model: Any, kind: str) -> Any:
    base = model.model
    return getattr(base, f"{kind}_tower") if hasattr(base, "image_tower") else base.vision_tower


def _chosen_layers(model: Any) -> list[int]:
    config = model.config
    chosen = getattr(config, "vision_feature_layer", None)
    chosen = getattr(config, "vision_feature_layers", -1) if chosen is None else chosen
    return [chosen] if isinstance(chosen, int) else list(chosen)


def _normed(model: Any, tower: Any) -> Any:
    """PaliGemma has no choice of layers: it takes the tower's output, which is normed."""
    inner = tower if hasattr(tower, "encoder") else tower.vision_model
    return inner.post_layernorm if model.config.model_type == "paligemma" else lambda hidden: hidden


@torch.no_grad()
def facts(model: Any, pixels: Tensor, kind: str = "image") -> Facts:
    """``pixels``: ``[C, 3, H, W]``."""
    tower = copy.deepcopy(_tower(model, kind))
    tower.set_attn_implementation("eager")
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    chosen = _chosen_layers(model)
    hidden = _normed(model, tower)(torch.cat([out.hidden_states[index] for index in chosen], dim=-1))
    depth = len(out.attentions)
    last = max(index % (depth + 1) for index in chosen)
    clip = tower.config.model_type == "clip_vision_model"
    layers = (tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder).layers

    def received(weights: Tensor) -> Tensor:
        return weights.mean(1)[:, 0, 1:] if clip else weights.mean(1).mean(1)

    module, entering = layers[last - 1].self_attn, layers[last - 1].layer_norm1(out.hidden_states[last - 1])
    keys = module.k_proj(entering).unflatten(-1, (module.num_heads, -1)).mean(2)
    reader = min(last, depth - 1)
    module, entering = layers[reader].self_attn, layers[reader].layer_norm1(out.hidden_states[reader])
    q, k = module.q_proj(entering), module.k_proj(entering)
    whole = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)[:, None]
    skip = int(clip)
    single = out.hidden_states[chosen[0]] if len(chosen) == 1 else None
    return Facts(
        hidden[:, skip:], single[:, 0] if clip and single is not None else None,
        received(out.attentions[last - 1]), received(out.attentions[0]),
        keys[:, skip:], received(whole), k[:, skip:], tower.config.image_size // tower.config.patch_size,
    )  # fmt: skip


@torch.no_grad()
def tome_facts(model: Any, pixels: Tensor, keep: float, kind: str = "image") -> Facts:
    """The features of a tower with ToMe, one crop after the other, each token a list of patches."""
    found = facts(model, pixels, kind)
    tower = _tower(model, kind)
    clip = tower.config.model_type == "clip_vision_model"
    inner = tower if hasattr(tower, "encoder") else tower.vision_model
    used = max(index % (len(inner.encoder.layers) + 1) for index in _chosen_layers(model))
    patches = found.features.shape[1]
    features, cls = found.features.clone(), []
    for crop in range(len(pixels)):
        x = inner.embeddings(pixels[crop : crop + 1])
        x = (inner.pre_layrnorm(x) if clip else x)[0]
        members = [[token] for token in range(len(x))]
        left, target = patches, max(math.floor(patches * keep + 1e-6), 1)
        outputs: list[Any] = [(x, [list(m) for m in members])]
        for number, layer in enumerate(inner.encoder.layers[:used]):
            r = max(min(math.ceil((left - target) / (used - number)), left // 2), 0)
            left -= r
            x, members = _tome_layer(layer, x, members, r, clip)
            outputs.append((x, [list(m) for m in members]))
        start = int(clip)
        found.grouped.append([[patch - start for patch in token] for token in members[start:]])
        for held in members:
            parts = []
            for index in _chosen_layers(model):
                state, then = outputs[index % (len(inner.encoder.layers) + 1)]
                parts.append(next(state[place] for place, tokens in enumerate(then) if held[0] in tokens))
            if held[0] >= start:
                features[crop, held[0] - start] = _normed(model, tower)(torch.cat(parts))
            else:
                cls.append(torch.cat(parts))
    return replace(found, features=features, cls=torch.stack(cls) if cls else None)


def _tome_layer(layer: Any, x: Tensor, members: list[list[int]], r: int, clip: bool) -> tuple[Tensor, list[list[int]]]:
    module, entering = layer.self_attn, layer.layer_norm1(x)
    heads = module.num_heads
    q, k, v = (p(entering).unflatten(-1, (heads, -1)).transpose(0, 1) for p in (module.q_proj, module.k_proj, module.v_proj))
    sizes = torch.tensor([float(len(m)) for m in members])
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + sizes.log()
    x = x + module.out_proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    pairs = best_pairs(k.mean(0), r, protected=int(clip))
    for source, target in pairs:
        assert source % 2 == 0 and target % 2 == 1
    tokens = []
    for place in range(len(members)):
        if any(place == source for source, _ in pairs):
            continue
        parts = [place, *[source for source, target in pairs if target == place]]
        total = sum(len(members[part]) for part in parts)
        value = sum(x[part] * len(members[part]) for part in parts) / total
        tokens.append((sorted(patch for part in parts for patch in members[part]), value))
    tokens.sort(key=lambda token: token[0][0])
    x = torch.stack([value for _, value in tokens])
    return x + layer.mlp(layer.layer_norm2(x)), [held for held, _ in tokens]


def best_pairs(metric: Tensor, r: int, protected: int = 0) -> list[tuple[int, int]]:
    """Bipartite soft matching: (even place, odd place), the ``r`` best."""
    edges = []
    for a in range(0, len(metric), 2):
        if a < protected:
            continue
        scores = [float(torch.cosine_similarity(metric[a], metric[b], dim=0)) for b in range(1, len(metric), 2)]
        if scores:
            best = max(range(len(scores)), key=lambda i: (scores[i], -i))
            edges.append((scores[best], a, 2 * best + 1))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    return [(a, b) for _, a, b in edges[:r]]


# ---- pictures as lists of rows ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pictures(model: Any, fields: dict[str, Tensor], kind: str, found: Facts) -> list[list[Row]]:
    """Unreduced, from the tower's features (and where a tile, a newline, a [CLS] stands)."""
    base, family, side = model.model, model.config.model_type, found.side
    project = base.multi_modal_projector
    if kind == "video":
        return _videos(model, fields, found)
    values = project(found.features)
    if family not in ("llava_next", "llava_onevision"):
        return [[Row(value, 0, patch) for patch, value in enumerate(item)] for item in values]
    result, first = [], 0
    for number, size in enumerate(fields["image_sizes"].tolist()):
        crops = tiles_of(model, fields, number)
        newline = base.image_newline
        rows = [Row(value, 0, patch) for patch, value in enumerate(values[first])]
        if crops == (0, 0):
            result.append([*rows, Row(newline)])
            first += 1
            continue
        high, wide = crops
        canvas = [
            [(1 + (y // side) * wide + x // side, y % side * side + x % side) for x in range(wide * side)] for y in range(high * side)
        ]
        top, left = 0, 0
        if size[1] / size[0] > wide / high:
            top = (high * side - int(round(size[0] * (wide * side / size[1]), 7))) // 2
        else:
            left = (wide * side - int(round(size[1] * (high * side / size[0]), 7))) // 2
        for y in range(top, high * side - top):
            for x in range(left, wide * side - left):
                crop, patch = canvas[y][x]
                rows.append(Row(values[first + crop, patch], crop, patch, canvas=(y - top, x - left)))
            rows.append(Row(newline, line=y - top))
        result.append(rows)
        first += 1 + high * wide
    return result


def tiles_of(model: Any, fields: dict[str, Tensor], number: int) -> tuple[int, int]:
    """Rows and columns of tiles of a picture; (0, 0): it is not cut."""
    if "batch_num_images" in fields:
        counts = [count for count in fields["batch_num_images"].tolist() for _ in range(count)]
        if counts[number] > 1:
            return 0, 0
    size, full = fields["image_sizes"][number].tolist(), model.config.vision_config.image_size
    best, key = (0, 0), (-1, 0)
    for high, wide in model.config.image_grid_pinpoints:
        scale = min(high / size[0], wide / size[1])
        used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        if (used, -(high * wide - used)) > key:
            best, key = (high // full, wide // full), (used, -(high * wide - used))
    return best


def _videos(model: Any, fields: dict[str, Tensor], found: Facts) -> list[list[Row]]:
    base, frames = model.model, fields["pixel_values_videos"].shape[1]
    result = []
    for first in range(0, len(found.features), frames):
        rows = []
        for frame in range(frames):
            if model.config.model_type == "video_llava":  # frames keep their [CLS]
                rows.append(Row(base.multi_modal_projector(found.cls[first + frame][None])[0], frame))
                rows += [Row(v, frame, p) for p, v in enumerate(base.multi_modal_projector(found.features[first + frame]))]
            else:
                grid = base.multi_modal_projector(found.features[first + frame]).view(found.side, found.side, -1)
                assert found.side == 2
                rows.append(Row(grid.mean((0, 1)), frame, 0))
        result.append([*rows, Row(base.image_newline)] if model.config.model_type == "llava_onevision" else rows)
    return result


# ---- reducers ---------------------------------------------------------------------------------------------------------------------------


def count_of(n: int, keep: float) -> int:
    return min(max(math.floor(n * keep + 1e-6), 1), n)


def highest(scores: Tensor, count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count])


def selected(rows: list[Row], chosen: dict[int, set[int]]) -> list[Row]:
    return [row for row in rows if row.patch < 0 or row.patch in chosen[row.crop]]


def fastervlm(rows: list[Row], crops: list[int], found: Facts, keep: float, **_: Any) -> list[Row]:
    return selected(rows, {i: highest(found.attention[c], count_of(len(found.attention[c]), keep)) for i, c in enumerate(crops)})


def uniform(rows: list[Row], crops: list[int], found: Facts, keep: float, **_: Any) -> list[Row]:
    n = len(found.attention[0])
    count = count_of(n, keep)
    return selected(rows, {i: {p for p in range(n) if (p + 1) * count // n > p * count // n} for i in range(len(crops))})


def hired(rows: list[Row], crops: list[int], found: Facts, keep: float, tiles: tuple[int, int], alpha: float = 0.5) -> list[Row]:
    n, side = len(found.attention[0]), found.side
    if tiles == (0, 0):
        return selected(rows, {i: highest(found.attention[c], max(int(n * keep + 1e-6), 1)) for i, c in enumerate(crops)})
    total = int(len(crops) * n * keep + 1e-6)
    whole = min(int(total * alpha), n)
    chosen = {0: highest(found.attention[crops[0]], whole)}
    looked = highest(found.attention_first[crops[0]], int(n * (1 - alpha)))
    for tile in range(len(crops) - 1):
        inside = [p for p in looked if (p // side * tiles[0] // side) * tiles[1] + p % side * tiles[1] // side == tile]
        chosen[tile + 1] = highest(found.attention[crops[tile + 1]], min(int(len(inside) / len(looked) * (total - whole) + 1e-6), n))
    return selected(rows, chosen)


def visionzip(model: Any, rows: list[Row], crops: list[int], found: Facts, keep: float, dominant: float = 54 / 64) -> list[Row]:
    project, n = model.model.multi_modal_projector, found.features.shape[1]
    total = count_of(n, keep)
    first, middle, end = [], {}, []
    for i, c in enumerate(crops):
        has = found.cls is not None and all(row.patch >= 0 or row.crop < 0 for row in rows)
        main = max(math.floor(dominant * total + 0.5), 1)
        best = highest(found.attention[c], main - has)
        rest = [p for p in range(n) if p not in best]
        wanted = total - main
        targets = rest[:: max(len(rest) // wanted, 1)][:wanted] if wanted else []
        for target in targets:
            near = [
                p
                for p in rest
                if p not in targets
                and max(targets, key=lambda t: (float(torch.cosine_similarity(found.keys[c, p], found.keys[c, t], dim=0)), -t)) == target
            ]
            mean = torch.stack([found.features[c, p] for p in near]).mean(0) if near else torch.zeros_like(found.features[c, 0])
            end.append((i, Row(project((found.features[c, target] + mean)[None, None])[0, 0], i, target)))
        if has:
            first.append((i, Row(project(found.cls[c][None, None])[0, 0], i)))
        middle[i] = best
    order = []
    parts = [[0], list(range(1, len(crops)))] if rows[0].canvas is None and len(crops) > 1 else [list(range(len(crops)))]
    video = len(crops) > 1 and not any(row.canvas for row in rows)
    parts = [[i] for i in range(len(crops))] if video else parts
    newlines = [row for row in rows if row.crop < 0 and row.line < 0]
    for part in parts:
        heads, tails = [r for i, r in first if i in part], [r for i, r in end if i in part]
        own = [
            row for row in rows if row.crop in part and (row.patch in middle[row.crop] or row.patch < 0) or (row.line >= 0 and 1 in part)
        ]
        order += [*heads, *own, *tails] if part[0] == 0 or video else [*own, *heads, *tails]
    return order + newlines


def prumerge(model: Any, rows: list[Row], crops: list[int], found: Facts, keep: float | None, plus: bool = False, k: int = 32) -> list[Row]:
    project, n = model.model.multi_modal_projector, found.features.shape[1]
    values, extra = {}, []
    for i, c in enumerate(crops):
        attention, keys = found.whole_attention[c], found.whole_keys[c]
        if keep is None:
            ordered = sorted(attention.tolist())
            low, high = (_percentile(ordered, share) for share in (0.25, 0.75))
            count = max(sum(a > high + 1.5 * (high - low) for a in attention.double().tolist()), 1)
        else:
            count = count_of(n, keep)
        chosen = highest(attention, count)
        if plus:
            chosen |= set(range(0, n, max(int(n / count) // 3, 1)))
        for p in chosen:
            others = [o for o in range(n) if o != p]
            others.sort(key=lambda o: -float(torch.cosine_similarity(keys[p], keys[o], dim=0)))
            merged = found.features[c, p] + sum(found.features[c, o] * attention[o] for o in others[:k])
            values[i, p] = project(merged[None, None])[0, 0]
        gone = [p for p in range(n) if p not in chosen]
        if gone:
            extra.append((i, Row(project(sum(found.features[c, p] * attention[p] for p in gone)[None, None])[0, 0], i)))
        else:
            values = {**values, **{(i, p): project(found.features[c, p][None, None])[0, 0] for p in range(n)}}
    video = len(crops) > 1 and not any(row.canvas for row in rows)
    parts = [[i] for i in range(len(crops))] if video else [[0], list(range(1, len(crops)))]
    order = []
    for part in parts:
        for row in rows:
            if row.crop in part and (row.patch < 0 or (row.crop, row.patch) in values):
                order.append(replace(row, value=values.get((row.crop, row.patch), row.value)))
            elif row.line >= 0 and 1 in part:
                order.append(row)
        order += [row for i, row in extra if i in part]
    return order + [row for row in rows if row.crop < 0 and row.line < 0]


def _percentile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def tome(rows: list[Row], crops: list[int], found: Facts) -> list[Row]:
    return selected(rows, {i: {held[0] for held in found.grouped[c]} for i, c in enumerate(crops)})


def aim(rows: list[Row], keep: float) -> list[Row]:
    values = {id(row): row.value for row in rows}
    gone = set()
    for crop in sorted({row.crop for row in rows if row.patch >= 0}):
        alive = [row for row in rows if row.crop == crop and row.patch >= 0]
        target = count_of(len(alive), keep)
        while len(alive) > target:
            pairs = best_pairs(torch.stack([values[id(row)] for row in alive]), min(len(alive) - target, (len(alive) + 1) // 2))
            for odd in range(1, len(alive), 2):
                parts = [odd, *[a for a, b in pairs if b == odd]]
                alive_value = sum(values[id(alive[part])] for part in parts) / len(parts)
                values[id(alive[odd])] = alive_value
            merged = {a for a, _ in pairs}
            gone |= {id(alive[a]) for a in merged}
            alive = [row for place, row in enumerate(alive) if place not in merged]
    return [replace(row, value=values[id(row)]) for row in rows if id(row) not in gone]


def divprune(rows: list[Row], keep: float) -> list[Row]:
    patches = [row for row in rows if row.patch >= 0]
    values = torch.stack([row.value for row in patches])
    distance = [[1 - float(torch.cosine_similarity(a, b, dim=0)) for b in values] for a in values]
    n = len(patches)
    chosen: list[int] = []
    for _ in range(count_of(n, keep)):
        left = [i for i in range(n) if i not in chosen]
        others = chosen or range(n)
        chosen.append(max(left, key=lambda i: (min(distance[i][j] for j in others if j != i), -i)))
    stays = {id(patches[i]) for i in chosen}
    return [row for row in rows if row.patch < 0 or id(row) in stays]


def downsample(rows: list[Row], keep: float, side: int, video: bool = False) -> list[Row]:
    groups: dict[Any, dict[tuple[int, int], Row]] = {}
    for row in rows:
        if row.patch >= 0:
            place = (row.patch // side, row.patch % side) if row.canvas is None else row.canvas
            groups.setdefault(row.crop if row.canvas is None else "canvas", {})[place] = row
    stays, lines = {}, set()
    for name, grid in groups.items():
        high, wide = max(y for y, _ in grid) + 1, max(x for _, x in grid) + 1
        small_high, small_wide = (max(int(length * math.sqrt(keep) + 0.5), 1) for length in (high, wide))
        for i in range(small_high):
            for j in range(small_wide):
                ys = range(i * high // small_high, math.ceil((i + 1) * high / small_high))
                xs = range(j * wide // small_wide, math.ceil((j + 1) * wide / small_wide))
                stays[id(grid[ys[0], xs[0]])] = torch.stack([grid[y, x].value for y in ys for x in xs]).mean(0)
                if name == "canvas":
                    lines.add(ys[0])
    return [
        replace(row, value=stays.get(id(row), row.value))
        for row in rows
        if id(row) in stays or (row.patch < 0 and (row.line < 0 or row.line in lines))
    ]


def temporal(rows: list[Row], group: int, keep: float, method: str = "dycoke") -> list[Row]:
    frames = max(row.crop for row in rows) + 1
    each = [[row for row in rows if row.crop == frame] for frame in range(frames)]
    for start in range(0, frames, group):
        inside = list(range(start, min(start + group, frames)))
        before = [list(each[frame]) for frame in inside]
        if method == "mean":
            each[start] = [replace(row, value=sum(f[p].value for f in before) / len(before)) for p, row in enumerate(before[0])]
            for frame in inside[1:]:
                each[frame] = []
            continue
        for number, frame in enumerate(inside):
            if number:
                other = before[number - 1] if number % 2 else before[0]
                alike = [float(torch.cosine_similarity(a.value, b.value, dim=0)) for a, b in zip(other, before[number], strict=True)]
                least = set(sorted(range(len(alike)), key=lambda p: (alike[p], p))[: count_of(len(alike), keep)])
                each[frame] = [row for p, row in enumerate(before[number]) if p in least]
    return [row for frame in each for row in frame] + [row for row in rows if row.crop < 0]


# ---- a prompt with what is left ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reduced(model: Any, fields: dict[str, Tensor], name: str, **options: Any) -> dict[str, list[list[Row]]]:
    """By kind, the rows of every picture or video."""
    result = {}
    for kind in ("image", "video"):
        pixels = _crops(model, fields, kind)
        if pixels is None:
            continue
        found = tome_facts(model, pixels, options["keep"], kind) if name == "tome" else facts(model, pixels, kind)
        plain = pictures(model, fields, kind, found)
        first, done = 0, []
        for number, rows in enumerate(plain):
            tiles = tiles_of(model, fields, number) if kind == "image" and "image_sizes" in fields else (0, 0)
            crops = list(range(first, first + max(row.crop for row in rows) + 1))
            first += len(crops)
            done.append(_apply(model, name, rows, crops, found, kind, tiles, options))
        result[kind] = done
    return result


def _crops(model: Any, fields: dict[str, Tensor], kind: str) -> Tensor | None:
    name = "pixel_values_videos" if kind == "video" else next((n for n in ("pixel_values", "pixel_values_images") if n in fields), "")
    if name not in fields:
        return None
    pixels = fields[name]
    if kind == "video":
        return pixels.flatten(0, 1)
    if pixels.dim() == 4:
        return pixels
    counts = [1 + high * wide for high, wide in (tiles_of(model, fields, number) for number in range(len(pixels)))]
    return torch.cat([item[:count] for item, count in zip(pixels, counts, strict=True)])


def _apply(
    model: Any, name: str, rows: list[Row], crops: list[int], found: Facts, kind: str, tiles: tuple[int, int], options: dict[str, Any]
) -> list[Row]:
    if kind == "video" and model.config.model_type == "llava_onevision" and name in ("fastervlm", "uniform", "hired"):
        return rows  # a frame of these tiny towers is one token, and one always stays
    if name in ("fastervlm", "uniform"):
        return globals()[name](rows, crops, found, **options)
    if name == "hired":
        return hired(rows, crops, found, tiles=tiles, **options)
    if name in ("visionzip", "prumerge"):
        return globals()[name](model, rows, crops, found, **options)
    if name == "tome":
        return tome(rows, crops, found)
    if name == "downsample":
        return downsample(rows, side=found.side, **options)
    if name == "temporal":
        return temporal(rows, **options) if kind == "video" else rows
    return globals()[name](rows, **options)


def embedded(model: Any, fields: dict[str, Tensor], rows: dict[str, list[list[Row]]]) -> tuple[Tensor, Tensor]:
    """``inputs_embeds`` and ``attention_mask`` of the prompt with these visual tokens, left padded."""
    table, config = model.get_input_embeddings().weight, model.config
    waiting = {config.image_token_id: iter(rows.get("image", [])), getattr(config, "video_token_id", None): iter(rows.get("video", []))}
    full = {config.image_token_id: sizes(model, fields, "image"), getattr(config, "video_token_id", None): sizes(model, fields, "video")}
    lines = []
    for ids, mask in zip(fields["input_ids"].tolist(), fields["attention_mask"].tolist(), strict=True):
        line, place = [], mask.index(1)
        while place < len(ids):
            if ids[place] in waiting:
                line += [row.value for row in next(waiting[ids[place]])]
                place += full[ids[place]].pop(0)
            else:
                line.append(table[ids[place]])
                place += 1
        lines.append(torch.stack(line))
    width = max(map(len, lines))
    embeds, attention = torch.zeros(len(lines), width, table.shape[1]), torch.zeros(len(lines), width, dtype=torch.long)
    for number, line in enumerate(lines):
        embeds[number, width - len(line) :] = line
        attention[number, width - len(line) :] = 1
    return embeds, attention


def sizes(model: Any, fields: dict[str, Tensor], kind: str) -> list[int]:
    """Placeholders of each picture or video."""
    pixels = _crops(model, fields, kind)
    return [] if pixels is None else [len(rows) for rows in pictures(model, fields, kind, facts(model, pixels, kind))]
