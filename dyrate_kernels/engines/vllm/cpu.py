"""The backend over vLLM's on a CPU, whose kernel keeps keys in an order of its own."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from dyrate_kernels.engines.vllm.attention import Planned, over
from dyrate_kernels.engines.vllm.pruning import LayerCache


def read_cache(impl: Any, layer: Any, kv_cache: Tensor, planned: Planned) -> LayerCache:
    """The step's blocks, in plain order: copies."""
    blocks, heads, size, _ = kv_cache.shape
    if "blocks" not in planned.read:
        used = -(-planned.step.row_bound // size)
        table = planned.block_table[:, :used]
        found, line = torch.unique(table, return_inverse=True)
        planned.read["blocks"] = found.long().clamp(0, blocks - 1), line.view(table.shape).int()
    found, table = planned.read["blocks"]
    pool = kv_cache[found].view(len(found), heads, 2 * size, impl.head_size)
    key, value = (half.reshape(len(found), heads, -1) for half in pool.chunk(2, dim=2))
    of_key, of_value = orders(layer.isa, kv_cache.dtype, size, impl.head_size)
    shape = (len(found), heads, size, impl.head_size)
    return LayerCache(key[..., of_key].view(shape).transpose(1, 2), value[..., of_value].view(shape).transpose(1, 2), table)


@functools.cache
def orders(isa: str, dtype: torch.dtype, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Where a block of one head holds each number of its keys and of its values, int64 ``[size * dim]`` each, row by row.

    Found by writing a block of numbers that count up with vLLM's own operator, digit by digit, so that 16 bits hold them exactly.
    """
    count = size * dim
    found = []
    number = torch.arange(count)
    places = torch.zeros(2, count, dtype=torch.int64)
    for digit in (1, 128, 128 * 128):
        rows = (number // digit % 128).to(dtype).view(size, 1, dim)
        cache = torch.zeros(1, 1, 2 * size, dim, dtype=dtype)
        key, value = cache.chunk(2, dim=2)
        slots, scales = torch.arange(size), {"k_scale": 1.0, "v_scale": 1.0}
        _custom_ops.cpu_attn_reshape_and_cache(rows, rows.clone(), key, value, slots, isa, **scales, kv_cache_dtype="auto")
        for line, half in zip(places, (key, value), strict=True):
            line += half.flatten().long() * digit
    for line in places:
        if not torch.equal(line.sort().values, number):
            raise RuntimeError(f"vLLM's CPU kernel ({isa}, {dtype}) stores keys and values in a form that dyrate_kernels cannot read")
        found.append(line.argsort())
    return found[0], found[1]


DyRateCPUAttentionBackend = over(CPUAttentionBackend, read_cache)
