"""Every method by name. A new one is a file here, its import, and its class in ``_CLASSES`` and ``__all__``.

>>> import dyrate_kernels as dk
>>> dk.policies.names()[:4]
['none', 'dyrate', 'fastv', 'fixed']
>>> dk.policies.get("fastv", k=2, rate=0.75) == dk.policies.parse("fastv:k=2:rate=0.75")
True
"""

from __future__ import annotations

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
from dyrate_kernels.registry import Registry

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
_REGISTRY: Registry[Policy] = Registry("policy", _CLASSES, Policy)
names, options, get, parse, make = _REGISTRY.names, _REGISTRY.options, _REGISTRY.get, _REGISTRY.parse, _REGISTRY.make
register = _REGISTRY.register

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
    "make",
    "names",
    "options",
    "parse",
    "register",
]
