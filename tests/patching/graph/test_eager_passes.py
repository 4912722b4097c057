"""Passes that stay eager beside captured steps, and what is said of them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.patching import graph
from tests import models
from tests.checks import METHODS, ROWS, assert_same, greedy, logits, patched, policy, single
from tests.patching.graph.kit import RETENTION, STEPS, TOLD, assert_same_stats, both, warned


@RETENTION
@pytest.mark.parametrize(
    "options", [{"output_hidden_states": True}, {"prompt_lookup_num_tokens": 3, "eos_token_id": -1}, {"use_cache": False}], ids=str
)
def test_other_passes_run_as_before(make_model, tape, retention, options):
    model = make_model()
    fields = single(model, ["text 5", "image", "text 8"])
    used = both_without_stats(model, fields, greedy(STEPS, **options), policy=policy(METHODS["fixed"]), retention=retention)
    assert used.captures == 0


def both_without_stats(model, fields, options, **patch_options):
    with dk.patch(model, cuda_graph=False, **patch_options):
        want = model.generate(**fields, **options)
    with dk.patch(model, **patch_options) as handle:
        assert_same(model.generate(**fields, **options), want)
    return handle.graph


def test_the_drafting_model_runs_eagerly(make_model, tape):
    model = make_model()
    drafter = copy.deepcopy(model)
    fields = single(model, ["text 5", "image", "text 8"])
    want = model.generate(**fields, **greedy(10))
    with patched(drafter, METHODS["dyrate"]) as handle:
        got = model.generate(**fields, **greedy(10, assistant_model=drafter))
    assert_same(got, want)
    assert handle.graph.captures == 0


@RETENTION
def test_gradients_and_plain_forwards(make_model, tape, retention):
    model = make_model()
    fields = models.inputs(model, ROWS[:1])
    want = model(**fields).logits
    with patched(model, METHODS["fixed"], retention):
        got = model(**fields)
        assert got.logits.requires_grad
    assert torch.equal(got.logits, want)


@TOLD
@RETENTION
def test_cpu_model_runs_eagerly_and_says_so_once(make_model, retention):
    model = make_model()
    fields = models.inputs(model, ROWS)
    with patched(model, METHODS["dyrate"], retention) as handle:
        want, want_stats = model.generate(**fields, **greedy(STEPS)), handle.stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with patched(model, METHODS["dyrate"], retention, cuda_graph=True) as handle:
            got = [model.generate(**fields, **greedy(STEPS)) for _ in range(2)]
            stats = handle.stats()
    assert len(warned(caught)) == 1
    assert "'cpu'" in warned(caught)[0] and "CUDA" in warned(caught)[0]
    assert handle.graph.captures == 0
    for output in got:
        assert torch.equal(logits(output), logits(want))
    assert_same_stats(stats, want_stats, tolerance=0.0)


@TOLD
def test_a_hook_inside_of_the_model_keeps_steps_eager(make_model, tape):
    model = make_model()
    fields = models.inputs(model, ROWS[:1])
    calls = []
    hook = model.get_decoder().layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    try:
        with patched(model, METHODS["dyrate"], cuda_graph=True) as handle, pytest.warns(UserWarning, match=r"mlp has a hook"):
            model.generate(**fields, **greedy(STEPS))
            assert len(calls) == STEPS
            hook.remove()
            model.generate(**fields, **greedy(STEPS))
        assert handle.graph.captures == 1
    finally:
        hook.remove()


def test_the_hooks_of_transformers_do_no_harm(make_model, tape):
    """output_hidden_states leaves hooks behind, which act in such passes only."""
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    model.generate(**fields, **greedy(2, output_hidden_states=True))
    assert both(model, fields, greedy(STEPS), policy="dyrate").captures == 1


@TOLD
def test_training_mode_keeps_steps_eager(make_model, tape):
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    with patched(model, METHODS["dyrate"], cuda_graph=True) as handle:
        model.train()
        with pytest.warns(UserWarning, match=r"model\.eval\(\)"):
            model.generate(**fields, **greedy(4))
        assert handle.graph.captures == 0
        model.eval()
        model.generate(**fields, **greedy(4))
        assert handle.graph.captures == 1


def test_autocast_is_refused(make_model, tape):
    with dk.patch(make_model(), cuda_graph=True) as handle:
        assert handle.graph._checked_recorder() is tape
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(graph.CannotCapture, match="autocast"):
            handle.graph._checked_recorder()
