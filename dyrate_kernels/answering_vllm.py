"""Answers of the commands by an engine of vLLM, as ``answering`` gives them by a model in this process: greedy, token by token the same in
float32, the checkpoint's generation defaults followed alike.

vLLM is imported where an engine is started; what an engine cannot do is refused before.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dyrate_kernels import answering, policies
from dyrate_kernels.engines.vllm import options as plugin
from dyrate_kernels.engines.vllm import presence, versions
from dyrate_kernels.engines.vllm.presence import has_vllm, import_vllm
from dyrate_kernels.loading import check_name, full_name
from dyrate_kernels.policies.base import ModelShape, Policy

OWN = ("model", "additional_config", "dtype", "seed", "generation_config", "limit_mm_per_prompt", "runner", "skip_tokenizer_init")
"""Arguments of ``vllm.LLM`` that the commands give."""
_CHANGES = (
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "min_length", "sequence_bias",
    "watermarking_config",
)  # fmt: skip
"""Generation defaults of a checkpoint that change a greedy answer, and that vLLM has not, or not alike."""
_CHUNK, _SECONDS = 64, 5.0  # answers are handed out when so many are there, or after so long


def require(option: str = "--engine vllm") -> None:
    """Refuses to go on without vLLM.

    Args:
        option: that asks for it, for the message.

    Raises:
        ImportError: it is not installed, or of a version that the plug-in was not written for; says what to do.
    """
    if not has_vllm():
        raise ImportError(f"{option} needs vLLM: pip install 'dyrate-kernels[vllm]'")
    versions.check(import_vllm().__version__)


def check_options(model: str | None, device: str | None, quantize: str | None, backend: str) -> None:
    """Refuses, by name, options of the commands that are vLLM's own matter.

    Raises:
        ValueError: names the option and what to do.
    """
    if model is None:
        raise ValueError("--engine vllm needs --model: vLLM does not read the bundled model")
    for option, value, usual in (("device", device, None), ("quantize", quantize, None), ("backend", backend, "auto")):
        if value != usual:
            raise ValueError(f"--{option} {value}: vLLM chooses by itself; leave it out, or use --engine local")


class Checkpoint:
    """A model that an engine loads, by what is known of it here: it stands for the model where its configuration is asked for.

    Args:
        name: folder or hub id.
        dtype: name of a torch dtype; None: float32 on a CPU, else the model's own.
        on_cpu: the engine runs on a CPU.

    Attributes:
        config, generation_config, dtype, device: as a loaded model has them. processor: the model's.
    """

    def __init__(self, name: str, dtype: str | None = None, on_cpu: bool = True) -> None:
        import transformers

        from dyrate_kernels.quiet import import_transformers

        import_transformers()
        check_name(name)
        self.name = name
        self.config = transformers.AutoConfig.from_pretrained(name)
        own = ModelShape.from_config(self.config).dtype
        self.dtype: torch.dtype = getattr(torch, dtype) if dtype else torch.float32 if on_cpu else own
        self.device = torch.device("cpu" if on_cpu else "cuda")
        try:
            self.generation_config = transformers.GenerationConfig.from_pretrained(name)
        except OSError:  # transformers makes one of the configuration then
            self.generation_config = transformers.GenerationConfig.from_model_config(self.config)

    @functools.cached_property
    def processor(self) -> Any:
        """The checkpoint's processor."""
        import transformers

        return transformers.AutoProcessor.from_pretrained(self.name)

    @property
    def shape(self) -> ModelShape:
        """The text model's shape, in the engine's dtype."""
        return ModelShape.from_config(self.config, self.dtype)

    @property
    def full_name(self) -> str:
        """Enough to tell it from another one."""
        return f"{full_name(self.name)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Setup:
    """An engine as a command asks for it.

    Attributes:
        checkpoint: the model.
        policy, retention: as ``patch`` takes them; not all can be had (``engines.vllm.options``).
        pictures: that a prompt has at most.
        seed: of vLLM; greedy answers do not depend on it.
        more: arguments of ``vllm.LLM`` besides ``OWN``.

    Raises:
        TypeError, ValueError: a policy, a retention or an argument that the engine cannot have; names it.
    """

    checkpoint: Checkpoint
    policy: Policy
    retention: str = "recoverable"
    pictures: int = 1
    seed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = sorted(set(self.more) & set(OWN))
        if taken:
            raise ValueError(f"--engine-option: {', '.join(taken)} cannot be set: the command's own options say it")
        for policy in (self.policy, self.policy.bind(self.checkpoint.shape)):  # a predictor may read what the engine has not
            why = plugin.why_refused(policy) if policy.decides and policy.drops else None
            if why is not None:
                raise ValueError(f"policy {policy.name!r} cannot run inside of vLLM: {why}")
        plugin.read(self.asked())

    def asked(self) -> dict[str, Any]:
        """``additional_config["dyrate"]``: the policy and its options by name, and the retention.

        Raises:
            TypeError: an option is no plain value.
        """
        found = {name: getattr(self.policy, name) for name in policies.options(self.policy.name)}
        for name, value in found.items():
            if not _plain(value):
                raise TypeError(f"policy {self.policy.name!r}: {name} must be a number, text or a list for vLLM, got {value!r}")
        return {"policy": self.policy.name, "retention": self.retention, **found}

    @property
    def prunes(self) -> bool:
        """Something is asked of the plug-in."""
        return plugin.read(self.asked()) is not None

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``, but for the model."""
        return {
            "dtype": str(self.checkpoint.dtype).removeprefix("torch."), "seed": self.seed, "generation_config": "vllm",
            "limit_mm_per_prompt": {"image": self.pictures, "video": 0},
            "additional_config": {plugin.KEY: self.asked()} if self.prunes else {}, "disable_log_stats": False, **self.more,
        }  # fmt: skip

    def pruned_layers(self) -> int:
        """Returns how many layers read the pruned set; 0 where nothing is pruned."""
        if not self.prunes:
            return 0
        shape = self.checkpoint.shape
        return shape.num_layers - self.policy.bind(shape).layer_groups(shape.num_layers)[0]


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def sampling(checkpoint: Checkpoint, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams``: greedy, and of the checkpoint's generation defaults what ``answering.generate`` follows.

    Raises:
        ValueError: ``max_new_tokens`` is less than 1; or the checkpoint has a default that vLLM cannot follow: names it.
    """
    given = answering.settings(checkpoint, max_new_tokens)
    config = checkpoint.generation_config
    odd = {name: value for name in _CHANGES if (value := getattr(config, name, None)) not in (None, 0, 1.0, [], {})}
    if odd:
        names = ", ".join(f"{name}={value}" for name, value in odd.items())
        raise ValueError(f"the checkpoint's generation defaults {names}: expected none that vLLM cannot follow; use --engine local")
    stop = getattr(config, "stop_strings", None) or []
    least = given.get("min_new_tokens", getattr(config, "min_new_tokens", None)) or 0
    penalty = getattr(config, "repetition_penalty", None)
    return {
        "temperature": 0.0, "max_tokens": max_new_tokens, "min_tokens": least, "repetition_penalty": 1.0 if penalty is None else penalty,
        "stop": [stop] if isinstance(stop, str) else list(stop), "ignore_eos": True,  # that of the tokenizer need not be the checkpoint's
        "stop_token_ids": list(answering.end_ids(checkpoint, checkpoint.processor.tokenizer)),
        "detokenize": bool(stop), "skip_special_tokens": False,
    }  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A prompt.

    Attributes:
        ids: of ``chat.token_ids``.
        pictures: PIL pictures, in the order of their marks.
        max_new_tokens: of the answer.
    """

    ids: list[int]
    pictures: Sequence[Any]
    max_new_tokens: int


@dataclass
class Answer:
    """An answer, or why there is none.

    Attributes:
        tokens: ids, the end included.
        prompt: tokens of the prompt, those of pictures included.
        visual: of them, those of pictures.
        kept: of these, what an answer row kept in pruned layers, mean over both (``engines.vllm.report``); ``visual`` where nothing is
            pruned, or no row followed the prompt's.
        first: seconds from when the engine got the request to its first token; 0 where vLLM does not tell.
        error: why there is none; None: there is one.
    """

    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    visual: int = 0
    kept: float = 0.0
    first: float = 0.0
    error: Exception | None = None

    def share(self, layers: int, num_layers: int) -> float:
        """Visual rows that were read, a fraction of all, mean over steps and layers. The prompt's own step reads every one.

        Args:
            layers: that read the pruned set, of ``num_layers``.
        """
        return 1.0 - layers / num_layers * (1.0 - self.share_where_pruned())

    def share_where_pruned(self) -> float:
        """The same over pruned layers alone."""
        steps = len(self.tokens)
        return (self.visual + self.kept * (steps - 1)) / (self.visual * steps) if self.visual and steps else 1.0


@dataclass(frozen=True)
class Chunk:
    """Answers that follow each other.

    Attributes:
        answers: in the order of the requests.
        seconds, steps: since the chunk before, and steps of the engine in them.
    """

    answers: list[Answer]
    seconds: float
    steps: int


class Engine:
    """An engine of vLLM in this process and its own. :meth:`close` gives its memory back.

    Args:
        setup: what it is.

    Attributes:
        at_once: requests that it computes at a time, at most.

    Raises:
        ImportError: :func:`require`.
        Whatever vLLM raises where it cannot start.
    """

    def __init__(self, setup: Setup) -> None:
        require()
        vllm = import_vllm()
        self.setup, self._sampling = setup, functools.cache(self._sampling_for)
        sampling(setup.checkpoint, 1)  # refuses before the model is loaded
        if setup.prunes:
            why = presence.state()["why_not"]
            if why is not None:
                raise RuntimeError(f"--engine vllm cannot prune here: {why}")
        self._llm: Any = vllm.LLM(model=setup.checkpoint.name, **setup.arguments())
        self.at_once: int = self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._count = 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine. It answers nothing more."""
        if self._llm is None:
            return
        core = self._llm.llm_engine.engine_core
        self._llm = None
        core.shutdown()
        del core
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answers(self, requests: Iterable[Request | Exception]) -> Iterator[Chunk]:
        """Answers, in the order of the requests, which are taken as the engine has room. A request that cannot be answered is a failure of
        its own; one that is an error already stays one.

        Raises:
            Whatever ends the engine.
        """
        engine = self._llm.llm_engine
        waiting = iter(enumerate(requests))
        most = 2 * self.at_once
        running: dict[str, _Running] = {}  # by the id that the command gave
        done: dict[int, tuple[Answer, str | None]] = {}
        upcoming, steps, began, ready, more = 0, 0, time.perf_counter(), 0, True
        try:
            while more or running or done:
                while more and len(running) < most and len(running) + len(done) < 2 * most:
                    number, request = next(waiting, (-1, None))
                    if request is None:
                        more = False
                    elif isinstance(request, Exception):
                        done[number] = Answer(error=request), None
                    else:
                        self._add(engine, number, request, running, done)
                if running:
                    steps += 1
                    for output in engine.step():
                        self._take(output, running, done)
                while upcoming + ready in done:
                    ready += 1
                passed = time.perf_counter() - began
                if ready and (ready >= _CHUNK or passed > _SECONDS or not (more or running)):
                    found = [done.pop(number) for number in range(upcoming, upcoming + ready)]
                    upcoming, ready = upcoming + ready, 0
                    yield Chunk(self._with_figures(found), passed, steps)
                    steps, began = 0, time.perf_counter()
        finally:
            if running and self._llm is not None:
                engine.abort_request(list(running))

    def _sampling_for(self, max_new_tokens: int) -> Any:
        vllm = import_vllm()
        return vllm.SamplingParams(**sampling(self.setup.checkpoint, max_new_tokens), output_kind=_final_only())

    def _add(self, engine: Any, number: int, request: Request, running: dict[str, _Running], done: dict[int, Any]) -> None:
        name = f"dyrate{self._count}"
        self._count += 1
        asked: dict[str, Any] = {"prompt_token_ids": request.ids}
        if request.pictures:
            asked["multi_modal_data"] = {"image": list(request.pictures)}
        try:
            inside = engine.add_request(name, asked, self._sampling(request.max_new_tokens))
        except Exception as error:  # a prompt that is too long, a picture that the processor refuses: of this request alone
            done[number] = Answer(error=error), None
            return
        running[name] = _Running(number, request, inside)

    def _take(self, output: Any, running: dict[str, _Running], done: dict[int, Any]) -> None:
        if not output.finished:
            return
        held = running.pop(output.request_id)
        answer, reason = output.outputs[0], output.outputs[0].finish_reason
        placeholder = self.setup.checkpoint.config.image_token_id
        found = Answer(
            list(answer.token_ids), len(output.prompt_token_ids), sum(token == placeholder for token in output.prompt_token_ids),
            first=getattr(output.metrics, "first_token_latency", 0.0),
        )  # fmt: skip
        found.kept = float(found.visual)
        if reason not in ("stop", "length"):
            found.error = RuntimeError(f"vLLM ended the request: {reason}")
        elif reason == "length" and len(found.tokens) < held.request.max_new_tokens:
            found.error = no_room(found.prompt, len(found.tokens), held.request.max_new_tokens)
        done[held.number] = found, held.inside

    def _with_figures(self, found: Sequence[tuple[Answer, str | None]]) -> list[Answer]:
        if self.setup.prunes:
            from dyrate_kernels.engines.vllm import report

            figures = {each["request"]: each for each in report(self._llm)}
            for answer, inside in found:
                if inside in figures:
                    answer.kept = figures[inside]["kept"]
        return [answer for answer, _ in found]


def no_room(prompt: int, tokens: int, most: int) -> ValueError:
    """Returns the error of an answer that ``max_model_len`` cut: ``tokens`` of ``most`` behind so long a prompt."""
    return ValueError(
        f"max_model_len: {prompt} tokens of the prompt leave room for {tokens} of {most} new ones; give --engine-option max_model_len=N"
    )


@dataclass
class _Running:
    number: int
    request: Request
    inside: str  # vLLM's own name of it


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def on_cpu() -> bool:
    """vLLM's platform here is a CPU."""
    import_vllm()
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


__all__ = [
    "OWN", "Answer", "Checkpoint", "Chunk", "Engine", "Request", "Setup", "check_options", "no_room", "on_cpu", "require", "sampling",
]  # fmt: skip
