"""The operators: attention of one decode step with its statistics, the rate, the selection, the compaction.

All of them are batched, device-agnostic and free of host syncs. ``backend`` is one of ``auto | triton | cuda | reference``; the reference
(``ops/reference.py``, plain PyTorch) is the specification. They are registered as ``torch.ops.dyrate.*``.

Row layout of one layer (docs/design.md, section 6): ``key``, ``value`` ``[B, Hkv, C, D]`` with ``C = visual_capacity + Ct``. Sequence ``b``
has its visual rows in ``[0, n_visual[b])`` and its text rows in ``[visual_capacity, visual_capacity + n_text[b])``. Other rows may hold
anything, NaN included: they influence nothing. ``B`` sequences, ``Hq`` query heads, ``Hkv`` key/value heads, ``D`` head dim, ``N`` visual
tokens.

Arguments are checked on the host for shape, dtype and device (ValueError or TypeError that names the argument); values that live on the
device are not read, so lengths beyond a capacity are the caller's to avoid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, direct, dispatch, library, reference
from .contract import Decide, PagedRows, Rows, step_arguments
from .forms import Prepared
from .paged import PagedAttention, PagedStep, paged_attention, paged_step

__all__ = [
    "Decide",
    "DecodeAttention",
    "DecodeStep",
    "PagedAttention",
    "PagedRows",
    "PagedStep",
    "Rows",
    "compact_",
    "decode_attention",
    "decode_step",
    "dispatched",
    "keep_count",
    "paged_attention",
    "paged_step",
    "predict_rate",
    "reorder_",
    "score_last_query",
    "select_tokens",
    "trusted",
]

_ops = torch.ops.dyrate
assert library is not None  # importing it registers the operators


class DecodeAttention(NamedTuple):
    """output ``[B, Hq, Dv]`` in the query's dtype; mass float32 ``[B, Hq, 4]`` or None; importance float32 ``[B, visual_capacity]`` or
    None."""

    output: Tensor
    mass: Tensor | None
    importance: Tensor | None


class DecodeStep(NamedTuple):
    """output, mass, importance as in :class:`DecodeAttention`; kept int32 ``[B, visual_capacity]`` ascending rows, -1 past the end;
    n_kept int32 ``[B]``; rate float64 ``[B]``, the fraction removed."""

    output: Tensor
    mass: Tensor
    importance: Tensor
    kept: Tensor
    n_kept: Tensor
    rate: Tensor


def _attention(rows: Rows, *, mass: bool, importance: bool, backend: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    run = _ops.decode_attention if rows.new_key is None else _ops.append_decode_attention
    output, by_type, per_row = run(*rows, mass, importance, backend)
    return output, by_type if mass else None, per_row if importance else None


def _step(rows: Rows, decide: Decide, *, backend: str) -> tuple[Tensor, ...]:
    return (_ops.decode_step if rows.new_key is None else _ops.append_decode_step)(*rows, *decide, backend)


def dispatched(operator: str, backend: str) -> Callable[..., Any]:
    """Returns an operator as :func:`trusted` does, but through torch's dispatcher."""
    if operator == "compact_":
        return functools.partial(compact_, backend=backend)
    return functools.partial(_attention if operator == "decode_attention" else _step, backend=backend)


def trusted(operator: str, backend: str, device: torch.device, prepared: Prepared | None = None) -> Callable[..., Any]:
    """Returns a backend's own ``decode_attention``, ``decode_step`` or ``compact_``, for arguments that are known to fit: they are not
    checked, and the call does not go through torch's dispatcher. Both together take the host as long as the launch itself, in every layer
    of every step.

    It takes what a backend takes (:mod:`dyrate_kernels.ops.contract`): :class:`Rows` with ``mass`` and ``importance``, or Rows and
    :class:`Decide`, and returns its results as a plain tuple; ``compact_`` what the public one takes. While ``torch.compile`` traces, the
    call goes through the dispatcher, where the compiler can see it. ``prepared``: all calls' tensors have the same forms.
    """
    if torch.compiler.is_compiling():
        return dispatched(operator, backend)
    module = dispatch.resolve(backend, device, operator)
    run = getattr(module, operator)
    return run if prepared is None or operator not in getattr(module, "PREPARES", ()) else functools.partial(run, prepared=prepared)


def _attention_arguments(*rows: Any, mass: bool = False, importance: bool = False, **named: Any) -> tuple[tuple, dict[str, Any]]:
    return (Rows(*rows, **named),), {"mass": mass, "importance": importance}


def _score_arguments(*rows: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
    return (Rows(*rows, **named),), {}


@direct.operator(_attention_arguments)
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_visual: Tensor,
    n_text: Tensor,
    *,
    visual_capacity: int,
    scale: float | None = None,
    kept: Tensor | None = None,
    n_kept: Tensor | None = None,
    text_type: Tensor | None = None,
    position: Tensor | None = None,
    query_position: Tensor | None = None,
    window: int | None = None,
    mass: bool = False,
    importance: bool = False,
    visual_bound: int | None = None,
    text_bound: int | None = None,
    clean: bool = False,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str = "auto",
) -> DecodeAttention:
    """Attention of one new token per sequence over the live rows, on request with mass and importance.

    Accumulates in float32 (float64 for float64 inputs). Mutates nothing, unless a new row is given.

    Args:
        query: ``[B, Hq, D]``, float16, bfloat16, float32 or float64; ``key`` and ``value`` ``[B, Hkv, C, D]`` have the same dtype.
        n_visual, n_text: int32 ``[B]``, live rows of each region.
        visual_capacity: rows of the visual region.
        scale: factor of the logits; None is ``D ** -0.5``.
        kept, n_kept: int32 ``[B, M]`` and ``[B]``: of the visual rows read only ``kept[b, :n_kept[b]]`` (ascending, below ``n_visual[b]``).
        text_type: uint8 ``[B, Ct]``, the token type of each text row (0 system, 1 image, 2 instruction, 3 response); needed for mass.
        position, query_position, window: int32 ``[B, C]``, int32 ``[B]``, int: a row is read iff ``query_position - position < window``.
        mass: also sum the probability per head and token type; sums to 1 over the types (0 where a sequence has no live row).
        importance: also average the probability of each visual row over the ``Hq`` heads; 0 for rows that are not read.
        visual_bound, text_bound: no sequence has more live rows than this; spares the reference the rest. Does not change the result.
        clean: the caller vouches that no dead row of ``value`` holds NaN or infinity, which spares the reference a pass over it.
        new_key, new_value: ``[B, Hkv, D]`` in the key's dtype: the row of the newest token, counted in ``n_text`` already. It is
            **written to row** ``visual_capacity + n_text[b] - 1`` of ``key`` and ``value`` first (not where ``n_text[b]`` is 0).
        cos, sin: ``[B, D]`` or ``[1, D]`` in the query's dtype, D even: query and new_key come before their rotary embedding, which turns
            the two halves of a head against each other (as ``transformers`` does for Llama); they are rotated by these, as
            ``ops.layers.rotate`` does it, and the rotated key is what is written.
        backend: ``auto | triton | cuda | reference``.

    Returns:
        DecodeAttention. The output is 0 for a sequence without live rows. A NaN logit makes its head's results NaN, as softmax would.
    """
    rows = Rows(
        query, key, value, n_visual, n_text, visual_capacity, checks.scale(scale, query), kept, n_kept, text_type, position, query_position,
        window, visual_bound, text_bound, clean, new_key, new_value, cos, sin,
    )  # fmt: skip
    checks.rows(rows)
    if mass or text_type is not None:
        checks.text_types(rows)
    dispatch.check_name(backend)
    return DecodeAttention(*_attention(rows, mass=mass, importance=importance, backend=backend))


@direct.operator(_score_arguments)
def score_last_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_visual: Tensor,
    n_text: Tensor,
    *,
    visual_capacity: int,
    text_type: Tensor,
    scale: float | None = None,
    position: Tensor | None = None,
    query_position: Tensor | None = None,
    window: int | None = None,
    visual_bound: int | None = None,
    text_bound: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The statistics of :func:`decode_attention` for the last prompt row, whose output the prefill has made already.

    Returns:
        mass float32 ``[B, Hq, 4]`` and importance float32 ``[B, visual_capacity]`` (float64 for float64 inputs).
    """
    rows = Rows(
        query, key, value, n_visual, n_text, visual_capacity, checks.scale(scale, query), text_type=text_type, position=position,
        query_position=query_position, window=window, visual_bound=visual_bound, text_bound=text_bound,
    )  # fmt: skip
    checks.rows(rows)
    checks.text_types(rows)
    dispatch.check_name(backend)
    return _ops.score_last_query(*rows, backend)


@direct.operator()
def predict_rate(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """DyRate's predictor: a linear layer over the mass, then argmax (arXiv 2501.14204, section 4.2).

    Args:
        mass: float ``[B, Hq, 4]``.
        weight: float ``[R, Hq * 4]``; bias float ``[R]`` or ``[B, R]`` (a stride of 0 is fine).
        rates: float64 ``[R]``, the rate of each class.

    Returns:
        rate float64 ``[B]`` and its class int64 ``[B]``. Ties go to the smaller class, NaN logits rank last, all NaN gives class 0.
    """
    checks.floating("mass", mass, ("B", "Hq", 4))
    checks.predictor(weight, bias, rates, mass.shape[0], mass.shape[1], mass.device)
    dispatch.check_name(backend)
    return _ops.predict_rate(mass, weight, bias, rates, backend)


def keep_count(n_visual: Tensor, rate: Tensor) -> Tensor:
    """Returns how many of ``n_visual`` tokens stay where the fraction ``rate`` goes: ``floor(n * (1 - rate) + 1e-6)`` within ``[0, n]``.

    Args:
        n_visual: int32 ``[B]``.
        rate: float64 ``[B]``; NaN keeps everything.

    Returns:
        int32 ``[B]``.
    """
    checks.tensor("n_visual", n_visual, ("B",), (torch.int32,), getattr(n_visual, "device", None))
    checks.floating("rate", rate, (n_visual.shape[0],), n_visual.device)
    return reference.keep_count(n_visual, rate)


@direct.operator()
def select_tokens(
    score: Tensor, count: Tensor, n_visual: Tensor, *, alive: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The ``count[b]`` highest-scoring candidates of each sequence, in ascending order of their index.

    Candidates are the ``i < n_visual[b]`` (with ``alive[b, i]``). Ties go to the smaller index; NaN ranks last, below -inf.

    Args:
        score: float ``[B, N]``.
        count: int32 ``[B]``; clamped to 0 .. number of candidates.
        n_visual: int32 ``[B]``.
        alive: bool ``[B, N]`` or None.

    Returns:
        kept int32 ``[B, N]``, -1 past its end, and n_kept int32 ``[B]``.
    """
    checks.floating("score", score, ("B", "N"))
    checks.int32("count", count, (score.shape[0],), score.device)
    checks.selection(score, count, n_visual, alive)
    dispatch.check_name(backend)
    return _ops.select_tokens(score, count, n_visual, alive, backend)


def compact_(rows: list[Tensor], kept: Tensor, n_kept: Tensor, n_visual: Tensor, *, backend: str = "auto") -> None:
    """Moves the kept rows to the front, in place, by hole filling: the kept rows at or past ``n_kept`` go into the holes below it.

    Afterwards rows ``[0, n_kept[b])`` of every tensor hold the kept rows: those that were below ``n_kept[b]`` where they were, the
    others, in ascending order, in the holes, in ascending order. Every other row stays as it was. The caller then sets its ``n_visual`` to
    ``n_kept``.

    Args:
        rows: tensors ``[B, H, C, D]`` or ``[B, C]`` of any dtype; **changed in place**. They must not overlap in memory.
        kept: int32 ``[B, M]``, ascending rows below ``n_visual[b]``; n_kept int32 ``[B]``, its length.
        n_visual: int32 ``[B]``, live rows before the call.
    """
    if not isinstance(rows, list | tuple):
        raise TypeError(f"rows: expected a list of tensors, got {type(rows).__name__}")
    checks.tensor("kept", kept, ("B", "M"), (torch.int32,), getattr(kept, "device", None))
    batch = kept.shape[0]
    checks.int32("n_kept", n_kept, (batch,), kept.device)
    checks.int32("n_visual", n_visual, (batch,), kept.device)
    for number, tensor in enumerate(rows):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"rows[{number}]: expected a tensor, got {type(tensor).__name__}")
        checks.dense(f"rows[{number}]", tensor)
        if tensor.dim() not in (2, 4) or tensor.shape[0] != batch:
            raise ValueError(f"rows[{number}]: expected shape [{batch}, H, C, D] or [{batch}, C], got {list(tensor.shape)}")
        if tensor.device != kept.device:
            raise ValueError(f"rows[{number}]: expected it on {kept.device}, where kept is, got {tensor.device}; move it there")
    dispatch.check_name(backend)
    _ops.compact_(list(rows), kept, n_kept, n_visual, backend)


def reorder_(rows: list[Tensor], index: Tensor, *, backend: str = "auto") -> None:
    """Sequence ``i`` of every tensor becomes a copy of the former sequence ``index[i]``, in place (beam search).

    Args:
        rows: tensors ``[B, ...]`` of any dtype; **changed in place**. They must not overlap in memory.
        index: int64 ``[B]``, each in ``[0, B)``.
    """
    if not isinstance(rows, list | tuple):
        raise TypeError(f"rows: expected a list of tensors, got {type(rows).__name__}")
    checks.tensor("index", index, ("B",), (torch.int64,), getattr(index, "device", None))
    for number, tensor in enumerate(rows):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"rows[{number}]: expected a tensor, got {type(tensor).__name__}")
        checks.dense(f"rows[{number}]", tensor)
        if tensor.dim() < 1 or tensor.shape[0] != index.shape[0]:
            raise ValueError(f"rows[{number}]: expected shape [{index.shape[0]}, ...], got {list(tensor.shape)}")
        if tensor.device != index.device:
            raise ValueError(f"rows[{number}]: expected it on {index.device}, where index is, got {tensor.device}; move it there")
    dispatch.check_name(backend)
    _ops.reorder_(list(rows), index, backend)


@direct.operator(step_arguments(Rows))
def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_visual: Tensor,
    n_text: Tensor,
    *,
    visual_capacity: int,
    text_type: Tensor,
    scale: float | None = None,
    position: Tensor | None = None,
    query_position: Tensor | None = None,
    window: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rates: Tensor | None = None,
    count: Tensor | None = None,
    score: Tensor | None = None,
    alive: Tensor | None = None,
    max_kept: Tensor | None = None,
    visual_bound: int | None = None,
    text_bound: int | None = None,
    clean: bool = False,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str = "auto",
) -> DecodeStep:
    """The score layer's whole step: attention with statistics, the rate, the count, the kept list.

    The composition of :func:`decode_attention`, :func:`predict_rate`, :func:`keep_count` and :func:`select_tokens`. Either the predictor
    (``weight``, ``bias``, ``rates``) gives the rate, or the caller gives the ``count``.

    Args:
        weight, bias, rates: as in :func:`predict_rate`.
        count: int32 ``[B]``, how many stay; instead of the predictor. ``rate`` is then ``1 - n_kept / n_visual``.
        score: float ``[B, visual_capacity]``, what to rank by; None is the importance.
        alive: bool ``[B, visual_capacity]``, tokens that can be chosen.
        max_kept: int32 ``[B]``, the count is clamped to it.
        The others: as in :func:`decode_attention`.

    Returns:
        DecodeStep.
    """
    rows = Rows(
        query, key, value, n_visual, n_text, visual_capacity, checks.scale(scale, query), None, None, text_type, position, query_position,
        window, visual_bound, text_bound, clean, new_key, new_value, cos, sin,
    )  # fmt: skip
    checks.rows(rows)
    checks.text_types(rows)
    decide = Decide(weight, bias, rates, count, score, alive, max_kept)
    checks.decision(decide, query, visual_capacity)
    dispatch.check_name(backend)
    return DecodeStep(*_step(rows, decide, backend=backend))
