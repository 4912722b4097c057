"""Predictor, count and selection in Triton."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

FILE = "triton_kernels/decision.py"


def fault(old: str, new: str) -> Fault:
    return Fault(FILE, old, new)


FAULTS = (
    # the order of numbers
    fault("bits = tl.where(magnitude == 0, zero, bits)", "bits = tl.where(magnitude == 1, zero, bits)"),
    fault("return tl.where(magnitude > infinity, zero + 1, key)", "return key"),
    fault("return tl.where(magnitude > infinity, zero + 1, key)", "return tl.where(magnitude >= infinity, zero + 1, key)"),
    fault("return tl.where(magnitude > infinity, zero + 1, key)", "return tl.where(magnitude > infinity, zero, key)"),
    fault("bits ^ (sign | (sign - 1)), bits | sign)", "bits ^ sign, bits | sign)"),
    fault("0x7FF0000000000000", "0x7FF8000000000000"),
    fault("zero + 0x7F800000\n", "zero + 0x7FC00000\n"),
    # predictor
    fault("r[:, None] * stride_wr + feature[None, :] * stride_wc", "r[:, None] * stride_wr + feature[None, :]"),
    fault("bias_ptr + b * stride_bb + r * stride_br", "bias_ptr + r * stride_br"),
    fault("bias_ptr + b * stride_bb + r * stride_br", "bias_ptr + b * stride_bb + r"),
    fault("key = tl.where(there, key, tl.zeros_like(key))", "key = tl.where(r >= 0, key, tl.zeros_like(key))"),
    fault("better = highest > best_key", "better = highest >= best_key"),
    fault("tl.min(tl.where(key == highest, r, 2147483647), 0, keep", "tl.max(tl.where(key == highest, r, -1), 0, keep"),
    fault("mass_ptr + b * features, weight_ptr", "mass_ptr, weight_ptr"),
    fault("best_key = tl.where(better, highest, best_key)", "best_key = highest"),
    # count
    fault("everything * (1.0 - rate) + 1e-6", "everything * (1.0 - rate)"),
    fault("tl.where(kept < everything, kept, everything)", "tl.where(kept > everything, everything, kept)"),
    fault("tl.minimum(tl.maximum(count, 0), candidates)", "tl.minimum(count, candidates)"),
    fault("tl.minimum(tl.maximum(count, 0), candidates)", "tl.maximum(count, 0)"),
    fault("tl.minimum(count, tl.load(max_kept_ptr + b))", "tl.minimum(count, tl.load(max_kept_ptr))"),
    fault("rate = 1.0 - n_kept.to(tl.float64) / total", "rate = 1.0 - n_kept.to(tl.float32) / total.to(tl.float32)"),
    fault("tl.where(n > 0, rate, 0.0)", "rate"),
    # candidates
    fault("candidate = index < n\n", "candidate = index <= n\n"),
    fault("index.to(tl.int64) * stride_s, mask=candidate", "index.to(tl.int64), mask=candidate"),
    fault("index.to(tl.int64) * stride_a, mask=candidate", "index.to(tl.int64), mask=candidate"),
    fault("return tl.where(candidate, key, tl.zeros_like(key))", "return key"),
    fault("scores = score_ptr + b * stride_sb", "scores = score_ptr"),
    fault("        score_stride = stride_sn\n", "        score_stride = 1\n"),
    fault("for c in tl.range(1, CHUNKS, num_stages=1)", "for c in tl.range(2, CHUNKS, num_stages=1)"),
    # the search in registers
    fault("bit = bit | 1  #", "bit = bit + 0  #"),
    fault("while (bit >= 0) & (reached != n_kept)", "while (bit > 1) & (reached != n_kept)"),
    fault("threshold = highest_key & ~below", "threshold = highest_key"),
    fault("at_second >= n_kept, at_third >= n_kept", "at_second >= n_kept - 1, at_third >= n_kept"),
    fault("((counts >> 20) & 0xFFFFF)", "(counts >> 20)"),
    fault("above = tl.sum((key > threshold)", "above = tl.sum((key >= threshold)"),
    # the search in digits
    fault("inside = inside & ((key >> (shift + 8)) == (threshold >> (shift + 8)))", "inside = inside & (key >= threshold)"),
    fault("tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram", "tl.sum(histogram, 0) - tl.cumsum(histogram, 0)"),
    fault("tl.where(bins > digit, histogram, 0)", "tl.where(bins >= digit, histogram, 0)"),
    # the list
    fault("ties_before = ties + (before >> 16)", "ties_before = before >> 16"),
    fault("highest + (before & 65535) + tl.minimum(ties_before, needed)", "highest + (before & 65535) + ties_before"),
    fault("over | (tie & (ties_before < needed))", "over | (tie & (ties_before <= needed))"),
    fault("mask=(index >= n_kept) & (index < width)", "mask=index >= n_kept"),
    fault("mask=(index >= n_kept) & (index < width)", "mask=(index > n_kept) & (index < width)"),
    fault("written = tl.load(places_ptr + index, mask=chosen", "written = tl.load(places_ptr + target, mask=chosen"),
    fault("highest += sums & 65535", "highest += 0"),
    fault("kept_ptr + b * width, places_ptr, n", "kept_ptr, places_ptr, n"),
)  # fmt: skip

# the selection and the predictor alone are drawn more often: their calls take little time
OPERATORS = (*["select_tokens"] * 5, *["predict_rate"] * 3, *["decode_step"] * 2, "paged_step")

FAMILY = Family(
    "interpreter", OPERATORS, 400, ("tests/ops/test_decision.py",), FAULTS
)  # fmt: skip
