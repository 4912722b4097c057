"""Passes are complete when made: which row each column goes to, of which type it is, and what a decode step leaves in the store."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.generation import cpu_step, passes
from dyrate_kernels.generation.attend import OperatorStep
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.layout import Blocks, KeyRows, look, restrict, visibility
from dyrate_kernels.generation.turn import Reduction, Turn
from dyrate_kernels.ops.reference import IMAGE, INSTRUCTION, RESPONSE, SYSTEM

CPU = torch.device("cpu")
# a padding column, text, two visual tokens, text; and: text, one visual token, three of text
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
VISUAL = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()


def begun(shared: bool = True, end: int = 5) -> tuple[RowStore, Turn, Reduction, Blocks]:
    store = RowStore(4, [2], shared_rows=shared, backend="reference")
    store.start(2, CPU)
    return store, Turn(0, 0, end, 12), Reduction(), Blocks()


def prompt(parts: tuple, prunes: bool = False, mask: torch.Tensor = MASK, visual: torch.Tensor = VISUAL) -> passes.MultiTokenPass:
    store, turn, reduction, blocks = parts
    new = look(store, store.length, visual.shape[1], turn.end, mask, visual, CPU, turn.frozen)
    turn.note(new, store, reduction)
    return passes.many(store, turn, reduction, blocks, new, None, prunes)


def test_columns_get_rows_and_types():
    parts = begun()
    passing, store = prompt(parts), parts[0]
    slots = passing.slots[0]
    capacity = store.full.capacity
    assert slots.token.tolist() == [[-1, -1, 0, 1, -1], [-1, 0, -1, -1, -1]]
    assert slots.row.tolist() == [[-1, capacity, 0, 1, capacity + 1], [capacity, 0, capacity + 1, capacity + 2, capacity + 3]]
    assert slots.type[0, 1:].tolist() == [SYSTEM, IMAGE, IMAGE, INSTRUCTION] and slots.type[1, 0] == SYSTEM
    assert store.full.n_visual.tolist() == [2, 1] and store.n_text.tolist() == [2, 4] and store.length == 0
    assert store.token_column[:, :2].tolist() == [[2, 3], [1, 0]]
    assert passing.ends_prompt and passing.reads_prompt and not passing.deferred and passing.drafted == 0
    assert passing.slots[1] is slots and slots.fresh and not slots.plain, "there is padding"


def test_nothing_of_a_pass_is_filled_in_later():
    passing = prompt(begun())
    assert {field.name for field in dataclasses.fields(passing) if getattr(passing, field.name) is None} == {
        "narrow",
        "joined",
        "moved",
        "blocks",
    }
    assert all(
        field.default is dataclasses.MISSING for kind in (passes.MultiTokenPass, passes.DecodePass) for field in dataclasses.fields(kind)
    )


def test_a_prompt_that_is_shrunk_waits_for_the_decision():
    passing = prompt(begun(shared=False), prunes=True)
    assert [*passing.slots] == [0] and passing.joined is passing.slots[0]
    early = prompt(begun(shared=False, end=9), prunes=True)
    assert early.deferred and not early.ends_prompt and early.joined is None


def test_what_comes_after_the_prompt_is_drafted():
    passing = prompt(begun(end=3))
    assert passing.drafted == 2 and passing.ends_prompt
    assert passing.slots[0].type[1].tolist() == [SYSTEM, IMAGE, INSTRUCTION, RESPONSE, RESPONSE]
    assert passing.slots[0].token.tolist() == [[-1, -1, 0, -1, -1], [-1, 0, -1, -1, -1]], "a placeholder's id is no picture there"


@pytest.mark.parametrize("mask", [torch.ones(3, 5), torch.ones(2, 4), torch.ones(2, 1, 5, 5)])
def test_a_mask_of_another_shape_changes_nothing(mask):
    parts = begun()
    with pytest.raises(ValueError, match="attention_mask must be"):
        prompt(parts, mask=mask)
    assert parts[1].before is None and parts[0].text_capacity == 0 and not parts[0].n_text.any()


def test_right_padding_is_refused():
    with pytest.raises(ValueError, match="right padding"):
        prompt(begun(), mask=MASK.flip(1))


@pytest.mark.parametrize(
    ("enabled", "whole", "kind"), [(True, False, cpu_step.CpuStep), (True, True, OperatorStep), (False, False, OperatorStep)]
)
def test_a_decode_step_is_counted_and_knows_what_attends(monkeypatch, enabled, whole, kind):
    monkeypatch.setattr(cpu_step, "enabled", enabled)
    parts = begun()
    prompt(parts)
    store = parts[0]
    store.length = 5
    step = passes.decode(store, torch.tensor([5], dtype=torch.int32), False, whole)
    assert step.start == 5 and step.decodes and type(step.attention) is kind
    assert step.attention.row.tolist() == [[2], [4]] and store.n_text.tolist() == [3, 5]
    assert step.attention.text_bound == (store.text_capacity if whole else 5)
    assert [int(store.text_type[b, n - 1]) for b, n in enumerate((3, 5))] == [RESPONSE] * 2
    assert [int(store.text_column[b, n - 1]) for b, n in enumerate((3, 5))] == [5, 5]


def test_an_attention_is_prepared_once_for_rows_of_the_same_forms(monkeypatch):
    made = []
    monkeypatch.setattr(ops, "trusted", lambda *of: made.append(of) or (lambda rows, **asked: (rows.query,)))
    store = begun()[0]
    store.reserve_text(8)
    store.backend = "triton"
    for layer in range(2):
        store.keys[layer], store.values[layer] = torch.zeros(2, 2, 64, 8), torch.zeros(2, 2, 64, 8)

    def attend(query: torch.Tensor, key: torch.Tensor, layer: int = 0) -> int:
        step = OperatorStep(store, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), False, False)
        made.clear()
        assert step.attend(layer, query, key, key, 1.0, None).shape == (2, 1, 4, 8)
        return len(made)

    query, key = torch.rand(2, 1, 4, 8).transpose(1, 2), torch.rand(2, 1, 2, 8).transpose(1, 2)
    assert [attend(query, key), attend(query + 1, key + 1), attend(query, key, 1), attend(query, key)] == [1, 0, 1, 0]
    for other, new in ((query.half(), key), (query, key.half()), (torch.rand(2, 4, 8, 2)[..., :1].mT, key)):
        assert attend(other, new) == 1 and attend(other, new) == 0 and attend(query, key) == 1
    store.keys[0], store.values[0] = torch.zeros(2, 2, 128, 8), torch.zeros(2, 2, 128, 8)
    assert attend(query, key) == 1
    store.full.kept, store.full.n_kept = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    assert attend(query, key) == 1 and attend(query, key) == 0
    store.full.kept = torch.zeros(2, 6, dtype=torch.int32)[:, :3]
    assert attend(query, key) == 1
    twin = copy.deepcopy(store)
    assert twin.attentions.keys() == store.attentions.keys()


def test_masked_columns_are_not_counted():
    """Reducers left one of two pictures' tokens: its neighbours stand closer together, and the layers receive fewer columns."""
    parts = begun()
    parts[2].begin("uniform", True, False)
    passing = prompt(parts, mask=torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 1]]))
    source, filled = passing.narrow
    assert passing.width == 3 and source.tolist() == [[1, 2, 4], [2, 3, 4]] and filled.all()
    assert passing.slots[0].column.tolist() == [[2, 3, 4], [2, 3, 4]] and parts[2].visual_in.tolist() == [2, 1]
    assert parts[2].visual_place[0, 0] == 0 and passing.moved.tolist() == [[2], [2]]


def test_what_may_see_what():
    column = torch.tensor([[0, 2, 1, 3]])
    live = torch.tensor([[True, True, True, False]])
    token = torch.tensor([[-1, 0, 1, -1]])
    rows = KeyRows(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 4, 1), column, live, token, torch.zeros(1, 4, dtype=torch.uint8))
    query = torch.tensor([[1, 2]])
    assert visibility(rows, query, None).int().tolist() == [[[1, 0, 1, 0], [1, 1, 1, 0]]]
    assert visibility(rows, query, 2).int().tolist() == [[[1, 0, 1, 0], [0, 1, 1, 0]]]
    rows.blocks = torch.tensor([[-1, 4, 4, -1]])
    assert visibility(rows, query, None).int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0]]]
    allowed = torch.tensor([[[True, False]]])
    assert restrict(visibility(rows, query, None), rows, allowed).int().tolist() == [[[1, 1, 1, 0], [1, 1, 0, 0]]]
