"""select_tokens and predict_rate against loops on the CPU; compact_ and reorder_ are in tests/ops/test_rows.py."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from tests.gpu import kit as tools
from tests.gpu.kit import ON_GPU
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
