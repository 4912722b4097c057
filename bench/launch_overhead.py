"""Host time of one eager call with the compiled backends: everything up to the driver call, which is left out. Needs no GPU.

Each call twice: of the backend's own function, as a patched model makes it, and of the public operator, which checks what it has not seen
before. Beside them what torch's own attention takes on the CPU for one row, as a measure of the machine's host speed.

    OMP_NUM_THREADS=1 python -m bench.launch_overhead

Backends that cannot be had here (Triton not installed, no g++ for the emulated extension) are left out, with the reason. A captured decode
step pays none of it (``patch(model, cuda_graph=True)``).
"""

from __future__ import annotations

import platform
import statistics
import time
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dyrate_kernels import ops
from dyrate_kernels.ops import dispatch, library


class _Driver:
    """A compiled kernel whose start does nothing."""

    function, packed_metadata = 0, ()

    def run(self, *arguments: object, **options: object) -> None:
        return None


def triton_backend() -> tuple[str, ModuleType]:
    """(name with version, the backend) with every kernel compiled to nothing."""
    import triton

    from dyrate_kernels import triton_kernels
    from dyrate_kernels.triton_kernels import launch

    def start(self: Any, device: torch.device, stream: int, tensors: tuple) -> None:
        if self._compiled is None:
            self._compiled = _Driver()
        self._start(stream, tensors)

    launch.Launch.start = start
    return f"triton {triton.__version__}", triton_kernels


def cuda_backend() -> tuple[str, ModuleType]:
    """(name, the backend) over the emulated extension, whose launches check everything and start nothing."""
    from dyrate_kernels import native
    from dyrate_kernels.ops import cuda
    from tests.emulated import build

    reason = build.missing_reason()
    if reason is not None:
        raise ImportError(reason)
    module = build.load()
    module.configure(3, 0, 1)
    native._import = lambda: (module, None)  # type: ignore[assignment]  # a stand-in
    return "cuda", cuda


def measure(call: Any, calls: int = 2000, rounds: int = 9) -> float:
    """Median over rounds, microseconds a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def calls_of(backend: ModuleType) -> dict[str, Any]:
    batch, heads, dim, visual, text = 1, 32, 128, 576, 128
    query, key = torch.randn(batch, heads, dim), torch.randn(batch, heads, visual + text, dim)
    value = key.clone()
    lengths = torch.full((batch,), 64, dtype=torch.int32)
    types = torch.zeros(batch, text, dtype=torch.uint8)
    kept = torch.zeros(batch, visual, dtype=torch.int32)
    new = {"new_key": torch.randn(batch, heads, dim), "new_value": torch.randn(batch, heads, dim)}
    predictor = {"weight": torch.randn(5, heads * 4), "bias": torch.randn(batch, 5), "rates": torch.rand(5, dtype=torch.float64)}
    layers = [tensor.clone() for tensor in (key, value) for _ in range(30)]
    rows = (query, key, value, lengths, lengths)
    shared = {"visual_capacity": visual, "scale": 0.1}
    attend, step = backend.decode_attention, backend.decode_step
    if backend is not ops:  # what a backend is given, as generation gives it

        def attend(*rows: Any, **named: Any) -> Any:
            return backend.decode_attention(ops.Rows(*rows, **named), mass=False, importance=False)

        def step(*rows: Any, weight: Any, bias: Any, rates: Any, **named: Any) -> Any:
            return backend.decode_step(ops.Rows(*rows, **named), ops.Decide(weight, bias, rates))

    return {
        "decode_attention": lambda: attend(*rows, **shared),
        "decode_attention, new row": lambda: attend(*rows, **shared, **new),
        "decode_attention, new row, kept list": lambda: attend(*rows, **shared, **new, kept=kept, n_kept=lengths),
        "decode_step, new row": lambda: step(*rows, **shared, **new, text_type=types, **predictor),
        "select_tokens": lambda: backend.select_tokens(kept.float(), lengths, lengths),
        "compact_, 60 tensors": lambda: backend.compact_(layers, kept, lengths, lengths),
    }


def main() -> None:
    torch.set_num_threads(1)
    print(f"host time a call, driver excluded; {platform.machine()}, one thread, torch {torch.__version__}")
    row = torch.randn(1, 1, 1, 8)
    print(f"  torch's scaled_dot_product_attention {measure(lambda: scaled_dot_product_attention(row, row, row)):6.1f} us")
    for get in (triton_backend, cuda_backend):
        try:
            name, backend = get()
        except ImportError as error:
            print(f"  {get.__name__}: not measured: {error}")
            continue
        print(f"  {name}")
        dispatch.resolve = library.resolve = lambda *_, backend=backend: backend  # type: ignore[assignment]  # a stand-in
        for what, call, public in zip(calls_of(backend), calls_of(backend).values(), calls_of(ops).values(), strict=True):
            call()
            public()
            print(f"    {what:38} {measure(call):6.1f} us    {measure(public):6.1f} us by the operator")


if __name__ == "__main__":
    main()
