"""The state of one call of ``generate()``, shared with nobody else: two threads, or a ``generate()`` inside of another one, share nothing.

The call under way is known by a context variable, which each thread has for itself; a call inside of another one (a model that drafts for
itself, a logits processor that generates) stands in front of it until it ends.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from dyrate_kernels.families import Family
from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.generation.session import Session
from dyrate_kernels.patching.vision import PreparedPrompt
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.vision.base import Reducer


class PatchOwner(Protocol):
    """A patched model's ``Handle``, as the parts of the patch know it.

    Attributes:
        running: the calls of ``generate()`` under way, in all threads, the newest last.
        The others: as of ``Handle``.
    """

    model: Any
    family: Family
    policy: Policy
    retention: str
    record_importance: bool
    heads: HeadShards | None
    vision: tuple[Reducer, ...]
    graph: Any
    fused: Any
    unfused: str
    running: list[Call]

    @property
    def backend(self) -> str: ...

    @property
    def shape(self) -> ModelShape: ...


@dataclass(eq=False)
class Call:
    """One ``generate()`` of a patched model.

    Attributes:
        owner: the ``Handle`` of the model.
        outer: the call that this one was made in, of whatever model, or None.
        session: once its cache is prepared; None before, and where it runs on a cache that is none of ours.
        asks: what its caller said about the cache, by name (``use_cache``, ``cache_implementation``); not what the checkpoint says.
        unpruned: why nothing can be dropped in it, in words; None where its cache is ours.
        reduced: the prompt is reduced. keeps_width: and its hidden states are wanted at every column.
        mask: ``[B, S]``, the prompt's attention mask before it was reduced, where it was.
        features: what stands for the model's own visual features.
        asks_features: ``generate`` itself asks for these now, before it prepares its cache.
        passes: of the base model under way in this call's thread, the innermost last: whether it asks for these features now.
        graph: what ``StepGraph`` keeps for this call.
        plain: each sequence goes on by itself, a token at a time. prepares: the patch prepares the inputs of its passes.
        present: int64 ``[b]``, numbers of the sequences that are still in its passes (``leaving.dismiss``); None: all. widens: what to call
            ``remove()`` of then.
        layers: why its decoder layers are not fused, in words; None: they are.
        thread: identifier of the thread that it runs in.
    """

    owner: PatchOwner
    outer: Call | None
    session: Session | None = None
    asks: dict[str, Any] = field(default_factory=dict)
    unpruned: str | None = None
    reduced: bool = False
    keeps_width: bool = False
    mask: Tensor | None = None
    features: PreparedPrompt | None = None
    asks_features: bool = False
    passes: list[bool] = field(default_factory=list)
    graph: Any = None
    layers: str | None = None
    plain: bool = False
    prepares: bool = False
    present: Tensor | None = None
    widens: Any = None
    thread: int = field(default_factory=threading.get_ident)

    @property
    def nested(self) -> bool:
        """Returns whether it is made in another call of the same model: it drafts for that, or is a question on the way to its answer."""
        return self.outer is not None and self.outer.owner is self.owner


_CURRENT: ContextVar[Call | None] = ContextVar("dyrate_generate_call", default=None)


def _here() -> Call | None:
    """The innermost call under way in this thread, which may have inherited the context of another one."""
    call = _CURRENT.get()
    return call if call is not None and call.thread == threading.get_ident() else None


def current(owner: PatchOwner) -> Call | None:
    """The innermost call under way in this thread, if it is one of ``owner``'s."""
    call = _here()
    return call if call is not None and call.owner is owner else None


@contextlib.contextmanager
def begin(owner: PatchOwner) -> Iterator[Call]:
    """Within: a call of ``owner``'s."""
    call = Call(owner, _here())
    token = _CURRENT.set(call)
    try:
        yield call
    finally:
        _CURRENT.reset(token)
