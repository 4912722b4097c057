"""compact_ and reorder_ of every backend against the loops of ``spec``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_kernels import ops
from tests.guarded import guarded
from tests.ops import spec
from tests.ops.backends import DETECTOR, INTERPRETED, some
from tests.ops.compare import same

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float64, torch.int16)
FEW = (torch.float32, torch.float16, torch.uint8)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def tensors(batch, capacity, dtypes=DTYPES, dims=(5, 16, 1)):
    """Tensors of every word size a kernel moves; the last ones are ``[B, C]``."""
    g = torch.Generator().manual_seed(capacity)
    made = [torch.randint(0, 100, (batch, 3, capacity, dim), generator=g).to(dtype) for dtype in dtypes for dim in dims]
    if not INTERPRETED:
        made += [torch.randint(0, 100, (batch, capacity), generator=g).to(dtype) for dtype in dtypes]
    return [*made, torch.randint(0, 10**12, (batch, capacity), generator=g)]


def compacted(rows, kept, counts):
    return [torch.stack([spec.compact(t[b], kept[b, : counts[b]].tolist()) for b in range(len(counts))]) for t in rows]


def check_compact(backend, rows, lengths, counts, seed=0, width=None):
    kept, n_kept = spec.lists(lengths, counts, max(counts) if width is None else width, seed=seed)
    want = compacted(rows, kept, counts)
    backend.run("compact_", rows, kept, n_kept, int32(lengths))
    for got, expected in zip(rows, want, strict=True):
        assert same(got, expected), (got.dtype, list(got.shape), lengths, counts)


@pytest.mark.parametrize("capacity", some([130, 1, 2, 7, 33, 600], interpreter=5))
def test_compact_keeps_the_listed_rows(backend, capacity):
    g = torch.Generator().manual_seed(0)
    for trial in range(3 if INTERPRETED else 4):
        lengths = [capacity, *torch.randint(0, capacity + 1, (2,), generator=g).tolist()]
        counts = [int(torch.randint(0, n + 1, (1,), generator=g)) for n in lengths]
        if trial == 1:
            counts = [0, lengths[1], min(1, lengths[2])]
        if trial == 2:
            counts = [lengths[0] // 2, lengths[1] // 2, max(lengths[2] - 1, 0)]
        dtypes = ((torch.float16,) if INTERPRETED else (torch.float32, torch.uint8)) if trial else FEW if INTERPRETED else DTYPES
        check_compact(backend, tensors(3, capacity, dtypes, (5, 16) if INTERPRETED else (5, 16, 1)), lengths, counts, trial)


@pytest.mark.backends("reference")
def test_compact_of_random_lists(backend):
    g = torch.Generator().manual_seed(5)
    for trial in range(60):
        n = 40 + trial
        counts = torch.randint(0, n + 1, (3,), generator=g).tolist()
        check_compact(backend, [torch.randn(3, 2, n + 2, 3, generator=g)], [n] * 3, counts, trial)


@st.composite
def compactions(draw):
    capacity, batch = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    lengths = [draw(st.integers(0, capacity)) for _ in range(batch)]
    kept = [sorted(draw(st.sets(st.integers(0, n - 1)))) if n else [] for n in lengths]
    return capacity, lengths, kept, draw(st.integers(max(map(len, kept)), capacity + 2))


@settings(deadline=None, max_examples=150)
@given(compactions())
def test_compact_of_lists_of_any_width(case):
    """In the reference alone: the others have the random calls of tests/differential."""
    capacity, lengths, kept, width = case
    batch = len(lengths)
    table = torch.full((batch, width), -1, dtype=torch.int32)
    for b, row in enumerate(kept):
        table[b, : len(row)] = torch.tensor(row, dtype=torch.int32)
    g = torch.Generator().manual_seed(1)
    rows = [
        torch.randn(batch, 2, capacity + 3, 4, generator=g),
        torch.randint(0, 99, (batch, capacity), generator=g),
        torch.randn(batch, 1, capacity, 3, generator=g).to(torch.bfloat16),
        torch.randn(batch, capacity, 3, 2, generator=g, dtype=torch.float64).transpose(1, 2),  # strided: [B, H, C, D]
    ]
    rows[0][:, :, capacity:] = float("nan")  # never touched
    want = compacted(rows, table, [len(row) for row in kept])
    ops.compact_(rows, table, int32([len(row) for row in kept]), int32(lengths))
    for got, expected in zip(rows, want, strict=True):
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


SHAPES = [(2, 257, torch.uint8), (5, 128, torch.float32), (33, 24, torch.float16), (40, 1, torch.uint8), (3, 300, torch.float16)]


def test_compact_rows_of_more_words_than_a_warp_has_lanes(backend):
    """Also of many heads."""
    g = torch.Generator().manual_seed(0)
    for heads, dim, dtype in SHAPES:
        check_compact(backend, [torch.randint(0, 100, (2, heads, 40, dim), generator=g).to(dtype)], [40, 33], [17, 9])


@pytest.mark.backends("reference", "emulated", "cuda", "triton")
@pytest.mark.parametrize("count", some([85, 81, 80, 79], interpreter=1))
def test_compact_many_tensors(backend, count):
    """More tensors than the table of one CUDA launch holds."""
    g = torch.Generator().manual_seed(0)
    check_compact(backend, [torch.randn(2, 2, 20, 4, generator=g) for _ in range(count)], [20, 15], [7, 15])


@pytest.mark.backends("emulated", "cuda", "triton")
def test_compact_by_one_block_in_several_rounds(backend):
    """So many sequences that one block makes all moves of one of them."""
    batch, count = (8, 2) if DETECTOR or INTERPRETED else (1024, 8)
    rows = [torch.arange(400).repeat(batch, 1).to(torch.int16) for _ in range(count)]
    lengths, counts = [0] * batch, [0] * batch
    lengths[7], counts[7] = 400, 200
    kept = torch.zeros(batch, 200, dtype=torch.int32)
    kept[7] = torch.cat([torch.arange(0, 40, 2), torch.arange(220, 400)])
    want = rows[0].clone()
    want[7] = spec.compact(want[7], kept[7].tolist())
    backend.run("compact_", rows, kept, int32(counts), int32(lengths))
    assert all(torch.equal(got, want) for got in rows)


@pytest.mark.backends("interpreter", "triton")
@pytest.mark.parametrize("programs", [8192, 1])
def test_compact_more_moves_than_a_program_makes_at_once(backend, programs, monkeypatch):
    """By several programs, and by one in several rounds."""
    from dyrate_kernels.triton_kernels import backend as triton

    monkeypatch.setattr(triton, "MOVERS", programs)
    rows = tensors(1, 400, (torch.float32,), (5, 16))
    kept = torch.cat([torch.arange(0, 40, 2), torch.arange(220, 400)]).int()[None]
    want = compacted(rows, kept, [200])
    backend.run("compact_", rows, kept, int32([200]), int32([400]))
    for got, expected in zip(rows, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shift", [0, 1])
def test_compact_views_and_nothing_around_them(backend, shift):
    """Text rows behind the visual ones stay; slices of a larger buffer, a transposed one and one of odd addresses take part."""
    buffer = torch.arange(2 * 2 * 20 * 8).float().reshape(2, 2, 20, 8)
    apart = torch.arange(2 * 3 * 8 * 12).float().reshape(2, 3, 8, 12).transpose(2, 3)  # a row's elements lie apart
    swapped = torch.arange(2 * 12 * 3 * 8).float().reshape(2, 12, 3, 8).transpose(1, 2)  # rows before heads
    flat = torch.arange(2 * 24).int().reshape(2, 24)[:, ::2]
    odd, memory = guarded(torch.arange(2 * 2 * 12 * 8).half().reshape(2, 2, 12, 8), shift)
    before = buffer.clone()
    view = buffer[:, :, :12, :6]
    check_compact(backend, [view, apart, swapped, flat, odd], [12, 9], [5, 3], width=6)
    assert torch.equal(buffer[:, :, 12:], before[:, :, 12:]) and torch.equal(buffer[..., 6:], before[..., 6:])
    memory.check()


@pytest.mark.parametrize("strides", [(121, 40, 4, 1), (124, 41, 4, 1), (160, 50, 5, 1)], ids=["sequences", "heads", "rows"])
def test_compact_where_words_begin_at_odd_addresses(backend, strides):
    """Rows of 8 bytes are moved by 2 where what comes next, of one dimension alone, begins at an odd multiple of 2."""
    rows = torch.arange(320, dtype=torch.int16).as_strided((2, 3, 10, 4), strides)
    check_compact(backend, [rows], [10, 8], [5, 3], width=6)


def test_compact_moves_what_it_must_and_nothing_else(backend):
    rows = torch.arange(40.0).reshape(1, 1, 10, 4)
    backend.run("compact_", [rows], int32([[1, 4, 9]]), int32([3]), int32([10]))
    assert rows[0, 0, :3, 0].tolist() == [16.0, 4.0, 36.0]
    assert rows[0, 0, 3:, 0].tolist() == [12.0, 16.0, 20.0, 24.0, 28.0, 32.0, 36.0]


def test_compact_by_a_strided_list(backend):
    rows = [torch.randn(2, 2, 20, 4, generator=torch.Generator().manual_seed(0))]
    kept, n_kept = spec.lists([20, 15], [7, 5], 9)
    want = compacted(rows, kept, [7, 5])
    twice = torch.cat([kept, kept], 1)[:, :9]
    backend.run("compact_", rows, twice, torch.stack([n_kept, n_kept + 3], 1)[:, 0], int32([20, 15]))
    assert torch.equal(rows[0], want[0])


@pytest.mark.parametrize("share", some([0.25, 0.0, 0.125, 0.5, 0.9, 1.0], interpreter=1))
@pytest.mark.parametrize("whole", [True, False], ids=["full", "nearly empty"])
def test_compact_of_many_layers(backend, whole, share):
    """Keys and values of several layers and the rows' tokens, in one call; nothing past the live rows changes."""
    n, middle = (2880, 1001) if backend.on_gpu else (40, 17)
    lengths = [n, middle, 0, n] if whole else [n, 17, 0, 3]
    capacity = n + 3
    counts = [int(n * share) for n in lengths]
    g = torch.Generator().manual_seed(1)
    shapes = [(2, 64, torch.bfloat16), (2, 64, torch.float16), (1, 80, torch.float32), (3, 5, torch.float16), (1, 7, torch.uint8)]
    buffers = []
    for heads, dim, dtype in shapes:
        buffers.append(torch.full((4, heads, capacity + 3, dim), 77).to(dtype))
        buffers[-1][:, :, :capacity] = (torch.randn(4, heads, capacity, dim, generator=g) * 10).abs().to(dtype)
    for dtype in (torch.int32, torch.int64):
        buffers.append(torch.full((4, capacity + 3), 77, dtype=dtype))
        buffers[-1][:, :capacity] = torch.arange(4 * capacity).view(4, capacity).flip(1)
    views = [buffer[:, :, :capacity] if buffer.dim() == 4 else buffer[:, :capacity] for buffer in buffers]
    check_compact(backend, views, lengths, counts, width=max(*counts, 1) + 2)
    for buffer in buffers:
        assert ((buffer[:, :, capacity:] if buffer.dim() == 4 else buffer[:, capacity:]) == 77).all()


def test_compact_of_rows_in_another_order_in_memory(backend):
    check_compact(backend, [torch.randn(2, 30, 3, 16).transpose(1, 2)], [30, 12], [9, 5], width=10)


def test_compact_of_nothing(backend):
    empty, zero, rows = torch.zeros(2, 0, dtype=torch.int32), int32([0, 0]), torch.randn(2, 2, 6, 16)
    before = rows.clone()
    for lengths in (zero, zero + 6):
        backend.run("compact_", [], empty, zero, lengths)
        backend.run("compact_", [rows], empty, zero, lengths)
    backend.run("compact_", [torch.zeros(2, 1, 0, 4)], empty, zero, zero)
    backend.run("compact_", [rows], torch.arange(6).int().expand(2, 6).contiguous(), zero + 6, zero + 6)
    assert torch.equal(rows, before)


# ---- reordering -------------------------------------------------------------------------------------------------------------------


def check_reorder(backend, rows, index):
    want = [tensor[index].clone() for tensor in rows]
    addresses = [tensor.data_ptr() for tensor in rows]
    backend.run("reorder_", rows, torch.tensor(index))
    assert addresses == [tensor.data_ptr() for tensor in rows]
    for got, expected in zip(rows, want, strict=True):
        assert same(got, expected), (got.dtype, list(got.shape), index)


INDICES = [[2, 2, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0], [1, 2, 3, 0], [2, 2, 2, 2], [0, 0, 3, 1], [0, 0, 2, 3]]
INDICES += [[2, 0, 1], [1, 1, 1], [0, 1, 2]]


@pytest.mark.parametrize("index", some(INDICES))
def test_reorder(backend, index):
    g = torch.Generator().manual_seed(0)
    batch = len(index)
    rows = tensors(batch, 9, *((FEW, (5, 16)) if INTERPRETED else ()))
    rows += [torch.randn(batch, 700 if INTERPRETED else 2700, generator=g), torch.arange(batch)]
    check_reorder(backend, [*rows, torch.randn(batch, 6, 5, generator=g).transpose(1, 2)], index)


@pytest.mark.parametrize("batch", some([300, 1, 2, 3, 5, 17, 33, 256, 2048, 2049], interpreter=4))
def test_reorder_batches(backend, batch):
    """Up to more sequences than a tile of shared memory holds."""
    g = torch.Generator().manual_seed(batch)
    for index in (torch.randint(0, batch, (batch,), generator=g), torch.arange(batch).flip(0), torch.zeros(batch).long()):
        rows = [torch.randint(0, 100, (batch, n), generator=g).to(dtype) for n in (1, 7, 40) for dtype in (torch.uint8, torch.float32)]
        check_reorder(backend, rows, index.tolist())
        if DETECTOR or INTERPRETED or batch > 300:
            break


@pytest.mark.backends("reference", "triton", "cuda")
@pytest.mark.parametrize("batch", some([5, 1, 2, 33, 256], interpreter=2))
def test_reorder_rows_of_a_cache(backend, batch):
    g = torch.Generator().manual_seed(batch)
    straight = torch.arange(batch)
    for index in (torch.randint(0, batch, (batch,), generator=g), straight, straight.flip(0), straight * 0):
        rows = [
            torch.randn(batch, 2, 70, 64, generator=g).to(torch.bfloat16),
            torch.randn(batch, 3, 5, 7, generator=g),
            torch.randint(0, 99, (batch, 33), generator=g),
            torch.randint(0, 99, (batch,), generator=g).int(),
            torch.randn(batch, 5, 3, 4, generator=g).transpose(1, 2),
            torch.randint(0, 255, (batch, 13), generator=g).to(torch.uint8),
        ]
        check_reorder(backend, rows, index.tolist())


def test_reorder_tensors_at_odd_addresses_and_many_of_them(backend):
    index = [1, 0, 1]
    dtypes = FEW if INTERPRETED else DTYPES
    pairs = [guarded(torch.randint(0, 100, (3, width)).to(dtype), 1) for width in (3, 16, 70) for dtype in dtypes]
    check_reorder(backend, [tensor for tensor, _ in pairs], index)
    for _, memory in pairs:
        memory.check()
    check_reorder(backend, [torch.randn(3, 4) for _ in range(83)], index)


@pytest.mark.parametrize("heads", [2, 7])
def test_reorder_leaves_what_lies_around(backend, heads):
    buffer = torch.arange(6 * heads * 20.0).view(6, heads, 20)
    before = buffer.clone()
    check_reorder(backend, [buffer[1:5]], [2, 0, 0, 1])
    assert torch.equal(buffer[[0, 5]], before[[0, 5]])


def test_reorder_of_nothing(backend):
    backend.run("reorder_", [], torch.tensor([0, 1]))
    backend.run("reorder_", [torch.zeros(2, 0)], torch.tensor([1, 0]))


# ---- what is the same whatever the backend ----------------------------------------------------------------------------------------


def test_compact_waits_for_no_device(no_host_sync):
    rows = [torch.randn(3, 2, 50, 4), torch.zeros(3, 40, dtype=torch.int64)]
    kept, n_kept = spec.lists([40] * 3, [9] * 3, 40)
    with no_host_sync():
        ops.compact_(rows, kept, n_kept, torch.full((3,), 40, dtype=torch.int32))


def test_compact_names_what_is_wrong():
    n, rows, kept = int32([3, 3]), torch.rand(2, 1, 5, 2), torch.zeros(2, 2, dtype=torch.int32)
    for name, error, call in (
        ("rows", TypeError, lambda: ops.compact_(rows, kept, n, n)),
        (r"rows\[0\]", ValueError, lambda: ops.compact_([rows[0]], kept, n, n)),
        (r"rows\[1\]", TypeError, lambda: ops.compact_([rows, None], kept, n, n)),
        ("kept", TypeError, lambda: ops.compact_([rows], kept.long(), n, n)),
    ):
        with pytest.raises(error, match=name):
            call()


def test_reorder_names_what_is_wrong():
    index = torch.tensor([0, 1])
    for rows, wrong, error, message in (
        (torch.zeros(2, 3), index, TypeError, "rows: expected a list"),
        ([torch.zeros(3, 3)], index, ValueError, r"rows\[0\]: expected shape \[2, ...\]"),
        ([torch.zeros(2, 3)], index.int(), TypeError, "index: expected int64"),
        ([None], index, TypeError, r"rows\[0\]: expected a tensor"),
    ):
        with pytest.raises(error, match=message):
            ops.reorder_(rows, wrong)
