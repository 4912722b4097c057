"""The masked attention of the training pass: values and gradients against plain autograd and float64 finite differences."""

from __future__ import annotations

import pytest
import torch

from dyrate_kernels.training import masked_attention as module
from dyrate_kernels.training.masked_attention import masked_attention


def problem(batch=2, heads=4, kv_heads=2, rows=5, columns=11, dim=8, tokens=6, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, rows, dim, generator=g, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, columns, dim, generator=g, dtype=torch.float64)
    value = torch.randn(batch, kv_heads, columns, dim + 3, generator=g, dtype=torch.float64)
    mask = (torch.rand(batch, rows, tokens, generator=g) < 0.5).double()
    allowed = torch.ones(batch, rows, columns, dtype=torch.bool).tril(columns - rows)
    allowed[1, :, 0] = False  # padding
    place = torch.arange(1, tokens + 1).repeat(batch, 1)
    place[1, -2:] = -1  # the second sequence has fewer visual tokens
    return [t.to(dtype) for t in (query, key, value, mask)] + [allowed, place]


def plain(query, key, value, mask, allowed, columns, scale):
    """The formula, with an attention matrix."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    full = torch.ones(*allowed.shape, dtype=mask.dtype)
    for b, row in enumerate(columns.tolist()):
        for j, column in enumerate(row):
            if column >= 0:
                full = full.clone()
                full[b, :, column] = mask[b, :, j]
    full = full * allowed
    score = query @ key.transpose(2, 3) * scale
    score = score - score.masked_fill(~allowed[:, None], float("-inf")).amax(-1, keepdim=True).detach()
    weight = score.masked_fill(~allowed[:, None], 0.0).exp() * full[:, None]
    return weight / weight.sum(-1, keepdim=True) @ value


def gradients(function, tensors, rest, upper):
    leaves = [t.clone().requires_grad_() for t in tensors]
    output = function(*leaves, *rest)
    return output, torch.autograd.grad(output, leaves, upper)


@pytest.mark.parametrize("chunk", [1, 700, 1 << 20])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_values_and_gradients(heads, kv_heads, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    query, key, value, mask, allowed, columns = problem(heads=heads, kv_heads=kv_heads)
    upper = torch.randn(2, heads, 5, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors, rest = [query, key, value, mask], (allowed, columns, 0.3)
    got, got_grads = gradients(masked_attention, tensors, rest, upper)
    want, want_grads = gradients(plain, tensors, rest, upper)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert (got_grads[3][0] != 0).all()  # tokens that were left out have a gradient too
    assert (got_grads[3][1, :, -2:] == 0).all()  # those that do not exist have none


def test_finite_differences():
    """Each number of the mask, at 0 and at 1, and of query, key and value."""
    query, key, value, mask, allowed, columns = problem(batch=2, heads=2, kv_heads=1, rows=3, columns=7, dim=4, tokens=4)

    def function(*tensors):
        return masked_attention(*tensors, allowed, columns, 0.5)

    leaves = [t.requires_grad_() for t in (query, key, value, mask)]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_a_hard_mask_is_the_softmax_of_what_stays():
    query, key, value, mask, allowed, columns = problem(dtype=torch.float32)
    full = allowed.clone()
    for b in range(2):
        for j, column in enumerate(columns[b].tolist()):
            if column >= 0:
                full[b, :, column] &= mask[b, :, j].bool()
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=full[:, None], scale=0.3, enable_gqa=True)
    torch.testing.assert_close(masked_attention(query, key, value, mask, allowed, columns, 0.3), want, rtol=2e-6, atol=2e-6)


def test_a_token_that_outweighs_all_others_is_left_out():
    """Its score does not disturb the rest, and its gradient is finite."""
    query, key, value, mask, allowed, columns = problem(dtype=torch.float32)
    mask[0, :, 2] = 0
    key[0, :, columns[0, 2]] = 1e3 * query[0, :2, -1]
    mask.requires_grad_()
    output = masked_attention(query, key, value, mask, allowed, columns, 1.0)
    other = key.clone()
    other[0, :, columns[0, 2]] = 0
    torch.testing.assert_close(output, masked_attention(query, other, value, mask, allowed, columns, 1.0))
    output.sum().backward()
    assert mask.grad.isfinite().all() and output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    tensors = problem(dtype=torch.float32)
    half = [t.to(dtype) for t in tensors[:3]] + tensors[3:]
    exact = [t.double() for t in half[:4]] + tensors[4:]
    got = masked_attention(*half, 0.3)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), masked_attention(*exact, 0.3), rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_nothing_of_the_size_of_an_attention_matrix_is_saved():
    query, key, value, mask, allowed, columns = problem(rows=40, columns=60, tokens=6, dtype=torch.float32)
    query.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_attention(query, key, value, mask, allowed, columns, 0.3)
    matrix = 2 * 4 * 40 * 60
    assert saved and max(t.numel() for t in saved if t.dtype != torch.bool) < matrix / 3


def test_rows_that_may_look_nowhere():
    query, key, value, mask, allowed, columns = problem()
    allowed[0, 2] = False
    leaves = [t.requires_grad_() for t in (query, key, value, mask)]
    output = masked_attention(*leaves, allowed, columns, 0.3)
    output.sum().backward()
    assert (output[0, :, 2] == 0).all()
    assert all(t.grad.isfinite().all() for t in leaves)
