"""What captured steps leave on a model and in memory: nothing, when it is over."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from dataclasses import dataclass

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.ops import workspace
from dyrate_kernels.patching import graph
from dyrate_kernels.policies.fixed import Fixed
from tests import models
from tests.checks import METHODS, ROWS, assert_same, fingerprint, greedy, logits, patched
from tests.patching.graph.kit import ASIDE, RETENTION, STEPS, TOLD


@pytest.mark.parametrize("argument", ["yes", 1, 0.0])
def test_argument(make_model, argument):
    with pytest.raises(TypeError, match=r"cuda_graph must be None \(automatic\), True or False"):
        dk.patch(make_model(), cuda_graph=argument)


def test_signature_and_repr(make_model):
    model = make_model()
    want = inspect.signature(model.forward)
    with dk.patch(model, cuda_graph=True) as handle:
        assert inspect.signature(model.forward) == want
        assert "cuda_graph=True" in repr(handle) and "captures=0" in repr(handle.graph)
        with pytest.raises(ValueError, match="model_kwargs"):  # generate() still knows which arguments forward takes
            model.generate(**models.inputs(model, ROWS[:1]), no_such_argument=1, max_new_tokens=2)
    with dk.patch(model) as handle:
        assert "cuda_graph" not in repr(handle) and "captures=0" in repr(handle.graph)
        assert "forward" not in vars(model)
    with dk.patch(model, cuda_graph=False) as handle:
        assert "cuda_graph=False" in repr(handle) and handle.graph is None
        assert "forward" not in vars(model)


@RETENTION
def test_unpatch_leaves_nothing(tape, retention):
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    dk.patch(model, "fixed", retention=retention, cuda_graph=False)
    dk.unpatch(model)
    before, want = fingerprint(model), model.generate(**fields, **greedy(6))
    dk.patch(model, "fixed", retention=retention)
    model.generate(**fields, **greedy(6))
    dk.unpatch(model)
    assert fingerprint(model) == before
    assert torch.equal(logits(model.generate(**fields, **greedy(6))), logits(want))


@ASIDE
@RETENTION
def test_deepcopy(tape, retention):
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    want = model.generate(**fields, **greedy(6))
    handle = dk.patch(model, "fixed", retention=retention)
    pruned = model.generate(**fields, **greedy(6))
    twin = copy.deepcopy(model)
    assert_same(twin.generate(**fields, **greedy(6)), pruned)
    own = vars(twin)["forward"]
    assert own is not handle.graph and own.owner.model is twin
    assert (handle.graph.captures, own.captures) == (1, 2)  # the copy went on counting for itself
    dk.unpatch(model)
    assert_same(model.generate(**fields, **greedy(6)), want)
    assert_same(twin.generate(**fields, **greedy(6)), pruned)
    dk.unpatch(twin)
    assert_same(twin.generate(**fields, **greedy(6)), want)


def test_a_copy_made_in_the_middle_of_a_generation(tape):
    """A copy taken by a hook of the user while a graph exists."""
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    twins = []
    with dk.patch(model, "fixed") as handle:
        want = model.generate(**fields, **greedy(STEPS))
        hook = model.register_forward_hook(lambda *args: twins.append(copy.deepcopy(handle.graph)) if len(twins) < 6 else None)
        assert_same(model.generate(**fields, **greedy(STEPS)), want)
        hook.remove()
    assert len(twins) == 6 and all(not twin.owner.running for twin in twins)


@TOLD
@RETENTION
@pytest.mark.parametrize("first", ["accelerate", "patch"])
def test_accelerate_hooks(tape, retention, first):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_module

    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    with dk.patch(model, "fixed", retention=retention, cuda_graph=False):
        want = model.generate(**fields, **greedy(6))
    plain = model.generate(**fields, **greedy(6))
    if first == "accelerate":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.warns(UserWarning, match="accelerate"):
        handle = dk.patch(model, "fixed", retention=retention, cuda_graph=True)
        if first == "patch":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        got = model.generate(**fields, **greedy(6))
    assert handle.graph.captures == 0
    assert_same(got, want)
    dk.unpatch(model)
    assert_same(model.generate(**fields, **greedy(6)), plain)
    if first == "patch":
        remove_hook_from_module(model, recurse=True)
        assert not isinstance(vars(model).get("forward"), graph.StepGraph)
        assert_same(model.generate(**fields, **greedy(6)), plain)


@ASIDE
@RETENTION
def test_a_graph_ends_with_its_generation(make_model, tape, retention):
    model = make_model()
    with patched(model, METHODS["dyrate"], retention) as handle:
        output = model.generate(**models.inputs(model, ROWS), **greedy(STEPS))
        last = weakref.ref(tape.tapes.pop())
        gc.collect()
        assert last() is None  # though the cache lives
        cache = weakref.ref(output.past_key_values)
        del output
        gc.collect()
        assert cache() is None
        assert handle.stats().steps


@dataclass(frozen=True)
class UsesScratchMemory(Fixed):
    """A policy that looks at what the kernels of a step would write to, on one and the same stream in every step."""

    constant = False

    def decide(self, view):
        space = workspace.for_stream(torch.device("cpu"), 7)
        space.buffers_for({"part": 8})
        SPACES.append(weakref.ref(space))
        return super().decide(view)


SPACES = []


def test_each_captured_step_owns_its_scratch_memory(make_model, tape, monkeypatch):
    """Two generations on one stream share none, and what they had goes with them. Prompts, and an eager generation, use the stream's."""
    model, fields = make_model(), models.inputs(make_model(), ROWS)
    original, captures = tape.record, []

    def record(step):
        made = original(step)
        captures.append(SPACES[-1]() is SPACES[-2]())  # the warm-up and the capture
        return made

    monkeypatch.setattr(tape, "record", record)
    for cuda_graph in (True, None, False):
        SPACES.clear()
        with dk.patch(model, policy=UsesScratchMemory(), cuda_graph=cuda_graph):
            model.generate(**fields, **greedy(5))
        gc.collect()
        gone = [space() is None for space in SPACES]
        assert gone == [False, True, True] if cuda_graph is not False else not any(gone)
    assert captures == [True, True]


def test_a_patched_model_can_be_collected(tape):
    model = models.build("llava")
    dk.patch(model, "fixed")
    model.generate(**models.inputs(model, ROWS[:1]), **greedy(STEPS))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@ASIDE
@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fastv", "depth"])
def test_no_host_sync_in_a_replay(make_model, tape, host_sync, monkeypatch, method, retention):
    model = make_model()
    mode = host_sync()
    original = graph.StepGraph._replay

    def counted(self, *args):
        with mode:
            return original(self, *args)

    monkeypatch.setattr(graph.StepGraph, "_replay", counted)
    with patched(model, METHODS[method], retention) as handle:
        model.generate(**models.inputs(model, ROWS), **greedy(STEPS, num_beams=2))
    assert handle.graph.replays == STEPS - 2
    assert not mode.found
