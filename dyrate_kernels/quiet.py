"""Importing transformers without what other packages say about themselves on the way.

transformers imports torchao, accelerate and, in its trainer, peft and bitsandbytes wherever they are installed, asked for or not, and
they name each of their libraries that was built for another Python or torch. Whoever uses them imports them without us and sees that.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator

_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "bitsandbytes.cextension")  # loggers


@contextlib.contextmanager
def _errors_alone() -> Iterator[None]:
    def severe(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(severe)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(severe)


def import_transformers(module: str = "modeling_utils") -> None:
    """Imports ``transformers.<module>``; the default is what every model needs, and brings all that is imported unasked."""
    with _errors_alone():
        importlib.import_module(f"transformers.{module}")
