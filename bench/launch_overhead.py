"""Host time of one operator call with the Triton backend: everything up to the driver call, which is left out. Needs no GPU.

    python bench/launch_overhead.py

A captured decode step pays none of it (``patch(model, cuda_graph=True)``).
"""

from __future__ import annotations

import platform
import statistics
import time

import torch
import triton

from dyrate_kernels.triton_kernels import backend, launch


class _Driver:
    """A compiled kernel whose start does nothing."""

    function, packed_metadata = 0, ()

    def run(self, *arguments: object, **options: object) -> None:
        return None


def _start(self: launch.Launch, device: torch.device, stream: int, tensors: tuple) -> None:
    if self._compiled is None:
        self._compiled = _Driver()
    self._start(stream, tensors)


def measure(call, calls: int = 2000, rounds: int = 9) -> float:
    """Median over rounds, microseconds a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    launch.Launch.start = _start
    batch, heads, dim, visual, text = 1, 32, 128, 576, 128
    query, key = torch.randn(batch, heads, dim), torch.randn(batch, heads, visual + text, dim)
    value = key.clone()
    lengths = torch.full((batch,), 64, dtype=torch.int32)
    types = torch.zeros(batch, text, dtype=torch.uint8)
    kept = torch.zeros(batch, visual, dtype=torch.int32)
    new = {"new_key": query, "new_value": query}
    predictor = {"weight": torch.randn(5, heads * 4), "bias": torch.randn(batch, 5), "rates": torch.rand(5, dtype=torch.float64)}
    rows = (query, key, value, lengths, lengths)
    shared = {"visual_capacity": visual, "scale": 0.1}
    calls = {
        "decode_attention": lambda: backend.decode_attention(*rows, **shared),
        "decode_attention, new row": lambda: backend.decode_attention(*rows, **shared, **new),
        "decode_attention, new row, kept list": lambda: backend.decode_attention(*rows, **shared, **new, kept=kept, n_kept=lengths),
        "decode_step, new row": lambda: backend.decode_step(*rows, **shared, **new, text_type=types, **predictor),
        "select_tokens": lambda: backend.select_tokens(kept.float(), lengths, lengths),
    }
    print(f"host time a call, driver excluded; {platform.machine()}, one thread, torch {torch.__version__}, triton {triton.__version__}")
    for name, call in calls.items():
        call()
        print(f"  {name:38} {measure(call):6.1f} us")


if __name__ == "__main__":
    main()
