"""One engine in a process of its own: ``python -m tests.engines.vllm.runner JOB RESULT`` reads one JSON file and writes the other.

A job: ``llm`` (arguments of ``vllm.LLM``), ``own_attention`` (vLLM's attention is put back after the plug-in's was registered) and
``rounds``, a list of lists of requests, each round begun when the one before is through.
A request: ``prompt``, ``pictures`` (seeds), ``tokens`` to answer, ``arrives`` (engine steps before it is added) and ``aborted`` (after so
many tokens of its answer; null: it ends by itself).
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

PLUGIN = "dyrate_kernels.engines.vllm"


def held() -> int:
    """Entries of every dict, list and set that the plug-in's objects and modules hold in this process."""
    spaces = [vars(item) for item in gc.get_objects() if str(type(item).__module__).startswith(PLUGIN) and hasattr(item, "__dict__")]
    spaces += [vars(module) for name, module in sys.modules.items() if name.startswith(PLUGIN)]
    values = [value for space in spaces for key, value in space.items() if not key.startswith("__")]
    return sum(len(value) for value in values if isinstance(value, (dict, list, set)))


def resident() -> int:
    """Bytes of memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def run_round(engine: Any, requests: list[dict[str, Any]], stem: str) -> list[dict[str, Any]]:
    """Steps the engine until all requests of a round are through."""
    from vllm import SamplingParams

    from tests.engines.vllm.models import picture

    answers: list[dict[str, Any]] = [{} for _ in requests]
    waiting = sorted(range(len(requests)), key=lambda i: requests[i].get("arrives", 0))
    step = 0
    ended: set[int] = set()
    while len(ended) < len(requests):
        while waiting and requests[waiting[0]].get("arrives", 0) <= step:
            i = waiting.pop(0)
            asked: dict[str, Any] = {"prompt": requests[i]["prompt"]}
            if images := [picture(seed) for seed in requests[i]["pictures"]]:
                asked["multi_modal_data"] = {"image": images}
            engine.add_request(f"{stem}-{i}", asked, SamplingParams(temperature=0, max_tokens=requests[i]["tokens"], ignore_eos=True))
        step += 1
        for output in engine.step():
            i = int(output.request_id.split("-")[1])
            tokens = list(output.outputs[0].token_ids)
            answers[i] = {"tokens": tokens, "prompt": list(output.prompt_token_ids), "cached": output.num_cached_tokens}
            limit = requests[i].get("aborted")
            if output.finished:
                ended.add(i)
            elif limit is not None and len(tokens) >= limit and i not in ended:
                engine.abort_request([output.request_id])
                ended.add(i)
    return answers


def attention(llm: Any) -> list[str]:
    """The class that each language layer's attention runs in, where the engine's core is in this process."""
    if not os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        return []
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return sorted(f"{name}: {type(layer.impl).__module__}" for name, layer in layers.items() if "language_model" in name)


def freed() -> int:
    """Blocks of the cache that went back before their requests ended, where the engine's core is in this process."""
    return sum(item.freed for item in gc.get_objects() if type(item).__name__ == "WithdrawnManager")


def counters(engine: Any) -> dict[str, float]:
    """vLLM's own counters, by name."""
    return {metric.name: metric.value for metric in engine.get_metrics() if isinstance(getattr(metric, "value", None), (int, float))}


def put_back_attention() -> None:
    """As if vLLM took a backend that the plug-in knows nothing of."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    load_general_plugins()  # once a process
    register_backend(AttentionBackendEnum.CPU_ATTN, "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM

    if job["own_attention"]:
        put_back_attention()

    begun = time.perf_counter()
    llm = LLM(**job["llm"])
    started = time.perf_counter() - begun
    gc.unfreeze()  # vLLM takes what it made at its start out of the collector's sight, and with it what is counted here
    rounds, memory, entries = [], [], []
    for number, requests in enumerate(job["rounds"]):
        rounds.append(run_round(llm.llm_engine, requests, f"round{number}"))
        gc.collect()
        memory.append(resident())
        entries.append(held())
    result = {
        "rounds": rounds, "memory": memory, "held": entries, "attention": attention(llm), "counters": counters(llm.llm_engine),
        "freed": freed(), "started": started, "seconds": time.perf_counter() - begun - started,
    }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
