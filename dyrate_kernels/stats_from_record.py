"""From what a generation recorded to what ``Handle.stats()`` returns: reads the device once, and counts what the steps cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import flops
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.record import Part, Record, Snapshot, first_columns, parts_of, windowed
from dyrate_kernels.stats import Stats, Step


def stats_from_record(source: Snapshot, sequence: int | None = None, new_tokens: int | None = None) -> Stats:
    """Reads a record from the device.

    Args:
        sequence: what this one of the batch would have reported alone; None: all.
        new_tokens: only its first steps: an answer that ended before others of its batch. None: all.

    Raises:
        RuntimeError: nothing was generated yet; or ``sequence`` is None, and some left the batch before the others.
        ValueError: there is no such sequence or step.
    """
    source, sequence = source.of(sequence)
    record, policy = source.record, source.policy
    if record is None or record.steps == 0:
        raise RuntimeError("nothing was generated yet: call model.generate(...) on the patched model, then stats()")
    if sequence is not None and not 0 <= sequence < record.batch:
        raise ValueError(f"sequence must be in [0, {record.batch - 1}], got {sequence}")
    if new_tokens is not None and not 1 <= new_tokens <= record.steps:
        raise ValueError(f"new_tokens must be in [1, {record.steps}], got {new_tokens}")
    assert source.n_text is not None  # where there is a record, something was stored
    of = slice(None) if sequence is None else slice(sequence, sequence + 1)
    steps = record.steps if new_tokens is None else new_tokens
    kept = record.kept[:steps, :, of].cpu()
    visual = source.n_visual[0][of].cpu()
    text = source.n_text[of].cpu() - (record.steps - steps)
    rate = record.rate[:steps, of].cpu().masked_fill(visual == 0, 0.0).tolist()
    sizes = torch.tensor([len(layers) for layers in (source.group_layers[1:] or source.group_layers)], dtype=torch.float64)
    mean_kept = (kept.double() * sizes[None, :, None]).sum(1) / sizes.sum()
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
    held = kept[-1] if source.retention.moves else torch.stack([count[of].cpu() for count in source.n_visual])
    live, reserved = _bytes_held(source, of, held, text)
    arguments = _cost_arguments(source, of, parts, kept, again, visual, text)
    cost = flops.generation_cost(source.shape, **arguments)
    whole_cost = cost if source.visual_in is None else _beside_unreduced(source, of, parts, arguments)
    return Stats(
        policy=policy.name,
        predictor=policy.predictor_name,
        backend=source.backend,
        retention=source.retention.name,
        k=policy.k,
        vision=source.vision,
        visual_tokens_in=visual.tolist() if source.visual_in is None else source.visual_in[of].tolist(),
        visual_tokens=visual.tolist(),
        visual_places=_visual_places(source, of, visual),
        steps=_steps(record, of, mean_kept, rate, visual),
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
        pool=source.retention.pool,
        pool_by=source.retention.pool_by,
    )


def _steps(record: Record, of: slice, mean_kept: Tensor, rate: list[list[float]], visual: Tensor) -> list[Step]:
    """One entry for each step that ``mean_kept`` ``[steps, B]`` has."""
    mass = record.mass[: len(mean_kept), of].tolist()
    entries = []
    for index, tokens in enumerate(mean_kept):
        importance = kept_tokens = None
        if record.importance is not None and record.chosen is not None:
            importance = [row[:n].tolist() for row, n in zip(record.importance[index, of].cpu(), visual.tolist(), strict=True)]
            kept_tokens = [row.nonzero().flatten().tolist() for row in record.chosen[index, of].cpu()]
        entries.append(Step(index, tokens.round().int().tolist(), rate[index], mass[index], importance, kept_tokens))
    return entries


def _cost_arguments(
    source: Snapshot, of: slice, parts: list[Part], kept: Tensor, again: Tensor, visual: Tensor, text: Tensor
) -> dict[str, Any]:  # fmt: skip
    """Returns the arguments of :func:`flops.generation_cost`; kept, again: ``[steps, groups, B]``."""
    record = source.record
    assert record is not None
    by_part = [part.group for part in parts]
    arguments: dict[str, Any] = {
        "text_rows": (text - (len(kept) - 1)).tolist(),
        "visual_tokens": visual.tolist(),
        "group_layers": [len(part.layers) for part in parts],
        "kept": kept[:, by_part].numpy(),
        "again": again[:, by_part].numpy() if record.again is not None else None,
        "prefill_shrunk": source.retention.shrinks,
        "bytes_per_row": [source.bytes_per_row[part.layers[0]] for part in parts],
        "cached_visual": record.before.visual[of].tolist(),
        "cached_text": record.before.text[of].tolist(),
        "computed": None,
    }
    if record.computed is not None:
        before = record.before.visual[of].cpu()
        arguments["computed"] = _by_group(record.computed[None, :, of].cpu(), visual - before, len(source.group_layers))[0, by_part].numpy()
    if source.text_column is not None:
        arguments |= _hidden_by_windows(source, of, parts, kept, again, visual, text)
    return arguments


def _bytes_held(source: Snapshot, of: slice, held: Tensor, text: Tensor) -> tuple[int, int]:
    """Bytes of the rows that these sequences hold, and of the buffers that each alone would have; held: ``[groups, B]`` visual rows."""
    assert source.text_asked is not None
    asked = source.text_asked[of].tolist()
    live = reserved = 0
    for layers, visual, most in zip(source.group_layers, held, source.most_visual, strict=True):
        rows = int((visual + text).sum())
        room = sum(RowStore.rows_reserved(*each) for each in zip(most[of].tolist(), asked, text.tolist(), strict=True))
        live += sum(source.bytes_per_row[layer] * rows for layer in layers)
        reserved += sum(source.bytes_per_row[layer] * room for layer in layers)
    return live, reserved


def _hidden_by_windows(
    source: Snapshot, of: slice, parts: list[Part], kept: Tensor, again: Tensor, visual: Tensor, text: Tensor
) -> dict[str, Any]:  # fmt: skip
    """``hidden``, ``hidden_again`` and ``hidden_unpruned`` of :func:`flops.generation_cost`."""
    record = source.record
    assert record is not None and source.text_column is not None and source.token_column is not None
    steps, _, batch = kept.shape
    text_column, token_column = source.text_column[of].cpu(), source.token_column[of].cpu()
    visual_before, text_before = (before[of].cpu() for before in record.before[:2])
    first = first_columns(text_column, token_column, text - (steps - 1), visual, visual_before, text_before)
    column = torch.cat([first[None], (source.prompt_end + torch.arange(steps - 1))[:, None].expand(-1, batch)])
    near, near_again = (None if each is None else each[:steps, :, of].cpu() for each in (record.near, record.near_again))
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
        if part in pruned and near is not None:
            pruned_index = pruned.index(part)
            hidden[:, index] = texts + kept[:, part.group] - near[:, pruned_index]
            if near_again is not None:
                hidden_again[:, index] = texts + again[:, part.group] - near_again[:, pruned_index]
    return {"hidden": hidden.numpy(), "hidden_again": hidden_again.numpy(), "hidden_unpruned": hidden_unpruned.numpy()}


def _beside_unreduced(source: Snapshot, of: slice, parts: list[Part], arguments: dict[str, Any]) -> flops.GenerationCost:
    """Returns what the same steps would have cost with the visual tokens before the reducers (``.._unpruned``), and their share of that."""
    assert source.visual_in is not None and source.record is not None
    visual, before = source.visual_in[of].cpu(), source.record.before.visual_in[of].cpu()
    arguments = {**arguments, "visual_tokens": visual.tolist(), "cached_visual": before.tolist(), "computed": None}
    if source.text_column is not None:
        steps = len(arguments["kept"])
        length = visual + torch.tensor(arguments["text_rows"]) + torch.arange(steps)[:, None]  # [steps, B]
        length[0] = before + torch.tensor(arguments["cached_text"]) + 1  # what the prompt's first row sees
        windows = [part.window for part in parts]
        hidden = [torch.zeros_like(length) if window is None else (length - window).clamp(min=0) for window in windows]
        arguments["hidden_unpruned"] = torch.stack(hidden, 1).numpy()
    return flops.generation_cost(source.shape, **arguments)


def _visual_places(source: Snapshot, of: slice, visual: Tensor) -> list[list[int]] | None:
    if source.visual_place is None or source.visual_in is None or not bool(source.visual_in[of].any()):
        return None
    return [row[:count] for row, count in zip(source.visual_place[of].tolist(), visual.tolist(), strict=True)]


def _by_group(kept: Tensor, full: Tensor, groups: int) -> Tensor:
    """``[steps, groups, B]`` of the pruned groups -> of all, ``full`` ``[B]`` for the first; a step that was not (-1) stays so."""
    if groups == 1:
        return kept
    return torch.cat([torch.where(kept[:, :1] < 0, -1, full[None, None]), kept], dim=1)
