"""A CUDA graph without a GPU: a tape of every operator that a step calls, which can be run again on the same tensors.

What makes it stand in for the real one: while recording, the step leaves no mark on tensors that were there before (their storages are put
back), what the step made holds rubbish until the first replay, every replay reads and writes the tensors of the recording (their
"addresses"), and what would wait for the device, or copy from the host, is refused.

Its second line (``generation.aside``) stands in for a second stream: what two streams may not do to each other between a fork and its
join is a ``Race``, and a replay runs the calls of the second line at once or as late as the join allows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dyrate_kernels import ops
from dyrate_kernels.generation.attend import OperatorStep
from dyrate_kernels.ops import workspace
from tests.host_sync import waiting


class TapeRecorder:
    """A ``dyrate_kernels.patching.graph.Recorder`` for any device.

    Args:
        late: the calls of the second line run at the join in a replay, not at once.

    Attributes:
        tapes: those recorded, in order.
        steps: how many steps ran inside of ``warm_up``.
        aside: the second line.
    """

    def __init__(self, late: bool = False) -> None:
        self.tapes: list[Tape] = []
        self.steps = 0
        self.aside = TapeAside()
        self.late = late

    @contextlib.contextmanager
    def warm_up(self) -> Any:
        self.steps += 1
        yield

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape = self.aside.tape = Tape(self.late)
        try:
            direct = mock.patch.object(ops, "trusted", _through_the_dispatcher)
            prepared = mock.patch.object(OperatorStep, "_attention", _attention)  # of the warm-up, which the step would launch again
            with tape, direct, prepared:
                result = step()
            tape.end()
        finally:
            self.aside.tape = None
            tape.put_back()
        tape.spoil()
        self.tapes.append(tape)
        return tape.replay, result


class TapeAside:
    """The second line of whatever tape is recording; with none, calls run in their place.

    Attributes:
        forks, joins: how many there were.
    """

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.forks = self.joins = 0

    @contextlib.contextmanager
    def fork(self) -> Iterator[None]:
        self.forks += 1
        with workspace.beside(), contextlib.nullcontext() if self.tape is None else self.tape.fork():
            yield

    def join(self) -> None:
        self.joins += 1
        if self.tape is not None:
            self.tape.join()


class Race(AssertionError):
    """Two lines of a step that run at the same time are in each other's way."""


@dataclass(frozen=True)
class _Place:
    """A tensor by its storage, so that holding it does not keep the tensor."""

    storage: Any
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        return cls(_storage(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.storage.device).set_(self.storage, self.offset, self.size, self.stride)


class _Call(NamedTuple):
    """An operator, what it took and the tensors that it made; func None: a join. aside: of the second line."""

    func: Any
    args: tuple
    kwargs: dict
    made: list
    aside: bool


class Tape(TorchDispatchMode):
    """Operators in the order of their calls, with the tensors they took and gave.

    Args:
        late: as of ``TapeRecorder``.
    """

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.calls: list[_Call] = []
        self._with_tensors: dict[bool, list[_Call]] = {}
        self._made: dict[int, Any] = {}  # storages made while recording, which stay alive
        self._of_main: set[int] = set()  # those of them that the main line made
        self._before: dict[int, tuple[Any, Any]] = {}  # storages that were there before and were written: (storage, content)
        self._aside = self._open = False  # calls are of the second line; it is not joined
        self._read: dict[int, str] = {}  # storages that the second line read since its fork: by which operator
        self._wrote: dict[int, str] = {}  # and wrote or made

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
            fresh = {_storage(leaf)._cdata for leaf in made}
            self._watch(func.name(), taken, {_storage(tensor)._cdata for tensor in written} | fresh, fresh)
            args, kwargs, leaves = tree_map_only(Tensor, _Place.of, (args, kwargs, leaves if made else []))
            self.calls.append(_Call(func, args, kwargs, leaves, self._aside))
        return result

    # ---- the second line ----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fork(self) -> Iterator[None]:
        """Within: calls are of the second line."""
        self._check_alive()
        self._aside = self._open = True
        try:
            yield
        finally:
            self._aside = False

    def join(self) -> None:
        """The main line waits for the second one."""
        self._check_alive()
        self.calls.append(_Call(None, (), {}, [], False))
        self._open = False
        self._read.clear()
        self._wrote.clear()

    def end(self) -> None:
        """The step is over.

        Raises:
            Race: the second line is not joined.
        """
        if self._open:
            raise Race("the step ends and its second line is not joined")

    def _watch(self, name: str, taken: set[int], written: set[int], made: set[int]) -> None:
        """Notes what a call of a line touches."""
        if self._aside:
            self._read |= dict.fromkeys(taken, name)
            self._wrote |= dict.fromkeys(written, name)
            return
        self._of_main |= made
        if not self._open:
            return
        self._check_alive()
        for storage in taken | written:
            if storage in self._wrote:
                raise Race(f"{name} of the main line touches what {self._wrote[storage]} of the second line, which is not joined, wrote")
        for storage in written:
            if storage in self._read:
                raise Race(f"{name} of the main line writes what {self._read[storage]} of the second line, which is not joined, reads")

    def _check_alive(self) -> None:
        """What the main line made and the second line reads is still there: else another tensor could be in its place."""
        for storage, name in self._read.items():
            if storage in self._of_main and torch._C._storage_Use_Count(storage) == 1:  # this tape's
                raise Race(f"nothing refers any more to what {name} of the second line, which is not joined, reads")

    # ---- recording ------------------------------------------------------------------------------------------------------------------

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
        for call in self.calls:
            for place in call.made:
                tensor = place.tensor()
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(77)

    def replay(self) -> None:
        """Runs every call again: on the same arguments, into the same results."""
        waiting: list[_Call] = []
        for call in self._bound():
            if call.func is None:
                for each in waiting:
                    _again(each)
                waiting.clear()
            elif call.aside and self.late:
                waiting.append(call)
            else:
                _again(call)


    def _bound(self) -> list[_Call]:
        """The calls with tensors in the places, made once for either mode of inference."""
        mode = torch.is_inference_mode_enabled()
        if mode not in self._with_tensors:
            self._with_tensors[mode] = [_Call(*tree_map_only(_Place, _Place.tensor, tuple(call))) for call in self.calls]
        return self._with_tensors[mode]


def _again(call: _Call) -> None:
    result = call.func(*call.args, **call.kwargs)
    if call.made:
        for old, new in zip(call.made, [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)], strict=True):
            old.copy_(new)


def _through_the_dispatcher(operator: str, backend: str, device: torch.device, prepared: Any = None) -> Callable[..., tuple]:
    """The operator itself in place of ``ops.trusted``'s direct launch: a graph sees launches, the tape sees what goes through torch."""
    return ops.dispatched(operator, backend)


def _attention(step: OperatorStep, layer: int, rows: ops.Rows) -> Callable[..., tuple]:
    return ops.dispatched("decode_attention", step.store.backend)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
