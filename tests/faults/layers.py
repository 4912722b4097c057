"""A decoder layer but for its attention, in Triton: norms, gates, rotary embedding, products."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

GATES, NORMS, ROTARY, ROW, ROWS = (f"triton_kernels/{name}.py" for name in ("gates", "norms", "rotary", "products", "few_rows"))

FAULTS = (
    # gates
    Fault(GATES, "return x / (1.0 + tl.exp(-x))", "return x / (1.0 + tl.exp(x))"),
    Fault(GATES, "0.044715 * x * x * x", "0.44715 * x * x * x"),
    Fault(GATES, "x * 0.7071067811865476", "x * 1.4142135623730951"),
    Fault(GATES, "_activate(gate, ACTIVATION).to(kind).to(tl.float32) * up", "_activate(up, ACTIVATION).to(kind).to(tl.float32) * gate"),
    Fault(GATES, "inside = place < count", "inside = place < count - 1"),
    Fault(GATES, "activation_number(activation), block)", "0, block)"),
    Fault(GATES, "gate, up = gate.contiguous(), up.contiguous()", "gate, up = gate.contiguous(), up"),
    # norms
    Fault(NORMS, "tl.sum(x * x, 0) / size + eps)", "tl.sum(x * x, 0) / size)"),
    Fault(NORMS, "(x * scale * (1.0 + weight))", "(x * scale * weight)"),
    Fault(NORMS, "tl.load(residual_ptr + row * stride_r + column", "tl.load(residual_ptr + row * stride_x + column"),
    Fault(NORMS, "x = normalise(x, before,", "x = normalise(x, weight,"),
    Fault(NORMS, "total = (residual + x).to(kind)", "total = (residual - x).to(kind)"),
    Fault(NORMS, "tl.store(sum_ptr + row * size + column, total,", "tl.store(sum_ptr + row * size + column, x.to(kind),"),
    Fault(NORMS, "normalise(total.to(tl.float32), weight", "normalise(x, weight"),
    Fault(NORMS, "return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()", "return rows"),
    Fault(NORMS, "(rows, weight.contiguous(), output)", "(rows, weight, output)"),
    # rotary embedding
    Fault(ROTARY, "rotate_part(low, -high, cos_low", "rotate_part(low, high, cos_low"),
    Fault(ROTARY, "(high, low, cos_high, sin_high, kind)", "(high, low, cos_high, sin_low, kind)"),
    Fault(ROTARY, "cos_ptr + b * stride_cb + s * stride_cs + place", "cos_ptr + s * stride_cs + place"),
    Fault(ROTARY, "sin_row += stream * stride_si", "sin_row += stream * stride_ci"),
    Fault(ROTARY, "(place >= third_stream)", "(place > third_stream)"),
    Fault(ROTARY, "tl.sum(high * high, 1)) / (2 * half)", "tl.sum(high * high, 1)) / half"),
    Fault(ROTARY, "norms = key_norm_ptr", "norms = query_norm_ptr"),
    Fault(ROTARY, "(b * columns + s) * kv_heads * 2 * half", "(b * columns + s) * heads * 2 * half"),
    Fault(ROTARY, "head = (block - QUERY_BLOCKS) * BLOCK_H", "head = block * BLOCK_H"),
    Fault(ROTARY, "stride_h = stride_kh", "stride_h = stride_qh"),
    Fault(ROTARY, "tl.load(norms + half + place", "tl.load(norms + place"),
    Fault(ROTARY, "0 if shared else tensor.stride(-3)", "tensor.stride(-3)"),
    Fault(ROTARY, "(sections[0], sections[0] + sections[1])", "(sections[0], sections[1])"),
    Fault(ROTARY, "tensor if tensor.stride(-1) == 1 else tensor.contiguous()", "tensor"),
    # one row
    Fault(ROW, "if tl.program_id(0) == 0:", "if tl.program_id(0) == 1:"),
    Fault(ROW, "tl.sum(x * x, 0) / size + eps)", "tl.sum(x * x, 0) / BLOCK_X + eps)"),
    Fault(ROW, "x = (x + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32))", "x = x"),
    Fault(ROW, "        first = (block - blocks0) * BLOCK_N\n", "        first = block * BLOCK_N\n"),
    Fault(ROW, "tl.load(bias_ptr + row, mask", "tl.load(bias_ptr + row - first, mask"),
    Fault(ROW, "sums += weight * x[None, :]", "sums = weight * x[None, :]"),
    Fault(ROW, "up = tl.sum(ups, 1)", "up = tl.sum(gates, 1)"),
    Fault(ROW, "tl.load(gate_ptr + wide * stride_g", "tl.load(gate_ptr + wide * size"),
    Fault(ROW, "mask=(row < count)[:, None] & inside[None, :], other=0.0)", "mask=(row < count)[:, None], other=0.0)"),
    Fault(ROW, "(2 if norm.one_plus else 1,", "(1,"),
    Fault(ROW, "norm.residual.contiguous(), norm.weight", "norm.residual, norm.weight"),
    # few rows
    Fault(ROWS, "first = tl.where(second, (block - blocks0) * BLOCK_N, first)", "first = tl.where(second, block * BLOCK_N, first)"),
    Fault(ROWS, "(block - blocks0 - blocks1) * BLOCK_N, first)", "(block - blocks0) * BLOCK_N, first)"),
    Fault(ROWS, "stride_w = tl.where(third, stride2, stride_w)", "stride_w = tl.where(third, stride1, stride_w)"),
    Fault(ROWS, "end = (pieces * (split + 1)) // SPLITS", "end = (pieces * (split + 1) - 1) // SPLITS"),
    Fault(ROWS, "tl.minimum(offset_m, rows - 1).to(tl.int64)[None, :] * size", "tl.minimum(offset_m, 1).to(tl.int64)[None, :] * size"),
    Fault(ROWS, "for other in tl.static_range(SPLITS):", "for other in tl.static_range(1, SPLITS):"),
    Fault(ROWS, "acc_up += tl.load(part + BLOCK_N * BLOCK_M,", "acc_up += tl.load(part,"),
    Fault(ROWS, "(row < count)[:, None] & (offset_m < rows)[None, :]", "(row < count)[:, None] & (offset_m <= rows)[None, :]"),
    Fault(ROWS, "tl.load(bias_ptr + row, mask", "tl.load(bias_ptr + offset_n, mask"),
    Fault(ROWS, "size % block_k == 0, splits", "True, splits"),
    Fault(ROWS, "[None, :] * count + row[:, None]", "[None, :] * size + row[:, None]"),
    Fault(ROWS, "for bias in biases}) == 2:", "for bias in biases}) == 3:"),
)  # fmt: skip

FAMILY = Family(
    "interpreter", ("rms_norm", "residual_norm", "gate_mul", "rotate", "linears", "gated", "norm_linears", "norm_gated"), 300,
    ("tests/ops/test_layers.py", "tests/interpreter/cases_layers.py"), FAULTS,
)  # fmt: skip
