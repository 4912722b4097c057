"""Methods that one instance gets in place of its class's, and how each is given back whatever happened to the instance meanwhile."""

from __future__ import annotations

import inspect
from typing import Any


class Override:
    """Stands on an instance in place of a method, and asks ``handler.answer(original, *args, **kwargs)`` named ``answer``.

    What the instance had of its own under that name (a wrapper of the user's) is what ``original`` calls, and is there again after
    ``remove``. A wrapper that was put around this one later stays where it is: what it calls passes on to the original from then on.
    A deep copy of the model has overrides of its own, which ask the copy of the handler.

    Args:
        owner: the instance.
        name: of its method.
        handler: an object; answer: name of its method, which receives the original and the arguments of the call.
    """

    def __init__(self, owner: Any, name: str, handler: Any, answer: str) -> None:
        self.owner, self.name, self.handler, self.answer = owner, name, handler, answer
        attributes = vars(owner)
        self.had_own = name in attributes
        self.own = attributes.get(name)
        self.active = True
        attributes[name] = self

    @property
    def original(self) -> Any:
        """Returns what is called without this override: the instance's own function, else its class's method."""
        return self.own if self.had_own else getattr(type(self.owner), self.name).__get__(self.owner)

    @property
    def __signature__(self) -> inspect.Signature:  # transformers looks up the arguments of these methods
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.original(*args, **kwargs)
        return getattr(self.handler, self.answer)(self.original, *args, **kwargs)

    def remove(self) -> None:
        """Gives the method back."""
        self.active, self.handler = False, None
        attributes = vars(self.owner)
        if attributes.get(self.name) is not self:
            return  # wrapped by someone since: theirs stays
        if self.had_own:
            attributes[self.name] = self.own
        else:
            del attributes[self.name]
