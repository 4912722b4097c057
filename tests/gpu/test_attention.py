"""Attention and its step in sizes that only a GPU can afford, and a hundred times; the rest is in tests/ops/test_attention.py and
test_decision.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from dyrate_kernels import ops
from tests.gpu import kit as tools
from tests.gpu.kit import HALF, LARGE, ON_GPU
from tests.ops.attention_problems import SHAPES

pytestmark = pytest.mark.gpu

DECISIONS = ("same_launch", "second_launch", *(("two_launches",) if ON_GPU else ()))


def assert_step(step, arguments, dtype):
    """Attention as the float64 reference's."""
    want = ops.decode_attention(**tools.exact(arguments), mass=True, importance=True, backend="reference")
    tools.assert_output(step.output, want.output, dtype)
    tools.assert_statistics(step.mass, want.mass)
    tools.assert_statistics(step.importance, want.importance)


@pytest.mark.parametrize("where", DECISIONS)
@pytest.mark.parametrize("heads", [(2, 2), (8, 2)], ids=["mha", "gqa"])
def test_16384_visual_tokens(kit, heads, where):
    """More than one pass of the selection can hold."""
    tokens = 16384 if ON_GPU else 4200
    dim = 64 if ON_GPU else 16
    case = (2, *heads, dim, tokens, 40, [tokens, tokens // 2 + 1], [40, 3])
    arguments = tools.problem(case, HALF)
    counts = [tokens // 8, tokens // 3]
    with kit.decision(where, arguments):
        step = ops.decode_step(**kit.to(arguments), count=kit.to(torch.tensor(counts).int()), backend=kit.backend)
    assert_step(step, arguments, HALF)
    tools.assert_kept(step.kept, step.n_kept, step.importance, counts, case[6])
    narrow = {"kept": step.kept.cpu(), "n_kept": step.n_kept.cpu()}
    kit.poison()
    got = ops.decode_attention(**kit.to(arguments), **kit.to(narrow), mass=True, importance=True, backend=kit.backend)
    assert_step(got, arguments | narrow, HALF)
    kit.assert_counters_at_zero()


def test_256_sequences(kit):
    batch = 256 if ON_GPU else 8
    g = torch.Generator().manual_seed(6)
    lengths = torch.randint(0, 65, (batch,), generator=g).tolist()
    texts = torch.randint(0, 20, (batch,), generator=g).tolist()
    case = (batch, 4, 2, 32, 64, 20, lengths, texts)
    arguments = tools.problem(case, HALF)
    counts = [n // 2 for n in lengths]
    step = ops.decode_step(**kit.to(arguments), count=kit.to(torch.tensor(counts).int()), backend=kit.backend)
    assert_step(step, arguments, HALF)
    tools.assert_kept(step.kept, step.n_kept, step.importance, counts, lengths)


@pytest.mark.skipif(not ON_GPU, reason="compiled kernels need a GPU")
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_a_grid_is_of_whole_waves_of_the_programs_that_run_at_once(kit, case, monkeypatch):
    if kit.backend != "triton":
        pytest.skip("the CUDA kernels' blocks are counted when they are compiled")
    from dyrate_kernels.triton_kernels import backend

    monkeypatch.setattr(backend, "_attentions", {})
    arguments = kit.to(tools.problem(case, HALF))
    new = {f"new_{name}": arguments[name][:, :, 0].contiguous() for name in ("key", "value")}
    ops.decode_attention(**arguments, **new, mass=True, importance=True, backend="triton")
    (known,) = backend._attentions.values()
    compiled = known.launch._compiled
    fits = backend._multiprocessor(kit.device).holds(compiled.n_regs, compiled.metadata.shared, known.launch.options["num_warps"])
    programs, wave = math.prod(known.launch.grid), fits * torch.cuda.get_device_properties(kit.device).multi_processor_count
    assert fits >= 1 and (programs <= wave or programs / (-(-programs // wave) * wave) > 0.6)


@pytest.mark.parametrize("where", DECISIONS)
@pytest.mark.parametrize("case", [*(SHAPES[name] for name in ("heads", "pairs", "fours")), *(LARGE if ON_GPU else ())], ids=str)
def test_every_run_gives_the_same_bits(kit, case, where):
    runs = 100 if ON_GPU else 2
    arguments, linear = kit.to(tools.problem(case, HALF)), kit.to(tools.predictor(case[1]))
    with kit.decision(where, arguments):
        first = ops.decode_step(**arguments, **linear, backend=kit.backend)
        for turn in range(runs - 1):
            if turn % 10 == 0:
                kit.poison()
            again = ops.decode_step(**arguments, **linear, backend=kit.backend)
            for name, a, b in zip(first._fields, first, again, strict=True):
                assert tools.same_bits(a, b), f"{name} differs in run {turn + 2}"
    kit.assert_counters_at_zero()
