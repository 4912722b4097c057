"""What ``triton_kernels.interpreter`` spares the interpreter in each launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from dyrate_kernels import ops


def _select(batch: int) -> None:
    full = torch.full((batch,), 20, dtype=torch.int32)
    kept, _ = ops.select_tokens(torch.rand(batch, 20), full - 5, full, backend="triton")
    assert (kept >= 0).sum() == 15 * batch


def test_a_launch_patches_the_language_as_often_for_nine_programs_as_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original, patched = interpreter._patch_lang_tensor, []

    def patch(tensor: Any, *scope: Any) -> None:
        patched.append(tensor)
        original(tensor, *scope)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    _select(1)  # the first call rewrites the functions, which adds to what their modules see
    before, seen = tl.load, []
    for batch in (1, 9):
        patched.clear()
        _select(batch)
        seen.append(len(patched))
        assert tl.load is before, "a launch left its own function in place"
    assert seen[0] == seen[1] > 1, seen


def test_no_sum_is_made_for_an_assertion_that_the_interpreter_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an overflow was looked for")

    monkeypatch.setattr(TritonSemantic, "device_assert", refused)
    _select(2)
