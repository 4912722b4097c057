"""Launches that follow each other: fewer of them, and programmatic dependent ones. Experiment 8."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import expected, operators
from bench import layers as sizes
from dyrate_kernels import ops
from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import layers as own

from . import problems
from .propose import SWITCHES
from .runner import Case, Context, Experiment, Planned, Variant

LAYERS, TOY_LAYERS = 4, 1  # of the chain: 1.6 GB of weights, far more than an L2 cache holds
KEY = "launches"
EPS = 1e-5
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
    """Decoder layers with one new token a sequence, attention left out: norm, query, key and value, output,
    residual, norm, gate and up, down, residual."""

    def __init__(self, text: sizes.Text, layers: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        g = torch.Generator(device=device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device).to(dtype)

        def weight(count: int, columns: int) -> Tensor:
            return random(count, columns) / columns**0.5

        inner = text.heads * text.dim
        self.x = random(rows, 1, text.hidden)
        self.layers: list[dict[str, list[Tensor]]] = [
            {
                "norms": [1 + random(text.hidden) / 10 for _ in range(2)],
                "qkv": [weight(many * text.dim, text.hidden) for many in (text.heads, text.kv_heads, text.kv_heads)],
                "o": [weight(text.hidden, inner)],
                "gated": [weight(text.intermediate, text.hidden) for _ in range(2)],
                "down": [weight(text.hidden, text.intermediate)],
            }
            for _ in range(layers)
        ]
        self.bytes = sum(part.numel() * part.element_size() for layer in self.layers for parts in layer.values() for part in parts)

    def run(self, small: Any, products: Any, form: str = "", wide: bool = False) -> Tensor:
        """The residual stream at the end.

        Args:
            small: whose norms; products: whose products, both as ``ops.layers``.
            form: "residual_norm" or "norm_prologue": one launch for what the other has two or three for.
            wide: in float64.
        """

        def parts(layer: dict[str, list[Tensor]], name: str) -> list[Tensor]:
            return [part.double() for part in layer[name]] if wide else layer[name]

        def linears(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
            return products.linears(x, weights, [None] * len(weights))

        def block(x: Tensor, y: Tensor | None, norm: Tensor, weights: list[Tensor], gated: bool) -> tuple[Tensor, list[Tensor]]:
            """(residual stream, products of it normalised); y: what the block before adds to it."""
            if form == "norm_prologue":
                given = (x, None, norm, EPS) if y is None else (y, x, norm, EPS)
                if not gated:
                    return small.norm_linears(*given, weights, [None] * len(weights))
                total, inner = small.norm_gated(*given, *weights)
                return total, [inner]
            if form == "residual_norm" and y is not None:
                total, normal = small.residual_norm(y, x, norm, EPS)
            else:
                total = x if y is None else x + y
                normal = small.rms_norm(total, norm, EPS)
            return total, [products.gated(normal, *weights)] if gated else linears(normal, weights)

        x, y = self.x.double() if wide else self.x, None
        for layer in self.layers:
            first, second = parts(layer, "norms")
            x, (query, *_) = block(x, y, first, parts(layer, "qkv"), False)
            (y,) = linears(query, parts(layer, "o"))
            x, (inner,) = block(x, y, second, parts(layer, "gated"), True)
            (y,) = linears(inner, parts(layer, "down"))
        assert y is not None  # there is a layer
        return x + y


def around_attention(toy: bool, text: sizes.Text, rows: int) -> Planned:
    """Rows through layers without their attention. With several rows the products are cuBLAS's."""
    dtype, layers = (torch.float32, TOY_LAYERS) if toy else (torch.bfloat16, LAYERS)

    def make(context: Context) -> Case:
        chain, kernels = Chain(text, layers, rows, dtype, context.device), own.fused("triton", context.device)
        products = kernels if rows == 1 else own
        want = chain.run(own, own, wide=True)
        limit = 2 * sizes.LIMIT[dtype]  # roundings of several layers

        def right(got: Tensor, number: int) -> dict[str, Any]:
            return timing.correctness(limit, output=timing.relative(got, want))

        def variant(name: str, form: str, on: bool) -> Variant:
            calls: Sequence[Callable[[], Any]] = [lambda: chain.run(kernels, products, form)]
            changes = ({form: True} if form else {}) | (DEPENDENT if on else {})
            return Variant(name, calls, right, changes, lambda: dependent(on))

        variants = [
            variant("as it is", "", False),
            variant("residual and norm in one launch", "residual_norm", False),
            variant("dependent launches", "", True),
            variant("dependent launches, residual and norm in one", "residual_norm", True),
        ]
        if rows == 1:
            variants.insert(2, variant("residual and norm in the product", "norm_prologue", False))
            variants.append(variant("dependent launches, residual and norm in the product", "norm_prologue", True))
        variants.append(Variant("torch", [lambda: chain.run(own, own)], right))
        return Case(variants, chain.bytes, {"B": rows, "model": text.name, "dtype": str(dtype).removeprefix("torch.")})

    return Planned(f"{layers} layers of {text.name} without attention, {rows} rows", make, SWITCHES, KEY)


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

    return Planned(f"dependent launches: {form}, {of.name} B={of.batch} N={of.visual}", make, SWITCHES, KEY)


def rotation(toy: bool, heads: str, batch: int, form: str) -> Planned:
    """The rotary embedding of query and new key in a launch of its own, and inside attention. Over all rows, or through a list."""
    of = problems.shape(toy, heads, batch, 2880)

    def make(context: Context) -> Case:
        data = context.data(of)
        kernels = own.fused("triton", context.device)
        assert kernels is not None
        g = torch.Generator(device=context.device).manual_seed(7)
        angle = torch.rand(1, of.dim // 2, generator=g, device=context.device) * 6.0
        cos, sin = (torch.cat([part, part], -1).to(of.dtype) for part in (angle.cos(), angle.sin()))
        listed: dict[str, Any] = {"kept": data.kept, "n_kept": data.n_kept} if form == "list" else {}
        picked = sorted({0, of.batch - 1})
        kept = data.kept[picked] if listed else None
        known: dict[int, expected.Attention] = {}

        def right(got: Any, number: int) -> dict[str, Any]:
            if number not in known:
                query, new = (tensor[picked].double()[:, :, None] for tensor in (data.query[number], data.new[number]["new_key"]))
                query, new = (tensor[:, :, 0] for tensor in own.rotate(query, new, cos.double()[None], sin.double()[None]))
                key, value = (tensor[number][picked].double() for tensor in (data.key, data.value))
                key[:, :, -1], value[:, :, -1] = new, data.new[number]["new_value"][picked].double()
                known[number] = expected.attention(query, key, value, of.visual, data.text_type[picked], kept)
            return operators.gate(of, picked, known[number], got)

        def apart(number: int) -> Any:
            new = data.new[number]
            query, key = kernels.rotate(data.query[number][:, :, None], new["new_key"][:, :, None], cos[None], sin[None])
            more: dict[str, Any] = {"new_key": key[:, :, 0], "new_value": new["new_value"]}
            return ops.decode_attention(query[:, :, 0], data.key[number], data.value[number], **more, **data.shared(), **listed)

        def inside(number: int) -> Any:
            more = data.new[number] | data.shared() | listed
            return ops.decode_attention(data.query[number], data.key[number], data.value[number], **more, cos=cos, sin=sin)

        def calls(one: Callable[[int], Any]) -> list[Callable[[], Any]]:
            return [partial(one, number) for number in range(data.sets)]

        variants = [
            Variant("rotary embedding in a launch of its own", calls(apart), right, prepare=data.forget_last_rows),
            Variant("inside attention", calls(inside), right, {"rotary_in_attention": True}, prepare=data.forget_last_rows),
        ]
        return Case(variants, problems.call(data, form)[2], {"sets": data.sets, **of.facts()})

    return Planned(f"rotary embedding: {form}, {of.name} B={of.batch} N={of.visual}", make, SWITCHES, "rotary")


def launches(toy: bool) -> list[Planned]:
    """Experiment 8."""
    if toy:
        return [around_attention(True, sizes.TOY[0], 1), rotation(True, "mha", 1, "list")]
    found = [around_attention(False, text, rows) for rows in (1, 32) for text in sizes.MODELS]
    found += [rotation(False, heads, batch, "list") for batch in (1, 32) for heads in ("mha", "gqa")]
    return found + [step(False, heads, batch, form) for batch in (32, 1) for heads in ("mha", "gqa") for form in ("step", "list")]


EXPERIMENTS = [Experiment(8, "fewer launches around attention, and dependent ones", 40, launches)]
