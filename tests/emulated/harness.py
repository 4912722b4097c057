"""Parts shared by every case file: the backend "cuda" on CPU tensors, guarded and poisoned memory, several orders of threads for each call.

Importing this loads the emulated module (``build.py``) in the variant that the environment variable ``DYRATE_EMULATED`` names and makes it
what ``backend="cuda"`` runs, so it belongs in a process of its own: ``test_emulated.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch

from dyrate_kernels import native, ops
from dyrate_kernels.ops import cuda, dispatch
from tests import guarded as memory
from tests.emulated import build
from tests.ops.compare import same, tensors_in

VARIANT = os.environ.get("DYRATE_EMULATED", "plain")
PLAIN = VARIANT == "plain"
FULL = os.environ.get("DYRATE_EMULATION") == "full"

# (order of threads and blocks, seed, blocks alive at once); a detector needs no second opinion
ORDERS = {
    "plain": ((0, 0, 4), (1, 0, 1), (2, 1, 3), (2, 2, 64)),
    "sanitized": ((2, 1, 3),),
    "races": ((2, 3, 64),),
}[VARIANT]

# most splits of an attention, and the rows that one has at least
LAUNCHES = {"splits": (3, 4), "one split": (1, 64), "five splits": (5, 8), "a split a row": (64, 1)}


def some(cases: list[Any], first: int = 1) -> list[Any]:
    """All cases in the plain variant, the ``first`` of them under a detector, where each costs ten times as much."""
    return cases if PLAIN else cases[:first]


def cells(every: int, *axes: list[Any]) -> list[tuple[Any, ...]]:
    """Of a grid those cells whose numbers on the axes add up to a multiple of ``every``: two axes meet in all pairs where the others have
    enough values. Every cell where all are asked for (``DYRATE_EMULATION=full``), and under a detector, whose axes are short.
    """
    grid = itertools.product(*map(enumerate, axes))
    return [tuple(value for _, value in cell) for cell in grid if FULL or not PLAIN or sum(number for number, _ in cell) % every == 0]


# ---- the backend -------------------------------------------------------------------------------------------------------------------

module = build.load(VARIANT)
native._import.cache_clear()
native._import = lambda: (module, None)  # what native.load gives
dispatch._load.cache_clear()
backend = cuda
configure = module.configure


@contextlib.contextmanager
def splits(most: int, min_rows: int = 16) -> Iterator[None]:
    """Cuts attention into ``most`` splits at most, of ``min_rows`` rows at least."""
    before = cuda._cut
    cuda._cut = (most, min_rows)
    try:
        yield
    finally:
        cuda._cut = before


memory.watch(backend, ops.__all__)
allocations = memory.allocations


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    """``ops.<name>`` with the backend "cuda" in each of ``ORDERS``: results and changed arguments agree bit for bit, memory beyond
    tensors is unchanged, counters are back at zero, and only in-place operators and ``new_key`` change an argument.
    """
    in_place = name.endswith("_") or kwargs.get("new_key") is not None
    tensors = tensors_in([args, kwargs])
    before = [tensor.clone() for tensor in tensors]
    seen: list[tuple[list[Any], list[torch.Tensor]]] = []
    result = None
    for order in ORDERS:
        if seen and in_place:
            for tensor, old in zip(tensors, before, strict=True):
                if not same(tensor, old):
                    tensor.copy_(old)
        configure(*order)
        with allocations():
            result = getattr(ops, name)(*args, **kwargs, backend="cuda")
        if not in_place:
            for tensor, old in zip(tensors, before, strict=True):
                assert same(tensor, old), "an argument was changed"
        seen.append((list(result or ()), [tensor.clone() for tensor in tensors] if in_place else []))
        for a, b in zip([*seen[0][0], *seen[0][1]], [*seen[-1][0], *seen[-1][1]], strict=True):
            assert (a is None and b is None) or same(a, b), f"orders {ORDERS[0]} and {order} differ"
    return result
