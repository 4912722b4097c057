"""The Triton backend. Installed as ``dyrate_kernels.triton_kernels``; the top-level name belongs to another package.

A backend is a module with the functions of ``dyrate_kernels.ops.reference`` and ``unavailable_reason``. This version
holds only the latter: the kernels come with a later change.
"""

from __future__ import annotations

import importlib.util

if __name__ == "triton_kernels":
    # Reached only when the checkout's root is on sys.path: without this, code that tries to import the well-known
    # package of the same name would take this folder for it.
    raise ImportError(
        "this folder is not the package 'triton_kernels': it is the source of dyrate_kernels.triton_kernels; "
        "run from another folder, or take the checkout's root off sys.path"
    )

__all__ = ["unavailable_reason"]


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None when it can.

    Every reason that holds is given, so that nobody installs Triton only to meet the next one. Imports torch and asks
    it whether a CUDA device is there, which starts no CUDA context.
    """
    import torch

    reasons = ["the Triton kernels are not in this version"]
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if not torch.cuda.is_available():
        reasons.append("no CUDA device")
    return "; ".join(reasons)
