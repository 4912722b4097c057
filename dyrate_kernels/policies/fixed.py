"""Fixed prune: one constant rate, the ranking renewed at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dyrate_kernels.policies.base import Decision, Policy, View, bound_for_rate, check_rate, constant_count, constant_rate


@dataclass(frozen=True)
class Fixed(Policy):
    """The same rate at prefill and at every decode step; each step ranks by its own importance.

    Attributes:
        k: first pruned layer.
        rate: fraction removed, in [0, 1].
    """

    rate: float = 0.5

    name: ClassVar[str] = "fixed"
    constant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rate(self.rate)

    @property
    def drops(self) -> bool:
        return self.rate > 0

    def kept_bound(self, n_visual: int) -> int:
        return bound_for_rate(n_visual, self.rate)

    def decide(self, view: View) -> Decision:
        return Decision(constant_rate(self.rate, view.n_visual), constant_count(self.rate, view.n_visual))
