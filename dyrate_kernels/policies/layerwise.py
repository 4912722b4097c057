"""A rate for each group of layers: deeper layers look at the picture less, and not at the same parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels import ops
from dyrate_kernels.policies.base import IMAGE, Decision, ModelShape, Policy, View, bound_for_rate, check_count, check_fraction
from dyrate_kernels.predictor import ClosedForm, check_rates, named_rates


@dataclass(frozen=True)
class LayerWise(Policy):
    """DyRate's closed form (``predictor.ClosedForm``) once for each group of layers, in every step: its rate follows the visual mass that
    the layer before the group measures, relative to that layer's own mass at the prompt's last row. A group keeps none but the tokens of
    the group before it [choice].

    Attributes:
        k: first pruned layer.
        groups: into how many the layers from k on are divided, as evenly as can be.
        rates: ``"half_open"``, ``"closed"`` or an ascending list of fractions removed.
        num_rates: K for the two named sets.
        num_layers, num_heads: L and Hq, filled by ``bind``.
    """

    groups: int = 2
    rates: str | Sequence[float] = "half_open"
    num_rates: int = 5
    num_layers: int | None = field(default=None, repr=False, metadata={"bound": True})
    num_heads: int | None = field(default=None, repr=False, metadata={"bound": True})

    name: ClassVar[str] = "layerwise"
    rescores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("groups", self.groups, "groups of layers, each with a kept set of its own")
        check_count("num_rates", self.num_rates, "how many rates there are to choose from")
        if isinstance(self.rates, str):
            named_rates(self.rates, self.num_rates)
        else:
            object.__setattr__(self, "rates", check_rates("rates", self.rates, ascending=True))

    def bind(self, shape: ModelShape) -> Self:
        super().bind(shape)
        return replace(self, num_layers=shape.num_layers, num_heads=shape.num_heads)

    def at_strength(self, strength: float, num_layers: int) -> Self:
        check_fraction("strength", strength, "how much to prune")
        return replace(self, rates=ClosedForm.stretched(self.rate_values, strength))

    @property
    def rate_values(self) -> tuple[float, ...]:
        """The K rates."""
        return named_rates(self.rates, self.num_rates) if isinstance(self.rates, str) else tuple(self.rates)

    def settings(self) -> dict[str, Any]:
        found = super().settings() | {"rates": [round(rate, 4) for rate in self.rate_values]}
        return {name: value for name, value in found.items() if name != "num_rates"}

    @property
    def drops(self) -> bool:
        return max(self.rate_values) > 0

    def layer_groups(self, num_layers: int) -> list[int]:
        depth = num_layers - self.k
        groups = min(self.groups, depth)
        return [self.k + depth * group // groups for group in range(groups)]

    def kept_bound(self, n_visual: int) -> int:
        return bound_for_rate(n_visual, min(self.rate_values))

    def start(self, n_visual: Tensor) -> dict[str, Tensor]:
        if self.num_layers is None or self.num_heads is None:
            raise RuntimeError("LayerWise must be bound to a model first: policy.bind(shape)")
        batch, device = n_visual.shape[0], n_visual.device
        form = ClosedForm(self.num_heads, self.rate_values)
        tensors = {"weight": form.weight, "bias": form.bias, "rates": torch.tensor(form.rates, dtype=torch.float64)}
        with torch.inference_mode(False):
            state = {name: tensor.to(device).expand(batch, *tensor.shape).contiguous() for name, tensor in tensors.items()}
            return {**state, "first_mass": torch.zeros(batch, len(self.layer_groups(self.num_layers)), device=device)}

    def decide(self, view: View) -> Decision:
        first = view.state["first_mass"][:, view.group]
        now = view.mass.detach()[:, :, IMAGE].mean(1).to(first.dtype)
        first.copy_(torch.where(view.step == 0, now, first))
        logits = torch.einsum("bf,bkf->bk", view.mass.flatten(1).float(), view.state["weight"]) + first[:, None] * view.state["bias"]
        rate = view.state["rates"].gather(1, logits.argmax(1, keepdim=True))[:, 0]
        return Decision(rate, ops.keep_count(view.n_visual, rate))
