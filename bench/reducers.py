"""The time that each reducer adds to the vision tower's pass, once a picture, at prefill.

    OMP_NUM_THREADS=1 python -m bench.reducers [--pictures 1] [--rounds 5] [--json]

The tower is CLIP ViT-L/14 at 336 pixels with random weights (24 layers, 576 tokens), the projector that of LLaVA-1.5-7B. Time of tower,
projector and reducer as a ratio to tower and projector alone; set-ups take turns, medians over rounds. What comes out is checked to be as
many tokens as asked for. ``prumerge`` chooses its own count, by outliers that random weights do not have, so it is given a share here.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dyrate_kernels import vision
from dyrate_kernels.measuring.random_models import CLIP_336
from dyrate_kernels.measuring.timing import environment, here
from dyrate_kernels.patching.tower import TowerRun

PATCHES = 576
SETUPS = (
    "fastervlm:keep=0.25", "hired:keep=0.25", "visionzip:keep=0.25", "prumerge:keep=0.25", "tome:keep=0.5", "tome:keep=0.25",
    "aim:keep=0.25", "divprune:keep=0.25", "downsample:keep=0.25", "random:keep=0.25", "uniform:keep=0.25",
)  # fmt: skip
MORE = {"prumerge": 1}  # tokens besides the share: the sum of what goes


def build() -> Any:
    """The tower and the projector, with a language model of one layer that never runs."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=32
    )
    config = LlavaConfig(vision_config=CLIPVisionConfig(**CLIP_336), text_config=text, image_token_index=63)
    device = here()
    return LlavaForConditionalGeneration(config).eval().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def measure(model: Any, pictures: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each of ``SETUPS``: name, tokens that come out of a picture, ratio, seconds of the tower and projector alone."""
    device = model.device
    pixels = torch.randn(pictures, 3, 336, 336, device=device, dtype=model.dtype)
    calls: dict[str, Callable[[], Any]] = {"": lambda: model.model.get_image_features(pixel_values=pixels)}
    for spec in SETUPS:
        calls[spec] = functools.partial(_reduced, model, pixels, vision.chain(spec))
    counts = {}
    for spec in SETUPS:
        kept = calls[spec]()
        share = float(spec.rpartition("=")[2])
        counts[spec] = int(kept[0].sum())
        asked = int(PATCHES * share) + MORE.get(spec.partition(":")[0], 0)
        if any(int(row.sum()) != asked for row in kept):
            raise RuntimeError(f"{spec} left {[int(row.sum()) for row in kept]} tokens, not {asked}; no time is reported")
    seconds: dict[str, list[float]] = {spec: [] for spec in calls}
    for _ in range(rounds):
        for spec, call in calls.items():
            seconds[spec].append(_clock(call, device))
    ratios = {spec: statistics.median(a / b for a, b in zip(seconds[spec], seconds[""], strict=True)) for spec in SETUPS}
    alone = statistics.median(seconds[""])
    return [{"reducer": spec, "tokens": counts[spec], "ratio": ratios[spec], "tower_seconds": alone} for spec in SETUPS]


@torch.no_grad()
def _reduced(model: Any, pixels: Tensor, chain: tuple[vision.Reducer, ...]) -> list[Tensor]:
    run = TowerRun(model, "image", chain, "auto")
    output = run.encode(model.model.get_image_features, {"pixel_values": pixels}, pixels)
    return [unit.keep for unit in run.reduce(run.layouts(output))]


def _clock(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    with torch.no_grad():
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    rows = measure(build(), given.pictures, given.rounds)
    if given.json:
        print(json.dumps({"environment": environment(), "pictures": given.pictures, "rows": rows}, indent=2))
        return
    facts = environment()
    print(f"tower and projector alone: {1e3 * rows[0]['tower_seconds']:.1f} ms for {given.pictures} picture(s); "
          f"{facts['gpu'] or 'CPU'}, {torch.get_num_threads()} thread(s), torch {facts['torch']}")  # fmt: skip
    print(f"{'reducer':<24}{'tokens':>8}{'with / without':>17}")
    for row in rows:
        print(f"{row['reducer']:<24}{row['tokens']:>8}{row['ratio']:>16.2f}x")


if __name__ == "__main__":
    main()
