"""decode_attention, score_last_query and decode_step against the float64 reference on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from dyrate_kernels import ops
from tests.gpu import kit as tools
from tests.gpu.kit import CASES, DIMS, DTYPES, GROUPS, HALF, ON_GPU, SMALL
from tests.ops import spec

pytestmark = pytest.mark.gpu

DECISIONS = ("same_launch", "second_launch", *(("two_launches",) if ON_GPU else ()))


def both(kit, arguments, **more):
    """(what the backend gives, the float64 reference): decode_attention with statistics."""
    kit.poison()
    got = ops.decode_attention(**kit.to(arguments), **kit.to(more), mass=True, importance=True, backend=kit.backend)
    want = ops.decode_attention(**tools.exact(arguments), **more, mass=True, importance=True, backend="reference")
    kit.assert_counters_at_zero()
    return got, want


def lists_for(case, share, width=None):
    counts = [int(n * share) for n in case[6]]
    return dict(zip(("kept", "n_kept"), spec.lists(case[6], counts, max(counts) if width is None else width), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(kit, case, dtype):
    arguments = tools.problem(case, dtype)
    got, want = both(kit, arguments)
    tools.assert_attention(got, want, dtype)
    plain = ops.decode_attention(**kit.to({k: v for k, v in arguments.items() if k != "text_type"}), backend=kit.backend)
    assert plain.mass is None and plain.importance is None
    tools.assert_output(plain.output, want.output, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dim", DIMS)
def test_head_dims_and_groups(kit, dim, group, dtype):
    rows = 70 if ON_GPU else 35
    case = (2, 2 * group, 2, dim, rows, 19, [rows, 3], [19, 18])
    got, want = both(kit, tools.problem(case, dtype, seed=dim + group))
    tools.assert_attention(got, want, dtype)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kept_list(kit, case, share, wide):
    more = lists_for(case, share, case[4] + 3 if wide else None)
    got, want = both(kit, tools.problem(case, HALF), **more)
    tools.assert_attention(got, want, HALF)


@pytest.mark.parametrize("with_list", [False, True], ids=["all", "kept"])
@pytest.mark.parametrize("window", [1, 8, 25, 1000])
@pytest.mark.parametrize("case", CASES[1:6] + CASES[8:], ids=str)
def test_sliding_window(kit, case, window, with_list):
    more = lists_for(case, 0.5) if with_list else {}
    got, want = both(kit, tools.problem(case, HALF, window=True), window=window, **more)
    tools.assert_attention(got, want, HALF)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_a_bad_logit_stays_in_its_sequence_and_head(kit, bad, group):
    case = (2, 2 * group, 2, 16, 40, 20, [40, 33], [20, 3])
    arguments = tools.problem(case, torch.float32)
    arguments["query"].abs_()
    arguments["key"][0, 1, 2, 0] = bad
    got, want = both(kit, arguments)
    tools.assert_output(got.output, want.output, torch.float32)
    tools.assert_statistics(got.mass, want.mass)
    assert got.output[1].isfinite().all() and got.importance[1].isfinite().all() and got.output[0, :group].isfinite().all()


@pytest.mark.parametrize("group", [1, 4])
def test_only_minus_infinity(kit, group):
    """Softmax over nothing but -inf is NaN; over no row at all the output is 0."""
    arguments = tools.problem((2, 2 * group, 2, 16, 20, 4, [20, 0], [4, 0]), torch.float32)
    arguments["query"].fill_(1.0)
    arguments["key"][0].fill_(float("-inf"))
    got, want = both(kit, arguments)
    assert want.output[0].isnan().all()
    assert got.output[0].isnan().all() and not got.output[1].any() and not got.mass[1].any() and not got.importance[1].any()


@pytest.mark.parametrize("huge", [1.0, 1e3])
def test_large_logits(kit, huge):
    """Only the differences of logits count."""
    arguments = tools.problem((2, 4, 2, 32, 50, 9, [50, 17], [9, 2]), torch.float32)
    arguments["query"].mul_(huge).abs_()
    arguments["key"].add_(3.0)
    got, want = both(kit, arguments)
    assert torch.allclose(got.mass.sum(-1), torch.ones_like(got.mass[..., 0]), atol=1e-5)
    if huge == 1.0:
        tools.assert_attention(got, want, torch.float32)
    else:  # float32 logits of several thousands are good to about 1e-3
        assert torch.allclose(got.mass.double().cpu(), want.mass, atol=2e-2)


def test_strided_inputs(kit):
    case = (2, 4, 2, 32, 40, 12, [40, 5], [12, 3])
    arguments = kit.to(tools.problem(case, torch.float32))
    more = kit.to(lists_for(case, 0.4, 41))
    strided = dict(arguments)
    strided["query"] = arguments["query"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["text_type"] = torch.stack([arguments["text_type"]] * 2, -1)[..., 0]
    for inner in (True, False):
        for name in ("key", "value"):
            wide = torch.full((2, 2, 52, 64), float("nan"), device=kit.device)
            wide[..., ::2] = arguments[name]
            strided[name] = wide[..., ::2] if inner else arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
        for extra in ({}, more):
            plain = ops.decode_attention(**arguments, **extra, mass=True, importance=True, backend=kit.backend)
            other = ops.decode_attention(**strided, **extra, mass=True, importance=True, backend=kit.backend)
            for a, b in zip(plain, other, strict=True):
                assert torch.allclose(a, b, atol=1e-6)


def test_addresses_that_are_not_aligned(kit):
    arguments = kit.to(tools.problem((2, 4, 2, 32, 40, 12, [40, 5], [12, 3]), HALF))
    plain = ops.decode_attention(**arguments, mass=True, importance=True, backend=kit.backend)
    shifted = dict(arguments)
    for name in ("query", "key", "value"):
        room = arguments[name].new_empty(arguments[name].numel() + 1)[1:].view(arguments[name].shape)
        shifted[name] = room.copy_(arguments[name])
    other = ops.decode_attention(**shifted, mass=True, importance=True, backend=kit.backend)
    for a, b in zip(plain, other, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_a_new_row_is_written_then_read(kit, case, dtype):
    """In one call; nothing but that row changes, and nothing past the buffer."""
    arguments = tools.problem(case, dtype)
    g = torch.Generator().manual_seed(9)
    new = {name: torch.randn(case[0], case[2], case[3], generator=g).to(dtype) for name in ("new_key", "new_value")}
    on_device = kit.to(arguments)
    buffers = {}
    for name in ("key", "value"):
        on_device[name], buffers[name] = tools.guarded(on_device[name])
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    kit.poison()
    got = ops.decode_attention(**on_device, **kit.to(new), mass=True, importance=True, backend=kit.backend)
    exact = tools.exact(arguments)
    want = ops.decode_attention(**exact, **tools.exact(new), mass=True, importance=True, backend="reference")
    tools.assert_attention(got, want, dtype)
    for name, buffer in buffers.items():
        for b, length in enumerate(case[7]):
            if length:
                before[name][b, :, case[4] + length - 1] = new[f"new_{name}"][b].to(kit.device)
        assert tools.same_bits(buffer, before[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_score_last_query(kit, case, dtype):
    arguments = tools.problem(case, dtype)
    kit.poison()
    mass, importance = ops.score_last_query(**kit.to(arguments), backend=kit.backend)
    want_mass, want_importance = ops.score_last_query(**tools.exact(arguments), backend="reference")
    tools.assert_statistics(mass, want_mass)
    tools.assert_statistics(importance, want_importance)


@pytest.mark.parametrize("window", [3, 30])
def test_score_last_query_in_a_window(kit, window):
    arguments = tools.problem(SMALL[1], HALF, window=True)
    mass, importance = ops.score_last_query(**kit.to(arguments), window=window, backend=kit.backend)
    want_mass, want_importance = ops.score_last_query(**tools.exact(arguments), window=window, backend="reference")
    tools.assert_statistics(mass, want_mass)
    tools.assert_statistics(importance, want_importance)


# ---- decode_step ------------------------------------------------------------------------------------------------------------------


def assert_step(step, arguments, case, dtype):
    """Attention as the float64 reference's, decisions as a loop over the step's own statistics makes them."""
    want = ops.decode_attention(**tools.exact(arguments), mass=True, importance=True, backend="reference")
    tools.assert_output(step.output, want.output, dtype)
    tools.assert_statistics(step.mass, want.mass)
    tools.assert_statistics(step.importance, want.importance)


@pytest.mark.parametrize("where", DECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_step_with_a_predictor(kit, case, dtype, where):
    arguments = tools.problem(case, dtype)
    linear = tools.predictor(case[1])
    with kit.decision(where, arguments):
        kit.poison()
        step = ops.decode_step(**kit.to(arguments), **kit.to(linear), backend=kit.backend)
        kit.assert_counters_at_zero()
    assert_step(step, arguments, case, dtype)
    classes = spec.predict(step.mass.cpu(), linear["weight"], linear["bias"])
    assert step.rate.dtype == torch.float64
    assert step.rate.tolist() == linear["rates"][classes].tolist()
    counts = [spec.keep_count(n, float(linear["rates"][c])) for n, c in zip(case[6], classes, strict=True)]
    tools.assert_kept(step.kept, step.n_kept, step.importance, counts, case[6])


@pytest.mark.parametrize("where", DECISIONS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_step_with_a_count(kit, case, share, where):
    """None kept, some, all; with a ceiling, and with tokens that cannot be chosen."""
    arguments = tools.problem(case, HALF)
    g = torch.Generator().manual_seed(4)
    counts = [int(n * share) for n in case[6]]
    alive = torch.rand(case[0], case[4], generator=g) < 0.7
    ceiling = torch.randint(0, case[4] + 2, (case[0],), generator=g).int()
    count = torch.tensor(counts, dtype=torch.int32)
    with kit.decision(where, arguments):
        plain = ops.decode_step(**kit.to(arguments), count=kit.to(count), backend=kit.backend)
        narrow = ops.decode_step(**kit.to(arguments), **kit.to({"count": count, "alive": alive, "max_kept": ceiling}), backend=kit.backend)
    assert_step(plain, arguments, case, HALF)
    tools.assert_kept(plain.kept, plain.n_kept, plain.importance, counts, case[6])
    bounded = [min(a, int(b)) for a, b in zip(counts, ceiling, strict=True)]
    tools.assert_kept(narrow.kept, narrow.n_kept, narrow.importance, bounded, case[6], alive)
    for step in (plain, narrow):
        for n, kept, rate in zip(case[6], step.n_kept.tolist(), step.rate.tolist(), strict=True):
            assert rate == pytest.approx(1 - kept / n if n else 0.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, HALF], ids=str)
def test_decode_step_with_a_score(kit, dtype):
    """A score of the caller's, full of ties, NaN and infinities."""
    case = SMALL[1]
    arguments = tools.problem(case, torch.float32)
    g = torch.Generator().manual_seed(8)
    values = torch.tensor([0.0, -0.0, 1.0, -2.0, float("inf"), float("-inf"), float("nan")])
    score = values[torch.randint(0, 7, (case[0], case[4]), generator=g)].to(dtype)
    counts = [11, 3, 2]
    step = ops.decode_step(**kit.to(arguments), **kit.to({"count": torch.tensor(counts).int(), "score": score}), backend=kit.backend)
    tools.assert_kept(step.kept, step.n_kept, score, counts, case[6])


def test_ties_go_to_the_smaller_index(kit):
    """Equal keys give equal importance."""
    arguments = tools.problem((1, 4, 2, 16, 64, 8, [50], [8]), torch.float32)
    arguments["key"][:, :, :50] = 0.25
    step = ops.decode_step(**kit.to(arguments), count=kit.to(torch.tensor([7], dtype=torch.int32)), backend=kit.backend)
    assert step.importance[0, :50].unique().numel() == 1
    assert step.kept[0, :8].tolist() == [*range(7), -1]


def test_decode_step_with_a_bias_a_sequence_and_a_new_row(kit):
    case = (3, 4, 2, 16, 30, 9, [30, 11, 0], [9, 1, 4])
    arguments = tools.problem(case, HALF)
    linear = tools.predictor(4)
    g = torch.Generator().manual_seed(2)
    linear["bias"] = torch.randn(3, 5, generator=g) * 3
    new = {name: torch.randn(3, 2, 16, generator=g).to(HALF) for name in ("new_key", "new_value")}
    step = ops.decode_step(**kit.to(arguments), **kit.to(linear), **kit.to(new), backend=kit.backend)
    exact = tools.exact(arguments)
    want = ops.decode_step(**exact, **linear, **tools.exact(new), backend="reference")
    tools.assert_output(step.output, want.output, HALF)
    tools.assert_statistics(step.mass, want.mass)
    classes = spec.predict(step.mass.cpu(), linear["weight"], linear["bias"])
    assert step.rate.tolist() == linear["rates"][classes].tolist()
    counts = [spec.keep_count(n, float(linear["rates"][c])) for n, c in zip(case[6], classes, strict=True)]
    tools.assert_kept(step.kept, step.n_kept, step.importance, counts, case[6])


# ---- sizes ------------------------------------------------------------------------------------------------------------------------


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
    assert_step(step, arguments, case, HALF)
    tools.assert_kept(step.kept, step.n_kept, step.importance, counts, case[6])
    narrow = {"kept": step.kept.cpu(), "n_kept": step.n_kept.cpu()}
    got, want = both(kit, arguments, **narrow)
    tools.assert_attention(got, want, HALF)


def test_256_sequences(kit):
    batch = 256 if ON_GPU else 8
    g = torch.Generator().manual_seed(6)
    lengths = torch.randint(0, 65, (batch,), generator=g).tolist()
    texts = torch.randint(0, 20, (batch,), generator=g).tolist()
    case = (batch, 4, 2, 32, 64, 20, lengths, texts)
    arguments = tools.problem(case, HALF)
    counts = [n // 2 for n in lengths]
    step = ops.decode_step(**kit.to(arguments), count=kit.to(torch.tensor(counts).int()), backend=kit.backend)
    assert_step(step, arguments, case, HALF)
    tools.assert_kept(step.kept, step.n_kept, step.importance, counts, lengths)


@pytest.mark.skipif(not ON_GPU, reason="compiled kernels need a GPU")
@pytest.mark.parametrize("case", CASES[len(SMALL) :], ids=str)
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


# ---- the same again ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", DECISIONS)
@pytest.mark.parametrize("case", CASES[1:4] + CASES[8:], ids=str)
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


def test_reading_changes_nothing(kit):
    case = SMALL[3]
    arguments = kit.to(tools.problem(case, HALF))
    for name in ("key", "value"):
        arguments[name], _ = tools.guarded(arguments[name])
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    ops.decode_step(**arguments, **kit.to(tools.predictor(case[1])), backend=kit.backend)
    ops.decode_attention(**arguments, **kit.to(lists_for(case, 0.5)), mass=True, importance=True, backend=kit.backend)
    ops.score_last_query(**arguments, backend=kit.backend)
    for name, value in before.items():
        assert tools.same_bits(value, arguments[name]), name
