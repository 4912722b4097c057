"""vLLM's own decode kernel (``unified_attention``, Triton), to stand beside the paged operators.

It comes from an installed vLLM, or from a folder that is named by ``DYRATE_VLLM_OPS`` and holds two files of its wheel,
``vllm/v1/attention/ops/triton_unified_attention.py`` and ``triton_attention_helpers.py``: enough where there is no network. Nothing of them
is in this repository.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = "DYRATE_VLLM_OPS"
FILES = ("triton_attention_helpers", "triton_unified_attention")
_OPS = "vllm.v1.attention.ops"
_LEAST_GRID, _SEGMENTS = 128, 16  # vLLM's: fewer blocks than this are split, into so many parts


def why_not() -> str | None:
    """Why the kernel cannot be had here, or None."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        missing = [name for name in FILES if not Path(folder, f"{name}.py").is_file()]
        return f"{FOLDER}={folder} holds no {missing[0]}.py" if missing else None
    return None if importlib.util.find_spec("vllm") is not None else f"vllm is not installed, and {FOLDER} names no folder"


def load() -> Callable[..., None]:
    """Returns ``unified_attention``.

    Raises:
        ImportError: it cannot be had (``why_not``).
    """
    reason = why_not()
    if reason is not None:
        raise ImportError(reason)
    folder = os.environ.get(FOLDER)
    if folder is None:
        return importlib.import_module(f"{_OPS}.{FILES[1]}").unified_attention
    with _stand_ins():
        for name in FILES:
            spec = importlib.util.spec_from_file_location(f"{_OPS}.{name}", Path(folder, f"{name}.py"))
            assert spec is not None and spec.loader is not None
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module.unified_attention


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Within: what the two files import of vLLM is there, as far as they use it for unquantised rows."""
    import triton
    import triton.language as tl

    class NoQuantisation:
        def __getattr__(self, name: str) -> Any:
            return 0 if name == "NONE" else name

    class Platform:
        def __getattr__(self, name: str) -> Any:
            return (lambda: torch.float8_e4m3fn) if name == "fp8_dtype" else (lambda *args: False)

    said: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.v1": {}, "vllm.v1.attention": {}, _OPS: {},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.logger": {"init_logger": lambda name: None},
        "vllm.platforms": {"current_platform": Platform()},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": NoQuantisation()},
    }  # fmt: skip
    before = {name: module for name, module in sys.modules.items() if name == "vllm" or name.startswith("vllm.")}
    for name in before:
        del sys.modules[name]
    for name, members in said.items():
        module = types.ModuleType(name)
        module.__dict__.update(members, __path__=[], __spec__=importlib.machinery.ModuleSpec(name, None, is_package=True))
        sys.modules[name] = module
    sys.modules["vllm"].__dict__["envs"] = sys.modules["vllm.envs"]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
            del sys.modules[name]
        sys.modules.update(before)


def decode(kernel: Callable[..., None], query: Tensor, block_table: Tensor, n_rows: Tensor, longest: int) -> Callable[..., Tensor]:
    """``call(query, key, value) -> [S, Hq, D]``: one row a sequence, split as vLLM splits it.

    Args:
        kernel: of ``load``.
        query: ``[S, Hq, D]``, for its form.
        block_table, n_rows: int32 ``[S, M]`` and ``[S]``.
        longest: the most rows of a sequence.
    """
    sequences, heads, dim = query.shape
    width = 1 << (dim - 1).bit_length()
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=query.device)

    def parts(*shape: int) -> Tensor:
        return torch.empty(sequences, heads, _SEGMENTS, *shape, dtype=torch.float32, device=query.device)

    segments = {"softmax_segm_output": parts(width), "softmax_segm_max": parts(), "softmax_segm_expsum": parts()}

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        kernel(
            q=query, k=key, v=value, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=n_rows, max_seqlen_k=longest,
            softmax_scale=dim**-0.5, causal=True, window_size=(-1, -1), block_table=block_table, softcap=0.0,
            q_descale=None, k_descale=None, v_descale=None, seq_threshold_3D=_LEAST_GRID // key.shape[2],
            num_par_softmax_segments=_SEGMENTS, **segments,
        )  # fmt: skip
        return out

    return call
