"""The backends over vLLM's on CUDA devices that keep keys and values side by side: FlashAttention and Triton."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from dyrate_kernels.engines.vllm.attention import over

    if name == "DyRateFlashAttentionBackend":
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

        found = over(FlashAttentionBackend)
    elif name == "DyRateTritonAttentionBackend":
        from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

        found = over(TritonAttentionBackend)
    else:
        raise AttributeError(name)
    globals()[name] = found
    return found
