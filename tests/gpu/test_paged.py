"""paged_attention and paged_step against the float64 reference on the CPU, and in a CUDA graph whose tables and lengths change."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from tests.gpu import kit as tools
from tests.gpu.kit import DTYPES, HALF, ON_GPU
from tests.gpu.test_graphs import captured
from tests.ops import paged_spec

pytestmark = pytest.mark.gpu

LARGE = [
    paged_spec.Shape(28, 4, 128, 16, ("35s 1200v 11i 1680v 60i", "20s 576v 40i", "90i"), (77, 200, 3),
                     ((0, -1), (1, -4), (1, -3), (1, -2), (1, -1), (2, -1), (0, 0))),
    paged_spec.Shape(8, 8, 128, 48, ("35s 2880v 60i", "20s 576v 40i"), (128, 1), ((0, -1), (1, -1)), plain=True),
]  # fmt: skip
SHAPES = [*paged_spec.SHAPES, *(LARGE if ON_GPU else ())]
PLAIN = ("query", "key", "value", "block_table", "n_rows", "sequence", "scale")


@pytest.fixture(autouse=True)
def _has_the_form(kit):
    if kit.backend == "cuda":
        pytest.skip("CUDA C++ has no paged form")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_shapes(kit, number, dtype):
    arguments = paged_spec.problem(SHAPES[number], dtype, share=number % 2 == 1)
    for how in ({}, paged_spec.lists(arguments, 0.3)):
        kit.poison()
        got = ops.paged_attention(**kit.to(arguments), **kit.to(how), mass=True, importance=True, backend=kit.backend)
        want = ops.paged_attention(**tools.exact(arguments), **how, mass=True, importance=True, backend="reference")
        tools.assert_attention(got, want, dtype)
        given = {name: arguments[name] for name in PLAIN} if not how else arguments
        plain = ops.paged_attention(**kit.to(given), **kit.to(how), backend=kit.backend)
        tools.assert_output(plain.output, want.output, dtype)
        kit.assert_counters_at_zero()


@pytest.mark.parametrize("form", ["all", "list", "statistics"])
@pytest.mark.parametrize("number", [1, len(SHAPES) - 1])
def test_sliding_window(kit, number, form):
    arguments = paged_spec.problem(SHAPES[number], HALF)
    how = {"window": 300 if number > 4 else 9} | (paged_spec.lists(arguments, 0.5) if form == "list" else {})
    given = {name: arguments[name] for name in PLAIN} if form == "all" else arguments
    got = ops.paged_attention(**kit.to(given), **kit.to(how), mass=form == "statistics", backend=kit.backend)
    want = ops.paged_attention(**tools.exact(given), **how, mass=form == "statistics", backend="reference")
    tools.assert_output(got.output, want.output, HALF)
    if form == "statistics":
        tools.assert_statistics(got.mass, want.mass)


@pytest.mark.parametrize("number", [1, len(SHAPES) - 1])
def test_a_step_chooses_by_its_own_statistics(kit, number):
    arguments = paged_spec.problem(SHAPES[number], HALF)
    rows, tokens = arguments["query"].shape[0], arguments["visual_position"].shape[1]
    count = torch.full((rows,), tokens // 4, dtype=torch.int32)
    step = ops.paged_step(**kit.to(arguments), count=count.to(kit.device), backend=kit.backend)
    index, n_kept = ops.select_tokens(step.importance.cpu(), count, arguments["n_visual"], backend="reference")
    assert torch.equal(step.n_kept.cpu(), n_kept)
    positions = arguments["visual_position"][paged_spec.owners(arguments)].gather(1, index.clamp(min=0).long())
    assert torch.equal(step.kept.cpu(), torch.where(index < 0, -1, positions))


def test_replays_follow_tables_and_lengths(cuda, kit):
    shape = LARGE[0]
    arguments = kit.to(paged_spec.problem(shape, HALF))
    linear = kit.to(tools.predictor(28))

    def step(arguments):
        out = ops.paged_step(**arguments, **linear, backend=kit.backend)
        narrow = ops.paged_attention(**arguments, kept=out.kept, n_kept=out.n_kept, backend=kit.backend)
        return *out, narrow.output

    graph, result = captured(lambda: step(arguments))
    for seed in (1, 2, 3):
        fresh = kit.to(paged_spec.problem(shape, HALF, seed=seed))
        if seed == 3:
            fresh["n_rows"].clamp_(max=700)
            fresh["n_visual"].copy_(torch.minimum(fresh["n_visual"], (fresh["n_rows"] - 35).clamp(min=0)))
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor):
                tensor.copy_(fresh[name])
        kit.poison()
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(result, step(fresh), strict=True):
            assert tools.same_bits(got, want)
