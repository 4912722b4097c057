"""Which products and fusions of a decoder layer ``patch(fuse=True)`` uses on a device, beyond those that are always there.

All of them are off unless the device's file (``dyrate_kernels/devices``) turns them on under ``layers``::

    {"layers": {
        "products": {"linear 12288x4096": [{"rows": [2, 64], "tile": {"rows": 64, "columns": 128, "stages": 4, "splits": 4}}],
                     "gated 11008x4096": [{"rows": [2, 32], "tile": {}}]},
        "residual_norm": true, "norm_prologue": true, "rotary_in_attention": true
    }}
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from dyrate_kernels import devices

KINDS = ("linear", "gated")


@dataclass(frozen=True)
class Tile:
    """The shape of a product with few rows. None: as the kernels' own heuristic says.

    Attributes:
        rows: of a weight that a program computes; a power of two from 16 on, from 64 on for ``wgmma`` (sm_90).
        columns: that it reads at a time; a power of two from 16 on.
        warps: of a program, a power of two.
        stages: of the software pipeline.
        splits: programs that share a row's columns. Their partial sums are added in a fixed order.
    """

    rows: int | None = None
    columns: int | None = None
    warps: int | None = None
    stages: int | None = None
    splits: int | None = None

    def __post_init__(self) -> None:
        least = {"rows": 16, "columns": 16, "warps": 1}
        for entry in fields(self):
            number = getattr(self, entry.name)
            if number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < least.get(entry.name, 1):
                raise ValueError(f"{entry.name}: expected a whole number from {least.get(entry.name, 1)} on, got {number!r}")
            if entry.name in least and number & (number - 1):
                raise ValueError(f"{entry.name}: expected a power of two, got {number}")


_PROBLEM = re.compile(rf"({'|'.join(KINDS)}) \d+x\d+")


def _range(where: str, entry: object) -> tuple[int, int, Tile]:
    """``{"rows": [fewest, most], "tile": {..}}`` of a device file."""
    given: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    rows: Any = given.get("rows")
    whole = isinstance(rows, list) and len(rows) == 2 and all(type(one) is int for one in rows)
    if not whole or not 1 <= rows[0] <= rows[1] or set(given) - {"rows", "tile"}:
        raise ValueError(f'{where}: expected {{"rows": [fewest, most], "tile": {{..}}}} with 1 <= fewest <= most, got {entry!r}')
    return rows[0], rows[1], devices.build(where, Tile, given.get("tile", {}))


@dataclass(frozen=True)
class LayerSettings:
    """The kernels of decoder layers that are used.

    Attributes:
        products: by ``problem``: (fewest rows, most rows, tile) where our product takes the place of the model's own. One row is always
            ours.
        residual_norm: one launch adds to the residual stream and normalises it for what comes next.
        norm_prologue: with one row, the next product does both itself.
        rotary_in_attention: attention rotates query and key itself.
    """

    products: Mapping[str, tuple[tuple[int, int, Tile], ...]] = field(default_factory=dict)
    residual_norm: bool = False
    norm_prologue: bool = False
    rotary_in_attention: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "products" and not isinstance(value, bool):
                raise ValueError(f"{entry.name}: expected true or false, got {value!r}")

    @classmethod
    def from_file(cls, entry: Mapping[str, Any]) -> LayerSettings:
        """Of the entry ``layers`` of a device file."""
        products: dict[str, tuple[tuple[int, int, Tile], ...]] = {}
        given = entry.get("products", {})
        if not isinstance(given, Mapping):
            raise ValueError(f"layers: products: expected an object, got {given!r}")
        for name, ranges in given.items():
            if _PROBLEM.fullmatch(name) is None:
                raise ValueError(f"layers: products: expected names like 'linear 4096x4096' and 'gated 11008x4096', got {name!r}")
            where = f"layers: products: {name}"
            if not isinstance(ranges, list):
                raise ValueError(f"{where}: expected a list of ranges of rows, got {ranges!r}")
            products[name] = tuple(_range(where, one) for one in ranges)
        return devices.build("layers", cls, {**entry, "products": products})

    def tile(self, kind: str, count: int, size: int, rows: int) -> Tile | None:
        """Returns the tile of a product with ``rows`` rows and weights ``[count, size]`` (of a launch together); None: the model's own."""
        for fewest, most, tile in self.products.get(problem(kind, count, size), ()):
            if fewest <= rows <= most:
                return tile
        return None


def problem(kind: str, count: int, size: int) -> str:
    """The name of a kind of product in a device file; kind: of ``KINDS``."""
    return f"{kind} {count}x{size}"


_override: LayerSettings | None = None


def override(chosen: LayerSettings | None) -> None:
    """Every later pass uses ``chosen`` (None: what the device's file says again). For benchmarks and tests."""
    global _override
    _override = chosen


def settings(device: torch.device) -> LayerSettings:
    """Returns the settings of ``device``."""
    return _shipped(device) if _override is None else _override


@functools.cache
def _shipped(device: torch.device) -> LayerSettings:
    if device.type != "cuda":
        return LayerSettings()
    name = torch.cuda.get_device_properties(device).name
    with devices.named(name):
        return LayerSettings.from_file(devices.measured(name).get("layers", {}))
