"""Predictors without training: ridge regressions foresee what each step loses at each rate, and a price a token makes rates of that.

With ``f_j(x)`` the loss foreseen at rate ``r_j`` a step takes the rate of the least ``f_j(x) + price (1 - r_j)``: it minimises the foreseen
loss among all ways to meet the budget that the price stands for. ``f_j`` is linear, so this is the argmax of a linear layer: a predictor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyrate_kernels.policies.base import ModelShape
from dyrate_kernels.predictor import DyRatePredictor

RATES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
"""Fractions removed that a step may get [choice]."""
RIDGES = (0.1, 1.0, 10.0, 100.0)
"""Strengths of the regression that are tried, of the features' mean variance."""
_FLOOR = 1e-3  # nats, of a divergence whose logarithm is taken: what is below makes no difference


def target(divergence: Tensor) -> Tensor:
    """The logarithm of KL divergences of the next token, which is what is foreseen [choice: few steps lose nearly all], float64."""
    return (divergence.double().clamp(min=0.0) + _FLOOR).log()


def regress(features: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression on standardised features: (weight float64 ``[F, J]``, offset ``[J]``), of features as they are.

    Args:
        features: float64 ``[R, F]``.
        wanted: float64 ``[R, J]``.
        ridge: times R on the diagonal.
    """
    mean, scale = features.mean(0), features.std(0)
    scale = scale.clamp(min=max(1e-3 * float(scale.mean()), 1e-8))
    each, middle = (features - mean) / scale, wanted.mean(0)
    rows, count = each.shape
    if count <= rows:
        solved = torch.linalg.solve(each.T @ each + ridge * rows * torch.eye(count, dtype=each.dtype), each.T @ (wanted - middle))
    else:
        solved = each.T @ torch.linalg.solve(each @ each.T + ridge * rows * torch.eye(rows, dtype=each.dtype), wanted - middle)
    weight = solved / scale[:, None]
    return weight, middle - mean @ weight


def best_ridge(features: Tensor, wanted: Tensor, half: Tensor) -> float:
    """The ridge with which each half (int ``[R]``) predicts the other one best, by least squares."""
    errors = dict.fromkeys(RIDGES, 0.0)
    for ridge in RIDGES:
        for side in (0, 1):
            weight, offset = regress(features[half == side], wanted[half == side], ridge)
            other = half != side
            errors[ridge] += float(((features[other] @ weight + offset - wanted[other]) ** 2).sum())
    return min(RIDGES, key=lambda ridge: errors[ridge])


@dataclass(frozen=True)
class Foreseen:
    """Loss that is foreseen at each of ``RATES``: ``features @ weight + offset``.

    Attributes:
        weight: float64 ``[F, K]``.
        offset: float64 ``[K]``.
    """

    weight: Tensor
    offset: Tensor

    @classmethod
    def fit(cls, features: Tensor, wanted: Tensor, ridge: float) -> Foreseen:
        """From features ``[R, F]`` and ``target`` of the divergences at ``RATES[1:]``, ``[R, K-1]``; at rate 0 nothing is lost."""
        weight, offset = regress(features, wanted, ridge)
        nothing = target(offset.new_zeros(1))
        return cls(torch.cat([weight.new_zeros(len(weight), 1), weight], 1), torch.cat([nothing, offset]))

    def price(self, features: Tensor, weight: Tensor, keep: float) -> float:
        """The price of a token at which these rows (``weight`` float64 ``[R]``) keep a mean of ``keep``, as nearly as they can."""
        kept = 1.0 - torch.tensor(RATES, dtype=torch.float64)
        loss = features @ self.weight + self.offset
        low, high = -1e5, 1e5
        for _ in range(100):
            middle = (low + high) / 2
            mean = float((kept[(loss + middle * kept).argmin(1)] * weight).sum() / weight.sum())
            low, high = (middle, high) if mean > keep else (low, middle)
        return high

    def predictor(self, shape: ModelShape, k: int, spread: float, price: float) -> DyRatePredictor:
        """As inference takes it; text-aware where features are mass ``[4 Hq]`` and hidden state ``[d]``."""
        of_mass = 4 * shape.num_heads
        made = DyRatePredictor.for_model(shape, RATES, k, spread, text=len(self.weight) > of_mass)
        with torch.no_grad():
            made.weight.copy_(-self.weight[:of_mass].T)
            if made.hidden_weight is not None:
                made.hidden_weight.copy_(-self.weight[of_mass:].T)
            made.bias.copy_(-self.offset - price * (1.0 - torch.tensor(RATES, dtype=torch.float64)))
        return made


def constant(shape: ModelShape, k: int, spread: float, rate: float) -> DyRatePredictor:
    """One rate at every step."""
    return DyRatePredictor.for_model(shape, (rate,), k, spread)
