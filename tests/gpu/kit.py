"""Parts shared by the tests of this folder: the device under test, the float64 reference, shapes, comparison."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.ops import spec

BACKENDS = ("triton", "cuda")  # backends under test; each runs every test that takes the fixture ``kit``
ON_GPU = torch.cuda.is_available()
REHEARSAL = os.environ.get("DYRATE_GPU_TESTS_ON_CPU") == "1" and not ON_GPU

DTYPES = (torch.float32, torch.float16) if REHEARSAL else (torch.float32, torch.float16, torch.bfloat16)
HALF = torch.float16 if REHEARSAL else torch.bfloat16
# of ||got - want|| / ||want||; want is the float64 result on the same rounded inputs, so this is the rounding of output and weights
OUTPUT = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
STATISTICS = 2e-5  # absolute, of mass and importance, which are float32 whatever the inputs

# batch, heads, kv_heads, dim, visual capacity, text capacity, visual lengths, text lengths
Case = tuple[int, int, int, int, int, int, list[int], list[int]]
LARGE: list[Case] = [
    (5, 8, 8, 128, 640, 160, [576, 0, 1, 577, 131], [97, 33, 1, 160, 0]),
    (3, 28, 4, 128, 3008, 256, [2880, 1441, 63], [128, 255, 7]),
    (2, 32, 32, 128, 2900, 130, [2880, 2879], [128, 1]),
]


@dataclass(frozen=True)
class Kit:
    """Where the operators under test run, and which backend runs them."""

    device: torch.device
    backend: str

    def to(self, arguments: Any) -> Any:
        """The same with every tensor on the device."""
        if isinstance(arguments, Tensor):
            return arguments.to(self.device, copy=True)
        if isinstance(arguments, dict):
            return {name: self.to(value) for name, value in arguments.items()}
        return type(arguments)(self.to(value) for value in arguments) if isinstance(arguments, list | tuple) else arguments

    def poison(self) -> None:
        """Fills memory that the next call may be given with NaN: torch's free blocks and the backend's scratch buffers."""
        if self.device.type == "cuda":
            blocks = [torch.full((1 << 17,), float("nan"), device=self.device) for _ in range(32)]
            blocks += [torch.full((1 << 22,), float("nan"), device=self.device) for _ in range(4)]
            del blocks
        for name, buffer in self.scratch():
            if name != "counters":
                buffer.fill_(float("nan"))

    def scratch(self) -> Iterator[tuple[str, Tensor]]:
        """(name, buffer) of what the backend keeps from call to call."""
        if self.backend in ("triton", "cuda"):
            from dyrate_kernels.ops import workspace

            for space in workspace.living():
                yield from space.buffers().items()

    def assert_counters_at_zero(self) -> None:
        for name, buffer in self.scratch():
            if name == "counters":
                assert not buffer.any(), "a counter was left behind"

    @contextmanager
    def decision(self, where: str, arguments: dict[str, Any]) -> Iterator[None]:
        """Lets the backend decide in the attention's own launch (``"same_launch"``), in one more (``"second_launch"``) or in two
        (``"two_launches"``)."""
        if self.backend != "triton":
            yield
            return
        from dyrate_kernels.triton_kernels import plan

        query, key = arguments["query"], arguments["key"]
        name = plan.INTERPRETED if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        usual = plan.settings(name, query.shape[1] // key.shape[1], query.shape[2], query.element_size(), "score")
        plan.override(dataclasses.replace(usual, decision=where))
        try:
            yield
        finally:
            plan.override(None)


def problem(case: Case, dtype: torch.dtype, *, window: bool = False, seed: int = 0, poison: bool = True) -> dict[str, Any]:
    """Arguments of an attention operator on the CPU; every dead row holds NaN."""
    arguments = spec.problem(*case, dtype=dtype, seed=seed, poison=poison)
    if not window:
        del arguments["position"], arguments["query_position"]
    return arguments


def exact(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same rounded numbers in float64, on the CPU."""
    return {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for name, value in arguments.items()}


def relative(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||``; NaN never passes a comparison with it."""
    difference = (got.detach().double().cpu() - want.double()).norm()
    return float(difference / want.double().norm().clamp(min=1e-30))


def assert_output(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Close in norm, and row by row; rows that are zero or NaN in the reference are so too."""
    assert got.dtype == dtype
    got, want = got.detach().double().cpu(), want.double()
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(0.0, 0.0, 0.0), want.nan_to_num(0.0, 0.0, 0.0)
    error, size = (got - want).norm(dim=-1), want.norm(dim=-1)
    assert (error <= 4 * OUTPUT[dtype] * size).all(), f"worst row: {float((error / size.clamp(min=1e-30)).max()):.2e}"
    assert relative(got, want) <= OUTPUT[dtype]


def assert_statistics(got: Tensor, want: Tensor) -> None:
    """mass or importance."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    got = got.detach().double().cpu()
    assert torch.allclose(got, want.double(), atol=STATISTICS, rtol=0, equal_nan=True), float((got - want).abs().max())


def assert_kept(kept: Tensor, n_kept: Tensor, score: Tensor, counts: list[int], n_visual: list[int], alive: Tensor | None = None) -> None:
    """The kept list is the one that a loop over ``score``, the kernel's own, gives."""
    kept, n_kept, score = kept.cpu(), n_kept.cpu(), score.detach().cpu()
    assert kept.dtype == n_kept.dtype == torch.int32
    for b, (count, n) in enumerate(zip(counts, n_visual, strict=True)):
        want = spec.select(score[b].tolist(), count, n, None if alive is None else alive[b].tolist())
        assert int(n_kept[b]) == len(want), (b, int(n_kept[b]), len(want))
        assert kept[b].tolist() == want + [-1] * (kept.shape[1] - len(want)), b


def predictor(heads: int, classes: int = 5, seed: int = 3) -> dict[str, Tensor]:
    """weight, bias, rates of a predictor whose answer depends on the sequence."""
    g = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(classes, heads * 4, generator=g),
        "bias": torch.randn(classes, generator=g) * 0.1,
        "rates": torch.linspace(0, 1, classes + 1, dtype=torch.float64)[:classes],
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
