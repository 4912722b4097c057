"""Results of ``Handle.stats()`` (``dyrate_kernels.stats_from_record`` makes them)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One generation step; lists have one entry a sequence.

    Attributes:
        step: 0 is the prefill, 1 the first decode step.
        kept: visual tokens that the pruned layers read (their mean where layers differ, rounded).
        rate: the rate that the policy chose (0 where nothing was pruned).
        mass: attention mass by type (system, image, instruction, response) at layer k-1, mean over heads.
        importance: ``[B][N]``, only with ``patch(record_importance=True)``.
        kept_tokens: ``[B][kept]``, indices of the visual tokens kept in the first pruned layer, likewise.
    """

    step: int
    kept: list[int]
    rate: list[float]
    mass: list[list[float]]
    importance: list[list[float]] | None = None
    kept_tokens: list[list[int]] | None = None


@dataclass(frozen=True)
class Path:
    """The way in which a generation ran.

    Attributes:
        steps: decode steps were ``"captured"`` once and replayed, or all of them ``"eager"``.
        replayed: how many of them were replayed.
        layers: decoder layers were ``"fused"`` or the model's ``"own"`` chain of operations.
        why_not: for ``"steps"`` and ``"layers"``, in words, what kept each from the faster way; no entry where nothing did.
    """

    steps: str
    replayed: int
    layers: str
    why_not: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """``captured steps, fused layers``, with the reasons where it was another way."""
        found = []
        for name, word in (("steps", self.steps), ("layers", self.layers)):
            found.append(f"{word} {name}" + (f" ({self.why_not[name]})" if name in self.why_not else ""))
        return ", ".join(found)


@dataclass(frozen=True)
class Stats:
    """Result of ``Handle.stats()``: the last turn of the last generation.

    Attributes:
        policy, predictor, backend, retention, k: what ran. ``predictor`` is None for policies that have none.
        vision: names of the reducers before the language model, joined by ``+``; None where there are none.
        visual_tokens_in: visual tokens of each sequence before the reducers.
        visual_tokens: N of each sequence: what the language model received. All costs below count these.
        visual_places: ``[B][N]``, None where no reducer was shown a picture: which of the visual tokens before them each one stands in
            the place of.
        steps: one entry a step, the prefill first. Drafted tokens that were refused are no steps and cost nothing here.
        kept_mean: mean over steps and sequences with an image of kept / N in layers >= k; 1.0 without any image.
        visual_share: the same over all layers, passes that were run again included: what visual tokens cost where text costs nothing and
            cost is linear.
        checks: steps that ran once more unpruned, for the policy to compare; ``steps`` tells what their second pass read.
        kv_bytes_live, kv_bytes_reserved: bytes of the rows held, and of the buffers they lie in (of one sequence of a batch: of those that
            it alone would have had). Rows that a sliding window hides are held.
        flops, flops_unpruned: executed by the text model and its head, and what it would have been with every token: what torch's counter
            counts of the unpatched model, for each sequence alone (``dyrate_kernels.flops``, axis 2).
        flops_unreduced, bytes_read_unreduced: likewise with every visual token and without the reducers.
        paper_cost: FastV's formula over the whole sequence, mean over steps, as a fraction of the model with every visual token (before
            reducers too; docs/costs.md, axis 1).
        exact_cost: the same with the real layer in place of FastV's formula, whose MLP lacks the gate. Neither knows sliding windows.
        pool, pool_by: of retention ``pool``: the fraction that layers >= k hold, and by what it was chosen; else None.
        bytes_read, bytes_read_unpruned: weights, as the model holds them, and key/value rows inside the windows that the decode steps read.
        path: how the generation ran; None where that is not known.
    """

    policy: str
    predictor: str | None
    backend: str
    retention: str
    k: int
    vision: str | None
    visual_tokens_in: list[int]
    visual_tokens: list[int]
    visual_places: list[list[int]] | None
    steps: list[Step]
    kept_mean: float
    visual_share: float
    checks: int
    kv_bytes_live: int
    kv_bytes_reserved: int
    flops: float
    flops_unpruned: float
    flops_unreduced: float
    paper_cost: float
    exact_cost: float
    bytes_read: float
    bytes_read_unpruned: float
    bytes_read_unreduced: float
    path: Path | None = None
    pool: float | None = None
    pool_by: str | float | None = None

    @property
    def received(self) -> float:
        """Share of the visual tokens that the reducers left to the language model; 1.0 without reducers."""
        return sum(self.visual_tokens) / sum(self.visual_tokens_in) if self.vision and sum(self.visual_tokens_in) else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers and lists, ready for JSON."""
        return _without_none_extras(asdict(self))


def _without_none_extras(stats: dict[str, Any]) -> dict[str, Any]:
    for name in ("visual_places", "path", "pool", "pool_by"):
        if stats[name] is None:
            del stats[name]
    for step in stats["steps"]:
        for name in ("importance", "kept_tokens"):
            if step[name] is None:
                del step[name]
    return stats
