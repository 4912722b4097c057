"""The reducers' tensors: against loops on random towers of odd sizes, and what the tower's statistics are."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dyrate_kernels import vision
from dyrate_kernels.patching.tower import TowerRun, attention_received
from dyrate_kernels.vision import matching, tome
from dyrate_kernels.vision.base import ATTENTION, ATTENTION_FIRST, KEYS, WHOLE_ATTENTION, WHOLE_KEYS, Crop, TowerFeatures, Visual, budget
from tests import models
from tests.vision import independent
from tests.vision.independent import Facts, Row


class _Plain:
    """A model whose projector changes nothing."""

    class model:
        multi_modal_projector = nn.Identity()


def random_facts(crops, side, width=10, cls=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = side * side
    return Facts(
        normal(crops, tokens, width), normal(crops, width) if cls else None,
        normal(crops, tokens).softmax(1), normal(crops, tokens).softmax(1),
        normal(crops, tokens, 6), (2 * normal(crops, tokens)).softmax(1), normal(crops, tokens, 12), side,
    )  # fmt: skip


def tower_features(found):
    scores = {ATTENTION: found.attention, KEYS: found.keys, WHOLE_ATTENTION: found.whole_attention, WHOLE_KEYS: found.whole_keys}
    return TowerFeatures(found.features, found.cls, scores)


def crops_of(found):
    place = torch.arange(found.side**2)
    return [
        Crop({ATTENTION: a, ATTENTION_FIRST: first}, place // found.side, place % found.side, found.side, found.side)
        for a, first in zip(found.attention, found.attention_first, strict=True)
    ]


def rows_of(found, crop=0):
    return [Row(value, 0, patch) for patch, value in enumerate(found.features[crop])]


def in_order(merged, crop):
    """A crop's kept rows as the language model gets them."""
    kept = merged.keep[crop].nonzero()[:, 0]
    if merged.order is not None:
        kept = kept[merged.order[crop, kept].argsort(stable=True)]
    return merged.features[crop, kept]


@pytest.mark.parametrize("side", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("cls", [True, False], ids=["clip", "siglip"])
@pytest.mark.parametrize(
    "options",
    [
        {"keep": 1 / 9},
        {"keep": 0.3, "dominant": 0.5},
        {"keep": 0.9, "dominant": 0.9},
        {"keep": 0.2, "dominant": 1.0},
    ],
    ids=str,
)
def test_visionzip(side, cls, options):
    found = random_facts(3, side, cls=cls, seed=side)
    before = found.features.clone()
    merged = vision.get("visionzip", **options).merge(tower_features(found))
    assert torch.equal(found.features, before)
    for crop in range(3):
        got = in_order(merged, crop)
        if budget(side * side, options["keep"]) == side * side:
            assert torch.equal(got, before[crop])
            continue
        want = independent.visionzip(_Plain, rows_of(found, crop), [crop], found, **options)
        assert len(got) == budget(side * side, options["keep"])
        torch.testing.assert_close(got, torch.stack([row.value for row in want]))


@pytest.mark.parametrize("side", [2, 3, 7, 11])
@pytest.mark.parametrize(
    "options",
    [
        {"keep": None},
        {"keep": 0.3},
        {"keep": 0.95, "k": 3},
        {"keep": 0.15, "plus": True},
        {"keep": None, "plus": True},
    ],
    ids=str,
)
def test_prumerge(side, options):
    found = random_facts(3, side, seed=side)
    chosen = {("neighbours" if name == "k" else name): value for name, value in options.items()}
    merged = vision.get("prumerge", **chosen).merge(tower_features(found))
    for crop in range(3):
        want = independent.prumerge(_Plain, rows_of(found, crop), [crop], found, **options)
        torch.testing.assert_close(in_order(merged, crop), torch.stack([row.value for row in want]))


@pytest.mark.parametrize("side", [4, 7])
@pytest.mark.parametrize("keep", [0.05, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("tiles", [(0, 0), (2, 2), (1, 3), (3, 2)], ids=str)
def test_hired(side, keep, tiles):
    found = random_facts(1 + tiles[0] * tiles[1], side, seed=side)
    crops = list(range(len(found.features)))
    rows = [Row(value, crop, patch) for crop in crops for patch, value in enumerate(found.features[crop])]
    got = vision.get("hired", keep=keep, alpha=0.4).choose(crops_of(found), tiles if tiles != (0, 0) else None, 0)
    want = rows if keep == 1 else independent.hired(rows, crops, found, keep, tiles, alpha=0.4)
    chosen = [(crop, int(patch)) for crop, mark in enumerate(got) for patch in mark.nonzero()[:, 0]]
    assert chosen == [(row.crop, row.patch) for row in want]


def test_hired_shares_its_budget_by_where_the_picture_is_looked_at():
    """All attention of layer 0 in the lower left quadrant: that tile gets the tiles' whole share."""
    found = random_facts(5, 6)
    first = torch.zeros(36)
    first[[(y * 6 + x) for y in range(3, 6) for x in range(3)]] = 1.0
    found.attention_first[0] = first
    chosen = vision.get("hired", keep=0.1, alpha=0.75).choose(crops_of(found), (2, 2), 0)
    assert [int(mark.sum()) for mark in chosen] == [13, 0, 0, 5, 0]


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 50])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.8, 1.0])
def test_selectors_keep_their_budget(tokens, keep):
    generator = torch.Generator().manual_seed(tokens)
    attention = torch.rand(tokens, generator=generator)
    crop = Crop({ATTENTION: attention}, torch.zeros(tokens, dtype=torch.long), torch.arange(tokens), 1, tokens)
    count = independent.count_of(tokens, keep)
    for name in ("fastervlm", "random", "uniform"):
        (mark,) = vision.get(name, keep=keep).choose([crop], None, 0)
        assert int(mark.sum()) == count, name
        (mark,) = vision.get(name, tokens=7).choose([crop], None, 0)
        assert int(mark.sum()) == min(7, tokens), name
    (mark,) = vision.get("fastervlm", keep=keep).choose([crop], None, 0)
    assert set(mark.nonzero()[:, 0].tolist()) == independent.highest(attention, count)


def test_random_is_seeded_and_differs_between_pictures():
    crop = Crop({}, torch.zeros(40, dtype=torch.long), torch.arange(40), 1, 40)

    def draw(seed, unit):
        return vision.get("random", keep=0.5, seed=seed).choose([crop], None, unit)[0].tolist()

    assert draw(0, 0) == draw(0, 0) and draw(0, 0) != draw(0, 1) and draw(0, 0) != draw(1, 0)


@pytest.mark.parametrize(("tokens", "protected"), [(2, 0), (3, 0), (8, 0), (9, 1), (26, 1), (31, 0)])
def test_matching(tokens, protected):
    metric = torch.randn(3, tokens, 5, generator=torch.Generator().manual_seed(tokens))
    for r in range(1, matching.room(tokens, protected) + 1):
        source, target = matching.match(metric, r, protected)
        for crop in range(3):
            got = list(zip(source[crop].tolist(), target[crop].tolist(), strict=True))
            assert got == independent.best_pairs(metric[crop], r, protected)


@pytest.mark.parametrize("tokens", [1, 2, 3, 10, 25, 36])
@pytest.mark.parametrize("keep", [0.04, 0.25, 0.3, 0.7, 1.0])
def test_aim(tokens, keep):
    values = torch.randn(tokens + 1, 6, generator=torch.Generator().manual_seed(tokens))
    place = torch.arange(tokens + 1)
    crop = torch.where(place < tokens, 0, -1)
    x = torch.where(place < tokens, place, -1)
    reduced = vision.get("aim", keep=keep).reduce(Visual(values, crop, torch.zeros_like(x), x, crop, False))
    rows = [Row(value, 0, patch) for patch, value in enumerate(values[:-1])] + [Row(values[-1])]
    want = independent.aim(rows, keep)
    torch.testing.assert_close(reduced.values[reduced.keep], torch.stack([row.value for row in want]))
    assert len(want) == independent.count_of(tokens, keep) + 1


def test_aim_of_an_even_count_is_the_published_merge():
    """To a half, then to a quarter: each even token goes to its best odd one, whatever its rank."""
    values = torch.randn(12, 5, generator=torch.Generator().manual_seed(4))
    want = values
    for _ in range(2):
        a, b = want[::2], want[1::2]
        best = torch.cosine_similarity(a[:, None], b[None], dim=-1).argmax(1)
        want = torch.stack([torch.stack([b[j], *a[best == j]]).mean(0) for j in range(len(b))])
    got, place = vision.aim.merge_rounds(values, 3)
    torch.testing.assert_close(got, want)
    assert place.tolist() == [3, 7, 11]


@pytest.mark.parametrize("tokens", [2, 7, 40])
def test_divprune(tokens):
    values = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(tokens))
    rows = [Row(value, 0, patch) for patch, value in enumerate(values)]
    for count in {1, 2, tokens // 2, tokens - 1, tokens} & set(range(1, tokens + 1)):
        place = torch.arange(tokens)
        visual = Visual(values, torch.zeros_like(place), torch.zeros_like(place), place, torch.zeros_like(place), False)
        reduced = vision.get("divprune", tokens=count).reduce(visual)
        want = independent.divprune(rows, count / tokens)
        assert reduced.keep.nonzero()[:, 0].tolist() == [row.patch for row in want]


@pytest.mark.parametrize(
    ("patches", "layers", "keep"), [(25, 2, 0.5), (576, 23, 0.25), (576, 23, 0.001), (9, 1, 0.1), (1, 3, 0.5), (30, 4, 1.0)]
)
def test_plan_of_tome(patches, layers, keep):
    plan = vision.get("tome", keep=keep).plan(patches, layers)
    left = patches
    for r in plan:
        assert 0 <= r <= left // 2
        left -= r
    assert len(plan) == layers and left >= independent.count_of(patches, keep)
    if max(plan) < min(patches // 2 // layers, patches // 4):  # where no layer is at its limit
        assert left == independent.count_of(patches, keep) and max(plan) - min(plan) <= 1


def test_merging_tells_which_patches_a_token_holds():
    generator = torch.Generator().manual_seed(0)
    hidden, merging = torch.randn(2, 10, 4, generator=generator), tome.Merging(2, 10, 1, torch.device("cpu"))
    first = hidden
    for r in (3, 2, 9):
        hidden = merging.merge(hidden, torch.randn(2, hidden.shape[1], 3, generator=generator), r)
        for crop in range(2):
            for token in range(hidden.shape[1]):
                held = (merging.source[crop] == token).nonzero()[:, 0]
                torch.testing.assert_close(hidden[crop, token], first[crop, held].mean(0))
                assert merging.size[crop, token] == len(held) and merging.first[crop, token] == held.min()
            assert (merging.source[crop] == 0).nonzero()[:, 0].tolist() == [0]  # [CLS] alone
    assert merging.bias(torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 5), (4, 7), (24, 24)])
@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 0.9, 1.0])
def test_downsample(height, width, keep):
    values = torch.randn(height * width, 3, generator=torch.Generator().manual_seed(height))
    place = torch.arange(height * width)
    visual = Visual(values, torch.zeros_like(place), place // width, place % width, torch.zeros_like(place), False)
    reduced = vision.get("downsample", keep=keep).reduce(visual)
    rows = [Row(value, 0, patch, canvas=(patch // width, patch % width)) for patch, value in enumerate(values)]
    want = independent.downsample(rows, keep, 0)
    assert reduced.keep.nonzero()[:, 0].tolist() == [row.patch for row in want]
    torch.testing.assert_close(reduced.values[reduced.keep], torch.stack([row.value for row in want]))


@pytest.mark.parametrize("frames", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"group": 4, "keep": 0.3},
        {"group": 3, "keep": 0.6},
        {"group": 4, "keep": 0.3, "method": "mean"},
        {"group": 1, "keep": 0.3},
    ],
    ids=str,
)
def test_temporal(frames, options):
    tokens = 6
    values = torch.randn(frames * tokens + 1, 5, generator=torch.Generator().manual_seed(frames))
    place = torch.arange(frames * tokens + 1)
    crop = torch.where(place < frames * tokens, place // tokens, -1)
    visual = Visual(values, crop, torch.where(crop < 0, -1, 0), torch.where(crop < 0, -1, place % tokens), crop, True)
    reduced = vision.get("temporal", **options).reduce(visual)
    rows = [Row(values[i], i // tokens, i % tokens) for i in range(frames * tokens)] + [Row(values[-1])]
    want = independent.temporal(rows, **options)
    torch.testing.assert_close(reduced.values[reduced.keep], torch.stack([row.value for row in want]))
    visual.video = False
    assert bool(vision.get("temporal", **options).reduce(visual).keep.all())


def test_4608_tokens_become_1152():
    frames = 8
    place = torch.arange(frames * 576)
    crop = place // 576
    visual = Visual(torch.randn(frames * 576, 4), crop, place % 576 // 24, place % 24, crop, True)
    assert int(vision.get("temporal", method="mean").reduce(visual).keep.sum()) == 1152


# ---- the tower's statistics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
@pytest.mark.parametrize(
    ("tokens", "dtype"), [(2, torch.float32), (26, torch.float32), (145, torch.float32), (37, torch.float16), (37, torch.float64)]
)
@torch.no_grad()
def test_attention_received(make_model, family, tokens, dtype):
    model = copy.deepcopy(make_model(family, "qwen2" if family == "llava_onevision" else "llama"))
    tower = model.model.vision_tower.to(dtype)
    module = (tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder).layers[1].self_attn
    hidden = torch.randn(3, tokens, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, k = (p(hidden).double().unflatten(-1, (2, 16)).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(16)).softmax(-1).mean(1)
    clip = family == "llava"
    want = weights[:, 0] if clip else weights.mean(1)
    got = attention_received(module, hidden, clip, "reference")
    torch.testing.assert_close(
        got.double(), want, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5 if dtype == torch.float16 else 1e-7
    )
    whole = (module.q_proj(hidden).double() @ module.k_proj(hidden).double().transpose(1, 2) / math.sqrt(32)).softmax(-1)
    want = whole[:, 0] if clip else whole.mean(1)
    got = attention_received(module, hidden, clip, "reference", whole=True)
    torch.testing.assert_close(
        got.double(), want, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5 if dtype == torch.float16 else 1e-7
    )


@pytest.fixture
def large_onevision(monkeypatch):
    """OneVision with 6 x 6 patches a crop, of which four tiles are more than its limit allows: the model interpolates."""
    plain = models.config

    def config(family, text="llama", **overrides):
        found = plain(family, text, **overrides)
        found.vision_config.image_size = 24
        found.image_grid_pinpoints = [[24, 48], [48, 24], [48, 48]]
        found.vision_aspect_ratio = "anyres_max_1"
        return found

    monkeypatch.setattr(models, "config", config)
    return models.build("llava_onevision", "qwen2", seed=1)


@torch.no_grad()
def test_interpolated_tiles_are_chosen_by_interpolated_scores(large_onevision):
    model = large_onevision
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 5, 3, 24, 24, generator=generator)
    fields = {"pixel_values": pixels, "image_sizes": torch.tensor([[48, 48]])}
    run = TowerRun(model, "image", vision.chain("fastervlm:keep=0.3"), "reference")
    output = run.encode(model.model.get_image_features, fields, pixels)
    (layout,) = run.layouts(output)
    found = independent.facts(model, pixels[0])
    canvas = found.attention[1:].view(2, 2, 6, 6).permute(0, 2, 1, 3).reshape(1, 1, 12, 12)
    small = nn.functional.interpolate(canvas, [6, 6], mode="bilinear")[0, 0]
    assert not layout.exact and layout.tiles == (2, 2)
    visual = layout.visual
    lines = visual.segment == 1
    patch = lines & visual.patch
    torch.testing.assert_close(layout.scores[ATTENTION][patch], small.flatten())
    torch.testing.assert_close(layout.scores[ATTENTION][:36], found.attention[0])
    assert visual.y[patch].tolist() == [i // 6 for i in range(36)] and visual.x[patch].tolist() == [i % 6 for i in range(36)]
    assert visual.y[lines & ~visual.patch].tolist() == list(range(6))
    tile = torch.tensor([[1 + (y // 3) * 2 + x // 3 for x in range(6)] for y in range(6)])
    assert visual.crop[patch].tolist() == tile.flatten().tolist()
    (unit,) = run.reduce(run.layouts(output))
    kept = {int(i) - 36 for i in unit.keep.nonzero()[:, 0] if i >= 36 and visual.patch[i]}
    want = set()
    for number in range(1, 5):
        inside = (tile.flatten() == number).nonzero()[:, 0]
        best = independent.highest(small.flatten()[inside], independent.count_of(9, 0.3))
        want |= {int(inside[i]) + int(inside[i]) // 6 for i in best}  # newlines in between
    assert kept == want
    assert bool(unit.keep[lines & ~visual.patch].all())


@torch.no_grad()
def test_pooled_frames_are_chosen_by_pooled_scores(large_onevision):
    model = large_onevision
    pixels = torch.randn(2, 3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for name in ("fastervlm", "hired"):
        run = TowerRun(model, "video", vision.chain(f"{name}:keep=0.4"), "reference")
        units = run.reduce(run.layouts(run.encode(model.model.get_video_features, {_video_pixels(model): pixels}, pixels)))
        found = independent.facts(model, pixels.flatten(0, 1), "video")
        small = nn.functional.interpolate(found.attention.view(6, 1, 6, 6), size=[3, 3], mode="bilinear").flatten(1)
        for video, unit in enumerate(units):
            for frame in range(3):
                mark = unit.keep[9 * frame : 9 * frame + 9]
                assert set(mark.nonzero()[:, 0].tolist()) == independent.highest(small[3 * video + frame], 3)


def _video_pixels(model):
    import inspect

    known = inspect.signature(model.model.get_video_features).parameters
    return "pixel_values_videos" if "pixel_values_videos" in known else "pixel_values"


def test_a_chain_hands_on_what_is_left(make_model):
    model = make_model("llava_next", "llama")
    fields = models.inputs(model, [["text 2", "image", "text 3"]])
    rows = independent.reduced(model, fields, "fastervlm", keep=0.5)["image"][0]
    want = independent.aim(rows, 0.5)
    given = {name: fields[name] for name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        run = TowerRun(model, "image", vision.chain("fastervlm:keep=0.5+aim:keep=0.5"), "reference")
        output = run.encode(model.model.get_image_features, given, given["pixel_values"])
        (unit,) = run.reduce(run.layouts(output))
    torch.testing.assert_close(unit.values[unit.keep], torch.stack([row.value for row in want]), rtol=1e-4, atol=1e-5)
    run = TowerRun(model, "image", vision.chain("fastervlm:keep=0.5+uniform:keep=0.5"), "reference")
    with torch.no_grad():
        (unit,) = run.reduce(run.layouts(run.encode(model.model.get_image_features, given, given["pixel_values"])))
    left = {crop: sum(row.crop == crop and row.patch >= 0 for row in rows) for crop in {row.crop for row in rows} - {-1}}
    newlines = sum(row.patch < 0 for row in rows)
    assert int(unit.keep.sum()) == newlines + sum(independent.count_of(count, 0.5) for count in left.values())


# ---- options -----------------------------------------------------------------------------------------------------------------------------


def test_registry():
    assert len(set(vision.names())) == len(vision.names()) >= 11
    for name in vision.names():
        reducer = vision.get(name)
        assert reducer.name == name and reducer.drops
        assert "keep" in vision.options(name), f"{name} must have an option keep: `dyrate eval --cost` sets it, and 1 reduces nothing"
        assert not vision.get(name, keep=1).drops or name == "temporal"


BAD = [
    ("aim", {"keep": 0}, ValueError, r"keep must be in \(0, 1\]"),
    ("aim", {"keep": float("nan")}, ValueError, "keep must be in"),
    ("aim", {"keep": "half"}, TypeError, "keep must be a number"),
    ("fastervlm", {"keep": True}, TypeError, "keep must be a number"),
    ("fastervlm", {"tokens": 0}, ValueError, "tokens must be at least 1"),
    ("tome", {"tokens": 2.5}, TypeError, "tokens must be an integer"),
    ("hired", {"tokens": 5}, ValueError, "tokens must be None"),
    ("hired", {"alpha": 0}, ValueError, "alpha must be in"),
    ("visionzip", {"dominant": 1.5}, ValueError, "dominant must be in"),
    ("prumerge", {"plus": 1}, TypeError, "plus must be True or False"),
    ("prumerge", {"neighbours": 0}, ValueError, "neighbours must be at least 1"),
    ("prumerge", {"keep": 2}, ValueError, "keep must be in"),
    ("temporal", {"method": "sum"}, ValueError, "method must be one of 'dycoke', 'mean'"),
    ("temporal", {"group": 0}, ValueError, "group must be at least 1"),
    ("random", {"seed": -1}, ValueError, "seed must be at least 0"),
    ("divprune", {"rate": 0.5}, TypeError, "has no option 'rate'; it has keep, tokens"),
    ("pumerge", {}, ValueError, "reducer must be one of hired, aim"),
]


@pytest.mark.parametrize(("name", "options", "kind", "message"), BAD, ids=[f"{name} {options}" for name, options, *_ in BAD])
def test_a_bad_option_is_named(name, options, kind, message):
    with pytest.raises(kind, match=message):
        vision.get(name, **options)


def test_chains():
    assert vision.chain(None) == ()
    assert vision.chain("aim:keep=0.5") == (vision.AIM(keep=0.5),)
    assert vision.chain("temporal:method=mean:group=2 + aim") == (vision.Temporal(group=2, method="mean"), vision.AIM())
    assert vision.chain([vision.ToMe(), "aim:tokens=9"]) == (vision.ToMe(), vision.AIM(tokens=9))
    for spec, kind, message in [
        ("aim+tome", ValueError, "'tome' needs every patch"),
        (["aim", vision.Downsample()], ValueError, "'downsample' needs every patch"),
        ("tome+hired", ValueError, "'hired' reads the tower's attention, which 'tome'"),
        ("aim:keep", ValueError, "options are NAME=VALUE, got 'keep'"),
        ("aim+", ValueError, "a reducer is missing beside a '\\+' in 'aim\\+'"),
        ("", ValueError, "reducer must be one of"),
        (3, TypeError, "vision must be a name"),
        ([3], TypeError, "vision must hold names"),
    ]:
        with pytest.raises(kind, match=message):
            vision.chain(spec)
