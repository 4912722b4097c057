r"""Split-K flash decoding over two row regions, with attention mass, importance and the decision in the same launch or in one more.

For query head ``h`` of sequence ``b``, over the live rows ``r`` with ``z_r = scale * q_h . k_r``::

    output = sum_r softmax(z)_r v_r        mass[t] = sum_{type(r) = t} softmax(z)_r        importance_r = mean_h softmax(z)_r

One program is one split of one key/value head of one sequence. How many splits share the rows is computed on the device from the live
lengths, so a captured graph stays valid when they change; programs past that number return at once. The last split to finish combines
them (phase 2), the last key/value head of a sequence makes importance and decision (phase 3). Nobody waits for anybody: the counters
only tell a program that it is the last, and that program puts them back to zero.

The main loop walks over both regions in reading order; a block may hold rows of both. Mass is summed in phase 2, from the logits of text
rows. Forms of the loop: one query head a key/value head is a matrix-vector product, in which every row slot of the tile keeps a
softmax of its own, so that the loop has no reduction across warps; several heads are packed into ``tl.dot`` (DOT), whose rows lie along
the warps, or (ROW_WARPS) whose every warp has rows and a softmax of its own.

Logits are kept in float32 or, where a setting says so, in float16 (``stored_logit``).

Logits are in base 2. A live row whose logit is -inf gets the lowest finite number instead, which tells it from a dead row: softmax over
nothing but such rows is NaN, over no row at all it is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decision import decide_row, predict_class
from .dependent import follow
from .rotary import rotate_part

LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST_HALF = tl.constexpr(65504.0)
WHOLE = tl.constexpr(2048.0)  # what a probability of 1 is in float16, so that one of 1e-7 is no denormal and the sum of 31 is no infinity


@triton.jit
def stored_logit(logit, kind: tl.constexpr):
    """Logits as scratch memory of dtype ``kind`` holds them. float16 is right to 11 bits up to 65504: a probability then is off by
    ``2^-11 |z| ln 2`` of itself at most, where z is its logit in base 2. Dead rows stay -inf, those of the lowest number stay finite."""
    if kind == tl.float16:
        logit = tl.where(logit > LARGEST_HALF, LARGEST_HALF, logit)
        logit = tl.where((logit < -LARGEST_HALF) & (logit != float("-inf")), -LARGEST_HALF, logit)
    return logit.to(kind)


@triton.jit
def live_splits(places, most, min_blocks, BLOCK_N: tl.constexpr):
    """Splits that share so many places: of at least ``min_blocks`` blocks each, ``most`` at most, and one where there is nothing."""
    return tl.minimum(most, tl.maximum(tl.cdiv(tl.cdiv(places, BLOCK_N), min_blocks), 1))


@triton.jit
def _row_slots(BLOCK_N: tl.constexpr, ROW_WARPS: tl.constexpr):
    """The places of a block: ``[BLOCK_N]``, or ``[ROW_WARPS, BLOCK_N / ROW_WARPS]`` where each warp has rows of its own."""
    if ROW_WARPS == 1:
        return tl.arange(0, BLOCK_N)
    else:
        OWN: tl.constexpr = BLOCK_N // ROW_WARPS
        return tl.arange(0, ROW_WARPS)[:, None] * OWN + tl.arange(0, OWN)[None, :]


@triton.jit
def _attend_block(
    q, m, norm, acc, key_row, value_row, live, key_ptr, value_ptr, stride_kd, stride_vd, dim, value_dim, scale,
    DOT: tl.constexpr, HAS_OUTPUT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One block of rows joins the running softmax; returns (m, norm, acc, logits).

    The rows are the last axis of ``live`` and of ``key_row`` and ``value_row``, int64, where each begins; the axis before it, where there
    is one, is the warps'. ``q`` is ``[.., heads, dim]`` where DOT, ``m`` and ``norm`` are ``[.., heads]``; else ``[dim]`` and ``[rows]``.
    """
    offset_d = tl.arange(0, BLOCK_D)
    if DOT:
        along_d = tl.expand_dims(offset_d, 1)
        if len(live.shape) == 2:
            along_d = tl.expand_dims(along_d, 0)
        keys = tl.load(
            key_ptr + tl.expand_dims(key_row, -2) + along_d * stride_kd,
            mask=tl.expand_dims(live, -2) & (along_d < dim),
            other=0.0,
        )
        if q.dtype == tl.float32:
            logit = tl.dot(q, keys, input_precision="ieee") * scale
        else:
            logit = tl.dot(q, keys) * scale
        read = tl.expand_dims(live, -2)
    else:
        keys = tl.load(
            key_ptr + key_row[:, None] + offset_d[None, :] * stride_kd,
            mask=live[:, None] & (offset_d < dim)[None, :],
            other=0.0,
        )
        logit = tl.sum(keys.to(tl.float32) * q[None, :], 1) * scale
        read = live
    logit = tl.where(logit == float("-inf"), LOWEST, logit)
    logit = tl.where(read, logit, float("-inf"))
    if DOT:
        ROWS: tl.constexpr = len(live.shape)  # the axis of rows in logits
        top = tl.maximum(m, tl.max(logit, ROWS))
        finite = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(logit - tl.expand_dims(finite, -1))
        factor = tl.exp2(m - finite)
        norm = norm * factor + tl.sum(p, ROWS)
    else:
        top = tl.maximum(m, logit)
        finite = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(logit - finite)
        factor = tl.exp2(m - finite)
        norm = norm * factor + p
    if HAS_OUTPUT:
        along_v = tl.expand_dims(tl.arange(0, BLOCK_V), 0)
        if len(live.shape) == 2:
            along_v = tl.expand_dims(along_v, 0)
        values = tl.load(
            value_ptr + tl.expand_dims(value_row, -1) + along_v * stride_vd,
            mask=tl.expand_dims(live, -1) & (along_v < value_dim),
            other=0.0,
        )
        if DOT:
            if q.dtype == tl.float32:
                acc = tl.dot(p, values, acc=acc * tl.expand_dims(factor, -1), input_precision="ieee")
            else:
                acc = tl.dot(p.to(values.dtype), values, acc=acc * tl.expand_dims(factor, -1))
        else:
            acc = acc * factor[:, None] + p[:, None] * values.to(tl.float32)
    return top, norm, acc, logit


@triton.jit
def _paged_row(
    place, inside, n_read, n_visual, first, listed, text_position, table,
    text_listed, BLOCK_ROWS: tl.constexpr, HAS_LIST: tl.constexpr,
):  # fmt: skip
    """(position, block, row of the block) of each place of a sequence whose rows lie in blocks of BLOCK_ROWS.

    Without a list places are positions from ``first`` on. With one they are those of ``listed`` and then the text's: of
    ``text_position``, and where that ends (-1, or ``text_listed``) the n_visual visual tokens lie before.
    """
    if HAS_LIST:
        visual = place < n_read
        text = place - n_read
        known = inside & (visual | (text < text_listed))
        position = tl.load(tl.where(visual, listed + place, text_position + text), mask=known, other=-1)
        position = tl.where(position < 0, text + n_visual, position)
    else:
        position = place + first
    block = tl.load(table + position // BLOCK_ROWS, mask=inside, other=0)
    return position, block.to(tl.int64), position % BLOCK_ROWS


@triton.jit
def _store_mass(
    head, real, top, share, logits, types, mass_ptr, logit_capacity, n_text, n_typed,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Mass by type of the heads ``head`` that are ``real``, from the logits of their text rows (``logits``: of head 0). Those past the
    ``n_typed`` that have a type are of the response.

    Every row that is not text is an image's, so the image has what system, instruction and response leave of one.
    """
    offset_t = tl.arange(0, BLOCK_T)
    finite = tl.where(top == float("-inf"), 0.0, top)[:, None]
    begun = tl.zeros([head.shape[0], BLOCK_T], dtype=tl.float32)
    system = begun
    instruction = begun
    response = begun
    # one head's loads are fetched ahead; for several that would take registers from the main loop
    for begin in tl.range(0, n_text, BLOCK_T, num_stages=3 if head.shape[0] == 1 else None):
        place = begin + offset_t
        inside = place < n_text
        kind = tl.load(types + place, mask=place < n_typed, other=3).to(tl.int32)[None, :]
        z = tl.load(
            logits + head[:, None] * logit_capacity + place[None, :],
            mask=real[:, None] & inside[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        ).to(tl.float32)
        p = tl.exp2(z - finite)
        system += tl.where(kind == 0, p, 0.0)
        instruction += tl.where(kind == 2, p, 0.0)
        response += tl.where(kind == 3, p, 0.0)
    sums = tl.sum(system, 1) * share
    instructions = tl.sum(instruction, 1) * share
    responses = tl.sum(response, 1) * share
    image = 1.0 - (sums + instructions + responses)
    image = tl.where((share == 0.0) | (image < 0.0), 0.0, image)  # no row at all; rounding
    tl.store(mass_ptr + head * 4, sums, mask=real)
    tl.store(mass_ptr + head * 4 + 1, image, mask=real)
    tl.store(mass_ptr + head * 4 + 2, instructions, mask=real)
    tl.store(mass_ptr + head * 4 + 3, responses, mask=real)


@triton.jit
def _finished(counter_ptr, last):
    """True for the program that is the last of ``last + 1``; it puts the counter back to zero."""
    tl.debug_barrier()  # every thread's stores come before thread 0's release
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    final = before == last
    if final:
        tl.store(counter_ptr, 0)
    return final


@triton.jit
def _join_splits(
    m, norm, acc, first, splits, head, ours, part_ptr, part_stat_ptr, value_dim,
    HAS_OUTPUT: tl.constexpr, MAX_SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The splits ``first ..`` join the running softmax of their slots; returns (m, norm, acc)."""
    offset_v = tl.arange(0, BLOCK_V)
    split = first + tl.arange(0, SPLIT_TILE)
    here = ours[:, None] & (split < splits)[None, :]
    part = head[:, None] * MAX_SPLITS + split[None, :]
    their_m = tl.load(part_stat_ptr + part * 2, mask=here, other=float("-inf"), cache_modifier=".cg")
    their_norm = tl.load(part_stat_ptr + part * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
    top = tl.maximum(m, their_m)
    finite = tl.where(top == float("-inf"), 0.0, top)
    ours_factor = tl.exp2(m - finite)
    their_factor = tl.exp2(their_m - finite)
    norm = norm * ours_factor + their_norm * their_factor
    if HAS_OUTPUT:
        their_acc = tl.load(
            part_ptr + part[:, :, None] * BLOCK_V + offset_v[None, None, :],
            mask=here[:, :, None] & (offset_v < value_dim)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc = acc * ours_factor[:, :, None] + their_acc * their_factor[:, :, None]
    return top, norm, acc


@triton.jit
def _combine_heads(
    first_head, splits, part_ptr, part_stat_ptr, head_stat_ptr, output_ptr, value_dim,
    HAS_OUTPUT: tl.constexpr, HAS_LOGITS: tl.constexpr,
    G: tl.constexpr, BLOCK_C: tl.constexpr, MAX_SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Phase 2 for all G query heads of a key/value head: the softmax over all splits, from the softmaxes of each; returns
    (maximum, 1 / sum), ``[BLOCK_C]`` both.

    Every slot of a tile of splits keeps a softmax of its own until the end, so that no load waits for a reduction over splits.
    """
    offset_c = tl.arange(0, BLOCK_C)
    offset_v = tl.arange(0, BLOCK_V)
    ours = offset_c < G
    head = first_head + offset_c
    m = tl.full([BLOCK_C, SPLIT_TILE], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_C, SPLIT_TILE], dtype=tl.float32)
    acc = tl.zeros([BLOCK_C, SPLIT_TILE, BLOCK_V if HAS_OUTPUT else 1], dtype=tl.float32)
    if MAX_SPLITS == SPLIT_TILE:
        m, norm, acc = _join_splits(
            m, norm, acc, 0, splits, head, ours, part_ptr, part_stat_ptr, value_dim, HAS_OUTPUT, MAX_SPLITS, SPLIT_TILE, BLOCK_V
        )
    else:
        for first in tl.range(0, splits, SPLIT_TILE, num_stages=3):
            m, norm, acc = _join_splits(
                m, norm, acc, first, splits, head, ours, part_ptr, part_stat_ptr, value_dim, HAS_OUTPUT, MAX_SPLITS, SPLIT_TILE, BLOCK_V
            )
    top = tl.max(m, 1)
    finite = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.exp2(m - finite[:, None])
    total = tl.sum(norm * factor, 1)
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    share = tl.where(top == LOWEST, float("nan"), share)
    if HAS_LOGITS:
        tl.store(head_stat_ptr + head * 2, top, mask=ours)
        tl.store(head_stat_ptr + head * 2 + 1, share, mask=ours)
    if HAS_OUTPUT:
        output = tl.sum(acc * factor[:, :, None], 1) * share[:, None]
        tl.store(
            output_ptr + head[:, None] * value_dim + offset_v[None, :],
            output.to(output_ptr.dtype.element_ty),
            mask=ours[:, None] & (offset_v < value_dim)[None, :],
        )
    return top, share


@triton.jit
def importance_columns(
    logit_ptr, head_stat_ptr, importance_ptr, list_ptr, b, first, last, count, capacity, logit_capacity, heads, rows,
    NORMALISED: tl.constexpr, HAS_LIST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """importance of the columns ``[first, last)`` of sequence ``b``: the mean over heads, always summed in the same order.

    NORMALISED: there are ``rows`` rows of probabilities, each the sum over the heads of one key/value head, at the first head's place (in
    float16 times WHOLE); else ``rows`` rows of logits, one a head. A tile holds all of them (BLOCK_H >= rows), so that the loop over
    columns is pipelined.
    """
    row = tl.arange(0, BLOCK_H)
    real = row < rows
    index = b * heads + row * (heads // rows)
    if not NORMALISED:
        top = tl.load(head_stat_ptr + index * 2, mask=real, other=0.0, cache_modifier=".cg")
        share = tl.load(head_stat_ptr + index * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
    logits = logit_ptr + index[:, None] * logit_capacity
    for start in tl.range(first, last, BLOCK_I, num_stages=3):
        column = start + tl.arange(0, BLOCK_I)
        inside = column < count
        x = tl.load(logits + column[None, :], mask=real[:, None] & inside[None, :], other=0.0, cache_modifier=".cg")
        x = x.to(tl.float32)
        if NORMALISED and logit_ptr.dtype.element_ty == tl.float16:
            x = x / WHOLE
        if not NORMALISED:
            x = tl.where(x == float("-inf"), 0.0, tl.exp2(x - top[:, None]) * share[:, None])
            x = tl.where(real[:, None] & inside[None, :], x, 0.0)
        mean = tl.sum(x, 0) / heads
        if HAS_LIST:
            place = tl.load(list_ptr + column, mask=inside, other=0)
            tl.store(importance_ptr + b * capacity + place, mean, mask=inside)
        else:
            tl.store(importance_ptr + b * capacity + column, mean, mask=column < capacity)


@triton.jit
def decode_attention_kernel(  # noqa: C901 - its branches are constants of a compilation
    query_ptr, key_ptr, value_ptr, output_ptr, n_visual_ptr, n_text_ptr,
    list_ptr, n_list_ptr, text_type_ptr, position_ptr, query_position_ptr, new_key_ptr, new_value_ptr,
    table_ptr, sequence_ptr, text_position_ptr, cos_ptr, sin_ptr,
    part_ptr, part_stat_ptr, head_stat_ptr, counter_ptr, logit_ptr, mass_ptr, importance_ptr,
    weight_ptr, bias_ptr, rates_ptr, count_ptr, score_ptr, alive_ptr, max_kept_ptr, kept_ptr, n_kept_ptr, rate_ptr,
    scale, window, dim, value_dim, heads, visual_capacity, logit_capacity, min_blocks, features, classes, text_listed,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kr, stride_kd, stride_vb, stride_vh, stride_vr, stride_vd,
    stride_lb, stride_tb, stride_pb, stride_pq, stride_nkb, stride_nkh, stride_nvb, stride_nvh, stride_cb, stride_nb, stride_bt, stride_xb,
    stride_wr, stride_wc, stride_bb, stride_br, stride_sb, stride_sn, stride_ab, stride_an,
    G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, DOT: tl.constexpr, ROW_WARPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, STAGES: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_OUTPUT: tl.constexpr, HAS_MASS: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_LIST: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_NEW: tl.constexpr, HAS_ROTARY: tl.constexpr, COMBINE: tl.constexpr, IMPORTANCE: tl.constexpr, DECIDE: tl.constexpr,
    HAS_PREDICTOR: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_ALIVE: tl.constexpr, HAS_MAX: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, CHUNKS: tl.constexpr,
    PAGED: tl.constexpr, SHARED_LIST: tl.constexpr, SAME_STRIDES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid ``(splits, Hkv, B)``; see the module for the phases and ``backend.decode_attention`` for the tensors.

    MAX_SPLITS is the power of two that holds so many. Not COMBINE: ``combine_kernel`` combines several of them. HAS_ROTARY: the query and
    the new key come before their rotary embedding.

    PAGED: rows of a block, 0 where rows are not paged. Then ``b`` is a query row of sequence ``sequence[b]`` (None: ``b``), whose rows
    ``table`` finds in key and value ``[blocks, Hkv, rows, D]``; n_text counts all of its rows; ``list`` holds positions, of the sequence's
    n_visual visual tokens (SHARED_LIST) or of those that this query row reads; importance and the decision are by place in it.
    SAME_STRIDES: a row lies in value as it does in key, which spares registers.

    Scratch: part float32 ``[B, Hq, MAX_SPLITS, BLOCK_V]``; part_stat float32 ``[B, Hq, MAX_SPLITS, 2]`` (max, sum);
    head_stat float32 ``[B, Hq, 2]`` (max, 1 / sum); counter int32 ``[B, Hkv + 1]``, zero before and after; logit float32 or
    float16 ``[B, Hq, logit_capacity]``, rows in reading order: visual where importance is asked for, then text where mass is.
    """
    follow(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)

    # ---- phase 1: this split's rows ---------------------------------------------------------------------------------------------
    n_text = tl.load(n_text_ptr + b)
    sequence = b  # whose types and, where rows are paged, blocks and positions these are
    first_position = 0
    query_position = 0
    if PAGED:
        if sequence_ptr is not None:
            sequence = tl.load(sequence_ptr + b).to(tl.int64)
        query_position = n_text - 1
        n_visual = 0
        if HAS_LIST:
            n_visual = tl.load(n_visual_ptr + b)
        elif HAS_WINDOW:
            first_position = tl.maximum(n_text - window, 0)
        n_text -= n_visual + first_position
    else:
        n_visual = tl.load(n_visual_ptr + b)
    n_read = n_visual
    region_list = list_ptr
    if HAS_LIST:
        n_read = tl.load(n_list_ptr + b)
        region_list = list_ptr + (sequence if SHARED_LIST else b) * stride_lb
    if PAGED and HAS_MASS:  # more rows than the bound: there is no room for the logits of those past it
        n_read = tl.minimum(n_read, logit_capacity)
        n_text = tl.minimum(n_text, logit_capacity - n_read)
    total = n_read + n_text  # places: visual rows, or those of the list, then text rows
    blocks = tl.cdiv(total, BLOCK_N)
    splits = live_splits(total, tl.num_programs(0), min_blocks, BLOCK_N)
    if split >= splits:
        return
    first_block = (split * blocks) // splits
    last_block = ((split + 1) * blocks) // splits

    first_head = kv_head * G
    offset_g = tl.arange(0, BLOCK_G)
    offset_d = tl.arange(0, BLOCK_D)
    offset_v = tl.arange(0, BLOCK_V)
    keys = key_ptr + kv_head.to(tl.int64) * stride_kh
    values = value_ptr + kv_head.to(tl.int64) * stride_vh
    if not PAGED:
        keys += b * stride_kb
        values += b * stride_vb
    queries = query_ptr + b * stride_qb + first_head.to(tl.int64) * stride_qh

    if HAS_ROTARY:  # cos and sin of this sequence's newest position; every program rotates its queries, which is a few elements
        half = dim // 2
        is_low = offset_d < half
        other_d = tl.where(is_low, offset_d + half, offset_d - half)
        cos = tl.load(cos_ptr + b * stride_cb + offset_d, mask=offset_d < dim, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * stride_nb + offset_d, mask=offset_d < dim, other=0.0).to(tl.float32)

    if HAS_NEW:
        # the newest text row belongs to this program alone: it writes it, then reads it back with the others
        if (split == splits - 1) & (n_text > 0):
            new_row = (visual_capacity + n_text - 1).to(tl.int64)
            source = new_key_ptr + b * stride_nkb + kv_head * stride_nkh
            new_key = tl.load(source + offset_d, mask=offset_d < dim, other=0.0)
            if HAS_ROTARY:
                other = tl.load(source + other_d, mask=offset_d < dim, other=0.0).to(tl.float32)
                new_key = rotate_part(new_key.to(tl.float32), tl.where(is_low, -other, other), cos, sin, new_key.dtype)
            tl.store(keys + new_row * stride_kr + offset_d * stride_kd, new_key, mask=offset_d < dim)
            new_value = tl.load(new_value_ptr + b * stride_nvb + kv_head * stride_nvh + offset_v, mask=offset_v < value_dim, other=0.0)
            tl.store(values + new_row * stride_vr + offset_v * stride_vd, new_value, mask=offset_v < value_dim)
            tl.debug_barrier()

    if DOT:
        q = tl.load(
            queries + offset_g[:, None] * stride_qh + offset_d[None, :] * stride_qd,
            mask=(offset_g < G)[:, None] & (offset_d < dim)[None, :],
            other=0.0,
        )
        if HAS_ROTARY:
            other = tl.load(
                queries + offset_g[:, None] * stride_qh + other_d[None, :] * stride_qd,
                mask=(offset_g < G)[:, None] & (offset_d < dim)[None, :],
                other=0.0,
            ).to(tl.float32)
            q = rotate_part(q.to(tl.float32), tl.where(is_low[None, :], -other, other), cos[None, :], sin[None, :], q.dtype)
        if ROW_WARPS == 1:
            m = tl.full([BLOCK_G], float("-inf"), tl.float32)
            norm = tl.zeros([BLOCK_G], dtype=tl.float32)
            acc = tl.zeros([BLOCK_G, BLOCK_V], dtype=tl.float32)
        else:  # every warp has a softmax of its own
            q = tl.broadcast_to(q[None, :, :], [ROW_WARPS, BLOCK_G, BLOCK_D])
            m = tl.full([ROW_WARPS, BLOCK_G], float("-inf"), tl.float32)
            norm = tl.zeros([ROW_WARPS, BLOCK_G], dtype=tl.float32)
            acc = tl.zeros([ROW_WARPS, BLOCK_G, BLOCK_V], dtype=tl.float32)
    else:
        q = tl.load(queries + offset_d * stride_qd, mask=offset_d < dim, other=0.0)
        if HAS_ROTARY:
            other = tl.load(queries + other_d * stride_qd, mask=offset_d < dim, other=0.0).to(tl.float32)
            q = rotate_part(q.to(tl.float32), tl.where(is_low, -other, other), cos, sin, q.dtype)
        q = q.to(tl.float32)
        m = tl.full([BLOCK_N], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_N], dtype=tl.float32)
        acc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    scale2 = scale * LOG2E
    positions = position_ptr
    if HAS_WINDOW and not PAGED:
        query_position = tl.load(query_position_ptr + b * stride_pq)
        positions = position_ptr + b * stride_pb

    table = table_ptr
    text_positions = text_position_ptr
    n_typed = n_text
    if PAGED:
        table = table_ptr + sequence * stride_bt
        n_typed = tl.minimum(n_text, text_listed)
        if HAS_LIST:
            text_positions = text_position_ptr + sequence * stride_xb
    past = visual_capacity - n_read  # from a text row's place to its row
    text_logits = logit_ptr  # of head 0 of the batch
    if HAS_LOGITS:
        text_logits = logit_ptr + n_read
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        place = block * BLOCK_N + _row_slots(BLOCK_N, ROW_WARPS)
        inside = place < total
        visual = place < n_read
        live = inside
        if PAGED:
            position, page, row = _paged_row(
                place, inside, n_read, n_visual, first_position, region_list, text_positions, table, text_listed, PAGED, HAS_LIST
            )
            if HAS_WINDOW and HAS_LIST:
                live = inside & (query_position - position < window)
            key_row = page * stride_kb + row * stride_kr
            value_row = key_row
            if not SAME_STRIDES:
                value_row = page * stride_vb + row * stride_vr
        else:
            if HAS_LIST:
                row = tl.where(visual, tl.load(region_list + place, mask=visual, other=0), place + past)
            else:
                row = tl.where(visual, place, place + past)
            if HAS_WINDOW:
                position = tl.load(positions + row, mask=inside, other=0)
                live = inside & (query_position - position < window)
            key_row = row.to(tl.int64) * stride_kr
            value_row = row.to(tl.int64) * stride_vr
        m, norm, acc, logit = _attend_block(
            q, m, norm, acc, key_row, value_row, live, keys, values, stride_kd, stride_vd, dim, value_dim, scale2,
            DOT, HAS_OUTPUT, BLOCK_D, BLOCK_V,
        )  # fmt: skip
        if HAS_LOGITS or HAS_MASS:
            logit = stored_logit(logit, logit_ptr.dtype.element_ty)
            asked = inside
            if not HAS_MASS:
                asked = visual
            if not HAS_LOGITS:
                asked = inside & (place >= n_read)
                place -= n_read
            # read again soon: they shall stay in the L2 cache while keys and values stream through it
            if DOT:
                of_head = tl.expand_dims((b * heads + first_head + offset_g) * logit_capacity, 1)
                wanted = tl.expand_dims(offset_g < G, 1)
                if ROW_WARPS > 1:
                    of_head, wanted = tl.expand_dims(of_head, 0), tl.expand_dims(wanted, 0)
                tl.store(
                    logit_ptr + of_head + tl.expand_dims(place, -2),
                    logit,
                    mask=wanted & tl.expand_dims(asked, -2),
                    eviction_policy="evict_last",
                )
            else:
                tl.store(logit_ptr + (b * heads + first_head) * logit_capacity + place, logit, mask=asked, eviction_policy="evict_last")

    if ROW_WARPS > 1:  # the warps become one
        top = tl.max(m, 0)
        finite = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp2(m - finite[None, :])
        if HAS_OUTPUT:
            acc = tl.sum(acc * factor[:, :, None], 0)
        norm = tl.sum(norm * factor, 0)
        m = top
    elif not DOT:  # the row slots become one
        top = tl.max(m, 0)
        finite = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp2(m - finite)
        if HAS_OUTPUT:
            acc = tl.sum(acc * factor[:, None], 0, keep_dims=True)
        norm = tl.sum(norm * factor, 0, keep_dims=True)
        m = tl.max(m, 0, keep_dims=True)

    if MAX_SPLITS == 1:  # nothing to combine
        share = tl.where(norm == 0.0, 0.0, 1.0 / norm)
        share = tl.where(m == LOWEST, float("nan"), share)
        head = b * heads + first_head + offset_g
        real = offset_g < G
        if HAS_LOGITS:
            tl.store(head_stat_ptr + head * 2, m, mask=real)
            tl.store(head_stat_ptr + head * 2 + 1, share, mask=real)
        if HAS_OUTPUT:
            tl.store(
                output_ptr + head[:, None] * value_dim + offset_v[None, :],
                (acc * share[:, None]).to(output_ptr.dtype.element_ty),
                mask=real[:, None] & (offset_v < value_dim)[None, :],
            )
        if HAS_MASS:
            tl.debug_barrier()  # logits are read back by other threads
            types = text_type_ptr + sequence * stride_tb
            _store_mass(head, real, m, share, text_logits, types, mass_ptr, logit_capacity, n_text, n_typed, BLOCK_T)
    else:
        part = (b * heads + first_head + offset_g) * MAX_SPLITS + split
        real = offset_g < G
        if HAS_OUTPUT:
            tl.store(part_ptr + part[:, None] * BLOCK_V + offset_v[None, :], acc, mask=real[:, None] & (offset_v >= 0)[None, :])
        tl.store(part_stat_ptr + part * 2, m, mask=real)
        tl.store(part_stat_ptr + part * 2 + 1, norm, mask=real)
        if COMBINE:
            if not _finished(counter_ptr + b * (kv_heads + 1) + kv_head, splits - 1):
                return

            # ---- phase 2: the last split of a key/value head combines the splits ------------------------------------------------
            top, share = _combine_heads(
                b * heads + first_head, splits, part_ptr, part_stat_ptr, head_stat_ptr, output_ptr, value_dim,
                HAS_OUTPUT, HAS_LOGITS, G, BLOCK_C, MAX_SPLITS, SPLIT_TILE, BLOCK_V,
            )  # fmt: skip
            if HAS_MASS:
                offset_c = tl.arange(0, BLOCK_C)
                _store_mass(
                    b * heads + first_head + offset_c, offset_c < G, top, share, text_logits, text_type_ptr + sequence * stride_tb,
                    mass_ptr, logit_capacity, n_text, n_typed, BLOCK_T,
                )  # fmt: skip

    if IMPORTANCE:
        # read again rather than kept in registers through the main loop
        n_visual = tl.load(n_visual_ptr + b)
        n_read = n_visual
        if HAS_LIST:
            n_read = tl.load(n_list_ptr + b)
        if PAGED and HAS_MASS:
            n_read = tl.minimum(n_read, logit_capacity)
        if G > 1:  # probabilities of this head's queries, summed at the place of the first one's logits
            tl.debug_barrier()
            offset_i = tl.arange(0, BLOCK_I)
            for begin in range(0, n_read, BLOCK_I):
                column = begin + offset_i
                summed = tl.zeros([BLOCK_I], dtype=tl.float32)
                for g in tl.static_range(G):
                    of_head = b * heads + first_head + g
                    peak = tl.load(head_stat_ptr + of_head * 2)
                    scaled = tl.load(head_stat_ptr + of_head * 2 + 1)
                    z = tl.load(
                        logit_ptr + of_head * logit_capacity + column, mask=column < n_read, other=float("-inf"), cache_modifier=".cg"
                    ).to(tl.float32)
                    summed += tl.where(z == float("-inf"), 0.0, tl.exp2(z - peak) * scaled)
                if logit_ptr.dtype.element_ty == tl.float16:
                    summed = stored_logit(summed * WHOLE, tl.float16)
                tl.store(logit_ptr + (b * heads + first_head) * logit_capacity + column, summed, mask=column < n_read)
        if not _finished(counter_ptr + b * (kv_heads + 1) + kv_heads, kv_heads - 1):
            return

        # ---- phase 3: the last key/value head of a sequence -----------------------------------------------------------------------
        if HAS_LIST and not PAGED:
            for start in range(0, visual_capacity, BLOCK_I):
                column = start + tl.arange(0, BLOCK_I)
                zero = tl.zeros([BLOCK_I], dtype=tl.float32)
                tl.store(importance_ptr + b * visual_capacity + column, zero, mask=column < visual_capacity)
            tl.debug_barrier()
            until = n_read
        else:
            until = visual_capacity
        importance_columns(
            logit_ptr, head_stat_ptr, importance_ptr, region_list, b, 0, until, n_read, visual_capacity, logit_capacity, heads,
            kv_heads, G > 1, HAS_LIST and not PAGED, BLOCK_H, BLOCK_I,
        )  # fmt: skip
        if DECIDE:
            if PAGED:
                n_visual = n_read
            tl.debug_barrier()  # importance is read back by other threads
            decide_row(
                mass_ptr + b * features, importance_ptr + b * visual_capacity, weight_ptr, bias_ptr, rates_ptr, count_ptr, score_ptr,
                alive_ptr, max_kept_ptr, kept_ptr, n_kept_ptr, rate_ptr, region_list, b, n_visual, visual_capacity, features, classes,
                stride_wr, stride_wc, stride_bb, stride_br, stride_sb, stride_sn, stride_ab, stride_an,
                HAS_PREDICTOR, HAS_SCORE, HAS_ALIVE, HAS_MAX, WIDE, BLOCK_F, BLOCK_S, CHUNKS, False, PAGED != 0,
            )  # fmt: skip


@triton.jit
def combine_kernel(
    n_visual_ptr, n_text_ptr, n_list_ptr, text_type_ptr, output_ptr, part_ptr, part_stat_ptr, head_stat_ptr, logit_ptr, mass_ptr,
    value_dim, logit_capacity, min_blocks, most_splits, stride_tb,
    HAS_OUTPUT: tl.constexpr, HAS_MASS: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_LIST: tl.constexpr,
    MAX_SPLITS: tl.constexpr, SPLIT_TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Phase 2 as a launch of its own, grid ``(Hq, B)``: every query head has a program, instead of the last one of its key/value head."""
    follow(PDL)
    head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    n_text = tl.load(n_text_ptr + b)
    if HAS_LIST:
        n_read = tl.load(n_list_ptr + b)
    else:
        n_read = tl.load(n_visual_ptr + b)
    splits = live_splits(n_read + n_text, most_splits, min_blocks, BLOCK_N)
    top, share = _combine_heads(
        head, splits, part_ptr, part_stat_ptr, head_stat_ptr, output_ptr, value_dim, HAS_OUTPUT, HAS_LOGITS, 1, 1, MAX_SPLITS, SPLIT_TILE,
        BLOCK_V,
    )  # fmt: skip
    if HAS_MASS:
        text_logits = logit_ptr
        if HAS_LOGITS:
            text_logits = logit_ptr + n_read
        one = tl.arange(0, 1)
        types = text_type_ptr + b * stride_tb
        _store_mass(head + one, one < 1, top, share, text_logits, types, mass_ptr, logit_capacity, n_text, n_text, BLOCK_T)


@triton.jit
def decide_kernel(
    n_visual_ptr, list_ptr, sequence_ptr, head_stat_ptr, counter_ptr, logit_ptr, mass_ptr, importance_ptr,
    weight_ptr, bias_ptr, rates_ptr, count_ptr, score_ptr, alive_ptr, max_kept_ptr, kept_ptr, n_kept_ptr, rate_ptr,
    heads, counters, visual_capacity, logit_capacity, features, classes, stride_lb,
    stride_wr, stride_wc, stride_bb, stride_br, stride_sb, stride_sn, stride_ab, stride_an,
    DECIDE: tl.constexpr, LAST: tl.constexpr, HAS_PREDICTOR: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_ALIVE: tl.constexpr,
    HAS_MAX: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, CHUNKS: tl.constexpr,
    PAGED: tl.constexpr, SHARED_LIST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Phase 3 as a launch of its own, grid ``(ceil(visual_capacity / BLOCK_I), B)``: many programs share the sum over heads.

    The last program of a sequence decides where LAST; else ``decide_rows_kernel`` does, and this one only predicts the rate. Which form is
    faster is a matter of measurement (``plan.Settings.decision``).
    PAGED: n_visual is the length of the list of positions, as in ``decode_attention_kernel``.
    """
    follow(PDL)
    b = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_I
    n = tl.load(n_visual_ptr + b)
    if PAGED:
        n = tl.minimum(n, logit_capacity)
    if DECIDE and HAS_PREDICTOR:
        if start == 0:  # meanwhile the others sum: the rate is there when the last of them decides
            chosen = predict_class(
                mass_ptr + b * features, weight_ptr, bias_ptr, b, features, classes, stride_wr, stride_wc, stride_bb, stride_br, BLOCK_F
            )
            tl.store(rate_ptr + b, tl.load(rates_ptr + chosen))
    importance_columns(
        logit_ptr, head_stat_ptr, importance_ptr, logit_ptr, b, start, start + BLOCK_I, n, visual_capacity, logit_capacity, heads, heads,
        False, False, BLOCK_H, BLOCK_I,
    )  # fmt: skip
    if DECIDE and LAST:
        if not _finished(counter_ptr + b * counters + counters - 1, tl.num_programs(0) - 1):
            return
        places = list_ptr
        if PAGED:
            owner = b
            if SHARED_LIST and sequence_ptr is not None:
                owner = tl.load(sequence_ptr + b).to(tl.int64)
            places = list_ptr + owner * stride_lb
        decide_row(
            mass_ptr + b * features, importance_ptr + b * visual_capacity, weight_ptr, bias_ptr, rates_ptr, count_ptr, score_ptr,
            alive_ptr, max_kept_ptr, kept_ptr, n_kept_ptr, rate_ptr, places, b, n, visual_capacity, features, classes,
            stride_wr, stride_wc, stride_bb, stride_br, stride_sb, stride_sn, stride_ab, stride_an,
            HAS_PREDICTOR, HAS_SCORE, HAS_ALIVE, HAS_MAX, WIDE, BLOCK_F, BLOCK_S, CHUNKS, HAS_PREDICTOR, PAGED,
        )  # fmt: skip


@triton.jit
def decide_rows_kernel(
    n_visual_ptr, list_ptr, sequence_ptr, mass_ptr, importance_ptr,
    weight_ptr, bias_ptr, rates_ptr, count_ptr, score_ptr, alive_ptr, max_kept_ptr, kept_ptr, n_kept_ptr, rate_ptr,
    visual_capacity, features, classes, stride_lb,
    stride_wr, stride_wc, stride_bb, stride_br, stride_sb, stride_sn, stride_ab, stride_an,
    HAS_PREDICTOR: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_ALIVE: tl.constexpr, HAS_MAX: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, CHUNKS: tl.constexpr,
    PAGED: tl.constexpr, SHARED_LIST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence decides, once ``decide_kernel`` has summed the importance and predicted the rate."""
    follow(PDL)
    b = tl.program_id(0).to(tl.int64)
    places = list_ptr
    if PAGED:
        owner = b
        if SHARED_LIST and sequence_ptr is not None:
            owner = tl.load(sequence_ptr + b).to(tl.int64)
        places = list_ptr + owner * stride_lb
    decide_row(
        mass_ptr + b * features, importance_ptr + b * visual_capacity, weight_ptr, bias_ptr, rates_ptr, count_ptr, score_ptr,
        alive_ptr, max_kept_ptr, kept_ptr, n_kept_ptr, rate_ptr, places, b, tl.load(n_visual_ptr + b), visual_capacity, features, classes,
        stride_wr, stride_wc, stride_bb, stride_br, stride_sb, stride_sn, stride_ab, stride_an,
        HAS_PREDICTOR, HAS_SCORE, HAS_ALIVE, HAS_MAX, WIDE, BLOCK_F, BLOCK_S, CHUNKS, HAS_PREDICTOR, PAGED,
    )  # fmt: skip
