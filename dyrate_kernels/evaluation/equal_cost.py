"""Brings methods to one cost, so that their scores can be compared: each one's knob is turned until it costs the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dyrate_kernels.evaluation.runner import Contender, ask_all
from dyrate_kernels.evaluation.suite import Suite
from dyrate_kernels.policies.base import ModelShape

TOLERANCE = 0.004
ROUNDS = 14
RESOLUTION = 0.002  # of the strength, where the cost is a step


@dataclass(frozen=True)
class Tuned:
    """A contender at a cost.

    Attributes:
        contender: with the setting that was found.
        cost: its mean ``visual_share`` over the calibration suite.
        strength: of ``Policy.at_strength``.
    """

    contender: Contender
    cost: float
    strength: float


def mean_cost(model: Any, processor: Any, suite: Suite, contender: Contender, batch_size: int, backend: str = "auto") -> float:
    """The mean ``visual_share`` (``Stats``) over a suite; nothing is saved."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing was dropped")  # a strength of 0 is tried on purpose
        answers = ask_all(model, processor, suite, contender, batch_size=batch_size, backend=backend)
    return float(np.mean([answer.visual_share for answer in answers]))


def tune(
    model: Any, processor: Any, suite: Suite, contender: Contender, target: float, batch_size: int = 8, backend: str = "auto"
) -> Tuned:
    """The contender at the strength whose cost is nearest to ``target``.

    Cost falls with strength, in steps for some methods (a layer, K rates), so where no strength meets the target within ``TOLERANCE``
    the nearest that was tried is returned, and says its cost.

    Args:
        suite: calibration questions, other ones than those that are scored.
        target: mean ``visual_share``, in (0, 1].

    Raises:
        ValueError: the target is out of range, or the method has no knob.
    """
    if not 0.0 < target <= 1.0:
        raise ValueError(f"cost must be in (0, 1], got {target}")
    layers = ModelShape.from_config(model.config).num_layers
    policy = contender.bound(model)

    def at(strength: float) -> Tuned:
        made = replace(contender, label=f"{contender.label}@{100 * target:g}", policy=policy.at_strength(strength, layers))
        return Tuned(made, mean_cost(model, processor, suite, made, batch_size, backend), strength)

    return search(at, target)


def search(at: Callable[[float], Tuned], target: float) -> Tuned:
    """Bisection of a cost that falls with strength, helped by the secant."""
    dear, cheap = at(0.0), at(1.0)
    best = min(dear, cheap, key=lambda tried: abs(tried.cost - target))
    if target >= dear.cost or target <= cheap.cost:
        return best
    for number in range(ROUNDS):
        if abs(best.cost - target) <= TOLERANCE or cheap.strength - dear.strength < RESOLUTION:
            break
        share = (dear.cost - target) / (dear.cost - cheap.cost) if number % 2 == 0 else 0.5
        middle = at(dear.strength + min(max(share, 0.02), 0.98) * (cheap.strength - dear.strength))
        best = min(best, middle, key=lambda tried: abs(tried.cost - target))
        if middle.cost > target:
            dear = middle
        else:
            cheap = middle
    return best
