"""Arguments at the edge of what the operators take: refused by name and without a trace, or right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dyrate_kernels import ops
from dyrate_kernels.ops import layers
from tests.ops import paged_spec, spec


def problem():
    """(arguments of decode_attention by position, by name)."""
    a = spec.problem(2, 4, 2, 8, 12, 6, [12, 5], [6, 2], dtype=torch.float32, poison=False)
    rows = [a[name] for name in ("query", "key", "value", "n_visual", "n_text")]
    new = {"new_key": torch.randn(2, 2, 8), "new_value": torch.randn(2, 2, 8)}
    return rows, {"visual_capacity": 12, "text_type": a["text_type"], **new}


@pytest.mark.parametrize("scale", ["x", [1.0], torch.tensor(0.5), 10**400])
def test_a_scale_that_is_no_number_is_refused_by_name(scale):
    rows, named = problem()
    before = rows[1].clone()
    for _ in range(2):
        with pytest.raises(TypeError, match="scale: expected a number or None.*got "):
            ops.decode_attention(*rows, **named, scale=scale)
    assert torch.equal(rows[1], before)


@pytest.mark.parametrize("name", ["query", "key", "n_visual", "text_type", "new_value"])
def test_a_sparse_tensor_is_refused_before_a_row_is_written(name):
    rows, named = problem()
    given = dict(zip(("query", "key", "value", "n_visual", "n_text"), rows, strict=True), **named)
    given[name] = given[name].to_sparse()
    before = rows[1].clone()
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor, got layout torch.sparse_coo"):
        ops.decode_attention(**given, mass=True)
    assert torch.equal(rows[1], before)


def test_sparse_rows_that_would_move_are_refused():
    index = torch.tensor([1, 0])
    with pytest.raises(TypeError, match=r"rows\[1\]: expected a dense tensor, got layout torch.sparse_coo"):
        ops.reorder_([torch.ones(2, 3), torch.ones(2, 3).to_sparse()], index)
    one = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"rows\[0\]: expected a dense tensor, got layout torch.sparse_coo"):
        ops.compact_([torch.ones(2, 3).to_sparse()], one, one[:, 0], one[:, 0])


@pytest.mark.parametrize(("heads", "dim"), [(0, 8), (4, 0)])
def test_a_query_without_heads_or_elements_is_refused(heads, dim):
    rows, named = problem()
    with pytest.raises(ValueError, match=f"query: expected at least one head of at least one element, got {heads} of {dim}"):
        ops.decode_attention(torch.zeros(2, heads, dim), *rows[1:], **named)
    pages = paged_spec.problem(paged_spec.SHAPES[0], torch.float32)
    query = torch.zeros(pages.pop("query").shape[0], heads, dim)
    with pytest.raises(ValueError, match="query: expected at least one head"):
        ops.paged_attention(query, **pages)


@pytest.mark.parametrize("window", [0, 2**31, 2**40, 2**70])
def test_a_window_that_no_int32_holds_is_refused(window):
    rows, named = problem()
    position = {"position": torch.zeros(2, 18, dtype=torch.int32), "query_position": torch.zeros(2, dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"window: expected 1 .. 2147483647, as positions are int32, got {window}"):
        ops.decode_attention(*rows, **named, **position, window=window)
    pages = paged_spec.problem(paged_spec.SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match=f"window: expected 1 .. 2147483647, as positions are int32, got {window}"):
        ops.paged_attention(pages.pop("query"), **pages, window=window)


def test_the_widest_window_is_none():
    rows, named = problem()
    position = {"position": torch.arange(18, dtype=torch.int32).repeat(2, 1), "query_position": torch.full((2,), 18, dtype=torch.int32)}
    wide = ops.decode_attention(*rows, **named, **position, window=2**31 - 1)
    assert torch.equal(wide.output, ops.decode_attention(*rows, **named).output)


def test_a_bound_that_no_operator_can_take_is_refused():
    rows, named = problem()
    ops.decode_attention(*rows, **named, visual_bound=12)  # of known forms from now on
    with pytest.raises(ValueError, match="visual_bound: expected a number of rows"):
        ops.decode_attention(*rows, **named, visual_bound=2**70)


@pytest.mark.parametrize("wrong", [None, [3, 4], "x"])
def test_keep_count_names_what_is_no_tensor(wrong):
    with pytest.raises(TypeError, match=f"n_visual: expected a tensor, got {type(wrong).__name__}"):
        ops.keep_count(wrong, torch.zeros(2, dtype=torch.float64))


def test_a_table_without_blocks_is_read_by_rows_that_only_pad():
    pages = paged_spec.problem(paged_spec.SHAPES[1], torch.float32)
    query, rows = pages.pop("query"), pages["n_rows"].shape[0]
    none = torch.zeros(rows, dtype=torch.int32)
    pages |= {"block_table": pages["block_table"][:, :0], "n_rows": none, "n_visual": none}
    step = ops.paged_step(query, **pages, count=none)
    assert not step.output.any() and not step.mass.any() and not step.n_kept.any() and (step.kept == -1).all()


def test_an_activation_that_is_none_is_refused():
    one = torch.ones(2, 2)
    for call in (lambda: layers.gate_mul(one, one, "relu"), lambda: layers.gated(one, one, one, "relu")):
        with pytest.raises(ValueError, match="activation: expected one of silu, gelu_tanh, gelu; got 'relu'"):
            call()


@pytest.mark.parametrize(("rows", "dtype"), [(0, torch.float32), (0, torch.float16), (1, torch.float64), (3, torch.float64)])
def test_products_of_no_rows_and_of_float64_are_the_references(rows, dtype):
    fused = pytest.importorskip("dyrate_kernels.triton_kernels.layers")
    x, weights = torch.randn(rows, 6).to(dtype), [torch.randn(5, 6).to(dtype), torch.randn(3, 6).to(dtype)]
    biases = [torch.randn(5).to(dtype), None]
    norm = (x, torch.ones(6, dtype=dtype), 1e-6)
    for name, given in {
        "linears": (x, weights, biases),
        "gated": (x, weights[0], weights[0], "gelu"),
        "norm_linears": (x, *norm, weights, biases),
        "norm_gated": (x, *norm, weights[0], weights[0]),
    }.items():
        want, got = getattr(layers, name)(*given), getattr(fused, name)(*given)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_differential_run_of_no_calls_is_refused():
    command = [sys.executable, "-m", "tests.differential", "--calls", "0", "--backend", "reference"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--calls: expected at least 1, got 0" in done.stderr


def test_norms_gates_and_rotations_of_float64_are_the_references():
    fused = pytest.importorskip("dyrate_kernels.triton_kernels.layers")
    x, weight = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    query, key, angle = (torch.randn(2, heads, 3, 8, dtype=torch.float64) for heads in (4, 2, 1))
    for name, given in {
        "rms_norm": (x, weight, 1e-6, True),
        "residual_norm": (x, x + 1, weight, 1e-6, False, weight),
        "gate_mul": (x, x + 1, "gelu_tanh"),
        "rotate": (query, key, angle[:, 0].cos(), angle[:, 0].sin(), weight, weight, 1e-6),
    }.items():
        want, got = getattr(layers, name)(*given), getattr(fused, name)(*given)
        pairs = [(want, got)] if isinstance(want, torch.Tensor) else zip(want, got, strict=True)
        assert all(a.dtype == b.dtype == torch.float64 and torch.equal(a, b) for a, b in pairs), name
