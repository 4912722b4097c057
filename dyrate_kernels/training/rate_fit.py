"""Predictors without training: a ridge regression says which steps need the picture, quantiles turn that into rates that meet a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from dyrate_kernels.policies.base import ModelShape
from dyrate_kernels.predictor import DyRatePredictor

RATES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Fractions removed that a step may get [choice]."""
RIDGES = (0.1, 1.0, 10.0, 100.0)
"""Strengths of the regression that are tried, of the features' mean variance."""
_FLOOR = 1e-3  # nats, of a divergence whose logarithm is taken: what is below makes no difference


def rates_for(keep: float) -> tuple[float, ...]:
    """``RATES``, the last one raised where a budget needs it."""
    return (*RATES[:-1], max(RATES[-1], 1.0 - keep / 3))


def shares_for(rates: tuple[float, ...], keep: float) -> Tensor:
    """Shares float64 ``[K]`` of the steps that take each rate: of those that keep ``keep`` on average, the most even ones (by entropy)."""
    values = torch.tensor(rates, dtype=torch.float64)
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * values).softmax(0) @ (1 - values)) > keep else (low, middle)
    return (low * values).softmax(0)


def thresholds(signal: Tensor, weight: Tensor, shares: Tensor) -> Tensor:
    """Thresholds ``[K-1]``, descending: the ``shares[0]`` of the rows (by weight) with the highest signal are above the first, and so on.

    Args:
        signal, weight: float64 ``[R]``.
        shares: float64 ``[K]``.
    """
    order = signal.argsort(descending=True)
    ranked, reached = signal[order], weight[order].cumsum(0) / weight.sum()
    ends = torch.cat([ranked[:1] + 1.0, ranked, ranked[-1:] - 1.0])
    above = torch.searchsorted(reached, shares.cumsum(0)[:-1] + 1e-9, right=True)
    return (ends[above] + ends[above + 1]) / 2


def target(divergence: Tensor) -> Tensor:
    """What the regression predicts of a row's KL divergence at a constant rate: its logarithm [choice], float64."""
    return (divergence.double().clamp(min=0.0) + _FLOOR).log()


def regress(features: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Ridge regression on standardised features: (weight float64 ``[F]``, offset), of features as they are.

    Args:
        features: float64 ``[R, F]``.
        wanted: float64 ``[R]``.
        ridge: times R on the diagonal.
    """
    mean, scale = features.mean(0), features.std(0)
    scale = scale.clamp(min=max(1e-3 * float(scale.mean()), 1e-8))
    each, middle = (features - mean) / scale, wanted.mean()
    rows, count = each.shape
    if count <= rows:
        solved = torch.linalg.solve(each.T @ each + ridge * rows * torch.eye(count, dtype=each.dtype), each.T @ (wanted - middle))
    else:
        solved = each.T @ torch.linalg.solve(each @ each.T + ridge * rows * torch.eye(rows, dtype=each.dtype), wanted - middle)
    weight = solved / scale
    return weight, float(middle - mean @ weight)


def best_ridge(features: Tensor, wanted: Tensor, half: Tensor) -> float:
    """The ridge with which each half predicts the other one best (least squares)."""
    errors = {}
    for ridge in RIDGES:
        errors[ridge] = 0.0
        for side in (0, 1):
            weight, offset = regress(features[half == side], wanted[half == side], ridge)
            other = half != side
            errors[ridge] += float(((features[other] @ weight + offset - wanted[other]) ** 2).sum())
    return min(RIDGES, key=lambda ridge: errors[ridge])


def constant(shape: ModelShape, k: int, spread: float, rate: float) -> DyRatePredictor:
    """One rate at every step."""
    return DyRatePredictor.for_model(shape, (rate,), k, spread)


def fitted(
    shape: ModelShape, k: int, spread: float, keep: float, features: Tensor, wanted: Tensor, weight: Tensor, ridge: float
) -> DyRatePredictor:  # fmt: skip
    """A predictor whose rate falls as the divergence that it foresees grows, and that keeps ``keep`` of the tokens on these rows.

    Args:
        features: float64 ``[R, 4 Hq]``, mass; or ``[R, 4 Hq + d]``, mass and the text's hidden state.
        wanted: of ``target``.
        weight: float64 ``[R]``, of each row in the budget.
    """
    of_mass = 4 * shape.num_heads
    linear, offset = regress(features, wanted, ridge)
    rates = rates_for(keep)
    at = thresholds(features @ linear + offset, weight, shares_for(rates, keep))
    made = DyRatePredictor.for_model(shape, rates, k, spread, text=features.shape[1] > of_mass)
    slope = torch.arange(len(rates) - 1, -1, -1, dtype=torch.float64)
    with torch.no_grad():  # lines that cross at the thresholds: the upper one is the rate
        made.weight.copy_(slope[:, None] * linear[:of_mass])
        if made.hidden_weight is not None:
            made.hidden_weight.copy_(slope[:, None] * linear[of_mass:])
        made.bias.copy_(slope * offset + torch.cat([at.new_zeros(1), at.cumsum(0)]))
    return made
