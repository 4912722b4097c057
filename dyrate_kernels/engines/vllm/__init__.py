"""Policies inside of vLLM: ``vllm serve MODEL --additional-config '{"dyrate": {"policy": "dyrate", "k": 3}}'`` (docs/vllm.md).

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). Nothing changes for engines that do not ask.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Makes the plug-in known to vLLM, in this process. Cheap, and may be called again."""
    import functools

    import vllm
    from vllm.engine.arg_utils import EngineArgs

    from dyrate_kernels.engines.vllm import options, versions

    if getattr(EngineArgs.create_engine_config, "_dyrate", False):
        return
    inner = EngineArgs.create_engine_config

    @functools.wraps(inner)
    def create_engine_config(self: Any, *args: Any, **named: Any) -> Any:
        config = inner(self, *args, **named)
        given = config.additional_config
        if isinstance(given, dict) and options.read(given.get(options.KEY)) is not None:
            versions.check(vllm.__version__)
            from dyrate_kernels.engines.vllm import engine

            engine.check(config)
        return config

    create_engine_config._dyrate = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
    try:
        versions.check(vllm.__version__)
    except ImportError:  # said when an engine asks
        return
    _hook()


def _hook() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.worker.worker_base import WorkerBase

    from dyrate_kernels.engines.vllm import blocks, engine, prefix_cache, runners, weights

    WorkerBase.dyrate_report = lambda self: engine.report(self.vllm_config)
    here = "dyrate_kernels.engines.vllm"
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{here}.cpu.DyRateCPUAttentionBackend")
    elif current_platform.is_cuda_alike():
        register_backend(AttentionBackendEnum.FLASH_ATTN, f"{here}.cuda.DyRateFlashAttentionBackend")
        register_backend(AttentionBackendEnum.TRITON_ATTN, f"{here}.cuda.DyRateTritonAttentionBackend")
        runners.hook_second()
    runners.hook_first()
    blocks.hook()
    prefix_cache.hook()
    weights.leave_out_predictor()


def report(llm: Any) -> list[dict[str, Any]]:
    """Figures of the requests that an engine ended last, and of those that it has, oldest first.

    Args:
        llm: ``vllm.LLM``.

    Returns:
        Of each: request, n_visual, rows (of its answer that were computed), kept (visual tokens, mean over pruned layers and rows), rate
        (the fraction removed, likewise), share (of the unpruned model's cache rows that were read). Requests without visual tokens, and
        engines without a policy, have none.
    """
    return llm.collective_rpc("dyrate_report")[0]
