"""Measurements of kinds of GPUs, shipped: one JSON file a device name, written on such a device.

    device      the name that the driver gives it
    settings    launch settings of the Triton kernels by kind of problem (``bench/tune.py`` writes, ``triton_kernels/plan.py`` reads them)
    cuda        settings of the CUDA attention (``ops/cuda.py``: ``Settings``)
    backend     operator -> "triton" or "cuda", whichever was faster (``bench/choose_backend.py`` writes, ``ops/dispatch.py`` reads it)
    layers      which products and fusions of decoder layers are used (``ops/layer_settings.py`` reads it)
    capture_from    from how many new tokens on the capture of a decode step pays (``patching/graph.py`` reads it)
    decision_aside    true: in a captured step what follows from a decision runs on a second stream (``patching/aside.py``)
    dependent_launch    true: a kernel gets on its way while the one before it still runs (``triton_kernels/dependent.py``)

and facts on the measurement (``_FACTS``): versions, commit, times. A device without a file gets heuristics, and Triton first. An entry that
is unknown or cannot be what it says is a ValueError that names the file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Made = TypeVar("_Made", bound="DataclassInstance")
_KINDS = {
    "settings": dict, "cuda": dict, "backend": dict, "layers": dict, "dependent_launch": bool, "decision_aside": bool, "capture_from": int,
}  # fmt: skip
_FACTS = ("device", "torch", "triton", "driver", "commit", "measurement", "made_by", "times", "figures", "backend_measured")
_BACKENDS = ("triton", "cuda", "reference")

FOLDER = Path(__file__).parent


def file_name(device_name: str) -> str:
    """``"NVIDIA H200"`` -> ``"NVIDIA_H200.json"``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device_name) + ".json"


@contextmanager
def named(device_name: str) -> Iterator[None]:
    """A ValueError in the block names the device's file first."""
    try:
        yield
    except ValueError as error:
        path = f"{FOLDER / file_name(device_name)}: "
        raise ValueError(f"{path}{str(error).removeprefix(path)}") from None


@functools.cache
def measured(device_name: str) -> dict[str, Any]:
    """The content of the device's file; empty where there is none."""
    path = FOLDER / file_name(device_name)
    if not path.is_file():
        return {}
    with named(device_name):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {content!r}")
        unknown = sorted(set(content) - {*_KINDS, *_FACTS})
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; known: {', '.join(_KINDS)}, and as facts {', '.join(_FACTS)}")
        for name, kind in _KINDS.items():
            if name in content and type(content[name]) is not kind:
                expected = {dict: "an object", bool: "true or false", int: "a whole number"}[kind]
                raise ValueError(f"{name}: expected {expected}, got {content[name]!r}")
        if content.get("capture_from", 1) < 1:
            raise ValueError(f"capture_from: expected a whole number from 1 on, got {content['capture_from']}")
        for operator, name in content.get("backend", {}).items():
            if name not in _BACKENDS:
                raise ValueError(f"backend: {operator}: expected one of {', '.join(_BACKENDS)}; got {name!r}")
    return content


def build(where: str, made: type[_Made], entry: object) -> _Made:
    """A dataclass of settings from an entry of a device file; ``where`` names it in errors, all of which are ValueErrors."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected an object, got {entry!r}")
    known = [field.name for field in dataclasses.fields(made)]
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    try:
        return made(**entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
