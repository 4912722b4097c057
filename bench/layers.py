"""The launches of ``patch(fuse=True)``, each beside its floor and the model's own chain of operations: part of ``bench.operators``.

    python -m bench.layers OUT.json [--toy]

B=1: matrix products with a single row against torch's (cuBLAS); both B: RMSNorm, rotary embedding, gated SiLU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import layers as own
from dyrate_kernels.triton_kernels import interpreted

LIMIT = {torch.bfloat16: 1.2e-2, torch.float32: 1e-5}  # of ||out - ref|| / ||ref|| against float64


@dataclass(frozen=True)
class Text:
    """The sizes of a text model's layer."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int


MODELS = (Text("Vicuna-7B", 4096, 11008, 32, 32, 128), Text("Qwen2-7B", 3584, 18944, 28, 4, 128))
TOY = (Text("toy", 32, 64, 4, 2, 8),)


def rows(toy: bool, bandwidth: float, device: torch.device) -> Iterator[dict[str, Any]]:
    """Everything; nothing where no backend fuses."""
    kernels = own.fused("triton", device) if device.type == "cuda" or interpreted() else None
    if kernels is None:
        return
    for text in TOY if toy else MODELS:
        for batch in (1, 2) if toy else (1, 32):
            yield from _rows(text, batch, kernels, bandwidth, device, torch.float32 if toy else torch.bfloat16)


def _rows(text: Text, batch: int, kernels: Any, bandwidth: float, device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    g = torch.Generator(device=device).manual_seed(0)
    facts: dict[str, Any] = {"group": "layers", "backend": "triton", "model": text.name, "bandwidth": bandwidth, "B": batch,
             "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device).to(dtype)

    def compared(name: str, function: str, sets: Sequence[tuple], moved: int) -> Iterator[dict[str, Any]]:
        """Ours and the model's own on the same inputs, both against float64."""
        want = _flat(getattr(own, function)(*_double(sets[0])))
        for who, call in (("dyrate", getattr(kernels, function)), ("torch", getattr(own, function))):
            calls: list[Callable[[], Any]] = [partial(call, *given) for given in sets]
            errors = [timing.relative(one, other) for one, other in zip(_flat(calls[0]()), want, strict=True)]
            passed = timing.correctness(LIMIT[dtype], output=max(errors))
            times = timing.time_captured(calls) if passed["passed"] else None
            yield timing.row(f"{who} {name}, {text.name}", times, moved=moved, gate=passed, **facts)

    size = dtype.itemsize
    hidden, weight = random(batch, 1, text.hidden), random(text.hidden)
    yield from compared("RMSNorm", "rms_norm", [(hidden, weight, 1e-5)], (2 * batch + 1) * text.hidden * size)
    gate, up = random(batch, 1, text.intermediate), random(batch, 1, text.intermediate)
    yield from compared("gated SiLU", "gate_mul", [(gate, up)], 3 * batch * text.intermediate * size)
    query, key = (random(batch, 1, many, text.dim).transpose(1, 2) for many in (text.heads, text.kv_heads))
    turns = [random(1, 1, text.dim) for _ in range(2)]
    moved = 2 * (batch * (text.heads + text.kv_heads) + 1) * text.dim * size
    yield from compared("rotary embedding", "rotate", [(query, key, *turns)], moved)
    if batch > 1:
        return

    def matrices(columns: int, counts: Sequence[int]) -> tuple[list[list[Tensor]], int]:
        """Sets of weights, more than the L2 cache holds, and the bytes of one."""
        moved = columns * sum(counts) * size
        made = range(timing.copies_for_cold_cache(moved))
        return [[random(count, columns) / columns**0.5 for count in counts] for _ in made], moved

    widths = [many * text.dim for many in (text.heads, text.kv_heads, text.kv_heads)]
    for name, columns, counts in (
        ("query, key and value products", text.hidden, widths),
        ("output product", text.heads * text.dim, [text.hidden]),
        ("down product", text.intermediate, [text.hidden]),
    ):
        sets, moved = matrices(columns, counts)
        x = random(1, 1, columns)
        yield from compared(name, "linears", [(x, weights, [None] * len(weights)) for weights in sets], moved)
    sets, moved = matrices(text.hidden, [text.intermediate] * 2)
    yield from compared("gate and up products with gated SiLU", "gated", [(hidden, *weights) for weights in sets], moved)


def _double(given: Any) -> Any:
    if isinstance(given, Tensor):
        return given.double()
    return type(given)(map(_double, given)) if isinstance(given, list | tuple) else given


def _flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def main() -> None:
    """Command line."""
    from bench.operators import run_and_save

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    if not timing.environment()["measurement"] and not given.toy:
        raise SystemExit("nothing can be measured here: no CUDA device, or TRITON_INTERPRET is set; --toy rehearses")

    def collect(save: Callable[[dict[str, Any]], None]) -> None:
        for row in rows(given.toy, timing.copy_bandwidth()[0], timing.here()):
            save(row)

    raise SystemExit(run_and_save(given.out, collect))


if __name__ == "__main__":
    main()
