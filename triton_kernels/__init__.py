"""The Triton backend. Installed as ``dyrate_kernels.triton_kernels``; the top-level name belongs to another package.

A backend is a module with the functions of ``dyrate_kernels.ops.reference`` and ``unavailable_reason``. Kernels: ``attention`` (split-K
attention with statistics, and the decision in the same launch), ``decision`` (predictor, count, selection), ``rows`` (compaction,
reordering), ``layers`` (what ``patch(fuse=True)`` launches around attention).
``plan`` shapes their launches, ``launch`` starts them, ``dependent`` lets one begin before the last one has ended, ``workspace`` holds
their scratch memory, ``backend`` is what torch tensors meet. Triton is imported when the first of these functions is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

if __name__ == "triton_kernels":
    # Reached only when the checkout's root is on sys.path: without this, code that tries to import the well-known
    # package of the same name would take this folder for it.
    raise ImportError(
        "this folder is not the package 'triton_kernels': it is the source of dyrate_kernels.triton_kernels; "
        "run from another folder, or take the checkout's root off sys.path"
    )

__all__ = [
    "compact_",
    "decode_attention",
    "decode_step",
    "keep_count",
    "paged_attention",
    "paged_step",
    "predict_rate",
    "reorder_",
    "score_last_query",
    "select_tokens",
    "unavailable_reason",
]

OLDEST = (3, 4)
PREPARES = ("compact_", "decode_attention", "decode_step")  # operators that take ``prepared``: see ``ops.forms.Prepared``


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    backend = importlib.import_module(f"{__name__}.backend")
    for operator in __all__:
        globals().setdefault(operator, getattr(backend, operator, None))
    return globals()[name]


def interpreted() -> bool:
    """``TRITON_INTERPRET`` is set: kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None when it can.

    Every reason that holds is given, so that nobody installs Triton only to meet the next one. Asks torch whether a CUDA device is there,
    which starts no CUDA context. Under ``TRITON_INTERPRET=1`` no device is needed.
    """
    import torch

    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    else:
        import triton

        version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
        if version < OLDEST:
            reasons.append(f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}")
    if not interpreted() and not torch.cuda.is_available():
        reasons.append("no CUDA device")
    return "; ".join(reasons) or None
