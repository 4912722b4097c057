"""PyPI's torchvision is linked against CUDA: beside a torch without it, ``import torchvision`` dies at
``register_fake("torchvision::nms")``.

``run.sh`` puts this file and a ``.pth`` that imports it into the environment: the schemas are there before torchvision asks for them. No
model of these tests calls the operators.
"""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            import torch

            sys.meta_path.remove(self)
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = library  # type: ignore[attr-defined]  # it lasts as long as this


if not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
