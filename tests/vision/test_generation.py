"""Generation with reducers: the unpatched model on embeddings that were reduced by hand, in every family and mode."""

from __future__ import annotations

import copy

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import (
    METHODS,
    PICTURES_FIRST,
    RETENTIONS,
    assert_close_logits,
    assert_same,
    greedy,
    policy,
    rows_for,
    rows_for_beams,
    single,
)
from tests.oracle import Oracle, Rule, Turn
from tests.vision import independent

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
REDUCERS = {
    "fastervlm": {"keep": 0.4},
    "uniform": {"keep": 0.6},
    "hired": {"keep": 0.45},
    "visionzip": {"keep": 0.6, "dominant": 0.6},
    "prumerge": {"keep": None},
    "tome": {"keep": 0.45},
    "aim": {"keep": 0.35},
    "divprune": {"keep": 0.3},
    "downsample": {"keep": 0.4},
    "temporal": {"group": 2, "keep": 0.4},
}
MERGES_IN_TOWER = ("visionzip", "prumerge", "tome")


def test_every_reducer_is_compared_with_an_independent_one():
    missing = set(dk.vision.names()) - set(REDUCERS) - {"random"}  # which draws numbers of its own
    assert not missing, f"REDUCERS here must hold options for {sorted(missing)}, which tests/vision/independent.py works out once more"


def by_hand(model, fields, rows, length=8, **options):
    """The unpatched model on these visual tokens."""
    embeds, mask = independent.embedded(model, fields, rows)
    return model.generate(inputs_embeds=embeds, attention_mask=mask, **greedy(length, **options))


def fields_for(model, name):
    rows = rows_for(model.config.model_type)
    if name in MERGES_IN_TOWER and model.config.model_type == "llava_onevision":
        rows = [row for row in rows if "video" not in row]  # their frames are interpolated after the tower
    return models.inputs(model, rows, seed=int(name == "tome"))  # with seed 0 two pairs of one frame are equally alike


def assert_as_by_hand(got, want, fields):
    prompt = fields["input_ids"]
    assert torch.equal(got.sequences[:, : prompt.shape[1]], prompt)
    assert got.sequences[:, prompt.shape[1] :].tolist() == want.sequences.tolist()
    assert_close_logits(torch.stack(got.logits), torch.stack(want.logits))


def counts(model, fields, rows):
    """Visual tokens of each sequence."""
    config = model.config
    found = []
    for ids in fields["input_ids"].tolist():
        total = 0
        for kind in rows:
            token, left = getattr(config, f"{kind}_token_id"), ids.count(getattr(config, f"{kind}_token_id"))
            assert token is not None
            while left:
                left -= rows[kind][0][0]
                total += rows[kind].pop(0)[1]
            assert left == 0
        found.append(total)
    return found


VARIANTS = [variant for variant in models.VARIANTS if variant[1] != "qwen3" and variant != ("llava", "qwen2")]


@pytest.mark.parametrize(("family", "text"), VARIANTS, ids=["-".join(v) for v in VARIANTS])
@pytest.mark.parametrize("name", REDUCERS)
def test_equals_the_model_on_reduced_embeddings(make_model, family, text, name):
    model = make_model(family, text)
    fields = fields_for(model, name)
    rows = independent.reduced(model, fields, name, **REDUCERS[name])
    want = by_hand(model, fields, rows)
    retention = RETENTIONS[len(name + family) % 2]
    with dk.patch(model, "none", retention=retention, vision=dk.vision.get(name, **REDUCERS[name])) as handle:
        got = model.generate(**fields, **greedy())
        stats = handle.stats()
    assert_as_by_hand(got, want, fields)
    pairs = {kind: list(zip(independent.sizes(model, fields, kind), map(len, rows[kind]), strict=True)) for kind in rows}
    before = {kind: [(size, size) for size, _ in pairs[kind]] for kind in pairs}
    assert stats.visual_tokens_in == counts(model, fields, before) and stats.visual_tokens == counts(model, fields, pairs)
    assert stats.vision == name
    assert [len(places) for places in stats.visual_places] == stats.visual_tokens


@pytest.mark.parametrize("options", [{"plus": True, "keep": 0.2}, {"keep": 0.3, "k": 5}], ids=str)
def test_prumerge_options(make_model, options):
    model = make_model()
    fields = fields_for(model, "prumerge")
    want = by_hand(model, fields, independent.reduced(model, fields, "prumerge", **options))
    chosen = {("neighbours" if name == "k" else name): value for name, value in options.items()}
    with dk.patch(model, "none", vision=dk.vision.get("prumerge", **chosen)):
        assert_as_by_hand(model.generate(**fields, **greedy()), want, fields)


@pytest.mark.parametrize("family", ["video_llava", "llava_onevision"])
@pytest.mark.parametrize("options", [{"group": 3, "keep": 0.4}, {"group": 2, "keep": 0.5, "method": "mean"}], ids=str)
def test_temporal_merging_of_longer_videos(make_model, monkeypatch, family, options):
    monkeypatch.setattr(models, "FRAMES", 5)
    model = make_model(family, "llama" if family == "video_llava" else "qwen2")
    fields = fields_for(model, "temporal")
    want = by_hand(model, fields, independent.reduced(model, fields, "temporal", **options))
    with dk.patch(model, "none", vision=dk.vision.get("temporal", **options)) as handle:
        got = model.generate(**fields, **greedy())
        fewer = sum(handle.stats().visual_tokens) < sum(handle.stats().visual_tokens_in)
        assert fewer or (family == "llava_onevision" and "method" not in options)  # whose frames are one token each here
    assert_as_by_hand(got, want, fields)


@RETENTION
@pytest.mark.parametrize("name", REDUCERS)
def test_keep_all_is_the_unreduced_model(make_model, name, retention):
    family = "video_llava" if name == "temporal" else "llava_next"
    model = make_model(family, "llama")
    fields = models.inputs(model, rows_for(family))
    with dk.patch(model, "fixed", retention=retention):
        want = model.generate(**fields, **greedy())
    with dk.patch(model, "fixed", retention=retention, vision=dk.vision.get(name, keep=1)) as handle:
        assert_same(model.generate(**fields, **greedy()), want, tolerance=0)
        assert handle.stats().visual_tokens == handle.stats().visual_tokens_in


def compact(model, fields, rows):
    """A copy of the model that gives out reduced features, and a prompt with that many placeholders: for the mask oracle."""
    config, inner = model.config, copy.deepcopy(model)
    full = {kind: independent.sizes(model, fields, kind) for kind in rows}
    lengths = {kind: [len(r) for r in rows[kind]] for kind in rows}
    lines = []
    for ids, mask in zip(fields["input_ids"].tolist(), fields["attention_mask"].tolist(), strict=True):
        line, place = [], mask.index(1)
        while place < len(ids):
            kind = next((k for k in rows if ids[place] == getattr(config, f"{k}_token_id")), None)
            line += [ids[place]] * (1 if kind is None else lengths[kind].pop(0))
            place += 1 if kind is None else full[kind].pop(0)
        lines.append(line)
    width = max(map(len, lines))
    shorter = {
        "input_ids": torch.tensor([[0] * (width - len(line)) + line for line in lines]),
        "attention_mask": torch.tensor([[0] * (width - len(line)) + [1] * len(line) for line in lines]),
    }
    for kind in rows:
        token, values = getattr(config, f"{kind}_token_id"), torch.cat([torch.stack([r.value.detach() for r in u]) for u in rows[kind]])
        inner.model.get_input_embeddings().register_forward_hook(_Fill(token, values))
    return inner, shorter


class _Fill:
    """Puts reduced features where the placeholders of a kind are, after the embedding."""

    def __init__(self, token, values):
        self.token, self.values = token, values

    def __call__(self, module, args, output):
        place = args[0] == self.token
        times = int(place.sum()) // len(self.values)
        return output.masked_scatter(place[..., None], self.values.repeat(times, 1)) if times else output


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fixed", "fastv", "fastv-mean", "schedule", "pyramiddrop", "sparsevlm", "aim", "vtw"])
@pytest.mark.parametrize(
    ("family", "text", "name"), [("llava", "llama", "aim"), ("llava", "mistral", "fastervlm"), ("llava_next", "llama", "hired")]
)
def test_with_every_policy(make_model, family, text, name, method, retention):
    model = make_model(family, text)
    fields = models.inputs(model, rows_for(family))
    rows = independent.reduced(model, fields, name, **REDUCERS[name])
    inner, shorter = compact(model, fields, rows)
    oracle = Oracle(inner, METHODS[method], retention)
    want = oracle.generate(**shorter, **greedy())
    with dk.patch(model, policy(METHODS[method]), retention=retention, vision=dk.vision.get(name, **REDUCERS[name])) as handle:
        got = model.generate(**fields, **greedy())
        stats = handle.stats()
    assert got.sequences[:, fields["input_ids"].shape[1] :].tolist() == want.sequences[:, shorter["input_ids"].shape[1] :].tolist()
    assert_close_logits(torch.stack(got.logits), torch.stack(want.logits))
    for b, trace in enumerate(oracle.trace):
        for entry, step in zip(stats.steps, trace, strict=False):
            if entry.step or retention == "evict":
                assert entry.kept[b] == step.count


# ---- modes -------------------------------------------------------------------------------------------------------------------------------


@RETENTION
@pytest.mark.parametrize("chunk", [5, 9])
@pytest.mark.parametrize("method", ["none", "fastv-mean", "sparsevlm", "aim", "dyrate"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_chunked_prompts(make_model, text, method, chunk, retention):
    if not PICTURES_FIRST:
        pytest.skip("this transformers gives no picture to a prompt in chunks")
    model = make_model("llava", text)
    fields = models.inputs(model, rows_for("llava"))
    with dk.patch(model, policy(METHODS[method]), retention=retention, vision="uniform:keep=0.5") as handle:
        want = model.generate(**fields, **greedy())
        before = handle.stats()
        got = model.generate(**fields, **greedy(prefill_chunk_size=chunk))
        after = handle.stats()
    assert_same(got, want)
    assert (before.visual_tokens_in, before.visual_places) == (after.visual_tokens_in, after.visual_places)


@RETENTION
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_beams(make_model, family, retention):
    model = make_model(family, "llama")
    fields = models.inputs(model, rows_for_beams(rows_for(family)))
    rows = independent.reduced(model, fields, "fastervlm", keep=0.5)
    want = by_hand(model, fields, rows, num_beams=3)
    with dk.patch(model, "none", retention=retention, vision="fastervlm:keep=0.5") as handle:
        got = model.generate(**fields, **greedy(num_beams=3))
        assert len(handle.stats().visual_tokens_in) == 3 * len(fields["input_ids"])
    assert got.sequences[:, fields["input_ids"].shape[1] :].tolist() == want.sequences.tolist()


@RETENTION
def test_an_assistant_drafts(make_model, retention):
    model = make_model()
    fields = single(model, ["text 5", "image", "text 8"])
    want = by_hand(model, fields, independent.reduced(model, fields, "aim", keep=0.4))
    with dk.patch(model, "none", retention=retention, vision="aim:keep=0.4"):
        try:
            got = model.generate(**fields, **greedy(assistant_model=copy.deepcopy(model)))
        except RuntimeError as error:
            pytest.skip(f"this transformers cannot: {error}")
    assert got.sequences[0, fields["input_ids"].shape[1] :][:8].tolist() == want.sequences[0].tolist()


@RETENTION
@pytest.mark.parametrize("text", ["llama", "mistral"])
@pytest.mark.parametrize("method", ["none", "fixed", "aim"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole-prompt", "only-new-ids"])
def test_chat_with_pictures_in_two_turns(make_model, text, method, retention, whole):
    """The second turn's answer is that of the mask oracle on both turns' reduced prompts."""
    model = make_model("llava", text)
    rule = METHODS[method]
    first, second = single(model, ["text 4", "image", "text 5"]), single(model, ["text 3", "image", "text 4"], seed=9)
    reducer = dk.vision.get("fastervlm", keep=0.4)
    with dk.patch(model, policy(rule), retention=retention, vision=reducer) as handle:
        answer = model.generate(**first, **greedy(5))
        ids = torch.cat([answer.sequences, second["input_ids"]], 1)
        new = ids if whole else ids[:, answer.sequences.shape[1] - 1 :]
        now = {"attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"], cache_name(): answer.past_key_values}
        got = model.generate(input_ids=new, **now, **greedy(5))
        stats = handle.stats()
        every = torch.cat([ids, got.sequences[:, -5:], ids[:, :4]], 1)
        now = {"input_ids": every, "attention_mask": torch.ones_like(every), cache_name(): got.past_key_values}
        third = model.generate(**now, **greedy(4))
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    both = {"input_ids": every, "attention_mask": torch.ones_like(every), "pixel_values": pixels}
    rows = independent.reduced(model, both, "fastervlm", keep=0.4)
    inner, shorter = compact(model, both, rows)
    gone = 25 - len(rows["image"][0])
    end = first["input_ids"].shape[1] - gone
    oracle = Oracle(inner, rule, retention)
    start, stop = end + 4, ids.shape[1] - 2 * gone
    cut = {name: value[:, :stop] for name, value in shorter.items()}
    want = oracle.generate(before=[Turn(0, end)], start=start, **cut, **greedy(5))
    assert got.sequences[:, -5:].tolist() == want.sequences[:, -5:].tolist()
    assert_close_logits(torch.stack(got.logits), torch.stack(want.logits))
    assert stats.visual_tokens_in == [50] and stats.visual_tokens == [50 - 2 * gone]
    if method == "aim":
        return  # decided once, and not again without a new picture; the oracle decides in every turn
    want = oracle.generate(before=[Turn(0, end), Turn(start, stop)], start=stop + 4, **shorter, **greedy(4))
    assert_close_logits(torch.stack(third.logits), torch.stack(want.logits))


@RETENTION
def test_a_prompt_that_ends_with_a_picture(make_model, retention):
    model = make_model()
    fields = models.inputs(model, [["text 4", "image"], ["text 2", "image", "text 3"]])
    want = by_hand(model, fields, independent.reduced(model, fields, "downsample", keep=0.3))
    with dk.patch(model, "none", retention=retention, vision="downsample:keep=0.3"):
        assert_as_by_hand(model.generate(**fields, **greedy()), want, fields)


@RETENTION
def test_prefill_computes_only_what_is_left(make_model, retention):
    model = make_model()
    fields = models.inputs(model, rows_for("llava"))
    widths = []

    def note(module, args, output):
        widths.append((output[0] if isinstance(output, tuple) else output).shape[1])

    hooks = [layer.register_forward_hook(note) for layer in models.decoder_layers(model)]
    try:
        with dk.patch(model, "none", retention=retention, vision="uniform:keep=0.2") as handle:
            model.generate(**fields, **greedy(1))
            stats = handle.stats()
    finally:
        for hook in hooks:
            hook.remove()
    text = [int(m.sum()) - n for m, n in zip(fields["attention_mask"], stats.visual_tokens_in, strict=True)]
    assert set(widths) == {max(t + n for t, n in zip(text, stats.visual_tokens, strict=True))}
    assert widths[0] < fields["input_ids"].shape[1]


def test_costs_count_what_is_left(make_model):
    """A reducer's costs are those of a model that was shown less; what it saved is told beside them."""
    model = make_model()
    fields = models.inputs(model, rows_for("llava"))
    with dk.patch(model, "none") as handle:
        model.generate(**fields, **greedy(4))
        whole = handle.stats()
    with dk.patch(model, "fixed", retention="evict", vision="uniform:keep=0.4") as handle:
        model.generate(**fields, **greedy(4))
        got = handle.stats()
    assert got.flops < got.flops_unpruned < got.flops_unreduced == whole.flops == whole.flops_unreduced
    assert got.bytes_read < got.bytes_read_unpruned < got.bytes_read_unreduced == whole.bytes_read
    assert got.kv_bytes_live < 0.7 * whole.kv_bytes_live
    assert got.visual_tokens == [count * 10 // 25 for count in whole.visual_tokens] and got.visual_tokens_in == whole.visual_tokens
    assert "visual_places" in got.to_dict() and "visual_places" not in whole.to_dict()
    alone = handle.stats(sequence=1)
    assert alone.visual_tokens_in == [50] and alone.visual_tokens == [20] and len(alone.visual_places[0]) == 20


def test_hidden_states_come_at_every_column(make_model):
    model = make_model()
    fields = models.inputs(model, rows_for("llava"))
    with dk.patch(model, "none", vision="uniform:keep=0.2"):
        want = model.generate(**fields, **greedy(3))
        got = model.generate(**fields, **greedy(3, output_hidden_states=True))
    assert_same(got, want)
    assert got.hidden_states[0][1].shape[1] == fields["input_ids"].shape[1]


def test_the_tower_runs_once_a_generation(make_model):
    model = make_model()
    fields = models.inputs(model, rows_for("llava"))
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        with dk.patch(model, "none", vision="fastervlm"):
            model.generate(**fields, **greedy(3))
    finally:
        hook.remove()
    assert len(calls) == 1 and "get_image_features" not in vars(model.model)


def test_functions_of_the_instance_come_back(make_model):
    """accelerate puts a ``forward`` of its own on modules."""
    model = make_model()
    fields = models.inputs(model, rows_for("llava"))
    tower = model.model.vision_tower
    layer = (tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder).layers[0]
    layer.forward = before = layer.forward
    try:
        with dk.patch(model, "none", vision="tome"):
            model.generate(**fields, **greedy(2))
        assert vars(layer)["forward"] is before
    finally:
        del layer.forward


# ---- what is left alone, and what is refused ---------------------------------------------------------------------------------------------


def test_a_model_with_its_own_cache_is_unreduced(make_model):
    import transformers

    model = make_model()
    fields = models.inputs(model, rows_for("llava"))
    want = model.generate(**fields, **greedy(4))
    logits = model(**fields).logits
    with dk.patch(model, "fixed", vision="aim"):
        own = transformers.DynamicCache(config=model.config.get_text_config())
        assert_same(model.generate(**fields, **greedy(4), **{cache_name(): own}), want, tolerance=0)
        assert_same(model.generate(**fields, **greedy(4, use_cache=False)), want)
        assert torch.equal(model(**fields).logits, logits)


def test_text_alone_is_the_unpatched_model(make_model):
    model = make_model()
    fields = models.inputs(model, [["text 5"], ["text 8"]])
    want = model.generate(**fields, **greedy(4))
    with dk.patch(model, "none", vision="aim") as handle:
        assert_same(model.generate(**fields, **greedy(4)), want)
        assert handle.stats().visual_tokens_in == [0, 0]


def test_embeddings_cannot_be_reduced(make_model):
    model = make_model()
    fields = single(model, ["text 3", "image", "text 4"])
    embeds = model.get_input_embeddings()(fields["input_ids"])
    with dk.patch(model, "none", vision="aim"):
        with pytest.raises(ValueError, match="input_ids and pixel values, no inputs_embeds"):
            model.generate(inputs_embeds=embeds, pixel_values=fields["pixel_values"], **greedy(2))
        with pytest.warns(UserWarning, match="passed on unreduced"):
            model.generate(inputs_embeds=embeds, **greedy(2))
        with pytest.raises(ValueError, match="features that no reducer has seen"):
            model.generate(**{k: v for k, v in fields.items() if k != "pixel_values"}, mm_encoder_outputs={"image": 1}, **greedy(2))
        with pytest.raises(ValueError, match=r"hold 25 image placeholders, but the images given make 50"):
            model.generate(**{**fields, "pixel_values": fields["pixel_values"].repeat(2, 1, 1, 1)}, **greedy(2))
        model.generate(**fields, **greedy(2))  # nothing is left behind by an error


def test_what_interpolation_forbids(make_model):
    model = make_model("llava_onevision", "qwen2")
    fields = single(model, ["text 3", "video", "text 4"])
    for name in MERGES_IN_TOWER:
        with dk.patch(model, "none", vision=name), pytest.raises(ValueError, match="interpolates this video's patches afterwards"):
            model.generate(**fields, **greedy(2))


def test_other_families_and_towers_are_refused(make_model, monkeypatch):
    model = copy.deepcopy(make_model())
    model.config.vision_config.model_type = "pixtral"
    for name in ("hired", "visionzip", "tome"):
        with pytest.raises(TypeError, match=f"'{name}' reads the vision tower, which is known of .*not of llava with pixtral; use aim"):
            dk.patch(model, "none", vision=name)
    for vision in (None, "aim"):  # which asks for nothing of the tower
        dk.patch(model, "none", vision=vision).unpatch()
    model = copy.deepcopy(make_model("llava_next", "llama"))
    model.config.vision_config.model_type = "pixtral"
    with pytest.raises(TypeError, match="know gemma3, .*vipllava; not llava_next with the tower pixtral"):
        dk.patch(model, "none", vision="aim")
    flash = copy.deepcopy(make_model())
    flash.config.vision_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'tome' adds log"):
        dk.patch(flash, "none", vision="tome")


def test_a_reduced_prompt_cannot_be_cropped(make_model):
    model = make_model()
    fields = single(model, ["text 3", "image", "text 4"])
    with dk.patch(model, "none", vision="aim"):
        cache = model.generate(**fields, **greedy(3)).past_key_values
        with pytest.raises(RuntimeError, match="vision reducers have shortened"):
            cache.crop(5)
        cache.crop(-1)


def test_oracle_rule_of_none_is_by_hand(make_model):
    """The two oracles of this file agree with each other."""
    model = make_model()
    fields = models.inputs(model, rows_for("llava"))
    rows = independent.reduced(model, fields, "fastervlm", keep=0.5)
    inner, shorter = compact(model, fields, rows)
    got = Oracle(inner, Rule("none")).generate(**shorter, **greedy())
    want = by_hand(model, fields, rows)
    assert got.sequences[:, shorter["input_ids"].shape[1] :].tolist() == want.sequences.tolist()
