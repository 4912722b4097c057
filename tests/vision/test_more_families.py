"""Reducers in the families beyond LLaVA: the unpatched model on a prompt whose visual tokens were reduced by hand.

Positions in three dimensions stay those of the whole prompt, features that Qwen3-VL adds after its first layers go with their tokens, and
what Gemma 3 and PaliGemma read in both directions is what is left.
"""

from __future__ import annotations

import copy
import types
from dataclasses import dataclass

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import METHODS, RETENTIONS, ROWS, VIDEO_ROWS, assert_close_logits, assert_same, greedy, policy, rows_for_beams, single
from tests.patching.test_families import HERE, KNOWS_BLOCKS, needs_types, pixtral, rows_of, types_of
from tests.vision import independent

VARIANTS = pytest.mark.parametrize(("family", "text"), HERE, ids=["-".join(v) for v in HERE])
RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
ANYWHERE = {"aim": {"keep": 0.35}, "divprune": {"keep": 0.3}, "downsample": {"keep": 0.4}, "uniform": {"keep": 0.6}}
IN_TOWER = {
    "fastervlm": {"keep": 0.4},
    "hired": {"keep": 0.45},
    "visionzip": {"keep": 0.6, "dominant": 0.6},
    "prumerge": {"keep": None},
    "tome": {"keep": 0.45},
}
LENGTH = 7


def test_every_reducer_that_asks_nothing_of_the_tower_is_run_in_every_family():
    reducers = [dk.vision.get(name) for name in dk.vision.names()]
    wanted = {reducer.name for reducer in reducers if not reducer.reads_tower and not reducer.videos_only} - {"random"}
    assert set(ANYWHERE) == wanted, f"ANYWHERE here must hold options for {sorted(wanted)}: they need nothing of the tower"


# ---- by hand -----------------------------------------------------------------------------------------------------------------------------


@dataclass
class Grid:
    """A picture, tile or video, reduced."""

    frames: int
    high: int
    wide: int
    rows: list  # what is left
    deep: list  # by layer, [frames * high * wide, d]

    def left(self):
        """By place among the placeholders."""
        return {row.crop * self.high * self.wide + row.patch: row for row in self.rows}


def grids_of(model, fields, kind):
    """Frames, height and width of each picture, tile or video, from the inputs alone."""
    family = model.config.model_type
    if family == "llava":  # with Pixtral's tower
        return [] if kind == "video" else [(1, h // 4, w // 4) for h, w in fields["image_sizes"].tolist()]
    return models.BUILDERS[family].grids(fields, kind)


@torch.no_grad()
def reduced(model, fields, name, **options):
    """By kind, every picture or video with what is left of it."""
    found = {}
    for kind in ("image", "video"):
        pixels = "pixel_values" + ("_videos" if kind == "video" else "")
        if pixels not in fields:
            continue
        extra = {n: fields[n] for n in (f"{kind}_grid_thw", "image_sizes") if n in fields}
        output = getattr(model.model, f"get_{kind}_features")(fields[pixels], **extra, return_dict=True)
        flat = torch.cat([item.flatten(0, -2) for item in output.pooler_output])
        deep = [
            layer if isinstance(layer, torch.Tensor) else torch.cat(list(layer))
            for layer in getattr(output, "deepstack_features", None) or []
        ]
        start, units = 0, []
        for frames, high, wide in grids_of(model, fields, kind):
            size = frames * high * wide
            rows = [independent.Row(value, i // (high * wide), i % (high * wide)) for i, value in enumerate(flat[start : start + size])]
            rows = left_of(rows, name, kind, high, wide, options)
            units.append(Grid(frames, high, wide, rows, [layer[start : start + size] for layer in deep]))
            start += size
        assert start == len(flat)
        found[kind] = units
    if name in IN_TOWER:  # PaliGemma's tower
        for unit, rows in zip(found["image"], independent.reduced(model, fields, name, **options)["image"], strict=True):
            unit.rows = rows
    return found


def left_of(rows, name, kind, high, wide, options):
    if name in IN_TOWER:
        return rows
    if name == "uniform":
        frames = range(max(row.crop for row in rows) + 1)
        return independent.uniform(rows, list(frames), types.SimpleNamespace(attention=[range(high * wide)]), **options)
    if name == "downsample":
        return independent.downsample(rows, side=wide, **options)
    if name == "temporal":
        return independent.temporal(rows, **options) if kind == "video" else rows
    return getattr(independent, name)(rows, **options)


def prompt_of(model, fields, units):
    """The prompt with what is left: arguments of ``generate`` with ``inputs_embeds``, what is added after layers, which columns stay."""
    config = model.config
    waiting = {getattr(config, f"{kind}_token_id"): iter(units[kind]) for kind in units}
    embedded = model.get_input_embeddings()(fields["input_ids"])
    positions = positions_of(model, fields)
    lines = []
    for b, (ids, mask) in enumerate(zip(fields["input_ids"].tolist(), fields["attention_mask"].tolist(), strict=True)):
        line, now = [], dict.fromkeys(waiting)
        for column in range(mask.index(1), len(ids)):
            token = ids[column]
            if token not in waiting:
                line.append((embedded[b, column], False, column, None))
                continue
            if now[token] is None:
                now[token] = [next(waiting[token]), 0]
            unit, place = now[token]
            if sorted(unit.left()) != [row.patch for row in unit.rows] and unit.frames == 1:  # PaliGemma's tower: rows that are no patch
                stays = [unit.rows[place]] if place < len(unit.rows) else []
            else:
                stays = [unit.left()[place]] if place in unit.left() else []
            line += [(row.value, True, column, [layer[place] for layer in unit.deep]) for row in stays]
            now[token] = [unit, place + 1] if place + 1 < unit.frames * unit.high * unit.wide else None
        assert not any(now.values())
        lines.append(line)
    width = max(map(len, lines))
    embeds = torch.zeros(len(lines), width, embedded.shape[2])
    attention, visual = torch.zeros(len(lines), width, dtype=torch.long), torch.zeros(len(lines), width, dtype=torch.bool)
    stays = torch.zeros(len(lines), width, dtype=torch.long)
    for b, line in enumerate(lines):
        for place, (value, is_visual, column, _) in enumerate(line, width - len(line)):
            embeds[b, place], attention[b, place], visual[b, place], stays[b, place] = value, 1, is_visual, column
    given = {"inputs_embeds": embeds, "attention_mask": attention}
    if config.model_type == "gemma3":
        given["token_type_ids"] = visual.long()
    if config.model_type == "paligemma":
        given["token_type_ids"] = torch.zeros_like(attention)
    if positions is not None:
        given["position_ids"] = torch.stack([each.gather(1, stays) for each in positions])
    deep = [torch.stack(each) for each in zip(*[d for line in lines for *_, d in line if d], strict=True)]
    return given, (visual, deep), stays


def positions_of(model, fields):
    """int64 ``[4, B, S]`` where positions have three dimensions: those of the whole prompt."""
    if not hasattr(model.model, "get_rope_index"):
        return None
    names = ("image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
    three, _ = model.model.get_rope_index(fields["input_ids"], **{name: fields[name] for name in names if name in fields})
    one = (fields["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return torch.cat([one[None], three])


class Added:
    """Gives the language model the features that Qwen3-VL adds after layers, while it reads a prompt of embeddings."""

    def __init__(self, model, visual, deep):
        self.visual, self.deep = visual, deep
        self.hook = model.get_decoder().register_forward_pre_hook(self, with_kwargs=True) if deep else None

    def __call__(self, module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] != self.visual.shape[1]:
            return None
        times = len(kwargs["inputs_embeds"]) // len(self.visual)
        deep = self.deep
        if times > 1:
            counts = self.visual.sum(1).tolist()
            deep = [torch.cat([part for part in layer.split(counts) for _ in range(times)]) for layer in deep]
        return args, kwargs | {"visual_pos_masks": self.visual.repeat_interleave(times, 0), "deepstack_visual_embeds": deep}

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.hook is not None:
            self.hook.remove()


class Fill:
    """Puts embeddings where placeholders are, so that a patched model finds its visual tokens by their ids."""

    def __init__(self, token, values, place):
        self.token, self.values, self.counts = token, values, place.sum(1).tolist()

    def __call__(self, module, args, output):
        place = args[0] == self.token
        if not place.any():
            return output
        times = len(place) // len(self.counts)  # beams lie side by side
        return output.masked_scatter(place[..., None], torch.cat([part for part in self.values.split(self.counts) for _ in range(times)]))


def compacted(model, fields, name, **options):
    """A copy of the model, and ids with fewer placeholders, which that copy embeds as what is left of the pictures."""
    given, added, stays = prompt_of(model, fields, reduced(model, fields, name, **options))
    inner = copy.deepcopy(model)
    ids = torch.where(given["attention_mask"] == 1, fields["input_ids"].gather(1, stays), models.PAD_TOKEN)
    for token in (models.IMAGE_TOKEN, models.VIDEO_TOKEN):
        place = ids == token
        if place.any():
            inner.get_input_embeddings().register_forward_hook(Fill(token, given["inputs_embeds"][place].detach(), place))
    given = {name: value for name, value in given.items() if name != "inputs_embeds"} | {"input_ids": ids}
    return inner, given, added


def by_hand(model, fields, name, length=LENGTH, generate=None, **options):
    """Returns what the unpatched model generates then, without its prompt."""
    inner, given, added = compacted(model, fields, name, **options)
    with Added(inner, *added):
        found = inner.generate(**given, **(generate or greedy(length)))
    found.sequences = found.sequences[:, given["input_ids"].shape[1] :]
    return found


def assert_as_by_hand(got, want, fields):
    prompt = fields["input_ids"]
    assert torch.equal(got.sequences[:, : prompt.shape[1]], prompt)
    assert got.sequences[:, prompt.shape[1] :].tolist() == want.sequences.tolist()
    assert_close_logits(torch.stack(got.logits), torch.stack(want.logits))


def test_what_is_by_hand_is_the_model_where_all_stays(make_model):
    for family, text in HERE:
        model = make_model(family, text)
        fields = models.inputs(model, rows_of(family))
        needs = family != "paligemma" or KNOWS_BLOCKS
        if needs:
            assert_as_by_hand(model.generate(**fields, **greedy(4)), by_hand(model, fields, "uniform", 4, keep=1), fields)


# ---- each reducer ------------------------------------------------------------------------------------------------------------------------


def counts(model, fields, units):
    """Visual tokens of each sequence, before and after."""
    _, (visual, _), _ = prompt_of(model, fields, units)
    ids = [getattr(model.config, f"{kind}_token_id") for kind in units]
    return torch.isin(fields["input_ids"], torch.tensor(ids)).sum(1).tolist(), visual.sum(1).tolist()


def places_of(model, fields, units):
    """Of each sequence, which of its visual tokens are left."""
    _, (visual, _), stays = prompt_of(model, fields, units)
    found = []
    for b, ids in enumerate(fields["input_ids"]):
        among = (torch.isin(ids, torch.tensor([models.IMAGE_TOKEN, models.VIDEO_TOKEN]))).cumsum(0) - 1
        found.append(among[stays[b][visual[b]]].tolist())
    return found


def check(model, fields, name, options, retention):
    want = by_hand(model, fields, name, **options)
    with dk.patch(model, "none", retention=retention, vision=dk.vision.get(name, **options)) as handle:
        got = model.generate(**fields, **greedy(LENGTH))
        stats = handle.stats()
    assert_as_by_hand(got, want, fields)
    before, after = counts(model, fields, reduced(model, fields, name, **options))
    assert (stats.visual_tokens_in, stats.visual_tokens) == (before, after)
    assert [len(places) for places in stats.visual_places] == after
    if name not in IN_TOWER:
        assert [list(places) for places in stats.visual_places] == places_of(model, fields, reduced(model, fields, name, **options))
    return before, after


@VARIANTS
@pytest.mark.parametrize("name", ANYWHERE)
def test_equals_the_model_on_reduced_embeddings(make_model, family, text, name):
    model = make_model(family, text)
    fields = models.inputs(model, rows_of(family))
    before, after = check(model, fields, name, ANYWHERE[name], RETENTIONS[len(name + family) % 2])
    assert sum(after) < 0.8 * sum(before)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("options", [{"group": 3, "keep": 0.4}, {"group": 2, "keep": 0.5, "method": "mean"}], ids=str)
def test_temporal_merging_of_videos(make_model, monkeypatch, family, options):
    monkeypatch.setattr(models, "FRAMES", 5)
    model = make_model(family, "own")
    fields = models.inputs(model, rows_of(family))
    before, after = check(model, fields, "temporal", options, "evict")
    assert sum(after) < sum(before)


@RETENTION
@pytest.mark.parametrize("name", ANYWHERE)
def test_pixtral(name, retention):
    model, fields = pixtral()
    check(model, fields, name, ANYWHERE[name], retention)


@pytest.mark.skipif(not KNOWS_BLOCKS, reason="this transformers has other masks")
@RETENTION
@pytest.mark.parametrize("name", IN_TOWER)
def test_in_paligemmas_tower(make_model, name, retention):
    model = make_model("paligemma", "own")
    fields = models.inputs(model, rows_of("paligemma"), seed=int(name == "tome"))
    check(model, fields, name, IN_TOWER[name], retention)


@VARIANTS
def test_a_tower_that_is_not_known_is_not_read(make_model, family, text):
    model = make_model(family, text)
    for name in dk.vision.names():
        if name in IN_TOWER and family != "paligemma":
            with pytest.raises(TypeError, match=f"reducer '{name}' reads the vision tower, .* not of {family} with"):
                dk.patch(model, "none", vision=["temporal", name] if name in ("hired", "fastervlm") else name)
        else:
            dk.patch(model, "none", vision=name).unpatch()


@VARIANTS
@RETENTION
def test_keep_all_is_the_unreduced_model(make_model, family, text, retention):
    model = make_model(family, text)
    fields = models.inputs(model, rows_of(family))
    with dk.patch(model, policy(METHODS["fixed"]), retention=retention):
        want = model.generate(**fields, **greedy())
    with dk.patch(model, policy(METHODS["fixed"]), retention=retention, vision="divprune:keep=1"):
        assert_same(model.generate(**fields, **greedy()), want, tolerance=0)


# ---- with policies, and modes ------------------------------------------------------------------------------------------------------------


@VARIANTS
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "sparsevlm-k2", "aim"])
def test_with_policies(make_model, family, text, method, retention):
    """As the policy alone on a prompt that holds no more than what the reducer leaves."""
    model = make_model(family, text)
    fields = models.inputs(model, rows_of(family))
    inner, shorter, added = compacted(model, fields, "aim", keep=0.5)
    with dk.patch(inner, policy(METHODS[method]), retention=retention) as handle, Added(inner, *added):
        want = inner.generate(**shorter, **greedy(LENGTH))
        alone = handle.stats()
    with dk.patch(model, policy(METHODS[method]), retention=retention, vision="aim:keep=0.5") as handle:
        got = model.generate(**fields, **greedy(LENGTH))
        stats = handle.stats()
    assert got.sequences[:, fields["input_ids"].shape[1] :].tolist() == want.sequences[:, shorter["input_ids"].shape[1] :].tolist()
    assert_close_logits(torch.stack(got.logits), torch.stack(want.logits))
    assert [step.kept for step in stats.steps] == [step.kept for step in alone.steps]


@VARIANTS
@RETENTION
def test_beams(make_model, family, text, retention):
    needs_types(family)
    model = make_model(family, text)
    rows = [ROWS[0], ROWS[3]] if models.BUILDERS[family].row_holds_pictures else rows_for_beams(rows_of(family))
    fields = models.inputs(model, rows)
    want = by_hand(model, fields, "divprune", generate=greedy(num_beams=3), keep=0.5)
    with dk.patch(model, "none", retention=retention, vision="divprune:keep=0.5"):
        got = model.generate(**fields, **greedy(num_beams=3))
    assert got.sequences[:, fields["input_ids"].shape[1] :].tolist() == want.sequences.tolist()


@VARIANTS
@RETENTION
def test_a_second_turn(make_model, family, text, retention):
    """A turn of text on the returned cache reads what a prompt with both turns would."""
    needs_types(family)
    whole = (retention == "evict") == (len(family) % 2 == 0)  # the whole prompt is given again, or its new ids alone
    model = make_model(family, text)
    fields = models.inputs(model, ROWS[:2] + (VIDEO_ROWS if models.BUILDERS[family].videos else []))
    with dk.patch(model, "none", retention=retention, vision="downsample:keep=0.4"):
        first = model.generate(**fields, **greedy(4))
        more = torch.randint(models.FIRST_WORD, models.IMAGE_TOKEN, (len(first.sequences), 3), generator=torch.Generator().manual_seed(3))
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([fields["attention_mask"], torch.ones(len(ids), ids.shape[1] - fields["input_ids"].shape[1]).long()], 1)
        now = {"input_ids": ids if whole else ids[:, first.sequences.shape[1] - 1 :], "attention_mask": mask}
        got = model.generate(**now, **types_of(family, ids, fields), **{cache_name(): first.past_key_values}, **greedy(4))
    if family == "paligemma":  # its second turn is read causally, which a prompt of both turns would not be
        inner, given, _ = compacted(model, fields, "downsample", keep=0.4)
        plain = inner.generate(**given, **greedy(4))
        ids = torch.cat([plain.sequences, more], 1)
        mask = torch.cat([given["attention_mask"], torch.ones(len(ids), ids.shape[1] - given["input_ids"].shape[1]).long()], 1)
        cache = {cache_name(): plain.past_key_values}
        want = inner.generate(input_ids=ids, attention_mask=mask, **types_of(family, ids, given), **cache, **greedy(4))
        assert got.sequences[:, -4:].tolist() == want.sequences[:, -4:].tolist()
        return assert_close_logits(torch.stack(got.logits), torch.stack(want.logits))
    grown = dict(fields) | {"input_ids": ids, "attention_mask": mask} | types_of(family, ids, fields)
    if "mm_token_type_ids" in fields:
        grown["mm_token_type_ids"] = (ids == models.IMAGE_TOKEN).int() + 2 * (ids == models.VIDEO_TOKEN).int()
    want = by_hand(model, grown, "downsample", 4, keep=0.4)
    assert got.sequences[:, -4:].tolist() == want.sequences.tolist()
    assert_close_logits(torch.stack(got.logits), torch.stack(want.logits))


@RETENTION
@pytest.mark.parametrize(("family", "text"), [("internvl", "qwen2"), ("smolvlm", "llama")])
def test_a_picture_in_the_second_turn(make_model, family, text, retention):
    """Two pictures in two turns, as one prompt of both. (With Qwen-VL it fails unpatched too.)"""
    model = make_model(family, text)
    first, second = single(model, ["text 4", "image", "text 5"]), single(model, ["text 3", "image", "text 4"], seed=9)
    with dk.patch(model, "none", retention=retention, vision="aim:keep=0.4"):
        answer = model.generate(**first, **greedy(5))
        ids = torch.cat([answer.sequences, second["input_ids"]], 1)
        now = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"]}
        got = model.generate(**now, **{cache_name(): answer.past_key_values}, **greedy(5))
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]], dim=int(family == "smolvlm"))
    want = by_hand(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}, "aim", 5, keep=0.4)
    assert got.sequences[:, -5:].tolist() == want.sequences.tolist()
    assert_close_logits(torch.stack(got.logits), torch.stack(want.logits))


@RETENTION
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_prefill_computes_only_what_is_left(make_model, family, retention):
    needs_types(family)
    model = make_model(family, "own")
    fields = models.inputs(model, rows_of(family))
    widths = set()
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: widths.add(output[0].shape[1]))
        for layer in models.decoder_layers(model)
    ]
    try:
        with dk.patch(model, "none", retention=retention, vision="downsample:keep=0.3"):
            model.generate(**fields, **greedy(1))
    finally:
        for hook in hooks:
            hook.remove()
    given, _, _ = prompt_of(model, fields, reduced(model, fields, "downsample", keep=0.3))
    assert widths == {given["attention_mask"].shape[1]}
