"""Every family, retention and method against the mask oracle; keep-all against the unpatched model; a padded row against the row alone."""

from __future__ import annotations

import pytest
import torch

from tests import models
from tests.checks import (
    FEW,
    METHODS,
    RETENTIONS,
    ROWS,
    VARIANTS,
    assert_close_logits,
    assert_same,
    assert_same_decisions,
    greedy,
    logits,
    patched,
    rows_for,
    single,
)
from tests.oracle import Oracle, Rule

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)


@VARIANTS
def test_oracle_that_keeps_all_is_the_plain_model(make_model, family, text):
    model = make_model(family, text)
    fields = models.inputs(model, rows_for(family))
    assert_same(Oracle(model, Rule("none"), "evict").generate(**fields, **greedy()), model.generate(**fields, **greedy()))


@VARIANTS
@RETENTION
@pytest.mark.parametrize("rule", [Rule("none"), Rule("fixed", k=2, rate=0.0), Rule("fastv", k=1, rate=0.0)], ids=["none", "fixed", "fastv"])
def test_keep_all_is_the_unpatched_model(make_model, family, text, retention, rule):
    model = make_model(family, text)
    fields = models.inputs(model, rows_for(family))
    want = model.generate(**fields, **greedy())
    with patched(model, rule, retention):
        assert_same(model.generate(**fields, **greedy()), want)


def _against_oracle(model, fields, rule, retention, length=8):
    oracle = Oracle(model, rule, retention)
    want = oracle.generate(**fields, **greedy(length))
    with patched(model, rule, retention) as handle:
        got = model.generate(**fields, **greedy(length))
        stats = handle.stats()
    assert_same(got, want)
    assert len(stats.steps) == length
    assert_same_decisions(stats, oracle)
    return got


@RETENTION
@pytest.mark.parametrize("method", [name for name in METHODS if name not in FEW])
def test_method(make_model, method, retention):
    model = make_model()
    _against_oracle(model, models.inputs(model, ROWS), METHODS[method], retention)


@VARIANTS
@RETENTION
@pytest.mark.parametrize("method", FEW)
def test_family_and_method(make_model, family, text, method, retention):
    model = make_model(family, text)
    _against_oracle(model, models.inputs(model, rows_for(family)), METHODS[method], retention)


@RETENTION
@pytest.mark.parametrize("options", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"num_hidden_layers": 2}], ids=str)
def test_shapes_of_the_text_model(make_model, options, retention):
    model = make_model("llava", "llama", **options)
    rule = Rule("dyrate", k=1) if options.get("num_hidden_layers") == 2 else METHODS["dyrate"]
    _against_oracle(model, models.inputs(model, ROWS), rule, retention)


@RETENTION
@pytest.mark.parametrize("k", range(1, models.LAYERS))
def test_every_k(make_model, k, retention):
    model = make_model("llava", "mistral")
    _against_oracle(model, models.inputs(model, ROWS[:2], seed=k), Rule("fixed", k=k, rate=0.7), retention, length=5)


@RETENTION
@pytest.mark.parametrize("seed", range(3))
def test_long_answers(make_model, seed, retention):
    model = make_model("llava", "qwen3")
    _against_oracle(model, models.inputs(model, ROWS, seed=seed), METHODS["dyrate"], retention, length=40)


@RETENTION
@pytest.mark.parametrize(
    "rows",
    [
        [["text 3", "image"]],
        [["image", "text 3"]],
        [["text 1", "image", "image", "text 1"]],
        [["text 5"], ["text 3", "image", "text 2"]],
        [["text 3", "image"], ["text 2", "image", "text 6"]],
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [Rule("fixed", k=2, rate=0.7), METHODS["sparsevlm"]], ids=["fixed", "sparsevlm"])
def test_where_the_image_stands(make_model, rows, rule, retention):
    model = make_model("llava", "qwen2")
    _against_oracle(model, models.inputs(model, rows), rule, retention)


@pytest.mark.parametrize(("family", "text"), [("llava", "llama"), ("llava", "mistral"), ("llava_next", "llama"), ("video_llava", "llama")])
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fastv-mean", "uniform", "schedule"])
def test_padded_row_is_the_row_alone(make_model, family, text, method, retention):
    model = make_model(family, text)
    rows = rows_for(family)
    with patched(model, METHODS[method], retention):
        together = logits(model.generate(**models.inputs(model, rows), **greedy()))
        padded = logits(model.generate(**models.inputs(model, rows[:1], pad_to=120), **greedy()))
        alone = [logits(model.generate(**single(model, row), **greedy())) for row in rows]
    for b, want in enumerate(alone):
        assert_close_logits(together[:, b : b + 1], want)
    assert_close_logits(padded, alone[0])


@RETENTION
def test_text_alone_is_untouched(make_model, retention):
    model = make_model()
    fields = models.inputs(model, [["text 9"], ["text 4"]])
    want = model.generate(**fields, **greedy())
    with patched(model, METHODS["vtw"], retention) as handle:
        assert_same(model.generate(**fields, **greedy()), want)
        stats = handle.stats()
    assert stats.visual_tokens == [0, 0]
    assert stats.kept_mean == 1.0


@RETENTION
def test_a_row_without_an_image_is_untouched_in_a_batch(make_model, retention):
    model = make_model()
    want = logits(model.generate(**single(model, ROWS[2]), **greedy()))
    with patched(model, METHODS["vtw"], retention):
        got = logits(model.generate(**models.inputs(model, ROWS), **greedy()))
    assert_close_logits(got[:, 2:3], want)


@RETENTION
def test_nothing_kept(make_model, retention):
    model = make_model()
    fields = models.inputs(model, ROWS)
    with patched(model, Rule("fixed", k=2, rate=1.0), retention) as handle:
        got = model.generate(**fields, **greedy())
        assert all(step.kept[0] == 0 for step in handle.stats().steps[1:])
    assert torch.isfinite(logits(got)).all()


@RETENTION
def test_one_new_token(make_model, retention):
    model = make_model()
    _against_oracle(model, models.inputs(model, ROWS), METHODS["fixed"], retention, length=1)


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "depth"])
def test_twice_is_the_same(make_model, method, retention):
    model = make_model()
    with patched(model, METHODS[method], retention):
        first = [model.generate(**models.inputs(model, rows), **greedy()) for rows in (ROWS, ROWS[:1])]
        again = [model.generate(**models.inputs(model, rows), **greedy()) for rows in (ROWS, ROWS[:1])]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(logits(one), logits(two))


@RETENTION
@pytest.mark.parametrize("method", ["random", "uniform", "fixed"])
def test_kept_tokens_are_those_reported(make_model, method, retention):
    """Whatever the ranking was, the counts are right and, when evicting, the set only shrinks."""
    import dyrate_kernels as dk

    model = make_model()
    fields = models.inputs(model, ROWS)
    with dk.patch(model, policy=dk.policies.get(method, k=2, rate=0.6), retention=retention, record_importance=True) as handle:
        model.generate(**fields, **greedy())
        stats = handle.stats()
    assert stats.visual_tokens == [25, 50, 0, 25]
    for before, step in zip(stats.steps, stats.steps[1:], strict=False):
        for b, n in enumerate(stats.visual_tokens):
            tokens = step.kept_tokens[b]
            assert len(tokens) == step.kept[b] == {25: 10, 50: 20, 0: 0}[n]
            assert tokens == sorted(set(tokens))
            assert all(0 <= token < n for token in tokens)
            assert len(step.importance[b]) == n
            if retention == "evict":
                assert set(tokens) <= set(before.kept_tokens[b])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@RETENTION
@pytest.mark.parametrize(("family", "text"), [("llava", "llama"), ("llava", "mistral"), ("llava_onevision", "qwen2")])
def test_half_precision(make_model, family, text, dtype, retention):
    """Runs, and stays as close to the float32 oracle as rounding lets it on a fixed text."""
    model = make_model(family, text, dtype=dtype)
    exact = make_model(family, text)
    rule = METHODS["fixed"]
    fields = models.inputs(model, ROWS[:2])
    plain_error = _error(model.generate(**fields, **greedy(1)), exact.generate(**models.inputs(exact, ROWS[:2]), **greedy(1)))
    with patched(model, Rule("none"), retention):
        keep_all = model.generate(**fields, **greedy(1))
    assert _error(keep_all, exact.generate(**models.inputs(exact, ROWS[:2]), **greedy(1))) < max(3 * plain_error, 0.02)
    want = Oracle(exact, rule, retention).generate(**models.inputs(exact, ROWS[:2]), **greedy(6))
    with patched(model, rule, retention) as handle:
        got = model.generate(**fields, **greedy(6))
        stats = handle.stats()
    assert torch.isfinite(logits(got)).all()
    assert [step.kept for step in stats.steps[1:]] == [[n // 2 for n in stats.visual_tokens]] * 5
    assert _error(got, want, steps=1) < (0.25 if retention == "evict" else max(3 * plain_error, 0.02))


def _error(got, want, steps=1):
    a, b = logits(got)[:steps], logits(want)[:steps]
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()
