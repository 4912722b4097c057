"""Keeps every visual token: the unpruned model, run through the same cache and kernels, with the same statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dyrate_kernels.policies.base import Decision, Policy, View, constant_rate


@dataclass(frozen=True)
class KeepAll(Policy):
    """Never drops anything. ``k`` only says at which layer (``k-1``) the statistics are taken."""

    name: ClassVar[str] = "none"
    at_prefill: ClassVar[bool] = False
    at_decode: ClassVar[bool] = False
    constant: ClassVar[bool] = True

    @property
    def drops(self) -> bool:
        return False

    def decide(self, view: View) -> Decision:
        return Decision(constant_rate(0.0, view.n_visual), view.n_visual.clone())
