"""Frozen dataclasses by name, made from options or from text: policies and reducers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from dyrate_kernels import specs


class Entry(Protocol):
    """A class of a registry: a dataclass with a class attribute ``name``."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Entry)
C = TypeVar("C", bound=Entry)
_BY_KIND: dict[str, Registry[Any]] = {}  # for classes that take others by their text, which no registry can be imported into


def parse(kind: str, text: str) -> Any:
    """Makes what a text names, of the registry of this kind."""
    return _BY_KIND[kind].parse(text)


class Registry(Generic[T]):
    """Classes by their ``name``.

    Args:
        kind: what they are, for messages.
        classes: dataclasses with a class attribute ``name``. A field with ``metadata["bound"]`` is no option.
        base: of all of them, for those that are registered later.
    """

    def __init__(self, kind: str, classes: Sequence[type[T]], base: type[T]) -> None:
        self.kind, self.base = kind, base
        self.own = frozenset(cls.name for cls in classes)
        _BY_KIND[kind] = self
        self.by_name: dict[str, type[T]] = {cls.name: cls for cls in classes}

    def register(self, cls: type[C]) -> type[C]:
        """Lets a class of your own be named wherever one of the package can, in this process; may stand above it as a decorator.

        A class that was registered under the same name before gives way, as when a cell of a notebook runs again.

        Args:
            cls: a frozen dataclass below ``base``, whose ``name`` is letters, digits and underscores, and none of the package's.

        Raises:
            TypeError: it is no such class.
            ValueError: its name cannot be one, or is the package's.
        """
        given: Any = cls  # which mypy would narrow
        if not (isinstance(given, type) and issubclass(given, self.base)):
            raise TypeError(f"a {self.kind} must be a class below {self.base.__name__}, got {cls!r}; give the class, not one made of it")
        settings = cls.__dict__.get("__dataclass_params__")
        if settings is None or not settings.frozen:
            raise TypeError(f"{cls.__name__} must be a frozen dataclass: write @dataclass(frozen=True) above it, below the registration")
        name = cls.__dict__.get("name")
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"{cls.__name__}.name must be letters, digits and underscores, got {name!r}: name: ClassVar[str] = ..")
        if name in self.own:
            raise ValueError(f"{cls.__name__}.name must not be that of a {self.kind} of the package, got {name!r}")
        self.by_name[name] = given
        return cls

    def names(self) -> list[str]:
        """The names that ``get`` knows."""
        return list(self.by_name)

    def options(self, name: str) -> list[str]:
        """The options of ``name``.

        Raises:
            ValueError: nothing has this name.
        """
        fields = dataclasses.fields(self.lookup(name))
        return [field.name for field in fields if field.init and not field.metadata.get("bound")]

    def get(self, name: str, **options: Any) -> T:
        """``name`` with these options.

        Raises:
            ValueError: nothing has this name, or an option's value is out of range.
            TypeError: it has no such option, or an option's value is of the wrong type.
        """
        cls, known = self.lookup(name), self.options(name)
        for option in options:
            if option not in known:
                raise TypeError(f"{self.kind} {name!r} has no option {option!r}; it has {', '.join(known)}")
        return cls(**options)

    def parse(self, text: str, **options: Any) -> T:
        """Makes what a text names: ``fastv:k=2:rate=0.75``.

        Args:
            options: beside those of the text, and before them.

        Raises:
            ValueError, TypeError: as ``specs.call`` and :meth:`get`.
        """
        return self.make(specs.call(text, self.kind), **options)

    def make(self, call: specs.Call, **options: Any) -> T:
        """Makes what a call names; one in the place of a value is made first."""
        given = {name: self.make(value) if isinstance(value, specs.Call) else value for name, value in call.options.items()}
        return self.get(call.name, **{**given, **options})

    def lookup(self, name: str) -> type[T]:
        """The class.

        Raises:
            ValueError: nothing has this name.
        """
        if not isinstance(name, str) or name not in self.by_name:
            raise ValueError(f"{self.kind} must be one of {', '.join(self.by_name)}, got {name!r}")
        return self.by_name[name]
