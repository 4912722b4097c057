"""The backends that the tests of this folder run an operator on, each with the care that its technique allows.

Which of them a process has is told by its environment, since the Triton kernels are either interpreted or compiled and the emulated module
takes the place of the compiled one:

    plain pytest                    ``reference``; with a CUDA device ``triton`` and ``cuda`` on it (marker ``gpu``)
    ``TRITON_INTERPRET=1``          ``interpreter``: the Triton kernels in Triton's interpreter
    ``DYRATE_EMULATED=<variant>``   ``emulated``: the CUDA C++ kernels compiled for the CPU (``tests/emulated/build.py``)

``DYRATE_GPU_TESTS_ON_CPU=1`` with ``TRITON_INTERPRET=1`` rehearses what a GPU runs (``tests/gpu/kit.py``). ``tests/interpreter`` and
``tests/emulated`` start the other processes, with the files that :func:`files` gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dyrate_kernels import ops
from dyrate_kernels.ops import layers
from tests.gpu import kit
from tests.ops.compare import same, tensors_in

SHARED = ("attention", "decision", "layers", "paged", "rows")  # files whose tests take the fixture ``backend``
ALONE = {
    "interpreter": ("attention_settings",),
    "emulated": ("attention_staged",),
}  # and of one technique, that load what no other process may

VARIANT = os.environ.get("DYRATE_EMULATED")
INTERPRETED = VARIANT is None and os.environ.get("TRITON_INTERPRET") == "1"
DETECTOR = VARIANT not in (None, "plain")
FULL = os.environ.get("DYRATE_EMULATION" if VARIANT else "DYRATE_INTERPRETER") == "full"


def files(technique: str) -> tuple[str, ...]:
    """Returns the files of this folder that a process of ``"interpreter"`` or ``"emulated"`` runs."""
    return tuple(f"tests/ops/test_{name}.py" for name in sorted((*SHARED, *ALONE[technique])))


def of_others() -> list[str]:
    """Returns the names of the files that this process does not read."""
    mine = "emulated" if VARIANT is not None else "interpreter" if INTERPRETED else None
    return [f"test_{name}.py" for technique, names in ALONE.items() for name in names if technique != mine]


def names() -> tuple[str, ...]:
    """Returns the backends of this process."""
    if VARIANT is not None:
        return ("emulated",)
    if kit.REHEARSAL:
        return kit.BACKENDS
    if INTERPRETED:
        return ("interpreter",)
    return ("reference", *(kit.BACKENDS if kit.ON_GPU else ()))


def some(cases: list[Any], *, interpreter: int | None = None, detector: int = 1) -> list[Any]:
    """Returns the cases; only the first of them in the interpreter (where a number is given, and ``DYRATE_INTERPRETER=full`` is not) and
    under a detector of the emulation, where each costs ten times as much."""
    if DETECTOR:
        return cases[:detector]
    return cases[:interpreter] if INTERPRETED and not FULL else cases


def each(
    *,
    reference: Any = (),
    interpreter: Any = (),
    full: Any = None,
    emulated: Any = (),
    detector: Any = 1,
    device: Any = (),
    triton: Any = (),
) -> list[Any]:
    """Returns the cases of each backend of this process that has them, where the grids differ: a call costs a thousand times as much in
    the interpreter as on a GPU.

    full: the interpreter's with ``DYRATE_INTERPRETER=full``. detector: those of the emulation under a detector, or how many of the
    first. device: of either backend of a GPU, and of the rehearsal. triton: of that one alone.
    """
    if VARIANT is not None:
        if DETECTOR:
            emulated = list(emulated)[:detector] if isinstance(detector, int) else detector
        return [_param(case, "emulated") for case in emulated]
    if kit.REHEARSAL:
        return _on_device(device, triton)
    if INTERPRETED:
        return [_param(case, "interpreter") for case in (full if FULL and full is not None else interpreter)]
    return [_param(case, "reference") for case in reference] + (_on_device(device, triton) if kit.ON_GPU else [])


def _on_device(device: Any, triton: Any) -> list[Any]:
    return [_param(case, *kit.BACKENDS) for case in device] + [_param(case, "triton") for case in triton]


def _param(case: Any, *names: str) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.backends(*names))


class Backend:
    """A backend, and how an operator is run on it. Tests make their tensors on the CPU and find results and changes there."""

    on_gpu = False
    exact = False  # the same rows in another layout, launch or batch give the same bits
    device = torch.device("cpu")
    decisions: tuple[str, ...] = ("same_launch",)  # where a step's decision may be made

    def __init__(self, name: str) -> None:
        self.name = name

    @contextlib.contextmanager
    def cut(self, most: int, min_rows: int = 16) -> Iterator[None]:
        """Cuts the attention inside into ``most`` splits at most of ``min_rows`` rows at least, where a test can say so."""
        yield

    @contextlib.contextmanager
    def decided(self, where: str) -> Iterator[None]:
        """Lets a step inside decide as one of ``decisions`` says."""
        yield

    @contextlib.contextmanager
    def launched(self, how: str) -> Iterator[None]:
        """Starts the kernels inside as the launch of a name says, where a test can say so."""
        yield

    def run(self, operator: str, *args: Any, **kwargs: Any) -> Any:
        """``ops.<operator>``: in-place operators, ``new_key`` and ``out`` change their arguments, nothing else does."""
        raise NotImplementedError

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A function of ``triton_kernels.layers``. Its tensors, some of them a whole model's weights, lie on ``device``, as do results."""
        raise NotImplementedError


class Reference(Backend):
    """Plain PyTorch."""

    def run(self, operator: str, *args: Any, **kwargs: Any) -> Any:
        tensors = tensors_in([args, kwargs])
        before = [tensor.clone() for tensor in tensors]
        result = getattr(ops, operator)(*args, **kwargs, backend="reference")
        if not changes(operator, kwargs):
            assert all(same(tensor, old) for tensor, old in zip(tensors, before, strict=True)), "an argument was changed"
        return result


class Interpreter(Backend):
    """The Triton kernels in the interpreter: twice, with poisoned memory and small launches; see ``tests/interpreter/harness.py``."""

    exact = True
    decisions = ("same_launch", "second_launch", "two_launches")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        from tests.interpreter import harness

        self._settings = harness.SMALL

    @contextlib.contextmanager
    def decided(self, where: str) -> Iterator[None]:
        with self._set(dataclasses.replace(self._settings, decision=where)):
            yield

    @contextlib.contextmanager
    def launched(self, how: str) -> Iterator[None]:
        """One of ``harness.LAUNCHES``."""
        from tests.interpreter import harness

        with self._set(harness.LAUNCHES[how]):
            yield

    @contextlib.contextmanager
    def _set(self, settings: Any) -> Iterator[None]:
        before, self._settings = self._settings, settings
        try:
            yield
        finally:
            self._settings = before

    def run(self, operator: str, *args: Any, **kwargs: Any) -> Any:
        from tests.interpreter import harness

        with harness.settings(self._settings):
            return harness.run(operator, *args, **kwargs)

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        from dyrate_kernels.triton_kernels import layers as triton
        from tests.interpreter import harness

        def poison() -> None:
            for buffer, content in harness.scratch():
                if buffer == "counters":
                    assert not content.any(), "a counter was left above zero"
                else:
                    content.fill_(float("nan"))

        with harness.settings(self._settings):
            return repeated(getattr(triton, name), args, kwargs, poison, 2 if has_scratch(name, args) else 1)


class Emulated(Backend):
    """The CUDA C++ kernels on the CPU: several orders of threads, guarded and poisoned memory; see ``tests/emulated/harness.py``."""

    exact = True

    @contextlib.contextmanager
    def cut(self, most: int, min_rows: int = 16) -> Iterator[None]:
        from tests.emulated import harness

        with harness.splits(most, min_rows):
            yield

    @contextlib.contextmanager
    def launched(self, how: str) -> Iterator[None]:
        """One of ``harness.LAUNCHES``."""
        from tests.emulated import harness

        with harness.splits(*harness.LAUNCHES[how]):
            yield

    def run(self, operator: str, *args: Any, **kwargs: Any) -> Any:
        from tests.emulated import harness

        return harness.run(operator, *args, **kwargs)


class Device(Backend):
    """The kernels on a GPU, twice (in the rehearsal once), with poisoned memory. What a tensor is a view of goes along, so that a test sees
    what was written around it."""

    on_gpu = kit.ON_GPU

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.device = torch.device("cuda", torch.cuda.current_device()) if kit.ON_GPU else torch.device("cpu")
        self.kit = kit.Kit(self.device, name)
        self._decision: str | None = None
        if name == "triton":
            self.decisions = ("same_launch", "second_launch", *(("two_launches",) if kit.ON_GPU else ()))

    @contextlib.contextmanager
    def decided(self, where: str) -> Iterator[None]:
        self._decision = where
        try:
            yield
        finally:
            self._decision = None

    def run(self, operator: str, *args: Any, **kwargs: Any) -> Any:
        in_place = changes(operator, kwargs)
        seen = []
        for _ in range(2 if self.on_gpu else 1):
            storages: dict[int, tuple[Tensor, Tensor]] = {}
            moved = _moved([args, kwargs], self.kit.device, storages)
            self.kit.poison()
            with self.kit.decision(self._decision, moved[1]) if self._decision else contextlib.nullcontext():
                result = getattr(ops, operator)(*moved[0], **moved[1], backend=self.name)
            self.kit.assert_counters_at_zero()
            after = [there.cpu() for _, there in storages.values()]
            if not in_place:
                here = [here for here, _ in storages.values()]
                assert all(torch.equal(a, b) for a, b in zip(here, after, strict=True)), "an argument was changed"
            seen.append([None if one is None else one.cpu() for one in result or ()])
            seen[-1] += after
        for a, b in zip(seen[0], seen[-1], strict=True):
            assert (a is None and b is None) or same(a, b), "two runs differ"
        if in_place:
            for (here, _), changed in zip(storages.values(), after, strict=True):
                here.copy_(changed)
        if result is None:
            return None
        found = seen[-1][: len(result)]
        return type(result)(*found) if hasattr(result, "_fields") else type(result)(found)

    def fused(self, name: str, *args: Any, **kwargs: Any) -> Any:
        module = layers.fused(self.name, self.device)
        assert module is not None, f"backend {self.name} fuses nothing"

        def poison() -> None:
            self.kit.assert_counters_at_zero()
            self.kit.poison()

        return repeated(getattr(module, name), args, kwargs, poison, 2 if self.on_gpu or has_scratch(name, args) else 1)


def has_scratch(name: str, args: Any) -> bool:
    """Whether a function of ``triton_kernels.layers`` keeps memory from call to call: products of several rows do."""
    return name in ("linears", "gated") and args[0].numel() > args[0].shape[-1]


def repeated(call: Callable[..., Any], args: Any, kwargs: Any, poison: Callable[[], None], times: int) -> Any:
    """Returns what ``call`` gives so many times, each time bit for bit, with arguments that stay as they are."""
    tensors = tensors_in([args, kwargs])
    before = [tensor.clone() for tensor in tensors]
    results = []
    for _ in range(times):
        poison()
        results.append(call(*args, **kwargs))
    poison()
    assert all(same(tensor, old) for tensor, old in zip(tensors, before, strict=True)), "an argument was changed"
    first, last = tensors_in(results[0]), tensors_in(results[-1])
    assert all(same(one, other) for one, other in zip(first, last, strict=True)), "two runs differ"
    return results[-1]


def changes(operator: str, kwargs: dict[str, Any]) -> bool:
    """Whether an operator is one that changes an argument."""
    return operator.endswith("_") or kwargs.get("new_key") is not None or kwargs.get("out") is not None


def _moved(arguments: Any, device: torch.device, storages: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """The arguments on a device, each tensor in a copy of its whole storage; storages: bytes here and there by address."""
    if isinstance(arguments, dict):
        return {name: _moved(value, device, storages) for name, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return [_moved(value, device, storages) for value in arguments]
    if not isinstance(arguments, Tensor):
        return arguments
    storage = arguments.untyped_storage()
    if storage.nbytes() == 0:
        return arguments.to(device)
    if storage.data_ptr() not in storages:
        here = torch.empty(0, dtype=torch.uint8).set_(storage)
        storages[storage.data_ptr()] = here, here.to(device, copy=True)
    there = storages[storage.data_ptr()][1].untyped_storage()
    made = torch.empty(0, dtype=arguments.dtype, device=device)
    return made.set_(there, arguments.storage_offset(), arguments.shape, arguments.stride())


def make(name: str) -> Backend:
    """Returns the backend of a name; skips where this machine has it not."""
    if name in kit.BACKENDS:
        from dyrate_kernels import backends

        if backends()[name] != "available":
            pytest.skip(f"backend {name} is {backends()[name]}")
        return Device(name)
    return {"reference": Reference, "interpreter": Interpreter, "emulated": Emulated}[name](name)
