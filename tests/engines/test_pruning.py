"""Decisions of the vLLM plug-in, without vLLM: whatever a scheduler does, a request's rows are those of a ``Session`` that it has alone."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dyrate_kernels import DyRatePredictor, policies
from dyrate_kernels.engines.vllm import options
from dyrate_kernels.engines.vllm.requests import Prompt
from dyrate_kernels.generation.heads import HeadShards
from dyrate_kernels.policies.base import Policy
from tests.engines.engine import SHAPE, Alone, Engine, Load, Mix, Part, alone

LOADS = {
    "a": Load(Prompt(20, ((3, 14),)), 7),
    "several": Load(Prompt(26, ((1, 8), (12, 12), (15, 22))), 6),
    "text": Load(Prompt(9, ()), 4),
    "first": Load(Prompt(13, ((0, 9),)), 5),
    "long": Load(Prompt(74, ((30, 39),)), 3),  # as many words as a list of them is wide
    "one": Load(Prompt(5, ((2, 2),)), 2),
}


def _trained() -> DyRatePredictor:
    """Random weights, of a draw whose rates differ from row to row."""
    made = DyRatePredictor.for_model(SHAPE, (0.0, 0.3, 0.6, 0.9), k=2)
    with torch.no_grad():
        made.bias.zero_()
        made.weight.copy_(torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(2)))
    return made


POLICIES = {
    "fixed": policies.Fixed(k=2, rate=0.6),
    "fastv": policies.FastV(k=2, rate=0.75),
    "dyrate": policies.DyRate(k=3),
    "dyrate spread": policies.DyRate(k=2, spread=0.5),
    "dyrate trained": policies.DyRate(k=2, predictor=_trained()),
    "vtw": policies.VTW(k=4),
    "schedule": policies.Schedule(k=1, kept=[[1, 9], [3, 5], [6, 2]]),
    "threshold": policies.Threshold(k=2, share=0.7),
    "uniform": policies.Uniform(k=2, rate=0.5),
    "random": policies.Random(k=2, rate=0.5),
    "dycoke": policies.DyCoke(k=2, rate=0.6, similarity=0.7),
    "st3": policies.ST3(k=2, stages=3, horizon=6),
    "depth": policies.Depth(k=3, prune=0.25, growth=0.5),
    "pyramiddrop": policies.PyramidDrop(k=2, keep=0.6, stages=3),
    "layerwise": policies.LayerWise(k=2, groups=3),
}


@functools.cache
def bound(name: str) -> Policy:
    return POLICIES[name].bind(SHAPE)


@functools.cache
def reference(name: str, request: str, window: int | None = None) -> Alone:
    return alone(request, LOADS[request], bound(name), window)


def check(engine: Engine, name: str, window: int | None = None) -> None:
    """Every answer row of an engine that served all: what it gave, and what it kept."""
    for request, load in LOADS.items():
        if not load.prompt.visual:
            assert not any(each == request for each, _ in engine.kept)
            continue
        want, first = reference(name, request, window), load.prompt.length
        for layer in range(SHAPE.num_layers):
            if engine.pruning.reads(layer):
                found = engine.output[request][layer][first:]
                torch.testing.assert_close(found, want.output[layer][first:], msg=lambda words, at=(request, layer): f"{at}: {words}")
        assert [engine.kept[request, row] for row in range(first, load.total)] == want.kept, request


def test_every_supported_policy_is_here():
    supported = {name for name in policies.names() if name != "none" and options.why_refused(policies.get(name)) is None}
    assert {POLICIES[name].name for name in POLICIES} == supported


@pytest.mark.parametrize("name", ["dyrate", "dyrate trained", "layerwise", "threshold", "schedule", "st3"])
def test_counts_that_follow_the_row_differ_between_rows(name):
    """Else a decision that is taken for another row would not be seen below."""
    for request in ("a", "several", "first"):
        assert len({tuple(map(len, row)) for row in reference(name, request).kept}) > 1


def test_dycoke_selects_anew_in_some_rows_and_not_in_others():
    rows = reference("dycoke", "a").kept
    assert {one == other for one, other in zip(rows, rows[1:], strict=False)} == {True, False}


@pytest.mark.parametrize("name", POLICIES)
def test_requests_at_once_are_as_each_alone(name):
    engine = Engine(bound(name), LOADS)
    Mix(seed=1).serve(engine)
    check(engine, name)
    check_figures(engine, name)


def check_figures(engine: Engine, name: str) -> None:
    """Figures are those of what each row kept; where no row was computed twice."""
    layers = engine.table.layers
    for each in engine.table.figures():
        load, want = LOADS[each.request], reference(name, each.request)
        kept = sum(len(list_) * count for row in want.kept for list_, count in zip(row, layers, strict=True)) / sum(layers) / load.answer
        assert each.rows == load.answer and each.n_visual == load.prompt.n_visual
        assert each.kept == pytest.approx(kept) and each.rate == pytest.approx(1 - kept / each.n_visual)
        dense = sum(range(load.prompt.length + 1, load.total + 1)) * SHAPE.num_layers
        gone = (each.n_visual - kept) * sum(layers) * load.answer
        assert each.share == pytest.approx(1 - gone / dense)
    assert {each.request for each in engine.table.figures()} == {*LOADS} - {"text"}


@pytest.mark.parametrize("name", POLICIES)
def test_rows_that_are_computed_again_and_fewer_slots_than_requests(name):
    """A policy that remembers begins again with the prompt's end: what its state was within the answer is not known."""
    engine = Engine(bound(name), LOADS, slots=3)
    Mix(seed=2, batch=3, preempts=True, within=not bound(name).remembers).serve(engine)
    check(engine, name)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "dycoke"])
def test_drafts_decide_for_themselves(name):
    engine = Engine(bound(name), LOADS)
    Mix(seed=3, drafts=True, preempts=True, within=True).serve(engine)
    check(engine, name)


@pytest.mark.parametrize("name", POLICIES)
def test_prompt_and_answer_in_one_step(name):
    """As after a preemption, when nothing is known of what the prompt decided before."""
    engine = Engine(bound(name), LOADS)
    for request in LOADS:
        engine.add(request)
    engine.step([Part(request, 0, load.total) for request, load in LOADS.items()])
    check(engine, name)


@pytest.mark.parametrize("name", ["dyrate", "fastv", "dycoke", "layerwise", "pyramiddrop"])
def test_sliding_windows(name):
    engine = Engine(bound(name), LOADS, window=11)
    Mix(seed=4, preempts=True).serve(engine)
    check(engine, name, window=11)


def test_vtw_reads_no_visual_row_of_a_pruned_layer():
    """So that retention ``evict`` may give their blocks back."""
    engine = Engine(bound("vtw"), LOADS)
    for request, load in LOADS.items():
        engine.add(request)
        engine.step([Part(request, 0, load.prompt.length)])
        for first, last in load.prompt.visual:
            engine.forget(request, range(first, last + 1), range(4, SHAPE.num_layers))
    for number in range(max(load.answer for load in LOADS.values())):
        engine.step([Part(request, load.prompt.length + number, 1) for request, load in LOADS.items() if number < load.answer])
    check(engine, "vtw")


# ---- heads that are shared out ------------------------------------------------------------------------------------------------------


class Meeting(HeadShards):
    """Ranks that are threads; ``group``: where they meet, what they bring, and which one this is."""

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        barrier, brought, rank = self.group
        brought[rank] = tensor.clone().flatten()
        barrier.wait()
        found = [brought[each].clone() for each in range(self.size)]
        barrier.wait()
        return found


@pytest.mark.parametrize("name", ["dyrate", "dycoke", "layerwise", "pyramiddrop"])
def test_ranks_with_a_part_of_the_heads_decide_as_one_with_all(name):
    barrier, brought = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2
    ranks = [Engine(bound(name), LOADS, heads=Meeting((barrier, brought, rank), 2), shard=rank) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for served in [pool.submit(Mix(seed=5, preempts=True).serve, engine) for engine in ranks]:
            served.result()
    whole = Engine(bound(name), LOADS)
    whole.kept = ranks[0].kept
    assert ranks[1].kept == ranks[0].kept
    for request, layers in whole.output.items():
        for layer, output in enumerate(layers):
            output.copy_(torch.cat([rank.output[request][layer] for rank in ranks], 1))
    check(whole, name)
