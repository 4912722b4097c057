"""Dynamic visual-token reduction for vision-language models, while they generate.

``import dyrate_kernels as dk`` is cheap and needs no GPU, driver, nvcc or Triton: every public name is resolved on
first use (PEP 562), so neither torch nor transformers is imported before it is needed.

>>> import dyrate_kernels as dk
>>> model, processor = dk.load_demo()
>>> with dk.patch(model, policy="dyrate") as handle:
...     tokens = model.generate(**inputs, max_new_tokens=256)
...     print(handle.stats())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Public name -> the module that defines it. None: the name is itself a submodule.
_PUBLIC: dict[str, str | None] = {
    "DyRatePredictor": "predictor",
    "Handle": "patching.api",
    "VisualCache": "patching.cache",
    "backends": "ops.dispatch",
    "flops": None,
    "demo_inputs": "bundled",
    "load_demo": "bundled",
    "ops": None,
    "patch": "patching.api",
    "policies": None,
    "predictor": None,
    "shapes": None,
    "unpatch": "patching.api",
    "vision": None,
}

__all__ = [
    "DyRatePredictor",
    "Handle",
    "VisualCache",
    "__version__",
    "backends",
    "flops",
    "demo_inputs",
    "load_demo",
    "ops",
    "patch",
    "policies",
    "predictor",
    "shapes",
    "unpatch",
    "vision",
]

if TYPE_CHECKING:
    from . import flops, ops, policies, predictor, shapes, vision
    from .bundled import demo_inputs, load_demo
    from .ops.dispatch import backends
    from .patching.api import Handle, patch, unpatch
    from .patching.cache import VisualCache
    from .predictor import DyRatePredictor


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _PUBLIC[name]
    value: Any
    if module is None:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
