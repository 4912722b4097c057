"""The operators in CUDA C++: the signatures of ``dyrate_kernels.ops.reference`` over the extension ``dyrate_kernels._native``.

Arguments are taken as valid (``dyrate_kernels.ops`` checks them); the extension checks what it is given again. Everything is launched on
the current stream, allocates only its results, reads no device value on the host and can be captured in a graph after one call of the
same shape on the stream of the capture. float64 inputs, heads of more than 256 elements and keys whose elements are not next to each
other go to the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import native
from dyrate_kernels.ops import reference, workspace

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_EMULATED_MULTIPROCESSORS = 4

_prepared: dict[Hashable, Any] = {}  # the extension's call objects, by everything that they depend on but addresses
_cut: tuple[int, int] = (0, 0)  # (most splits, least rows of a split); 0: as the extension plans. Tests set it.


def interpreted() -> bool:
    """The emulated extension of the tests is loaded: kernels run on CPU tensors."""
    return native.missing_reason() is None and bool(getattr(native.load(), "emulated", False))


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None when it can. Asks the driver only where torch finds a device."""
    reason = native.missing_reason()
    if reason is not None or interpreted():
        return reason
    return native.unusable_reason(native.probe()) if torch.cuda.is_available() else "no CUDA device"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _EMULATED_MULTIPROCESSORS


def _stream_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if device.index is None else device.index)


def _launch(prepared: Any, device: torch.device, stream: int, *tensors: Tensor | None) -> None:
    """Starts a call with the tensors' addresses, on their device."""
    addresses = [0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr() for tensor in tensors]
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        prepared.launch(*addresses, stream)
    else:
        with torch.cuda.device(device):
            prepared.launch(*addresses, stream)


def _prepare(name: str, **shape: Any) -> Any:
    key = (name, *shape.values())
    found = _prepared.get(key)
    if found is None:
        found = _prepared[key] = getattr(native.load(), name)(**shape)
    return found


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]


def _type(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _TYPES[tensor.dtype]


def _vector(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _last_contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _readable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    most = native.load().most_dim
    inner = all(rows.shape[-1] == 1 or rows.stride(-1) == 1 for rows in (key, value))
    return query.dtype != torch.float64 and inner and 0 < query.shape[-1] <= most and 0 < value.shape[-1] <= most


def _attend(
    query: Tensor, key: Tensor, value: Tensor, n_visual: Tensor, n_text: Tensor, *, visual_capacity: int, scale: float,
    kept: Tensor | None = None, n_kept: Tensor | None = None, text_type: Tensor | None = None, position: Tensor | None = None,
    query_position: Tensor | None = None, window: int | None = None, mass: bool = False, importance: bool = False,
    output: bool = True, new_key: Tensor | None = None, new_value: Tensor | None = None,
    decide: dict[str, Tensor | None] | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """One launch of the attention, a second one where importance is asked for.

    Returns:
        (output, mass, importance, kept, n_kept, rate); None for what was not asked for.
    """
    device = query.device
    batch, heads, dim = query.shape
    kv_heads, capacity, value_dim = key.shape[1], key.shape[2], value.shape[-1]
    result = query.new_empty(batch, heads, value_dim) if output else None
    masses = torch.empty(batch, heads, 4, dtype=torch.float32, device=device) if mass else None
    scores = torch.empty(batch, visual_capacity, dtype=torch.float32, device=device) if importance else None
    chosen = chosen_count = rate = None
    if decide is not None:
        chosen = torch.empty(batch, visual_capacity, dtype=torch.int32, device=device)
        chosen_count = torch.empty(batch, dtype=torch.int32, device=device)
        rate = torch.empty(batch, dtype=torch.float64, device=device)
    if batch == 0 or heads == 0:
        return result, masses, scores, chosen, chosen_count, rate
    if kept is not None and kept.shape[1] == 0:  # an empty list has no address
        kept, n_kept = kept.new_zeros(batch, 1), torch.zeros_like(n_kept)
    query, kept, new_key, new_value = (_last_contiguous(tensor) for tensor in (query, kept, new_key, new_value))
    text_type = _last_contiguous(text_type) if mass else None
    position, query_position = (_last_contiguous(position), query_position) if window is not None else (None, None)
    logits_wanted = mass or importance
    width = 0 if kept is None else kept.shape[1]
    attention = _prepare(
        "Attention", type=_TYPES[query.dtype], batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim,
        capacity=capacity, visual_capacity=visual_capacity, list_width=width, window=window or 0, write_logits=int(logits_wanted),
        scale=scale, query_stride=(*query.stride()[:2], 1), key_stride=(*key.stride()[:3], 1), value_stride=(*value.stride()[:3], 1),
        new_key_stride=_strides(new_key, 2), new_value_stride=_strides(new_value, 2), kept_stride=_strides(kept, 1)[0],
        text_type_stride=_strides(text_type, 1)[0], position_stride=_strides(position, 1)[0],
        query_position_stride=_strides(query_position, 1)[0], multiprocessors=_multiprocessors(device), most_splits=_cut[0],
        least_rows=_cut[1],
    )  # fmt: skip
    stream = _stream_of(device)
    sizes = {name: size if size else None for name, size in attention.scratch.items()}
    sizes["counters"] += batch  # the decision's
    if not output:
        sizes["part"] = None
    buffers = dict(zip(sizes, workspace.for_stream(device, stream).buffers_for(sizes), strict=True))
    n_visual, n_text, n_kept = _vector(n_visual), _vector(n_text), _vector(n_kept)
    head_stat = buffers["head_stat"] if logits_wanted else None
    _launch(
        attention, device, stream, query, key, value if output else None, result, n_visual, n_text, kept, n_kept, text_type, position,
        query_position, new_key, new_value, buffers["part"], buffers["part_stat"], head_stat, buffers["logits"], buffers["counters"],
        masses,
    )  # fmt: skip
    if importance:
        given = decide or {}
        weight, bias, score, alive = (given.get(name) for name in ("weight", "bias", "score", "alive"))
        rates, count, max_kept = (_vector(given.get(name)) for name in ("rates", "count", "max_kept"))
        if bias is not None and bias.dim() == 1:
            bias = bias.expand(batch, -1)
        if alive is not None:
            alive = alive.view(torch.uint8)
        deciding = _prepare(
            "Decide", batch=batch, heads=heads, visual_capacity=visual_capacity, list_width=width, logit_capacity=attention.logit_capacity,
            decide=int(decide is not None), classes=0 if weight is None else weight.shape[0], weight_type=_type(weight),
            bias_type=_type(bias), score_type=_type(score), weight_stride=_strides(weight, 2), bias_stride=_strides(bias, 2),
            score_stride=_strides(score, 2), alive_stride=_strides(alive, 2), kept_in_stride=_strides(kept, 1)[0],
        )  # fmt: skip
        _launch(
            deciding, device, stream, n_visual, kept, n_kept, head_stat, buffers["logits"], masses, scores, weight, bias, rates, count,
            max_kept, score, alive, chosen, chosen_count, rate, buffers["counters"],
        )  # fmt: skip
    return result, masses, scores, chosen, chosen_count, rate


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, n_visual: Tensor, n_text: Tensor, *, visual_bound: int | None = None,
    text_bound: int | None = None, clean: bool = False, **rest: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See ``dyrate_kernels.ops.decode_attention``. The bounds and ``clean`` are not needed: lengths are read on the device."""
    if not _readable(query, key, value):
        return reference.decode_attention(
            query, key, value, n_visual, n_text, visual_bound=visual_bound, text_bound=text_bound, clean=clean, **rest
        )
    return _attend(query, key, value, n_visual, n_text, **rest)[:3]


def score_last_query(
    query: Tensor, key: Tensor, value: Tensor, n_visual: Tensor, n_text: Tensor, *, visual_bound: int | None = None,
    text_bound: int | None = None, **rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``dyrate_kernels.ops.score_last_query``: the same kernels, without values and output."""
    if not _readable(query, key, value):
        return reference.score_last_query(query, key, value, n_visual, n_text, visual_bound=visual_bound, text_bound=text_bound, **rest)
    return _attend(query, key, value, n_visual, n_text, mass=True, importance=True, output=False, **rest)[1:3]


def decode_step(
    query: Tensor, key: Tensor, value: Tensor, n_visual: Tensor, n_text: Tensor, *, weight: Tensor | None = None,
    bias: Tensor | None = None, rates: Tensor | None = None, count: Tensor | None = None, score: Tensor | None = None,
    alive: Tensor | None = None, max_kept: Tensor | None = None, visual_bound: int | None = None, text_bound: int | None = None,
    clean: bool = False, **rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See ``dyrate_kernels.ops.decode_step``: two launches."""
    decide = {"weight": weight, "bias": bias, "rates": rates, "count": count, "score": score, "alive": alive, "max_kept": max_kept}
    if not _readable(query, key, value):
        return reference.decode_step(
            query, key, value, n_visual, n_text, visual_bound=visual_bound, text_bound=text_bound, clean=clean, **decide, **rest
        )
    return _attend(query, key, value, n_visual, n_text, mass=True, importance=True, decide=decide, **rest)


def predict_rate(mass: Tensor, weight: Tensor, bias: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.predict_rate``."""
    if mass.dtype == torch.float64 or mass.shape[1] == 0:
        return reference.predict_rate(mass, weight, bias, rates)
    batch, device = mass.shape[0], mass.device
    rate = torch.empty(batch, dtype=torch.float64, device=device)
    index = torch.empty(batch, dtype=torch.int64, device=device)
    if batch:
        mass, rates = mass.contiguous(), rates.contiguous()
        bias = bias.expand(batch, -1) if bias.dim() == 1 else bias
        prepared = _prepare(
            "Predict", batch=batch, features=mass.shape[1] * 4, classes=weight.shape[0], mass_type=_type(mass), weight_type=_type(weight),
            bias_type=_type(bias), weight_stride=weight.stride(), bias_stride=bias.stride(),
        )  # fmt: skip
        _launch(prepared, device, _stream_of(device), mass, weight, bias, rates, rate, index)
    return rate, index


def keep_count(n_visual: Tensor, rate: Tensor) -> Tensor:
    """See ``dyrate_kernels.ops.keep_count``: a few elements, left to torch."""
    return reference.keep_count(n_visual, rate)


def select_tokens(score: Tensor, count: Tensor, n_visual: Tensor, *, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.select_tokens``."""
    batch, tokens = score.shape
    kept = torch.empty(batch, tokens, dtype=torch.int32, device=score.device)
    n_kept = torch.empty(batch, dtype=torch.int32, device=score.device)
    if tokens == 0:
        return kept, n_kept.zero_()
    if batch:
        alive = None if alive is None else alive.view(torch.uint8)
        prepared = _prepare(
            "Select", batch=batch, tokens=tokens, score_type=_type(score), score_stride=score.stride(), alive_stride=_strides(alive, 2)
        )
        _launch(prepared, score.device, _stream_of(score.device), score, alive, _vector(count), _vector(n_visual), kept, n_kept)
    return kept, n_kept


# ---- rows that move ---------------------------------------------------------------------------------------------------------------

# a tensor whose rows move: address, strides of sequence, head and row in bytes, heads, bytes of a row
_Rows = tuple[int, int, int, int, int, int]


@functools.lru_cache(maxsize=256)
def _mover(name: str, rows: tuple[_Rows, ...], *shape: int) -> Any:
    return getattr(native.load(), name)(rows, *shape)


def _launches(name: str, rows: list[_Rows], *shape: int) -> Iterator[Any]:
    """Calls for all rows, as many tensors in each as fit."""
    most = native.load().most_tensors
    for first in range(0, len(rows), most):
        yield _mover(name, tuple(rows[first : first + most]), *shape)


def _describe(tensor: Tensor) -> _Rows | None:
    """None where a row's elements are not next to each other."""
    size = tensor.element_size()
    if tensor.dim() == 2:
        return tensor.data_ptr(), tensor.stride(0) * size, 0, tensor.stride(1) * size, 1, size
    if tensor.stride(3) != 1 and tensor.shape[3] != 1:
        return None
    sequence, head, row = (stride * size for stride in tensor.stride()[:3])
    return tensor.data_ptr(), sequence, head, row, tensor.shape[1], tensor.shape[3] * size


def compact_(rows: list[Tensor], kept: Tensor, n_kept: Tensor, n_visual: Tensor) -> None:
    """See ``dyrate_kernels.ops.compact_``: one launch for up to 80 tensors."""
    batch, width = kept.shape
    rows = [tensor for tensor in rows if tensor.numel()]
    if not rows or batch == 0 or width == 0:
        return
    kept = _last_contiguous(kept)
    lines = [_describe(tensor) for tensor in rows]
    others = [tensor for tensor, line in zip(rows, lines, strict=True) if line is None]
    if others:
        reference.compact_(others, kept, n_kept, n_visual)
    n_kept, n_visual = _vector(n_kept), _vector(n_visual)
    for prepared in _launches("Compact", [line for line in lines if line is not None], batch, width, kept.stride(0)):
        _launch(prepared, kept.device, _stream_of(kept.device), kept, n_kept, n_visual)


def reorder_(rows: list[Tensor], index: Tensor) -> None:
    """See ``dyrate_kernels.ops.reorder_``: one launch for up to 80 tensors."""
    batch = index.shape[0]
    rows = [tensor for tensor in rows if tensor.numel()]
    fits = [tensor.is_contiguous() and batch <= native.load().most_reorder_batch for tensor in rows]
    others = [tensor for tensor, fit in zip(rows, fits, strict=True) if not fit]
    if others:
        reference.reorder_(others, index)
    lines = []
    for tensor, fit in zip(rows, fits, strict=True):
        if fit:
            size = tensor[0].numel() * tensor.element_size()
            lines.append((tensor.data_ptr(), size, 0, 0, 1, size))
    index = index.contiguous()
    for prepared in _launches("Reorder", lines, batch):
        _launch(prepared, index.device, _stream_of(index.device), index)
