"""Predictions of whole requests against torch's own counter on real models, their tensors, and ``flops.generation_cost``."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import dyrate_kernels as dk
from dyrate_kernels import flops, policies, request_model
from dyrate_kernels.measuring import decoding, random_models
from dyrate_kernels.policies.base import ModelShape
from dyrate_kernels.request_model import Plan, Rates, Request, VisionShape, predict

ONE = Rates(1.0, 1.0)
TOYS = {"toy": 20, "toy-onevision": 24, "toy-qwen": 30}  # visual tokens; the last one's 10 x 12 patches leave windows that are cut off


@pytest.fixture(scope="module", params=TOYS)
def toy(request):
    """(model with eager attention, which the counter sees, name)."""
    model = random_models.build(request.param, torch.device("cpu"))
    model.set_attn_implementation("eager")
    return model, request.param


def asked(model, name, batch, new_tokens, text=6) -> Request:
    shape = ModelShape.from_config(model.config, dtype=torch.float32)
    # the whole and 2 x 2 tiles: at this size line breaks are a sixth of the tokens, and these do not tell how many
    crops = ((2, 2),) * 5 if name == "toy-onevision" else None
    return Request(shape, batch, TOYS[name], text, new_tokens, VisionShape.from_config(model.config), crops)


def counted(model, call) -> tuple[int, int]:
    """torch's count of the tower and projector, and of all the rest."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()
    text = sum(sum(each.values()) for place, each in counts.items() if place.endswith((".language_model", ".lm_head")))
    return counter.get_total_flops() - text, text


def test_flops_are_what_torch_counts(toy):
    model, name = toy
    fields = random_models.inputs(model, 3, TOYS[name], 6)
    one, four = (predict(asked(model, name, 3, tokens), Plan(), ONE) for tokens in (1, 4))
    rotary = [_rotary(model, length) for length in (TOYS[name] + 6, 1)]
    vision, text = counted(model, lambda: decoding.generate(model, fields, 1))
    assert vision == one.encode.flops > 0
    assert text - rotary[0] == one.prefill.flops > 0 and one.decode.flops == one.decode.seconds == 0
    vision, text = counted(model, lambda: decoding.generate(model, fields, 4))
    assert vision == four.encode.flops
    assert text - rotary[0] - 3 * rotary[1] == four.prefill.flops + four.decode.flops


def _rotary(model, length) -> int:
    """Some versions of transformers make the angles by a matrix product, which torch counts and we do not."""
    hidden = model.config.get_text_config().hidden_size
    positions = torch.arange(length)[None].expand(3, -1)
    if model.config.model_type == "qwen2_5_vl":
        positions = positions[:, None].expand(3, 3, -1)
    with FlopCounterMode(display=False) as counter:
        model.model.language_model.rotary_emb(torch.zeros(3, length, hidden), positions)
    return counter.get_total_flops()


def test_bytes_are_those_of_the_tensors(toy):
    model, name = toy
    request = asked(model, name, 2, 5)
    found = predict(request, Plan(), ONE)
    eye = [p for part, p in model.named_parameters() if "language_model" not in part and "lm_head" not in part]
    assert request_model.vision_parameters(request.vision) == sum(p.numel() for p in eye)
    assert found.encode.bytes == 4 * sum(p.numel() for p in eye)
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters())
    assert request_model.step_weight_bytes(request.shape) == decoding.weight_bytes(model)
    held = []
    for tokens in (1, 5):
        output = decoding.generate(model, random_models.inputs(model, 2, TOYS[name], 6), tokens, return_dict_in_generate=True)
        held.append(decoding.held_bytes(output))
    assert found.kv_bytes == held[1] > held[0]
    assert found.prefill.bytes == decoding.weight_bytes(model) + held[0]
    each = (held[1] - held[0]) // 4
    assert found.decode.bytes == sum(decoding.weight_bytes(model) + held[0] + step * each for step in (1, 2, 3, 4))
    assert found.peak_bytes == found.weight_bytes + found.kv_bytes


@pytest.mark.parametrize("retention", ["recoverable", "evict", "pool"])
def test_a_patched_answer_is_what_is_predicted(toy, retention):
    """``stats()`` counts what a real generation did: FLOPs and bytes of every pass, rows that are held at its end."""
    model, name = toy
    visual = TOYS[name]
    policy = policies.Schedule(k=2, kept=[(0, visual // 2), (3, visual // 4)])
    pool = {"pool": 0.5} if retention == "pool" else {}
    with dk.patch(model, policy, retention=retention, backend="reference", **pool) as handle:
        decoding.generate(model, random_models.inputs(model, 2, visual, 6), 6)
        stats = handle.stats()
    kept, assumed = request_model.kept_of(policy, visual, 6)
    found = predict(asked(model, name, 2, 6), Plan(retention, 2, kept, 0.5), ONE)
    assert not assumed and [round(share * visual) for share in kept] == [visual // 2, *(step.kept[0] for step in stats.steps[1:])]
    assert found.prefill.flops + found.decode.flops == pytest.approx(stats.flops)
    table = stats.bytes_read - 5 * decoding.weight_bytes(model)  # what stats() reads beside: rows, and the embedding table of each step
    shape = asked(model, name, 2, 6).shape
    embedding = 5 * (flops.weight_bytes(shape) - request_model.step_weight_bytes(shape))
    assert found.decode.bytes == pytest.approx(5 * decoding.weight_bytes(model) + table - embedding)
    dense = predict(asked(model, name, 2, 6), Plan(), ONE)
    assert found.decode.bytes < dense.decode.bytes and (found.prefill.flops < dense.prefill.flops) == (retention != "recoverable")
    row = flops.kv_bytes_per_token(shape) // shape.num_layers
    dropped = (shape.num_layers - 2) * (visual // 2 - visual // 4) * 2 if retention == "evict" else 0  # after the prompt
    assert found.kv_bytes == stats.kv_bytes_live + dropped * row


@pytest.mark.parametrize("retention", ["dense", "recoverable", "evict", "pool"])
def test_a_request_is_the_sum_of_its_passes(retention):
    """By ``flops.generation_cost``, whose FLOPs and bytes are compared with plain loops elsewhere."""
    shape = flops.named_model("llava-next-7b").shape
    shares = (0.5, 0.25, 0.125, 0.125)
    counts = {"dense": [2880] * 4, "pool": [720, 720, 360, 360]}.get(retention, [1440, 720, 360, 360])
    cost = flops.generation_cost(
        shape, text_rows=[64] * 2, visual_tokens=[2880] * 2, group_layers=[3, 29], kept=[[[2880] * 2, [count] * 2] for count in counts],
        prefill_shrunk=retention in ("evict", "pool"), weights=request_model.step_weight_bytes(shape),
    )  # fmt: skip
    found = predict(Request(shape, 2, 2880, 64, 4), Plan(retention, 3, shares, 0.25), ONE)
    assert found.prefill.flops == pytest.approx(cost.prefill_flops, rel=1e-12)
    assert found.decode.flops == pytest.approx(cost.flops - cost.prefill_flops, rel=1e-12)
    assert found.decode.bytes == pytest.approx(cost.bytes_read, rel=1e-12)
    held = {"evict": 1440, "pool": 720}.get(retention, 2880)
    row = flops.kv_bytes_per_token(shape) // 32
    assert found.kv_bytes == 2 * row * (3 * 2880 + 29 * held + 32 * 67)
    assert found.encode.flops == found.encode.bytes == 0


def test_a_phase_takes_the_longer_of_its_two_times():
    request = request_model.named_request("llava-1.5-7b", 2, 3)
    once = predict(request, Plan(), ONE)
    slow, fast = 1e9, 1e18
    for rates, part in ((Rates(fast, slow), "flops"), (Rates(slow, fast), "bytes")):
        found = predict(request, Plan(), rates)
        for name in ("encode", "prefill", "decode"):
            phase = getattr(found, name)
            assert phase.seconds == pytest.approx(getattr(getattr(once, name), part) / slow)
            assert phase.bound == {"flops": "compute", "bytes": "bandwidth"}[part]
        assert found.seconds == pytest.approx(found.encode.seconds + found.prefill.seconds + found.decode.seconds)
        assert found.first_token == pytest.approx(found.encode.seconds + found.prefill.seconds)
        assert found.images_per_s == pytest.approx(2 / found.seconds) and found.tokens_per_s == pytest.approx(6 / found.seconds)
    shape = flops.named_model("llava-1.5-7b").shape
    crossing = Request(shape, 1, 0, 0, 3)  # a step that waits for compute and one that waits for bytes: each takes its own
    steps = [predict(dataclasses.replace(crossing, text=text, new_tokens=2), Plan(), ONE).decode for text in (0, 1)]
    assert predict(crossing, Plan(), ONE).decode.flops == sum(step.flops for step in steps)
    between = Rates(1.0, np.mean([step.flops / step.bytes for step in steps]))
    want = sum(max(step.flops / between.flops, step.bytes) for step in steps)
    assert predict(crossing, Plan(), between).decode.seconds == pytest.approx(want, rel=1e-12)


def test_facts_stand_beside_a_measured_row():
    found = predict(request_model.named_request("llava-1.5-7b", 2, 3), Plan(), ONE)
    facts = found.facts()
    assert all(name.startswith("predicted_") for name in facts)
    assert facts["predicted_request_us"] == pytest.approx(facts["predicted_first_token_us"] + facts["predicted_decode_us"])
    assert set(facts["predicted_bound"]) == {"encode", "prefill", "decode"}
    assert {"encode", "seconds", "first_token_seconds", "images_per_s"} <= found.to_dict().keys()


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.5-13b", "llava-onevision-7b", "qwen2.5-vl-7b"])
def test_named_towers_are_those_of_the_random_models(name):
    """Without their numbers: on the meta device."""
    model = random_models.build(name, torch.device("meta"))
    assert request_model.VISION[name] == VisionShape.from_config(model.config)
    held = sum(p.numel() for part, p in model.named_parameters() if "language_model" not in part and "lm_head" not in part)
    assert request_model.vision_parameters(request_model.VISION[name]) == held


def test_named_towers_are_the_published_configs():
    text = {"model_type": "llama", "vocab_size": 32064}
    assert request_model.VISION["llava-next-7b"] == VisionShape.from_config(transformers.LlavaNextConfig(text_config=text))
    assert request_model.VISION["llava-1.5-7b"] == VisionShape.from_config(transformers.LlavaConfig(text_config=text))
    assert request_model.VISION["video-llava-7b"].crop_tokens == 257
    assert set(request_model.VISION) == set(flops.MODELS)
    with pytest.raises(ValueError, match="CLIP or SigLIP, or of a Qwen2.5-VL, got 'video_llava'"):
        VisionShape.from_config(transformers.VideoLlavaConfig())


def test_pictures_and_crops():
    clip, qwen = request_model.VISION["llava-next-7b"], request_model.VISION["qwen2.5-vl-7b"]
    assert request_model.crops_of(clip, 2880) == [(24, 24)] * 5 and request_model.crops_of(clip, 0) == []
    assert request_model.crops_of(qwen, 1280) == [(64, 80)]
    assert len(request_model.crops_of(request_model.VISION["llava-onevision-7b"], 3699)) == 5
    pictures = {name: request_model.pictures_of(name, model.visual_tokens) for name, model in flops.MODELS.items()}
    assert set(pictures.values()) == {1}
    assert request_model.pictures_of("llava-next-7b", 5760) == 2


def test_kept_shares():
    fastv = policies.FastV(rate=0.75)
    assert request_model.kept_of(fastv, 576, 9) == ((0.25,), False)
    assert request_model.kept_of(policies.KeepAll(), 576, 9) == ((1.0,), False)
    assert request_model.kept_of(policies.DyRate(), 576, 9) == ((request_model.ASSUMED_KEPT,), True)
    late = policies.Schedule(kept=[(2, 600), (3, 288)])
    assert request_model.kept_of(late, 576, 5) == ((1.0, 1.0, 1.0, 0.5, 0.5), False)
    assert Plan("pool", 3, (0.5, 0.125), 0.25).read(3).tolist() == [0.25, 0.125, 0.125]


def test_largest_batch_fits_and_one_more_does_not():
    rates = request_model.named_rates("h200")
    request = request_model.named_request("llava-next-7b", 1, 256)
    for plan in (Plan(), Plan("evict", 3, 0.25)):
        most = request_model.largest_batch(request, plan, rates)
        peaks = [predict(dataclasses.replace(request, batch=batch), plan, rates).peak_bytes for batch in (most, most + 1)]
        assert peaks[0] <= rates.memory < peaks[1]
    assert request_model.largest_batch(request, Plan(), ONE) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: request_model.named_rates("h300"), "device must be one of h200, .* got 'h300'"),
        (lambda: request_model.named_request("gpt", 1, 1), "model must be one of"),
        (lambda: request_model.named_request("llava-1.5-7b", 0, 1), "at least 1, got 0 and 1"),
        (lambda: request_model.named_request("llava-1.5-7b", 1, 1, visual=-1), "at least 0, got -1"),
        (lambda: Plan("keep"), "retention must be one of dense, .*got 'keep'"),
        (lambda: Plan(kept=1.5), r"in \[0, 1\], got 1.5"),
        (lambda: Plan(kept=()), r"in \[0, 1\]"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
