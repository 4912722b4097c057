"""A session without any model: passes are driven by hand, with random queries, keys and values in place of what layers would make."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dyrate_kernels import policies
from dyrate_kernels.generation.session import Session
from dyrate_kernels.policies.base import ModelShape, Policy

SHAPE = ModelShape(4, 4, 2, 8, 32, 64, 100)
VISUAL = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]]).bool()
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])


def tensors(column: int, length: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of these columns; the same ones whenever they come."""
    made = []
    for each in range(column, column + length):
        draw = torch.Generator().manual_seed(100 * each + layer)
        made.append([torch.randn(2, heads, 1, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2)])
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*made, strict=True))
    return query, key, value


def run(session: Session, length: int, visual: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
    """One pass; each layer's output."""
    start = session.store.length
    if visual is not None:
        session.stage(visual)
    session.begin_forward(2, length, mask, torch.device("cpu"))
    outputs = []
    for layer in range(SHAPE.num_layers):
        query, key, value = tensors(start, length, layer)
        session.write(layer, key, value)
        outputs.append(session.attend(layer, query, key, value, 8**-0.5, None))
    session.finish_forward()
    return outputs


def session_of(policy: Policy, retention: str) -> Session:
    return Session(policy.bind(SHAPE), SHAPE, retention, "reference")


def dense(column: int, layer: int, dropped: set[int], row: int) -> Tensor:
    """Attention of one column over all before it but the padding and those dropped: ``[Hq, D]``."""
    columns = [each for each in range(column + 1) if each not in dropped and (each >= MASK.shape[1] or MASK[row, each])]
    query = tensors(column, 1, layer)[0][row, :, 0]
    key, value = (torch.stack([tensors(each, 1, layer)[place][row, :, 0] for each in columns]) for place in (1, 2))
    key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    weights = (torch.einsum("hd,nhd->hn", query, key) * 8**-0.5).softmax(-1)
    return torch.einsum("hn,nhd->hd", weights, value)


@pytest.mark.parametrize("retention", ["recoverable", "evict"])
def test_keeping_all_is_dense_attention(retention):
    session = session_of(policies.KeepAll(k=2), retention)
    session.begin_turn(7, 20, False)
    prompt = run(session, 7, VISUAL, MASK)
    steps = [run(session, 1) for _ in range(3)]
    for layer in range(SHAPE.num_layers):
        for row in range(2):
            torch.testing.assert_close(prompt[layer][row, -1], dense(6, layer, set(), row))
            for column, step in enumerate(steps, 7):
                torch.testing.assert_close(step[layer][row, 0], dense(column, layer, set(), row))


def test_a_step_reads_what_is_kept_and_no_more():
    session = session_of(policies.Fixed(k=2, rate=0.5), "recoverable")
    session.begin_turn(7, 20, False)
    run(session, 7, VISUAL, MASK)
    step = run(session, 1)
    group = session.store.groups[1]
    for row in range(2):
        columns = VISUAL[row].nonzero().flatten().tolist()
        kept = group.kept[row, : int(group.n_kept[row])].tolist()
        assert len(kept) == len(columns) // 2
        dropped = {column for token, column in enumerate(columns) if token not in kept}
        for layer in range(SHAPE.num_layers):
            torch.testing.assert_close(step[layer][row, 0], dense(7, layer, dropped if layer >= 2 else set(), row))


@pytest.mark.parametrize("retention", ["recoverable", "evict"])
def test_a_conversation_that_is_reset_begins_anew(retention):
    session = session_of(policies.DyRate(k=2), retention)
    found = []
    for _ in range(2):
        session.begin_turn(7, 20, False)
        prompt = run(session, 7, VISUAL, MASK) if retention == "recoverable" else keys_only(session)
        found.append([*prompt, *run(session, 1), *run(session, 1), session.record.kept[:3].clone(), session.step.clone()])
        session.reset()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def keys_only(session: Session) -> list[Tensor]:
    """A prompt under ``evict`` whose pruned layers are given the columns that they keep, as ``patching.shrink`` does."""
    session.stage(VISUAL)
    session.begin_forward(2, 7, MASK, torch.device("cpu"))
    outputs = []
    for layer in range(SHAPE.num_layers):
        query, key, value = tensors(0, 7, layer)
        shrunk = session.effects.shrunk.get(session.store.index_of[layer])
        if shrunk is not None:
            source = shrunk.source[:, None, :, None]
            query, key, value = (each.gather(2, source.expand(-1, each.shape[1], -1, 8)) for each in (query, key, value))
        session.write(layer, key, value)
        outputs.append(session.attend(layer, query, key, value, 8**-0.5, None))
    session.finish_forward()
    return outputs


def test_columns_that_are_cropped_never_came():
    session = session_of(policies.Fixed(k=2, rate=0.5), "recoverable")
    session.begin_turn(7, 20, False)
    run(session, 7, VISUAL, MASK)
    run(session, 1)
    want = run(session, 1)
    session.crop(8)
    assert session.store.length == 8 and session.step.tolist() == [2] and session.record.steps == 2
    got = run(session, 1)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_rows_that_no_attention_read_are_told_of():
    session = session_of(policies.KeepAll(k=2), "recoverable")
    session.begin_turn(7, 20, False)
    session.stage(VISUAL)
    session.begin_forward(2, 7, MASK, torch.device("cpu"))
    _, key, value = tensors(0, 7, 0)
    session.write(0, key, value)
    with pytest.raises(RuntimeError, match="layer 0 stored rows that no attention has read"):
        session.write(1, key, value)
    with pytest.raises(RuntimeError, match="did not finish"):
        session.begin_forward(2, 1, None, torch.device("cpu"))


def test_an_error_leaves_the_hosts_side_as_it_was():
    session = session_of(policies.DyRate(k=2), "recoverable")
    session.begin_turn(7, 20, False)
    run(session, 7, VISUAL, MASK)
    run(session, 1)
    before = session.step_state()
    with pytest.raises(KeyError), session.undone_on_error(), session.whole_regions():
        run(session, 1)
        raise KeyError
    after = session.step_state()
    assert after.sizes == before.sizes and after.lasting == before.lasting and session.store.length == 8
    assert all(one is other for one, other in zip(after.made, before.made, strict=True)) and not session.bounds_at_capacity
