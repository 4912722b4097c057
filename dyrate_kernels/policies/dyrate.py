"""DyRate (arXiv 2501.14204): a linear classifier reads the attention mass of every step and picks that step's rate."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels import ops
from dyrate_kernels.policies.base import (
    IMAGE,
    Decision,
    ModelShape,
    Policy,
    View,
    bound_for_rate,
    check_count,
    check_fraction,
    check_k_range,
)
from dyrate_kernels.policies.uniform import able_tokens
from dyrate_kernels.predictor import ClosedForm, DyRatePredictor, check_rates, named_rates, predictor_beside
from dyrate_kernels.spacing import evenly_spaced

TRAINED = "trained"
DEFAULT_K = 3  # FastV's and the paper's
_SHIFT = 10.0  # logits of a predictor differ by some units between rates 0 and 1


@dataclass(frozen=True)
class DyRate(Policy):
    """Rate = ``rates[argmax(weight @ mass + bias)]`` at prefill and at every decode step; the ranking is the step's
    own importance, or evenly spaced tokens for a part of the kept ones.

    Attributes:
        k: first pruned layer; mass and importance come from layer k-1. None: the predictor's own, else 3.
        predictor: a :class:`~dyrate_kernels.DyRatePredictor`, a folder or hub id to load one from, ``"closed-form"``
            for the one that needs no training (:class:`~dyrate_kernels.predictor.ClosedForm`), ``"trained"`` for the one saved in the
            model's own folder, or None: that one, if there is one (and, where k is given, for this k) and the retention is not ``evict``,
            else the closed form.
        rates: fractions removed to choose from: ``"half_open"``: i/K (0, .2, .4, .6, .8: never blinds the model);
            ``"closed"``: linspace(0, 1, K); or an ascending list. A trained predictor has its own rates, and these
            must not contradict them.
        num_rates: K for the two named sets.
        spread: fraction of the kept tokens that are evenly spaced over the picture, whatever their importance; the others are the most
            important of the rest. 0 is the paper's ranking; a step with more takes an operator call in place of the fused step. None:
            what a trained predictor was trained with, else 0 [choice: where attention to the picture is flat, importance ranks no better
            than chance, and the tokens it leaves out lie together].
    """

    k: int | None = None  # type: ignore[assignment]  # an int once bound
    predictor: DyRatePredictor | str | os.PathLike[str] | None = None
    rates: str | Sequence[float] = "half_open"
    num_rates: int = 5
    spread: float | None = None
    _on_device: _DeviceTensors | None = field(default=None, repr=False, compare=False, metadata={"bound": True})

    name: ClassVar[str] = "dyrate"

    def __post_init__(self) -> None:
        if self.k is not None:
            super().__post_init__()
        check_count("num_rates", self.num_rates, "how many rates there are to choose from")
        if isinstance(self.rates, str):
            named_rates(self.rates, self.num_rates)
        else:
            object.__setattr__(self, "rates", check_rates("rates", self.rates, ascending=True))
        if self.spread is not None:
            check_fraction("spread", self.spread, "the fraction of the kept tokens that are evenly spaced")
        if self.predictor is not None and not isinstance(self.predictor, DyRatePredictor | str | os.PathLike):
            raise TypeError(f"predictor must be a DyRatePredictor, a folder, a hub id or None, got {type(self.predictor).__name__}")

    def __repr__(self) -> str:
        """With the predictor that is used, once that is known: None stands for the closed form in a bound policy."""
        predictor = ClosedForm.source if self._on_device is not None and self.predictor is None else self.predictor
        return (
            f"{type(self).__name__}(k={self.k!r}, predictor={predictor!r}, rates={self.rates!r}, num_rates={self.num_rates!r}, "
            f"spread={self.spread!r})"
        )

    @property
    def rate_values(self) -> tuple[float, ...]:
        """The K rates this policy chooses from (a trained predictor's own once it is loaded)."""
        if isinstance(self.predictor, DyRatePredictor):
            return self.predictor.rates
        return named_rates(self.rates, self.num_rates) if isinstance(self.rates, str) else tuple(self.rates)

    def bind(self, shape: ModelShape) -> Self:
        """Loads the predictor if it is a name, and checks it against the model.

        Raises:
            ValueError: k outside [1, L-1]; a predictor of another shape, for another model, another k or with other
                rates.
            OSError: nothing can be loaded from ``predictor``.
        """
        if self.k is not None:
            check_k_range(self.k, shape.num_layers)
        predictor = self.predictor
        unsaid = predictor is None and self.rates == "half_open" and self.num_rates == 5  # nor was anything said about rates
        if (unsaid and shape.trained_by_default) or predictor == TRAINED:
            predictor = predictor_beside(shape.folder, self.k)
            if predictor is None and not unsaid:
                raise ValueError(
                    f"predictor='trained' needs one in the model's folder, and {shape.folder or 'that of this model'} holds none"
                    f"{'' if self.k is None else f' for k={self.k}'}; train one (dyrate train) and name its folder, or use 'closed-form'"
                )
        elif isinstance(predictor, str) and predictor == ClosedForm.source:
            predictor = None
        if predictor is not None:
            if not isinstance(predictor, DyRatePredictor):
                predictor = DyRatePredictor.from_pretrained(predictor)
            predictor.check(shape, predictor.k if self.k is None else self.k)
            asked = self.rates
            if asked != "half_open":  # the default says nothing about what was wanted
                wanted = named_rates(asked, len(predictor.rates)) if isinstance(asked, str) else tuple(asked)
                if wanted != predictor.rates:
                    raise ValueError(f"rates must be those of the predictor, {list(predictor.rates)}, got {asked!r}; leave rates out")
        spread = self.spread if self.spread is not None else predictor.spread if predictor is not None else 0.0
        k = self.k if self.k is not None else predictor.k if predictor is not None else DEFAULT_K
        bound = replace(self, k=k, predictor=predictor, spread=spread)
        check_k_range(k, shape.num_layers)
        linear = ClosedForm(shape.num_heads, bound.rate_values) if predictor is None else predictor
        object.__setattr__(bound, "_on_device", _DeviceTensors(linear))
        return bound

    @property
    def reads_hidden(self) -> bool:
        return isinstance(self.predictor, DyRatePredictor) and self.predictor.text_size > 0

    def at_strength(self, strength: float, num_layers: int) -> Self:
        """Of a bound policy: a trained predictor is shifted (``DyRatePredictor.shifted``), the closed form's rates are stretched."""
        check_fraction("strength", strength, "how much to prune")
        if isinstance(self.predictor, DyRatePredictor):
            inside = min(max(float(strength), 1e-6), 1.0 - 1e-6)
            return replace(self, predictor=self.predictor.shifted(_SHIFT * math.log(inside / (1.0 - inside))), _on_device=None)
        rates = ClosedForm.stretched(self.rate_values, strength)
        return replace(self, predictor=ClosedForm.source, rates=rates, _on_device=None)

    def layer_groups(self, num_layers: int) -> list[int]:
        return [DEFAULT_K if self.k is None else self.k]

    @property
    def drops(self) -> bool:
        return max(self.rate_values) > 0

    @property
    def predictor_name(self) -> str:
        if self.predictor is None:
            return "closed-form"
        return self.predictor.source if isinstance(self.predictor, DyRatePredictor) else str(self.predictor)

    def settings(self) -> dict[str, Any]:
        found = super().settings() | {"rates": [round(rate, 4) for rate in self.rate_values]}
        return {name: value for name, value in found.items() if name not in ("predictor", "num_rates")}

    def predictor_words(self, asked: Self, shape: ModelShape, retention: str) -> str:
        name = self.predictor_name
        if name.startswith(TRAINED):
            return f"trained, of {shape.folder or 'the model'}"
        if name != ClosedForm.source:
            return f"trained, {name}"
        if asked.predictor is not None:
            return "closed form, as asked for"
        if retention == "evict":
            return "closed form: a trained one in the model's folder is for retention recoverable"
        if self.rates != "half_open" or self.num_rates != 5:
            return "closed form, of the rates asked for"
        return "closed form: the model's folder holds no trained one (dyrate train makes one)"

    def kept_bound(self, n_visual: int) -> int:
        return bound_for_rate(n_visual, min(self.rate_values))

    def start(self, n_visual: Tensor) -> dict[str, Tensor]:
        self._tensors().prepare(n_visual.device)
        with torch.inference_mode(False):  # a chat may go on outside of the inference mode it began in
            return {"first_mass": torch.zeros(n_visual.shape[0], dtype=torch.float32, device=n_visual.device)}

    def decide(self, view: View) -> Decision:
        first = view.state["first_mass"]
        now = view.mass.detach()[:, :, IMAGE].mean(1).to(first.dtype)
        first.copy_(torch.where(view.step == 0, now, first))
        rate, _ = ops.predict_rate(view.mass, *self._linear(view.state, view.hidden))
        count = ops.keep_count(view.n_visual, rate)
        return Decision(rate, count, spread_score(count, view.importance, able_tokens(view), self.spread) if self.spread else None)

    def predictor_tensors(self, state: dict[str, Tensor], hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns the tensors that the fused decode step takes; None with ``spread``, which that step does not know."""
        return None if self.spread else self._linear(state, hidden)

    def _linear(self, state: dict[str, Tensor], hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """
        Returns:
            weight float32 ``[K, Hq*4]``, bias float32 ``[B, K]`` (stride 0 over sequences for a predictor that reads mass alone),
            rates float64 ``[K]``.
        """
        first = state["first_mass"]
        weight, offset, rates, for_hidden = self._tensors().on[first.device]
        if self.predictor is None:
            return weight, first[:, None] * offset, rates
        if for_hidden is not None:
            if hidden is None:
                raise RuntimeError("this predictor reads the text's hidden state, which a decision outside of a patched model has not")
            return weight, torch.nn.functional.linear(hidden.float(), for_hidden, offset), rates
        return weight, offset.expand(first.shape[0], -1), rates

    def _tensors(self) -> _DeviceTensors:
        if self._on_device is None:
            raise RuntimeError("DyRate must be bound to a model first: policy.bind(shape)")
        return self._on_device


def spread_score(count: Tensor, importance: Tensor, able: Tensor, spread: float) -> Tensor:
    """Scores whose ``count`` highest are ``floor(spread count)`` evenly spaced tokens and the most important of the others.

    Args:
        count: int ``[B]``.
        importance: ``[B, N]``, at most 1.
        able: bool ``[B, N]``, the tokens that can be chosen.
        spread: in [0, 1].
    """
    able_count = torch.minimum(count.long(), able.sum(1))
    spaced = evenly_spaced((able_count.double() * spread + 1e-6).long(), able)
    return importance.detach().nan_to_num(0.0).masked_fill(spaced, 2.0)


class _DeviceTensors:
    """A linear predictor's tensors on each device that asked. Addresses stay, so a captured graph sees new weights."""

    def __init__(self, linear: ClosedForm | DyRatePredictor) -> None:
        self.linear = linear
        self.on: dict[torch.device, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}

    def prepare(self, device: torch.device) -> None:
        """Copies the predictor's present values to ``device``."""
        with torch.inference_mode(False), torch.no_grad():
            rates = torch.tensor(self.linear.rates, dtype=torch.float64)
            hidden = getattr(self.linear, "hidden_weight", None)
            weight, bias = self.linear.weight.detach().float(), self.linear.bias.detach().float()
            fresh = (weight, bias, rates, None if hidden is None else hidden.detach().float())
            if device in self.on:
                for old, new in zip(self.on[device], fresh, strict=True):
                    if old is not None and new is not None:
                        old.copy_(new)
            else:
                weight, bias, rates = (new.to(device, copy=True).contiguous() for new in (weight, bias, rates))
                self.on[device] = weight, bias, rates, None if fresh[3] is None else fresh[3].to(device, copy=True).contiguous()
