"""compact_ and reorder_ in Triton against the loops of tests/ops/spec.py."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.triton_kernels import backend
from tests.interpreter import harness
from tests.ops import spec


def tensors(batch, capacity, dtypes=(torch.float32, torch.float16, torch.uint8)):
    g = torch.Generator().manual_seed(capacity)
    made = [torch.randint(0, 100, (batch, 3, capacity, dim), generator=g).to(dtype) for dtype in dtypes for dim in (5, 16)]
    return [*made, torch.randint(0, 10**12, (batch, capacity), generator=g)]


@pytest.mark.parametrize("capacity", [1, 2, 7, 33, 130])
def test_compact(capacity):
    g = torch.Generator().manual_seed(0)
    for trial in range(3):
        lengths = [capacity, *torch.randint(0, capacity + 1, (2,), generator=g).tolist()]
        counts = [int(torch.randint(0, n + 1, (1,), generator=g)) for n in lengths]
        if trial == 1:
            counts = [0, lengths[1], min(1, lengths[2])]
        kept, n_kept = spec.lists(lengths, counts, max(counts), seed=trial)
        rows = tensors(3, capacity)
        want = [torch.stack([spec.compact(t[b], kept[b, : counts[b]].tolist()) for b in range(3)]) for t in rows]
        with harness.settings():
            ops.compact_(rows, kept, n_kept, torch.tensor(lengths, dtype=torch.int32), backend="triton")
        for got, expected in zip(rows, want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("programs", [8192, 1])
def test_compact_more_moves_than_a_program_makes_at_once(programs, monkeypatch):
    """By several programs, and by one in several rounds."""
    monkeypatch.setattr(backend, "MOVERS", programs)
    rows = tensors(1, 400, (torch.float32,))
    kept = torch.cat([torch.arange(0, 40, 2), torch.arange(220, 400)]).int()[None]
    want = [spec.compact(t[0], kept[0].tolist()) for t in rows]
    with harness.settings():
        ops.compact_(rows, kept, *(torch.tensor([n], dtype=torch.int32) for n in (200, 400)), backend="triton")
    for got, expected in zip(rows, want, strict=True):
        assert torch.equal(got[0], expected)


def test_compact_views():
    """Text rows behind the visual ones stay; slices of a wider buffer and a transposed one take part."""
    buffer = torch.arange(2 * 2 * 20 * 8).float().reshape(2, 2, 20, 8)
    apart = torch.arange(2 * 3 * 8 * 12).float().reshape(2, 3, 8, 12).transpose(2, 3)  # a row's elements lie apart
    kept, n_kept = spec.lists([12, 9], [5, 3], 6)
    before = buffer.clone()
    view = buffer[:, :, :12, :6]
    want = [torch.stack([spec.compact(t[b], kept[b, : n_kept[b]].tolist()) for b in range(2)]) for t in (view, apart)]
    with harness.settings():
        ops.compact_([view, apart], kept, n_kept, torch.tensor([12, 9], dtype=torch.int32), backend="triton")
    assert torch.equal(view, want[0]) and torch.equal(apart, want[1])
    assert torch.equal(buffer[:, :, 12:], before[:, :, 12:]) and torch.equal(buffer[..., 6:], before[..., 6:])


@pytest.mark.parametrize("strides", [(121, 40, 4, 1), (124, 41, 4, 1), (160, 50, 5, 1)], ids=["sequences", "heads", "rows"])
def test_compact_where_words_begin_at_odd_addresses(strides):
    """Rows of 8 bytes are moved by 2 where what comes next, of one dimension alone, begins at an odd multiple of 2."""
    rows = torch.arange(320, dtype=torch.int16).as_strided((2, 3, 10, 4), strides)
    kept, n_kept = spec.lists([10, 8], [5, 3], 6)
    want = torch.stack([spec.compact(rows[b], kept[b, : n_kept[b]].tolist()) for b in range(2)])
    with harness.settings():
        ops.compact_([rows], kept, n_kept, torch.tensor([10, 8], dtype=torch.int32), backend="triton")
    assert torch.equal(rows, want)


def test_compact_reads_only_what_moves():
    rows = torch.arange(40.0).reshape(1, 1, 10, 4)
    kept = torch.tensor([[1, 4, 9]], dtype=torch.int32)
    with harness.settings():
        ops.compact_([rows], kept, torch.tensor([3], dtype=torch.int32), torch.tensor([10], dtype=torch.int32), backend="triton")
    assert rows[0, 0, :3, 0].tolist() == [16.0, 4.0, 36.0]
    assert rows[0, 0, 3:, 0].tolist() == [12.0, 16.0, 20.0, 24.0, 28.0, 32.0, 36.0]


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 3, 0], [2, 2, 2, 2], [0, 0, 3, 1]])
def test_reorder(index):
    rows = [*tensors(4, 9), torch.randn(4, 700), torch.arange(4), torch.randn(4, 6, 5).transpose(1, 2)]
    want = [t[index].clone() for t in rows]
    with harness.settings():
        ops.reorder_(rows, torch.tensor(index), backend="triton")
    for got, expected in zip(rows, want, strict=True):
        assert torch.equal(got, expected)


def test_nothing_to_do():
    empty = torch.zeros(2, 0, dtype=torch.int32)
    count = torch.zeros(2, dtype=torch.int32)
    with harness.settings():
        ops.compact_([], empty, count, count, backend="triton")
        ops.compact_([torch.zeros(2, 1, 0, 4)], empty, count, count, backend="triton")
        ops.reorder_([], torch.tensor([0, 1]), backend="triton")
        kept, n_kept = ops.select_tokens(torch.zeros(2, 0), count, count, backend="triton")
    assert kept.shape == (2, 0) and n_kept.tolist() == [0, 0]
