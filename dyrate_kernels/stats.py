"""What a generation really did: recorded on the device while it runs, read once when asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyrate_kernels import flops

if TYPE_CHECKING:
    from dyrate_kernels.patching.session import Session
    from dyrate_kernels.policies.base import ModelShape, Policy


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
class Stats:
    """What ``Handle.stats()`` returns; the last turn of the last generation.

    Attributes:
        policy, predictor, backend, retention, k: what ran. ``predictor`` is None for policies that have none.
        vision: names of the reducers before the language model, joined by ``+``; None where there are none.
        visual_tokens_in: visual tokens of each sequence before the reducers.
        visual_tokens: N of each sequence: what the language model received. All costs below count these.
        visual_places: ``[B][N]``, None where no reducer dropped anything: which of the visual tokens before them each one stands in the
            place of.
        steps: one entry a step, the prefill first. Drafted tokens that were refused are no steps and cost nothing here.
        kept_mean: mean over steps and sequences with an image of kept / N in layers >= k; 1.0 without any image.
        visual_share: the same over all layers, passes that were run again included: what visual tokens cost where text costs nothing and
            cost is linear.
        checks: steps that ran once more unpruned, for the policy to compare; ``steps`` tells what their second pass read.
        kv_bytes_live, kv_bytes_reserved: bytes of the rows held, and of the buffers they lie in.
        flops, flops_unpruned: executed by the text model, and what it would have been with every token (exact SwiGLU count).
        flops_unreduced, bytes_read_unreduced: likewise with every visual token and without the reducers.
        paper_cost: FastV's formula over the whole sequence, mean over steps, as a fraction of the model with every visual token (before
            reducers too; methods.md, section 4, axis 1).
        exact_cost: the same with the real layer in place of FastV's formula, whose MLP lacks the gate.
        bytes_read, bytes_read_unpruned: weights and key/value rows that the decode steps read.
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

    @property
    def received(self) -> float:
        """Share of the visual tokens that the reducers left to the language model; 1.0 without reducers."""
        return sum(self.visual_tokens) / sum(self.visual_tokens_in) if self.vision and sum(self.visual_tokens_in) else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain Python numbers and lists, ready for JSON."""
        return _without_none_extras(asdict(self))


def _without_none_extras(stats: dict[str, Any]) -> dict[str, Any]:
    if stats["visual_places"] is None:
        del stats["visual_places"]
    for step in stats["steps"]:
        for name in ("importance", "kept_tokens"):
            if step[name] is None:
                del step[name]
    return stats


class Record:
    """Per-step tensors of one generation. Writing is a few small copies on the device, at an index that lives on the device."""

    def __init__(self, session: Session, batch: int) -> None:
        cache = session.cache
        self.device = cache.n_text.device
        self.groups = max(len(cache.groups) - 1, 1)
        self.batch = batch
        self.capacity = 0
        self.steps = 0  # one more than the newest step written
        self.rate = self.mass = self.kept = self.again = self.importance = self.chosen = None
        self.counts_again = session.policy.reads_logits
        self.keep_importance = session.record_importance
        self.tokens = cache.full.capacity
        self.cached = session.cached
        self._grow(max(session.max_length - session.turn_end, 0) + 2 if session.max_length else 64)

    def _grow(self, capacity: int) -> None:
        capacity = min(capacity, max(4096, 2 * self.capacity))

        def wider(tensor: Tensor | None, *shape: int, dtype: torch.dtype) -> Tensor:
            out = torch.zeros(capacity, *shape, dtype=dtype, device=self.device)
            if tensor is not None:
                out[: tensor.shape[0]] = tensor
            return out

        self.rate = wider(self.rate, self.batch, dtype=torch.float64)
        self.mass = wider(self.mass, self.batch, 4, dtype=torch.float32)
        self.kept = wider(self.kept, self.groups, self.batch, dtype=torch.int32)
        if self.counts_again:  # what a pass read before the step ran again, plus 1; 0: it did not
            self.again = wider(self.again, self.groups, self.batch, dtype=torch.int32)
        if self.keep_importance:
            self.importance = wider(self.importance, self.batch, self.tokens, dtype=torch.float32)
            self.chosen = wider(self.chosen, self.batch, self.tokens, dtype=torch.bool)
        self.capacity = capacity

    def tensors(self) -> list[Tensor]:
        """Those that a step writes."""
        return [tensor for tensor in (self.rate, self.mass, self.kept, self.again, self.importance, self.chosen) if tensor is not None]

    def reserve(self, step: int) -> None:
        """Makes room for ``step``."""
        if step >= self.capacity:
            self._grow(2 * self.capacity)

    def note(self, step: int) -> None:
        """``step`` is written, or will be before anyone reads."""
        self.steps = max(self.steps, step + 1)

    def rewind(self, steps: int) -> None:
        """The newest ``steps`` are none: their tokens were refused."""
        self.steps = max(self.steps - steps, 0)
        if self.again is not None:
            self.again[self.steps :] = 0

    def write(
        self, session: Session, step: int | None, mass: Tensor, importance: Tensor | None, kept: Tensor | None = None,
        rate: Tensor | None = None, chosen: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Notes one step.

        Args:
            step: None for a decode step (the session's own device counter is the index).
            mass: ``[B, Hq, 4]``.
            importance: ``[B, N]`` or None.
            kept: int32 ``[G, B]``, rate ``[B]``, chosen bool ``[B, N]`` where the session and its groups do not say it.
        """
        cache = session.cache
        forward = session.forward
        number = forward.start - session.turn_end + 1 if step is None else step
        index = session.step if step is None else torch.full((1,), step, dtype=torch.int64, device=self.device)
        self.reserve(number)
        self.note(number)
        reads_all = (step == 0 and not session.evict) or session.unpruned
        groups = cache.groups[1:] or cache.groups
        if kept is None:
            kept = torch.stack([g.n_visual if g.n_kept is None or reads_all else g.n_kept for g in groups])
        if session.unpruned:
            self.again.index_copy_(0, index, self.kept.index_select(0, index) + 1)
        if rate is None:
            rate = torch.zeros_like(session.last_rate) if reads_all else session.last_rate
        if rate is not None:
            self.rate.index_copy_(0, index, rate.to(self.rate.dtype)[None])
        self.mass.index_copy_(0, index, mass.to(self.device, torch.float32).mean(1)[None])
        self.kept.index_copy_(0, index, kept[None])
        if self.keep_importance and importance is not None:
            self.importance.index_copy_(0, index, importance.to(self.device, torch.float32)[None, :, : self.tokens])
            chosen = self._chosen(session, reads_all) if chosen is None else chosen
            self.chosen.index_copy_(0, index, chosen[None, :, : self.tokens])

    def _chosen(self, session: Session, all_tokens: bool) -> Tensor:
        group = (session.cache.groups[1:] or session.cache.groups)[0]
        if group.alive is not None:
            return group.alive
        if group.kept is None or all_tokens:
            return torch.arange(self.tokens, device=self.device) < session.cache.full.n_visual[:, None]
        mark = torch.zeros(self.batch, self.tokens + 1, dtype=torch.bool, device=self.device)
        return mark.scatter_(1, torch.where(group.kept < 0, self.tokens, group.kept).long(), True)[:, :-1]

    def select_sequences(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Sequences were reordered: their records follow, in place where the batch keeps its size."""
        self.cached = tuple(pick(tensor) for tensor in self.cached)
        for name in ("rate", "mass", "kept", "again", "importance", "chosen"):
            tensor = getattr(self, name)
            if tensor is not None:
                batch_dim = 2 if name in ("kept", "again") else 1
                picked = pick(tensor.movedim(batch_dim, 0).contiguous()).movedim(0, batch_dim)
                setattr(self, name, tensor.copy_(picked) if picked.shape == tensor.shape else picked.contiguous())
        self.batch = self.rate.shape[1]


@dataclass(frozen=True)
class Snapshot:
    """What ``stats()`` needs of a session, without its keys and values, so that asking later does not keep them in memory.

    Attributes:
        policy, shape, backend, retention: of the session.
        record: its per-step tensors.
        n_text: int32 ``[B]``, live text rows.
        n_visual: by group, int32 ``[B]``, live visual rows; the full group first.
        group_layers: layers of each group.
        bytes_per_row, bytes_reserved: as the cache tells.
        vision, visual_in, visual_place: of the session.
    """

    policy: Policy
    shape: ModelShape
    backend: str
    retention: str
    record: Record | None
    n_text: Tensor | None
    n_visual: list[Tensor]
    group_layers: list[range]
    bytes_per_row: list[int]
    bytes_reserved: int
    vision: str | None = None
    visual_in: Tensor | None = None
    visual_place: Tensor | None = None


def snapshot(session: Session) -> Snapshot:
    """Copies a session's small tensors; reads nothing on the host."""
    cache = session.cache
    started = cache.is_initialized
    return Snapshot(
        policy=session.policy,
        shape=session.shape,
        backend=session.backend,
        retention=session.retention,
        record=copy.copy(session.record),  # its number of steps is that of now
        n_text=cache.n_text.clone() if started else None,
        n_visual=[group.n_visual.clone() for group in cache.groups] if started else [],
        group_layers=[group.layers for group in cache.groups],
        bytes_per_row=cache.bytes_per_row(),
        bytes_reserved=cache.bytes_reserved(),
        vision=session.vision,
        visual_in=None if session.visual_in is None else session.visual_in.clone(),
        visual_place=session.visual_place,
    )


def collect(source: Snapshot, sequence: int | None = None, new_tokens: int | None = None) -> Stats:
    """Reads a record from the device.

    Args:
        sequence: only this one of the batch; None: all.
        new_tokens: only its first steps: an answer that ended before others of its batch. None: all.

    Raises:
        RuntimeError: nothing was generated yet.
        ValueError: there is no such sequence or step.
    """
    record, policy = source.record, source.policy
    if record is None or record.steps == 0:
        raise RuntimeError("nothing was generated yet: call model.generate(...) on the patched model, then stats()")
    if sequence is not None and not 0 <= sequence < record.batch:
        raise ValueError(f"sequence must be in [0, {record.batch - 1}], got {sequence}")
    if new_tokens is not None and not 1 <= new_tokens <= record.steps:
        raise ValueError(f"new_tokens must be in [1, {record.steps}], got {new_tokens}")
    of = slice(None) if sequence is None else slice(sequence, sequence + 1)
    steps = record.steps if new_tokens is None else new_tokens
    rate, mass = record.rate[:steps, of].tolist(), record.mass[:steps, of].tolist()
    kept = record.kept[:steps, :, of].cpu()
    visual = source.n_visual[0][of].cpu()
    text = source.n_text[of].cpu() - (record.steps - steps)
    sizes = torch.tensor([len(layers) for layers in (source.group_layers[1:] or source.group_layers)], dtype=torch.float64)
    mean_kept = (kept.double() * sizes[None, :, None]).sum(1) / sizes.sum()
    entries = []
    for index in range(steps):
        importance = kept_tokens = None
        if record.keep_importance:
            importance = [row[:n].tolist() for row, n in zip(record.importance[index, of].cpu(), visual.tolist(), strict=True)]
            kept_tokens = [row.nonzero().flatten().tolist() for row in record.chosen[index, of].cpu()]
        entries.append(Step(index, mean_kept[index].round().int().tolist(), rate[index], mass[index], importance, kept_tokens))
    with_image = visual > 0
    share = (mean_kept[:, with_image] / visual[with_image]).mean().item() if bool(with_image.any()) else 1.0
    pruned = float(sizes.sum()) / source.shape.num_layers if len(source.group_layers) > 1 else 1.0
    again = (record.again[:steps, :, of].cpu() if record.again is not None else torch.zeros_like(kept)) - 1
    checked = (again[:, 0] >= 0)[:, with_image]
    read_again = (again.double() * sizes[None, :, None]).sum(1)[:, with_image] / sizes.sum() / visual[with_image]
    whole = 1.0 - pruned + pruned * share
    if bool(checked.any()):
        whole += ((1.0 - pruned + pruned * read_again) * checked).sum(0).mean().item() / steps
    per_row = source.bytes_per_row
    rows = [int((n[of].cpu() + text).sum()) for n in source.n_visual]
    live = sum(per_row[layer] * held for held, layers in zip(rows, source.group_layers, strict=True) for layer in layers)
    decoded = steps - 1
    arguments: dict[str, Any] = {
        "text_rows": (text - decoded).tolist(),
        "visual_tokens": visual.tolist(),
        "group_layers": [len(layers) for layers in source.group_layers],
        "kept": _kept_by_group(kept, visual, len(source.group_layers)),
        "again": _kept_by_group(again, visual, len(source.group_layers)) if record.again is not None else None,
        "prefill_shrunk": source.retention == "evict",
        "bytes_per_row": [per_row[layers[0]] for layers in source.group_layers],
        "cached_visual": record.cached[0][of].tolist(),
        "cached_text": record.cached[1][of].tolist(),
    }
    cost = flops.generation_cost(source.shape, **arguments)
    whole_cost = cost if source.visual_in is None else _beside_unreduced(source, of, arguments)
    return Stats(
        policy=policy.name,
        predictor=policy.predictor_name,
        backend=source.backend,
        retention=source.retention,
        k=policy.k,
        vision=source.vision,
        visual_tokens_in=visual.tolist() if source.visual_in is None else source.visual_in[of].tolist(),
        visual_tokens=visual.tolist(),
        visual_places=_places(source, of, visual),
        steps=entries,
        kept_mean=share,
        visual_share=whole,
        checks=int((again[:, 0] >= 0).any(1).sum()),
        kv_bytes_live=live,
        kv_bytes_reserved=source.bytes_reserved,
        flops=cost.flops,
        flops_unpruned=cost.flops_unpruned,
        flops_unreduced=whole_cost.flops_unpruned,
        paper_cost=whole_cost.paper_cost,
        exact_cost=whole_cost.exact_cost,
        bytes_read=cost.bytes_read,
        bytes_read_unpruned=cost.bytes_read_unpruned,
        bytes_read_unreduced=whole_cost.bytes_read_unpruned,
    )


def _beside_unreduced(source: Snapshot, of: slice, arguments: dict[str, Any]) -> flops.GenerationCost:
    """What the same steps would have cost with the visual tokens before the reducers (``.._unpruned``), and their share of that."""
    assert source.visual_in is not None and source.record is not None
    before = {"visual_tokens": source.visual_in[of].tolist(), "cached_visual": source.record.cached[2][of].tolist()}
    return flops.generation_cost(source.shape, **{**arguments, **before})


def _places(source: Snapshot, of: slice, visual: Tensor) -> list[list[int]] | None:
    if source.visual_place is None:
        return None
    return [row[:count] for row, count in zip(source.visual_place[of].tolist(), visual.tolist(), strict=True)]


def _kept_by_group(kept: Tensor, visual: Tensor, groups: int) -> Any:
    """``[steps, groups, B]``, the full group first; a step that was not (-1) stays so."""
    full = torch.where(kept[:, :1] < 0, -1, visual[None, None])
    return (kept if groups == 1 else torch.cat([full, kept], dim=1)).numpy()
