"""The contents of vLLM's prefix cache: rows of prompts, which are dense, and not those of answers, which were computed while pruning.

The next turn of a chat then computes the answers before it anew, as of a fresh prompt, so that what it says does not depend on what the
cache still holds. A prompt's last row stays out too: a request that was preempted computes it again, and its policy's state begins there.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from dyrate_kernels.engines.vllm.engine import options_of

_PROMPT = "_dyrate_prompt"  # attribute of a vllm.v1.request.Request


def hook() -> None:
    """Lets schedulers of engines that prune keep answers out of the prefix cache, unless ``cache_answers`` is asked for. Once a process."""
    inner = Scheduler.__init__

    @functools.wraps(inner)
    def __init__(self: Any, *args: Any, **named: Any) -> None:
        inner(self, *args, **named)
        asked = options_of(self.vllm_config)
        if asked is not None and not asked.cache_answers:
            _prompts_alone(self.kv_cache_manager.coordinator)

    Scheduler.__init__ = __init__


def _prompts_alone(coordinator: Any) -> None:
    inner = coordinator.cache_blocks

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        # the prompt that it came with: vLLM's streaming input counts an answer as prompt once the next part comes
        prompt = vars(request).setdefault(_PROMPT, request.num_prompt_tokens)
        inner(request, min(num_computed_tokens, prompt - 1))

    coordinator.cache_blocks = cache_blocks
