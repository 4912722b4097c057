"""Every reducer by name: fewer visual tokens before the language model. A new one is a file here, its import, and its
class in ``_CLASSES`` and ``__all__``.

>>> from dyrate_kernels import vision
>>> vision.chain("temporal:method=mean+aim:keep=0.5")
(Temporal(group=4, keep=0.3, method='mean'), AIMTokens(keep=0.5, tokens=None))
"""

from __future__ import annotations

from collections.abc import Sequence

from dyrate_kernels import specs
from dyrate_kernels.registry import Registry
from dyrate_kernels.vision.aim import AIMTokens
from dyrate_kernels.vision.base import Crop, FeatureReducer, Merged, Reduced, Reducer, Selector, TowerFeatures, TowerMerger, Visual
from dyrate_kernels.vision.divprune import DivPrune
from dyrate_kernels.vision.downsample import Downsample
from dyrate_kernels.vision.fastervlm import FasterVLM
from dyrate_kernels.vision.hired import HiRED
from dyrate_kernels.vision.prumerge import PruMerge
from dyrate_kernels.vision.random import RandomTokens
from dyrate_kernels.vision.temporal import Temporal
from dyrate_kernels.vision.tome import ToMe
from dyrate_kernels.vision.uniform import UniformTokens
from dyrate_kernels.vision.visionzip import VisionZip

_CLASSES: tuple[type[Reducer], ...] = (
    HiRED,
    AIMTokens,
    ToMe,
    VisionZip,
    FasterVLM,
    PruMerge,
    DivPrune,
    Temporal,
    Downsample,
    RandomTokens,
    UniformTokens,
)
AIM = AIMTokens  # its older name, which the policy bears
_REGISTRY: Registry[Reducer] = Registry("reducer", _CLASSES, Reducer)
names, options, get, parse, make = _REGISTRY.names, _REGISTRY.options, _REGISTRY.get, _REGISTRY.parse, _REGISTRY.make
register = _REGISTRY.register

__all__ = [
    "AIM",
    "AIMTokens",
    "Crop",
    "DivPrune",
    "Downsample",
    "FasterVLM",
    "FeatureReducer",
    "HiRED",
    "Merged",
    "PruMerge",
    "RandomTokens",
    "Reduced",
    "Reducer",
    "Selector",
    "Temporal",
    "ToMe",
    "TowerFeatures",
    "TowerMerger",
    "UniformTokens",
    "VisionZip",
    "Visual",
    "chain",
    "get",
    "make",
    "names",
    "options",
    "parse",
    "register",
]


def chain(spec: str | Reducer | Sequence[str | Reducer | specs.Call] | None) -> tuple[Reducer, ...]:
    """Reducers in the order in which they work.

    Args:
        spec: None (no reducer); a reducer; text such as ``"aim:keep=0.5"`` or ``"tome+aim"``; or a list of these.

    Raises:
        ValueError: an unknown name or a bad option; a reducer that needs every patch is not the first; one that reads the tower's attention
            follows one that merges between its layers.
        TypeError: neither text nor reducers.
    """
    found: list[Reducer] = []
    if spec is None:
        return ()
    parts = [spec] if isinstance(spec, str | Reducer) else spec
    if not isinstance(parts, Sequence):
        raise TypeError(f"vision must be a name ({', '.join(names())}), a Reducer or a list of these, got {type(spec).__name__}")
    for part in parts:
        if isinstance(part, Reducer):
            found.append(part)
        elif isinstance(part, str):
            found += map(make, specs.calls(part))
        elif isinstance(part, specs.Call):
            found.append(make(part))
        else:
            raise TypeError(f"vision must hold names ({', '.join(names())}) or Reducers, got {type(part).__name__}")
    for reducer in found[1:]:
        if reducer.first:
            raise ValueError(f"reducer {reducer.name!r} needs every patch, so it must be the first of a chain; put it in front")
    for reducer in found[1:]:
        if found[0].in_layers and reducer.needs:
            raise ValueError(
                f"reducer {reducer.name!r} reads the tower's attention, which {found[0].name!r} has merged tokens of; leave one of them out"
            )
    return tuple(found)
