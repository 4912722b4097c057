"""The regression is numpy's, and a fitted predictor meets its budget where the least is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.training import rate_fit


@pytest.mark.parametrize("rows, count", [(60, 12), (12, 60)])
def test_the_regression_is_numpys(rows, count):
    rng = np.random.default_rng(0)
    features, wanted = rng.normal(size=(rows, count)) * rng.uniform(0.5, 2, count) + 3, rng.normal(size=(rows, 2))
    weight, offset = rate_fit.regress(torch.from_numpy(features), torch.from_numpy(wanted), 0.5)
    scale = features.std(0, ddof=1)
    each = (features - features.mean(0)) / scale
    stacked = np.vstack([each, np.sqrt(0.5 * rows) * np.eye(count)])
    solved = np.linalg.lstsq(stacked, np.concatenate([wanted - wanted.mean(0), np.zeros((count, 2))]), rcond=None)[0]
    got = features @ weight.numpy() + offset.numpy()
    np.testing.assert_allclose(got, each @ solved + wanted.mean(0), atol=1e-8)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("keep", [0.1, 0.4, 0.8])
def test_a_fitted_predictor_meets_its_budget_where_the_least_is_lost(text, keep):
    shape = dk.policies.ModelShape.from_config(dk.load_demo()[0].config)
    g = torch.Generator().manual_seed(1)
    mass, hidden = torch.rand(400, 8, 4, generator=g).softmax(-1), torch.randn(400, 128, generator=g)
    need = (40 * (mass[:, 2, 1] - 0.25) + (hidden[:, 5] if text else 0)).double()
    rates = torch.tensor(rate_fit.RATES, dtype=torch.float64)
    nothing = float(rate_fit.target(torch.zeros(1)))
    wanted = nothing + need[:, None] * rates[1:] + 3 * rates[1:] ** 2
    features = torch.cat([mass.flatten(1), hidden], 1).double() if text else mass.flatten(1).double()
    weight = torch.rand(400, generator=g, dtype=torch.float64)
    foreseen = rate_fit.Foreseen.fit(features, wanted, 1e-6)
    assert float((features @ foreseen.weight + foreseen.offset)[:, 0].std()) == 0.0
    made = foreseen.predictor(shape, 2, 0.5, foreseen.price(features, weight, keep))
    assert (made.k, made.spread, made.text_size, made.rates) == (2, 0.5, 128 if text else 0, rate_fit.RATES)
    index = made(mass, hidden).argmax(-1)
    assert float(((1 - rates[index]) * weight).sum() / weight.sum()) == pytest.approx(keep, abs=0.01)
    assert len(set(index.tolist())) > 2
    loss = torch.cat([torch.full((400, 1), nothing), wanted], 1).double()
    mine = float((loss.gather(1, index[:, None])[:, 0] * weight).sum())
    for shuffled in range(20):  # no other choice of the same budget loses less
        other = index[torch.randperm(400, generator=g)]
        if float(((1 - rates[other]) * weight).sum()) <= float(((1 - rates[index]) * weight).sum()) + 1e-9:
            assert mine < float((loss.gather(1, other[:, None])[:, 0] * weight).sum()), shuffled


def test_the_ridge_that_predicts_the_other_half_is_taken():
    g = torch.Generator().manual_seed(2)
    features = torch.randn(200, 150, generator=g, dtype=torch.float64)
    half = torch.arange(200) % 2
    noise = torch.randn(200, generator=g, dtype=torch.float64)
    assert rate_fit.best_ridge(features, features[:, :1] * 5 + 0.01 * noise[:, None], half) < rate_fit.best_ridge(
        features, noise[:, None], half
    )
