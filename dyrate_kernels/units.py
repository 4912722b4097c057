"""Quantities for reading."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """1536 -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def flops_text(count: float) -> str:
    """2.5e9 -> ``2.50 GFLOP``."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if count < 1000:
            return f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TFLOP"
