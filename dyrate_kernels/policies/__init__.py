"""Every method by name. A new one is a file here and a line in ``_CLASSES``.

>>> import dyrate_kernels as dk
>>> dk.policies.names()
['none', 'dyrate', 'fastv', 'fixed', 'random', 'uniform', 'vtw', 'depth', 'schedule', 'threshold', 'st3', 'dycoke', 'pyramiddrop',
'layerwise', 'sparsevlm', 'aim', 'recycle', 'klguard']
>>> dk.policies.get("fastv", k=2, rate=0.75)
FastV(k=2, rate=0.75, ranking='last')
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dyrate_kernels.policies.aim import AIM
from dyrate_kernels.policies.base import Decision, ModelShape, Policy, View
from dyrate_kernels.policies.depth import Depth
from dyrate_kernels.policies.dycoke import DyCoke
from dyrate_kernels.policies.dyrate import DyRate
from dyrate_kernels.policies.fastv import FastV
from dyrate_kernels.policies.fixed import Fixed
from dyrate_kernels.policies.klguard import KLGuard
from dyrate_kernels.policies.layerwise import LayerWise
from dyrate_kernels.policies.none import KeepAll
from dyrate_kernels.policies.pyramiddrop import PyramidDrop
from dyrate_kernels.policies.random import Random
from dyrate_kernels.policies.recycle import Recycle
from dyrate_kernels.policies.schedule import Schedule
from dyrate_kernels.policies.sparsevlm import SparseVLM
from dyrate_kernels.policies.st3 import ST3
from dyrate_kernels.policies.threshold import Threshold
from dyrate_kernels.policies.uniform import Uniform
from dyrate_kernels.policies.vtw import VTW

_CLASSES: tuple[type[Policy], ...] = (
    KeepAll,
    DyRate,
    FastV,
    Fixed,
    Random,
    Uniform,
    VTW,
    Depth,
    Schedule,
    Threshold,
    ST3,
    DyCoke,
    PyramidDrop,
    LayerWise,
    SparseVLM,
    AIM,
    Recycle,
    KLGuard,
)
_BY_NAME = {cls.name: cls for cls in _CLASSES}

__all__ = [
    "AIM",
    "Decision",
    "Depth",
    "DyCoke",
    "DyRate",
    "FastV",
    "Fixed",
    "KLGuard",
    "KeepAll",
    "LayerWise",
    "ModelShape",
    "Policy",
    "PyramidDrop",
    "Random",
    "Recycle",
    "ST3",
    "Schedule",
    "SparseVLM",
    "Threshold",
    "Uniform",
    "VTW",
    "View",
    "get",
    "names",
    "options",
]


def names() -> list[str]:
    """The names that :func:`get` knows."""
    return list(_BY_NAME)


def options(name: str) -> list[str]:
    """The options of the policy ``name``.

    Raises:
        ValueError: no policy has this name.
    """
    return [field.name for field in dataclasses.fields(_lookup(name)) if field.init and not field.metadata.get("bound")]


def get(name: str, **options_: Any) -> Policy:
    """The policy ``name`` with these options.

    Raises:
        ValueError: no policy has this name, or an option's value is out of range.
        TypeError: the policy has no such option, or an option's value is of the wrong type.
    """
    cls = _lookup(name)
    known = options(name)
    for option in options_:
        if option not in known:
            raise TypeError(f"policy {name!r} has no option {option!r}; it has {', '.join(known)}")
    return cls(**options_)


def _lookup(name: str) -> type[Policy]:
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(f"policy must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]
