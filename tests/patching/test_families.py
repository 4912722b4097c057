"""Families beyond LLaVA: rotary positions in three dimensions, visual features after several layers, prompts read in both directions."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from transformers.masking_utils import create_causal_mask

import dyrate_kernels as dk
from dyrate_kernels.families import FAMILIES
from dyrate_kernels.generation import cpu_step
from dyrate_kernels.patching import graph
from dyrate_kernels.patching.lookup import cache_name
from tests import models
from tests.checks import (
    METHODS,
    RETENTIONS,
    ROWS,
    VIDEO_ROWS,
    assert_close_logits,
    assert_same,
    assert_same_decisions,
    greedy,
    logits,
    patched,
    single,
)
from tests.fake_graph import TapeRecorder
from tests.oracle import Oracle, Rule, Turn
from tests.patching import test_modes as modes

KNOWS_BLOCKS = "block_sequence_ids" in inspect.signature(create_causal_mask).parameters  # else those two families are refused
AHEAD_NAMES = [name for name, family in FAMILIES.items() if family.sees_ahead]
HERE = [variant for variant in models.MORE_VARIANTS if KNOWS_BLOCKS or variant[0] not in AHEAD_NAMES]
VARIANTS = pytest.mark.parametrize(("family", "text"), HERE, ids=["-".join(v) for v in HERE])
RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
QWEN = pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
AHEAD = pytest.mark.parametrize("family", AHEAD_NAMES if KNOWS_BLOCKS else [])


def rows_of(family):
    return ROWS[:3] + VIDEO_ROWS if models.BUILDERS[family].videos else ROWS


# The oracle computes every row anew. Older versions of transformers give generated tokens the type of PaliGemma's prompt then.
TYPES_GROW = "_update_model_kwargs_for_generation" in vars(transformers.PaliGemmaForConditionalGeneration)


def needs_types(family):
    if FAMILIES[family].sees_ahead and not KNOWS_BLOCKS:
        pytest.skip("this transformers has other masks")
    if family == "paligemma" and not TYPES_GROW:
        pytest.skip("this transformers gives generated tokens the type of the prompt where nothing is cached")


def against_oracle(model, fields, rule, retention, length=6):
    needs_types(model.config.model_type)
    oracle = Oracle(model, rule, retention)
    want = oracle.generate(**fields, **greedy(length))
    with patched(model, rule, retention) as handle:
        got = model.generate(**fields, **greedy(length))
        stats = handle.stats()
    assert_same(got, want)
    assert_same_decisions(stats, oracle)


def test_every_family_of_the_table_is_tested():
    assert set(models.BUILDERS) == set(FAMILIES)


@VARIANTS
@RETENTION
def test_keep_all_is_the_unpatched_model(make_model, family, text, retention):
    model = make_model(family, text)
    fields = models.inputs(model, rows_of(family))
    want = model.generate(**fields, **greedy())
    for rule in (Rule("none"), Rule("fixed", k=2, rate=0.0)):
        with patched(model, rule, retention):
            assert_same(model.generate(**fields, **greedy()), want)
    assert_same(model.generate(**fields, **greedy()), want, tolerance=0)  # unpatched again


@VARIANTS
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fastv-mean", "depth", "sparsevlm-k2", "aim", "vtw"])
def test_method(make_model, family, text, method, retention):
    model = make_model(family, text)
    against_oracle(model, models.inputs(model, rows_of(family)), METHODS[method], retention)


@VARIANTS
@RETENTION
def test_other_shapes_of_the_text_model(make_model, family, text, retention):
    model = make_model(family, text, num_key_value_heads=4, seed=3)
    against_oracle(model, models.inputs(model, rows_of(family), seed=5), METHODS["fixed"], retention)


@VARIANTS
@RETENTION
@pytest.mark.parametrize("mode", ["sampling", "beams"])
def test_mode(make_model, family, text, retention, mode):
    needs_types(family)
    rows = ROWS[:3] if mode == "sampling" or not models.BUILDERS[family].row_holds_pictures else [ROWS[0], ROWS[3]]
    modes._mode(make_model(family, text), rows, METHODS["dyrate"], retention, modes.MODES[mode])


@VARIANTS
@RETENTION
def test_prompt_lookup(make_model, family, text, retention):
    model, options = make_model(family, text), {"prompt_lookup_num_tokens": 3, "eos_token_id": -1}
    if family != "paligemma":
        return modes._drafted(model, METHODS["dyrate"], retention, **options)
    # transformers gives the drafts of the first pass the token type of the prompt; unpatched, they are read in both directions
    fields = modes._echo(model, ["text 5", "image", "text 8"])
    want = Oracle(model, METHODS["dyrate"], retention, frozen=True).generate(**fields, **greedy(14))
    with patched(model, METHODS["dyrate"], retention):
        assert_same(model.generate(**fields, **greedy(14, **options)), want)


@pytest.mark.skipif(not KNOWS_BLOCKS, reason="this transformers is refused with this family")
@RETENTION
def test_drafts_after_a_picture_at_the_end_are_no_part_of_it(make_model, retention):
    """Gemma 3 reads a picture in both directions, and transformers gives drafts the token type of what they follow."""
    model = make_model("gemma3", "own")
    fields, assistant = single(model, ["image", "text 6", "image"]), copy.deepcopy(model)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    with patched(model, METHODS["fastv"], retention):
        want = model.generate(**fields, **greedy(8))
        assert_same(model.generate(**fields, **greedy(8, assistant_model=assistant)), want)


@VARIANTS
@RETENTION
def test_two_turns_of_chat(make_model, family, text, retention):
    model = make_model(family, text)
    rule = METHODS["dyrate"]
    fields = models.inputs(model, rows_of(family))
    with patched(model, Rule("none"), retention):
        first = model.generate(**fields, **greedy(4))
    generator = torch.Generator().manual_seed(1)
    now = modes._extend(first, fields, 4, generator)
    more = types_of(family, now["input_ids"], fields)
    plain = model.generate(**fields, **greedy(4))
    want = model.generate(**now, **more, **{cache_name(): plain.past_key_values}, **greedy(4))
    with patched(model, Rule("none"), retention):
        got = model.generate(**now, **more, **{cache_name(): first.past_key_values}, **greedy(4))
        assert_same(got, want)
    oracle = Oracle(model, rule, retention)
    pictures = {name: value for name, value in fields.items() if name not in ("input_ids", "attention_mask")}
    with patched(model, rule, retention):
        first = model.generate(**fields, **greedy(4))
        now = modes._extend(first, fields, 4, torch.Generator().manual_seed(1))
        more = types_of(family, now["input_ids"], fields)
        start = first.sequences.shape[1] - 1
        before = [Turn(0, fields["input_ids"].shape[1])]
        want = oracle.generate(before=before, start=start, **now, **{**pictures, **more}, **greedy(4))
        got = model.generate(**now, **more, **{cache_name(): first.past_key_values}, **greedy(4))
    assert_same(got, want)


def types_of(family, ids, fields):
    """Token types of the whole conversation, as its processor would give them."""
    if family == "gemma3":
        return {"token_type_ids": (ids == models.IMAGE_TOKEN).long()}
    if family == "paligemma":  # what comes after the first prompt is causal
        first = fields["token_type_ids"]
        return {"token_type_ids": torch.cat([first, first.new_ones(ids.shape[0], ids.shape[1] - first.shape[1])], 1)}
    if family.startswith("qwen"):
        return {"mm_token_type_ids": (ids == models.IMAGE_TOKEN).int() + 2 * (ids == models.VIDEO_TOKEN).int()}
    return {}


@VARIANTS
@RETENTION
def test_padded_row_is_the_row_alone(make_model, family, text, retention):
    model = make_model(family, text)
    rows = rows_of(family)
    with patched(model, METHODS["dyrate"], retention):
        together = logits(model.generate(**models.inputs(model, rows), **greedy()))
        alone = [logits(model.generate(**single(model, row), **greedy())) for row in rows]
    for b, want in enumerate(alone):
        assert_close_logits(together[:, b : b + 1], want)


@VARIANTS
def test_decode_steps_wait_for_nothing(make_model, host_sync, monkeypatch, family, text):
    """None that this package asks for, on the way that a GPU takes; what transformers itself does is its own."""
    monkeypatch.setattr(cpu_step, "enabled", False)
    model = make_model(family, text)
    mode = host_sync()
    with patched(model, METHODS["dyrate"]), modes._DecodeSteps(model, mode) as watched:
        model.generate(**models.inputs(model, rows_of(family)[:2]), **greedy(4))
    assert watched.steps == 3 and not mode.ours(), mode.ours()


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fastv", "pyramiddrop-k2"])
@pytest.mark.parametrize("family", ["internvl", "idefics3", "qwen2_5_vl", "qwen3_vl"])
def test_chunked_prefill(make_model, family, method, retention):
    text = dict(models.MORE_VARIANTS)[family]
    modes._chunked(make_model(family, text), rows_of(family), METHODS[method], retention, 10)


# -- what is particular --------------------------------------------------------------------------------------------------------------------


@AHEAD
@RETENTION
def test_prompts_are_read_in_both_directions(make_model, family, retention):
    """Without its token types the same prompt is causal, and gives other logits: patched as unpatched."""
    model = make_model(family, "own")
    fields = models.inputs(model, ROWS[:2])
    causal = {name: value for name, value in fields.items() if name != "token_type_ids"}
    want = model.generate(**causal, **greedy())
    with patched(model, Rule("none"), retention):
        assert_same(model.generate(**causal, **greedy()), want)
        both = model.generate(**fields, **greedy())
    assert (logits(both)[0] - logits(want)[0]).abs().max() > 1e-3


@RETENTION
@pytest.mark.parametrize("rows", [[["text 3", "image", "image", "text 2"]], [["image", "text 3"], ["text 9"]]], ids=str)
def test_where_the_image_stands_in_gemma(make_model, rows, retention):
    model = make_model("gemma3", "own")
    against_oracle(model, models.inputs(model, rows), METHODS["fixed"], retention)


@RETENTION
def test_windows_of_gemma(make_model, retention):
    """Windows of other lengths, some longer than the prompt."""
    for window in (5, 30, 200):
        model = make_model("gemma3", "own", sliding_window=window)
        against_oracle(model, models.inputs(model, ROWS), METHODS["fastv-mean"], retention, length=10)


@QWEN
def test_positions_are_not_columns(make_model, family):
    """The text after a picture stands at other rotary positions than its column."""
    model = make_model(family, "own")
    fields = single(model, ["text 3", "image", "text 6"])
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(lambda m, a, k: seen.append(k["position_ids"]), with_kwargs=True)
    try:
        with patched(model, METHODS["fixed"], "evict"):
            model.generate(**fields, **greedy(3))
    finally:
        hook.remove()
    length = fields["input_ids"].shape[1]
    assert int(seen[0][-1].max()) < length - 1 and int(seen[1][-1].max()) == int(seen[0][-1].max()) + 1


def test_deepstack_needs_a_later_k(make_model):
    model = make_model("qwen3_vl", "own")
    for policy in (dk.policies.FastV(k=1, rate=0.5), dk.policies.PyramidDrop(k=1)):
        with pytest.raises(ValueError, match="k must be at least 2 for this qwen3_vl with retention='evict', got 1"):
            dk.patch(model, policy, retention="evict")
        dk.patch(model, policy).unpatch()
    dk.patch(model, dk.policies.FastV(k=2, rate=0.5), retention="evict").unpatch()
    rule = Rule("fixed", k=1, rate=0.6)
    against_oracle(model, models.inputs(model, rows_of("qwen3_vl")), rule, "recoverable")


@pytest.mark.skipif(not KNOWS_BLOCKS, reason="this transformers has other masks")
def test_softcapping_is_refused():
    config = models.config("paligemma", "own")
    fields = {name: getattr(config.text_config, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    text = transformers.Gemma2Config(**fields, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=config.vision_config, image_token_index=models.IMAGE_TOKEN, projection_dim=models.HIDDEN
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    with pytest.raises(TypeError, match="'gemma2' of this paligemma is not supported; supported: gemma"):
        dk.patch(model)


@pytest.mark.parametrize("kind", ["Qwen3VLMoe", "Mllama", "Blip2"])
def test_others_are_refused(kind):
    class Config:
        model_type = {"Qwen3VLMoe": "qwen3_vl_moe", "Mllama": "mllama", "Blip2": "blip-2"}[kind]

    class Model(torch.nn.Module):
        config = Config()

    with pytest.raises(TypeError, match=f"{Config.model_type}.*not supported; supported: gemma3, idefics3, .*qwen3_vl, smolvlm"):
        dk.patch(Model())


def pixtral():
    """A LLaVA whose pictures are of any size (Pixtral-12B as transformers holds it), and inputs for it."""
    tower = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=models.text_config("mistral"), image_token_index=models.IMAGE_TOKEN,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    models.draw(model, torch.Generator().manual_seed(5))
    models._settle(model)
    generator = torch.Generator().manual_seed(2)
    sizes = [(16, 24), (24, 16), (20, 20)]
    pixels = torch.zeros(3, 3, 24, 24)
    for picture, (high, wide) in zip(pixels, sizes, strict=True):
        picture[:, :high, :wide] = torch.randn(3, high, wide, generator=generator)
    counts = [high // 4 * (wide // 4) for high, wide in sizes]
    image = models.IMAGE_TOKEN
    rows = [[5, 6, *[image] * counts[0], 7, 8, 9], [7, *[image] * counts[1], 5, *[image] * counts[2], 8, 9, 10, 11]]
    width = max(map(len, rows))
    fields = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
    }
    return model, fields


@RETENTION
def test_pixtral_tower(retention):
    model, fields = pixtral()
    want = model.generate(**fields, **greedy())
    with patched(model, Rule("none"), retention):
        assert_same(model.generate(**fields, **greedy()), want)
    against_oracle(model, fields, METHODS["dyrate"], retention)


@VARIANTS
def test_parameters_are_what_the_text_model_has(make_model, family, text):
    model = make_model(family, text)
    own = {id(tensor): tensor.numel() for module in (model.get_decoder(), model.lm_head) for tensor in module.parameters()}
    assert dk.flops.parameters(dk.policies.ModelShape.from_config(model.config)) == sum(own.values())


@VARIANTS
@RETENTION
def test_replayed_steps(make_model, monkeypatch, family, text, retention):
    """A captured decode step (a tape in place of the graph) gives the eager tokens and kept counts."""
    model = make_model(family, text)
    fields = models.inputs(model, ROWS[:2])
    recorder = TapeRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    with patched(model, METHODS["dyrate"], retention, cuda_graph=False) as handle:
        want, stats = model.generate(**fields, **greedy(8)), handle.stats()
    with patched(model, METHODS["dyrate"], retention) as handle:
        assert_same(model.generate(**fields, **greedy(8)), want)
        assert handle.graph.off is None and (handle.graph.captures, handle.graph.replays) == (1, 6)
        assert [step.kept for step in handle.stats().steps] == [step.kept for step in stats.steps]
