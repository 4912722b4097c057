"""Rows that enter the prefix cache."""

from __future__ import annotations

from types import SimpleNamespace


def test_answers_stay_out_when_streaming_input_makes_prompt_of_them():
    """vLLM appends an answer's tokens to the prompt of a session when its next part comes: their rows were computed while pruning."""
    from dyrate_kernels.engines.vllm.prefix_cache import _prompts_alone

    cached: list[int] = []
    coordinator = SimpleNamespace(cache_blocks=lambda request, count: cached.append(count))
    _prompts_alone(coordinator)
    request = SimpleNamespace(num_prompt_tokens=100)
    for computed in (64, 100, 140):
        coordinator.cache_blocks(request, computed)
    request.num_prompt_tokens = 180
    for computed in (180, 220):
        coordinator.cache_blocks(request, computed)
    assert cached == [64, 99, 99, 99, 99]
