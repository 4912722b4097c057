"""Thresholds meet their budget, the regression is numpy's, and a fitted predictor takes the rates that its thresholds say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.training import rate_fit


@pytest.mark.parametrize("keep", [0.02, 0.18, 0.5, 0.8, 0.97])
def test_shares_keep_what_is_asked(keep):
    rates = rate_fit.rates_for(keep)
    shares = rate_fit.shares_for(rates, keep)
    assert float(shares.sum()) == pytest.approx(1.0)
    assert float(shares @ (1 - torch.tensor(rates, dtype=torch.float64))) == pytest.approx(keep, abs=1e-6)
    logs = shares.log()
    slope = (logs[1:] - logs[:-1]) / (torch.tensor(rates[1:]) - torch.tensor(rates[:-1]))
    assert float(slope.max() - slope.min()) < 1e-3 * (1 + float(slope.abs().max())), "not the most even ones"


def test_thresholds_part_the_rows_by_weight():
    g = torch.Generator().manual_seed(0)
    signal, weight = torch.randn(999, generator=g, dtype=torch.float64), torch.rand(999, generator=g, dtype=torch.float64)
    shares = torch.tensor([0.1, 0.25, 0.0, 0.65], dtype=torch.float64)
    at = rate_fit.thresholds(signal, weight, shares)
    assert bool((at[1:] <= at[:-1]).all())
    above = [float(weight[signal > each].sum() / weight.sum()) for each in at]
    assert above == pytest.approx([0.1, 0.35, 0.35], abs=0.003)
    for wanted, count in (([0.0, 1.0], 0), ([1.0, 0.0], 999)):
        assert int((signal > rate_fit.thresholds(signal, weight, torch.tensor(wanted, dtype=torch.float64))).sum()) == count


@pytest.mark.parametrize("rows, count", [(60, 12), (12, 60)])
def test_the_regression_is_numpys(rows, count):
    rng = np.random.default_rng(0)
    features, wanted = rng.normal(size=(rows, count)) * rng.uniform(0.5, 2, count) + 3, rng.normal(size=rows)
    weight, offset = rate_fit.regress(torch.from_numpy(features), torch.from_numpy(wanted), 0.5)
    scale = features.std(0, ddof=1)
    each = (features - features.mean(0)) / scale
    stacked = np.vstack([each, np.sqrt(0.5 * rows) * np.eye(count)])
    solved = np.linalg.lstsq(stacked, np.concatenate([wanted - wanted.mean(), np.zeros(count)]), rcond=None)[0]
    got = features @ weight.numpy() + offset
    np.testing.assert_allclose(got, each @ solved + wanted.mean(), atol=1e-8)


@pytest.mark.parametrize("text", [False, True])
def test_a_fitted_predictor_meets_its_budget_and_prunes_least_where_most_is_lost(text):
    shape = dk.policies.ModelShape.from_config(dk.load_demo()[0].config)
    g = torch.Generator().manual_seed(1)
    mass, hidden = torch.rand(400, 8, 4, generator=g).softmax(-1), torch.randn(400, 128, generator=g)
    wanted = (20 * mass[:, 2, 1] + (hidden[:, 5] if text else 0)).double()
    features = torch.cat([mass.flatten(1), hidden], 1).double() if text else mass.flatten(1).double()
    weight = torch.rand(400, generator=g, dtype=torch.float64)
    made = rate_fit.fitted(shape, 2, 0.5, 0.4, features, wanted, weight, 1e-3)
    assert (made.k, made.spread, made.text_size) == (2, 0.5, 128 if text else 0)
    rate = torch.tensor(made.rates, dtype=torch.float64)[made(mass, hidden).argmax(-1)]
    assert float(((1 - rate) * weight).sum() / weight.sum()) == pytest.approx(0.4, abs=0.01)
    assert float(wanted[rate == 0].min()) > float(wanted[rate == made.rates[-1]].max())
    assert len(set(rate.tolist())) == len(made.rates)


def test_the_ridge_that_predicts_the_other_half_is_taken():
    g = torch.Generator().manual_seed(2)
    features = torch.randn(200, 150, generator=g, dtype=torch.float64)
    half = torch.arange(200) % 2
    noise = torch.randn(200, generator=g, dtype=torch.float64)
    assert rate_fit.best_ridge(features, features[:, 0] * 5 + 0.01 * noise, half) < rate_fit.best_ridge(features, noise, half)
