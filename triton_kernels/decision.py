"""Device functions of the decision, and the kernels that run them alone: predictor, count, selection.

``attention.py`` calls the same functions at the end of its launch. Formulas and ties are those of
``dyrate_kernels.ops.reference``; integer keys instead of float compares, so that denormals, zeros of either sign and NaN order alike on
every device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dependent import follow

CLASSES = tl.constexpr(4)  # of the predictor, looked at together


@triton.jit
def order_key(value, WIDE: tl.constexpr):
    """uint32 keys (uint64 where WIDE) in the order of ``value``: zeros of either sign equal, NaN 1, never 0."""
    if WIDE:
        bits = value.to(tl.float64).to(tl.uint64, bitcast=True)
        zero = tl.zeros_like(bits)
        sign = zero + 0x8000000000000000
        infinity = zero + 0x7FF0000000000000
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
    else:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        zero = tl.zeros_like(bits)
        sign = zero + 0x80000000
        infinity = zero + 0x7F800000
        magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, zero, bits)
    negative = (bits & sign) != zero
    key = tl.where(negative, bits ^ (sign | (sign - 1)), bits | sign)
    return tl.where(magnitude > infinity, zero + 1, key)


@triton.jit
def predict_class(
    mass_ptr, weight_ptr, bias_ptr, b, features, classes, stride_wr, stride_wc, stride_bb, stride_br, BLOCK_F: tl.constexpr
):  # fmt: skip
    """int32: argmax over r of ``sum_f mass[f] * weight[r, f] + bias[b, r]``; the first of equal ones, NaN last."""
    feature = tl.arange(0, BLOCK_F)
    real = feature < features
    mass = tl.load(mass_ptr + feature, mask=real, other=0.0, cache_modifier=".cg").to(tl.float32)
    best_key = tl.zeros([1], dtype=tl.uint32)
    best = tl.zeros([1], dtype=tl.int32)
    for first in range(0, classes, CLASSES):  # a few at once: their loads then wait for memory together
        r = first + tl.arange(0, CLASSES)
        there = r < classes
        both = there[:, None] & real[None, :]
        weight = tl.load(weight_ptr + r[:, None] * stride_wr + feature[None, :] * stride_wc, mask=both, other=0.0).to(tl.float32)
        logit = tl.sum(tl.where(both, mass[None, :] * weight, 0.0), 1)
        logit += tl.load(bias_ptr + b * stride_bb + r * stride_br, mask=there, other=0.0).to(tl.float32)
        key = order_key(logit, False)
        key = tl.where(there, key, tl.zeros_like(key))
        highest = tl.max(key, 0, keep_dims=True)
        index = tl.min(tl.where(key == highest, r, 2147483647), 0, keep_dims=True)
        better = highest > best_key
        best = tl.where(better, index, best)
        best_key = tl.where(better, highest, best_key)
    return tl.sum(best, 0)


@triton.jit
def count_for_rate(total, rate):
    """int32: ``floor(total * (1 - rate) + 1e-6)`` in [0, total]; NaN keeps all. total int32, rate float64."""
    everything = total.to(tl.float64)
    kept = everything * (1.0 - rate) + 1e-6
    kept = tl.where(kept < 0.0, 0.0, kept)
    kept = tl.where(kept < everything, kept, everything)  # false for NaN
    return kept.to(tl.int32)


@triton.jit
def chunk_keys(
    score_ptr, alive_ptr, start, n, stride_s, stride_a, HAS_ALIVE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Keys of the tokens ``[start, start + BLOCK)``; 0 for those that cannot be chosen."""
    index = start + tl.arange(0, BLOCK)
    candidate = index < n
    score = tl.load(score_ptr + index.to(tl.int64) * stride_s, mask=candidate, other=0.0)
    if HAS_ALIVE:
        candidate = candidate & (tl.load(alive_ptr + index.to(tl.int64) * stride_a, mask=candidate, other=0) != 0)
    key = order_key(score, WIDE)
    return tl.where(candidate, key, tl.zeros_like(key))


@triton.jit
def select_row(
    score_ptr, alive_ptr, kept_ptr, places_ptr, n, count, width, stride_s, stride_a,
    HAS_ALIVE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, HAS_PLACES: tl.constexpr,
):  # fmt: skip
    """Writes the ``count`` highest of ``n`` scores as ascending indices, -1 past them; returns their number.

    HAS_PLACES: ``places[index]`` is written in an index's place.

    A search finds the threshold, then a prefix sum collects in ascending order. A row that fits into registers is searched by two bits
    a round, which needs one sum a round and ends at the first threshold that exactly ``count`` tokens reach; rows longer than BLOCK are
    read in CHUNKS pieces, once for each eight bits of a radix select.
    """
    BITS: tl.constexpr = 64 if WIDE else 32
    key = chunk_keys(score_ptr, alive_ptr, 0, n, stride_s, stride_a, HAS_ALIVE, WIDE, BLOCK)
    candidates = tl.sum((key != 0).to(tl.int32), 0)
    # the loops over chunks are not pipelined: their copies would cost every program of the launch registers (tests/ahead_of_time)
    for c in tl.range(1, CHUNKS, num_stages=1):
        piece = chunk_keys(score_ptr, alive_ptr, c * BLOCK, n, stride_s, stride_a, HAS_ALIVE, WIDE, BLOCK)
        candidates += tl.sum((piece != 0).to(tl.int32), 0)
    n_kept = tl.minimum(tl.maximum(count, 0), candidates)

    bins = tl.arange(0, 256)
    needed = n_kept  # of the tokens at the threshold
    threshold = tl.sum(tl.zeros([1], dtype=key.dtype), 0)
    if CHUNKS == 1:
        # candidates share their highest bits: the search starts below those, and a round takes two bits with three counts in one sum
        one = threshold + 1
        highest_key = tl.max(key, 0)
        differ = highest_key ^ tl.min(tl.where(key != 0, key, highest_key), 0)
        bit = candidates * 0 + (BITS - 1)
        while (bit > 0) & ((differ >> bit.to(key.dtype)) == 0):
            bit -= 1
        bit = bit | 1  # the higher one of a round's two
        below = (((one << bit.to(key.dtype)) - one) << 1) | one
        threshold = highest_key & ~below
        reached = candidates  # tokens at the threshold or above it
        while (bit >= 0) & (reached != n_kept):
            unit = one << (bit - 1).to(key.dtype)
            first = threshold + unit
            second = first + unit
            third = second + unit
            # 20 bits a count: a row in registers has at most 2^13 tokens (plan.SELECT_BLOCK)
            counts = tl.sum((key >= first).to(tl.int64) + ((key >= second).to(tl.int64) << 20) + ((key >= third).to(tl.int64) << 40), 0)
            at_first = (counts & 0xFFFFF).to(tl.int32)
            at_second = ((counts >> 20) & 0xFFFFF).to(tl.int32)
            at_third = (counts >> 40).to(tl.int32)
            for_first, for_second, for_third = at_first >= n_kept, at_second >= n_kept, at_third >= n_kept
            threshold = tl.where(for_third, third, tl.where(for_second, second, tl.where(for_first, first, threshold)))
            reached = tl.where(for_third, at_third, tl.where(for_second, at_second, tl.where(for_first, at_first, reached)))
            bit -= 2
        above = tl.sum((key > threshold).to(tl.int32), 0)
        needed = n_kept - above
    else:
        for step in tl.static_range(BITS // 8):
            shift = BITS - 8 - 8 * step
            histogram = tl.zeros([256], dtype=tl.int32)
            for c in tl.range(0, CHUNKS, num_stages=1):
                key = chunk_keys(score_ptr, alive_ptr, c * BLOCK, n, stride_s, stride_a, HAS_ALIVE, WIDE, BLOCK)
                inside = key != 0
                if step > 0:
                    inside = inside & ((key >> (shift + 8)) == (threshold >> (shift + 8)))
                histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=inside)
            at_least = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram  # tokens with this digit or a higher one
            digit = tl.sum((at_least >= needed).to(tl.int32), 0) - 1
            needed -= tl.sum(tl.where(bins > digit, histogram, 0), 0)
            threshold |= digit.to(key.dtype) << shift

    highest = 0  # tokens above the threshold seen so far
    ties = 0  # and at it
    for c in tl.range(0, CHUNKS, num_stages=1):
        if CHUNKS > 1:
            key = chunk_keys(score_ptr, alive_ptr, c * BLOCK, n, stride_s, stride_a, HAS_ALIVE, WIDE, BLOCK)
        index = c * BLOCK + tl.arange(0, BLOCK)
        tie = (key == threshold) & (key != 0)
        over = key > threshold
        both = tie.to(tl.int32) * 65536 + over.to(tl.int32)  # two counts in one prefix sum: a chunk has fewer than 2^15 tokens
        before = tl.cumsum(both, 0) - both
        ties_before = ties + (before >> 16)
        target = highest + (before & 65535) + tl.minimum(ties_before, needed)
        chosen = over | (tie & (ties_before < needed))
        written = index
        if HAS_PLACES:
            written = tl.load(places_ptr + index, mask=chosen, other=-1)
        tl.store(kept_ptr + target, written, mask=chosen)
        tl.store(kept_ptr + index, tl.full([BLOCK], -1, tl.int32), mask=(index >= n_kept) & (index < width))
        if CHUNKS > 1:
            sums = tl.sum(both, 0)
            highest += sums & 65535
            ties += sums >> 16
    return n_kept


@triton.jit
def decide_row(
    mass_ptr, importance_ptr, weight_ptr, bias_ptr, rates_ptr, count_ptr, score_ptr, alive_ptr, max_kept_ptr,
    kept_ptr, n_kept_ptr, rate_ptr, places_ptr,
    b, n, width, features, classes,
    stride_wr, stride_wc, stride_bb, stride_br, stride_sb, stride_sn, stride_ab, stride_an,
    HAS_PREDICTOR: tl.constexpr, HAS_SCORE: tl.constexpr, HAS_ALIVE: tl.constexpr, HAS_MAX: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr, HAS_RATE: tl.constexpr = False, HAS_PLACES: tl.constexpr = False,
):  # fmt: skip
    """The decision of sequence ``b``: rate, count, kept list. mass and importance are those of the sequence itself.

    HAS_RATE: another program has already predicted the rate and stored it. HAS_PLACES: as in ``select_row``.
    """
    if HAS_RATE:
        count = count_for_rate(n, tl.load(rate_ptr + b, cache_modifier=".cg"))
    elif HAS_PREDICTOR:
        chosen = predict_class(mass_ptr, weight_ptr, bias_ptr, b, features, classes, stride_wr, stride_wc, stride_bb, stride_br, BLOCK_F)
        rate = tl.load(rates_ptr + chosen)
        count = count_for_rate(n, rate)
        tl.store(rate_ptr + b, rate)
    else:
        count = tl.load(count_ptr + b)
    if HAS_MAX:
        count = tl.minimum(count, tl.load(max_kept_ptr + b))
    if HAS_SCORE:
        scores = score_ptr + b * stride_sb
        score_stride = stride_sn
    else:
        scores = importance_ptr
        score_stride = 1
    alive = alive_ptr
    if HAS_ALIVE:
        alive = alive_ptr + b * stride_ab
    n_kept = select_row(
        scores, alive, kept_ptr + b * width, places_ptr, n, count, width, score_stride, stride_an,
        HAS_ALIVE, WIDE, BLOCK, CHUNKS, HAS_PLACES,
    )  # fmt: skip
    tl.store(n_kept_ptr + b, n_kept)
    if not HAS_PREDICTOR:
        total = tl.maximum(n, 1).to(tl.float64)
        rate = 1.0 - n_kept.to(tl.float64) / total
        tl.store(rate_ptr + b, tl.where(n > 0, rate, 0.0))


@triton.jit
def predict_rate_kernel(
    mass_ptr, weight_ptr, bias_ptr, rates_ptr, rate_ptr, class_ptr,
    features, classes, stride_wr, stride_wc, stride_bb, stride_br,
    BLOCK_F: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence. mass float ``[B, features]`` contiguous; rate float64 ``[B]``, class int64 ``[B]``."""
    follow(PDL)
    b = tl.program_id(0).to(tl.int64)
    chosen = predict_class(
        mass_ptr + b * features, weight_ptr, bias_ptr, b, features, classes, stride_wr, stride_wc, stride_bb, stride_br, BLOCK_F
    )
    tl.store(class_ptr + b, chosen.to(tl.int64))
    tl.store(rate_ptr + b, tl.load(rates_ptr + chosen))


@triton.jit
def select_tokens_kernel(
    score_ptr, count_ptr, n_visual_ptr, alive_ptr, kept_ptr, n_kept_ptr,
    width, stride_sb, stride_sn, stride_ab, stride_an,
    HAS_ALIVE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a sequence; kept int32 ``[B, width]`` contiguous."""
    follow(PDL)
    b = tl.program_id(0).to(tl.int64)
    n = tl.minimum(tl.load(n_visual_ptr + b), width)
    alive = alive_ptr
    if HAS_ALIVE:
        alive = alive_ptr + b * stride_ab
    n_kept = select_row(
        score_ptr + b * stride_sb, alive, kept_ptr + b * width, kept_ptr, n, tl.load(count_ptr + b), width, stride_sn, stride_an,
        HAS_ALIVE, WIDE, BLOCK, CHUNKS, False,
    )  # fmt: skip
    tl.store(n_kept_ptr + b, n_kept)
