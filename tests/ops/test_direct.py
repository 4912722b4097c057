"""Calls that go the short way to a backend: the same results and errors as the long way, and never where somebody watches."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dyrate_kernels import ops
from dyrate_kernels.ops import direct, paged, reference
from tests.ops import paged_spec, spec


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(direct, "_known", {})


@pytest.fixture
def calls(monkeypatch):
    """How many calls went through torch's dispatcher so far."""
    made = []
    library = ops._ops

    class Counting:
        def __getattr__(self, name):
            made.append(name)
            return getattr(library, name)

    for module in (ops, paged):
        monkeypatch.setattr(module, "_ops", Counting())
    return made


def problem():
    a = spec.problem(2, 4, 2, 8, 12, 6, [12, 5], [6, 2], dtype=torch.float32, poison=False)
    rows = tuple(a[name] for name in ("query", "key", "value", "n_visual", "n_text"))
    predictor = {"weight": torch.randn(3, 16), "bias": torch.randn(3), "rates": torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)}
    return rows, {"visual_capacity": 12, "text_type": a["text_type"]}, predictor


def everything():
    rows, shared, predictor = problem()
    lists = spec.lists([12, 5], [4, 3], 5)
    count = torch.tensor([3, 2], dtype=torch.int32)
    new = {"new_key": torch.randn(2, 2, 8), "new_value": torch.randn(2, 2, 8)}
    pages = paged_spec.problem(paged_spec.SHAPES[0], torch.float32)
    query = pages.pop("query")
    return {
        "attention": lambda: ops.decode_attention(*rows, visual_capacity=12),
        "list": lambda: ops.decode_attention(*rows, visual_capacity=12, kept=lists[0], n_kept=lists[1], scale=0.3),
        "statistics": lambda: ops.decode_attention(*rows, **shared, mass=True, importance=True),
        "new row": lambda: ops.decode_attention(*rows, **shared, **new),
        "last query": lambda: ops.score_last_query(*rows, **shared),
        "predictor": lambda: ops.decode_step(*rows, **shared, **predictor),
        "count": lambda: ops.decode_step(*rows, **shared, count=count, alive=torch.ones(2, 12, dtype=torch.bool)),
        "rate": lambda: ops.predict_rate(torch.ones(2, 4, 4), **predictor),
        "paged attention": lambda: ops.paged_attention(query, **pages, mass=True, importance=True),
        "paged step": lambda: ops.paged_step(query, **pages, count=count),
        "selection": lambda: ops.select_tokens(torch.arange(24.0).view(2, 12), count, rows[3]),
    }


@pytest.mark.parametrize("name", everything())
def test_the_second_call_is_short_and_the_same(name, calls):
    torch.manual_seed(0)
    call = everything()[name]
    first = call()
    assert len(calls) == 1
    second = call()
    assert len(calls) == 1
    assert type(first) is type(second)
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


def test_bad_arguments_are_refused_after_good_ones():
    rows, shared, predictor = problem()
    query, key, value, n_visual, n_text = rows
    for _ in range(2):
        ops.decode_attention(*rows, visual_capacity=12, visual_bound=12)
        ops.decode_step(*rows, **shared, **predictor)
    wrong = [
        (ValueError, "key", lambda: ops.decode_attention(query, key[:, :, :, :4], value, n_visual, n_text, visual_capacity=12)),
        (TypeError, "n_visual", lambda: ops.decode_attention(query, key, value, n_visual.long(), n_text, visual_capacity=12)),
        (ValueError, "value", lambda: ops.decode_attention(query, key, value.to("meta"), n_visual, n_text, visual_capacity=12)),
        (TypeError, "query", lambda: ops.decode_attention(query.tolist(), key, value, n_visual, n_text, visual_capacity=12)),
        (ValueError, "visual_bound", lambda: ops.decode_attention(*rows, visual_capacity=12, visual_bound=-1)),
        (ValueError, "backend", lambda: ops.decode_attention(*rows, visual_capacity=12, backend="cudnn")),
        (TypeError, "visual_capacity", lambda: ops.decode_attention(*rows)),
        (ValueError, "count", lambda: ops.decode_step(*rows, **shared)),
    ]
    for error, name, call in wrong:
        with pytest.raises(error, match=name):
            call()
    with pytest.raises((TypeError, RuntimeError), match="visual_capacity"):  # torch's schema takes no float for a number
        ops.decode_attention(*rows, visual_capacity=12.0)


def test_other_forms_and_views_are_known_apart():
    rows, _, _ = problem()
    query, key, value, n_visual, n_text = rows
    expected = ops.decode_attention(*rows, visual_capacity=12).output
    spread = torch.stack([query, torch.full_like(query, float("nan"))], -1)[..., 0]
    apart = torch.cat([key, key], 3)[..., :8]
    for _ in range(2):
        assert torch.equal(ops.decode_attention(spread, apart, value, n_visual, n_text, visual_capacity=12).output, expected)
        half = ops.decode_attention(query, key, value, n_visual, n_text, visual_capacity=12, scale=0.0).output
        assert not torch.equal(half, expected)


def test_modes_profilers_and_gradients_see_the_operator(calls):
    rows, _, _ = problem()

    def call(*changed):
        return ops.decode_attention(*(changed or rows), visual_capacity=12)

    call()
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watching():
        call()
    assert seen == ["dyrate.decode_attention.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert any(event.key == "dyrate::decode_attention" for event in profile.key_averages())
    asking = rows[0].clone().requires_grad_()
    for _ in range(2):
        before = len(calls)
        call(asking, *rows[1:])
        assert len(calls) == before + 1


class _OwnTensor(torch.Tensor):
    pass


def test_tensors_of_a_class_of_their_own_go_the_long_way(calls):
    rows, _, _ = problem()
    own = rows[0].as_subclass(_OwnTensor)
    for _ in range(2):
        ops.decode_attention(own, *rows[1:], visual_capacity=12)
    assert len(calls) == 2


def test_what_is_known_is_bounded(monkeypatch):
    from dyrate_kernels.ops import forms

    monkeypatch.setattr(forms, "_MOST_PREPARED", 3)
    rows, _, _ = problem()
    for number in range(8):
        ops.decode_attention(*rows, visual_capacity=12, scale=float(number))
        assert len(direct._known) <= 3


def test_a_negated_view_is_not_the_tensor_of_known_forms(calls):
    rows, shared, _ = problem()
    first = ops.decode_attention(*rows, visual_capacity=12)
    view = torch._neg_view(-rows[0])
    assert view.is_neg()
    for _ in range(2):  # only the dispatcher makes it what it says
        assert torch.equal(ops.decode_attention(view, *rows[1:], visual_capacity=12).output, first.output)
    assert len(calls) == 3


@pytest.mark.parametrize("scale", [1, True, "0.5"])
def test_the_scale_is_a_float_on_both_ways(scale, monkeypatch):
    rows, _, _ = problem()
    seen, real = [], reference.decode_attention
    monkeypatch.setattr(reference, "decode_attention", lambda rows, **named: seen.append(rows.scale) or real(rows, **named))
    first, second = (ops.decode_attention(*rows, visual_capacity=12, scale=scale) for _ in range(2))
    assert seen == [float(scale)] * 2 and [type(one) for one in seen] == [float] * 2
    assert torch.equal(first.output, second.output)


@pytest.mark.parametrize("wrong", ["1", 1.0, torch.tensor(8)])
@pytest.mark.parametrize("name", ["visual_capacity", "window", "visual_bound", "text_bound"])
def test_what_is_no_whole_number_is_refused_by_name(name, wrong):
    rows, _, _ = problem()
    position = {"position": torch.zeros(2, 18, dtype=torch.int32), "query_position": torch.zeros(2, dtype=torch.int32)}
    for _ in range(2):
        with pytest.raises(TypeError, match=f"{name}: expected a whole number, got {type(wrong).__name__}"):
            ops.decode_attention(*rows, **{"visual_capacity": 12, **position, name: wrong})


@pytest.mark.parametrize("name", ["window", "row_bound"])
def test_what_is_no_whole_number_is_refused_over_pages(name):
    pages = {**paged_spec.problem(paged_spec.SHAPES[0], torch.float32), name: 2.0}
    with pytest.raises(TypeError, match=f"{name}: expected a whole number, got float"):
        ops.paged_attention(pages.pop("query"), **pages)
