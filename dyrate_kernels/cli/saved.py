"""In words: what a generation saved, and what that means for the model that ran."""

from __future__ import annotations

from typing import Any

LITTLE = 1.25  # a decode step that can be at most so many times as fast has little to gain

# bench/results/2026-11-27-h200/report.md, rows of dyrate generate() with captured steps and fused layers, dense and at 12.5 %
RECORD = "Measured elsewhere: 8.8 ms a token for 17.3 (LLaVA-NeXT-7B, 32 sequences of 2880 visual tokens, 12.5 % kept, H200)."


def text_rows(prompt: int, visual: int, new_tokens: int) -> float:
    """Text tokens that a decode step reads, mean over an answer; ``prompt`` counts the ``visual`` ones, too."""
    return prompt - visual + new_tokens / 2


def room(shape: Any, visual: float, text: float, batch: int = 1) -> tuple[float, str]:
    """Returns how many times as fast a decode step can be at most (docs/costs.md), and a sentence that says so.

    Args:
        shape: of the text model.
        visual, text: tokens of each sequence.
    """
    from dyrate_kernels import flops

    step = flops.decode_bytes(shape, batch=batch, visual=visual, text=text)
    parts = {"visual tokens": step.visual_kv, "weights": step.weights, "text": step.text_kv}
    shares = ", ".join(f"{name} {100 * part / step.total:.0f} %" for name, part in parts.items())
    what = "Little can be gained here" if step.bound < LITTLE else "There is something to gain here"
    said = f"{what}: a decode step of this model reads {shares}, so with no visual token at all it is at most {step.bound:.2f}x as fast."
    return step.bound, said


def meaning(shape: Any, visual: float, text: float, backend: str) -> str:
    """Says what pruning can buy on this model, with these tokens and this backend."""
    bound, said = room(shape, visual, text)
    if bound < LITTLE:
        said += f" {RECORD}"
        said += " Many visual tokens and sequences change it: dyrate doctor --config llava-next-7b --batch 32."
    if backend == "reference":
        said += " On a CPU the reference runs, in which choosing costs time, too: dyrate demo times it beside the unpatched model."
    return said


def totals(stats: Any) -> str:
    """Says what was saved, in a line."""
    read = 100 * (1 - stats.bytes_read / stats.bytes_read_unpruned) if stats.bytes_read_unpruned else 0.0
    work = 100 * (1 - stats.flops / stats.flops_unpruned) if stats.flops_unpruned else 0.0
    kept = f"{100 * stats.kept_mean:.1f} % of {stats.visual_tokens[0]} visual tokens read in layers >= {stats.k}, mean over steps"
    return f"{read:.1f} % of the bytes that decode steps read, {work:.1f} % of the FLOPs; {kept}"
