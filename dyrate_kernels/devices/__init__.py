"""What was measured on a kind of GPU and is shipped: one JSON file a device name, written on such a device.

    device      the name that the driver gives it
    settings    launch settings of the Triton kernels by kind of problem (``bench/tune.py`` writes, ``triton_kernels/plan.py`` reads them)
    cuda        settings of the CUDA attention (``ops/cuda.py``: ``Settings``)
    backend     operator -> "triton" or "cuda", whichever was faster (``bench/choose_backend.py`` writes, ``ops/dispatch.py`` reads it)
    layers      which products and fusions of decoder layers are used (``ops/layer_settings.py`` reads it)
    dependent_launch    true: a kernel gets on its way while the one before it still runs (``triton_kernels/dependent.py``)

and facts on the measurement: versions, commit, times. A device without a file gets heuristics, and Triton first.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def file_name(device_name: str) -> str:
    """``"NVIDIA H200"`` -> ``"NVIDIA_H200.json"``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device_name) + ".json"


@functools.cache
def measured(device_name: str) -> dict[str, Any]:
    """The content of the device's file; empty where there is none."""
    path = FOLDER / file_name(device_name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
