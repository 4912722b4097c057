"""Scratch memory of the kernels: one set a device and stream, kept for good.

Launches of one stream follow each other, so they can share it. Buffers only grow, by at least doubling, and a buffer that was outgrown is
kept: a captured graph may still point at it, and all of them together are smaller than the newest one. A buffer cannot be made inside a
capture (its zeros would be written by replays only), and graphs that were captured on one stream share its set: they must not be replayed
at the same time on two.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Named flat buffers on one device; their content is undefined between launches, but for ``counters``, which are zero then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}
        self._outgrown: list[Tensor] = []

    def buffers_for(self, sizes: dict[str, int | None]) -> list[Tensor | None]:
        """A buffer of at least that many elements for each name; None for None."""
        found: list[Tensor | None] = []
        for name, size in sizes.items():
            buffer = None if size is None else self._buffers.get(name)
            if size is not None and (buffer is None or buffer.numel() < size):
                buffer = self._make(name, size)
            found.append(buffer)
        return found

    def _make(self, name: str, size: int) -> Tensor:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the kernels' scratch memory cannot be made inside a CUDA graph capture: run the same call once before, on the stream of "
                "the capture (torch.cuda.graph(g, stream=s), where s is the stream of the warm-up)"
            )
        if name in self._buffers:
            self._outgrown.append(self._buffers[name])
            size = max(size, 2 * self._buffers[name].numel())
        with torch.inference_mode(False):
            if name == "counters":
                buffer = torch.zeros(size, dtype=torch.int32, device=self.device)
            else:
                buffer = torch.empty(max(size, 1), dtype=torch.float32, device=self.device)
        self._buffers[name] = buffer
        return buffer

    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name (for tests)."""
        return dict(self._buffers)


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def for_stream(device: torch.device, stream: int) -> Workspace:
    """The workspace of a stream."""
    key = (device, stream)
    found = _workspaces.get(key)
    if found is None:
        found = _workspaces[key] = Workspace(device)
    return found
