"""Captured steps: one decode step is captured as a CUDA graph and replayed for the steps that follow.

``patch(model)`` decides in each ``generate()`` whether it does that (``cuda_graph=None``): on one CUDA device, where enough tokens may
come for the capture to pay. What keeps it from it is told by ``stats().path``. ``cuda_graph=True`` captures however few may come, and warns
where it cannot.

A decode step reads nothing on the host and depends on no host number that changes from step to step (docs/design.md, section 6), so a
capture of it stays valid while lengths, rates and kept sets change. What a capture does bake in is compared before every replay
(``Session.step_state``): the addresses of the rows', the record's and the policy's tensors, capacities, the batch, which sliding windows
are full. Where one of them changed (a text region that grew, a window that was reached) the step is captured anew.

The life of a graph is one ``generate()`` call: its first decode step runs eagerly on the capture stream (it compiles kernels and allocates
workspaces), the second is captured and replayed at once, all others are replayed. A capture costs the host about what an eager step costs,
plus the instantiation, so it pays from a few tokens on (``capture_from`` of a device's file). The memory of a graph (the results of one
step, the kernels' scratch memory) is its own and is given back with it: a pool shared between graphs would let a replay of one overwrite
the kept list that another left behind.

Every other pass (prompts, chunks, drafts, steps outside of ``generate()``, ``output_hidden_states``, assisted decoding) runs as it would
without this file.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.utils import ModelOutput

from dyrate_kernels import devices
from dyrate_kernels.generation.aside import Aside
from dyrate_kernels.generation.session import Session, StepState
from dyrate_kernels.ops import workspace
from dyrate_kernels.patching import aside, calls
from dyrate_kernels.patching.cache import VisualCache
from dyrate_kernels.patching.calls import Call, PatchOwner
from dyrate_kernels.patching.lookup import CACHE_NAMES, cache_in, cache_name

logger = logging.getLogger(__name__)

_CACHE = object()  # stands for the cache in the outline of a step's output
_NOT_IN_A_STEP = ("labels", "mm_encoder_outputs")  # arguments that make a pass something else than a plain step, as does any pixel_values*
_IGNORED = (*CACHE_NAMES, "attention_mask")  # the cache knows its rows: a decode step reads no mask
_FOR_POSITIONS = ("mm_token_type_ids",)  # what positions would follow from; it grows with every step in older versions of transformers
CAPTURE_FROM = 8  # new tokens, where no file of the device says otherwise: a guess, two replays more than three eager steps cost
_MOST_WARM_UPS = 3  # in a row: then every step changes what a capture must find unchanged
_REPLACED = "a step replaces tensors that the next step reads (a policy writes its state in place, tensor.copy_(..))"
_QUIET_HOOKS = ("dyrate_kernels.", "transformers.")  # modules whose hooks a replay may leave out: they act in other passes only


class CannotCapture(RuntimeError):
    """Why a step cannot be captured, in words for the user."""


class Recorder(Protocol):
    """Recorder of a step, which can then be replayed. One seam, so that tests can record without a GPU.

    Attributes:
        aside: where part of a step can run beside the rest, in a warm-up as in the record.
    """

    @property
    def aside(self) -> Aside: ...

    def warm_up(self) -> AbstractContextManager[Any]:
        """Where the steps before a capture run."""

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Calls ``step`` once without any effect on a device. Returns what makes the effect, and what the step returned."""


class CudaRecorder:
    """``torch.cuda.CUDAGraph`` on a side stream.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.aside = aside.SideStream(device)

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self.device)
        # not torch.cuda.graph(): it empties the allocator's cache first, which the next prompt would have to fill again
        with torch.cuda.stream(self.stream):
            # thread_local: another thread, which reads a streamer, may use the GPU meanwhile
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                with _no_garbage_collection():  # it might destroy an older graph, which breaks a capture
                    result = step()
            except BaseException:
                with contextlib.suppress(Exception):  # the end of a broken capture fails too, and says less
                    self._end(graph, pool)
                raise
            self._end(graph, pool)
        return graph.replay, result

    def _end(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Ends the capture, also for the allocator and the random generator, which torch leaves in it where the end fails."""
        try:
            graph.capture_end()
        except BaseException:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            for undo in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with contextlib.suppress(Exception):
                    getattr(torch._C, undo)(index, pool)
            with contextlib.suppress(Exception):
                generator = torch.cuda.default_generators[index]
                generator.graphsafe_set_state(generator.clone_state())  # the clone is in no capture
            raise


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def recorder_for(device: torch.device) -> Recorder:
    """The recorder for a model on ``device``.

    Raises:
        CannotCapture: it is no CUDA device.
    """
    if device.type != "cuda":
        raise CannotCapture(f"the model is on the device {str(device)!r}, and CUDA graphs need a CUDA device")
    return CudaRecorder(device)


@dataclass
class _Inputs:
    """The arguments of a step: tensors, whose content may change, and the rest, which a capture bakes in."""

    tensors: dict[str, Tensor]
    constants: dict[str, Any]

    @property
    def key(self) -> tuple:
        """Returns what must be equal for a capture to serve."""
        shapes = tuple((name, value.shape, value.dtype, value.device) for name, value in self.tensors.items())
        return shapes, tuple(self.constants.items())


@dataclass
class _Captured:
    """A captured step.

    Attributes:
        key: ``_key`` of the step it was captured in.
        replay: runs it.
        output: its result: tensors at fixed addresses, ``_CACHE`` for the cache.
        make: builds the result that the model's ``forward`` gives.
        read: of ``StepState.made`` what it reads and eager code may have replaced: by index, the address.
        made: of ``StepState.made`` what it makes: by index, the tensor.
    """

    key: tuple
    replay: Callable[[], None]
    output: dict[Any, Any]
    make: Callable[[dict[Any, Any]], Any]
    read: dict[int, int | None]
    made: dict[int, Tensor]

    def serves(self, key: tuple, state: StepState) -> bool:
        """The state is the one it was captured in."""
        return self.key == key and all(_address(state.made[index]) == address for index, address in self.read.items())

    def result(self, cache: Any) -> Any:
        """A copy of the output: the next replay overwrites the original, and generate() or the user may hold on to this."""
        return self.make(
            {
                name: cache if value is _CACHE else value.clone() if isinstance(value, Tensor) else value
                for name, value in self.output.items()
            }
        )


@dataclass
class _Run:
    """The state of one ``generate()``. ``recorder`` None: it runs eagerly, reason: why. scratch: the kernels', of this run's graphs alone.

    replays: steps that were replayed, the captured ones included. aside: where their decisions run; None: in their place.
    """

    session: Session
    recorder: Recorder | None
    reason: str | None = None
    aside: Aside | None = None
    replays: int = 0
    warmed: tuple | None = None  # key of the last warm-up step
    warm_ups: int = 0  # since the last capture
    captured: _Captured | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)  # arguments of the step, at fixed addresses
    scratch: workspace.Owner = field(default_factory=workspace.Owner)

    def end(self) -> None:
        """Nothing is replayed any more: what the last step left to the next one is done."""
        if not self.session.in_forward and self.captured is not None:
            self.session.store.settle()
        self.captured = None
        self.scratch.release()


class StepGraph:
    """Stands in for the ``forward`` of one patched model.

    Args:
        owner: the ``Handle`` of the patched model.
        automatic: steps are captured where that pays, and nobody is warned where they cannot be.

    Attributes:
        captures, replays: how many steps were captured (each is also replayed once) and how many replayed in all.
        off: why this handle captures nothing any more; None while it may.
    """

    def __init__(self, owner: PatchOwner, automatic: bool = False) -> None:
        self.owner, self.automatic = owner, automatic
        self.captures = self.replays = 0
        self.off: str | None = None
        self._told: set[str] = set()
        self._recorders: dict[torch.device, Recorder] = {}

    def __repr__(self) -> str:
        return f"StepGraph(captures={self.captures}, replays={self.replays}, off={self.off!r})"

    @property
    def __signature__(self) -> inspect.Signature:  # transformers looks up which arguments forward takes
        return inspect.signature(self.eager)

    @property
    def eager(self) -> Callable[..., Any]:
        """The model's own forward."""
        model = self.owner.model
        return MethodType(type(model).forward, model)  # not __get__, which torch.compile takes for the instance's own forward

    def install(self) -> None:
        """Takes the place of the instance's ``forward``; an automatic one not before the first generation that it captures in."""
        if not self.automatic:
            self._take_place()

    def _take_place(self) -> None:
        attributes = vars(self.owner.model)
        if attributes.get("forward") is self:
            return
        if "forward" in attributes:
            self.off = "the forward of this model instance was replaced before dyrate_kernels.patch() (accelerate's hooks do that)"
            self._tell(self.off)
            return
        attributes["forward"] = self

    def remove(self) -> None:
        """Gives ``forward`` back, also where accelerate has wrapped it meanwhile."""
        attributes = vars(self.owner.model)
        if attributes.get("forward") is self:
            del attributes["forward"]
        if attributes.get("_old_forward") is self:
            attributes["_old_forward"] = self.eager

    def begin(self, call: Call) -> None:
        """Decides whether steps of the turn that has begun are captured."""
        if call.graph is not None:
            call.graph.end()
        assert call.session is not None, "its cache is prepared"
        call.graph = None  # so that it does not count among those under way
        call.graph = self._run(call, call.session)
        if call.graph.recorder is not None:
            self._take_place()

    def _run(self, call: Call, session: Session) -> _Run:
        turn, model = session.turn, self.owner.model
        if self.off is not None:
            return _Run(session, None, self.off)
        if self.automatic:  # what the machine lacks is said first, and costs nothing
            try:
                self._recorder(next(model.parameters()).device)
            except CannotCapture as reason:
                return _Run(session, None, str(reason))
        if turn.frozen:
            return _Run(session, None, "draft tokens come several at a time")
        if any(other.thread != call.thread and getattr(other.graph, "recorder", None) is not None for other in self.owner.running):
            # of the same stream and the same scratch memory: this one runs eagerly beside it
            return _Run(session, None, "another thread's generation is captured on this model")
        try:
            if self.automatic:
                self._check_worth_it(turn.max_length - max(turn.end, session.store.length))
            recorder = self._checked_recorder()
            device = next(self.owner.model.parameters()).device
            return _Run(session, recorder, aside=recorder.aside if aside.wanted(device) else None)
        except CannotCapture as reason:
            self._tell(str(reason))
            return _Run(session, None, str(reason))

    def _check_worth_it(self, new_tokens: int) -> None:
        """Raises CannotCapture where a capture does not pay, where nobody has seen it succeed, or where someone looks on."""
        model = self.owner.model
        if torch._C._len_torch_dispatch_stack():
            raise CannotCapture("a TorchDispatchMode is active (a FLOP counter, say), which sees nothing of a replayed step")
        own = next((name for name, module in model.named_modules() if module is not model and "forward" in vars(module)), None)
        if own is not None:
            raise CannotCapture(f"{own} has a forward of its own, which a replay does not call; cuda_graph=True captures what it does")
        if getattr(model, "hf_quantizer", None) is not None:
            raise CannotCapture("the weights are quantised by kernels that may wait for the host; cuda_graph=True tries it all the same")
        least = _capture_from(next(model.parameters()).device)
        if new_tokens < least:
            raise CannotCapture(f"at most {new_tokens} new tokens may come, and a capture pays from {least} on")

    # ---- forward ----------------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = calls.current(self.owner)
        run = None if call is None else call.graph
        if call is None or run is None or run.recorder is None:
            return self.eager(*args, **kwargs)
        session = self._session_of_step(call, args, kwargs)
        inputs = None if session is None or run.session is not session else self._inputs(run, kwargs)
        if session is None or inputs is None:
            return self.eager(*args, **kwargs)
        session.reserve_step(apart=run.aside is not None)
        state = session.step_state()
        key = (inputs.key, state.sizes, state.lasting)
        if run.captured is not None:
            if run.captured.serves(key, state):
                return self._replay(run, run.captured, inputs, cache_in(kwargs))
            run.captured = None
        if run.warmed == key:
            return self._capture(run, key, state, inputs, kwargs)
        if run.warm_ups == _MOST_WARM_UPS:
            self._give_up(run, CannotCapture(_REPLACED))
            return self.eager(**kwargs)
        run.warm_ups += 1
        run.warmed, run.buffers = key, {name: value.clone() for name, value in inputs.tensors.items()}
        with run.recorder.warm_up():
            return self._step(run, inputs, cache_in(kwargs))

    def _session_of_step(self, call: Call, args: tuple, kwargs: dict) -> Session | None:
        """The session if this is a plain decode step of ``call``. Reads nothing on a device."""
        session = call.session
        if session is None or args or self.off is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        ids = kwargs.get("input_ids")
        cache = cache_in(kwargs)
        if not isinstance(cache, VisualCache) or cache.session is not session or not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        if ids.shape[0] != cache.batch_size or not session.is_decode(ids.shape[1]):
            return None
        return None if session.turn.frozen or session.in_forward else session

    @staticmethod
    def _inputs(run: _Run, kwargs: dict) -> _Inputs | None:
        """The arguments of a plain step, else None; the run notes why."""
        try:
            return _split(kwargs)
        except CannotCapture as reason:
            run.reason = str(reason)
            return None

    def _step(self, run: _Run, inputs: _Inputs, cache: VisualCache) -> Any:
        """The model's own forward on the buffers, as it is captured."""
        given = {**inputs.constants, **run.buffers, cache_name(): cache}
        if given.get("position_ids") is None:  # the model would count on the host
            given["position_ids"] = run.session.column.long()[None]
        with run.session.whole_regions(), run.session.decides_aside(run.aside), workspace.owned(run.scratch):
            return self.eager(**given)

    def _replay(self, run: _Run, captured: _Captured, inputs: _Inputs, cache: VisualCache) -> Any:
        _fill(run.buffers, inputs)
        run.session.replay(captured.replay, captured.made)
        self._count(run)
        return captured.result(cache)

    def _capture(self, run: _Run, key: tuple, before: StepState, inputs: _Inputs, kwargs: dict) -> Any:
        session, cache = run.session, cache_in(kwargs)
        assert run.recorder is not None
        recorder = run.recorder
        _fill(run.buffers, inputs)
        try:
            with session.undone_on_error():  # nothing happened on the device
                replay, output = recorder.record(lambda: self._step(run, inputs, cache))
                items, make = _outline(output, cache)
                after = session.step_state()
                if after.lasting != before.lasting:
                    raise CannotCapture(_REPLACED)
        except Exception as error:
            self._give_up(run, error)
            return self.eager(**kwargs)
        made = {index: tensor for index, tensor in enumerate(after.made) if tensor is not None and tensor is not before.made[index]}
        read = {index: _address(tensor) for index, tensor in enumerate(before.made) if index not in made}
        captured = run.captured = _Captured(key, replay, items, make, read, made)
        run.warm_ups = 0
        self.captures += 1
        session.carry_out(replay)  # so far nothing has run: the step that was captured takes place now
        self._count(run)
        return captured.result(cache)

    # ---- where it does not go ---------------------------------------------------------------------------------------------------

    def _count(self, run: _Run) -> None:
        self.replays += 1
        run.replays += 1

    def _checked_recorder(self) -> Recorder:
        """The recorder for a generation that begins now."""
        model = self.owner.model
        if model._compiled_call_impl is not None:
            raise CannotCapture("model.compile() compiled the call of this model, and what torch.compile runs is not captured")
        if _global_forward_hooks or _global_forward_pre_hooks:
            registered = "register_module_forward_hook, register_module_forward_pre_hook"
            raise CannotCapture(f"there is a hook on all modules ({registered}), which a replayed step would not call")
        for name, module in model.named_modules():
            if hasattr(module, "_hf_hook"):
                raise CannotCapture(f"accelerate's hooks are on the model ({name or type(model).__name__})")
            if module is not model and _has_foreign_hook(module):
                raise CannotCapture(f"{name} has a hook, which a replayed step would not call")
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1:
            raise CannotCapture(f"the model is spread over {len(devices)} devices ({', '.join(sorted(map(str, devices)))})")
        device = devices.pop()
        recorder = self._recorder(device)
        if model.training:
            raise CannotCapture("the model is in training mode; call model.eval()")
        if torch.is_autocast_enabled(device.type):
            raise CannotCapture("autocast is on, whose cache of cast weights a captured step cannot keep; load the model in half precision")
        return recorder

    def _recorder(self, device: torch.device) -> Recorder:
        if device not in self._recorders:
            self._recorders[device] = recorder_for(device)
        return self._recorders[device]

    def _give_up(self, run: _Run, error: Exception) -> None:
        run.recorder = run.captured = None
        what = str(error) if isinstance(error, CannotCapture) else f"{type(error).__name__}: {error}"
        self.off = run.reason = f"a decode step could not be captured: {what}"
        logger.debug("capture failed", exc_info=error)
        self._tell(self.off)

    def _tell(self, reason: str) -> None:
        if reason in self._told:
            return
        self._told.add(reason)
        if self.automatic:
            logger.info("decode steps run eagerly: %s", reason)
        else:
            warnings.warn(f"cuda_graph=True has no effect: {reason}. Decode steps run eagerly, with the same results.", stacklevel=2)


def _split(kwargs: dict[str, Any]) -> _Inputs:
    """The arguments of a plain step.

    Raises:
        CannotCapture: the pass asks for more.
    """
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name in _IGNORED or (name in _FOR_POSITIONS and kwargs.get("position_ids") is not None):
            continue
        more = value is not None and (name in _NOT_IN_A_STEP or name.startswith("pixel_values"))
        if more or (name in ("output_attentions", "output_hidden_states") and value):
            raise CannotCapture(f"a step is asked for more than the next token ({name})")
        if isinstance(value, Tensor):
            tensors[name] = value
        elif value is None or isinstance(value, bool | int | float | str):
            constants[name] = value
        else:
            raise CannotCapture(f"a step is given {name} as a {type(value).__name__}")
    return _Inputs(tensors, constants)


def _capture_from(device: torch.device) -> int:
    """From how many new tokens on a capture pays on this device."""
    if device.type != "cuda":
        return CAPTURE_FROM
    return int(devices.measured(torch.cuda.get_device_properties(device).name).get("capture_from", CAPTURE_FROM))


def _fill(buffers: dict[str, Tensor], inputs: _Inputs) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(inputs.tensors[name])


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _outline(output: Any, cache: Any) -> tuple[dict[Any, Any], Callable[[dict[Any, Any]], Any]]:
    """The parts of what ``forward`` returned, and what puts such parts together again.

    Raises:
        CannotCapture: it holds more than tensors and the cache.
    """
    kind = type(output)
    if isinstance(output, ModelOutput):
        items: dict[Any, Any] = dict(output.items())

        def make(parts: dict[Any, Any]) -> Any:
            return kind(**parts)
    elif kind is tuple:
        items = dict(enumerate(output))

        def make(parts: dict[Any, Any]) -> Any:
            return tuple(parts.values())
    else:
        raise CannotCapture(f"the model returns a {kind.__name__}")
    for name, value in items.items():
        if value is cache:
            items[name] = _CACHE
        elif value is not None and not isinstance(value, Tensor):
            raise CannotCapture(f"the model returns {name} as a {type(value).__name__} (is output_hidden_states set in its config?)")
    return items, make


def _has_foreign_hook(module: torch.nn.Module) -> bool:
    """Someone else waits for this module's forward."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        home = getattr(hook, "__module__", None) or type(hook).__module__
        if not home.startswith(_QUIET_HOOKS):
            return True
    return False
