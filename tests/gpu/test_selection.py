"""select_tokens, predict_rate, compact_ and reorder_ against loops on the CPU."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from tests.gpu import kit as tools
from tests.gpu.kit import HALF, ON_GPU
from tests.ops import spec

pytestmark = pytest.mark.gpu

SIZES = (0, 1, 2, 15, 16, 17, 31, 33, 144, 576, 1000, 2880, 4095, 4096, 4097, 8193, 16384) if ON_GPU else (0, 1, 17, 33, 144, 4097)
SPECIAL = torch.tensor([0.0, -0.0, 1.0, 1.5, -2.0, 1e-45, 3.4e38, float("inf"), float("-inf"), float("nan"), 0.1])


def select(kit, score, counts, lengths, alive=None):
    kit.poison()
    tensors = kit.to({"score": score, "count": torch.tensor(counts).int(), "n_visual": torch.tensor(lengths).int(), "alive": alive})
    kept, n_kept = ops.select_tokens(**tensors, backend=kit.backend)
    tools.assert_kept(kept, n_kept, score, counts, lengths, alive)


@pytest.mark.parametrize("kind", ["random", "ties", "special", "equal", "denormal"])
@pytest.mark.parametrize("tokens", SIZES)
def test_select_tokens(kit, tokens, kind):
    g = torch.Generator().manual_seed(tokens)
    score = {
        "random": lambda: torch.randn(5, tokens, generator=g),
        "ties": lambda: torch.randint(0, 9, (5, tokens), generator=g).float(),
        "special": lambda: SPECIAL[torch.randint(0, len(SPECIAL), (5, tokens), generator=g)],
        "equal": lambda: torch.full((5, tokens), -0.25),
        "denormal": lambda: torch.randint(-5, 6, (5, tokens), generator=g) * 1e-44,
    }[kind]()
    counts = [tokens // 8, tokens, 0, tokens // 2 + 1, -3]
    select(kit, score, counts, [tokens, tokens // 2, tokens, max(tokens - 1, 0), tokens])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_candidates(kit, dtype):
    g = torch.Generator().manual_seed(1)
    tokens = 2880 if ON_GPU else 300
    score = torch.randint(0, 40, (4, tokens), generator=g).to(dtype) / 64
    alive = torch.rand(4, tokens, generator=g) < 0.5
    select(kit, score, [tokens // 8, tokens, 0, 17], [tokens, tokens - 5, tokens, 30], alive)


def test_float64_scores_that_float32_cannot_tell_apart(kit):
    score = 1 + torch.arange(40, dtype=torch.float64).flip(0)[None] * 1e-14
    select(kit, score, [5], [40])


def test_strided_scores(kit):
    g = torch.Generator().manual_seed(2)
    score = kit.to(torch.randn(3, 2, 50, generator=g))[:, 1]
    alive = kit.to(torch.rand(50, 3, generator=g) < 0.6).t()
    count, lengths = torch.tensor([9, 50, 1]).int(), torch.tensor([50, 31, 2]).int()
    kept, n_kept = ops.select_tokens(score, kit.to(count), kit.to(lengths), alive=alive, backend=kit.backend)
    tools.assert_kept(kept, n_kept, score, count.tolist(), lengths.tolist(), alive.cpu())


def test_selecting_twice_gives_the_same_bits(kit):
    score = kit.to(SPECIAL[torch.randint(0, len(SPECIAL), (4, 3000), generator=torch.Generator().manual_seed(3))])
    count, lengths = kit.to(torch.tensor([700, 3000, 1, 1500]).int()), kit.to(torch.tensor([3000, 2999, 5, 3000]).int())
    first = ops.select_tokens(score, count, lengths, backend=kit.backend)
    for _ in range(100 if ON_GPU else 1):
        again = ops.select_tokens(score, count, lengths, backend=kit.backend)
        assert all(tools.same_bits(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("by_sequence", [False, True], ids=["shared", "each"])
@pytest.mark.parametrize("heads", [1, 7, 32, 64] if ON_GPU else [1, 7])
def test_predict_rate(kit, heads, by_sequence):
    g = torch.Generator().manual_seed(heads)
    linear = tools.predictor(heads, classes=11)
    mass = torch.rand(6, heads, 4, generator=g)
    mass[3] = 0.0
    mass[4] = float("nan")
    if by_sequence:
        linear["bias"] = torch.randn(6, 11, generator=g)
        linear["bias"][3] = torch.tensor([0.0, 2.0, float("nan"), 2.0, *[-1.0] * 7])
    rate, index = ops.predict_rate(kit.to(mass), **kit.to(linear), backend=kit.backend)
    want = spec.predict(mass, linear["weight"], linear["bias"])
    assert index.tolist() == want and index.dtype == torch.int64
    assert rate.tolist() == linear["rates"][want].tolist() and rate.dtype == torch.float64


# ---- rows that move ---------------------------------------------------------------------------------------------------------------


def layer(batch, heads, capacity, dim, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(batch, heads, capacity, dim, generator=g).to(dtype)
    return torch.randint(0, 100, (batch, heads, capacity, dim), generator=g).to(dtype)


LENGTHS = ([40, 17, 0, 40], [40, 17, 0, 3]) if not ON_GPU else ([2880, 1001, 0, 2880], [2880, 17, 0, 3])


@pytest.mark.parametrize("share", [0.0, 0.125, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_compact_of_many_layers(kit, lengths, share):
    """Keys and values of several layers and the rows' tokens, in one call; nothing past the live rows changes."""
    capacity = max(lengths) + 3
    counts = [int(n * share) for n in lengths]
    kept, n_kept = spec.lists(lengths, counts, max(*counts, 1) + 2)
    on_cpu = [
        layer(4, 2, capacity, 64, HALF, 1),
        layer(4, 2, capacity, 64, HALF, 2),
        layer(4, 1, capacity, 80, torch.float32, 3),
        layer(4, 3, capacity, 5, torch.float16, 4),
        layer(4, 1, capacity, 7, torch.uint8, 5),
        torch.arange(4 * capacity, dtype=torch.int32).view(4, capacity),
        torch.arange(4 * capacity, dtype=torch.int64).view(4, capacity).flip(1),
    ]
    views, buffers = [], []
    for tensor in on_cpu:
        if tensor.dim() == 4:
            view, buffer = tools.guarded(kit.to(tensor))
        else:
            buffer = kit.to(torch.cat([tensor, torch.full((4, 2), 77, dtype=tensor.dtype)], 1))
            view = buffer[:, :capacity]
        views.append(view)
        buffers.append(buffer)
    ops.compact_(views, *kit.to((kept, n_kept, torch.tensor(lengths).int())), backend=kit.backend)
    for old, buffer in zip(on_cpu, buffers, strict=True):
        after = buffer.cpu()
        rows, rest = (after[:, :, :capacity], after[:, :, capacity:]) if old.dim() == 4 else (after[:, :capacity], after[:, capacity:])
        assert (rest == 77).all()
        for b, count in enumerate(counts):
            want = spec.compact(old[b], kept[b, :count].tolist())
            assert tools.same_bits(rows[b].contiguous(), want.contiguous()), (b, old.dtype)


def test_compact_of_strided_rows(kit):
    """Layers whose rows lie in another order in memory."""
    kept, n_kept = spec.lists([30, 12], [9, 5], 10)
    old = torch.randn(2, 30, 3, 16)
    on_device = kit.to(old)
    ops.compact_([on_device.transpose(1, 2)], *kit.to((kept, n_kept, torch.tensor([30, 12]).int())), backend=kit.backend)
    for b, count in enumerate((9, 5)):
        assert torch.equal(on_device[b].transpose(0, 1).cpu(), spec.compact(old[b].transpose(0, 1), kept[b, :count].tolist()))


def test_compact_of_nothing(kit):
    zero, rows = torch.zeros(2, dtype=torch.int32), torch.randn(2, 2, 6, 16)
    on_device = kit.to(rows)
    for lengths in (zero, zero + 6):
        ops.compact_([on_device], *kit.to((torch.zeros(2, 0, dtype=torch.int32), zero, lengths)), backend=kit.backend)
        ops.compact_([], *kit.to((torch.zeros(2, 0, dtype=torch.int32), zero, lengths)), backend=kit.backend)
    everything = torch.arange(6).int().expand(2, 6).contiguous()
    ops.compact_([on_device], *kit.to((everything, zero + 6, zero + 6)), backend=kit.backend)
    assert torch.equal(on_device.cpu(), rows)


@pytest.mark.parametrize("batch", [1, 2, 5, 33, 256] if ON_GPU else [1, 5])
def test_reorder(kit, batch):
    g = torch.Generator().manual_seed(batch)
    old = [
        torch.randn(batch, 2, 70, 64, generator=g).to(HALF),
        torch.randn(batch, 3, 5, 7, generator=g),
        torch.randint(0, 99, (batch, 33), generator=g),
        torch.randint(0, 99, (batch,), generator=g).int(),
        torch.randn(batch, 5, 3, 4, generator=g).transpose(1, 2),
        torch.randint(0, 255, (batch, 13), generator=g).to(torch.uint8),
    ]
    for index in (
        torch.randint(0, batch, (batch,), generator=g),
        torch.arange(batch),
        torch.arange(batch).flip(0),
        torch.zeros(batch).long(),
    ):
        now = [kit.to(tensor) for tensor in old]
        ops.reorder_(now, kit.to(index), backend=kit.backend)
        for tensor, before in zip(now, old, strict=True):
            assert torch.equal(tensor.cpu(), before[index])


@pytest.mark.parametrize("heads", [2, 7])
def test_reorder_leaves_what_lies_around(kit, heads):
    buffer = kit.to(torch.arange(6 * heads * 20.0).view(6, heads, 20))
    before = buffer.clone()
    index = torch.tensor([2, 0, 0, 1])
    ops.reorder_([buffer[1:5]], kit.to(index), backend=kit.backend)
    assert torch.equal(buffer[1:5], before[1:5][index.to(kit.device)])
    assert torch.equal(buffer[[0, 5]], before[[0, 5]])
