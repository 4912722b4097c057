"""The short way to a backend: arguments of known forms are not checked again, and do not go through torch's dispatcher.

In eager decoding both take the host longer than the launch (``bench/launch_overhead.py`` prints both ways). A call goes the short way where
one with the same forms has gone the long way without an error, and nobody could tell the difference: no compiler traces, no mode or
transform of torch is active, no profiler listens, no argument is of a class of its own or asks for a gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import dispatch
from .forms import Prepared, remember

_Operator = TypeVar("_Operator", bound=Callable[..., Any])
Bundle = Callable[..., tuple[tuple, dict[str, Any]]]
_PLAIN = (Tensor, nn.Parameter)
_UNCHANGING = {"visual_bound", "text_bound", "clean"}  # change no result and, in a reference's run, with every step: not part of the key
_known: dict[Hashable, Callable[..., Any]] = {}

_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_function_mode: Callable[[], bool] = torch._C._is_torch_function_mode_enabled
_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
_profiled: Callable[[], bool] = torch.autograd._profiler_enabled


def _alone() -> bool:
    """No mode, transform or profiler watches what is called."""
    return not (_dispatch_modes() or _function_mode() or _profiled()) and _transform() is None


def _form(value: Any) -> Hashable:
    """All about an argument but a tensor's address and content."""
    kind = value.__class__
    if kind in _PLAIN:
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_neg()
    return kind, value


def _ordinary(value: Any) -> bool:
    """An argument that may go the short way."""
    if isinstance(value, Tensor):
        return type(value) in _PLAIN and value.layout == torch.strided and not value.requires_grad and not value.is_neg()
    return value is None or isinstance(value, bool | int | float | str)


def _harmless(value: Any) -> bool:
    """A bound or ``clean`` that needs no check."""
    return value is None or value is True or value is False or (value.__class__ is int and 0 <= value < 2**63)


def _short(name: str, bundle: Bundle | None, scaled: bool, args: tuple, named: dict[str, Any], result: type) -> Callable[..., Any]:
    """The call without checks, for arguments of these forms."""
    choice, device = named.get("backend", "auto"), args[0].device
    given = named.get("scale")
    scale = {"scale": float(args[0].shape[-1] ** -0.5 if given is None else given)} if scaled else {}
    wrap = getattr(result, "_make", None)
    prepared = Prepared()

    def call(*args: Any, backend: Any = None, **named: Any) -> Any:
        module = dispatch.resolve(choice, device, name)
        named.update(scale)
        if bundle is not None:
            args, named = bundle(*args, **named)
        if name in getattr(module, "PREPARES", ()):
            named["prepared"] = prepared
        made = getattr(module, name)(*args, **named)
        return made if wrap is None else wrap(made)

    return call


def operator(bundle: Bundle | None = None) -> Callable[[_Operator], _Operator]:
    """Decorates a public operator.

    Args:
        bundle: makes of the public arguments, but for ``backend``, the positional and the named ones of the backends' function of the same
            name (``ops.contract``); None: they are the same. ``scale=None`` has become ``D ** -0.5`` of the first argument before.
    """

    def decorate(call: _Operator) -> _Operator:
        name = call.__name__
        scaled = "scale" in inspect.signature(call).parameters

        @functools.wraps(call)
        def quick(*args: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling() or not args or not _alone():
                return call(*args, **named)
            try:
                forms = [(word, _form(value)) for word, value in named.items() if word not in _UNCHANGING]
                key: Hashable = (name, *map(_form, args), *forms)
                known = _known.get(key)
            except (RuntimeError, TypeError):  # a tensor without strides, an argument that nobody expects
                return call(*args, **named)
            if known is not None and all(_harmless(named.get(word)) for word in _UNCHANGING):
                return known(*args, **named)
            made = call(*args, **named)
            if known is None and all(map(_ordinary, args)) and all(map(_ordinary, named.values())):
                remember(_known, key, _short(name, bundle, scaled, args, named, type(made)))
            return made

        return cast(_Operator, quick)

    return decorate
