"""Parts shared by every case file: poisoned memory, small launch settings, counters and rows checked after each call."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.ops import workspace
from dyrate_kernels.triton_kernels import plan
from tests.ops.compare import close as close
from tests.ops.compare import same, tensors_in

# several splits and several blocks already for a few dozen rows
SMALL = plan.Settings(block_n=16, min_blocks=1, programs_per_sm=8, decision="same_launch")
TWO_LAUNCHES = plan.Settings(block_n=16, min_blocks=1, programs_per_sm=8, decision="second_launch")
APART = plan.Settings(block_n=16, min_blocks=1, programs_per_sm=8, decision="two_launches")
ONE_SPLIT = plan.Settings(block_n=32, min_blocks=64)
# 20 programs: no power of two a pair; combined a split or two at a time
THREE_SPLITS = plan.Settings(block_n=16, min_blocks=1, programs_per_sm=5, combined=32, decision="second_launch")
LAUNCHES = {
    "splits": SMALL,
    "one split": ONE_SPLIT,
    "two launches": TWO_LAUNCHES,
    "three splits": THREE_SPLITS,
    "apart": APART,
    "rows of each warp": dataclasses.replace(SMALL, num_warps=2, warp_rows=True, tensor_cores=True),
}
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}
FULL = os.environ.get("DYRATE_INTERPRETER") == "full"

np.seterr(all="ignore")  # NaN and infinity are part of the cases


@contextlib.contextmanager
def settings(chosen: plan.Settings = SMALL) -> Iterator[None]:
    """Launch settings for the calls inside; new tensors are filled with NaN (the largest integer), not with what lay there."""
    plan.override(chosen)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        plan.override(None)


def scratch() -> list[tuple[str, Tensor]]:
    """(name, buffer) of what is kept from call to call."""
    return [item for space in workspace.living() for item in space.buffers().items()]


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    """``ops.<name>`` with the Triton backend, twice, with poisoned scratch memory: both results (and both changes of an argument) must
    agree bit for bit, the counters must be back at zero, and in-place operators, ``new_key`` and ``out`` alone may change an argument.
    ``compact_`` and ``reorder_`` run once: they keep nothing from call to call.
    """
    in_place = name.endswith("_") or kwargs.get("new_key") is not None or kwargs.get("out") is not None
    tensors = tensors_in([args, kwargs])
    before = [t.clone() for t in tensors]
    seen: list[list[Any]] = []
    for _ in range(1 if name.endswith("_") else 2):
        if seen and in_place:
            for tensor, old in zip(tensors, before, strict=True):
                if not same(tensor, old):
                    tensor.copy_(old)
        for buffer, content in scratch():
            if buffer != "counters":
                content.fill_(float("nan"))
        result = getattr(ops, name)(*args, **kwargs, backend="triton")
        for buffer, content in scratch():
            if buffer == "counters":
                assert not content.any(), "a counter was left above zero"
        if not in_place:
            for tensor, old in zip(tensors, before, strict=True):
                assert same(tensor, old), "an argument was changed"
        seen.append([*(result or ()), *([tensor.clone() for tensor in tensors] if in_place else [])])
    for a, b in zip(seen[0], seen[-1], strict=True):
        assert (a is None and b is None) or same(a, b), "two runs differ"
    return result
