"""The operators in plain PyTorch: the specification that every other backend is compared with.

Runs on any device and in float16, bfloat16, float32 and float64. Nothing here reads a device value on the host, and no shape depends on
data. Arguments are taken as valid: ``dyrate_kernels.ops`` checks them. Statistics are float32, float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layers
from .contract import Decide, PagedRows, Rows, accumulator

SYSTEM, IMAGE, INSTRUCTION, RESPONSE = 0, 1, 2, 3  # token types
TYPES = 4


class _Regions(NamedTuple):
    """The two row regions of one layer as attention reads them: ``[visual | text]``, each with its own rows."""

    keys: tuple[Tensor, Tensor]  # [B, Hkv, R, D]
    values: tuple[Tensor, Tensor]  # the same, finite in every row that is not read
    live: Tensor  # bool [B, Rv + Rt]
    source: Tensor | None  # int64 [B, Rv], the row each visual row was gathered from; None: they are the first Rv rows

    @property
    def visual_rows(self) -> int:
        return self.keys[0].shape[2]


def _gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows ``[B, H, C, D]`` at index ``[B, M]`` -> ``[B, H, M, D]``."""
    batch, heads, capacity, dim = rows.shape
    sequence = torch.arange(batch, device=rows.device)[:, None, None]
    head = torch.arange(heads, device=rows.device)[:, None]
    index = index[:, None]
    if not rows.is_contiguous():
        return rows[sequence, head, index]
    # whole rows of one flat table: 12 times as fast as Tensor.gather on a CPU (0.3 ms against 3.5 ms for 4 x 8 x 360 rows of 64)
    flat = ((sequence * heads + head) * capacity + index).flatten()
    return rows.view(-1, dim).index_select(0, flat).view(batch, heads, index.shape[-1], dim)


def _regions(rows: Rows, dtype: torch.dtype) -> _Regions:
    key, visual_capacity, kept, n_kept = rows.key, rows.visual_capacity, rows.kept, rows.n_kept
    visual_bound, text_bound = rows.visual_bound, rows.text_bound
    device = key.device
    visual = visual_capacity if visual_bound is None else min(visual_bound, visual_capacity)
    text_capacity = key.shape[2] - visual_capacity
    text = text_capacity if text_bound is None else min(text_bound, text_capacity)
    text_rows = slice(visual_capacity, visual_capacity + text)
    live_text = torch.arange(text, device=device) < rows.n_text[:, None]
    index = None
    if kept is None or n_kept is None:
        live_visual = torch.arange(visual, device=device) < rows.n_visual[:, None]
    else:
        listed = torch.arange(kept.shape[1], device=device) < n_kept[:, None]
        if 2 * kept.shape[1] > visual:  # a list this long may name most rows: a mask over all of them is cheaper than a gather
            mark = torch.zeros(kept.shape[0], visual + 1, dtype=torch.bool, device=device)
            live_visual = mark.scatter_(1, torch.where(listed, kept, visual).long(), True)[:, :visual]
        else:
            index = torch.where(listed, kept, 0).long()  # past the list's end any row will do: it is masked
            live_visual = listed
    if rows.window is not None and rows.query_position is not None and rows.position is not None:
        in_window = (rows.query_position[:, None] - rows.position) < rows.window
        visual_window = in_window[:, :visual] if index is None else in_window.gather(1, index)
        live_visual = live_visual & visual_window
        live_text = live_text & in_window[:, text_rows]

    def split(tensor: Tensor, zero_dead: bool) -> tuple[Tensor, Tensor]:
        parts = [tensor[:, :, :visual] if index is None else _gather_rows(tensor, index), tensor[:, :, text_rows]]
        for number, (part, live) in enumerate(zip(parts, (live_visual, live_text), strict=True)):
            part = part.to(dtype)
            # a dead row may hold NaN, and a weight of zero does not silence that
            parts[number] = torch.where(live[:, None, :, None], part, 0.0) if zero_dead else part
        return parts[0], parts[1]

    return _Regions(split(key, False), split(rows.value, not rows.clean), torch.cat([live_visual, live_text], 1), index)


def _probabilities(query: Tensor, rows: _Regions, scale: float) -> Tensor:
    """Attention probabilities ``[B, Hkv, G, Rv + Rt]``; exactly zero in rows that are not read."""
    column = query.transpose(-1, -2)
    logits = torch.cat([torch.matmul(keys, column) for keys in rows.keys], 2).transpose(-1, -2) * scale
    live = rows.live[:, None, None]
    logits = logits.masked_fill(~live, float("-inf"))
    # without a live row softmax gives NaN there: the mask turns it to zero. NaN and infinite logits of live rows stay softmax's business.
    return torch.softmax(logits, -1).masked_fill(~live, 0.0)


def _statistics(
    probabilities: Tensor, rows: _Regions, visual_capacity: int, text_type: Tensor | None, mass: bool, importance: bool
) -> tuple[Any, Any]:  # tensors where they were asked for, else None
    batch, visual_rows = probabilities.shape[0], rows.visual_rows
    flat = probabilities.flatten(1, 2)  # [B, Hq, R]
    by_type, per_row = None, None
    if mass:
        assert text_type is not None
        text = flat[..., visual_rows:]
        types = torch.arange(TYPES, device=flat.device)
        of_type = (text_type[:, : text.shape[-1], None] == types).to(flat.dtype)
        by_type = torch.matmul(text, of_type)
        by_type[..., IMAGE] += flat[..., :visual_rows].sum(-1)
        # a NaN of a visual row alone would leave the other types at zero
        by_type = by_type.masked_fill(by_type.sum(-1, keepdim=True).isnan(), float("nan"))
    if importance:
        mean = flat[..., :visual_rows].mean(1)
        per_row = mean.new_zeros(batch, visual_capacity)
        if rows.source is None:
            per_row[:, :visual_rows] = mean
        else:
            per_row.scatter_add_(1, rows.source, mean)  # rows past the list's end point to row 0 and add an exact zero
    return by_type, per_row


def rotate(rows: Rows) -> Rows:
    """Returns the rows with query and new key rotated as ``layers.rotate`` does it for one column; the same where no cos is given."""
    if rows.cos is None or rows.sin is None:
        return rows
    key = rows.query[:, :0] if rows.new_key is None else rows.new_key
    query, key = layers.rotate(rows.query[:, :, None], key[:, :, None], rows.cos[:, None], rows.sin[:, None])
    return rows._replace(query=query[:, :, 0], new_key=None if rows.new_key is None else key[:, :, 0], cos=None, sin=None)


def append(rows: Rows) -> None:
    """Writes ``new_key``, ``new_value`` ``[B, Hkv, D]`` into each sequence's newest text row, in place; nothing where none are given."""
    row = (rows.visual_capacity + rows.n_text.long() - 1).clamp(min=0)
    sequence = torch.arange(rows.key.shape[0], device=rows.key.device)
    for into, new in ((rows.key, rows.new_key), (rows.value, rows.new_value)):
        if new is not None:
            old = into[sequence, :, row]
            into.transpose(1, 2).index_put_((sequence, row), torch.where((rows.n_text > 0)[:, None, None], new, old))


def _grouped(rows: Rows) -> Tensor:
    """The query as ``[B, Hkv, G, D]``, in the dtype of sums."""
    batch, heads, dim = rows.query.shape
    kv_heads = rows.key.shape[1]
    return rows.query.to(accumulator(rows.query)).reshape(batch, kv_heads, heads // kv_heads, dim)


def decode_attention(rows: Rows, *, mass: bool, importance: bool) -> tuple[Tensor, Any, Any]:
    """See ``dyrate_kernels.ops.decode_attention``."""
    rows = rotate(rows)
    if rows.new_key is not None:
        append(rows)
    query, grouped = rows.query, _grouped(rows)
    regions = _regions(rows, grouped.dtype)
    probabilities = _probabilities(grouped, regions, rows.scale)
    weights = probabilities.split([regions.visual_rows, probabilities.shape[-1] - regions.visual_rows], -1)
    output = torch.matmul(weights[0], regions.values[0]) + torch.matmul(weights[1], regions.values[1])
    by_type, per_row = _statistics(probabilities, regions, rows.visual_capacity, rows.text_type, mass, importance)
    return output.reshape(*query.shape[:2], rows.value.shape[-1]).to(query.dtype), by_type, per_row


def score_last_query(rows: Rows) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.score_last_query``."""
    grouped = _grouped(rows)
    regions = _regions(rows._replace(value=rows.value[..., :0], kept=None, n_kept=None, clean=True), grouped.dtype)
    probabilities = _probabilities(grouped, regions, rows.scale)
    return _statistics(probabilities, regions, rows.visual_capacity, rows.text_type, True, True)


def _order_key(values: Tensor) -> Tensor:
    """int64 keys in the order of ``values``: equal where those are equal (0.0 and -0.0 too), NaN below -inf."""
    bits = (values.double() + 0.0).view(torch.int64)
    ordered = bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)
    return torch.where(values.isnan(), torch.iinfo(torch.int64).min + 1, ordered)


def predict_rate(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.predict_rate``."""
    dtype = accumulator(mass)
    logits = torch.matmul(mass.flatten(1).to(dtype), weight.to(dtype).t()) + bias.to(dtype)
    index = _order_key(logits).argmax(-1)  # the first of equal ones
    return rates.double().index_select(0, index), index


def keep_count(n_visual: Tensor, rate: Tensor) -> Tensor:
    """See ``dyrate_kernels.ops.keep_count``."""
    total = n_visual.double()
    # 1e-6: 576 * (1 - 0.9) is 57.6 - tiny, 100 * (1 - 0.9) is 10 - tiny and must give 10
    count = torch.floor(total * (1.0 - rate.double()) + 1e-6)
    count = torch.where(count.isnan(), total, count)
    return torch.minimum(count.clamp(min=0), total).to(torch.int32)


def select_tokens(score: Tensor, count: Tensor, n_visual: Tensor, *, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.select_tokens``."""
    batch, tokens = score.shape
    index = torch.arange(tokens, device=score.device)
    candidate = index < n_visual[:, None]
    if alive is not None:
        candidate = candidate & alive
    n_kept = torch.minimum(count.clamp(min=0), candidate.sum(1)).to(torch.int32)
    key = torch.where(candidate, _order_key(score), torch.iinfo(torch.int64).min)
    order = key.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(candidate).scatter_(1, order, index < n_kept[:, None])
    # a prefix sum gives each chosen token its entry; the others go to an entry past the end that is cut off
    target = torch.where(chosen, chosen.cumsum(1) - 1, tokens)
    kept = torch.full((batch, tokens + 1), -1, dtype=torch.int32, device=score.device)
    kept.scatter_(1, target, index.to(torch.int32).expand(batch, tokens))
    return kept[:, :tokens].contiguous(), n_kept


def compact_(rows: list[Tensor], kept: Tensor, n_kept: Tensor, n_visual: Tensor) -> None:
    """See ``dyrate_kernels.ops.compact_``."""
    batch, width = kept.shape
    # holes number at most min(n, m - n), where m is below the capacity
    moves = min([width, *(tensor.shape[-1 if tensor.dim() == 2 else -2] // 2 for tensor in rows)])
    if not rows or batch == 0 or moves == 0:
        return
    device = kept.device
    row = torch.arange(width, device=device)
    n = n_kept[:, None]
    listed = row < n
    low = torch.where(listed & (kept < n), kept, width).long()
    filled = torch.zeros(batch, width + 1, dtype=torch.bool, device=device).scatter_(1, low, True)[:, :width]
    hole = (row < n) & ~filled
    high = listed & (kept >= n)
    # unused moves copy the last kept row onto itself: nothing else writes that row, whether it stays or is a source
    last = kept.gather(1, (n_kept.long() - 1).clamp(min=0)[:, None])
    rest = torch.where(n > 0, last, 0).long().expand(batch, moves)

    def listing(mask: Tensor, content: Tensor) -> Tensor:
        """The content under the mask, in order, at the front; ``rest`` behind it."""
        target = torch.where(mask, mask.cumsum(1) - 1, moves)
        out = torch.cat([rest, rest[:, :1]], 1)
        return out.scatter(1, target, content.long())[:, :moves]

    source = listing(high, kept)
    target = listing(hole, row.expand(batch, width))
    sequence = torch.arange(batch, device=device)[:, None]
    for tensor in rows:
        view = tensor if tensor.dim() == 2 else tensor.transpose(1, 2)
        view.index_put_((sequence, target), view[sequence, source])


def reorder_(rows: list[Tensor], index: Tensor) -> None:
    """See ``dyrate_kernels.ops.reorder_``."""
    for tensor in rows:
        tensor.copy_(tensor.index_select(0, index))


def decode_step(rows: Rows, decide: Decide) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``dyrate_kernels.ops.decode_step``."""
    output, mass, importance = decode_attention(rows, mass=True, importance=True)
    return output, mass, importance, *_decide(mass, importance, rows.n_visual, decide)


def _decide(mass: Tensor, importance: Tensor, n_visual: Tensor, decide: Decide) -> tuple[Tensor, Tensor, Tensor]:
    """kept, n_kept and rate from the statistics of a step."""
    weight, bias, rates, count, score, alive, max_kept = decide
    rate = None
    if count is None:
        assert weight is not None and bias is not None and rates is not None
        rate, _ = predict_rate(mass, weight, bias, rates)
        count = keep_count(n_visual, rate)
    if max_kept is not None:
        count = torch.minimum(count, max_kept)
    kept, n_kept = select_tokens(importance if score is None else score, count, n_visual, alive=alive)
    if rate is None:
        rate = 1.0 - n_kept.double() / n_visual.clamp(min=1)
        rate = torch.where(n_visual > 0, rate, 0.0)
    return kept, n_kept, rate


# ---- paged rows -----------------------------------------------------------------------------------------------------------------


def gather(paged: PagedRows, mass: bool, statistics: bool) -> tuple[Rows, Tensor]:
    """Returns the rows of paged sequences laid out as ``decode_attention`` reads them, one sequence a query row (visual places first, then
    text), and the positions int32 ``[R, V]`` of the visual places; V is 0 where every row is read in the order of positions.
    """
    key, n_rows, kept = paged.key, paged.n_rows, paged.kept
    device, rows = key.device, n_rows.shape[0]
    size = key.shape[1]
    capacity = paged.block_table.shape[1] * size
    table = paged.block_table if capacity else paged.block_table.new_zeros(paged.block_table.shape[0], 1)
    text_capacity = capacity if paged.row_bound is None else min(paged.row_bound, capacity)
    owner = torch.arange(rows, device=device) if paged.sequence is None else paged.sequence.long()
    text = torch.arange(text_capacity, dtype=torch.int32, device=device).expand(rows, -1)
    types: Tensor | None = None
    visual = text[:, :0]
    n_read, n_text, text_places = torch.zeros_like(n_rows), n_rows, text  # every row, in the order of positions
    if kept is not None or statistics:
        assert paged.n_visual is not None and paged.text_position is not None
        if kept is not None and paged.n_kept is not None:
            visual, n_read = kept, paged.n_kept
        elif paged.visual_position is not None:
            visual, n_read = paged.visual_position.index_select(0, owner), paged.n_visual
        n_text = n_rows - paged.n_visual
        known = min(paged.text_position.shape[1], text_capacity)
        written = torch.full((rows, text_capacity), -1, dtype=torch.int32, device=device)
        written[:, :known] = paged.text_position[:, :known].index_select(0, owner)
        text_places = torch.where(written < 0, text + paged.n_visual[:, None], written)
        if mass and paged.text_type is not None:
            types = torch.full((rows, text_capacity), RESPONSE, dtype=torch.uint8, device=device)
            types[:, :known] = paged.text_type[:, :known].index_select(0, owner)
    live = torch.cat([torch.arange(visual.shape[1], device=device) < n_read[:, None], text < n_text[:, None]], 1)
    position = torch.where(live, torch.cat([visual, text_places], 1), 0)
    # a place that is not read may point anywhere: block 0 is there
    block = torch.where(live, table.index_select(0, owner).gather(1, (position // size).long()), 0).long()
    row = (position % size).long()
    return Rows(
        paged.query, key[block, row].transpose(1, 2), paged.value[block, row].transpose(1, 2), n_read, n_text, visual.shape[1], paged.scale,
        text_type=types, position=position, query_position=n_rows - 1, window=paged.window,
    ), visual  # fmt: skip


def paged_attention(rows: PagedRows, *, mass: bool, importance: bool, out: Tensor | None = None) -> tuple[Tensor, Any, Any]:
    """See ``dyrate_kernels.ops.paged_attention``: the rows are gathered, the rest is ``decode_attention``."""
    gathered, _ = gather(rows, mass, mass or importance)
    output, by_type, per_row = decode_attention(gathered, mass=mass, importance=importance)
    return output if out is None else out.copy_(output), by_type, per_row


def paged_step(rows: PagedRows, decide: Decide) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``dyrate_kernels.ops.paged_step``."""
    gathered, listed = gather(rows, True, True)
    output, mass, importance, index, n_chosen, rate = decode_step(gathered, decide)
    chosen = torch.where(index < 0, -1, listed.gather(1, index.clamp(min=0).long())) if listed.shape[1] else index
    return output, mass, importance, chosen, n_chosen, rate
