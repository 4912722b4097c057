"""Captured decode steps on a real GPU."""

from __future__ import annotations

import gc

import pytest
import torch

import dyrate_kernels as dk
from tests import models
from tests.checks import METHODS, ROWS, assert_same, greedy, policy, rows_for_beams
from tests.patching.graph.kit import RETENTION, STEPS, TOLD, ReadsTheHost, assert_same_stats, both, run

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@CUDA
@RETENTION
@pytest.mark.parametrize("method", ["none", "dyrate", "dyrate-trained", "fixed", "fastv", "vtw", "depth", "schedule", "uniform"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_on_cuda(method, retention, options):
    model = models.build("llava").cuda()
    fields = {name: value.cuda() for name, value in models.inputs(model, rows_for_beams(ROWS)).items()}
    used = both(model, fields, greedy(20, **options), policy=policy(METHODS[method]), retention=retention)
    assert (used.captures, used.replays) == (1, 18)


@pytest.mark.gpu
@CUDA
@RETENTION
def test_window_and_chat_on_cuda(retention):
    model = models.build("llava", "mistral", sliding_window=39).cuda()
    fields = {name: value.cuda() for name, value in models.inputs(model, [["text 4", "image", "text 6"], ["text 7"]]).items()}
    assert both(model, fields, greedy(14), policy="dyrate", retention=retention).captures == 2


@pytest.mark.gpu
@CUDA
@TOLD
def test_a_failed_capture_on_cuda():
    model = models.build("llava").cuda()
    fields = {name: value.cuda() for name, value in models.inputs(model, ROWS).items()}
    options = {"policy": ReadsTheHost(k=2, rate=0.4)}
    want, want_stats, _ = run(model, fields, greedy(STEPS), {**options, "cuda_graph": False})
    with pytest.warns(UserWarning, match="could not be captured"):
        got, stats, handle = run(model, fields, greedy(STEPS), {**options, "cuda_graph": True})
    assert handle.graph.captures == 0
    assert_same(got, want)
    assert_same_stats(stats, want_stats)
    # torch is out of the capture: its allocator, its random numbers, and the next capture
    torch.cuda.empty_cache()
    torch.rand(1, device="cuda")
    with pytest.warns(UserWarning, match="could not be captured"):
        run(model, fields, greedy(STEPS, do_sample=True), {**options, "cuda_graph": True})
    assert both(model, fields, greedy(STEPS), policy="dyrate").captures == 1


@pytest.mark.gpu
@CUDA
def test_memory_of_a_graph_is_given_back():
    model = models.build("llava").cuda()
    fields = {name: value.cuda() for name, value in models.inputs(model, ROWS).items()}
    held = []
    with dk.patch(model, "dyrate", cuda_graph=True):
        for _ in range(6):
            model.generate(**fields, max_new_tokens=STEPS)
            gc.collect()
            torch.cuda.empty_cache()
            held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[1]
