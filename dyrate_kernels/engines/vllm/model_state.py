"""The model state of vLLM's second runner (V2), which tells the engine of requests and batches. READ, NOT RUN: no CPU has that runner."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.worker.gpu.model_states.interface import ModelState

from dyrate_kernels.engines.vllm.engine import Batch, engine_of, required


@functools.cache
def over(base: type[ModelState]) -> type[ModelState]:
    """A model state of vLLM's, telling the engine what it learns."""
    return type(f"DyRate{base.__name__}", (_Tells, base), {})


class _Tells(ModelState):
    """Mixin before a model state of vLLM's."""

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request comes, or comes back after it was preempted: then it is known, and what its prompt decided lasts."""
        super().add_request(req_index, new_req_data)
        engine = required(self.vllm_config)
        if engine is not None:
            engine.meet(new_req_data.req_id, new_req_data.prompt_len, new_req_data.mm_features)

    def prepare_attn(self, input_batch: Any, *args: Any, **named: Any) -> dict[str, Any]:
        """As the base's, with the batch at hand where metadata are built."""
        engine = engine_of(self.vllm_config)
        if engine is None or named.get("for_capture") or not input_batch.req_ids:
            return super().prepare_attn(input_batch, *args, **named)
        batch = Batch(list(input_batch.req_ids), input_batch.num_computed_tokens_np[: input_batch.num_reqs].tolist())
        with engine.making(batch):
            return super().prepare_attn(input_batch, *args, **named)
