"""Captured decode steps against eager ones: the two runs, what is the same in both, and policies that break a rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.policies.fixed import Fixed
from tests.checks import RETENTIONS, assert_same

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
LINES = pytest.mark.parametrize("tape", ["in line", "aside, at once", "aside, late"], indirect=True)  # where a step's decision runs
ASIDE = pytest.mark.parametrize("tape", ["in line", "aside, late"], indirect=True)
STEPS = 8  # tokens: the first comes of the prompt, the second of the warm-up step, the third of the captured one
TOLD = pytest.mark.usefixtures("told")


def run(model, fields, options, patch_options, *, seed=5):
    with dk.patch(model, **patch_options) as handle:
        torch.manual_seed(seed)
        output = model.generate(**fields, **options)
        return output, handle.stats(), handle


def both(model, fields, options, **patch_options):
    """Eager, then as ``patch`` chooses by itself."""
    want, want_stats, _ = run(model, fields, options, {**patch_options, "cuda_graph": False})
    got, got_stats, handle = run(model, fields, options, patch_options)
    assert_same(got, want)
    assert_same_stats(got_stats, want_stats)
    assert handle.graph.off is None
    return handle.graph


def assert_same_stats(got, want, tolerance=1e-5):
    """But for the path that the two took."""
    _assert_close(*(replace(each, path=None).to_dict() for each in (got, want)), tolerance, "stats")


def _assert_close(got, want, tolerance, where):
    assert type(got) is type(want), where
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for name in want:
            _assert_close(got[name], want[name], tolerance, f"{where}.{name}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            _assert_close(a, b, tolerance, f"{where}[{index}]")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=tolerance, abs=tolerance), where
    else:
        assert got == want, where


def warned(caught):
    return [str(each.message) for each in caught if "cuda_graph" in str(each.message)]


@dataclass(frozen=True)
class ReadsTheHost(Fixed):
    """A policy that breaks the rule of policies.base: it reads a device value."""

    constant = False  # decides in every step, whatever the retention

    def decide(self, view):
        float(view.mass.sum())
        return super().decide(view)
