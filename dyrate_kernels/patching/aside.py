"""The second stream on which decisions of captured steps run, where ``decision_aside`` of a device file says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dyrate_kernels import devices
from dyrate_kernels.ops import workspace

_override: bool | None = None


def override(chosen: bool | None) -> None:
    """Every later generation does as ``chosen`` says (None: as the device's file says again). For benchmarks and tests."""
    global _override
    _override = chosen


def wanted(device: torch.device) -> bool:
    """The decision runs on a second stream there."""
    if _override is not None or device.type != "cuda":
        return bool(_override)
    return bool(devices.measured(torch.cuda.get_device_properties(device).name).get("decision_aside", False))


class SideStream:
    """A ``generation.aside.Aside``: a second stream beside whichever is the current one, with scratch memory of its own.

    A tensor that is made within a fork belongs to this stream. Its memory is given to another tensor within a fork alone, which waits for
    what the current stream was given before, so the current stream may read it without telling the allocator.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def fork(self) -> Iterator[None]:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), workspace.beside():
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
