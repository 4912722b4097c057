"""paged_attention and paged_step in a CUDA graph whose tables and lengths change; the rest is in tests/ops/test_paged.py."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from tests.gpu import kit as tools
from tests.gpu.kit import HALF
from tests.gpu.test_graphs import captured
from tests.ops import paged_spec

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _has_the_form(kit):
    if kit.backend == "cuda":
        pytest.skip("CUDA C++ has no paged form")


def test_replays_follow_tables_and_lengths(cuda, kit):
    shape = paged_spec.LARGE[0]
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
