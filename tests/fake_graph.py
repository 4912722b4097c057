"""A CUDA graph without a GPU: a tape of every operator that a step calls, which can be run again on the same tensors.

What makes it stand in for the real one: while recording, the step leaves no mark on tensors that were there before (their storages are put
back), what the step made holds rubbish until the first replay, every replay reads and writes the tensors of the recording (their
"addresses"), and what would wait for the device, or copy from the host, is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyrate_kernels import ops
from tests.host_sync import waiting


class TapeRecorder:
    """A ``dyrate_kernels.patching.graph.Recorder`` for any device.

    Attributes:
        tapes: those recorded, in order.
        steps: how many steps ran inside of ``warm_up``.
    """

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.steps = 0

    @contextlib.contextmanager
    def warm_up(self) -> Any:
        self.steps += 1
        yield

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape = Tape()
        try:
            with tape, mock.patch.object(ops, "trusted", _through_the_dispatcher):
                result = step()
        finally:
            tape.put_back()
        tape.spoil()
        self.tapes.append(tape)
        return tape.replay, result


class Tape(TorchDispatchMode):
    """Operators in the order of their calls, with the tensors they took and gave.

    Attributes:
        calls: (operator, arguments, keyword arguments, tensors it made).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self._made: dict[int, Any] = {}  # storages made while recording, which stay alive
        self._before: dict[int, tuple[Any, Any]] = {}  # storages that were there before and were written: (storage, content)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if waiting(func, args, kwargs) or func.name().startswith("aten::lift_fresh"):  # the latter copies from the host
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.name()}")
        written = self._written(func, args, kwargs)
        for tensor in written:
            self._keep(tensor)
        taken = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in leaves if _storage(leaf)._cdata not in taken]
        for leaf in made:
            self._made[_storage(leaf)._cdata] = _storage(leaf)
        if made or written:  # else it is a view of its arguments
            self.calls.append((func, args, kwargs, leaves if made else []))
        return result

    @staticmethod
    def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
        found = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return found

    def _keep(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage._cdata not in self._made and storage._cdata not in self._before:
            self._before[storage._cdata] = (storage, storage.clone())

    def put_back(self) -> None:
        """Undoes what recording did to tensors that were there before."""
        for storage, content in self._before.values():
            storage.copy_(content)
        self._before.clear()

    def spoil(self) -> None:
        """Fills what the step made with rubbish: before the first replay nothing of it exists."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(torch.is_inference_mode_enabled()))
            for *_, made in self.calls:
                for tensor in made:
                    if tensor.is_floating_point():
                        tensor.fill_(float("nan"))
                    elif tensor.dtype != torch.bool:
                        tensor.fill_(77)

    def replay(self) -> None:
        """Runs every call again: on the same arguments, into the same results."""
        for func, args, kwargs, made in self.calls:
            result = func(*args, **kwargs)
            if made:
                again = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
                for old, new in zip(made, again, strict=True):
                    old.copy_(new)


def _through_the_dispatcher(operator: str, backend: str, device: torch.device) -> Callable[..., tuple]:
    """The operator itself in place of ``ops.trusted``'s direct launch: a graph sees launches, the tape sees what goes through torch."""
    return ops.dispatched(operator, backend)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
