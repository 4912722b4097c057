"""Everything here needs a CUDA device and is skipped without one.

``DYRATE_GPU_TESTS_ON_CPU=1`` with ``TRITON_INTERPRET=1`` runs what takes the fixture ``kit`` on the CPU in Triton's interpreter: a
rehearsal at toy size, in float32 and float16 (bfloat16 arithmetic is garbage there). What takes ``cuda`` cannot be rehearsed.
"""

from __future__ import annotations

import pytest
import torch

import dyrate_kernels as dk
from tests.gpu import kit as tools

NO_DEVICE = "no CUDA device"


@pytest.fixture
def cuda() -> torch.device:
    """The current CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip(NO_DEVICE)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=tools.BACKENDS)
def kit(request: pytest.FixtureRequest) -> tools.Kit:
    """The device and the backend under test."""
    if not torch.cuda.is_available() and not tools.REHEARSAL:
        pytest.skip(NO_DEVICE)
    state = dk.backends()[request.param]
    if state != "available":
        pytest.skip(f"backend {request.param} is {state}")
    if not torch.cuda.is_available():
        return tools.Kit(torch.device("cpu"), request.param)
    return tools.Kit(torch.device("cuda", torch.cuda.current_device()), request.param)
