"""The one grammar in which every command, ``patch`` and the registries read policies, reducers and rows of a comparison.

::

    rows      = row {"," row}
    row       = policy {"+" reducer} ["@" retention] [" as " label]
    policy    = name {":" option "=" value}                    a reducer is written likewise
    retention = "recoverable" | "evict" | "pool" ["=" fraction] [":by=" ranking]
    value     = a Python literal | "(" policy ")" for the option ``policy`` | any other text

Marks inside of brackets or quotes part nothing: ``schedule:kept=[(0, 60), (3, 20)]``, ``dyrate:predictor='runs/a@b'``. A ``+`` without
quotes parts where the name of a reducer follows; else it is part of the value in front of it, so that a folder may be named ``a+b``.

This is syntax alone: which names there are and what options they have is a matter of the registries (``Registry.parse``).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dyrate_kernels.retention import RETENTIONS, Retention

_OPEN, _CLOSE, _QUOTES = "([{", ")]}", "'\""
_MARKS = ",+@:="


@dataclass(frozen=True)
class Call:
    """``name:option=value:..``; ``str()`` gives text that reads as the same call.

    Attributes:
        name: of a policy or a reducer; may be unknown.
        options: by name; a value is a Python literal, text, or the ``Call`` of a policy inside of this one.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{name}={_value_text(name, value)}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Row:
    """A row of a comparison; ``str()`` as of :class:`Call`.

    Attributes:
        policy: what decides.
        reducers: before the language model, in order; empty: none is named.
        retention: as ``str(Retention)`` writes it; None: none is named.
        label: behind ``as``; None: none.
        written: policy, reducers and retention as they were written.
    """

    policy: Call
    reducers: tuple[Call, ...] = ()
    retention: str | None = None
    label: str | None = None
    written: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        made = "+".join(map(str, (self.policy, *self.reducers)))
        return made + (f"@{self.retention}" if self.retention else "") + (f" as {self.label}" if self.label else "")


def rows(text: str, reducers: Collection[str], option: str = "--policies") -> list[Row]:
    """``fastv:rate=0.75@evict,none+aim as small`` -> rows, in order; empty parts are passed over.

    Args:
        reducers: names of all reducers.
        option: of the command line, for messages.

    Raises:
        ValueError: a part that cannot be read; names the part, what was expected, what came.
    """
    try:
        return [_row(part, reducers) for part in split_list(text)]
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def call(text: str, kind: str) -> Call:
    """``fastv:k=2:rate=0.75`` -> a call; ``recycle:policy=(fastv:k=2)`` -> one that holds another.

    Args:
        kind: ``policy`` or ``reducer``, for messages.

    Raises:
        ValueError: an option without a value, or that stands twice; brackets or quotes that do not close.
    """
    name, *pairs = (part.strip() for part in _split(text, ":"))
    options: dict[str, Any] = {}
    for each in pairs:
        option, held = pair(each, f"{kind} options are", f" in {text!r}")
        if option in options:
            raise ValueError(f"{kind} options stand once each, got {option!r} twice in {text!r}")
        options[option] = held
    return Call(name, options)


def pair(text: str, subject: str, place: str = "") -> tuple[str, Any]:
    """``ranking=mean`` -> name and value.

    Args:
        subject, place: first and last words of the message.

    Raises:
        ValueError: it is not NAME=VALUE.
    """
    option, mark, written = (part.strip() for part in text.partition("="))
    if not (option and mark and written):
        raise ValueError(f"{subject} NAME=VALUE, got {text!r}{place}")
    nested = option == "policy" and written.startswith("(") and written.endswith(")")
    return option, call(written[1:-1], "policy") if nested else value(written)


def retention(text: Any, pool: Any = None, pool_by: Any = None) -> Retention:
    """``evict``, ``pool``, ``pool=0.5`` or ``pool=0.5:by=uniform`` -> a retention.

    Args:
        text: such a text, or a retention already.
        pool, pool_by: ``Retention``'s, where the text does not say them.

    Raises:
        TypeError, ValueError: a text that cannot be read, or a value that does not fit; an option that is given twice.
    """
    if isinstance(text, Retention):
        found: dict[str, Any] = {"name": text.name, "pool": text.pool, "pool_by": text.pool_by}
    elif isinstance(text, str):
        first, *pairs = (part.strip() for part in _split(text, ":"))
        name, mark, written = (part.strip() for part in first.partition("="))
        if name not in RETENTIONS or (mark and not (written and name == "pool")):
            raise ValueError(f"retention must be {_or(RETENTIONS)}, got {text!r}; a pool is written pool=0.25 or pool=0.25:by=uniform")
        found = {"name": name, "pool": value(written) if mark else None, "pool_by": None}
        for each in pairs:
            option, held = pair(each, "retention options are", f" in {text!r}")
            if option != "by" or found["pool_by"] is not None:
                raise ValueError(f"retention options are by=RANKING, once, got {option!r} in {text!r}")
            found["pool_by"] = held
    else:
        raise ValueError(f"retention must be one of {', '.join(RETENTIONS)}; got {text!r}")
    for option, given in (("pool", pool), ("pool_by", pool_by)):
        if given is not None and found[option] is not None:
            raise ValueError(f"{option} must be given once, got retention={str(text)!r} and {option}={given!r}; leave one of them out")
        found[option] = given if found[option] is None else found[option]
    return Retention(**found)


def _or(names: Collection[str]) -> str:
    """``a, b or c``."""
    *first, last = names
    return f"{', '.join(first)} or {last}"


def calls(text: str, kind: str = "reducer") -> list[Call]:
    """``tome:keep=0.5+aim`` -> calls, in order.

    Raises:
        ValueError: as :func:`call`; nothing stands beside a ``+``.
    """
    parts = [part.strip() for part in _split(text, "+")]
    if len(parts) > 1 and not all(parts):
        raise ValueError(f"a {kind} is missing beside a '+' in {text!r}")
    return [call(part, kind) for part in parts]


def value(text: str) -> Any:
    """Returns a number, list, tuple, quoted text, True, False or None where the text is one in Python, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def split_list(text: str) -> list[str]:
    """``a,b:kept=[(0, 5), (2, 3)]`` -> two parts, stripped; empty ones are left out.

    Raises:
        ValueError: brackets or quotes that do not close.
    """
    return [part.strip() for part in _split(text, ",") if part.strip()]


def of(made: Any) -> Call:
    """Returns the call that makes a policy or a reducer: its options but those at their defaults.

    Raises:
        ValueError: an option holds what no text names (a predictor that was never saved).
    """
    options = {}
    for field in dataclasses.fields(made):
        held = getattr(made, field.name)
        if not field.init or field.metadata.get("bound") or held == field.default:
            continue
        if dataclasses.is_dataclass(held) and hasattr(held, "name"):
            held = of(held)
        elif not isinstance(held, str | int | float | list | tuple | None):
            raise ValueError(f"option {field.name} of {made.name!r} must be a number, a text or a list, got {type(held).__name__}")
        options[field.name] = held
    return Call(made.name, options)


def _row(text: str, reducers: Collection[str]) -> Row:
    made, *labels = (part.strip() for part in _split(text, " as "))
    if len(labels) > 1:
        raise ValueError(f"one name stands behind ' as ', got {text!r}")
    written, *retentions = (part.strip() for part in _split(made, "@"))
    if len(retentions) > 1 or (retentions and re.split("[=:]", retentions[0])[0].strip() not in RETENTIONS):
        asked = "@".join(retentions)
        hint = "" if "=" not in made.split("@")[0] else "; put a value that holds '@' in quotes"
        raise ValueError(f"retention must be {_or(RETENTIONS)}, got {asked!r} in {made!r}{hint}")
    policy, chain = _reducers_apart(written, reducers)
    try:
        held = str(retention(retentions[0])) if retentions else None
    except TypeError as error:
        raise ValueError(str(error)) from None
    return Row(call(policy, "policy"), tuple(chain), held, labels[0] if labels else None, made)


def _reducers_apart(text: str, names: Collection[str]) -> tuple[str, list[Call]]:
    """``fastv:rate=0.5+tome+aim:keep=0.5`` -> the policy's part, and the reducers."""
    parts = _split(text, "+")
    named = [part.strip().partition(":")[0].strip() in names for part in parts]
    first = next((index for index in range(1, len(parts)) if named[index]), len(parts))
    if first > 1 and all(part.strip() for part in parts) and "=" not in parts[0]:  # else a '+' may be part of an option's value
        raise ValueError(f"reducer must be one of {', '.join(names)}; got {parts[1].strip()!r} in {text!r}")
    if not all(part.strip() for part in parts[1:]):
        raise ValueError(f"a reducer is missing beside a '+' in {text!r}")
    return "+".join(parts[:first]).strip(), calls("+".join(parts[first:])) if first < len(parts) else []


def _split(text: str, mark: str) -> list[str]:
    """Parts between the marks that stand outside of brackets and quotes. A quote opens where a value begins (``it's`` is a name)."""
    found, open_brackets, quote, start, index, before = [], [], "", 0, 0, ""
    while index < len(text):
        character = text[index]
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and before in (*_OPEN, *",:="):
            quote = character
        elif character in _OPEN:
            open_brackets.append(character)
        elif character in _CLOSE:
            if not open_brackets or _OPEN.index(open_brackets.pop()) != _CLOSE.index(character):
                raise ValueError(f"brackets must match, got one {character!r} too many in {text!r}")
        elif not open_brackets and text.startswith(mark, index):
            found.append(text[start:index])
            index += len(mark)
            start, before = index, mark[-1]
            continue
        if not character.isspace():
            before = character
        index += 1
    if quote or open_brackets:
        raise ValueError(f"brackets and quotes must close, got {quote or open_brackets[-1]!r} left open in {text!r}")
    return [*found, text[start:]]


def _value_text(option: str, held: Any) -> str:
    """Text that :func:`call` reads as ``held``."""
    if isinstance(held, Call):
        return f"({held})"
    plain = isinstance(held, str) and held == held.strip() and value(held) == held and not any(mark in held for mark in (*_MARKS, " as "))
    if plain and held and not any(character in held for character in (*_OPEN, *_CLOSE, *_QUOTES)):
        return held
    return repr(held)
