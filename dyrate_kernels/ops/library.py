"""The operators as ``torch.ops.dyrate.*``: declared mutation, fake implementations, dispatch to a backend.

``torch.library.Library`` and not ``custom_op``: about 4 us a call against 24 to 32 us (docs/design.md, section 8). Operators have no
autograd formula: they serve generation. A statistic that was not asked for is an empty tensor here and None in ``dyrate_kernels.ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import resolve

_library = torch.library.Library("dyrate", "DEF")

_LENGTHS = "Tensor n_visual, Tensor n_text, SymInt visual_capacity, float scale"
_ROWS = f"Tensor query, Tensor key, Tensor value, {_LENGTHS}"
_APPENDED = f"Tensor query, Tensor(a!) key, Tensor(b!) value, Tensor new_key, Tensor new_value, {_LENGTHS}"
_WINDOW = "Tensor? position, Tensor? query_position, SymInt? window"
_BOUNDS = "SymInt? visual_bound, SymInt? text_bound"
_ROTARY = "Tensor? cos=None, Tensor? sin=None"

_ATTENTION = (
    f"Tensor? kept, Tensor? n_kept, Tensor? text_type, {_WINDOW}, bool mass, bool importance, {_BOUNDS}, bool clean,"
    f" str backend, {_ROTARY}) -> (Tensor, Tensor, Tensor)"
)
_STEP = (
    f"Tensor text_type, {_WINDOW}, Tensor? weight, Tensor? bias, Tensor? rates, Tensor? count, Tensor? score, Tensor? alive,"
    f" Tensor? max_kept, {_BOUNDS}, bool clean, str backend, {_ROTARY})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_PAGES = (
    "Tensor query, Tensor key, Tensor value, Tensor block_table, Tensor n_rows, float scale, Tensor? sequence, Tensor? visual_position,"
    " Tensor? n_visual, Tensor? text_position, Tensor? text_type, Tensor? kept, Tensor? n_kept, SymInt? window, SymInt? row_bound"
)
# append_*: the same with a new row written first; *_out: with the output written to a tensor that is given. Operators of their own, so
# that the others mutate nothing by their schema.
for _schema in (
    f"decode_attention({_ROWS}, {_ATTENTION}",
    f"append_decode_attention({_APPENDED}, {_ATTENTION}",
    f"score_last_query({_ROWS}, Tensor text_type, {_WINDOW}, {_BOUNDS}, str backend) -> (Tensor, Tensor)",
    "predict_rate(Tensor mass, Tensor weight, Tensor bias, Tensor rates, str backend) -> (Tensor, Tensor)",
    "select_tokens(Tensor score, Tensor count, Tensor n_visual, Tensor? alive, str backend) -> (Tensor, Tensor)",
    "compact_(Tensor(a!)[] rows, Tensor kept, Tensor n_kept, Tensor n_visual, str backend) -> ()",
    "reorder_(Tensor(a!)[] rows, Tensor index, str backend) -> ()",
    f"decode_step({_ROWS}, {_STEP}",
    f"append_decode_step({_APPENDED}, {_STEP}",
    f"paged_attention({_PAGES}, bool mass, bool importance, str backend) -> (Tensor, Tensor, Tensor)",
    f"paged_attention_out({_PAGES}, bool mass, bool importance, str backend, *, Tensor(a!) out) -> (Tensor, Tensor)",
    f"paged_step({_PAGES}, Tensor? weight, Tensor? bias, Tensor? rates, Tensor? count, Tensor? score, Tensor? alive, Tensor? max_kept,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    _library.define(_schema)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _implementation(name: str):
    """Registers the decorated function for every device."""
    return torch.library.impl(_library, name, "CompositeExplicitAutograd")


def _fake(name: str):
    return torch.library.register_fake(f"dyrate::{name}", lib=_library)


# ---- decode_attention ---------------------------------------------------------------------------------------------------------


def _decode_attention(
    query, key, value, new_key, new_value, n_visual, n_text, visual_capacity, scale, kept, n_kept, text_type, position, query_position,
    window, mass, importance, visual_bound, text_bound, clean, backend, cos=None, sin=None,
):  # fmt: skip
    output, by_type, per_row = resolve(backend, query.device, "decode_attention").decode_attention(
        query, key, value, n_visual, n_text, visual_capacity=visual_capacity, scale=scale, kept=kept, n_kept=n_kept,
        text_type=text_type, position=position, query_position=query_position, window=window, mass=mass, importance=importance,
        visual_bound=visual_bound, text_bound=text_bound, clean=clean, new_key=new_key, new_value=new_value, cos=cos, sin=sin,
    )  # fmt: skip
    kind = _statistics_dtype(query.dtype)
    by_type = query.new_empty(0, dtype=kind) if by_type is None else by_type
    per_row = query.new_empty(0, dtype=kind) if per_row is None else per_row
    return output, by_type, per_row


@_implementation("decode_attention")
def _(query, key, value, *rest, **rotation):
    return _decode_attention(query, key, value, None, None, *rest, **rotation)


_implementation("append_decode_attention")(_decode_attention)


def _fake_statistics(query: Tensor, visual_capacity: int, mass: bool, importance: bool) -> tuple[Tensor, Tensor]:
    kind = _statistics_dtype(query.dtype)
    batch, heads, _ = query.shape
    return (
        query.new_empty((batch, heads, 4) if mass else (0,), dtype=kind),
        query.new_empty((batch, visual_capacity) if importance else (0,), dtype=kind),
    )


@_fake("append_decode_attention")
def _fake_attention(
    query, key, value, new_key, new_value, n_visual, n_text, visual_capacity, scale, kept, n_kept, text_type, position, query_position,
    window, mass, importance, visual_bound, text_bound, clean, backend, cos=None, sin=None,
):  # fmt: skip
    output = query.new_empty((*query.shape[:2], value.shape[-1]))
    return output, *_fake_statistics(query, visual_capacity, mass, importance)


@_fake("decode_attention")
def _(query, key, value, *rest, **rotation):
    return _fake_attention(query, key, value, None, None, *rest, **rotation)


# ---- score_last_query ---------------------------------------------------------------------------------------------------------


@_implementation("score_last_query")
def _(
    query, key, value, n_visual, n_text, visual_capacity, scale, text_type, position, query_position, window, visual_bound, text_bound,
    backend,
):  # fmt: skip
    return resolve(backend, query.device, "score_last_query").score_last_query(
        query, key, value, n_visual, n_text, visual_capacity=visual_capacity, scale=scale, text_type=text_type, position=position,
        query_position=query_position, window=window, visual_bound=visual_bound, text_bound=text_bound,
    )  # fmt: skip


@_fake("score_last_query")
def _(
    query, key, value, n_visual, n_text, visual_capacity, scale, text_type, position, query_position, window, visual_bound, text_bound,
    backend,
):  # fmt: skip
    return _fake_statistics(query, visual_capacity, True, True)


# ---- predict_rate, select_tokens, compact_ ------------------------------------------------------------------------------------


@_implementation("predict_rate")
def _(mass, weight, bias, rates, backend):
    return resolve(backend, mass.device, "predict_rate").predict_rate(mass, weight, bias, rates)


@_fake("predict_rate")
def _(mass, weight, bias, rates, backend):
    return mass.new_empty(mass.shape[0], dtype=torch.float64), mass.new_empty(mass.shape[0], dtype=torch.int64)


@_implementation("select_tokens")
def _(score, count, n_visual, alive, backend):
    return resolve(backend, score.device, "select_tokens").select_tokens(score, count, n_visual, alive=alive)


@_fake("select_tokens")
def _(score, count, n_visual, alive, backend):
    return score.new_empty(score.shape, dtype=torch.int32), score.new_empty(score.shape[0], dtype=torch.int32)


@_implementation("compact_")
def _(rows, kept, n_kept, n_visual, backend):
    resolve(backend, kept.device, "compact_").compact_(rows, kept, n_kept, n_visual)


@_fake("compact_")
def _(rows, kept, n_kept, n_visual, backend):
    return None


@_implementation("reorder_")
def _(rows, index, backend):
    resolve(backend, index.device, "reorder_").reorder_(rows, index)


@_fake("reorder_")
def _(rows, index, backend):
    return None


# ---- decode_step --------------------------------------------------------------------------------------------------------------


def _decode_step(
    query, key, value, new_key, new_value, n_visual, n_text, visual_capacity, scale, text_type, position, query_position, window,
    weight, bias, rates, count, score, alive, max_kept, visual_bound, text_bound, clean, backend, cos=None,
    sin=None,
):  # fmt: skip
    return resolve(backend, query.device, "decode_step").decode_step(
        query, key, value, n_visual, n_text, visual_capacity=visual_capacity, scale=scale, text_type=text_type, position=position,
        query_position=query_position, window=window, weight=weight, bias=bias, rates=rates, count=count, score=score, alive=alive,
        max_kept=max_kept, visual_bound=visual_bound, text_bound=text_bound, clean=clean, new_key=new_key, new_value=new_value,
        cos=cos, sin=sin,
    )  # fmt: skip


@_implementation("decode_step")
def _(query, key, value, *rest, **rotation):
    return _decode_step(query, key, value, None, None, *rest, **rotation)


_implementation("append_decode_step")(_decode_step)


@_fake("append_decode_step")
def _fake_step(
    query, key, value, new_key, new_value, n_visual, n_text, visual_capacity, scale, text_type, position, query_position, window,
    weight, bias, rates, count, score, alive, max_kept, visual_bound, text_bound, clean, backend, cos=None,
    sin=None,
):  # fmt: skip
    batch = query.shape[0]
    mass, importance = _fake_statistics(query, visual_capacity, True, True)
    return (
        query.new_empty((*query.shape[:2], value.shape[-1])),
        mass,
        importance,
        query.new_empty((batch, visual_capacity), dtype=torch.int32),
        query.new_empty(batch, dtype=torch.int32),
        query.new_empty(batch, dtype=torch.float64),
    )


@_fake("decode_step")
def _(query, key, value, *rest, **rotation):
    return _fake_step(query, key, value, None, None, *rest, **rotation)


# ---- paged rows ---------------------------------------------------------------------------------------------------------------


def _paged_capacity(visual_position: Tensor | None, kept: Tensor | None) -> int:
    """Columns of importance and of the kept list that is made."""
    listed = visual_position if kept is None else kept
    return 0 if listed is None else listed.shape[1]


def _paged_attention(
    query, key, value, block_table, n_rows, scale, sequence, visual_position, n_visual, text_position, text_type, kept, n_kept, window,
    row_bound, mass, importance, backend, out=None,
):  # fmt: skip
    output, by_type, per_row = resolve(backend, query.device, "paged_attention").paged_attention(
        query, key, value, block_table, n_rows, scale=scale, sequence=sequence, visual_position=visual_position, n_visual=n_visual,
        text_position=text_position, text_type=text_type, kept=kept, n_kept=n_kept, window=window, mass=mass, importance=importance,
        row_bound=row_bound, out=out,
    )  # fmt: skip
    kind = _statistics_dtype(query.dtype)
    by_type = query.new_empty(0, dtype=kind) if by_type is None else by_type
    per_row = query.new_empty(0, dtype=kind) if per_row is None else per_row
    return output, by_type, per_row


_implementation("paged_attention")(_paged_attention)


@_implementation("paged_attention_out")
def _(*arguments, out):
    return _paged_attention(*arguments, out)[1:]


@_fake("paged_attention")
def _fake_paged(
    query, key, value, block_table, n_rows, scale, sequence, visual_position, n_visual, text_position, text_type, kept, n_kept, window,
    row_bound, mass, importance, backend,
):  # fmt: skip
    output = query.new_empty((*query.shape[:2], value.shape[-1]))
    return output, *_fake_statistics(query, _paged_capacity(visual_position, kept), mass, importance)


@_fake("paged_attention_out")
def _(*arguments, out):
    return _fake_paged(*arguments)[1:]


@_implementation("paged_step")
def _(
    query, key, value, block_table, n_rows, scale, sequence, visual_position, n_visual, text_position, text_type, kept, n_kept, window,
    row_bound, weight, bias, rates, count, score, alive, max_kept, backend,
):  # fmt: skip
    return resolve(backend, query.device, "paged_step").paged_step(
        query, key, value, block_table, n_rows, scale=scale, sequence=sequence, visual_position=visual_position, n_visual=n_visual,
        text_position=text_position, text_type=text_type, kept=kept, n_kept=n_kept, window=window, row_bound=row_bound,
        weight=weight, bias=bias, rates=rates, count=count, score=score, alive=alive, max_kept=max_kept,
    )  # fmt: skip


@_fake("paged_step")
def _(
    query, key, value, block_table, n_rows, scale, sequence, visual_position, n_visual, text_position, text_type, kept, n_kept, window,
    row_bound, weight, bias, rates, count, score, alive, max_kept, backend,
):  # fmt: skip
    rows, capacity = query.shape[0], _paged_capacity(visual_position, kept)
    return (
        query.new_empty((*query.shape[:2], value.shape[-1])),
        *_fake_statistics(query, capacity, True, True),
        query.new_empty((rows, capacity), dtype=torch.int32),
        query.new_empty(rows, dtype=torch.int32),
        query.new_empty(rows, dtype=torch.float64),
    )
