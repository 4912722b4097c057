"""Whole requests as they are measured: the clock, several lengths off one run, what fits into the time, and what stands beside each row."""

from __future__ import annotations

import time
import types

import pytest
import torch

from dyrate_kernels import policies, request_model, specs
from dyrate_kernels.measuring import decoding, end_to_end, random_models, timing
from dyrate_kernels.measuring.decoding import Timeline
from dyrate_kernels.policies.base import ModelShape
from dyrate_kernels.request_model import Plan, Rates, Request, VisionShape

BANDWIDTH, FLOPS = 1e9, 1e10
TIMELINE = Timeline(0.5, (1.0, 3.0, 3.5, 4.0), 4.25)


@pytest.fixture(scope="module")
def toy():
    return random_models.build("toy", torch.device("cpu"))


def problem(model, new_tokens=12, shorter=(6,), batch=2):
    return end_to_end.Problem(
        "toy", model, lambda size: random_models.inputs(model, size, 20, 10), batch, new_tokens, "reference", 5, shorter
    )


@pytest.fixture(scope="module")
def rows(toy):
    """Of all set-ups, with a rate of products that is no measurement."""
    policy = end_to_end.falling_schedule(20, 2)
    setups = [
        *end_to_end.unpatched_setups(torch.device("cpu")),
        *end_to_end.policies_for(toy, policy, "falling", 0.2, vision="tome:keep=0.5"),
    ]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(timing, "product_rate", lambda *given: (FLOPS, None))
        return list(end_to_end.measure(problem(toy), setups, rounds=2, bandwidth=BANDWIDTH))


def at(rows, name, length):
    (found,) = (row for row in rows if row["name"] == name and row["new_tokens"] == length)
    return found


def test_each_set_up_has_a_row_a_length(rows):
    names = list(dict.fromkeys(row["name"] for row in rows))
    assert [(row["name"], row["new_tokens"]) for row in rows] == [(name, length) for name in names for length in (6, 12)]
    ours = [name.removeprefix("dyrate generate(), ") for name in names[2:]]
    retentions = ["recoverable", "evict", *(["pool of 25 %"] if "pool" in specs.RETENTIONS else [])]
    plain = [*(f"falling, {name}" for name in retentions), "FastV at 20.0 %, evict", "dense (policy none)"]
    assert ours == [*plain, "falling, recoverable, no switch", *(f"{name}, behind tome:keep=0.5" for name in plain)]
    for row in rows:
        assert row["median_us"] and row["encode_us"] < row["first_token_us"] < row["request_us"], row["name"]
        assert row["name"] == end_to_end.UNPATCHED or row["correct"]["passed"]


def test_shorter_lengths_are_read_off_the_long_run_but_for_a_static_cache(rows):
    for row in rows:
        static = "StaticCache" in row["name"]
        assert row["prefix_of"] == (12 if row["new_tokens"] == 6 and not static else None)
        assert (row["kv_live_bytes"] is None) == (row["prefix_of"] is not None)
    for name in {row["name"] for row in rows if "StaticCache" not in row["name"]}:
        short, long = at(rows, name, 6), at(rows, name, 12)
        assert short["first_token_us"] == long["first_token_us"] and short["encode_us"] == long["encode_us"]
        assert short["decode_us"] < long["decode_us"] and short["request_us"] < long["request_us"]
        assert short["bytes"] < long["bytes"] or "falling" in name
    evict = at(rows, "dyrate generate(), falling, evict", 6)
    assert evict["kept_by_step"] == [0.5] * 5 + [0.25]


def test_the_prediction_of_what_was_kept_stands_in_every_row(toy, rows):
    shape = ModelShape.from_config(toy.config, dtype=torch.float32)
    vision, crops = VisionShape.from_config(toy.config), ((2, 2),) * 5
    for row in rows:
        visual = 10 if "behind tome" in row["name"] else 20
        plan = Plan()
        if "kept_by_step" in row:
            plan = Plan(row["retention"], row["k"], tuple(row["kept_by_step"]))
        want = request_model.predict(
            Request(shape, 2, visual, 10, row["new_tokens"], vision, crops, 5, decoding.weight_bytes(toy)), plan, Rates(BANDWIDTH, FLOPS)
        )
        told = want.facts()
        assert row["predicted_bound"] == told.pop("predicted_bound")
        assert {name: row[name] for name in told} == pytest.approx(told, rel=1e-3), row["name"]
        assert row["predicted_request_us"] > 0 and row["predicted_largest_batch"] is None, "nothing says what fits on a CPU"
    dense, evict = (at(rows, f"dyrate generate(), {name}", 12) for name in ("dense (policy none)", "falling, evict"))
    assert evict["predicted_first_token_us"] < dense["predicted_first_token_us"]


def test_seconds_of_a_request_have_its_end():
    assert TIMELINE.request(4) == 4.25 and TIMELINE.request(2) == 3.25
    assert TIMELINE.gaps() == [0.5, 0.5] and TIMELINE.gaps(2) == [2.0]


def test_the_clock_waits_for_nothing_between_tokens(monkeypatch):
    """On a device: events alone, and one wait at each end."""
    waits, now = [], iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    layer = torch.nn.Identity()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    monkeypatch.setattr(decoding, "decoder_layers", lambda model: [layer])
    clock = decoding.Clock(types.SimpleNamespace(parameters=lambda: iter([types.SimpleNamespace(is_cuda=True)])))
    assert len(waits) == 1
    for _ in range(3):
        layer(torch.zeros(1))
        clock(None, torch.zeros(1))
    assert len(waits) == 1 and not layer._forward_pre_hooks, "only the first pass of the first layer is looked at"
    assert clock.timeline() == Timeline(1.0, (2.0, 3.0, 4.0), 5.0) and len(waits) == 2


def test_a_clock_leaves_no_hook_where_generate_failed(toy, monkeypatch):
    layer = decoding.decoder_layers(toy)[0]
    monkeypatch.setattr(toy, "generate", lambda **given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        end_to_end.run_once(problem(toy), end_to_end.Setup(end_to_end.UNPATCHED), {}, None)
    assert not layer._forward_pre_hooks


def test_without_a_switch_patch_is_given_none(toy):
    policy = policies.FastV()
    plain, alone = end_to_end.Setup("a", policy), end_to_end.Setup("a", policy, fuse=None)
    assert alone.arguments(True, "triton") == {"retention": "recoverable", "backend": "triton"}
    assert plain.arguments(True, "triton") == alone.arguments(True, "triton") | {"cuda_graph": True, "fuse": False}
    assert decoding.switches(None) == {} and decoding.switches(True) == {"cuda_graph": False, "fuse": True}


def test_what_does_not_fit_into_the_time_says_so(toy):
    setups = [end_to_end.Setup(end_to_end.UNPATCHED), end_to_end.Setup("fastv", policies.FastV(k=2))]
    with torch.no_grad():
        found = list(end_to_end.measure(problem(toy), setups, rounds=1, bandwidth=BANDWIDTH, until=time.monotonic() - 1))
    assert len(found) == 4 and all(row["median_us"] is None and row["note"] == end_to_end.OVER for row in found)


def runs(label, token, options=None):
    """One that warmed up with so many seconds a token."""
    warm = Timeline(0.0, tuple(1.0 + token * step for step in range(12)), 0.0)
    return end_to_end.Runs(end_to_end.Setup(label, options=options or {}), 1024, warm=warm)


def test_the_longest_and_of_these_the_slowest_are_shortened_first(monkeypatch, toy):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    for seconds, lengths in ((1000, [1024, 1024]), (80, [256, 1024]), (31, [256, 256]), (15, [64, 256]), (1, [64, 64])):
        found = [runs("slow", 0.1), runs("quick", 0.01)]
        end_to_end._shorten(problem(toy, 1024, (64, 256)), found, 1, seconds)
        assert [each.new_tokens for each in found] == lengths, seconds
    static = runs("static", 0.1, {"cache_implementation": "static"})
    end_to_end._shorten(problem(toy, 1024, (64, 256)), [static], 1, 1)
    assert static.new_tokens == 1024, "its cache is as long as its answer: another length is another set-up"


def test_an_early_end_leaves_the_room_of_the_whole(toy):
    setup = end_to_end.Setup("dense", policies.KeepAll(k=2))
    kept = end_to_end.Runs(setup, 12)
    end_to_end.run_once(problem(toy), setup, problem(toy).make_inputs(2), kept, stop=3)
    assert len(kept.warm.tokens) == 3 and not kept.timelines


def test_crops_and_pictures():
    for name, visual, crops, each in (("toy", 20, 5, (2, 2)), ("toy-onevision", 24, 5, (2, 2)), ("toy-qwen", 30, 1, (10, 12))):
        model = random_models.build(name, torch.device("cpu"))
        assert end_to_end.crops_in(model, random_models.inputs(model, 3, visual, 6), 3) == (each,) * crops
    clip = types.SimpleNamespace(
        config=types.SimpleNamespace(model_type="llava", vision_config=types.SimpleNamespace(image_size=336, patch_size=14))
    )
    assert [random_models.pictures(clip, 2880, name) for name in (None, "llava-1.5-7b", "llava-next-7b")] == [5, 5, 1]
