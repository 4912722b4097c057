"""Blocks that go back to the pool: under ``vtw`` with retention ``evict`` no answer row reads a visual token from layer k on.

Those layers have a kind of cache of their own, so that vLLM gives them block tables of their own; its manager frees, once a prompt is
through, the blocks that hold nothing but visual tokens. What a block holds never changes, so the prefix cache stays true. Prompts are
dense, as under ``recoverable``, whose tokens come out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from dyrate_kernels.engines.vllm.engine import bound, options_of, shape_of, spans_of


@dataclass(frozen=True, kw_only=True)
class WithdrawnSpec(AttentionSpec):
    """The cache of a layer without visual tokens. Not a ``FullAttentionSpec``: vLLM would put those into the first layers' group."""

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """As of a full cache: a prompt needs it whole."""
        return cdiv(vllm_config.model_config.max_model_len, self.block_size) * self.page_size_bytes


class WithdrawnManager(FullAttentionManager):
    """Blocks of such layers.

    Attributes:
        freed: how many went back before their requests ended, so far.
    """

    def __init__(self, kv_cache_spec: Any, **named: Any) -> None:
        super().__init__(kv_cache_spec, **named)
        self.freed = 0
        self._spans: dict[str, tuple[tuple[int, int], ...]] = {}

    def note(self, request: Any) -> None:
        """``vllm.v1.request.Request``, before its first block is taken."""
        if request.request_id not in self._spans:
            self._spans[request.request_id] = spans_of(request.mm_features)

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, **named: Any) -> Any:
        """As of a full cache."""
        spec = named["kv_cache_spec"]
        named["kv_cache_spec"] = FullAttentionSpec(
            block_size=spec.block_size, num_kv_heads=spec.num_kv_heads, head_size=spec.head_size, dtype=spec.dtype
        )
        return super().find_longest_cache_hit(*args, **named)

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None) -> None:
        """Frees what holds nothing but visual tokens, once the prompt's last row was computed."""
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        before = self.block_pool.get_num_free_blocks()
        for first, last in self._spans.get(request_id, ()):
            self._remove_blocks_in_range(request_id, cdiv(first, self.block_size), (last + 1) // self.block_size)
        self.freed += self.block_pool.get_num_free_blocks() - before

    def free(self, request_id: str) -> None:
        """The request has ended, or is preempted."""
        self._spans.pop(request_id, None)
        super().free(request_id)


def hook() -> None:
    """Gives layers their kind of cache, and shows requests to its manager. Once a process."""
    KVCacheSpecRegistry._ensure_registered()  # else ours, being first, would keep vLLM's own from being registered
    KVCacheSpecRegistry.register(WithdrawnSpec, WithdrawnManager, WithdrawnSpec)
    of_layer, allocate = Attention.get_kv_cache_spec, KVCacheManager.allocate_slots

    @functools.wraps(of_layer)
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec, asked = of_layer(self, vllm_config), options_of(vllm_config)
        if asked is None or not asked.evict or not isinstance(spec, FullAttentionSpec):
            return spec
        if extract_layer_index(self.layer_name) < bound(asked, shape_of(vllm_config)).k:
            return spec
        return WithdrawnSpec(
            block_size=spec.block_size, num_kv_heads=spec.num_kv_heads, head_size=spec.head_size, head_size_v=spec.head_size_v,
            dtype=spec.dtype, kv_quant_mode=spec.kv_quant_mode,
        )  # fmt: skip

    @functools.wraps(allocate)
    def allocate_slots(self: Any, request: Any, *args: Any, **named: Any) -> Any:
        for manager in self.coordinator.single_type_managers:
            if isinstance(manager, WithdrawnManager):
                manager.note(request)
        return allocate(self, request, *args, **named)

    Attention.get_kv_cache_spec, KVCacheManager.allocate_slots = get_kv_cache_spec, allocate_slots
