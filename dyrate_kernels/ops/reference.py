"""The operators in plain PyTorch: the specification that every other backend is compared with.

Runs on any device and in float16, bfloat16, float32 and float64. Nothing here reads a device value on the host, and no shape depends on
data. Arguments are taken as valid: ``dyrate_kernels.ops`` checks them. Statistics are float32, float64 for float64 inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import layers

SYSTEM, IMAGE, INSTRUCTION, RESPONSE = 0, 1, 2, 3  # token types
TYPES = 4


class _Regions(NamedTuple):
    """The two row regions of one layer as attention reads them: ``[visual | text]``, each with its own rows."""

    keys: tuple[Tensor, Tensor]  # [B, Hkv, R, D]
    values: tuple[Tensor, Tensor]  # the same, finite in every row that is not read
    live: Tensor  # bool [B, Rv + Rt]
    index: Tensor | None  # int64 [B, Rv], the row each visual row was gathered from; None: they are the first Rv rows

    @property
    def visual_rows(self) -> int:
        return self.keys[0].shape[2]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def _regions(
    key: Tensor,
    value: Tensor,
    n_visual: Tensor,
    n_text: Tensor,
    visual_capacity: int,
    kept: Tensor | None,
    n_kept: Tensor | None,
    position: Tensor | None,
    query_position: Tensor | None,
    window: int | None,
    visual_bound: int | None,
    text_bound: int | None,
    clean: bool,
    dtype: torch.dtype,
) -> _Regions:
    device = key.device
    visual = visual_capacity if visual_bound is None else min(visual_bound, visual_capacity)
    text_capacity = key.shape[2] - visual_capacity
    text = text_capacity if text_bound is None else min(text_bound, text_capacity)
    text_rows = slice(visual_capacity, visual_capacity + text)
    live_text = torch.arange(text, device=device) < n_text[:, None]
    index = None
    if kept is None:
        live_visual = torch.arange(visual, device=device) < n_visual[:, None]
    else:
        listed = torch.arange(kept.shape[1], device=device) < n_kept[:, None]
        if 2 * kept.shape[1] > visual:  # a list this long may name most rows: a mask over all of them is cheaper than a gather
            mark = torch.zeros(kept.shape[0], visual + 1, dtype=torch.bool, device=device)
            live_visual = mark.scatter_(1, torch.where(listed, kept, visual).long(), True)[:, :visual]
        else:
            index = torch.where(listed, kept, 0).long()  # past the list's end any row will do: it is masked
            live_visual = listed
    if window is not None:
        in_window = (query_position[:, None] - position) < window
        visual_window = in_window[:, :visual] if index is None else in_window.gather(1, index)
        live_visual = live_visual & visual_window
        live_text = live_text & in_window[:, text_rows]

    def split(rows: Tensor, zero_dead: bool) -> tuple[Tensor, Tensor]:
        parts = [rows[:, :, :visual] if index is None else _gather_rows(rows, index), rows[:, :, text_rows]]
        for number, (part, live) in enumerate(zip(parts, (live_visual, live_text), strict=True)):
            part = part.to(dtype)
            # a dead row may hold NaN, and a weight of zero does not silence that
            parts[number] = torch.where(live[:, None, :, None], part, 0.0) if zero_dead else part
        return parts[0], parts[1]

    return _Regions(split(key, False), split(value, not clean), torch.cat([live_visual, live_text], 1), index)


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
) -> tuple[Tensor | None, Tensor | None]:
    batch, visual_rows = probabilities.shape[0], rows.visual_rows
    flat = probabilities.flatten(1, 2)  # [B, Hq, R]
    by_type, per_row = None, None
    if mass:
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
        if rows.index is None:
            per_row[:, :visual_rows] = mean
        else:
            per_row.scatter_add_(1, rows.index, mean)  # rows past the list's end point to row 0 and add an exact zero
    return by_type, per_row


def rotated(query: Tensor, new_key: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
    """``layers.rotate`` of one column: query ``[B, Hq, D]`` and the new key ``[B, Hkv, D]`` or None; cos, sin ``[B, D]`` or ``[1, D]``."""
    key = query[:, :0] if new_key is None else new_key
    query, key = layers.rotate(query[:, :, None], key[:, :, None], cos[:, None], sin[:, None])
    return query[:, :, 0], None if new_key is None else key[:, :, 0]


def _append(key: Tensor, value: Tensor, n_text: Tensor, visual_capacity: int, new_key: Tensor, new_value: Tensor) -> None:
    """Writes ``new_key``, ``new_value`` ``[B, Hkv, D]`` into each sequence's newest text row, in place."""
    row = (visual_capacity + n_text.long() - 1).clamp(min=0)
    sequence = torch.arange(key.shape[0], device=key.device)
    for rows, new in ((key, new_key), (value, new_value)):
        old = rows[sequence, :, row]
        rows.transpose(1, 2).index_put_((sequence, row), torch.where((n_text > 0)[:, None, None], new, old))


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_visual: Tensor,
    n_text: Tensor,
    *,
    visual_capacity: int,
    scale: float,
    kept: Tensor | None = None,
    n_kept: Tensor | None = None,
    text_type: Tensor | None = None,
    position: Tensor | None = None,
    query_position: Tensor | None = None,
    window: int | None = None,
    mass: bool = False,
    importance: bool = False,
    visual_bound: int | None = None,
    text_bound: int | None = None,
    clean: bool = False,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``dyrate_kernels.ops.decode_attention``."""
    if cos is not None:
        query, new_key = rotated(query, new_key, cos, sin)
    if new_key is not None:
        _append(key, value, n_text, visual_capacity, new_key, new_value)
    batch, heads, dim = query.shape
    kv_heads = key.shape[1]
    dtype = _accumulator(query.dtype)
    rows = _regions(
        key, value, n_visual, n_text, visual_capacity, kept, n_kept, position, query_position, window, visual_bound,
        text_bound, clean, dtype,
    )  # fmt: skip
    grouped = query.to(dtype).reshape(batch, kv_heads, heads // kv_heads, dim)
    probabilities = _probabilities(grouped, rows, scale)
    weights = probabilities.split([rows.visual_rows, probabilities.shape[-1] - rows.visual_rows], -1)
    output = torch.matmul(weights[0], rows.values[0]) + torch.matmul(weights[1], rows.values[1])
    by_type, per_row = _statistics(probabilities, rows, visual_capacity, text_type, mass, importance)
    return output.reshape(batch, heads, value.shape[-1]).to(query.dtype), by_type, per_row


def score_last_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_visual: Tensor,
    n_text: Tensor,
    *,
    visual_capacity: int,
    scale: float,
    text_type: Tensor,
    position: Tensor | None = None,
    query_position: Tensor | None = None,
    window: int | None = None,
    visual_bound: int | None = None,
    text_bound: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.score_last_query``."""
    batch, heads, dim = query.shape
    kv_heads = key.shape[1]
    dtype = _accumulator(query.dtype)
    rows = _regions(
        key, value[..., :0], n_visual, n_text, visual_capacity, None, None, position, query_position, window, visual_bound,
        text_bound, True, dtype,
    )  # fmt: skip
    grouped = query.to(dtype).reshape(batch, kv_heads, heads // kv_heads, dim)
    return _statistics(_probabilities(grouped, rows, scale), rows, visual_capacity, text_type, True, True)


def _order_key(values: Tensor) -> Tensor:
    """int64 keys in the order of ``values``: equal where those are equal (0.0 and -0.0 too), NaN below -inf."""
    bits = (values.double() + 0.0).view(torch.int64)
    ordered = bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)
    return torch.where(values.isnan(), torch.iinfo(torch.int64).min + 1, ordered)


def predict_rate(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.predict_rate``."""
    dtype = _accumulator(mass.dtype)
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
    # a prefix sum gives each chosen token its place; the others go to a place past the end that is cut off
    place = torch.where(chosen, chosen.cumsum(1) - 1, tokens)
    kept = torch.full((batch, tokens + 1), -1, dtype=torch.int32, device=score.device)
    kept.scatter_(1, place, index.to(torch.int32).expand(batch, tokens))
    return kept[:, :tokens].contiguous(), n_kept


def compact_(rows: list[Tensor], kept: Tensor, n_kept: Tensor, n_visual: Tensor) -> None:
    """See ``dyrate_kernels.ops.compact_``."""
    batch, width = kept.shape
    # holes number at most min(n, m - n), where m is below the capacity
    moves = min([width, *(tensor.shape[-1 if tensor.dim() == 2 else -2] // 2 for tensor in rows)])
    if not rows or batch == 0 or moves == 0:
        return
    device = kept.device
    place = torch.arange(width, device=device)
    n = n_kept[:, None]
    listed = place < n
    low = torch.where(listed & (kept < n), kept, width).long()
    filled = torch.zeros(batch, width + 1, dtype=torch.bool, device=device).scatter_(1, low, True)[:, :width]
    hole = (place < n) & ~filled
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
    target = listing(hole, place.expand(batch, width))
    sequence = torch.arange(batch, device=device)[:, None]
    for tensor in rows:
        view = tensor if tensor.dim() == 2 else tensor.transpose(1, 2)
        view.index_put_((sequence, target), view[sequence, source])


def reorder_(rows: list[Tensor], index: Tensor) -> None:
    """See ``dyrate_kernels.ops.reorder_``."""
    for tensor in rows:
        tensor.copy_(tensor.index_select(0, index))


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_visual: Tensor,
    n_text: Tensor,
    *,
    visual_capacity: int,
    scale: float,
    text_type: Tensor,
    position: Tensor | None = None,
    query_position: Tensor | None = None,
    window: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rates: Tensor | None = None,
    count: Tensor | None = None,
    score: Tensor | None = None,
    alive: Tensor | None = None,
    max_kept: Tensor | None = None,
    visual_bound: int | None = None,
    text_bound: int | None = None,
    clean: bool = False,
    new_key: Tensor | None = None,
    new_value: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``dyrate_kernels.ops.decode_step``."""
    output, mass, importance = decode_attention(
        query, key, value, n_visual, n_text, visual_capacity=visual_capacity, scale=scale, text_type=text_type, position=position,
        query_position=query_position, window=window, mass=True, importance=True, visual_bound=visual_bound, text_bound=text_bound,
        clean=clean, new_key=new_key, new_value=new_value, cos=cos, sin=sin,
    )  # fmt: skip
    kept, n_kept, rate = _decide(mass, importance, n_visual, weight, bias, rates, count, score, alive, max_kept)
    return output, mass, importance, kept, n_kept, rate


def _decide(
    mass: Tensor,
    importance: Tensor,
    n_visual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rates: Tensor | None,
    count: Tensor | None,
    score: Tensor | None,
    alive: Tensor | None,
    max_kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """kept, n_kept and rate from the statistics of a step."""
    rate = None
    if count is None:
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


class _Gathered(NamedTuple):
    """The rows of paged sequences laid out as ``decode_attention`` reads them, one sequence a query row."""

    key: Tensor  # [R, Hkv, V + P, D]: V visual places, P text places
    value: Tensor
    n_visual: Tensor  # int32 [R]
    n_text: Tensor
    position: Tensor  # int32 [R, V + P]
    text_type: Tensor | None  # uint8 [R, P]
    listed: Tensor | None  # int32 [R, V], positions of the visual places


def _gather(
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    n_rows: Tensor,
    sequence: Tensor | None,
    visual_position: Tensor | None,
    n_visual: Tensor | None,
    text_position: Tensor | None,
    text_type: Tensor | None,
    kept: Tensor | None,
    n_kept: Tensor | None,
    row_bound: int | None,
    statistics: bool,
) -> _Gathered:
    device, rows = key.device, n_rows.shape[0]
    size = key.shape[1]
    capacity = block_table.shape[1] * size
    text_capacity = capacity if row_bound is None else min(row_bound, capacity)
    owner = torch.arange(rows, device=device) if sequence is None else sequence.long()
    text = torch.arange(text_capacity, dtype=torch.int32, device=device).expand(rows, -1)
    listed, types = None, None
    if kept is None and not statistics:  # every row, in the order of positions
        visual = text[:, :0]
        n_read, n_text, text_places = torch.zeros_like(n_rows), n_rows, text
    else:
        listed = visual = visual_position.index_select(0, owner) if kept is None else kept
        n_read = n_visual if kept is None else n_kept
        n_text = n_rows - n_visual
        known = min(text_position.shape[1], text_capacity)
        written = torch.full((rows, text_capacity), -1, dtype=torch.int32, device=device)
        written[:, :known] = text_position[:, :known].index_select(0, owner)
        text_places = torch.where(written < 0, text + n_visual[:, None], written)
        if text_type is not None:
            types = torch.full((rows, text_capacity), RESPONSE, dtype=torch.uint8, device=device)
            types[:, :known] = text_type[:, :known].index_select(0, owner)
    live = torch.cat([torch.arange(visual.shape[1], device=device) < n_read[:, None], text < n_text[:, None]], 1)
    position = torch.where(live, torch.cat([visual, text_places], 1), 0)
    # a place that is not read may point anywhere: block 0 is there
    block = torch.where(live, block_table.index_select(0, owner).gather(1, (position // size).long()), 0).long()
    row = (position % size).long()
    return _Gathered(
        key[block, row].transpose(1, 2), value[block, row].transpose(1, 2), n_read, n_text, position, types, listed
    )  # fmt: skip


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    n_rows: Tensor,
    *,
    scale: float,
    sequence: Tensor | None = None,
    visual_position: Tensor | None = None,
    n_visual: Tensor | None = None,
    text_position: Tensor | None = None,
    text_type: Tensor | None = None,
    kept: Tensor | None = None,
    n_kept: Tensor | None = None,
    window: int | None = None,
    mass: bool = False,
    importance: bool = False,
    row_bound: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``dyrate_kernels.ops.paged_attention``: the rows are gathered, the rest is ``decode_attention``."""
    rows = _gather(
        key, value, block_table, n_rows, sequence, visual_position, n_visual, text_position, text_type if mass else None, kept, n_kept,
        row_bound, mass or importance,
    )  # fmt: skip
    output, by_type, per_row = decode_attention(
        query, rows.key, rows.value, rows.n_visual, rows.n_text, visual_capacity=0 if rows.listed is None else rows.listed.shape[1],
        scale=scale, text_type=rows.text_type, position=rows.position, query_position=n_rows - 1, window=window, mass=mass,
        importance=importance,
    )  # fmt: skip
    return output if out is None else out.copy_(output), by_type, per_row


def paged_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    n_rows: Tensor,
    *,
    scale: float,
    n_visual: Tensor,
    text_position: Tensor,
    text_type: Tensor,
    sequence: Tensor | None = None,
    visual_position: Tensor | None = None,
    kept: Tensor | None = None,
    n_kept: Tensor | None = None,
    window: int | None = None,
    row_bound: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    rates: Tensor | None = None,
    count: Tensor | None = None,
    score: Tensor | None = None,
    alive: Tensor | None = None,
    max_kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``dyrate_kernels.ops.paged_step``."""
    rows = _gather(
        key, value, block_table, n_rows, sequence, visual_position, n_visual, text_position, text_type, kept, n_kept, row_bound, True
    )  # fmt: skip
    listed = rows.listed
    output, mass, importance = decode_attention(
        query, rows.key, rows.value, rows.n_visual, rows.n_text, visual_capacity=listed.shape[1], scale=scale, text_type=rows.text_type,
        position=rows.position, query_position=n_rows - 1, window=window, mass=True, importance=True,
    )  # fmt: skip
    index, n_chosen, rate = _decide(mass, importance, rows.n_visual, weight, bias, rates, count, score, alive, max_kept)
    chosen = torch.where(index < 0, -1, listed.gather(1, index.clamp(min=0).long())) if listed.shape[1] else index
    return output, mass, importance, chosen, n_chosen, rate
