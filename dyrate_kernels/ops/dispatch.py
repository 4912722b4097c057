"""Which backend runs an operator: ``auto | triton | cuda | reference``.

A backend is a module with the functions of ``dyrate_kernels.ops.reference``. ``triton`` and ``cuda`` say by ``unavailable_reason()``
whether they can run on this machine. On a GPU ``auto`` takes, operator by operator, the one that was measured to be faster on that kind of
GPU (``dyrate_kernels/devices``), and Triton first where nothing was measured.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

from dyrate_kernels import devices
from dyrate_kernels.native import DRIVER_TOO_OLD

__all__ = ["BACKENDS", "backends", "name_for", "resolve"]

BACKENDS = ("auto", "triton", "cuda", "reference")

# in the order in which auto tries them on a CUDA device where nothing was measured
_MODULES = {
    "triton": "dyrate_kernels.triton_kernels",
    "cuda": "dyrate_kernels.ops.cuda",
    "reference": "dyrate_kernels.ops.reference",
}

_WITHOUT = {"cuda": frozenset({"paged_attention", "paged_step"})}  # operators that a backend does not have


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """(the backend's module, None) or (None, why it cannot run here)."""
    try:
        module = importlib.import_module(_MODULES[name])
        reason = None if name == "reference" else module.unavailable_reason()
    except Exception as error:  # a broken install of one backend must not take the others along
        return None, f"its import fails: {type(error).__name__}: {error}"
    return (module, None) if reason is None else (None, reason)


def backends() -> dict[str, str]:
    """Returns the state of each backend here: name -> ``"available"`` or ``"unavailable: <why>"``.

    >>> backends()["reference"]
    'available'
    """
    reasons = {name: _load(name)[1] for name in _MODULES}
    return {name: "available" if reason is None else f"unavailable: {reason}" for name, reason in reasons.items()}


def check_name(backend: str) -> str:
    """Returns ``backend``; ValueError for a name that is none of ``BACKENDS``."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend


def _faster(operator: str | None, device: torch.device) -> str | None:
    """The backend that was measured to be faster for an operator on this kind of GPU; None where nothing was."""
    if operator is None:
        return None
    name = devices.measured(torch.cuda.get_device_name(device)).get("backend", {}).get(operator)
    return name if name in _MODULES else None


@functools.lru_cache(maxsize=256)
def name_for(backend: str, device: torch.device | str, operator: str | None = None) -> str:
    """The backend that runs for this choice on this device: ``"triton"``, ``"cuda"`` or ``"reference"``.

    Args:
        operator: a function of ``dyrate_kernels.ops``; None asks for the first that can run, whatever was measured.

    Errors: ValueError for an unknown name; RuntimeError, with the reason, for a backend that cannot run here. ``auto`` never
    fails: on a CUDA device it takes the faster one or the first that can run, and warns once when that is only the reference.
    """
    check_name(backend)
    kind = torch.device(device).type
    if backend == "auto":
        if kind != "cuda":
            return "reference"
        faster = _faster(operator, torch.device(device))
        for name in dict.fromkeys((*([faster] if faster else []), *_MODULES)):
            if DRIVER_TOO_OLD in (_load(name)[1] or ""):
                _warn_skipped(name)
            if _load(name)[1] is None and operator not in _WITHOUT.get(name, ()):
                if name == "reference":
                    _warn_slow()
                return name
    reason = _load(backend)[1]
    if reason is not None:
        raise RuntimeError(
            f'backend={backend!r} cannot run here: {reason}. Use backend="auto", or one that dyrate_kernels.backends() calls available.'
        )
    if operator in _WITHOUT.get(backend, ()):
        raise RuntimeError(f'backend={backend!r} has no {operator}: use backend="auto", "triton" or "reference".')
    if backend != "reference" and kind != "cuda" and not _interprets(backend):
        raise RuntimeError(
            f'backend={backend!r} runs on a CUDA device, and this is on {kind}: move the model there (model.to("cuda")), or use '
            'backend="auto".'
        )
    return backend


def _interprets(backend: str) -> bool:
    """The backend runs on CPU tensors (Triton's interpreter)."""
    return getattr(_load(backend)[0], "interpreted", bool)()


@functools.cache
def _warn_skipped(name: str) -> None:
    warnings.warn(f"dyrate_kernels passes over its backend {name!r}: {_load(name)[1]}", stacklevel=3)


@functools.cache
def _warn_slow() -> None:
    reasons = "; ".join(f"{name}: {_load(name)[1]}" for name in _MODULES if name != "reference")
    warnings.warn(
        f"dyrate_kernels runs its plain PyTorch reference on a CUDA device, which is slow, because no fast backend can run ({reasons}).",
        stacklevel=2,
    )


@functools.lru_cache(maxsize=256)
def resolve(backend: str, device: torch.device | str, operator: str | None = None) -> ModuleType:
    """The module whose function runs for this choice on this device; arguments and errors as in ``name_for``."""
    module = _load(name_for(backend, device, operator))[0]
    assert module is not None
    return module
