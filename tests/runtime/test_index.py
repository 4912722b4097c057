"""Operations on tables of indices, against loops over lists."""

from __future__ import annotations

import torch

from dyrate_kernels.generation import index

LISTS = torch.tensor([[3, 0, -1, -1], [-1, 1, 4, 2], [-1, -1, -1, -1]])


def test_a_list_is_marked_whatever_its_order_and_gaps():
    assert index.marked(LISTS, 5).int().tolist() == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 1], [0] * 5]
    assert index.marked(LISTS[2:], 0).shape == (1, 0)


def test_values_are_scattered_and_those_below_zero_dropped():
    value = torch.arange(12).view(3, 4)
    assert index.scattered(LISTS, value, 5, fill=9).tolist() == [[1, 9, 9, 0, 9], [9, 5, 7, 9, 6], [9] * 5]
    deep = index.scattered(LISTS, value[..., None].repeat(1, 1, 2), 5)
    assert deep.shape == (3, 5, 2) and deep[1, 4].tolist() == [6, 6] and not deep[2].any()


def test_scattering_in_place_changes_nothing_else():
    table = torch.full((3, 5), 7)
    address = table.data_ptr()
    index.scatter_(table, LISTS, torch.arange(12).view(3, 4))
    assert table.data_ptr() == address and table.tolist() == [[1, 7, 7, 0, 7], [7, 5, 7, 7, 6], [7] * 5]
    index.scatter_(table[:, :0], LISTS.clamp(max=-1), LISTS)


def test_marked_columns_are_right_aligned_with_filler_before_them():
    stays = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0], [0] * 5]).bool()
    source, filled = index.right_aligned(stays, 3)
    assert source.tolist() == [[0, 2, 4], [0, 0, 3], [0, 0, 0]]
    assert filled.int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_numbers_count_what_is_marked():
    assert index.numbered(torch.tensor([[True, False, True], [False, True, False]])).tolist() == [[0, -1, 1], [-1, 0, -1]]


def test_picking_stays_in_place_where_the_batch_keeps_its_size():
    tensor = torch.arange(3)
    assert index.picked(tensor, torch.tensor([2, 2, 0])) is tensor and tensor.tolist() == [2, 2, 0]
    assert index.picked(tensor, torch.tensor([2])) is not tensor


def test_resizing_copies_what_fits():
    assert index.resized(torch.ones(1, 2), 3, fill=5.0).tolist() == [[1, 1, 5]] and index.resized(torch.ones(1, 2), 1).tolist() == [[1]]
