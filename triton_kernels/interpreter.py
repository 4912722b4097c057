"""Helpers for running under Triton's interpreter (``TRITON_INTERPRET=1``, on a CPU); nothing here is used on a GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


@functools.cache
def prepare() -> None:
    """Lets ``range`` take bounds that a kernel has computed, and leaves out what the interpreter does in vain."""
    from triton.runtime import interpreter

    _take_computed_bounds(interpreter)
    _patch_each_module_once(interpreter)
    _check_no_overflow(interpreter)


def _take_computed_bounds(interpreter: Any) -> None:
    """Triton 3.4 to 3.8 turn such a bound into a number by ``int()`` of a one-element array, which numpy from 2.4 on refuses."""
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    interpreter._patch_lang_tensor = patch


def _patch_each_module_once(interpreter: Any) -> None:
    """The interpreter puts its own functions into ``triton.language`` for a launch, and again, all of them, for each call of a device
    function inside, which takes half of its time: what a module sees stays in place until the launch ends."""
    original, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return original(function)

    @functools.wraps(launch)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, call


def _check_no_overflow(interpreter: Any) -> None:
    """Each sum and product of integers is made a second time in 64 bits, for an assertion that the interpreter drops."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
