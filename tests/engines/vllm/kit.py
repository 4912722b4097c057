"""An engine of vLLM in a subprocess beside the patched Hugging Face model: the same requests, greedy tokens compared one by one."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dyrate_kernels as dk
from tests.engines.vllm import models

ROOT = Path(__file__).parents[3]
QUESTIONS = (
    "Describe the picture.", "How many objects are there?", "What colour is the square?",
    "Describe the picture. Name every object, its place, its size and its colour.", "Where is the circle?",
)  # fmt: skip
USUAL: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "block_size": 32, "kv_cache_memory_bytes": 64 << 20,
    "limit_mm_per_prompt": {"image": 2, "video": 0}, "enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": False,
    "seed": 0,
}  # fmt: skip
LIMIT = 900  # seconds of an engine


@dataclass(frozen=True)
class Request:
    """Attributes:
    question: the text.
    pictures: seeds of :func:`models.picture`.
    tokens: of the answer.
    arrives: engine steps before it is added.
    aborted: after so many tokens; None: it ends by itself.
    """

    question: str
    pictures: tuple[int, ...] = ()
    tokens: int = 32
    arrives: int = 0
    aborted: int | None = None


def mix(count: int = 10, *, tokens: int = 32, together: bool = True, first: int = 0) -> tuple[Request, ...]:
    """Requests of unlike lengths: every fifth has two pictures, every seventh none.

    Args:
        together: all are there at the start; else one comes every three steps.
        first: picture seeds begin here.
    """
    requests = []
    for i in range(count):
        pictures = (first + i, first + i + 100) if i % 5 == 4 else (first + i,)
        requests.append(Request(QUESTIONS[i % len(QUESTIONS)], () if i % 7 == 3 else pictures, tokens - i % 4, 0 if together else 3 * i))
    return tuple(requests)


@dataclass(frozen=True)
class Run:
    """What an engine answered.

    Attributes:
        tokens: of each request, round after round.
        prompts: their prompts' ids, placeholders expanded.
        cached: prompt tokens that came from the prefix cache.
        memory: resident bytes after each round.
        held: entries of the plug-in's containers after each round.
        attention: module of each language layer's attention; empty where the engine's core is another process.
        counters: vLLM's own.
        freed: blocks of the cache that went back before their requests ended.
        seconds: to start, and to answer.
    """

    tokens: list[list[int]]
    prompts: list[list[int]]
    cached: list[int]
    memory: list[int]
    held: list[int]
    attention: list[str]
    counters: dict[str, float]
    freed: int
    seconds: tuple[float, float]


def environment(*, in_process: bool = True) -> dict[str, str]:
    """Of an engine's process."""
    more = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return {**os.environ, **more}


def run(command: list[str], limit: int = LIMIT, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command at the root of the checkout; its output is in the error if it fails."""
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit, **more)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done


def engine(
    folder: Path, options: Mapping[str, Any] | None, requests: Sequence[Any], *, in_process: bool = True, own_attention: bool = False,
    **llm: Any,
) -> Run:  # fmt: skip
    """Requests through an engine of vLLM.

    Args:
        folder: of :func:`models.make`.
        options: ``additional_config["dyrate"]``; None: nothing is asked of the plug-in.
        requests: :class:`Request`, or several rounds of them.
        in_process: the engine's core runs in the runner's own process, where the plug-in's memory is seen.
        own_attention: vLLM's attention is put back after the plug-in's was registered.
        llm: arguments of ``vllm.LLM`` besides, or instead of, the usual ones.
    """
    rounds = [requests] if isinstance(requests[0], Request) else requests
    asked = [[_plain(folder.name, request) for request in part] for part in rounds]
    arguments = {**USUAL, "model": str(folder), **llm}
    if options is not None:
        arguments["additional_config"] = {"dyrate": dict(options)}
    with tempfile.TemporaryDirectory() as place:
        job, result = Path(place, "job.json"), Path(place, "result.json")
        job.write_text(json.dumps({"llm": arguments, "own_attention": own_attention, "rounds": asked}))
        run([sys.executable, "-m", "tests.engines.vllm.runner", str(job), str(result)], env=environment(in_process=in_process))
        got = json.loads(result.read_text())
    answers = [answer for part in got["rounds"] for answer in part]
    return Run(
        [answer["tokens"] for answer in answers], [answer["prompt"] for answer in answers], [answer["cached"] or 0 for answer in answers],
        got["memory"], got["held"], got["attention"], got["counters"],
        got["freed"], (got["started"], got["seconds"]),
    )  # fmt: skip


def _plain(name: str, request: Request) -> dict[str, Any]:
    return {**asdict(request), "prompt": models.prompt(name, request.question, len(request.pictures))}


@functools.lru_cache(maxsize=4)
def _loaded(folder: Path) -> tuple[Any, Any]:
    return models.load(folder)


@functools.cache
def _unpruned(folder: Path, request: Request) -> tuple[list[int], list[int]]:
    return _answer(folder, request)


@torch.no_grad()
def _answer(folder: Path, request: Request) -> tuple[list[int], list[int]]:
    model, processor = _loaded(folder)
    text = models.prompt(folder.name, request.question, len(request.pictures))
    images = [models.picture(seed) for seed in request.pictures]
    inputs = processor(images=images or None, text=text, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    tokens = model.generate(**inputs, max_new_tokens=request.tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return ids, tokens[0, len(ids) :].tolist()


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    unequal: ``request: first token that differs`` of each request that the engine answered otherwise than the patched model.
    changed: requests whose pruned answer is not the unpruned one's.
    requests: how many there were.
    """

    unequal: list[str]
    changed: int
    requests: int


def reference(folder: Path, policy: Any, requests: Sequence[Request], **patch: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt ids and tokens of each request by the patched Hugging Face model, one request at a time.

    Args:
        policy: of :func:`dyrate_kernels.patch`; ``"none"``: the model as it is.
        patch: more of its arguments.
    """
    if policy == "none":
        return [_unpruned(folder, _whole(request)) for request in requests]
    model, _ = _loaded(folder)
    with dk.patch(model, policy=policy, retention="recoverable", backend="reference", **patch):
        return [_answer(folder, _whole(request)) for request in requests]


def _whole(request: Request) -> Request:
    return replace(request, arrives=0, aborted=None)


def compare(folder: Path, policy: Any, requests: Sequence[Request], got: Run, **patch: Any) -> Comparison:
    """The engine's tokens against the patched model's; of an aborted request those that it gave."""
    expected = reference(folder, policy, requests, **patch)
    unequal, changed = [], 0
    for i, (request, (ids, tokens), prompt, answer) in enumerate(zip(requests, expected, got.prompts, got.tokens, strict=True)):
        assert prompt == ids, f"request {i}: the engine read other prompt tokens than Hugging Face's processor made"
        least = request.tokens if request.aborted is None else request.aborted
        assert len(answer) >= least, f"request {i}: {len(answer)} tokens of {least}"
        if answer != tokens[: len(answer)]:
            unequal.append(f"{i}: {next(j for j, (a, b) in enumerate(zip(answer, tokens)) if a != b)}")
        changed += tokens != _unpruned(folder, _whole(request))[1]
    return Comparison(unequal, changed, len(requests))
