"""Attention and decision over paged rows in Triton."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

FILE, HOST, DECISION = "triton_kernels/attention.py", "triton_kernels/backend.py", "triton_kernels/decision.py"


def fault(old: str, new: str, file: str = FILE) -> Fault:
    return Fault(file, old, new)


FAULTS = (
    # from a place to its row
    fault("text = place - n_read\n", "text = place - n_visual\n"),
    fault("known = inside & (visual | (text < text_listed))", "known = inside & visual"),
    fault("position = tl.where(position < 0, text + n_visual, position)", "position = tl.where(position < 0, text + n_read, position)"),
    fault("tl.where(visual, listed + place, text_position + text)", "tl.where(visual, listed + place, text_position + place)"),
    fault("position = place + first\n", "position = place\n"),
    fault("tl.load(table + position // BLOCK_ROWS,", "tl.load(table + (position + 1) // BLOCK_ROWS,"),
    fault("block.to(tl.int64), position % BLOCK_ROWS", "block.to(tl.int64), (position + 1) % BLOCK_ROWS"),
    fault("key_row = page * stride_kb + row * stride_kr", "key_row = page * stride_kb + row"),
    fault("value_row = page * stride_vb + row * stride_vr", "value_row = page * stride_kb + row * stride_kr"),
    fault("(key.stride(0), key.stride(2)) == (value.stride(0), value.stride(2))", "True", HOST),
    fault("visual = place < n_read\n        text = place", "visual = place <= n_read\n        text = place"),
    fault("known = inside & (visual | (text < text_listed))", "known = inside & (visual | (text <= text_listed))"),
    # lengths
    fault("query_position = n_text - 1\n", "query_position = n_text\n"),
    fault("first_position = tl.maximum(n_text - window, 0)", "first_position = tl.maximum(n_text - window - 1, 0)"),
    fault("n_text -= n_visual + first_position", "n_text -= n_visual"),
    fault("n_typed = tl.minimum(n_text, text_listed)", "n_typed = n_text"),
    fault("if HAS_WINDOW and HAS_LIST:", "if False:"),
    fault("tl.load(types + place, mask=place < n_typed, other=3)", "tl.load(types + place, mask=place < n_typed, other=2)"),
    fault("triton.next_power_of_2(max(paged.row_bound, 16))", "max(paged.row_bound // 4, 1)", HOST),
    # whose they are
    fault("sequence = tl.load(sequence_ptr + b).to(tl.int64)", "sequence = b"),
    fault("(sequence if SHARED_LIST else b) * stride_lb", "b * stride_lb"),
    fault("(sequence if SHARED_LIST else b) * stride_lb", "sequence * stride_lb"),
    fault("table = table_ptr + sequence * stride_bt", "table = table_ptr + b * stride_bt"),
    fault("text_positions = text_position_ptr + sequence * stride_xb", "text_positions = text_position_ptr"),
    fault("types = text_type_ptr + sequence * stride_tb", "types = text_type_ptr + b * stride_tb"),
    fault("text_logits, text_type_ptr + sequence * stride_tb", "text_logits, text_type_ptr + b * stride_tb"),
    fault("vector(paged.sequence), last", "paged.sequence, last", HOST),
    fault("last_contiguous(paged.block_table), ", "paged.block_table, ", HOST),
    # the decision
    fault("                n_visual = n_read\n            tl.debug", "                n_visual += 0\n            tl.debug"),
    fault("kv_heads, G > 1, HAS_LIST and not PAGED,", "kv_heads, G > 1, HAS_LIST,"),
    fault("BLOCK_F, BLOCK_S, CHUNKS, False, PAGED != 0,", "BLOCK_F, BLOCK_S, CHUNKS, False, False,"),
    fault("            places = list_ptr + owner * stride_lb\n", "            places = list_ptr + b * stride_lb\n"),
    fault("counted = counted if pages is None else n_kept", "counted = counted", HOST),
    fault("written = tl.load(places_ptr + index,", "written = tl.load(places_ptr + target,", DECISION),
)  # fmt: skip

FAMILY = Family("interpreter", ("paged_attention", "paged_step"), 250, ("tests/ops/test_paged.py",), FAULTS)
