"""``patch(model)``, ``unpatch(model)`` and the ``Handle`` between them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dyrate_kernels import policies, specs
from dyrate_kernels import vision as reducers
from dyrate_kernels.generation.session import Session
from dyrate_kernels.ops import dispatch
from dyrate_kernels.patching import attention, calls
from dyrate_kernels.patching.assisted import one_at_a_time
from dyrate_kernels.patching.calls import Call
from dyrate_kernels.patching.fused import Fused, unknown_layers
from dyrate_kernels.patching.generate import Generations
from dyrate_kernels.patching.graph import StepGraph
from dyrate_kernels.patching.hooks import PassHooks
from dyrate_kernels.patching.lookup import (
    check_supported,
    decoder_layers,
    decoder_of,
    deepstack_layers,
    shape_of,
)
from dyrate_kernels.patching.overrides import Override
from dyrate_kernels.patching.parallel import head_shards
from dyrate_kernels.patching.path import path_of
from dyrate_kernels.patching.reduction import ReducedPrompts
from dyrate_kernels.patching.shrink import ShrinkHooks
from dyrate_kernels.patching.vision import PIXELS, check_reducers
from dyrate_kernels.patching.wrapped import unwrapped
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.retention import Retention
from dyrate_kernels.stats import Path, Stats
from dyrate_kernels.stats_from_record import stats_from_record
from dyrate_kernels.vision import Reducer

logger = logging.getLogger(__name__)

_HANDLE = "_dyrate_handle"
_NO_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def patch(
    model: Any,
    policy: str | Policy = "dyrate",
    *,
    retention: str = "recoverable",
    pool: float | None = None,
    pool_by: str | float | None = None,
    backend: str = "auto",
    predictor: Any = None,
    k: int | None = None,
    record_importance: bool = False,
    cuda_graph: bool | None = None,
    fuse: bool | None = None,
    exact: bool = False,
    vision: str | Reducer | Sequence[str | Reducer] | None = None,
) -> Handle:
    """Makes ``model.generate`` drop visual tokens while it generates, on the fastest path there is. Works on this instance only;
    ``unpatch`` undoes it. The path is chosen in each generation; ``stats().path`` says which it was, and what kept it from a faster one.

    Args:
        model: a supported vision-language model (``families.FAMILIES``), or what ``torch.compile`` or PEFT made of one: then the
            model inside is patched.
        policy: a name of ``dyrate_kernels.policies.names()``, with options if wanted (``"fastv:rate=0.5"``), or a policy object, e.g.
            ``policies.FastV(k=3, rate=0.5)``.
        retention: ``"recoverable"`` (every row stays; layers >= k read only the chosen ones, which may come back), ``"evict"`` (dropped
            rows are gone, the prompt is shrunk in layers >= k) or ``"pool"`` (layers >= k hold a part of each picture, to which the
            prompt is shrunk; within it steps choose as under ``recoverable``). Also a text with options: ``"pool=0.5:by=uniform"``.
        pool: of ``"pool"``: that part, in (0, 1]; None: 0.25. Every picture keeps one token at least.
        pool_by: of ``"pool"``: which tokens: ``"policy"`` (the highest by the policy's ranking at the prompt's last row; as None),
            ``"uniform"`` (evenly spaced over each picture), or the share of the pool, in [0, 1], that is evenly spaced.
        backend: ``"auto"``, ``"triton"``, ``"cuda"`` or ``"reference"``; see ``dyrate_kernels.backends()``.
        predictor: for the policy name ``"dyrate"``: a ``DyRatePredictor``, a folder or a hub id; None is the
            one in the model's own folder (but with retention ``evict``: it was trained for tokens that come back), else the closed form.
        k: for a policy given by name: first layer that sees the pruned set, 1 .. L-1.
        record_importance: keep importance and kept tokens of every step for ``stats()`` (costs ``5 * N`` bytes a step and sequence).
        cuda_graph: a decode step is captured once in a ``generate()`` and replayed for the tokens that follow (``patching.graph``), with
            the same results. None: on one CUDA device, where enough new tokens may come for that to pay. True: however few may come, and
            a warning says why where it cannot be, once. False: never.
        fuse: RMSNorm, rotary embedding and gate of the decoder layers are one launch each (``patching.fused``) on backend ``triton``;
            results differ by rounding. None: where the weights are float16 or bfloat16. True: in float32, too, and a warning says why where
            it cannot be, once. False: never.
        exact: the model's own chain of operations in every layer: nothing is fused. Steps are captured all the same.
        vision: reducers that leave fewer visual tokens before the language model: a name of ``dyrate_kernels.vision.names()``, with options
            (``"aim:keep=0.5"``), several (``"tome+aim"``), a ``Reducer``, or a list of these; None: none. They work in ``generate``;
            those that look into the vision tower (``Reducer.reads_tower``) need a LLaVA or PaliGemma with CLIP or SigLIP.

    Returns:
        A ``Handle``, also a context manager that unpatches at its end.

    Raises:
        TypeError: the model is not supported; the message names what is.
        ValueError: a bad argument, or one that does not fit this model.
        RuntimeError: the model is patched already, or the named backend cannot run.
    """
    model = unwrapped(model)
    family = check_supported(model)
    if _HANDLE in vars(model):
        raise RuntimeError("model is patched already; call dyrate_kernels.unpatch(model) first, then patch it with the new settings")
    held = specs.retention(retention, pool, pool_by)
    switches = _Switches(cuda_graph, fuse, exact)
    if not isinstance(record_importance, bool):
        raise TypeError(f"record_importance must be True or False, got {record_importance!r}")
    if isinstance(policy, str):
        options = {name: value for name, value in (("k", k), ("predictor", predictor)) if value is not None}
        policy = policies.parse(policy, **options)
    elif not isinstance(policy, Policy):
        raise TypeError(f"policy must be a name ({', '.join(policies.names())}) or a Policy object, got {type(policy).__name__}")
    elif predictor is not None or k is not None:
        raise ValueError("k and predictor go with a policy given by name; this policy object holds its own: set them there")
    held.check(policy)
    chain = reducers.chain(vision)
    check_reducers(model, chain)
    bound = policy.bind(shape_for(model, held))
    held.check(bound)
    deepstack = deepstack_layers(model)
    first = bound.layer_groups(len(decoder_layers(model)))[0]
    if held.shrinks and bound.at_prefill and first < deepstack:
        raise ValueError(
            f"k must be at least {deepstack} for this {model.config.model_type} with retention={held.name!r}, got {first}: visual features "
            f"are added to the hidden states after its first {deepstack} layers: no token can leave before; raise k, or use 'recoverable'"
        )
    dispatch.name_for(backend, next(model.parameters()).device)  # raises now, not in the middle of a generation
    if bound.merges and not held.shrinks:
        warnings.warn(
            f"policy {bound.name!r} merges dropped tokens into others, but retention='recoverable' drops none, so nothing is merged; "
            "patch with retention='evict', or set recycle=0",
            stacklevel=2,
        )
    handle = Handle(model, family, bound, held, backend, record_importance, switches, chain)
    logger.info("%s", handle)
    return handle


def unpatch(model: Any) -> None:
    """Puts everything back as it was before ``patch``, bit for bit.

    Raises:
        RuntimeError: the model is not patched.
    """
    handle = vars(unwrapped(model)).get(_HANDLE)
    if handle is None:
        raise RuntimeError("model is not patched; nothing to undo")
    handle.unpatch()


def shape_for(model: Any, retention: str | Retention) -> ModelShape:
    """Returns the shape that policies are bound to. Under ``evict`` the predictor in the model's folder is no default: it was trained for
    tokens that can come back, and here its boldest step would be the last word.
    """
    return ModelShape.from_config(model.config).replace(trained_by_default=not specs.retention(retention).moves)


@dataclass(frozen=True)
class _Switches:
    """The arguments of ``patch`` that choose a path."""

    cuda_graph: bool | None = None
    fuse: bool | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        for name in ("cuda_graph", "fuse"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{name} must be None (automatic), True or False, got {value!r}")
        if not isinstance(self.exact, bool):
            raise TypeError(f"exact must be True or False, got {self.exact!r}")
        if self.exact and self.fuse:
            raise ValueError("exact=True keeps the model's own chain of operations, which fuse=True replaces: leave one of them out")

    @property
    def unfused(self) -> str:
        """Returns the words for why nothing is fused where it is switched off."""
        return "exact=True" if self.exact else "fuse=False"

    def __str__(self) -> str:
        """Returns what differs from ``patch(model)``, as it would be written there."""
        given = ((name, getattr(self, name)) for name in ("cuda_graph", "fuse"))
        found = [f"{name}={value}" for name, value in given if value is not None] + (["exact=True"] if self.exact else [])
        return "".join(f", {each}" for each in found)


class Handle:
    """A patched model's controls. Made by ``patch``; usable as a context manager.

    Attributes:
        model: the patched model.
        policy: the policy, bound to the model.
        retention: as asked for, as ``str(Retention)`` writes it.
        fused: what turns fused modules on and off; None with ``fuse=False`` and ``exact=True``. unfused: which of these.
        graph: what captures and replays decode steps, and counts them; None with ``cuda_graph=False``.
        vision: the reducers before the language model, in order; empty: none.
        running: the calls of ``generate()`` under way, in all threads, the newest last.
    """

    def __init__(
        self,
        model: Any,
        family: Any,
        policy: Policy,
        retention: Retention,
        backend: str,
        record_importance: bool,
        switches: _Switches = _Switches(),
        vision: Sequence[Reducer] = (),
    ) -> None:
        self.model, self.family, self.policy, self.retention = model, family, policy, str(retention)
        self._shrinks = retention.shrinks and policy.at_prefill
        self.vision = tuple(vision)
        self._asked_backend = backend
        self.record_importance = record_importance
        self.heads = head_shards(model)
        self._switches, self.unfused = switches, switches.unfused
        if switches.cuda_graph and self.heads is not None:
            warnings.warn(
                "cuda_graph=True has no effect: the model's heads are shared among processes. "
                "Decode steps run eagerly, with the same results.",
                stacklevel=3,
            )
        self.running: list[Call] = []
        self._active = True
        self._overrides: list[Override] = []
        self._shrink: ShrinkHooks | None = None
        captures = switches.cuda_graph is not False and self.heads is None
        self.graph = StepGraph(self, automatic=switches.cuda_graph is None) if captures else None
        fuses = switches.fuse is not False and not switches.exact
        self.fused = Fused(automatic=switches.fuse is None) if fuses else None
        self._hooks, self._reduced = PassHooks(self), ReducedPrompts(self)
        self._generations = Generations(self, self._reduced)
        try:
            self._install()
        except BaseException:
            self.unpatch()
            raise

    @property
    def backend(self) -> str:
        """The backend of the next generation: ``auto`` follows the model when it is moved to another device."""
        return dispatch.name_for(self._asked_backend, next(self.model.parameters()).device)

    @property
    def shape(self) -> ModelShape:
        """The text model's shape as it is now; another after ``model.to(dtype)`` or with an adapter."""
        shape = shape_of(self.model)
        return shape if self.heads is None else shape.replace(stored_weights=None)  # costs are of the whole model, not of a process's share

    def _install(self) -> None:
        model, layers = self.model, len(decoder_layers(self.model))
        vars(model)[_HANDLE] = self
        reads = self.policy.reads_hidden or (self._shrinks and self.policy.merges)
        deciding = {start - 1 for start in self.policy.layer_groups(layers)} if reads else set()
        for index, module in enumerate(_attention_modules(model)):
            attention.swap(module, shows_hidden=index in deciding)
        if self.fused is not None and not self.fused.automatic:
            unknown = unknown_layers(model)
            if unknown is not None:
                self.fused.tell(unknown)
            self.fused.install(decoder_of(model))
        self._hooks.install()
        if self._shrinks:
            self._shrink = ShrinkHooks(decoder_layers(model), self.policy.layer_groups(layers))
        answered = {
            "generate": "generate",
            "_prepare_cache_for_generation": "prepare_cache",
            "prepare_inputs_for_generation": "prepare_inputs",
        }
        if one_at_a_time(self.policy):
            answered["_get_candidate_generator"] = "candidates"
        answered |= {name: "refuse_batching" for name in _NO_BATCHING if hasattr(model, name)}
        for name, answer in answered.items():
            self._overrides.append(Override(model, name, self._generations, f"answer_{answer}"))
        if self.vision:
            for kind in PIXELS:
                if hasattr(model.base_model, f"get_{kind}_features"):
                    self._overrides.append(Override(model.base_model, f"get_{kind}_features", self._reduced, f"answer_{kind}_features"))
            if hasattr(model.base_model, "get_rope_index"):
                self._overrides.append(Override(model, "_prepare_position_ids_for_generation", self._reduced, "answer_prepare_positions"))
        if self.graph is not None:
            self.graph.install()

    def unpatch(self) -> None:
        """Undoes the patch; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        model = self.model
        self._hooks.remove()
        if self._shrink is not None:
            self._shrink.remove()
        if self.fused is not None:
            self.fused.remove(decoder_of(model))
        for module in _attention_modules(model):
            attention.restore(module)
        for override in self._overrides:
            override.remove()
        vars(model).pop(_HANDLE, None)
        if self.graph is not None:
            self.graph.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """The handle of a copied model, in which nothing is under way."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self) | {"running": []}, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(attention.UNPATCH_FIRST)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        layers, path = decoder_layers(self.model), self.path
        state = "patched" if self._active else "no longer patched"
        return (
            f"Handle({type(self.model).__name__} {state}: {len(layers)} text attention modules "
            f"({type(layers[0].self_attn).__name__}), policy={self.policy}, retention={self.retention}, backend={self.backend}"
            f"{f', vision={list(self.vision)}' if self.vision else ''}{self._switches}{'' if path is None else f'; last: {path}'})"
        )

    @property
    def path(self) -> Path | None:
        """The path of the generation under way, or else of the last one; None: there was none. Reads nothing on a device."""
        call = calls.current(self) or next((call for call in reversed([*self.running]) if call.session is not None), None)
        return self._generations.path if call is None or call.session is None else path_of(self, call)

    def stats(self, sequence: int | None = None, new_tokens: int | None = None) -> Stats:
        """Returns what the last generation really did. Reads the device once.

        Args:
            sequence: what this sequence of the batch would have reported alone; None: of all.
            new_tokens: of its first tokens, where it ended before others of its batch; None: of all steps.

        Raises:
            RuntimeError: nothing was generated yet; or ``sequence`` is None, and some left the batch before the others (``leaving``).
            ValueError: there is no such sequence or step.
        """
        session = self.session
        last = self._generations.last if session is None else session.snapshot()
        if last is None:
            raise RuntimeError("nothing was generated yet: call model.generate(...) on the patched model, then stats()")
        if isinstance(last, str):
            raise RuntimeError(f"stats() has nothing of the last generate(): {last}")
        return replace(stats_from_record(last, sequence, new_tokens), path=self.path)

    @property
    def session(self) -> Session | None:
        """Of the generation under way: of this thread, else the newest one; None while there is none."""
        call = calls.current(self)
        if call is not None:
            return call.session
        return next((call.session for call in reversed([*self.running]) if call.session is not None), None)


def _attention_modules(model: Any) -> list[Any]:
    return [layer.self_attn for layer in decoder_layers(model)]
