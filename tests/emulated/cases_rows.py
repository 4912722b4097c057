"""compact_ and reorder_ in CUDA C++, emulated, against the loops of tests/ops/spec.py."""

from __future__ import annotations

import pytest
import torch

from tests.emulated import harness
from tests.ops import spec

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float64, torch.int16)


def tensors(batch, capacity, dtypes=DTYPES, dims=(5, 16, 1)):
    """Tensors of every word size a kernel moves; the last ones are ``[B, C]``."""
    g = torch.Generator().manual_seed(capacity)
    made = [torch.randint(0, 100, (batch, 3, capacity, dim), generator=g).to(dtype) for dtype in dtypes for dim in dims]
    made += [torch.randint(0, 100, (batch, capacity), generator=g).to(dtype) for dtype in dtypes]
    return made


def want_of(rows, kept, counts):
    return [torch.stack([spec.compact(t[b], kept[b, : counts[b]].tolist()) for b in range(len(counts))]) for t in rows]


def check_compact(rows, lengths, counts, seed=0, width=None):
    kept, n_kept = spec.lists(lengths, counts, max(counts) if width is None else width, seed=seed)
    want = want_of(rows, kept, counts)
    harness.run("compact_", rows, kept, n_kept, torch.tensor(lengths, dtype=torch.int32))
    for got, expected in zip(rows, want, strict=True):
        assert harness.same(got, expected), (got.dtype, list(got.shape), lengths, counts)


@pytest.mark.parametrize("capacity", harness.some([130, 1, 2, 7, 33, 600]))
def test_compact(capacity):
    g = torch.Generator().manual_seed(0)
    for trial in range(4):
        lengths = [capacity, *torch.randint(0, capacity + 1, (2,), generator=g).tolist()]
        counts = [int(torch.randint(0, n + 1, (1,), generator=g)) for n in lengths]
        if trial == 1:
            counts = [0, lengths[1], min(1, lengths[2])]
        if trial == 2:
            counts = [lengths[0] // 2, lengths[1] // 2, max(lengths[2] - 1, 0)]
        dtypes = DTYPES if trial == 0 else (torch.float32, torch.uint8)
        check_compact(tensors(3, capacity, dtypes), lengths, counts, trial)


def test_compact_wide_rows():
    """Rows of more words than a warp has lanes, of many heads."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 257, torch.uint8), (5, 128, torch.float32), (33, 24, torch.float16), (40, 1, torch.uint8), (3, 300, torch.float16)]
    for heads, dim, dtype in shapes:
        rows = [torch.randint(0, 100, (2, heads, 40, dim), generator=g).to(dtype)]
        check_compact(rows, [40, 33], [17, 9])


@pytest.mark.parametrize("count", harness.some([85, 81, 80, 79]))
def test_compact_many_tensors(count):
    """More tensors than the table of one launch holds."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 2, 20, 4, generator=g) for _ in range(count)]
    check_compact(rows, [20, 15], [7, 15])


def test_compact_in_several_rounds():
    """So many sequences that one block makes all moves of one of them."""
    batch, count = (1024, 8) if harness.PLAIN else (8, 2)
    rows = [torch.arange(400).repeat(batch, 1).to(torch.int16) for _ in range(count)]
    lengths, counts = [0] * batch, [0] * batch
    lengths[7], counts[7] = 400, 200
    kept = torch.zeros(batch, 200, dtype=torch.int32)
    kept[7] = torch.cat([torch.arange(0, 40, 2), torch.arange(220, 400)])
    want = rows[0].clone()
    want[7] = spec.compact(want[7], kept[7].tolist())
    harness.run("compact_", rows, kept, *(torch.tensor(n, dtype=torch.int32) for n in (counts, lengths)))
    assert all(torch.equal(got, want) for got in rows)


@pytest.mark.parametrize("shift", [0, 1])
def test_compact_views(shift):
    """Text rows behind the visual ones stay; slices of a wider buffer, a transposed one and one of odd addresses take part."""
    buffer = torch.arange(2 * 2 * 20 * 8).float().reshape(2, 2, 20, 8)
    apart = torch.arange(2 * 3 * 8 * 12).float().reshape(2, 3, 8, 12).transpose(2, 3)  # a row's elements lie apart
    swapped = torch.arange(2 * 12 * 3 * 8).float().reshape(2, 12, 3, 8).transpose(1, 2)  # rows before heads
    flat = torch.arange(2 * 24).int().reshape(2, 24)[:, ::2]
    guarded, memory = harness.guarded(torch.arange(2 * 2 * 12 * 8).half().reshape(2, 2, 12, 8), shift)
    kept, n_kept = spec.lists([12, 9], [5, 3], 6)
    before = buffer.clone()
    view = buffer[:, :, :12, :6]
    rows = [view, apart, swapped, flat, guarded]
    want = want_of(rows, kept, n_kept.tolist())
    harness.run("compact_", rows, kept, n_kept, torch.tensor([12, 9], dtype=torch.int32))
    for got, expected in zip(rows, want, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(buffer[:, :, 12:], before[:, :, 12:]) and torch.equal(buffer[..., 6:], before[..., 6:])
    memory.check()


def test_compact_moves_what_it_must_and_nothing_else():
    rows = torch.arange(40.0).reshape(1, 1, 10, 4)
    kept = torch.tensor([[1, 4, 9]], dtype=torch.int32)
    harness.run("compact_", [rows], kept, torch.tensor([3], dtype=torch.int32), torch.tensor([10], dtype=torch.int32))
    assert rows[0, 0, :3, 0].tolist() == [16.0, 4.0, 36.0]
    assert rows[0, 0, 3:, 0].tolist() == [12.0, 16.0, 20.0, 24.0, 28.0, 32.0, 36.0]


def test_compact_strided_list():
    rows = [torch.randn(2, 2, 20, 4, generator=torch.Generator().manual_seed(0))]
    kept, n_kept = spec.lists([20, 15], [7, 5], 9)
    want = want_of(rows, kept, [7, 5])
    wide = torch.cat([kept, kept], 1)[:, :9]
    harness.run("compact_", rows, wide, torch.stack([n_kept, n_kept + 3], 1)[:, 0], torch.tensor([20, 15], dtype=torch.int32))
    assert torch.equal(rows[0], want[0])


def check_reorder(rows, index):
    want = [t[index].clone() for t in rows]
    harness.run("reorder_", rows, torch.tensor(index))
    for got, expected in zip(rows, want, strict=True):
        assert harness.same(got, expected), (got.dtype, list(got.shape), index)


ORDERS = [[2, 2, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 3, 0], [2, 2, 2, 2], [0, 0, 3, 1], [0, 0, 2, 3]]


@pytest.mark.parametrize("index", harness.some(ORDERS))
def test_reorder(index):
    g = torch.Generator().manual_seed(0)
    rows = [*tensors(4, 9), torch.randn(4, 2700, generator=g), torch.arange(4), torch.randn(4, 6, 5, generator=g).transpose(1, 2)]
    check_reorder(rows, index)


@pytest.mark.parametrize("batch", harness.some([300, 1, 2, 3, 17, 2048, 2049]))
def test_reorder_batches(batch):
    """Up to more sequences than a tile of shared memory holds."""
    g = torch.Generator().manual_seed(batch)
    rows = [torch.randint(0, 100, (batch, width), generator=g).to(dtype) for width in (1, 7, 40) for dtype in (torch.uint8, torch.float32)]
    check_reorder(rows, torch.randint(0, batch, (batch,), generator=g).tolist())


def test_reorder_guarded_and_many():
    index = [1, 0, 1]
    pairs = [harness.guarded(torch.randint(0, 100, (3, width)).to(dtype), 1) for width in (3, 16, 70) for dtype in DTYPES]
    check_reorder([tensor for tensor, _ in pairs], index)
    for _, memory in pairs:
        memory.check()
    check_reorder([torch.randn(3, 4) for _ in range(83)], index)


def test_nothing_to_do():
    empty = torch.zeros(2, 0, dtype=torch.int32)
    count = torch.zeros(2, dtype=torch.int32)
    harness.run("compact_", [], empty, count, count)
    harness.run("compact_", [torch.zeros(2, 1, 0, 4)], empty, count, count)
    harness.run("reorder_", [], torch.tensor([0, 1]))
    harness.run("reorder_", [torch.zeros(2, 0)], torch.tensor([1, 0]))
    kept, n_kept = harness.run("select_tokens", torch.zeros(2, 0), count, count)
    assert kept.shape == (2, 0) and n_kept.tolist() == [0, 0]
