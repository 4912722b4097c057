"""Tensors that were made under ``torch.inference_mode``, in a conversation that goes on outside of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def make_writable(owners: Iterable[Any]) -> None:
    """Puts copies in the place of inference tensors, which nothing may write outside of inference mode; inside of it does nothing.
    Names that stand for one tensor stand for one copy afterwards.

    Args:
        owners: objects whose attributes hold tensors, also in lists, tuples and dicts; **changed in place**.
    """
    if torch.is_inference_mode_enabled():
        return
    copies: dict[int, tuple[Tensor, Tensor]] = {}
    for owner in owners:
        for name, value in vars(owner).items():
            found = _writable(value, copies)
            if found is not value:
                setattr(owner, name, found)


def _writable(value: Any, copies: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Returns ``value`` itself where it holds no inference tensor."""
    if isinstance(value, Tensor):
        if not value.is_inference():
            return value
        return copies.setdefault(id(value), (value, value.clone()))[1]  # held, so that ids stay theirs
    if isinstance(value, dict):
        parts = [_writable(each, copies) for each in value.values()]
        changed = any(new is not old for new, old in zip(parts, value.values(), strict=True))
        return dict(zip(value, parts, strict=True)) if changed else value
    if isinstance(value, list | tuple):
        parts = [_writable(each, copies) for each in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
