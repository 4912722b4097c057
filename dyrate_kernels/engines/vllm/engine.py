"""The plug-in's part of a vLLM engine process: the bound policy, the requests, and the step that is being made."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig

from dyrate_kernels.engines.vllm import options
from dyrate_kernels.engines.vllm.options import KEY, Facts, Options
from dyrate_kernels.engines.vllm.pruning import Pruning
from dyrate_kernels.engines.vllm.requests import Prompt, RequestTable
from dyrate_kernels.engines.vllm.steps import Planner, Step
from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.policies.base import ModelShape, Policy

_ENGINE = "_dyrate_engine"  # attribute of a VllmConfig


class Batch(NamedTuple):
    """The step that comes, as a runner knows it, in the batch's order.

    Attributes:
        requests: ids.
        computed: rows of each that were computed before.
    """

    requests: Sequence[str]
    computed: Sequence[int]


class Engine:
    """One process of one vLLM engine.

    Args:
        config: vLLM's.
        asked: what the user asked for.
        device: of the caches.

    Attributes:
        policy: bound to the model.
        pruning, table: decisions and requests.
    """

    def __init__(self, config: VllmConfig, asked: Options, device: torch.device) -> None:
        shape = shape_of(config)
        self.policy = bound(asked, shape)
        starts = self.policy.layer_groups(shape.num_layers)
        self.table = RequestTable(
            self.policy, starts, shape.num_layers, config.scheduler_config.max_num_seqs, config.model_config.max_model_len, device
        )
        self.pruning = Pruning(self.policy, shape.num_layers, self.table, _heads(config))
        self._planner = Planner(self.table, device)
        self._features: dict[str, Any] = {}  # of each request, by identity
        self._batch: Batch | None = None
        self._made: list[Step | None] = []  # of that batch, once it is made

    # ---- what a runner tells ------------------------------------------------------------------------------------------------------

    def meet(self, request: str, prompt_length: int, features: Sequence[Any], batch: Sequence[str] = ()) -> None:
        """A request is in the batch. One that is known stays as it is, unless its prompt has changed (vLLM's streaming input).

        Args:
            features: vLLM's ``MultiModalFeatureSpec`` of its prompt.
            batch: requests that must keep their slots.
        """
        known = self.table.prompts.get(request)
        if known is not None and known.length == prompt_length and self._features.get(request) is features:
            return
        self._features[request] = features
        prompt = Prompt(prompt_length, spans_of(features))
        if known != prompt:
            self.table.add(request, prompt, batch)
            self._planner.forget()

    def remove(self, request: str) -> None:
        """A request has ended."""
        self.table.remove(request)
        self._features.pop(request, None)

    def keep_only(self, alive: Collection[str]) -> None:
        """Those that are not ``alive`` have ended."""
        for request in [request for request in self.table.prompts if request not in alive]:
            self.remove(request)

    @contextlib.contextmanager
    def making(self, batch: Batch) -> Iterator[None]:
        """Within: metadata are made of this batch."""
        self._batch, self._made = batch, []
        try:
            yield
        finally:
            self._batch, self._made = None, []

    # ---- what a builder asks ------------------------------------------------------------------------------------------------------

    def step(self, starts: Tensor, lengths: Tensor, longest: int) -> Step | None:
        """The step of the batch that is being made; None where nothing is pruned, or there is no batch (a trial run of the engine).

        Args:
            starts: int ``[requests + 1]`` on the host, first row of each among the step's tokens.
            lengths: int32, cache rows of each, on the device.
            longest: no request has more.
        """
        batch = self._batch
        if batch is None or not batch.requests:
            return None
        if not self._made:  # groups of layers with block tables of their own share it
            self._made = [self._planner.plan(batch.requests, batch.computed, starts.tolist(), lengths, longest)]
        return self._made[0]


def spans_of(features: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Spans ``(first, last)`` of a prompt's positions that hold embeddings of pictures, ascending; features: ``MultiModalFeatureSpec``."""
    seen = (feature for feature in features if feature.modality in ("image", "video"))
    return tuple(sorted((int(first), int(last)) for each in seen for first, last in each.mm_position.extract_embeds_range()))


def options_of(config: VllmConfig) -> Options | None:
    """Returns what the user asked for, also of the configuration of a model's part; None: nothing.

    Raises:
        TypeError, ValueError: ``options.read``.
    """
    return options.read(config.additional_config.get(KEY)) if isinstance(config.additional_config, dict) else None


def check(config: VllmConfig) -> None:
    """Everything that can be wrong with what the user asked for, before an engine starts.

    Raises:
        TypeError, ValueError: names the option, what was expected, what came.
    """
    asked = options_of(config)
    if asked is not None:
        options.check(asked, _facts(config))
        bound(asked, shape_of(config))


def engine_of(config: VllmConfig, device: torch.device | None = None) -> Engine | None:
    """The engine of this process; made where ``device`` is given. None: nothing was asked for, or it is not made yet."""
    found = getattr(config, _ENGINE, None)
    if found is None and device is not None and (asked := options_of(config)) is not None:
        found = Engine(config, asked, device)
        object.__setattr__(config, _ENGINE, found)
    return found


def required(config: VllmConfig) -> Engine | None:
    """The engine of this process, once its attention is there; None: nothing was asked for.

    Raises:
        ValueError: vLLM took an attention backend that the plug-in has no form of, so that the policy would do nothing.
    """
    found = engine_of(config)
    if found is None and options_of(config) is not None:
        raise ValueError(
            "attention_backend must be one that dyrate has a form of (FLASH_ATTN, TRITON_ATTN; CPU_ATTN on a CPU), and vLLM took another: "
            "pass --attention-backend TRITON_ATTN, or leave dyrate out of additional_config"
        )
    return found


def shape_of(config: VllmConfig) -> ModelShape:
    """The text model's shape; ``folder`` is the model's, where that is a folder here, so that a predictor beside it is found."""
    model = config.model_config
    return ModelShape.from_config(model.hf_config, model.dtype)


def bound(asked: Options, shape: ModelShape) -> Policy:
    """The policy for this model.

    Raises:
        ValueError: ``Policy.bind``; a predictor that reads hidden states.
    """
    policy = asked.policy.bind(shape)
    why = options.why_refused(policy)
    if why is not None:
        raise ValueError(f"policy {policy.name!r} cannot run inside of vLLM: {why}")
    return policy


def _facts(config: VllmConfig) -> Facts:
    parallel, speculative = config.parallel_config, config.speculative_config
    context = max(parallel.decode_context_parallel_size, getattr(parallel, "prefill_context_parallel_size", 1))
    return Facts(
        tuple(config.model_config.hf_config.architectures or ()), parallel.pipeline_parallel_size, context,
        None if speculative is None else speculative.method, config.kv_transfer_config is not None, config.cache_config.cache_dtype,
        bool(getattr(parallel, "use_ubatching", False)),
    )  # fmt: skip


def _heads(config: VllmConfig) -> HeadShards | None:
    size = config.parallel_config.tensor_parallel_size
    if size == 1:
        return None
    from vllm.distributed import get_tp_group

    return HeadShards(get_tp_group().device_group, size)


def report(config: VllmConfig) -> list[dict[str, Any]]:
    """Figures of the requests that ended last and of those that have not, oldest first, as ``requests.Figures``. Reads the device."""
    engine = engine_of(config)
    return [] if engine is None else [dataclasses.asdict(each) for each in engine.table.figures()]
