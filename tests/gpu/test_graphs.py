"""The operators in a CUDA graph: captured once, replayed while lengths, rates and kept sets change in place."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from tests.gpu import kit as tools
from tests.ops import spec

pytestmark = pytest.mark.gpu

LENGTHS = [([576, 100, 0], [97, 1, 12]), ([577, 0, 3], [160, 33, 1]), ([1, 1, 640], [2, 159, 160]), ([0, 0, 0], [1, 1, 1])]


def captured(step):
    """(replay, result) of ``step``, warmed up and captured on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = step()
    return graph, result


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_replays_follow_the_lengths(cuda, kit, kv_heads, dtype):
    """The score layer, a pruned layer that reads its list, and the eviction of a third, in one graph."""
    case = (3, 8, kv_heads, 128, 640, 160, [640] * 3, [160] * 3)
    arguments, linear = kit.to(tools.problem(case, dtype)), kit.to(tools.predictor(8))
    g = torch.Generator().manual_seed(2)
    new = kit.to({name: torch.randn(3, kv_heads, 128, generator=g).to(dtype) for name in ("new_key", "new_value")})
    evicted = [arguments["key"].clone(), arguments["value"].clone()]
    rows = [tensor.clone() for tensor in evicted]

    def step(arguments, evicted, backend):
        plain = {name: value for name, value in arguments.items() if name != "text_type"}
        out = ops.decode_step(**arguments, **linear, **new, backend=backend)
        narrow = ops.decode_attention(**plain, kept=out.kept, n_kept=out.n_kept, backend=backend)
        ops.compact_(evicted, out.kept, out.n_kept, arguments["n_visual"], backend=backend)
        return *out, narrow.output

    graph, result = captured(lambda: step(arguments, evicted, kit.backend))
    for visual, text in [*LENGTHS, *LENGTHS[::-1]]:
        fresh = kit.to(tools.problem((*case[:6], visual, text), dtype, seed=sum(visual)))
        for name in ("query", "key", "value", "n_visual", "n_text", "text_type"):
            arguments[name].copy_(fresh[name])
        for tensor, old in zip(evicted, rows, strict=True):
            tensor.copy_(old)
        kit.poison()
        graph.replay()
        torch.cuda.synchronize()
        apart = [tensor.clone() for tensor in rows]
        want = step(fresh, apart, kit.backend)
        for name, a, b in zip((*ops.DecodeStep._fields, "narrow"), result, want, strict=True):
            assert tools.same_bits(a, b), (name, visual, text)
        for a, b in zip([*evicted, arguments["key"], arguments["value"]], [*apart, fresh["key"], fresh["value"]], strict=True):
            assert tools.same_bits(a, b)
        exact = ops.decode_attention(
            **tools.exact({name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in fresh.items()}),
            mass=True, importance=True, backend="reference",
        )  # fmt: skip
        tools.assert_output(result[0], exact.output, dtype)
        tools.assert_statistics(result[1], exact.mass)
    kit.assert_counters_at_zero()


def test_replays_follow_the_kept_list(cuda, kit):
    """A list of the caller's at a fixed address, shorter and longer than when it was captured."""
    case = (2, 8, 8, 128, 2880, 64, [2880, 2000], [64, 3])
    arguments = kit.to({name: value for name, value in tools.problem(case, torch.bfloat16).items() if name != "text_type"})
    kept, n_kept = kit.to(spec.lists(case[6], [360, 0], 2880))
    graph, result = captured(lambda: ops.decode_attention(**arguments, kept=kept, n_kept=n_kept, backend=kit.backend).output)
    for counts in ([2880, 2000], [0, 0], [1, 1999], [360, 250]):
        lists = spec.lists(case[6], counts, 2880, seed=counts[1])
        kept.copy_(lists[0])
        n_kept.copy_(lists[1])
        graph.replay()
        want = ops.decode_attention(
            **tools.exact({name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}),
            kept=lists[0], n_kept=lists[1], backend="reference",
        )  # fmt: skip
        tools.assert_output(result, want.output, torch.bfloat16)


def test_a_replay_stays_valid_when_a_larger_problem_comes_along(cuda, kit):
    """Scratch memory that grows leaves the captured one where it was."""
    small = kit.to(tools.problem((1, 8, 8, 64, 64, 32, [64], [32]), torch.float16))
    graph, result = captured(lambda: ops.decode_attention(**small, mass=True, importance=True, backend=kit.backend))
    want = [tensor.clone() for tensor in ops.decode_attention(**small, mass=True, importance=True, backend=kit.backend)]
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            large = kit.to(tools.problem((8, 32, 32, 64, 3000, 100, [3000] * 8, [100] * 8), torch.float16))
            ops.decode_attention(**large, mass=True, importance=True, backend=kit.backend)
        torch.cuda.synchronize()
        del large
        kit.poison()
        graph.replay()
        torch.cuda.synchronize()
        assert all(tools.same_bits(a, b) for a, b in zip(result, want, strict=True))


def test_two_streams_at_once(cuda, kit):
    """Each stream has scratch memory of its own."""
    problems = [kit.to(tools.problem((4, 8, 8, 64, 1500, 100, [1500, 3, 700, 0], [100, 4, 1, 7]), torch.float16, seed=s)) for s in (1, 2)]
    linear = kit.to(tools.predictor(8))
    want = [ops.decode_step(**problem, **linear, backend=kit.backend) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(20):
        got = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                got.append([ops.decode_step(**problem, **linear, backend=kit.backend) for _ in range(5)])
        torch.cuda.synchronize()
        for several, one in zip(got, want, strict=True):
            assert all(tools.same_bits(a, b) for step in several for a, b in zip(step, one, strict=True))


def test_no_call_waits_for_the_device(cuda, kit):
    """torch raises where one does."""
    case = (3, 8, 2, 64, 200, 40, [200, 17, 0], [40, 3, 1])
    arguments, linear = kit.to(tools.problem(case, torch.float16, window=True)), kit.to(tools.predictor(8))
    index, new = kit.to(torch.tensor([2, 0, 1])), kit.to(torch.randn(3, 2, 64).half())
    count = kit.to(torch.tensor([9, 9, 9]).int())

    def everything():
        out = ops.decode_step(**arguments, window=100, **linear, new_key=new, new_value=new, backend=kit.backend)
        ops.decode_attention(**arguments, kept=out.kept, n_kept=out.n_kept, mass=True, importance=True, backend=kit.backend)
        ops.score_last_query(**arguments, backend=kit.backend)
        ops.predict_rate(out.mass, **linear, backend=kit.backend)
        kept, n_kept = ops.select_tokens(out.importance, count, arguments["n_visual"], backend=kit.backend)
        ops.compact_([arguments["key"], arguments["value"]], kept, n_kept, arguments["n_visual"], backend=kit.backend)
        ops.reorder_([arguments["key"], arguments["value"]], index, backend=kit.backend)

    everything()  # compiles, and describes the buffers once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
