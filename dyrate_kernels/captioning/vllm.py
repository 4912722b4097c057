"""The engine ``vllm``: one engine of vLLM captions all pictures, batched as they come and go by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from dyrate_kernels import chat, policies
from dyrate_kernels.answering_vllm import Answer, Checkpoint, Engine, Request, Setup, check_options, on_cpu, require
from dyrate_kernels.captioning.captioner import READERS, Caption, Task, read
from dyrate_kernels.captioning.inputs import Source, payloads
from dyrate_kernels.pictures import UnreadableError
from dyrate_kernels.policies.base import Policy

_AHEAD = 64  # pictures that are read at a time


def check(task: Task) -> None:
    """Refuses, by name, what the engine cannot do with a task.

    Raises:
        ValueError: names the option, what was expected, what came, what to do.
    """
    check_options(task.model, task.device, task.quantize, task.backend)
    if task.vision:
        found = "+".join(map(str, task.vision))
        raise ValueError(f"--vision {found}: reducers change the model, which vLLM runs as its own; leave it out, or use --engine local")
    if task.early_leave is not None:
        raise ValueError("--early-leave: vLLM lets captions that have ended leave by itself; leave it out")


def setup_for(task: Task, checkpoint: Checkpoint, more: Mapping[str, Any]) -> Setup:
    """The engine that a task asks for.

    Raises:
        TypeError, ValueError: ``Setup``.
    """
    policy = task.policy if isinstance(task.policy, Policy) else policies.parse(task.policy)
    return Setup(checkpoint, policy, task.retention, more=more)


def run_vllm(task: Task, sources: Sequence[Source], more: Mapping[str, Any]) -> Iterator[list[Caption]]:
    """Captions in the order of the sources. Pictures are read as the engine has room for them.

    Args:
        more: arguments of ``vllm.LLM``.

    Raises:
        ImportError: vLLM is not installed, or of another version.
        ValueError: :func:`check`; a setting that the engine cannot have.
        Whatever starting or running the engine raises.
    """
    check(task)
    require()
    assert task.model is not None
    checkpoint = Checkpoint(task.model, task.dtype, on_cpu())
    with Engine(setup_for(task, checkpoint, more)) as engine:
        layers, begun = (engine.setup.pruned_layers(), checkpoint.shape.num_layers), 0
        for chunk in engine.answers(_requests(task, checkpoint, sources)):
            names = [source.name for source in sources[begun : begun + len(chunk.answers)]]
            begun += len(names)
            each = chunk.seconds / len(names)
            yield [_caption(name, answer, checkpoint, layers, each) for name, answer in zip(names, chunk.answers, strict=True)]


def _requests(task: Task, checkpoint: Checkpoint, sources: Sequence[Source]) -> Iterator[Request | Exception]:
    ids = prompt_ids(task, checkpoint)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(sources), _AHEAD):
            part = payloads(sources[start : start + _AHEAD], task.column)
            for picture in pool.map(partial(read, max_pixels=task.max_pixels), part):
                yield picture if isinstance(picture, UnreadableError) else Request(ids, [picture], task.max_new_tokens)


def prompt_ids(task: Task, checkpoint: Checkpoint) -> list[int]:
    """The prompt of every picture (``chat.token_ids``)."""
    return chat.token_ids(checkpoint.processor, chat.render(checkpoint.processor, [chat.user(task.prompt, images=1)]))


def _caption(name: str, answer: Answer, checkpoint: Checkpoint, layers: tuple[int, int], seconds: float) -> Caption:
    if answer.error is not None:
        return failure(name, answer.error)
    text = checkpoint.processor.decode(answer.tokens, skip_special_tokens=True).strip()
    return Caption(
        name, text, visual_tokens=answer.visual, read=answer.visual * answer.share(*layers), tokens=len(answer.tokens), seconds=seconds
    )


def failure(name: str, error: Exception) -> Caption:
    """A caption that is not there."""
    if isinstance(error, UnreadableError):
        return Caption(name, error=str(error), kind=error.kind)
    return Caption(name, error=f"{type(error).__name__}: {error}", kind="model")
