"""A policy bound to a small model, and what a step would show it."""

from __future__ import annotations

import torch

from dyrate_kernels import ops, policies
from dyrate_kernels.policies.base import Decision, ModelShape, Policy, View

SHAPE = ModelShape(6, 8, 4, 16, 128, 256, 100)
HEADS = SHAPE.num_heads
# small k and counts, so that the test model has layers and tokens enough
OPTIONS = {"vtw": {}, "depth": {"k": 2, "prune": 0.3, "growth": 0.5}, "schedule": {"kept": [(0, 20), (2, 11), (3, 0)]}}


def make(name: str, **options) -> Policy:
    return policies.get(name, **{**OPTIONS.get(name, {}), **options}).bind(SHAPE)


def random_view(n_visual: list[int], seed: int = 0, step: int = 0, width: int | None = None) -> View:
    generator = torch.Generator().manual_seed(seed)
    batch = len(n_visual)
    width = max(n_visual) if width is None else width
    mass = torch.rand(batch, HEADS, 4, generator=generator)
    importance = torch.rand(batch, width, generator=generator)
    count = torch.tensor(n_visual, dtype=torch.int32)
    importance[torch.arange(width) >= count[:, None]] = 0
    return View(torch.full((batch,), step), mass / mass.sum(-1, keepdim=True), importance, count, None, {})


def started(policy: Policy, view: View) -> View:
    view.state = policy.start(view.n_visual)
    return view


def select(view: View, decision: Decision) -> list[list[list[int]]]:
    """[group][sequence] -> kept tokens."""
    score = view.importance if decision.score is None else decision.score
    counts = decision.count if decision.count.dim() == 2 else decision.count[None]
    out = []
    for count in counts:
        kept, n_kept = ops.select_tokens(score, count.contiguous(), view.n_visual, alive=view.alive)
        out.append([row[:n].tolist() for row, n in zip(kept, n_kept.tolist(), strict=True)])
    return out
