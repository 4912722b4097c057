"""Mixes of requests and settings of the engine: none changes a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import dyrate_kernels as dk
from tests.engines.vllm import kit, models

FIXED: dict[str, Any] = {"policy": "fixed", "k": 3, "rate": 0.75}
DYRATE: dict[str, Any] = {"policy": "dyrate", "k": 3}
SMALL_CACHE = 33 * 81920  # bytes: 33 blocks of 32 rows, one more than a sequence may have; requests of 166 rows and more must make way


def check(place: Any, options: dict[str, Any], requests: Any, got: kit.Run) -> None:
    rest = {name: value for name, value in options.items() if name != "policy"}
    result = kit.compare(place, dk.policies.get(options["policy"], **rest), requests, got)
    assert result.unequal == []
    assert result.changed > 0, "the policy changes nothing: equality says nothing"


@pytest.mark.parametrize("options", [FIXED, DYRATE], ids=["fixed", "dyrate"])
def test_requests_that_come_and_go_with_pictures_in_pieces(folder, options):
    place, requests = folder("llava"), kit.mix(12, together=False)
    got = kit.engine(place, options, requests, max_num_batched_tokens=96)
    check(place, options, requests, got)


@pytest.mark.parametrize("options", [FIXED, DYRATE], ids=["fixed", "dyrate"])
def test_a_second_time_from_the_prefix_cache(folder, options):
    place, requests = folder("llava"), kit.mix(5)
    got = kit.engine(place, options, [requests, requests], enable_prefix_caching=True, max_num_batched_tokens=192)
    assert sum(got.cached[len(requests) :]) > 32 * len(requests), "too little came from the cache"
    check(place, options, [*requests, *requests], got)


@pytest.mark.parametrize("options", [FIXED, DYRATE], ids=["fixed", "dyrate"])
def test_preempted_requests_begin_again(folder, options):
    place, requests = folder("llava"), kit.mix(10, tokens=64)
    got = kit.engine(place, options, requests, kv_cache_memory_bytes=SMALL_CACHE, max_num_batched_tokens=192)
    assert got.counters["vllm:num_preemptions"] > 0
    check(place, options, requests, got)


def test_aborted_requests_leave_their_places_clean(folder):
    place = folder("llava")
    requests = [replace(request, aborted=5 if i % 3 == 1 else None) for i, request in enumerate(kit.mix(12, together=False))]
    got = kit.engine(place, DYRATE, requests, max_num_seqs=4, max_num_batched_tokens=192)
    check(place, DYRATE, requests, got)


def test_tensor_parallel_ranks_take_one_decision(folder):
    place, requests = folder("llava"), kit.mix(6)
    got = kit.engine(place, DYRATE, requests, in_process=False, tensor_parallel_size=2)
    check(place, DYRATE, requests, got)


def test_the_engine_in_a_process_of_its_own(folder):
    place, requests = folder("llava"), kit.mix(4)
    got = kit.engine(place, FIXED, requests, in_process=False)
    check(place, FIXED, requests, got)


def test_compiled(folder):
    place, requests = folder("llava"), kit.mix(5)
    got = kit.engine(place, DYRATE, requests, enforce_eager=False)
    check(place, DYRATE, requests, got)


@pytest.mark.parametrize("options", [FIXED, DYRATE], ids=["fixed", "dyrate"])
def test_drafts_of_n_grams(folder, options):
    place, requests = folder("llava"), kit.mix(6, tokens=60)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    got = kit.engine(place, options, requests, speculative_config=drafts)
    assert got.counters["vllm:spec_decode_num_draft_tokens"] > 0
    check(place, options, requests, got)


def test_vtw_gives_blocks_back_and_says_the_same(folder):
    place, requests = folder("llava"), kit.mix(8, tokens=64)
    options = {"policy": "vtw", "k": 3, "retention": "evict"}
    got = kit.engine(place, options, requests, kv_cache_memory_bytes=2 * SMALL_CACHE, max_num_batched_tokens=192)
    check(place, {"policy": "vtw", "k": 3}, requests, got)
    image = models.load(place)[0].config.image_token_id
    assert got.freed >= sum(blocks_within(prompt, image) for prompt in got.prompts) > 0


def blocks_within(prompt: list[int], image: int, size: int = kit.USUAL["block_size"]) -> int:
    """Blocks of a prompt's rows that hold nothing but visual tokens."""
    return sum(all(token == image for token in prompt[i : i + size]) for i in range(0, len(prompt) - size + 1, size))


def test_two_hundred_requests_hold_no_more_memory(folder):
    place = folder("llava")
    rounds = [kit.mix(40, tokens=6, first=1000 * number) for number in range(5)]
    got = kit.engine(place, DYRATE, rounds, mm_processor_cache_gb=0)
    assert got.held[-1] <= got.held[1], got.held
    assert got.memory[-1] - got.memory[1] < 48 << 20, got.memory
    requests = [request for part in rounds for request in part]
    check(place, DYRATE, requests[-10:], replace(got, tokens=got.tokens[-10:], prompts=got.prompts[-10:]))
