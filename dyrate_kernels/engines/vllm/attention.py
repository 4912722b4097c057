"""vLLM's attention backends with answer rows read by the paged operators: of each a subclass that is vLLM's where nothing is pruned.

A backend is made of one of vLLM's by ``over``. Rows of prompts, of requests without visual tokens and of layers that no policy touches go
through vLLM's own kernel; the cache is written by vLLM alone.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from dyrate_kernels.engines.vllm.engine import Engine, engine_of, options_of
from dyrate_kernels.engines.vllm.pruning import LayerCache
from dyrate_kernels.engines.vllm.steps import Others, Step

_STEP = "dyrate"  # attribute of a step's metadata


class Planned:
    """A step and what its layers need of vLLM's metadata.

    Attributes:
        engine: whose step it is.
        step: its rows.
        others: vLLM's metadata of ``step.others``; None: there are none.
        block_table: int32 ``[requests, M]``.
    """

    def __init__(self, engine: Engine, step: Step, others: Any, block_table: Tensor) -> None:
        self.engine, self.step, self.others, self.block_table = engine, step, others, block_table
        self.read: dict[str, Any] = {}  # what a backend makes once a step to read the cache


class ReadCache(Protocol):
    """Reads the cache of a backend: ``(impl, layer, kv_cache, planned) -> LayerCache``."""

    def __call__(self, impl: Any, layer: Any, kv_cache: Tensor, planned: Planned) -> LayerCache: ...


def split_halves(impl: Any, layer: Any, kv_cache: Tensor, planned: Planned) -> LayerCache:
    """Of backends whose cache is ``[blocks, Hkv, block_size, K | V]``: views of it."""
    key, value = kv_cache.transpose(1, 2).split(impl.head_size, dim=-1)
    return LayerCache(key, value, planned.block_table)


def over(base: type[AttentionBackend], read_cache: ReadCache = split_halves) -> type[AttentionBackend]:
    """vLLM's backend ``base``, pruning where the configuration asks for it."""
    base_impl: Any = base.get_impl_cls()
    base_builder: Any = base.get_builder_cls()

    class Impl(_Pruned, base_impl):
        pass

    class Builder(_Plans, base_builder):
        pass

    Impl.read_cache = staticmethod(read_cache)  # type: ignore[assignment]  # a function, not a method
    Impl.__name__ = Impl.__qualname__ = f"DyRate{base_impl.__name__}"
    Builder.__name__ = Builder.__qualname__ = f"DyRate{base_builder.__name__}"

    class Backend(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_impl_cls() -> type[AttentionImpl]:
            config = get_current_vllm_config_or_none()
            return base_impl if config is None or options_of(config) is None else Impl

        @staticmethod
        def get_builder_cls() -> type[AttentionMetadataBuilder]:
            return Builder

    Backend.__name__ = Backend.__qualname__ = f"DyRate{base.__name__}"
    return Backend


class _Plans(AttentionMetadataBuilder):
    """Mixin before a builder of vLLM's: adds the step to its metadata."""

    kv_cache_spec: Any

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._engine = engine_of(vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Attention stays outside of graphs (between those of the pieces) where it prunes: what a step reads is planned for each step."""
        if options_of(vllm_config) is None:
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False, **named: Any) -> Any:
        """vLLM's metadata, with the step where something is pruned in it."""
        common = common_attn_metadata
        if self._engine is None:
            return super().build(common_prefix_len, common, fast_build, **named)
        whole = super().build(0, common, fast_build, **named)  # no prefix that all requests share is split off: rows go two ways
        step = self._engine.step(common.query_start_loc_cpu, common.seq_lens, common.max_seq_len)
        if step is None:
            return whole
        others = None
        if step.answers is not None and step.others is not None:
            # a builder may hand out views of buffers that its next call fills
            whole = copy.copy(whole)
            others = super().build(0, _only(common, step.others), fast_build, **named)
        setattr(whole, _STEP, Planned(self._engine, step, others, common.block_table_tensor[: step.lines]))
        return whole


def _only(common: CommonAttentionMetadata, others: Others) -> CommonAttentionMetadata:
    """The batch of these rows alone."""
    device = common.seq_lens.device
    starts = torch.tensor([0, *others.queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lines = torch.tensor(others.lines)
    on_device = lines.to(device, non_blocking=True)
    behind = torch.tensor(others.behind, dtype=common.seq_lens.dtype).to(device, non_blocking=True)
    changes: dict[str, Any] = {
        "query_start_loc": starts.to(device, non_blocking=True), "query_start_loc_cpu": starts,
        "seq_lens": common.seq_lens[on_device] - behind, "seq_lens_cpu_upper_bound": torch.tensor(others.lengths, dtype=torch.int32),
        "num_reqs": len(lines), "num_actual_tokens": int(starts[-1]),
        "max_query_len": max(others.queries), "max_seq_len": max(others.lengths),
        "block_table_tensor": common.block_table_tensor[on_device], "slot_mapping": common.slot_mapping[others.row],
        "positions": None if common.positions is None else common.positions[others.row],
        "is_prefilling": None if common.is_prefilling is None else common.is_prefilling[lines],
        "req_idx": None if common.req_idx is None else common.req_idx[lines.numpy()],
        "_num_computed_tokens_cache": None, "_token_to_req_indices_cache": None,
    }  # fmt: skip
    return common.replace(**changes)


class _Pruned:
    """Mixin before an implementation of vLLM's: answer rows of the layers that the policy touches are read by the paged operators."""

    read_cache: ReadCache
    scale: float
    head_size: int

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: Any, sliding_window: int | None,
                 kv_cache_dtype: str, logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
                 kv_sharing_target_layer_name: str | None = None, **named: Any) -> None:  # fmt: skip
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, attn_type,
            kv_sharing_target_layer_name, **named,
        )  # type: ignore[call-arg]  # vLLM's  # fmt: skip
        self._window = sliding_window
        self._layer: int | None = None
        found = {"alibi_slopes": alibi_slopes, "logits_soft_cap": logits_soft_cap, "sinks": named.get("sinks"),
                 "kv_sharing_target_layer_name": kv_sharing_target_layer_name}  # fmt: skip
        for name, value in found.items():
            if value and attn_type == AttentionType.DECODER:
                raise ValueError(f"{name} must be None in a model that dyrate prunes, got {value!r}; leave dyrate out of additional_config")

    def forward(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
                output_scale: Tensor | None = None, output_block_scale: Tensor | None = None) -> Tensor:  # fmt: skip
        """vLLM's ``AttentionImpl.forward``: query ``[tokens, Hq, D]``; ``output`` is written and returned."""
        planned: Planned | None = getattr(attn_metadata, _STEP, None)
        scales = (output_scale, output_block_scale)
        inner: Any = super().forward  # type: ignore[misc]  # vLLM's
        if planned is None:
            return inner(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        if self._layer is None:
            self._layer = extract_layer_index(layer.layer_name)
        number, step, pruning = self._layer, planned.step, planned.engine.pruning
        answers = step.answers if pruning.reads(number) else None
        if answers is None:
            inner(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        elif step.others is not None:
            rows = step.others.row
            part = torch.empty_like(output[: len(rows)])
            inner(layer, query[rows], key[rows], value[rows], kv_cache, planned.others, part, *scales)
            output.index_copy_(0, rows, part)
        if answers is None and not (step.ends is not None and number in pruning.stages):
            return output
        cache = self.read_cache(self, layer, kv_cache, planned)
        pruning.end_prompts(number, query, cache, step, self.scale, self._window)
        if answers is not None:
            found = pruning.answer(number, query[answers.row], cache, step, self.scale, self._window)
            output.index_copy_(0, answers.row, found.view(len(answers.row), *output.shape[1:]))
        return output
