"""Attention with its statistics in Triton, and the decision in its launch or behind it."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

FILE, HOST = "triton_kernels/attention.py", "triton_kernels/backend.py"


WINDOW = "positions + row, mask=inside, other=0)\n                live = inside & (query_position - position < window)"
QUERY = "queries + offset_g[:, None] * stride_qh + offset_d[None, :] * stride_qd,\n"


def fault(old: str, new: str, file: str = FILE) -> Fault:
    return Fault(file, old, new)


FAULTS = (
    # the running softmax
    fault('logit = tl.where(logit == float("-inf"), LOWEST, logit)', 'logit = tl.where(logit == float("inf"), LOWEST, logit)'),
    fault('logit = tl.where(read, logit, float("-inf"))', "logit = tl.where(read, logit, 0.0)"),
    fault("norm = norm * factor + tl.sum(p, ROWS)", "norm = norm + tl.sum(p, ROWS)"),
    fault("norm = norm * factor + p\n", "norm = norm + p\n"),
    fault("acc = acc * factor[:, None] + p[:, None]", "acc = acc + p[:, None]"),
    fault("tl.dot(p.to(values.dtype), values, acc=acc * tl.expand_dims(factor, -1))", "tl.dot(p.to(values.dtype), values, acc=acc)"),
    fault("logit = tl.dot(q, keys) * scale", "logit = tl.dot(q, keys)"),
    fault("mask=tl.expand_dims(live, -1) & (along_v < value_dim)", "mask=tl.expand_dims(live, -1) | (along_v < value_dim)"),
    fault("& (along_d < dim)", "& (along_d <= dim)"),
    fault("scale2 = scale * LOG2E", "scale2 = scale"),
    # splits become one
    fault("part = head[:, None] * MAX_SPLITS + split[None, :]", "part = head[:, None] * SPLIT_TILE + split[None, :]"),
    fault("here = ours[:, None] & (split < splits)[None, :]", "here = ours[:, None] & (split <= splits)[None, :]"),
    fault("norm * ours_factor + their_norm * their_factor", "norm + their_norm * their_factor"),
    fault("their_acc * their_factor[:, :, None]", "their_acc"),
    fault("total = tl.sum(norm * factor, 1)", "total = tl.sum(norm, 1)"),
    fault('share = tl.where(top == LOWEST, float("nan"), share)', "share = tl.where(top == LOWEST, 0.0, share)"),
    fault("share = tl.where(total == 0.0, 0.0, 1.0 / total)", "share = 1.0 / total"),
    fault("output = tl.sum(acc * factor[:, :, None], 1)", "output = tl.sum(acc, 1)"),
    fault("for first in tl.range(0, splits, SPLIT_TILE", "for first in tl.range(0, splits - 1, SPLIT_TILE"),
    fault("        tl.store(counter_ptr, 0)\n", "        tl.store(counter_ptr, 1)\n"),
    fault("final = before == last\n", "final = before == last - 1\n"),
    # rows of a block become one
    fault("acc = tl.sum(acc * factor[:, :, None], 0)", "acc = tl.sum(acc, 0)"),
    fault("norm = tl.sum(norm * factor, 0, keep_dims=True)", "norm = tl.sum(norm, 0, keep_dims=True)"),
    fault("tl.arange(0, ROW_WARPS)[:, None] * OWN", "tl.arange(0, ROW_WARPS)[:, None] * 0"),
    fault("share = tl.where(norm == 0.0, 0.0, 1.0 / norm)", "share = 1.0 / norm"),
    # mass
    fault("instruction += tl.where(kind == 2, p, 0.0)", "instruction += tl.where(kind == 1, p, 0.0)"),
    fault("image = 1.0 - (sums + instructions + responses)", "image = 1.0 - (sums + instructions)"),
    fault("tl.where((share == 0.0) | (image < 0.0), 0.0, image)", "tl.where(image < 0.0, 0.0, image)"),
    fault("        text_logits = logit_ptr + n_read\n    for block", "        text_logits = logit_ptr + visual_capacity\n    for block"),
    fault("                place -= n_read\n", ""),
    fault("(places if importance else 0) + (block_rows", "(0 if mass else places) + (block_rows", HOST),
    # importance
    fault("index = b * heads + row * (heads // rows)", "index = b * heads + row"),
    fault("mean = tl.sum(x, 0) / heads", "mean = tl.sum(x, 0) / rows"),
    fault("importance_ptr + b * capacity + place, mean", "importance_ptr + b * capacity + column, mean"),
    fault("capacity + column, mean, mask=column < capacity", "capacity + column, mean, mask=inside"),
    fault("for begin in range(0, n_read, BLOCK_I):", "for begin in range(0, BLOCK_I, BLOCK_I):"),
    fault("for start in range(0, visual_capacity, BLOCK_I):", "for start in range(0, n_read, BLOCK_I):"),
    # which rows
    fault("first_block = (split * blocks) // splits", "first_block = split * (blocks // splits)"),
    fault("first_head = kv_head * G\n", "first_head = kv_head\n"),
    fault("        keys += b * stride_kb\n", ""),
    fault(QUERY, QUERY.replace("stride_qh", "dim", 1)),
    fault("past = visual_capacity - n_read", "past = visual_capacity - n_visual"),
    fault("        inside = place < total\n", "        inside = place <= total\n"),
    fault(WINDOW, WINDOW.replace("< window", "<= window")),
    fault("positions = position_ptr + b * stride_pb", "positions = position_ptr"),
    fault("query_position_ptr + b * stride_pq", "query_position_ptr + b"),
    # the new row and its rotation
    fault("(split == splits - 1) & (n_text > 0)", "split == splits - 1"),
    fault("new_row = (visual_capacity + n_text - 1)", "new_row = (visual_capacity + n_text)"),
    fault("new_value_ptr + b * stride_nvb + kv_head * stride_nvh", "new_value_ptr + b * stride_nkb + kv_head * stride_nkh"),
    fault("cos_ptr + b * stride_cb", "cos_ptr"),
    fault("tl.where(is_low[None, :], -other, other)", "other"),
    # a second launch
    fault("splits = live_splits(n_read + n_text, most_splits,", "splits = live_splits(n_read, most_splits,"),
    fault("types = text_type_ptr + b * stride_tb\n        _store_mass(head", "types = text_type_ptr\n        _store_mass(head"),
    fault("n_read = tl.load(n_list_ptr + b)\n    else:", "n_read = tl.load(n_visual_ptr + b)\n    else:"),
    fault("tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)", "tl.program_id(1).to(tl.int64) + tl.program_id(0)"),
    fault("start = tl.program_id(0) * BLOCK_I\n", "start = 0\n"),
)  # fmt: skip

FAMILY = Family(
    "interpreter", ("decode_attention", "decode_step", "score_last_query"), 250,
    tuple(f"tests/ops/test_{name}.py" for name in ("attention", "attention_settings", "decision")), FAULTS,
)  # fmt: skip
