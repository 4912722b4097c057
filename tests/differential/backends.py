"""The backends under test and their random settings."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch

from tests.differential.draw import Draw
from tests.differential.registry import LAYERS, PAGED

# what is drawn for each setting of a Triton launch; a switch that is not named here is drawn on and off, anything else stays as it is
SETTINGS: dict[str, list[Any]] = {
    "block_n": [4, 16, 16, 16, 32, 64],
    "num_warps": [1, 2, 4, 8],
    "num_stages": [1, 3],
    "programs_per_sm": [1, 2, 4, 5, 8, None],
    "waves": [1, 2, 4],
    "min_blocks": [1, 1, 2, 64],
    "most_splits": [1, 2, 3, 5, 64, 64],
    "combined": [16, 256, 4096],
    "combine": ["same_launch", "second_launch"],
    "decision": ["same_launch", "second_launch", "two_launches"],
    "logit_bytes": [4, 4, 2],
    "max_registers": [None],
}


class Interpreter:
    """Triton's kernels in its interpreter. The environment must say so before Triton is imported."""

    name = "triton"
    floats = (torch.float32, torch.float16)  # the interpreter computes bfloat16 wrongly
    without: tuple[str, ...] = ()

    def __init__(self) -> None:
        assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 must be set before Python starts"
        import numpy as np

        from dyrate_kernels import ops, triton_kernels
        from dyrate_kernels.ops import layer_settings
        from dyrate_kernels.triton_kernels import backend, layers, plan, products
        from tests import guarded

        np.seterr(all="ignore")  # NaN and infinity are part of the calls
        self._backend, self._plan, self._products, self._guarded = backend, plan, products, guarded
        self._layer_settings = layer_settings
        self._select, self._importance = plan.select, plan.importance
        guarded.watch(triton_kernels, ops.__all__)
        guarded.watch(layers, layers.__all__)

    @contextlib.contextmanager
    def call(self, draw: Draw) -> Iterator[None]:
        plan, products = self._plan, self._products
        chosen = None
        if draw.chance(0.9):
            fields = {field.name: field for field in dataclasses.fields(plan.Settings)}
            values = {}
            for name, field in fields.items():
                if name in SETTINGS:
                    values[name] = draw.pick.choice(SETTINGS[name])
                elif isinstance(field.default, bool):
                    values[name] = draw.chance(0.5)
            chosen = plan.Settings(**values)
            usual = plan.Settings()
            draw.short_logits = values.get("logit_bytes") == 2
            told = [f"{name}={value}" for name, value in values.items() if value != getattr(usual, name)]
            draw.tell(f"settings {' '.join(told)}")
        plan.override(chosen)
        tiles = products.LINEAR, products.GATED
        if draw.chance(0.5):
            products.LINEAR = products.RowTile(draw.one(1, 4, 16), draw.one(16, 64, 256), 4, 3)
            products.GATED = products.RowTile(draw.one(1, 4, 16), draw.one(16, 64, 1024), 4, 3)
        few = self._layer_settings.Tile(draw.one(None, 16, 32), draw.one(None, 16, 64), None, None, draw.one(None, 1, 2, 3))
        draw.tell(f"{few}")
        self._layer_settings.override(_Always(few))
        chunked = draw.chance(0.25)  # rows longer than what one pass of the selection, and of the sum over heads, holds
        if chunked:
            draw.tell("chunks of 16")
            plan.select = lambda tokens, largest=0: self._select(tokens, 16)
            plan.importance = lambda heads: (self._importance(heads)[0], 16)
            self._backend._attentions.clear()
        torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
        try:
            with self._guarded.allocations():
                yield
        finally:
            torch.use_deterministic_algorithms(False)
            plan.override(None)
            products.LINEAR, products.GATED = tiles
            self._layer_settings.override(None)
            if chunked:
                plan.select, plan.importance = self._select, self._importance
                self._backend._attentions.clear()


class _Always:
    """Settings of layers in which every product has one tile."""

    def __init__(self, tile: Any) -> None:
        self._tile = tile

    def tile(self, kind: str, count: int, size: int, rows: int) -> Any:
        return self._tile


class Emulated:
    """The CUDA kernels compiled for the CPU (csrc/emulation)."""

    name = "cuda"
    floats = (torch.float32, torch.float16, torch.bfloat16)
    without = (*LAYERS, *PAGED)

    def __init__(self) -> None:
        from dyrate_kernels.ops import cuda
        from tests.emulated import harness

        self._harness, self._cuda = harness, cuda

    @contextlib.contextmanager
    def call(self, draw: Draw) -> Iterator[None]:
        order = draw.one((0, 0, 4), (1, 0, 1), (2, draw.pick.randrange(99), 3), (2, draw.pick.randrange(99), 64))
        splits = draw.one((0, 0), (1, 64), (2, 8), (3, 16), (5, 1), (64, 1))
        settings = draw.one((2, 0, 0), (1, 2, 0), (2, 3, 1), (1, 4, 1), (0, 1, 0))
        draw.tell(f"order {order} splits {splits} settings {settings}")
        self._harness.configure(*order)
        self._cuda.override = self._cuda.Settings(*settings)
        try:
            with self._harness.splits(*splits), self._harness.allocations():
                yield
        finally:
            self._cuda.override = None


class Reference:
    """Plain PyTorch in the dtype of the call, against itself in float64."""

    name = "reference"
    floats = (torch.float32, torch.float16, torch.bfloat16)
    without: tuple[str, ...] = ()

    @contextlib.contextmanager
    def call(self, draw: Draw) -> Iterator[None]:
        yield


BACKENDS = {"interpreter": Interpreter, "emulated": Emulated, "reference": Reference}
