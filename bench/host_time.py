"""The host's work that the patch adds to a decode step: time and operator calls, beside the unpatched eager model. Needs no GPU.

    OMP_NUM_THREADS=1 python -m bench.host_time [--rounds 8] [--new-tokens 24] [--layers 32] [--json]

The model is a LLaVA whose layers are as many as a 7B model's and so small that a step is nothing but Python and dispatch. Two tables:

- **on a CPU**: the model as it runs here.
- **as on a GPU**: the Triton backend with every kernel compiled to nothing (``bench.launch_overhead``), so that what is left is what the
  host does for a GPU, up to the driver's call (and a layer of ours makes one, the unpatched one three). All other operators do compute
  here, on tensors so small that their time is dispatch.

Each set-up generates beside the unpatched model (a twin that shares its weights), and the two take turns **at every token**: a step stands
between two of the unpatched model and is divided by their mean, so that what else runs on the machine, and the clock of its cores, meet
both alike. Times are the thread's own CPU time. A round's ratio is the median over its steps, the figure is the median over rounds; set-ups
take turns, too. The first row is the unpatched model beside itself: as far as it is from 1, so far may the others be off. Calls are those
that reach torch's dispatcher below autograd in one step (a launch of ours does not go through it). A captured step (``cuda_graph=True``)
runs none of this.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import json
import platform
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LogitsProcessor

import dyrate_kernels as dk
from bench import launch_overhead

Setup = tuple[str, dict[str, Any] | None]
RATE = 0.875


def small_model(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """A LLaVA of many small layers, and one prompt with a picture of 144 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=168, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=299)).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[1, *range(5, 20), *[299] * 144, *range(20, 36)]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 168, 168)}


def setups(backend: str) -> list[Setup]:
    """(name, arguments of ``dk.patch``), the unpatched model first."""
    fixed, fastv = dk.policies.Fixed(k=3, rate=RATE), dk.policies.FastV(k=3, rate=RATE)
    patched: list[tuple[dk.Policy | str, str]] = [("none", "recoverable"), (fixed, "recoverable"), (fixed, "evict")]
    patched += [(fastv, "recoverable"), (fastv, "evict"), ("dyrate", "recoverable"), ("dyrate", "evict")]
    named = []
    for policy, retention in patched:
        name = policy if isinstance(policy, str) else f"{policy.name}, {100 * (1 - RATE):.1f} % kept"
        named.append((f"{name}, {retention}", {"policy": policy, "retention": retention, "backend": backend}))
    return [("unpatched", None), *named]


class _Clock(LogitsProcessor):
    """Notes the CPU seconds of each step of its thread, and lets another thread make one before the next begins.

    Args:
        mine, other: permits to make a step.
    """

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self.mine, self.other = mine, other
        self.seconds: list[float] = []
        self._begin = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seconds.append(time.thread_time() - self._begin)
        self.other.release()
        self.mine.acquire()
        self._begin = time.thread_time()
        return scores


class _Calls(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _Counts(LogitsProcessor):
    """Notes how many calls there were when the scores of each token are there."""

    def __init__(self, calls: _Calls) -> None:
        self.calls = calls
        self.counts: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.counts.append(self.calls.count)
        return scores


def _generate(model: Any, fields: dict[str, torch.Tensor], tokens: int, processor: LogitsProcessor) -> None:
    model.generate(**fields, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, logits_processor=[processor])


def step_seconds(models: Sequence[Any], fields: dict[str, torch.Tensor], tokens: int) -> tuple[list[float], list[float]]:
    """CPU seconds of the steps of two models that take turns, the first one first; without the prompts and the first steps."""
    permits = threading.Semaphore(1), threading.Semaphore(0)
    clocks = _Clock(*permits), _Clock(*reversed(permits))

    def run(model: Any, clock: _Clock) -> None:
        clock.mine.acquire()
        try:
            _generate(model, fields, tokens, clock)
        finally:
            clock.other.release(tokens + 1)  # nobody waits for what has ended

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(run, model, clock) for model, clock in zip(models, clocks, strict=True)]:
            done.result()
    return clocks[0].seconds[3:], clocks[1].seconds[3:]


def step_calls(model: Any, fields: dict[str, torch.Tensor]) -> int:
    """Operator calls of the sixth step."""
    with _Calls() as calls:
        counts = _Counts(calls)
        _generate(model, fields, 8, counts)
    return counts.counts[6] - counts.counts[5]


def ratio_of(plain: Sequence[float], steps: Sequence[float]) -> float:
    """Median ratio of a step to the mean of the plain ones before and after it."""
    return statistics.median(2 * step / (a + b) for a, step, b in zip(plain, steps, plain[1:], strict=False))


def measure(table: str, backend: str, layers: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """The rows of one table."""
    plain, fields = small_model(layers)
    model = copy.deepcopy(plain, {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())})
    times: dict[str, list[float]] = collections.defaultdict(list)
    ratios: dict[str, list[float]] = collections.defaultdict(list)
    calls: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, patching in setups(backend):
            with contextlib.nullcontext() if patching is None else dk.patch(model, **patching):
                if number == 0:
                    calls[name] = step_calls(model, fields)
                others, steps = step_seconds((plain, model), fields, tokens if number else 8)
            if number:  # the first round warms up
                times[name].append(statistics.median(steps))
                ratios[name].append(ratio_of(others, steps))
    return [
        {
            "table": table, "setup": name, "layers": layers,
            "ms": 1e3 * statistics.median(times[name]),
            "ratio": statistics.median(ratios[name]),
            "calls": calls[name], "calls_added": calls[name] - calls["unpatched"],
            "torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine(),
        }
        for name in times
    ]  # fmt: skip


class _Zeros:
    """``torch`` as the stubbed backend sees it: results that no kernel fills must still be valid indices."""

    empty = staticmethod(torch.zeros)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def stub_triton() -> None:
    """Lets the Triton backend take CPU tensors and start nothing, for the rest of this process.

    Raises:
        ImportError: Triton is not installed.
    """
    launch_overhead.triton_backend()
    from dyrate_kernels import triton_kernels
    from dyrate_kernels.ops import dispatch, forms
    from dyrate_kernels.triton_kernels import backend

    triton_kernels.unavailable_reason = lambda: None
    triton_kernels.interpreted = lambda: True
    backend.torch = forms.torch = _Zeros()  # type: ignore[assignment]  # a stand-in
    dispatch._load.cache_clear()
    dispatch.resolve.cache_clear()
    dispatch.name_for.cache_clear()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers = (given.layers, given.rounds, given.new_tokens)
    rows = measure("on a CPU", "reference", *numbers)
    try:
        stub_triton()
        rows += measure("as on a GPU", "triton", *numbers)
    except ImportError as error:
        print(f"as on a GPU: not measured: {error}")
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"one decode step, batch 1, {given.layers} small layers, one thread, {versions}")
    for table in dict.fromkeys(row["table"] for row in rows):
        print(f"\n{table:<36} {'ms':>7} {'to unpatched':>13} {'calls':>6} {'added':>6}")
        for row in (row for row in rows if row["table"] == table):
            print(f"  {row['setup']:<34} {row['ms']:7.2f} {row['ratio']:12.3f}x {row['calls']:6d} {row['calls_added']:+6d}")


if __name__ == "__main__":
    main()
