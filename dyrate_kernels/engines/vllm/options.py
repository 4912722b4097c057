"""Options of the plug-in, and which of them can be had inside of vLLM. Knows nothing of vLLM but the facts that it is given.

``additional_config={"dyrate": {"policy": "dyrate", "k": 3}}``: ``policy`` is a name or a policy in text (``fastv:k=2:rate=0.75``),
``retention`` is ``recoverable`` (default) or, for ``vtw``, ``evict``; ``cache_answers`` is of the prefix cache (``Options``); whatever else
stands there is an option of the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dyrate_kernels import policies, specs
from dyrate_kernels.policies.base import Policy

KEY = "dyrate"  # in vLLM's ``additional_config``
ARCHITECTURES = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "InternVLChatModel",
    "InternVLForConditionalGeneration",
)
SPECULATION = ("ngram", "ngram_gpu", "suffix")  # methods without a drafting model, whose layers would be taken for the model's


@dataclass(frozen=True)
class Options:
    """The user's wishes.

    Attributes:
        policy: not yet bound to the model.
        evict: ``vtw`` alone: layers from k on give whole blocks of visual tokens back once the prompt is through.
        cache_answers: rows of answers may enter the prefix cache, though they were computed while pruning.
    """

    policy: Policy
    evict: bool = False
    cache_answers: bool = False


@dataclass(frozen=True)
class Facts:
    """The engine's configuration, so far as it matters here.

    Attributes:
        architectures: names of the model's classes.
        pipeline, context: sizes of pipeline parallelism and of the largest context parallelism.
        speculation: method of speculative decoding, None without.
        connector: a KV connector moves caches between engines.
        cache_dtype: of the KV cache, ``auto`` for the model's own.
        split: batches are computed in parts (dual-batch overlap).
    """

    architectures: tuple[str, ...]
    pipeline: int = 1
    context: int = 1
    speculation: str | None = None
    connector: bool = False
    cache_dtype: str = "auto"
    split: bool = False


def read(given: Any) -> Options | None:
    """``additional_config["dyrate"]`` -> options; None where nothing is asked for: absent, empty, or the policy ``none``.

    Raises:
        TypeError, ValueError: as the policy's own, and for a policy or a retention that vLLM cannot have, by name.
    """
    if given is None or given == {}:
        return None
    if isinstance(given, str):
        given = {"policy": given}
    if not isinstance(given, Mapping):
        raise TypeError(f'additional_config["{KEY}"] must be an object like {{"policy": "dyrate", "k": 3}}, got {given!r}')
    asked = dict(given)
    name, retention, cache_answers = asked.pop("policy", "dyrate"), asked.pop("retention", "recoverable"), asked.pop("cache_answers", False)
    if not isinstance(name, str):
        raise TypeError(f"policy must be a name or a policy in text, got {name!r}")
    if not isinstance(cache_answers, bool):
        raise TypeError(f"cache_answers must be true or false, got {cache_answers!r}")
    policy = policies.parse(name, **asked)
    found = specs.retention(retention)
    if not policy.decides or not policy.drops:
        return None
    why = why_refused(policy)
    if why is not None:
        raise ValueError(f"policy {policy.name!r} cannot run inside of vLLM: {why}; use {_supported()}, or patch() and generate()")
    evicts = found.name == "evict"
    if found.name not in ("recoverable", "evict") or (evicts and policy.name != "vtw"):
        raise ValueError(
            f"retention must be 'recoverable' inside of vLLM (or 'evict' for the policy vtw, by whole blocks), got {found.name!r} for "
            f"{policy.name!r}; use retention='recoverable', or patch() and generate()"
        )
    return Options(policy, evicts, cache_answers)


def why_refused(policy: Policy) -> str | None:
    """Why a policy cannot run inside of vLLM; None: it can. Of a bound policy the answer is final: a predictor may read hidden states."""
    if policy.reads_logits:
        return "it reads the model's logits, which an attention backend does not see"
    if policy.query_rows != "last":
        return f"its ranking reads the prompt's rows ({policy.query_rows!r}), of which vLLM's kernels keep no attention"
    if policy.merges:
        return "it merges tokens, and cache blocks are never changed"
    if policy.reads_hidden:
        return (
            "its predictor reads hidden states, which an attention backend does not see; use one that reads mass alone, or "
            "predictor='closed-form'"
        )
    return None


def check(options: Options, facts: Facts) -> None:
    """Refuses what the engine cannot do with these options.

    Raises:
        ValueError: names the option of vLLM, what was expected, what came, and what to do.
    """
    if not set(facts.architectures) & set(ARCHITECTURES):
        raise ValueError(
            f"model: expected one of {', '.join(ARCHITECTURES)} for policy {options.policy.name!r}, got {', '.join(facts.architectures)}; "
            "leave dyrate out of additional_config, or use patch() and generate()"
        )
    if facts.pipeline > 1:
        raise ValueError(
            f"pipeline_parallel_size must be 1 with dyrate, got {facts.pipeline}: layers of all ranks read the decision of one; "
            "use tensor_parallel_size"
        )
    if facts.context > 1:
        raise ValueError(f"decode and prefill context parallel sizes must be 1 with dyrate, got {facts.context}; use tensor_parallel_size")
    if facts.connector:
        raise ValueError("kv_transfer_config must be None with dyrate: the prompt's decision is made where its rows are computed")
    if facts.split:
        raise ValueError("enable_dbo must be False with dyrate: a step is planned for the whole batch")
    if facts.cache_dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"kv_cache_dtype must be 'auto' with dyrate, got {facts.cache_dtype!r}: its kernels read unquantised rows")
    if facts.speculation is not None and facts.speculation not in SPECULATION:
        raise ValueError(f"speculative_config: method must be one of {', '.join(SPECULATION)} with dyrate, got {facts.speculation!r}")
    if facts.speculation is not None and options.policy.remembers:
        raise ValueError(
            f"speculative_config must be None with policy {options.policy.name!r}: it carries state from step to step, and is not told "
            "which drafts were refused"
        )
    if options.evict and facts.speculation is not None:
        raise ValueError("speculative_config must be None with retention 'evict'; use retention 'recoverable'")


def _supported() -> str:
    return "one of " + ", ".join(name for name in policies.names() if name != "none" and why_refused(policies.get(name)) is None)
