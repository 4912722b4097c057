"""vLLM takes every safetensors file of a model's folder for the model's weights. A predictor saved there is none of them."""

from __future__ import annotations

import functools
import os
from typing import Any


def leave_out_predictor() -> None:
    """vLLM loads a folder with ``dyrate_predictor.safetensors`` in it as one without. May be called again."""
    from vllm.model_executor.model_loader import default_loader

    from dyrate_kernels.predictor import WEIGHTS_FILE

    inner = default_loader.filter_duplicate_safetensors_files
    if getattr(inner, "_dyrate", False):
        return

    @functools.wraps(inner)
    def weights(files: list[str], *args: Any, **named: Any) -> list[str]:
        return inner([file for file in files if os.path.basename(file) != WEIGHTS_FILE], *args, **named)

    weights._dyrate = True  # type: ignore[attr-defined]
    default_loader.filter_duplicate_safetensors_files = weights
