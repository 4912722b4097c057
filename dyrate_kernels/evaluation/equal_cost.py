"""Brings methods to one cost, so that their scores can be compared: each one's knob is turned until it costs the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dyrate_kernels import specs
from dyrate_kernels.evaluation.runner import Contender, ask_all
from dyrate_kernels.evaluation.suite import Suite
from dyrate_kernels.policies.base import ModelShape

TOLERANCE = 0.004
WITHIN = 0.01  # of the cost that a label names: what is further off is refused
_PREFILL = 0.04  # of an answer of 25 tokens, its prompt's step: under "recoverable" it reads every token. Only to propose a k by
ROUNDS = 14
RESOLUTION = 0.002  # of the strength, where the cost is a step


@dataclass(frozen=True)
class Tuned:
    """A contender at a cost.

    Attributes:
        contender: with the setting that was found.
        cost: its mean ``visual_share`` over the calibration suite.
        strength: of ``Policy.at_strength``.
        tried: every cost that was met on the way, those at strength 0 and 1 first.
    """

    contender: Contender
    cost: float
    strength: float
    tried: tuple[float, ...] = ()


def mean_cost(model: Any, processor: Any, suite: Suite, contender: Contender, batch_size: int, backend: str = "auto") -> float:
    """The mean ``visual_share`` (``Stats``) over a suite; nothing is saved."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing was dropped")  # a strength of 0 is tried on purpose
        answers = ask_all(model, processor, suite, contender, batch_size=batch_size, backend=backend)
    return float(np.mean([answer.visual_share for answer in answers]))


def tune(
    model: Any, processor: Any, suite: Suite, contender: Contender, target: float, batch_size: int = 8, backend: str = "auto"
) -> Tuned:
    """The contender at the strength whose cost is ``target``, to within ``WITHIN``. Cost falls with strength, in steps for some methods.

    Args:
        suite: calibration questions, other ones than those that are scored.
        target: mean ``visual_share``, in (0, 1].

    Raises:
        ValueError: the target is out of range, the method has no knob, or it cannot cost that much: says what it can cost, and from which
            layer on it would have to prune. What the number of layers alone rules out is refused before a question is asked.
    """
    layers, policy = ModelShape.from_config(model.config).num_layers, contender.bound(model)
    first = check_reachable(model, contender, target)

    def at(strength: float) -> Tuned:
        made = replace(contender, label=f"{contender.label}@{100 * target:g}", policy=policy.at_strength(strength, layers))
        return Tuned(made, mean_cost(model, processor, suite, made, batch_size, backend), strength)

    found = search(at, target)
    if abs(found.cost - target) <= WITHIN:
        return found
    below, above = [cost for cost in found.tried if cost < target], [cost for cost in found.tried if cost > target]
    if below and above:
        costs = f"{100 * max(below):.1f} % or {100 * min(above):.1f}"
    else:
        costs = f"{100 * min(found.tried):.1f} to {100 * max(found.tried):.1f}"
    share = first / layers
    spared = (min(found.tried) - share) / (1 - share)  # of the layers from there on, what is read at least
    raise ValueError(_refusal(contender, target, first, layers, costs, None if below else max(spared, 0.0)))


def check_reachable(model: Any, contender: Contender, target: float) -> int:
    """Checks that the layers which a policy leaves alone let it cost so little; asks nothing. Returns the first layer that it can prune.

    Raises:
        ValueError: they do not, or the method has no knob; see :func:`tune`.
    """
    if not 0.0 < target <= 1.0:
        raise ValueError(f"cost must be in (0, 1], got {target}")
    layers = ModelShape.from_config(model.config).num_layers
    first = contender.bound(model).at_strength(1.0, layers).layer_groups(layers)[0]
    if not contender.vision and first / layers > target + WITHIN:
        held = specs.retention(contender.retention)
        spared = _PREFILL * (held.pool if held.pool is not None else not held.shrinks)
        raise ValueError(_refusal(contender, target, first, layers, f"{100 * first / layers:.1f} to 100.0", spared))
    return first


def _refusal(contender: Contender, target: float, first: int, layers: int, costs: str, spared: float | None) -> str:
    """Why a cost is refused. ``spared``: the least share of the layers from ``first`` on that is read; None: another k is no help."""
    words = f"{contender.label} cannot cost {100 * target:g} %: pruning from layer {first} of {layers} on it costs {costs} %"
    able = [] if spared is None else [k for k in range(1, first) if k / layers + (1 - k / layers) * spared <= target + WITHIN / 2]
    if able:
        return f"{words}; with k={able[-1]} it can"
    return f"{words}; ask for another cost, or name it in --also, which tunes nothing"


def check_cost(label: str, target: float, cost: float, nearest: str = "") -> None:
    """For contenders that have no strength.

    Raises:
        ValueError: ``cost`` is not ``target``, to within ``WITHIN``.
    """
    if abs(cost - target) > WITHIN:
        raise ValueError(
            f"{label} cannot cost {100 * target:g} %: it would cost {100 * cost:.1f} %{nearest}; "
            "ask for another cost, or name it in --also, which tunes nothing"
        )


def search(at: Callable[[float], Tuned], target: float) -> Tuned:
    """Bisection of a cost that falls with strength, helped by the secant."""
    dear, cheap = at(0.0), at(1.0)
    best = min(dear, cheap, key=lambda tried: abs(tried.cost - target))
    tried = [dear.cost, cheap.cost]
    if target >= dear.cost or target <= cheap.cost:
        return replace(best, tried=tuple(tried))
    for number in range(ROUNDS):
        if abs(best.cost - target) <= TOLERANCE or cheap.strength - dear.strength < RESOLUTION:
            break
        share = (dear.cost - target) / (dear.cost - cheap.cost) if number % 2 == 0 else 0.5
        middle = at(dear.strength + min(max(share, 0.02), 0.98) * (cheap.strength - dear.strength))
        tried.append(middle.cost)
        best = min(best, middle, key=lambda tried: abs(tried.cost - target))
        if middle.cost > target:
            dear = middle
        else:
            cheap = middle
    return replace(best, tried=tuple(tried))
