"""Finds out whether vLLM is on this machine, and the plug-in inside of it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from dyrate_kernels.engines.vllm import versions

ENTRY = ("vllm.general_plugins", "dyrate")  # of the entry point
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_NO_USAGE_STATS": "1"}


def has_vllm() -> bool:
    """Returns whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def import_vllm() -> Any:
    """vLLM, whose messages must not stand between the lines of a command."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import vllm

    return vllm


def state() -> dict[str, Any]:
    """For JSON: ``version`` (None: not installed), ``platform``, ``attention_backends`` that the plug-in stands in for here, and
    ``why_not``: what keeps policies from running inside of vLLM, None where nothing does. Imports vLLM where it is installed.
    """
    found: dict[str, Any] = {"version": None, "platform": None, "attention_backends": [], "why_not": None}
    if not has_vllm():
        return found | {"why_not": "not installed: pip install 'dyrate-kernels[vllm]'"}
    try:
        found["version"] = import_vllm().__version__
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        found["platform"] = current_platform.device_type
        versions.check(found["version"])
        load_general_plugins()
        found["attention_backends"] = _backends()
    except Exception as error:  # an installation that is broken in any way must not end a command that tells what there is
        return found | {"why_not": str(error) or type(error).__name__}
    if not found["attention_backends"]:
        allowed = os.environ.get("VLLM_PLUGINS")
        why = (
            f"no entry point {ENTRY[1]} in {ENTRY[0]}: install dyrate-kernels where vLLM is"
            if allowed is None
            else f"VLLM_PLUGINS={allowed}"
        )
        found["why_not"] = f"the plug-in is not loaded ({why})" if found["platform"] in ("cpu", "cuda") else "not written for this platform"
    return found


def _backends() -> list[str]:
    """vLLM's attention backends whose class is one of the plug-in's."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    own = __name__.rpartition(".")[0]
    return [backend.name for backend in AttentionBackendEnum if backend.value and backend.get_path().startswith(f"{own}.")]
