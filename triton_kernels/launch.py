"""Starting kernels with little Python: what a launch has in common with earlier ones is prepared once.

Triton's own ``kernel[grid](...)`` looks at every argument of every call. A ``Launch`` fixes everything but the addresses; from its
second start on it goes straight to the driver. A pointer that is not aligned to 16 bytes, a profiler's launch hook and the interpreter take
Triton's own way.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from dyrate_kernels import devices
from dyrate_kernels.ops.forms import remember, stream_of

from . import interpreted

OPTIONS = {"enable_fp_fusion": True}  # Triton's own default until 3.9; named, because a later one changes it


def _hooked() -> bool:
    """A profiler listens to launches. Triton 3.4 has a hook or None, later ones a chain that may be empty."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


_dependent: bool | None = None


def override_dependent_launch(on: bool | None) -> None:
    """Every later launch is a programmatic dependent one, or none is (None: as the device's file says again). For benchmarks and tests."""
    global _dependent
    _dependent = on


def dependent_launch(device: torch.device) -> bool:
    """Launches on ``device`` are programmatic dependent ones (``dependent.py``): off, unless the device's file says ``dependent_launch``.

    Never in the interpreter, nor on a GPU older than sm_90, which has no such thing.
    """
    shipped, possible = _dependent_launch(device)
    return shipped if _dependent is None else _dependent and possible


@functools.cache
def _dependent_launch(device: torch.device) -> tuple[bool, bool]:
    """(the device's file asks for it, it is possible)."""
    if interpreted():
        return False, False
    if device.type != "cuda":  # compiled for another machine
        return False, True
    facts = torch.cuda.get_device_properties(device)
    possible = facts.major >= 9
    return possible and devices.measured(facts.name).get("dependent_launch") is True, possible


class Launch:
    """One kernel with everything but its tensors.

    Args:
        kernel: a ``triton.jit`` function whose pointer arguments come first.
        grid: programs along each axis.
        rest: all arguments after the pointers, in the order of the signature, but for its last one, ``PDL``.
        num_warps, num_stages: as Triton takes them.
        max_registers: a thread may use at most; None leaves it to the compiler, which may rather spill to fit one more program.
        dependent: a programmatic dependent launch (``dependent_launch``); the kernel is told so by ``PDL``.
    """

    __slots__ = ("_compiled", "grid", "kernel", "options", "rest")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        rest: Sequence[Any],
        num_warps: int,
        num_stages: int = 3,
        max_registers: int | None = None,
        dependent: bool = False,
    ) -> None:
        self.kernel, self.grid, self.rest = kernel, grid, (*rest, dependent)
        self.options = {"num_warps": num_warps, "num_stages": num_stages, **OPTIONS}
        if max_registers is not None:
            self.options["maxnreg"] = max_registers
        if dependent:
            self.options["launch_pdl"] = True
        self._compiled: Any = None

    def resources(self, device: torch.device, dtypes: Sequence[torch.dtype | None]) -> tuple[int, int, int]:
        """(registers of a thread, registers that it spills, bytes of shared memory of a program) of the compiled kernel, which is made now.

        ``dtypes``: of the tensors, None where there is none.
        """
        with torch.cuda.device(device):
            compiled = self.kernel.warmup(*dtypes, *self.rest, grid=self.grid, **self.options)
            compiled._init_handles()  # loads it, which is when the driver tells
        return compiled.n_regs, compiled.n_spills, compiled.metadata.shared

    def start(self, device: torch.device, stream: int, tensors: Sequence[Tensor | None]) -> None:
        """Starts it on ``stream`` of ``device``. The same arguments are None in every start, and dtypes never change."""
        if interpreted():
            self.kernel[self.grid](*tensors, *self.rest)
        elif device.index is None or device.index == torch.cuda.current_device():
            self._start(stream, tensors)
        else:
            with torch.cuda.device(device):
                self._start(stream, tensors)

    def _start(self, stream: int, tensors: Sequence[Tensor | None]) -> None:
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        together = 0
        for address in addresses:
            together |= address or 0
        compiled = self._compiled
        if compiled is None or together & 15 or _hooked():
            compiled = self.kernel.run(*tensors, *self.rest, grid=self.grid, warmup=False, **self.options)
            if not together & 15:
                self._compiled = compiled
            return
        compiled.run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses, *self.rest)


_launches: dict[Hashable, Launch] = {}  # prepared launches, by everything that they depend on but addresses


def start(
    kernel: Any,
    device: torch.device,
    grid: tuple[int, int, int],
    rest: tuple,
    warps: int,
    tensors: tuple,
    *forms: Any,
    stages: int = 3,
) -> None:
    """Starts a kernel on the current stream. The arguments after the pointers, and ``forms`` (dtypes), say all that a launch depends on."""
    dependent = dependent_launch(device)
    key = (kernel, device, grid, rest, warps, stages, dependent, *forms)
    launch = _launches.get(key)
    if launch is None:
        launch = remember(_launches, key, Launch(kernel, grid, rest, warps, stages, dependent=dependent))
    launch.start(device, stream_of(device), tensors)
