"""Whole requests of whole models with random weights, LLaVA-1.5-7B, LLaVA-NeXT-7B, LLaVA-OneVision-7B and Qwen2.5-VL-7B shapes: the model
part of ``bench/gpu.sh``.

    python -m bench.end_to_end OUT.json [--toy] [--seconds 120]
    python -m bench.end_to_end OUT.json --config llava-next-7b [--batch 32 1 8] [--new-tokens 64 256 1024] [--seconds 520]

The rows are those of ``dyrate bench e2e`` (``dyrate_kernels.measuring.end_to_end``), for DyRate at 12.5 %: a predictor that asks for that
rate at every step, which is what a trained one costs, at a known rate. The first command is short: three shapes, one batch of each, short
answers, no reducers. With ``--config`` it is one shape at several batches and lengths, each patched set-up also behind a reducer, the
unpatched model also over its compiled static cache, and DyRate at 25 %, too. What the time does not suffice for says so.

A picture of LLaVA-NeXT is five crops of 576 tokens, which its model here is given as five pictures; Qwen2.5-VL's has 4096 tokens,
OneVision's 3699.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dyrate_kernels as dk
from bench.operators import operators_backends, run_and_save
from dyrate_kernels.measuring import decoding, end_to_end, random_models, timing
from dyrate_kernels.patching.fused import fuses
from dyrate_kernels.request_model import POOL


@dataclass(frozen=True)
class Shape:
    """A model and what it is asked.

    Attributes:
        name: as rows carry it.
        visual, text: tokens of a sequence.
        reducer: that the set-ups come behind.
    """

    name: str
    visual: int
    text: int = 64
    reducer: str = "tome:keep=0.5"


SHAPES = {
    "llava-1.5-7b": Shape("LLaVA-1.5-7B", 576),
    "llava-next-7b": Shape("LLaVA-NeXT-7B", 2880),
    "llava-onevision-7b": Shape("LLaVA-OneVision-7B", 3699),
    "qwen2.5-vl-7b": Shape("Qwen2.5-VL-7B", 4096, reducer="divprune:keep=0.5"),
    "toy": Shape("LLaVA-NeXT-7B, toy", 20, 6),
    "toy-onevision": Shape("LLaVA-OneVision-7B, toy", 24, 6),
    "toy-qwen": Shape("Qwen2.5-VL-7B, toy", 12, 6, "divprune:keep=0.5"),
}
BATCHES, LENGTHS = (32, 1, 8), (64, 256, 1024)  # of --config, the batches in this order: the targets are of the first
SHARE = 0.7
WORK = (("llava-1.5-7b", 1, 64), ("llava-next-7b", 32, 32), ("qwen2.5-vl-7b", 32, 24))  # shape, B, new tokens; the quickest one first
TOY = (("toy", 1, 4),)
TOY_REQUESTS = ("toy-qwen", (1,), (3, 4))
K = 3
KEPT, MORE_KEPT = 0.125, 0.25
TOY_LAYERS = 2  # of a rehearsal, where a layer takes a tenth of a second


def forced(model: Any, kept: float = KEPT) -> dk.policies.DyRate:
    """DyRate with a predictor that asks for 12.5 %, or as much as is said, at every step."""
    shape = dk.policies.ModelShape.from_config(model.config)
    k = min(K, shape.num_layers - 1)
    predictor = dk.DyRatePredictor.for_model(shape, [0.0, 0.25, 0.5, 0.6, 1 - kept], k=k)
    with torch.no_grad():
        predictor.weight.normal_(std=1e-3)
        predictor.bias.zero_()
        predictor.bias[-1] = 9.0
    return dk.policies.DyRate(k=k, predictor=predictor)


def _inputs(model: Any, shape: Shape, batch: int) -> dict[str, torch.Tensor]:
    return random_models.inputs(model, batch, shape.visual, shape.text)


class _Bench:
    """Rows of one shape after the other, and the model of the last one."""

    def __init__(self, toy: bool, save: Callable[[dict[str, Any]], None]) -> None:
        self.save, self.device, self.backend = save, timing.here(), operators_backends(toy)[0]
        self.bandwidth, times = timing.copy_bandwidth()
        moved = self.bandwidth * times.median
        save(timing.row("device-to-device copy", times, group="copy", bandwidth=self.bandwidth, moved=moved))
        self.layers = TOY_LAYERS if toy else None
        self.model: Any = None
        self.built = ""

    def problem(self, config: str, batch: int, lengths: tuple[int, ...]) -> end_to_end.Problem:
        """Builds the model, where the last one is another."""
        shape = SHAPES[config]
        if config != self.built:
            self.model = None  # before the next one takes its place
            timing.release()
            self.model, self.built = random_models.build(config, self.device, layers=self.layers), config
            print(f"{config}: {decoding.weight_bytes(self.model) / 1e9:.2f} GB of weights read a step", flush=True)
        make, pictures = partial(_inputs, self.model, shape), random_models.pictures(self.model, shape.visual, config)
        return end_to_end.Problem(shape.name, self.model, make, batch, max(lengths), self.backend, pictures, lengths)

    def run(self, config: str, batch: int, lengths: tuple[int, ...], until: float, whole: bool) -> None:
        """Saves the rows of a shape at one batch.

        Args:
            until: ``time.monotonic()`` by which to be done.
            whole: also behind a reducer, over a static cache, and with 25 % kept.
        """
        name, begin = SHAPES[config].name, time.monotonic()
        if begin > until:
            self.save(timing.row(name, None, group="not measured", B=batch, note=f"skipped: {end_to_end.OVER}"))
            return
        try:
            problem = self.problem(config, batch, lengths)
            for found in end_to_end.measure(problem, self.setups(config, whole), rounds=1, bandwidth=self.bandwidth, until=until):
                self.save(found)
        except Exception as error:
            traceback.print_exc()
            self.save(timing.row(name, None, group="failed", B=batch, note=f"{type(error).__name__}: {error}"[:500]))
        timing.release()
        print(f"{name}, B={batch}: {time.monotonic() - begin:.1f} s", flush=True)

    def setups(self, config: str, whole: bool) -> list[end_to_end.Setup]:
        """Returns what is compared; a static cache, which compiles, last."""
        model, fuse = self.model, fuses(self.model, self.backend)
        unpatched, static = end_to_end.unpatched_setups(self.device)
        ours = end_to_end.policies_for(
            model, forced(model), "DyRate at 12.5 %", KEPT, fuse, SHAPES[config].reducer if whole else None, POOL
        )
        if not whole:
            return [*ours, unpatched]
        label = f"DyRate at 25 %, evict{', fused' if fuse else ''}"
        return [unpatched, end_to_end.Setup(label, forced(model, MORE_KEPT), "evict", fuse=fuse), *ours, static]


def collect(toy: bool, seconds: float, save: Callable[[dict[str, Any]], None]) -> None:
    """A batch of each shape; those for which no time is left are left out, with a row that says so."""
    until = time.monotonic() + seconds
    bench = _Bench(toy, save)
    for config, batch, length in TOY if toy else WORK:
        bench.run(config, batch, (length,), until, whole=False)
    if toy:
        config, batches, lengths = TOY_REQUESTS
        bench.run(config, batches[0], lengths, until, whole=True)


def collect_shape(
    config: str, batches: Sequence[int], lengths: Sequence[int], toy: bool, seconds: float, save: Callable[[dict[str, Any]], None]
) -> None:
    """One shape at several batches and lengths; each has ``SHARE`` of the time that is left, the last one all."""
    end = time.monotonic() + seconds
    bench = _Bench(toy, save)
    for place, batch in enumerate(batches):
        left = end - time.monotonic()
        share = 1.0 if place == len(batches) - 1 else SHARE
        bench.run(config, batch, tuple(lengths), time.monotonic() + share * left, whole=True)


def main() -> None:
    """Command line. Exit status 1 where a row failed or a gate did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--config", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--new-tokens", type=int, nargs="+")
    given = parser.parse_args()
    if given.config is None:
        if given.batch or given.new_tokens:
            parser.error("--batch and --new-tokens go with --config")
        raise SystemExit(run_and_save(given.out, lambda save: collect(given.toy, given.seconds, save)))
    _, batches, lengths = TOY_REQUESTS if given.toy else ("", BATCHES, LENGTHS)
    batches, lengths = given.batch or batches, given.new_tokens or lengths
    raise SystemExit(run_and_save(given.out, lambda save: collect_shape(given.config, batches, lengths, given.toy, given.seconds, save)))


if __name__ == "__main__":
    main()
