"""Time per token of whole models with random weights, LLaVA-1.5-7B, LLaVA-NeXT-7B and Qwen2.5-VL-7B shapes: the model part of
``bench/gpu.sh``.

    python -m bench.end_to_end OUT.json [--toy] [--seconds 120]

The LLaVA names stand for one decoder (Vicuna-7B); the NeXT rows have 2880 visual tokens a sequence, five crops of 576; Qwen2.5-VL's one
picture has 4096. The rows are those of
``dyrate bench e2e`` (``dyrate_kernels.measuring.end_to_end``), for DyRate at 12.5 %: a predictor that asks for that rate at every step,
which is what a trained one costs, at a known rate.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dyrate_kernels as dk
from bench.operators import operators_backends, run_and_save
from dyrate_kernels.measuring import decoding, end_to_end, random_models, timing
from dyrate_kernels.patching.fused import fuses

WORK = (  # name, shape, B, visual tokens, text tokens, new tokens; the quickest one first
    ("LLaVA-1.5-7B", "llava-1.5-7b", 1, 576, 64, 64),
    ("LLaVA-NeXT-7B", "llava-1.5-7b", 32, 2880, 64, 32),
    ("Qwen2.5-VL-7B", "qwen2.5-vl-7b", 32, 4096, 64, 24),
)
TOY = (
    ("LLaVA-1.5-7B, toy", "toy", 1, 4, 4, 5),
    ("LLaVA-NeXT-7B, toy", "toy", 2, 20, 6, 5),
    ("Qwen2.5-VL-7B, toy", "toy-qwen", 1, 12, 6, 5),
)
K = 3
KEPT = 0.125


def forced(model: Any) -> dk.policies.DyRate:
    """DyRate with a predictor that asks for 12.5 % at every step."""
    shape = dk.policies.ModelShape.from_config(model.config)
    predictor = dk.DyRatePredictor.for_model(shape, [0.0, 0.25, 0.5, 0.75, 1 - KEPT], k=K)
    with torch.no_grad():
        predictor.weight.normal_(std=1e-3)
        predictor.bias.zero_()
        predictor.bias[-1] = 9.0
    return dk.policies.DyRate(k=K, predictor=predictor)


def _inputs(model: Any, visual: int, text: int, batch: int) -> dict[str, torch.Tensor]:
    return random_models.inputs(model, batch, visual, text)


def collect(toy: bool, seconds: float, save: Callable[[dict[str, Any]], None]) -> None:
    """All shapes; those for which no time is left are left out, with a row that says so."""
    device = timing.here()
    backend = operators_backends(toy)[0]
    deadline = time.monotonic() + seconds
    bandwidth, times = timing.copy_bandwidth()
    save(timing.row("device-to-device copy", times, group="copy", bandwidth=bandwidth, moved=bandwidth * times.median))
    model, built = None, ""
    for name, config, batch, visual, text, new_tokens in TOY if toy else WORK:
        if time.monotonic() > deadline:
            save(timing.row(name, None, group="not measured", note=f"skipped: the {seconds:.0f} s of this part were over"))
            continue
        begin = time.monotonic()
        if config != built:
            model = None  # before the next one takes its place
            timing.release()
            model, built = random_models.build(config, device), config
            print(f"{config}: {decoding.weight_bytes(model) / 1e9:.2f} GB of weights read a step", flush=True)
        make = partial(_inputs, model, visual, text)
        problem = end_to_end.Problem(name, model, make, batch, new_tokens, backend, random_models.pictures(model, visual))
        setups = end_to_end.policies_for(model, forced(model), "DyRate at 12.5 %", KEPT, fuses(model, backend))
        setups.append(end_to_end.Setup(end_to_end.UNPATCHED))
        try:
            for found in end_to_end.measure(problem, setups, rounds=1, bandwidth=bandwidth):
                save(found)
        except Exception as error:
            traceback.print_exc()
            save(timing.row(name, None, group="failed", note=f"{type(error).__name__}: {error}"[:500]))
        timing.release()
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)


def main() -> None:
    """Command line. Exit status 1 where a row failed or a gate did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0)
    given = parser.parse_args()
    raise SystemExit(run_and_save(given.out, lambda save: collect(given.toy, given.seconds, save)))


if __name__ == "__main__":
    main()
