"""What patching costs and saves per decode step on a CPU, as a ratio to the unpatched model in the same run.

    python bench/cpu_decode.py [--rounds 3] [--new-tokens 24] [--batch 4] [--json]

Two models: the bundled one (144 visual tokens) and a random LLaVA with 2880 visual tokens a sequence (five pictures of 576 tokens, 8
layers of
width 512, 8 heads of 64). Each round times every set-up once, in turn, so that a slow moment of the machine hits all of them; the figure is
the median over rounds of the median time between two tokens. The first token (prefill) is timed apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LogitsProcessor

import dyrate_kernels as dk
from dyrate_kernels import shapes

P = dk.policies


class Clock(LogitsProcessor):
    """Notes when the scores of each token are there."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def bundled(batch: int) -> tuple[Any, dict[str, torch.Tensor], int]:
    """The bundled model and ``batch`` drawn scenes."""
    model, processor = dk.load_demo()
    samples = [shapes.make_sample(-1 - i, "describe") for i in range(batch)]
    content = [{"type": "image"}, {"type": "text", "text": samples[0].prompt}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    size = processor.image_processor.size["height"]
    fields = processor(images=[s.image(size) for s in samples], text=[prompt] * batch, padding=True, return_tensors="pt")
    return model, dict(fields), 3


def large(batch: int) -> tuple[Any, dict[str, torch.Tensor], int]:
    """A random model whose sequences hold five pictures of 576 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=999)).eval()
    model.generation_config.eos_token_id = None
    row = [1, *range(5, 20), *[999] * (5 * 576), *range(20, 36)]
    pictures = torch.randn(batch * 5, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([row] * batch)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures}, 3


def timed(model: Any, fields: dict[str, torch.Tensor], new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, median seconds between tokens)."""
    clock = Clock()
    model.generate(**fields, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, logits_processor=[clock])
    gaps = [b - a for a, b in zip(clock.times[1:-1], clock.times[2:], strict=True)]
    return clock.times[1] - clock.times[0], statistics.median(gaps)


def measure(name: str, build: Any, batch: int, rounds: int, new_tokens: int) -> list[dict[str, Any]]:
    """One row a set-up."""
    model, fields, k = build(batch)
    setups: dict[str, tuple[Any, str] | None] = {
        "unpatched": None,
        "none": ("none", "recoverable"),
        "fixed, 12.5 % kept, recoverable": (P.Fixed(k=k, rate=0.875), "recoverable"),
        "fixed, 12.5 % kept, evict": (P.Fixed(k=k, rate=0.875), "evict"),
        "fastv, 12.5 % kept, recoverable": (P.FastV(k=k, rate=0.875), "recoverable"),
        "fastv, 12.5 % kept, evict": (P.FastV(k=k, rate=0.875), "evict"),
        "dyrate, recoverable": (P.DyRate(k=k), "recoverable"),
        "dyrate, evict": (P.DyRate(k=k), "evict"),
    }
    times: dict[str, list[tuple[float, float]]] = {setup: [] for setup in setups}
    kept: dict[str, float] = {}
    for turn in range(rounds + 1):
        for setup, patching in setups.items():
            if patching is None:
                seconds = timed(model, fields, new_tokens)
            else:
                with dk.patch(model, policy=patching[0], retention=patching[1]) as handle:
                    seconds = timed(model, fields, new_tokens)
                    kept[setup] = handle.stats().kept_mean
            if turn:  # the first round warms up
                times[setup].append(seconds)
    first, between = ({s: statistics.median(t[i] for t in rows) for s, rows in times.items()} for i in (0, 1))
    return [
        {
            "model": name,
            "setup": setup,
            "batch": batch,
            "visual_tokens": int((fields["input_ids"][0] == model.config.image_token_id).sum()),
            "kept_mean": kept.get(setup, 1.0),
            "decode_ms": 1e3 * between[setup],
            "decode_ratio": between[setup] / between["unpatched"],
            "first_token_ms": 1e3 * first[setup],
            "first_token_ratio": first[setup] / first["unpatched"],
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        for setup in setups
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for name, build in (("bundled", bundled), ("random, 8 x 512", large)):
        rows += measure(name, build, given.batch, given.rounds, given.new_tokens)
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"batch {given.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}")
    print("ratios to the unpatched model of the same run; below 1 is faster\n")
    print(f"{'model':<16} {'visual':>6}  {'set-up':<32} {'kept':>6}  {'decode':>7}  {'first token':>11}")
    for row in rows:
        print(
            f"{row['model']:<16} {row['visual_tokens']:>6}  {row['setup']:<32} {100 * row['kept_mean']:>5.1f}%"
            f"  {row['decode_ratio']:>6.2f}x  {row['first_token_ratio']:>10.2f}x"
        )


if __name__ == "__main__":
    main()
