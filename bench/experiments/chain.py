"""Launches that follow each other: programmatic dependent launches, experiment 8."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import layers as sizes
from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import layers as own

from . import problems
from .propose import SWITCHES
from .runner import Case, Context, Experiment, Planned, Variant

LAYERS = 4  # of the chain: 1.6 GB of weights, far more than an L2 cache holds
DEPENDENT = {"dependent_launch": True}


@contextlib.contextmanager
def dependent(on: bool) -> Iterator[None]:
    """Every launch is a programmatic dependent one, or none is."""
    from dyrate_kernels.triton_kernels import launch

    launch.override_dependent_launch(on)
    try:
        yield
    finally:
        launch.override_dependent_launch(None)


class Chain:
    """What surrounds attention in decoder layers with one new token, attention left out: norm, query, key and value, output, residual,
    norm, gate and up, down, residual."""

    def __init__(self, text: sizes.Text, dtype: torch.dtype, device: torch.device) -> None:
        g = torch.Generator(device=device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device).to(dtype)

        def weight(rows: int, columns: int) -> Tensor:
            return random(rows, columns) / columns**0.5

        inner = text.heads * text.dim
        self.x = random(1, 1, text.hidden)
        self.layers = [
            {
                "norms": [1 + random(text.hidden) / 10 for _ in range(2)],
                "qkv": [weight(many * text.dim, text.hidden) for many in (text.heads, text.kv_heads, text.kv_heads)],
                "o": weight(text.hidden, inner),
                "gate": weight(text.intermediate, text.hidden),
                "up": weight(text.intermediate, text.hidden),
                "down": weight(text.hidden, text.intermediate),
            }
            for _ in range(LAYERS)
        ]
        parts = [part for layer in self.layers for many in layer.values() for part in (many if isinstance(many, list) else [many])]
        self.bytes = sum(part.numel() * part.element_size() for part in parts)

    def run(self, of: Any, wide: bool = False) -> Tensor:
        """By the functions of ``of``; wide: in float64."""

        def as_it_is(tensor: Tensor) -> Tensor:
            return tensor.double() if wide else tensor

        x = as_it_is(self.x)
        for layer in self.layers:
            first, second = map(as_it_is, layer["norms"])
            query, _, _ = of.linears(of.rms_norm(x, first, 1e-5), [as_it_is(part) for part in layer["qkv"]], [None] * 3)
            x = x + of.linears(query, [as_it_is(layer["o"])], [None])[0]
            inner = of.gated(of.rms_norm(x, second, 1e-5), as_it_is(layer["gate"]), as_it_is(layer["up"]))
            x = x + of.linears(inner, [as_it_is(layer["down"])], [None])[0]
        return x


def around_attention(toy: bool) -> Planned:
    """One row through the layers of Vicuna-7B without their attention."""
    text, dtype = (sizes.TOY[0], torch.float32) if toy else (sizes.MODELS[0], torch.bfloat16)

    def make(context: Context) -> Case:
        chain, kernels = Chain(text, dtype, context.device), own.fused("triton", context.device)
        want = chain.run(own, wide=True)
        limit = 2 * sizes.LIMIT[dtype]  # roundings of several layers

        def right(got: Tensor, number: int) -> dict[str, Any]:
            return timing.correctness(limit, output=timing.relative(got, want))

        calls: list[Callable[[], Any]] = [lambda: chain.run(kernels)]
        variants = [
            Variant("as it is", calls, right, scope=lambda: dependent(False)),
            Variant("dependent launches", calls, right, DEPENDENT, scope=lambda: dependent(True)),
            Variant("torch", [lambda: chain.run(own)], right),
        ]
        return Case(variants, chain.bytes, {"B": 1, "model": text.name, "dtype": str(dtype).removeprefix("torch.")})

    return Planned(f"{LAYERS} layers of {text.name} without attention", make, SWITCHES, "dependent_launch")


def step(toy: bool, heads: str, batch: int, form: str) -> Planned:
    """A call of attention, whose second launch follows the first."""
    of = problems.shape(toy, heads, batch, 2880)

    def make(context: Context) -> Case:
        data = context.data(of)
        calls, gate, moved = problems.call(data, form)
        variants = [
            Variant("as it is", calls, gate, scope=lambda: dependent(False), prepare=data.forget_last_rows),
            Variant("dependent launches", calls, gate, DEPENDENT, scope=lambda: dependent(True), prepare=data.forget_last_rows),
        ]
        return Case(variants, moved, {"sets": data.sets, **of.facts()})

    return Planned(f"dependent launches: {form}, {of.name} B={of.batch} N={of.visual}", make, SWITCHES, "dependent_launch")


def dependents(toy: bool) -> list[Planned]:
    """Experiment 8."""
    if toy:
        return [around_attention(True)]
    found = [around_attention(False)]
    return found + [step(False, heads, batch, form) for batch in (32, 1) for heads in ("mha", "gqa") for form in ("step", "list")]


EXPERIMENTS = [Experiment(8, "programmatic dependent launches", 40, dependents)]
