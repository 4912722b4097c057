"""The operators as ``torch.ops.dyrate.*``: declared mutation, fake implementations, dispatch to a backend.

``torch.library.Library`` and not ``custom_op``: about 4 us a call against 24 to 32 us (docs/design.md, section 8). Operators have no
autograd formula: they serve generation. Their arguments are the fields of ``ops.contract``, in that order. A statistic that was not asked
for is an empty tensor here and None in ``dyrate_kernels.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from .contract import Decide, PagedRows, Rows, accumulator
from .dispatch import resolve

_Function = TypeVar("_Function", bound=Callable[..., Any])

_library = torch.library.Library("dyrate", "DEF")

_WORDS = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", int | None: "SymInt?", float: "float", bool: "bool"}


def _declared(fields: type[tuple], **written: str) -> str:
    """The fields of a NamedTuple as a schema has them; ``written``: those that the operator writes to, with the name of their memory."""
    words = {name: _WORDS[kind] for name, kind in get_type_hints(fields).items()}
    return ", ".join(f"{word}({written[name]}!) {name}" if name in written else f"{word} {name}" for name, word in words.items())


_ROWS, _APPENDED = _declared(Rows), _declared(Rows, key="a", value="b")
_PAGES, _DECIDE = _declared(PagedRows), _declared(Decide)
_ATTENTION = "bool mass, bool importance, str backend"
_THREE, _SIX = "(Tensor, Tensor, Tensor)", "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
# append_*: a new row is written first; *_out: the output goes to a tensor that is given. Operators of their own, so that the others mutate
# nothing by their schema.
for _schema in (
    f"decode_attention({_ROWS}, {_ATTENTION}) -> {_THREE}",
    f"append_decode_attention({_APPENDED}, {_ATTENTION}) -> {_THREE}",
    f"score_last_query({_ROWS}, str backend) -> (Tensor, Tensor)",
    "predict_rate(Tensor mass, Tensor weight, Tensor bias, Tensor rates, str backend) -> (Tensor, Tensor)",
    "select_tokens(Tensor score, Tensor count, Tensor n_visual, Tensor? alive, str backend) -> (Tensor, Tensor)",
    "compact_(Tensor(a!)[] rows, Tensor kept, Tensor n_kept, Tensor n_visual, str backend) -> ()",
    "reorder_(Tensor(a!)[] rows, Tensor index, str backend) -> ()",
    f"decode_step({_ROWS}, {_DECIDE}, str backend) -> {_SIX}",
    f"append_decode_step({_APPENDED}, {_DECIDE}, str backend) -> {_SIX}",
    f"paged_attention({_PAGES}, {_ATTENTION}) -> {_THREE}",
    f"paged_attention_out({_PAGES}, {_ATTENTION}, *, Tensor(a!) out) -> (Tensor, Tensor)",
    f"paged_step({_PAGES}, {_DECIDE}, str backend) -> {_SIX}",
):
    _library.define(_schema)


def _implementation(*names: str) -> Callable[[_Function], _Function]:
    """Registers the decorated function for every device."""

    def register(function: _Function) -> _Function:
        for name in names:
            torch.library.impl(_library, name, "CompositeExplicitAutograd")(function)
        return function

    return register


def _fake(*names: str) -> Callable[[_Function], _Function]:
    """Registers the decorated function as what the operators' results look like."""

    def register(function: _Function) -> _Function:
        for name in names:
            torch.library.register_fake(f"dyrate::{name}", lib=_library)(function)
        return function

    return register


def _statistics_or_empty(query: Tensor, made: tuple[Tensor, Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """A statistic that was not asked for as an empty tensor."""
    kind = accumulator(query)
    output, mass, importance = made
    mass = query.new_empty(0, dtype=kind) if mass is None else mass
    return output, mass, query.new_empty(0, dtype=kind) if importance is None else importance


def _empty_statistics(query: Tensor, tokens: int, mass: bool = True, importance: bool = True) -> tuple[Tensor, Tensor]:
    kind = accumulator(query)
    units, heads, _ = query.shape
    return (
        query.new_empty((units, heads, 4) if mass else (0,), dtype=kind),
        query.new_empty((units, tokens) if importance else (0,), dtype=kind),
    )


def _empty_output(rows: Rows | PagedRows) -> Tensor:
    return rows.query.new_empty((*rows.query.shape[:2], rows.value.shape[-1]))


def _empty_decision(query: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    units = query.shape[0]
    return (
        query.new_empty((units, tokens), dtype=torch.int32),
        query.new_empty(units, dtype=torch.int32),
        query.new_empty(units, dtype=torch.float64),
    )


# ---- attention and decision -----------------------------------------------------------------------------------------------------

_N_ROWS, _N_PAGED = len(Rows._fields), len(PagedRows._fields)


def _refuse(rows: Rows, *names: str, instead: str) -> None:
    """Refuses arguments that the schema lists with the others and that the operator does not take."""
    for name in names:
        if getattr(rows, name) is not None:
            raise ValueError(f"{name}: expected None, got a tensor; {instead}")


@_implementation("decode_attention")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _refuse(Rows(*arguments[:_N_ROWS]), "new_key", "new_value", instead="append_decode_attention writes a new row")
    return _attention(*arguments)


@_implementation("append_decode_attention")
def _attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, (mass, importance, backend) = Rows(*arguments[:_N_ROWS]), arguments[_N_ROWS:]
    attention = resolve(backend, rows.query.device, "decode_attention").decode_attention
    return _statistics_or_empty(rows.query, attention(rows, mass=mass, importance=importance))


@_fake("decode_attention", "append_decode_attention")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, (mass, importance, _) = Rows(*arguments[:_N_ROWS]), arguments[_N_ROWS:]
    return _empty_output(rows), *_empty_statistics(rows.query, rows.visual_capacity, mass, importance)


@_implementation("score_last_query")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    rows, backend = Rows(*arguments[:_N_ROWS]), arguments[_N_ROWS]
    _refuse(rows, "kept", "n_kept", "new_key", "new_value", "cos", "sin", instead="the rows of a prompt are there, and all are read")
    return resolve(backend, rows.query.device, "score_last_query").score_last_query(rows)


@_fake("score_last_query")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    rows = Rows(*arguments[:_N_ROWS])
    return _empty_statistics(rows.query, rows.visual_capacity)


@_implementation("decode_step")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _refuse(Rows(*arguments[:_N_ROWS]), "new_key", "new_value", instead="append_decode_step writes a new row")
    return _step(*arguments)


@_implementation("append_decode_step")
def _step(*arguments: Any) -> tuple[Tensor, ...]:
    rows, (*decide, backend) = Rows(*arguments[:_N_ROWS]), arguments[_N_ROWS:]
    _refuse(rows, "kept", "n_kept", instead="a score layer reads every visual row")
    return resolve(backend, rows.query.device, "decode_step").decode_step(rows, Decide(*decide))


@_fake("decode_step", "append_decode_step")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    rows = Rows(*arguments[:_N_ROWS])
    tokens = rows.visual_capacity
    return _empty_output(rows), *_empty_statistics(rows.query, tokens), *_empty_decision(rows.query, tokens)


# ---- paged rows ---------------------------------------------------------------------------------------------------------------


def _tokens(rows: PagedRows) -> int:
    """Columns of importance and of the kept list that is made."""
    listed = rows.visual_position if rows.kept is None else rows.kept
    return 0 if listed is None else listed.shape[1]


def _paged_attention(arguments: tuple, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, (mass, importance, backend) = PagedRows(*arguments[:_N_PAGED]), arguments[_N_PAGED:]
    attention = resolve(backend, rows.query.device, "paged_attention").paged_attention
    return _statistics_or_empty(rows.query, attention(rows, mass=mass, importance=importance, out=out))


@_implementation("paged_attention")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _paged_attention(arguments, None)


@_implementation("paged_attention_out")
def _(*arguments: Any, out: Tensor) -> tuple[Tensor, Tensor]:
    return _paged_attention(arguments, out)[1:]


@_fake("paged_attention")
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, (mass, importance, _) = PagedRows(*arguments[:_N_PAGED]), arguments[_N_PAGED:]
    return _empty_output(rows), *_empty_statistics(rows.query, _tokens(rows), mass, importance)


@_fake("paged_attention_out")
def _(*arguments: Any, out: Tensor) -> tuple[Tensor, Tensor]:
    rows, (mass, importance, _) = PagedRows(*arguments[:_N_PAGED]), arguments[_N_PAGED:]
    return _empty_statistics(rows.query, _tokens(rows), mass, importance)


@_implementation("paged_step")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    rows, (*decide, backend) = PagedRows(*arguments[:_N_PAGED]), arguments[_N_PAGED:]
    return resolve(backend, rows.query.device, "paged_step").paged_step(rows, Decide(*decide))


@_fake("paged_step")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    rows = PagedRows(*arguments[:_N_PAGED])
    return _empty_output(rows), *_empty_statistics(rows.query, _tokens(rows)), *_empty_decision(rows.query, _tokens(rows))


# ---- predict_rate, select_tokens, compact_ ------------------------------------------------------------------------------------


@_implementation("predict_rate")
def _(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return resolve(backend, mass.device, "predict_rate").predict_rate(mass, weight, bias, rates)


@_fake("predict_rate")
def _(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return mass.new_empty(mass.shape[0], dtype=torch.float64), mass.new_empty(mass.shape[0], dtype=torch.int64)


@_implementation("select_tokens")
def _(score: Tensor, count: Tensor, n_visual: Tensor, alive: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return resolve(backend, score.device, "select_tokens").select_tokens(score, count, n_visual, alive=alive)


@_fake("select_tokens")
def _(score: Tensor, count: Tensor, n_visual: Tensor, alive: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return score.new_empty(score.shape, dtype=torch.int32), score.new_empty(score.shape[0], dtype=torch.int32)


@_implementation("compact_")
def _(rows: list[Tensor], kept: Tensor, n_kept: Tensor, n_visual: Tensor, backend: str) -> None:
    resolve(backend, kept.device, "compact_").compact_(rows, kept, n_kept, n_visual)


@_fake("compact_")
def _(rows: list[Tensor], kept: Tensor, n_kept: Tensor, n_visual: Tensor, backend: str) -> None:
    return None


@_implementation("reorder_")
def _(rows: list[Tensor], index: Tensor, backend: str) -> None:
    resolve(backend, index.device, "reorder_").reorder_(rows, index)


@_fake("reorder_")
def _(rows: list[Tensor], index: Tensor, backend: str) -> None:
    return None
