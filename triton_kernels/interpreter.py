"""Helpers for running under Triton's interpreter (``TRITON_INTERPRET=1``, on a CPU); nothing here is used on a GPU."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def prepare() -> None:
    """Lets ``range`` take bounds that a kernel has computed.

    Triton 3.4 to 3.8 turn such a bound into a number by ``int()`` of a one-element array, which numpy from 2.4 on refuses.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    interpreter._patch_lang_tensor = patch
