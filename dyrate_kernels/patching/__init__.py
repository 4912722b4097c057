"""Patching a Hugging Face vision-language model on the instance: ``patch``, ``unpatch``, ``Handle``."""

from dyrate_kernels.patching.api import Handle, patch, unpatch

__all__ = ["Handle", "patch", "unpatch"]
