"""What a generation really did: recorded on the device while it runs, read once when asked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyrate_kernels import flops
from dyrate_kernels.cache import VisualCache

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
        bytes_read, bytes_read_unpruned: weights, as the model holds them, and key/value rows inside the windows that the decode steps read.
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


_BY_STEP = ("rate", "mass", "kept", "again", "near", "near_again", "importance", "chosen")


def first_columns(
    text_column: Tensor, token_column: Tensor, n_text: Tensor, n_visual: Tensor, visual_before: Tensor, text_before: Tensor
) -> Tensor:
    """int ``[B]``: the column of the first row, text or visual, that came after the first ``..before`` ones."""
    last = torch.iinfo(torch.int32).max
    first = text_column.new_full(n_text.shape, last)
    for column, count, before in ((text_column, n_text, text_before), (token_column, n_visual, visual_before)):
        if column.shape[1]:
            found = column.gather(1, before.long().clamp(max=column.shape[1] - 1)[:, None])[:, 0]
            first = torch.where(before < count, torch.minimum(first, found), first)
    return first


class Record:
    """Per-step tensors of one generation. Writing is a few small copies on the device, at an index that lives on the device."""

    def __init__(self, session: Session, batch: int) -> None:
        cache = session.cache
        self.device = cache.n_text.device
        self.groups = max(len(cache.groups) - 1, 1)
        self.batch = batch
        self.capacity = 0
        self.steps = 0  # one more than the newest step written
        self.rate = self.mass = self.kept = self.again = self.importance = self.chosen = self.near = self.near_again = None
        self.computed: Tensor | None = None
        self.parts = windowed([group.layers for group in cache.groups], session.shape.windows)
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
        if self.parts:  # of what is kept, the rows that the window of each part shows
            self.near = wider(self.near, len(self.parts), self.batch, dtype=torch.int32)
            if self.counts_again:
                self.near_again = wider(self.near_again, len(self.parts), self.batch, dtype=torch.int32)
        if self.keep_importance:
            self.importance = wider(self.importance, self.batch, self.tokens, dtype=torch.float32)
            self.chosen = wider(self.chosen, self.batch, self.tokens, dtype=torch.bool)
        self.capacity = capacity

    def tensors(self) -> list[Tensor]:
        """Those that a step writes."""
        return [tensor for name in _BY_STEP if (tensor := getattr(self, name)) is not None]

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
        rate: Tensor | None = None, chosen: Tensor | None = None, allowed: Mapping[int, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Notes one step.

        Args:
            step: None for a decode step (the session's own device counter is the index).
            mass: ``[B, Hq, 4]``.
            importance: ``[B, N]`` or None.
            kept: int32 ``[G, B]``, rate ``[B]``, chosen bool ``[B, N]``, and allowed, by group likewise, where the session and its groups
                do not say it.
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
            if self.parts:
                self.near_again.index_copy_(0, index, self.near.index_select(0, index))
        if self.parts:
            self.near.index_copy_(0, index, self._near(session, step, number, kept, reads_all, allowed or {})[None])
        if step == 0 and session.evict:
            self.computed = self._computed(session)
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

    def _computed(self, session: Session) -> Tensor:
        """int64 ``[G, B]``: visual tokens of this prompt that each group computes, in the last column also where it is dropped."""
        cache, filled = session.cache, session.forward.filled
        visual, text = cache.full.n_visual - session.cached[0], cache.n_text - session.cached[1]
        groups = range(len(cache.groups) > 1, len(cache.groups))
        return torch.stack([filled[group].sum(1) - text if group in filled else visual.long() for group in groups])

    def _near(
        self, session: Session, step: int | None, number: int, kept: Tensor, reads_all: bool, allowed: Mapping[int, Tensor]
    ) -> Tensor:  # fmt: skip
        """int32 ``[parts, B]``: kept visual rows that the window of each part shows to step ``number``."""
        cache, newest = session.cache, session.turn_end + number - 1
        if step is None:
            column = session.column
        elif step > 0:
            column = torch.full((1,), newest, dtype=torch.int32, device=self.device)
        else:
            held = (cache.text_column, cache.token_column, cache.n_text, cache.full.n_visual)
            column = first_columns(*held, *session.cached[:2])
        near = []
        for part in self.parts:
            group = cache.groups[part.group]
            if part.window > newest:  # hides nothing yet
                near.append(kept[part.group - 1])
                continue
            columns, live = cache.token_column, None
            if part.group in allowed:
                live = allowed[part.group]
            elif session.evict:
                columns = columns.gather(1, group.token)
            elif group.kept is not None and not reads_all:
                columns, live = columns.gather(1, group.kept.clamp(min=0).long()), group.kept >= 0
            if live is None:
                live = torch.arange(columns.shape[1], device=self.device) < group.n_visual[:, None]
            columns = columns[:, : live.shape[1]]
            near.append((live[:, : columns.shape[1]] & (columns > column[:, None] - part.window)).sum(1, dtype=torch.int32))
        return torch.stack(near)

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
        for name in (*_BY_STEP, "computed"):
            tensor = getattr(self, name)
            if tensor is not None:
                batch_dim = 2 if name in ("kept", "again", "near", "near_again") else 1
                picked = pick(tensor.movedim(batch_dim, 0).contiguous()).movedim(0, batch_dim)
                setattr(self, name, tensor.copy_(picked) if picked.shape == tensor.shape else picked.contiguous())
        self.batch = self.rate.shape[1]


@dataclass(frozen=True)
class Part:
    """The layers of a group that share a sliding window.

    Attributes:
        group: index of the group.
        layers: which they are.
        window: columns that they read back, their own among them; None: all.
    """

    group: int
    layers: list[int]
    window: int | None


def parts_of(groups: Sequence[range], windows: Sequence[int | None]) -> list[Part]:
    """Groups of layers, each by window.

    Args:
        groups: the layers of each group.
        windows: ``ModelShape.windows``.
    """
    of = windows or [None] * (groups[-1].stop if groups else 0)
    return [
        Part(index, [layer for layer in layers if of[layer] == window], window)
        for index, layers in enumerate(groups)
        for window in dict.fromkeys(of[layer] for layer in layers)
    ]


def windowed(groups: Sequence[range], windows: Sequence[int | None]) -> list[Part]:
    """The pruned parts that have a window: what :attr:`Record.near` counts."""
    return [part for part in parts_of(groups, windows) if part.window is not None and part.group > 0]


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
        turn_end: column at which the prompt ended.
        text_asked, most_visual: int32 ``[B]``, the latter by group: what the room of each sequence alone follows from.
        text_column, token_column: int32 ``[B, ..]``, of text rows and visual tokens, where layers have windows; else None.
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
    turn_end: int = 0
    text_asked: Tensor | None = None
    most_visual: list[Tensor] | None = None
    text_column: Tensor | None = None
    token_column: Tensor | None = None
    vision: str | None = None
    visual_in: Tensor | None = None
    visual_place: Tensor | None = None


def snapshot(session: Session) -> Snapshot:
    """Copies a session's small tensors; reads nothing on the host."""
    cache = session.cache
    started = cache.is_initialized
    columns = started and bool(session.shape.windows)
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
        turn_end=session.turn_end,
        text_asked=cache.text_asked.clone() if started else None,
        most_visual=[group.most.clone() for group in cache.groups] if started else [],
        text_column=cache.text_column.clone() if columns else None,
        token_column=cache.token_column.clone() if columns else None,
        vision=session.vision,
        visual_in=None if session.visual_in is None else session.visual_in.clone(),
        visual_place=session.visual_place,
    )


def collect(source: Snapshot, sequence: int | None = None, new_tokens: int | None = None) -> Stats:
    """Reads a record from the device.

    Args:
        sequence: what this one of the batch would have reported alone; None: all.
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
    mass = record.mass[:steps, of].tolist()
    kept = record.kept[:steps, :, of].cpu()
    visual = source.n_visual[0][of].cpu()
    text = source.n_text[of].cpu() - (record.steps - steps)
    rate = record.rate[:steps, of].cpu().masked_fill(visual == 0, 0.0).tolist()
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
    if sequence is not None:
        again = again.masked_fill(visual == 0, -1)  # alone it has nothing to compare
    checked = (again[:, 0] >= 0)[:, with_image]
    read_again = (again.double() * sizes[None, :, None]).sum(1)[:, with_image] / sizes.sum() / visual[with_image]
    whole = 1.0 - pruned + pruned * share
    if bool(checked.any()):
        whole += ((1.0 - pruned + pruned * read_again) * checked).sum(0).mean().item() / steps
    groups, parts = len(source.group_layers), parts_of(source.group_layers, source.shape.windows)
    kept, again = _by_group(kept, visual, groups), _by_group(again, visual, groups)
    evict = source.retention == "evict"
    held = kept[-1] if evict else visual.expand(groups, -1)
    live, reserved = _bytes_held(source, of, held, text)
    arguments: dict[str, Any] = {
        "text_rows": (text - (steps - 1)).tolist(),
        "visual_tokens": visual.tolist(),
        "group_layers": [len(part.layers) for part in parts],
        "kept": kept[:, [part.group for part in parts]].numpy(),
        "again": again[:, [part.group for part in parts]].numpy() if record.again is not None else None,
        "prefill_shrunk": evict,
        "bytes_per_row": [source.bytes_per_row[part.layers[0]] for part in parts],
        "cached_visual": record.cached[0][of].tolist(),
        "cached_text": record.cached[1][of].tolist(),
        "computed": None,
    }
    if evict:
        new = _by_group(record.computed[None, :, of].cpu(), visual - record.cached[0][of].cpu(), groups)[0]
        arguments["computed"] = new[[part.group for part in parts]].numpy()
    if source.text_column is not None:
        arguments |= _hidden_by_windows(source, of, parts, kept, again, visual, text)
    cost = flops.generation_cost(source.shape, **arguments)
    whole_cost = cost if source.visual_in is None else _beside_unreduced(source, of, parts, arguments)
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
        kv_bytes_reserved=source.bytes_reserved if sequence is None else reserved,
        flops=cost.flops,
        flops_unpruned=cost.flops_unpruned,
        flops_unreduced=whole_cost.flops_unpruned,
        paper_cost=whole_cost.paper_cost,
        exact_cost=whole_cost.exact_cost,
        bytes_read=cost.bytes_read,
        bytes_read_unpruned=cost.bytes_read_unpruned,
        bytes_read_unreduced=whole_cost.bytes_read_unpruned,
    )


def _bytes_held(source: Snapshot, of: slice, held: Tensor, text: Tensor) -> tuple[int, int]:
    """Bytes of the rows that these sequences hold, and of the buffers that each alone would have; held: ``[groups, B]`` visual rows."""
    asked = source.text_asked[of].tolist()
    live = reserved = 0
    for layers, visual, most in zip(source.group_layers, held, source.most_visual, strict=True):
        rows = int((visual + text).sum())
        room = sum(VisualCache.rows_reserved(*each) for each in zip(most[of].tolist(), asked, text.tolist(), strict=True))
        live += sum(source.bytes_per_row[layer] * rows for layer in layers)
        reserved += sum(source.bytes_per_row[layer] * room for layer in layers)
    return live, reserved


def _hidden_by_windows(
    source: Snapshot, of: slice, parts: list[Part], kept: Tensor, again: Tensor, visual: Tensor, text: Tensor
) -> dict[str, Any]:  # fmt: skip
    """``hidden``, ``hidden_again`` and ``hidden_unpruned`` of :func:`flops.generation_cost`."""
    record = source.record
    steps, _, batch = kept.shape
    text_column, token_column = source.text_column[of].cpu(), source.token_column[of].cpu()
    visual_before, text_before = (before[of].cpu() for before in record.cached[:2])
    first = first_columns(text_column, token_column, text - (steps - 1), visual, visual_before, text_before)
    column = torch.cat([first[None], (source.turn_end + torch.arange(steps - 1))[:, None].expand(-1, batch)])
    near = near_again = None
    if record.near is not None:
        near, near_again = (
            record.near[:steps, :, of].cpu(),
            record.near_again[:steps, :, of].cpu() if record.near_again is not None else None,
        )
    pruned = windowed(source.group_layers, source.shape.windows)
    hidden, hidden_again, hidden_unpruned = (torch.zeros(steps, len(parts), batch, dtype=torch.int64) for _ in range(3))
    for index, part in enumerate(parts):
        if part.window is None:
            continue
        edge = (column - part.window).T.contiguous()  # [B, steps]: rows up to this column are hidden
        texts, tokens = (
            torch.stack([torch.searchsorted(row[:count].contiguous(), edges.to(row.dtype), right=True) for row, count, edges in
                         zip(table, counts.tolist(), edge, strict=True)]).T
            for table, counts in ((text_column, text), (token_column, visual))
        )  # fmt: skip
        hidden_unpruned[:, index] = texts + tokens
        hidden[:, index] = hidden_again[:, index] = texts + tokens
        if part in pruned:
            place = pruned.index(part)
            hidden[:, index] = texts + kept[:, part.group] - near[:, place]
            if near_again is not None:
                hidden_again[:, index] = texts + again[:, part.group] - near_again[:, place]
    return {"hidden": hidden.numpy(), "hidden_again": hidden_again.numpy(), "hidden_unpruned": hidden_unpruned.numpy()}


def _beside_unreduced(source: Snapshot, of: slice, parts: list[Part], arguments: dict[str, Any]) -> flops.GenerationCost:
    """What the same steps would have cost with the visual tokens before the reducers (``.._unpruned``), and their share of that."""
    assert source.visual_in is not None and source.record is not None
    visual, before = source.visual_in[of].cpu(), source.record.cached[2][of].cpu()
    arguments = {**arguments, "visual_tokens": visual.tolist(), "cached_visual": before.tolist(), "computed": None}
    if source.text_column is not None:
        steps = len(arguments["kept"])
        length = visual + torch.tensor(arguments["text_rows"]) + torch.arange(steps)[:, None]  # [steps, B]
        length[0] = before + torch.tensor(arguments["cached_text"]) + 1  # what the prompt's first row sees
        windows = [part.window for part in parts]
        hidden = [torch.zeros_like(length) if window is None else (length - window).clamp(min=0) for window in windows]
        arguments["hidden_unpruned"] = torch.stack(hidden, 1).numpy()
    return flops.generation_cost(source.shape, **arguments)


def _places(source: Snapshot, of: slice, visual: Tensor) -> list[list[int]] | None:
    if source.visual_place is None or not bool(source.visual_in[of].any()):
        return None
    return [row[:count] for row, count in zip(source.visual_place[of].tolist(), visual.tolist(), strict=True)]


def _by_group(kept: Tensor, full: Tensor, groups: int) -> Tensor:
    """``[steps, groups, B]`` of the pruned groups -> of all, ``full`` ``[B]`` for the first; a step that was not (-1) stays so."""
    if groups == 1:
        return kept
    return torch.cat([torch.where(kept[:, :1] < 0, -1, full[None, None]), kept], dim=1)
