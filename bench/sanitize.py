"""Launches every kernel once, on small inputs made on the CPU: what compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitize
    python -m bench.sanitize --forms        # what settings turn on that are off as shipped, and paged rows, instead

Without torch's caching every tensor is an allocation of its own, so that a read or write past one is seen. Exit status 1 where a result is
not the reference's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import dyrate_kernels as dk
from dyrate_kernels import ops
from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import cuda, layer_settings, layers

FEW = ("decode_attention with a new row", "decode_attention with statistics", "decode_step")  # under each form of FORMS
FORMS: dict[str, dict[str, Any]] = {  # of the attention kernel: fields of plan.Settings
    "two launches": {"decision": "two_launches"},
    "combined apart": {"combine": "second_launch"},
    "tensor cores": {"tensor_cores": True},
    "rows of warps": {"tensor_cores": True, "warp_rows": True},
    "logits of 16": {"logit_bytes": 2},
}
CUDA_FORMS: dict[str, dict[str, int]] = {  # fields of ops.cuda.Settings
    "registers": {"stages": 1},
    "4 stages": {"stages": 4, "tensor_cores": 1},
    "bulk": {"bulk": 1},
}


def launches(device: torch.device, backend: str, few: bool = False) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(what, got, want) of every kernel, on ragged inputs with a dead tail; few: of ``FEW`` and a kept list alone."""
    g = torch.Generator().manual_seed(0)
    toy = device.type == "cpu"
    dtype = torch.float16
    batch, capacity, text, dim = (2, 20, 5, 16) if toy else (3, 150, 21, 64)
    n_visual = torch.tensor([capacity - 3, 1, 0][:batch], dtype=torch.int32)
    n_text = torch.tensor([text, 1, 3][:batch], dtype=torch.int32)
    found: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    for heads, kv_heads in ((2, 2), (8, 2)):

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=g).to(dtype)

        plain = {
            "query": random(batch, heads, dim),
            "key": random(batch, kv_heads, capacity + text, dim),
            "value": random(batch, kv_heads, capacity + text, dim),
            "n_visual": n_visual,
            "n_text": n_text,
        }
        types = {"text_type": torch.randint(0, 4, (batch, text), generator=g).to(torch.uint8)}
        new = {"new_key": random(batch, kv_heads, dim), "new_value": random(batch, kv_heads, dim)}
        window = {
            "position": torch.arange(capacity + text, dtype=torch.int32).repeat(batch, 1),
            "query_position": torch.full((batch,), capacity + text, dtype=torch.int32),
        }
        linear = {
            "weight": torch.randn(5, 4 * heads, generator=g),
            "bias": torch.tensor([0.0, 0.0, 0.0, 50.0, 0.0]),
            "rates": torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64),
        }
        problems: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
            "decode_attention": (ops.decode_attention, plain, {}),
            "decode_attention with statistics": (ops.decode_attention, {**plain, **types}, {"mass": True, "importance": True}),
            "decode_attention with a new row": (ops.decode_attention, {**plain, **new}, {}),
            "decode_attention in a window": (ops.decode_attention, {**plain, **window}, {"window": 30}),
            "score_last_query": (ops.score_last_query, {**plain, **types}, {}),
            "decode_step": (ops.decode_step, {**plain, **types, **linear, **new}, {}),
        }
        for what, (operator, tensors, options) in problems.items():
            if few and what not in FEW:
                continue
            results = []
            for where, which in ((device, backend), (torch.device("cpu"), "reference")):
                moved = {name: tensor.to(where, copy=True) for name, tensor in tensors.items()}
                results.append((operator(**moved, **options, visual_capacity=capacity, backend=which), moved))
            (got, after), (want, reference) = results
            found += [(f"{what} {heads}/{kv_heads}", a, b) for a, b in zip(got, want, strict=True) if a is not None]
            found += [(f"{what} {heads}/{kv_heads}, {name}", after[name], reference[name]) for name in ("key", "value")]
            if what == "decode_step":
                found += follow_ups(got, after, want, reference, backend, capacity, few)
    return found if few else found + fused_layers(device, backend)


def fused_layers(device: torch.device, backend: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Returns results of what ``patch(fuse=True)`` launches, at sizes that fill no tile; nothing for a backend that fuses nothing."""
    kernels = layers.fused(backend, device)
    if kernels is None:
        return []
    g = torch.Generator().manual_seed(2)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g).to(torch.float16)

    x, weight, up = random(1, 1, 150), random(33, 150) / 12, random(33, 150) / 12
    query, key = random(3, 2, 5, 20).transpose(1, 2), random(3, 2, 3, 20).transpose(1, 2)
    problems = {
        "rms_norm": (random(3, 2, 150), random(150), 1e-5),
        "gate_mul": (random(3, 2, 150), random(3, 2, 150)),
        "rotate": (query, key, random(3, 2, 20), random(3, 2, 20)),
        "linears": (x, [weight, up], [None, random(33)]),
        "gated": (x, weight, up),
    }
    found = []
    for name, given in problems.items():
        got = getattr(kernels, name)(*_to(given, device))
        want = getattr(layers, name)(*given)
        found += [(name, a, b) for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (got, want)), strict=True)]
    return found


def _to(given, device):
    if isinstance(given, torch.Tensor):
        return given.to(device, copy=True)
    return type(given)(_to(part, device) for part in given) if isinstance(given, list | tuple) else given


def few_rows(device: torch.device, backend: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Products with several rows, with and without splits, norms that add to the residual stream, and norms in a product."""
    kernels = layers.fused(backend, device)
    if kernels is None:
        return []
    g = torch.Generator().manual_seed(5)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g).to(torch.float16)

    weight, up, norm = random(33, 150) / 12, random(33, 150) / 12, random(150)
    one, several, stream = random(1, 1, 150), random(3, 1, 150), random(3, 1, 150)
    problems: list[tuple[str, tuple, int]] = [(name, given, splits) for splits in (1, 3) for name, given in (
        ("linears", (several, [weight, up], [random(33), random(33)])), ("gated", (several, weight, up)),
    )]  # fmt: skip
    problems += [
        ("residual_norm", (several, stream, norm, 1e-5), 1),
        ("norm_linears", (one, random(1, 1, 150), norm, 1e-5, [weight, up], [None, None]), 1),
        ("norm_gated", (one, random(1, 1, 150), norm, 1e-5, weight, up), 1),
    ]
    found = []
    for name, given, splits in problems:
        tile = layer_settings.Tile(columns=32, splits=splits)
        products = {layer_settings.problem(kind, count, 150): ((1, 64, tile),) for kind, count in (("linear", 66), ("gated", 33))}
        layer_settings.override(layer_settings.LayerSettings(products=products))
        try:
            got, want = getattr(kernels, name)(*_to(given, device)), getattr(layers, name)(*given)
        finally:
            layer_settings.override(None)
        found += [(f"{name}, {splits} splits", a, b) for a, b in zip(_flat(got), _flat(want), strict=True)]
    return found


def _flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [tensor for part in result for tensor in _flat(part)]


def paged(device: torch.device, backend: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Paged rows in blocks of random order, several query rows a sequence; nothing for a backend without a paged form."""
    if backend == "cuda":
        return []
    toy = device.type == "cpu"
    visual, text, dim, block = (20, 5, 16, 16) if toy else (150, 21, 64, 16)
    found: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    g = torch.Generator().manual_seed(6)
    blocks = -(-(visual + text) // block)
    for heads, kv_heads in ((2, 2), (8, 2)):
        n_rows = torch.tensor([visual + text - 1, visual + text, visual + 2], dtype=torch.int32)  # two of a sequence, one of another
        tensors = {
            "query": torch.randn(3, heads, dim, generator=g).half(),
            "key": torch.randn(2 * blocks, block, kv_heads, dim, generator=g).half(),
            "value": torch.randn(2 * blocks, block, kv_heads, dim, generator=g).half(),
            "block_table": torch.randperm(2 * blocks, generator=g).view(2, blocks).int(),
            "n_rows": n_rows,
        }
        lists = {
            "sequence": torch.tensor([0, 0, 1], dtype=torch.int32),
            "n_visual": torch.full((3,), visual, dtype=torch.int32),
            "visual_position": torch.arange(visual, dtype=torch.int32).repeat(2, 1),
            "text_position": torch.arange(visual, visual + text, dtype=torch.int32).repeat(2, 1),
            "text_type": torch.randint(0, 4, (2, text), generator=g).to(torch.uint8),
        }
        count = torch.full((3,), visual // 3, dtype=torch.int32)
        results = []
        for where, which in ((device, backend), (torch.device("cpu"), "reference")):
            given: dict[str, Any] = {name: tensor.to(where) for name, tensor in tensors.items()}
            more: dict[str, Any] = {name: tensor.to(where) for name, tensor in lists.items()}
            step = ops.paged_step(*given.values(), **more, count=count.to(where), backend=which)
            del more["visual_position"]
            more |= {"kept": step.kept, "n_kept": step.n_kept}
            listed = ops.paged_attention(*given.values(), **more, mass=True, importance=True, backend=which)
            plain = ops.paged_attention(*given.values(), sequence=more["sequence"], backend=which)
            results.append((*step, *listed, plain.output))
        names = [f"paged_step {part}" for part in ("output", "mass", "importance", "kept", "n_kept", "rate")]
        names += [f"paged list {part}" for part in ("output", "mass", "importance")] + ["paged_attention"]
        found += [(f"{name} {heads}/{kv_heads}", a, b) for name, a, b in zip(names, *results, strict=True)]
    return found


def follow_ups(got, after, want, reference, backend, capacity, few=False):
    """Returns results behind a decision: reading the kept list (few: that alone), eviction, reordering, selection, prediction alone."""
    outcomes = []
    for step, tensors, which in ((got, after, backend), (want, reference, "reference")):
        rows = ("query", "key", "value", "n_visual", "n_text")
        listed = {"kept": want.kept.to(step.kept.device), "n_kept": step.n_kept}
        narrow = ops.decode_attention(*(tensors[name] for name in rows), **listed, visual_capacity=capacity, backend=which)
        if few:
            outcomes.append((narrow.output,))
            continue
        score = want.importance.to(step.kept.device)
        kept, n_kept = ops.select_tokens(score, step.n_kept, tensors["n_visual"], backend=which)
        wide = torch.rand(2, 9000, generator=torch.Generator().manual_seed(1)).to(score.device)
        counts = torch.tensor([700, 9000], dtype=torch.int32, device=score.device)
        chunks, _ = ops.select_tokens(wide, counts, counts.clamp(min=8999), backend=which)
        linear = (tensors[name] for name in ("weight", "bias", "rates"))
        rate, index = ops.predict_rate(want.mass.to(score.device), *linear, backend=which)
        moved = [tensors["key"].clone(), tensors["value"].clone()]
        ops.compact_(moved, kept, n_kept, tensors["n_visual"], backend=which)
        ops.reorder_(moved, torch.arange(score.shape[0], device=score.device).flip(0), backend=which)
        outcomes.append((narrow.output, kept, n_kept, chunks, rate, index, *moved))
    names = ("kept list", "select_tokens", "select_tokens, count", "select_tokens, 9000", "predict_rate", "class", "key", "value")
    return list(zip(names[:1] if few else names, *outcomes, strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", action="store_true")
    given = parser.parse_args()
    device = timing.here()
    states = dk.backends()
    usable = [name for name in ("triton", "cuda") if states[name] == "available"]
    if not usable:
        print(f"no compiled kernels can run: {states}")
        sys.exit(1)
    wrong = forms(device, usable) if given.forms else every(device, usable)
    if device.type == "cuda":
        torch.cuda.synchronize()
    sys.exit(1 if wrong else 0)


def every(device: torch.device, usable: list[str]) -> int:
    """All kernels as they are shipped, with the decision in each of its places; how many results are wrong."""
    from dyrate_kernels.triton_kernels import plan

    wrong = 0
    for where in plan.DECISIONS if "triton" in usable else ():
        with triton_settings(device, decision=where):
            wrong += compare("triton", where, launches(device, "triton"))
    return wrong + (compare("cuda", "", launches(device, "cuda")) if "cuda" in usable else 0)


def forms(device: torch.device, usable: list[str]) -> int:
    """Runs what is off as shipped, and paged rows; returns how many results are wrong."""
    from dyrate_kernels.triton_kernels import launch

    wrong = 0
    if "triton" in usable:
        for name, changes in FORMS.items():
            with triton_settings(device, **changes):
                wrong += compare("triton", name, launches(device, "triton", few=True))
        for on in (False, True):
            launch.override_dependent_launch(on)
            try:
                if on and not launch.dependent_launch(device):
                    break  # the device has no such thing
                how = "dependent" if on else ""
                wrong += compare("triton", how, [*few_rows(device, "triton"), *paged(device, "triton")])
                if on:
                    wrong += compare("triton", how, launches(device, "triton", few=True) + fused_layers(device, "triton"))
            finally:
                launch.override_dependent_launch(None)
    if "cuda" in usable:
        for name, changes in CUDA_FORMS.items():
            cuda.override = dataclasses.replace(cuda.settings(torch.cuda.get_device_name(device)), **changes)
            try:
                wrong += compare("cuda", name, launches(device, "cuda", few=True))
            finally:
                cuda.override = None
    return wrong


@contextlib.contextmanager
def triton_settings(device: torch.device, **changes: Any) -> Iterator[None]:
    """The Triton kernels with other settings than those of the device."""
    from dyrate_kernels.triton_kernels import plan

    usual = plan.settings(plan.INTERPRETED if device.type == "cpu" else torch.cuda.get_device_name(device), 1, 64, 2, "score")
    plan.override(dataclasses.replace(usual, **changes))
    try:
        yield
    finally:
        plan.override(None)


def compare(backend: str, how: str, found: list[tuple[str, torch.Tensor, torch.Tensor]]) -> int:
    """Prints every result; how many are wrong."""
    wrong = 0
    for what, got, want in found:
        close = torch.allclose(got.cpu().double(), want.double(), atol=5e-3, rtol=5e-3, equal_nan=True)
        print(f"{'ok' if close else 'WRONG':<6} {backend:<7} {how:<14} {what}", flush=True)
        wrong += not close
    return wrong


if __name__ == "__main__":
    main()
