"""Launch settings by measurement: writes ``dyrate_kernels/devices/<device name>.json``, which the launcher reads from then on.

    python -m bench.tune [--out FILE] [--seconds 600] [--toy]

For each kind of problem (``plan.problem``) one setting after the other is varied from the heuristic, and kept where the geometric mean of
the times over its shapes falls by more than the noise. A setting whose result is not that of the float64 reference, or that does not
compile, is left out. ``decision`` is chosen by the time of the whole ``decode_step``. ``--toy`` goes through it all at a tiny size in
Triton's interpreter and writes only where ``--out`` says.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import dyrate_kernels as dk
from bench import operators
from bench.operators import Data, Shape
from dyrate_kernels import devices, ops
from dyrate_kernels.measuring import timing

NOISE = 0.005  # a smaller gain is none
# in the order in which they are tried; logit_bytes changes which tokens stay, so it is for whoever asks for it
CHOICES: dict[str, tuple[Any, ...]] = {
    "block_n": (16, 32, 64, 128),
    "num_warps": (4, 2, 8),
    "programs_per_sm": (8, 4, 16, 2),
    "num_stages": (3, 2, 4),
    "tensor_cores": (False, True),
    "warp_rows": (False, True),
    "max_registers": (168, 128, None),
    "min_blocks": (2, 1, 4, 8),
    "combine": ("same_launch", "second_launch"),
    "decision": ("same_launch", "second_launch", "two_launches"),
}
TOY_CHOICES = {"block_n": (16,), "decision": ("same_launch",)}


def kinds(toy: bool) -> Iterator[tuple[list[Shape], str]]:
    """(shapes that share one setting, kind of problem)."""
    sizes = ((1, 24),) if toy else ((32, 2880), (8, 2880), (1, 2880), (1, 576))
    for heads, kv_heads in ((2, 2), (4, 2)) if toy else ((32, 32), (28, 4)):
        dim, text, dtype = (16, 8, torch.float32) if toy else (128, 128, torch.bfloat16)
        found = [Shape("", batch, visual, text, heads, kv_heads, dim, dtype) for batch, visual in sizes]
        for kind in ("score", "plain", "list"):
            yield found, kind


class Problem:
    """The shapes of one kind, their inputs and references, made once. Every call brings a new row, as a model's does.

    Args:
        kind: "score" times ``decode_step``, "plain" and "list" ``decode_attention`` over all rows and over a kept list.
    """

    def __init__(self, shapes: list[Shape], kind: str, device: torch.device) -> None:
        self.kind = kind
        self.cases: list[tuple[Shape, list[Callable[[], Any]], Callable[[Any], bool]]] = []
        for shape in shapes:
            data = Data(shape, "triton", device)
            right = operators.attention_gate(data, data.kept if kind == "list" else None)
            if kind == "score":
                calls = data.ours(ops.decode_step, new_row=True, text_type=data.text_type, **data.linear)
            else:
                some = {"kept": data.kept, "n_kept": data.n_kept} if kind == "list" else {}
                calls = data.ours(ops.decode_attention, new_row=True, **some)
            data.forget_last_rows()
            self.cases.append((shape, calls, self._gate(data, right)))

    @staticmethod
    def _gate(data: Data, right: operators.Gate) -> Callable[[Any], bool]:
        def holds(got: Any) -> bool:
            """Of the first set of inputs."""
            passed = right(got, 0)
            decides = isinstance(got, ops.DecodeStep)
            return (operators.step_gate(data.shape, passed, got, data.linear) if decides else passed)["passed"]

        return holds

    def seconds(self, chosen: Any, budget: float) -> float | None:
        """Geometric mean of the times over the cases; None where a result is wrong or a kernel cannot be built."""
        from dyrate_kernels.triton_kernels import plan

        plan.override(chosen)
        logs = []
        try:
            for shape, calls, holds in self.cases:
                if not holds(calls[0]()):
                    print(f"  {chosen}: wrong result at B={shape.batch} N={shape.visual}")
                    return None
                logs.append(math.log(timing.time_captured(calls, budget=budget).median))
        except Exception as error:  # too much shared memory, too many registers
            print(f"  {chosen}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
            return None
        finally:
            plan.override(None)
        return math.exp(sum(logs) / len(logs))


def _matters(name: str, best: Any, problem: Problem) -> bool:
    """Returns whether a setting changes anything for this kind of problem."""
    shape = problem.cases[0][0]
    grouped = shape.heads > shape.kv_heads
    if name == "decision":
        return problem.kind == "score"
    if name == "tensor_cores":
        return not grouped
    return name != "warp_rows" or grouped or best.tensor_cores


def tune(problem: Problem, start: Any, choices: dict[str, tuple[Any, ...]], deadline: float, budget: float) -> tuple[Any, float | None]:
    """(best settings, their seconds)."""
    best, fastest = start, problem.seconds(start, budget)
    if fastest is None:
        return start, None
    print(f"  {start}: {1e6 * fastest:.2f} us", flush=True)
    for name, values in choices.items():
        if not _matters(name, best, problem):
            continue
        for value in values:
            if time.monotonic() > deadline:
                print("  the time is over")
                return best, fastest
            candidate = dataclasses.replace(best, **{name: value})
            if value == getattr(best, name):
                continue
            seconds = problem.seconds(candidate, budget)
            if seconds is not None:
                better = seconds < fastest * (1 - NOISE)
                print(f"  {name}={value}: {1e6 * seconds:.2f} us{' *' if better else ''}", flush=True)
                if better:
                    best, fastest = candidate, seconds
    return best, fastest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    if given.toy and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is imported, which is below
    state = dk.backends()["triton"]
    if state != "available":
        raise SystemExit(f"the Triton kernels cannot run: {state}")
    here = timing.environment()
    if not here["measurement"] and not given.toy:
        raise SystemExit("nothing can be measured here: no CUDA device, or TRITON_INTERPRET is set; --toy rehearses")
    from dyrate_kernels.triton_kernels import plan

    device = timing.here()
    name = here["gpu"] if device.type == "cuda" else plan.INTERPRETED
    every = list(kinds(given.toy))
    share = given.seconds / len(every)
    chosen, gains = {}, {}
    with torch.no_grad():
        for shapes, kind in every:
            first = shapes[0]
            group, size = first.heads // first.kv_heads, first.dtype.itemsize
            key = plan.problem(group, first.dim, size, kind)
            print(f"{key}:", flush=True)
            deadline = time.monotonic() + share
            problem = Problem(shapes, kind, device)
            usual = plan.heuristic(group, first.dim, size)
            best, seconds = tune(problem, usual, TOY_CHOICES if given.toy else CHOICES, deadline, 0.1)
            if seconds is None:
                print("  the heuristic itself does not run: nothing is written for this kind")
                continue
            chosen[key] = best
            before = problem.seconds(usual, 0.3)
            after = problem.seconds(best, 0.3)
            gains[key] = {"heuristic_us": before and 1e6 * before, "chosen_us": after and 1e6 * after}
            print(f"  chosen: {best}, {gains[key]}", flush=True)
            del problem
            timing.release()
    if not chosen:
        raise SystemExit("no kind of problem ran: nothing is written")
    facts = {key: here[key] for key in ("torch", "triton", "commit", "driver", "measurement")}
    others = {key: value for key, value in devices.measured(name).items() if key.startswith("backend")}  # bench.choose_backend's
    text = plan.to_json(name, chosen, made_by="python -m bench.tune", times=gains, **facts, **others)
    path = given.out or (None if given.toy else devices.FOLDER / devices.file_name(name))
    if path is None:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
