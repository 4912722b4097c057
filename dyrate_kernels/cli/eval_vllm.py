"""``dyrate eval --engine vllm``: what it cannot do, and its engines."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any


def check(given: argparse.Namespace) -> None:
    """Refuses, by name, options that the engine has not.

    Raises:
        ValueError: names the option, and what to do.
        ImportError: vLLM is not installed, or of another version.
    """
    from dyrate_kernels import answering_vllm

    why = {
        "cost": "tunes with models in this process: tune with --engine local and name the tuned policies",
        "report": "draws attention that vLLM does not tell",
    }
    for name, words in why.items():
        if getattr(given, name) is not None:
            raise ValueError(f"--{name} {words}; leave it out, or use --engine local")
    if given.suite == "lmms-eval":
        raise ValueError("--suite lmms-eval asks models in this process, not --engine vllm; use --engine local")
    answering_vllm.check_options(given.model, given.device, given.quantize, given.backend)
    answering_vllm.require()


def engines(given: argparse.Namespace, suite: Any, chosen: Sequence[Any], more: Mapping[str, Any]) -> Any:
    """The engines of a comparison (``evaluation.vllm.Engines``); each contender's setting is looked at.

    Raises:
        TypeError, ValueError: a contender cannot be had; names the row.
    """
    from dyrate_kernels.answering_vllm import Checkpoint, on_cpu
    from dyrate_kernels.evaluation.vllm import Engines, most_pictures

    found = Engines(Checkpoint(given.model, given.dtype, on_cpu()), most_pictures(suite), given.seed, more)
    for contender in chosen:
        found.setup(contender)
    return found
