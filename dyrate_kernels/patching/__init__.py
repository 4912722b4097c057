"""Patching a Hugging Face vision-language model on the instance: ``patch``, ``unpatch``, ``Handle``."""

from dyrate_kernels.quiet import import_transformers

import_transformers()

from dyrate_kernels.patching.api import Handle, patch, unpatch  # noqa: E402

__all__ = ["Handle", "patch", "unpatch"]
