"""Which path a generation takes: decode steps captured or eager, decoder layers fused or the model's own; and why not a faster one."""

from __future__ import annotations

from typing import Any

import torch

from dyrate_kernels.ops import dispatch
from dyrate_kernels.ops import layers as fused_layers
from dyrate_kernels.patching.calls import Call, PatchOwner
from dyrate_kernels.stats import Path

SWITCHED_OFF = "cuda_graph=False"
NO_CUDA = "there is no CUDA device"


def path_of(owner: PatchOwner, call: Call) -> Path:
    """Returns the path of a call so far. Reads nothing on a device."""
    why: dict[str, str] = {}
    replayed = 0 if call.graph is None else call.graph.replays
    if not replayed:
        why["steps"] = _why_eager(owner, call)
    if call.layers is not None:
        why["layers"] = call.layers
    elif call.session is None:
        why["layers"] = call.unpruned or "it has no cache of this patch"
    return Path("captured" if replayed else "eager", replayed, "own" if "layers" in why else "fused", why)


def _why_eager(owner: PatchOwner, call: Call) -> str:
    if owner.graph is None:
        return SWITCHED_OFF if owner.heads is None else "the model's heads are shared among processes"
    if call.session is None:
        return call.unpruned or "it has no cache of this patch"
    if call.graph is not None and call.graph.reason is not None:
        return str(call.graph.reason)
    return str(owner.graph.off or "it ended before a step was captured")


def of_machine(backend: str = "auto") -> dict[str, Any]:
    """Returns what ``patch(model)`` would do on this machine's first device with a model in half precision that fits it: as ``Path``."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    name = dispatch.name_for(backend, device)
    why = {} if cuda else {"steps": NO_CUDA}
    if fused_layers.fused(name, device) is None:
        why["layers"] = f"backend {name!r} has no such kernels, 'triton' has"
    return {"steps": "captured" if cuda else "eager", "layers": "own" if "layers" in why else "fused", "why_not": why}
