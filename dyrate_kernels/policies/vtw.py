"""VTW (arXiv 2405.05803): all visual tokens leave before layer k."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from typing_extensions import Self

from dyrate_kernels.policies.base import Decision, ModelShape, Policy, View, check_fraction, check_k, check_k_range, constant_rate


@dataclass(frozen=True)
class VTW(Policy):
    """Withdraws every visual token from layers >= k, at prefill.

    Attributes:
        k: first layer without visual tokens; None: half of the layers (the published 16 of 32).
    """

    k: int | None = None  # type: ignore[assignment]  # an int once bound

    name: ClassVar[str] = "vtw"
    at_decode: ClassVar[bool] = False
    constant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k is not None:
            check_k(self.k)

    def bind(self, shape: ModelShape) -> Self:
        k = self._first(shape.num_layers)
        check_k_range(k, shape.num_layers)
        return replace(self, k=k)

    def at_strength(self, strength: float, num_layers: int) -> Self:
        check_fraction("strength", strength, "how much to prune")
        return replace(self, k=num_layers - 1 - round(strength * (num_layers - 2)))

    def layer_groups(self, num_layers: int) -> list[int]:
        return [self._first(num_layers)]

    def kept_bound(self, n_visual: int) -> int:
        return min(n_visual, 1)

    def decide(self, view: View) -> Decision:
        return Decision(constant_rate(1.0, view.n_visual), torch.zeros_like(view.n_visual))

    def _first(self, num_layers: int) -> int:
        return max(num_layers // 2, 1) if self.k is None else self.k
