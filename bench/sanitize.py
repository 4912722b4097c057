"""Launches every kernel once, on small inputs made on the CPU: what compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m bench.sanitize

Without torch's caching every tensor is an allocation of its own, so that a read or write past one is seen. Exit status 1 where a result is
not the reference's.
"""

from __future__ import annotations

import dataclasses
import sys

import torch

import dyrate_kernels as dk
from dyrate_kernels import ops
from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import layers


def launches(device: torch.device, backend: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(what, got, want) of every kernel, on ragged inputs with a dead tail."""
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
        problems = {
            "decode_attention": (ops.decode_attention, plain, {}),
            "decode_attention with statistics": (ops.decode_attention, {**plain, **types}, {"mass": True, "importance": True}),
            "decode_attention with a new row": (ops.decode_attention, {**plain, **new}, {}),
            "decode_attention in a window": (ops.decode_attention, {**plain, **window}, {"window": 30}),
            "score_last_query": (ops.score_last_query, {**plain, **types}, {}),
            "decode_step": (ops.decode_step, {**plain, **types, **linear, **new}, {}),
        }
        for what, (operator, tensors, options) in problems.items():
            results = []
            for where, which in ((device, backend), (torch.device("cpu"), "reference")):
                moved = {name: tensor.to(where, copy=True) for name, tensor in tensors.items()}
                results.append((operator(**moved, **options, visual_capacity=capacity, backend=which), moved))
            (got, after), (want, reference) = results
            found += [(f"{what} {heads}/{kv_heads}", a, b) for a, b in zip(got, want, strict=True) if a is not None]
            found += [(f"{what} {heads}/{kv_heads}, {name}", after[name], reference[name]) for name in ("key", "value")]
            if what == "decode_step":
                found += follow_ups(got, after, want, reference, backend, capacity)
    return found + fused_layers(device, backend)


def fused_layers(device: torch.device, backend: str) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What ``patch(fuse=True)`` launches, at sizes that fill no tile; nothing for a backend that fuses nothing."""
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


def follow_ups(got, after, want, reference, backend, capacity):
    """What follows a decision: reading the kept list, eviction, reordering, selection and prediction alone."""
    outcomes = []
    for step, tensors, which in ((got, after, backend), (want, reference, "reference")):
        rows = ("query", "key", "value", "n_visual", "n_text")
        listed = {"kept": want.kept.to(step.kept.device), "n_kept": step.n_kept}
        narrow = ops.decode_attention(*(tensors[name] for name in rows), **listed, visual_capacity=capacity, backend=which)
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
    return list(zip(names, *outcomes, strict=True))


def main() -> None:
    """Command line."""
    device = timing.here()
    states = dk.backends()
    usable = [name for name in ("triton", "cuda") if states[name] == "available"]
    if not usable:
        print(f"no compiled kernels can run: {states}")
        sys.exit(1)
    decisions = ("same_launch", "second_launch", "two_launches")
    wrong = sum(triton_placement(where, device) for where in decisions) if "triton" in usable else 0
    wrong += compare(device, "cuda", "") if "cuda" in usable else 0
    if device.type == "cuda":
        torch.cuda.synchronize()
    sys.exit(1 if wrong else 0)


def triton_placement(where: str, device: torch.device) -> int:
    """Compares the Triton kernels with the decision in the attention's launch or in those after it; how many results are wrong."""
    from dyrate_kernels.triton_kernels import plan

    usual = plan.settings(plan.INTERPRETED if device.type == "cpu" else torch.cuda.get_device_name(device), 1, 64, 2, "score")
    plan.override(dataclasses.replace(usual, decision=where))
    try:
        return compare(device, "triton", where)
    finally:
        plan.override(None)


def compare(device: torch.device, backend: str, how: str) -> int:
    """Prints every result of :func:`launches`; how many are wrong."""
    wrong = 0
    for what, got, want in launches(device, backend):
        close = torch.allclose(got.cpu().double(), want.double(), atol=5e-3, rtol=5e-3, equal_nan=True)
        print(f"{'ok' if close else 'WRONG':<6} {backend:<7} {how:<14} {what}", flush=True)
        wrong += not close
    return wrong


if __name__ == "__main__":
    main()
