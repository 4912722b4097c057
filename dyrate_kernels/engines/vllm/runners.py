"""vLLM's model runners, which know of a batch what its attention is not told: which requests it holds, and where their prompts end.

The first runner (what a CPU has) is listened to where it builds the attention's metadata; the second (V2, what GPUs use by default) has a
place for it, the model state.
"""

from __future__ import annotations

import functools
from typing import Any

from dyrate_kernels.engines.vllm.engine import Batch, engine_of, required


def hook_first() -> None:
    """Lets the first runner tell the engine of its batches. Once a process."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    inner = GPUModelRunner._build_attention_metadata
    if getattr(inner, "_dyrate", False):
        return

    @functools.wraps(inner)
    def build(self: Any, *args: Any, **named: Any) -> Any:
        held = self.input_batch
        engine = required(self.vllm_config) if held.num_reqs else None
        if engine is None or named.get("for_cudagraph_capture"):
            return inner(self, *args, **named)
        ids = list(held.req_ids)
        engine.keep_only(self.requests)
        for line, request in enumerate(ids):
            engine.meet(request, int(held.num_prompt_tokens[line]), self.requests[request].mm_features, ids)
        with engine.making(Batch(ids, held.num_computed_tokens_cpu[: held.num_reqs].tolist())):
            return inner(self, *args, **named)

    build._dyrate = True  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = build


def hook_second() -> None:
    """Gives the second runner a model state that tells the engine of its batches. Once a process."""
    from vllm.v1.worker.gpu import model_states

    inner = model_states.resolve_model_state_cls
    if getattr(inner, "_dyrate", False):
        return

    @functools.wraps(inner)
    def resolve(config: Any, model: Any) -> type:
        from dyrate_kernels.engines.vllm.engine import options_of
        from dyrate_kernels.engines.vllm.model_state import over

        found = inner(config, model)
        return found if options_of(config) is None else over(found)

    resolve._dyrate = True  # type: ignore[attr-defined]
    model_states.resolve_model_state_cls = resolve

    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    finish = GPUModelRunner.finish_requests

    @functools.wraps(finish)
    def finish_requests(self: Any, scheduler_output: Any) -> Any:
        engine = engine_of(self.vllm_config)
        if engine is not None:  # a model state is told of those that are preempted alike
            for request in scheduler_output.finished_req_ids:
                engine.remove(request)
        return finish(self, scheduler_output)

    GPUModelRunner.finish_requests = finish_requests
