"""The statistics of the comparison."""

from __future__ import annotations

import numpy as np
import pytest

from dyrate_kernels.evaluation.against import pairs, shares
from dyrate_kernels.evaluation.report import cells, draw_scores
from dyrate_kernels.evaluation.runner import Answer
from dyrate_kernels.evaluation.table import agreement, bootstrap, paired_bootstrap, summarise


def answer(item, right, total=1.0, tokens=(1, 2), **changes):
    given = {
        "group": "g", "kept": 0.5, "visual_share": 0.7,
        "n": 100, "paper_cost": 0.6, "exact_cost": 0.5, "flops": 60.0, "flops_unpruned": 100.0, "kv_bytes": 10, "read": 5.0,
        "seconds": 0.2, "floor": 0.01, "first": 0.1, "batch": 2, "text": "",
    }  # fmt: skip
    return Answer(item=item, right=right, total=total, tokens=list(tokens), **{**given, **changes})


def test_bootstrap_covers_the_truth():
    """95 % intervals of a known proportion hold it about 95 % of the time."""
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        right = (rng.random(150) < 0.8).astype(float)
        _, low, high = bootstrap(right, np.ones(150), seed=trial)
        inside += low <= 0.8 <= high
    assert 180 <= inside <= 198


def test_pairing_narrows_the_interval():
    """Two runs that fail at the same questions differ little, however hard the questions are."""
    rng = np.random.default_rng(1)
    hard = (rng.random(200) < 0.5).astype(float)
    pruned = hard.copy()
    pruned[np.flatnonzero(hard)[:4]] = 0
    ones = np.ones(200)
    ratio, low, high = paired_bootstrap(np.stack([pruned, ones, hard, ones], 1))
    shuffled = np.stack([pruned, ones, rng.permutation(hard), ones], 1)
    _, wide_low, wide_high = paired_bootstrap(shuffled)
    assert ratio == pytest.approx(pruned.sum() / hard.sum()) and low < ratio < high <= 1.0
    assert (wide_high - wide_low) > 3 * (high - low)


def test_a_share_of_nothing_is_no_number():
    """Neither 0 nor a huge ratio, and an interval is that of the draws in which the unpruned model scored."""
    none, some = [answer("a", 0, 1), answer("b", 0, 1)], [answer("a", 1, 1), answer("b", 0, 1)]
    for answers in (none, some):
        line = summarise("x", "g", answers, none)
        assert (line.retained, line.retained_low, line.retained_high) == (None, None, None) and cells(line)[2] == "-"
        assert pairs([line], {("x", "g"): (1.0, 0.9, 1.1)}, ["g"]) == []
    assert shares([line.to_dict()]) == {}
    same = summarise("x", "g", some, some)
    assert (same.retained, same.retained_low, same.retained_high) == (1.0, 1.0, 1.0)


def test_a_plot_leaves_out_what_has_no_share(tmp_path):
    none, some = [answer("a", 0, 1)], [answer("a", 1, 1)]
    draw_scores(tmp_path / "a.png", {"short": [summarise(label, "g", some, none) for label in ("none", "x@57.9", "x@33.3")]})
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_line():
    unpruned = [answer("a", 4, 4), answer("b", 1, 2, tokens=(5, 6, 7))]
    pruned = [answer("a", 2, 4, tokens=(1, 3)), answer("b", 1, 2, tokens=(5, 6), kept=0.1, flops=20.0)]
    line = summarise("x", "g", pruned, unpruned)
    assert (line.score, line.retained, line.questions) == (0.5, pytest.approx(0.6), 2)
    assert line.agreement == pytest.approx((0.5 + 2 / 3) / 2)
    assert line.kept == pytest.approx(0.3) and line.flops_share == pytest.approx(0.4) and line.exact_cost == 0.5
    assert line.time_per_token == pytest.approx(0.4 / 2) and line.first == pytest.approx(0.1)
    assert line.floor == pytest.approx(0.02 / 2)
    same = summarise("x", "g", unpruned, unpruned)
    assert (same.retained, same.retained_low, same.retained_high, same.agreement) == (1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="same questions"):
        summarise("x", "g", pruned[::-1], unpruned)
    with pytest.raises(ValueError, match="same questions"):
        summarise("x", "g", [], [])


def test_agreement():
    assert agreement([1, 2, 3], [1, 2, 3]) == 1.0
    assert agreement([1, 2, 3], [1, 9]) == pytest.approx(1 / 3)
    assert agreement([], []) == 0.0
