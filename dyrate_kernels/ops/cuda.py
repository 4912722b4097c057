"""The operators in CUDA C++: the functions of ``dyrate_kernels.ops.contract`` over the extension ``dyrate_kernels._native``.

Arguments are taken as valid (``dyrate_kernels.ops`` checks them); the extension checks what it is given again. Everything is launched on
the current stream, allocates only its results, reads no device value on the host and can be captured in a graph after one call of the
same shape on the stream of the capture. float64 inputs, heads of more than 256 elements and keys whose elements are not next to each
other go to the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import devices, native
from dyrate_kernels.ops import reference, workspace
from dyrate_kernels.ops.contract import Decide, Rows
from dyrate_kernels.ops.forms import Step, empty_step, form, last_contiguous, readable_list, remember, stream_of, strides, vector

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}

_cut: tuple[int, int] = (0, 0)  # (most splits, least rows of a split); 0: as the extension plans. Tests set it.


@dataclass(frozen=True)
class Settings:
    """Settings of attention of 16-bit rows from sm_80 on (``csrc/attention_staged.h``); other rows and earlier GPUs go through registers.

    From the device file's ``"cuda"``, or ``override``. A number of unknown effect on a GPU stays as it is here until it is measured there.

    Attributes:
        tensor_cores: the least number of query heads a key/value head that takes tensor cores; 0: none does. With 1, a single head's
            softmax is rounded to the rows' type before it meets the values.
        stages: tiles of a warp that are on their way or being read, 2 .. 4; 0: as many as leave room for as many blocks as two do;
            1: rows go through registers, whatever ``tensor_cores`` says.
        bulk: 1: on sm_90 and later a copy of whole runs of rows instead of 16 bytes a lane; not for more than 8 query heads.
    """

    tensor_cores: int = 2
    stages: int = 0
    bulk: int = 0

    def __post_init__(self) -> None:
        for name, most in (("tensor_cores", 65535), ("stages", 4), ("bulk", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
                raise ValueError(f"{name}: expected a whole number from 0 to {most}, got {value!r}")


override: Settings | None = None  # of tests and tuning: instead of the device file's


@dataclass(frozen=True)
class _Gpu:
    """multiprocessors; capability: 90 for sm_90; code: that of the code which runs there; settings: of its device file."""

    multiprocessors: int
    capability: int
    code: int
    settings: Settings


_EMULATED = _Gpu(multiprocessors=4, capability=90, code=90, settings=Settings())


def interpreted() -> bool:
    """The emulated extension of the tests is loaded: kernels run on CPU tensors."""
    return native.missing_reason() is None and bool(getattr(native.load(), "emulated", False))


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None when it can. Asks the driver only where torch finds a device."""
    reason = native.missing_reason()
    if reason is not None or interpreted():
        return reason
    return native.unusable_reason(native.probe()) if torch.cuda.is_available() else "no CUDA device"


def settings(device_name: str) -> Settings:
    """Those of the device's file."""
    with devices.named(device_name):
        return devices.build("cuda", Settings, devices.measured(device_name).get("cuda", {}))


@functools.cache
def _gpu(device: torch.device) -> _Gpu:
    if device.type != "cuda":
        return _EMULATED
    properties = torch.cuda.get_device_properties(device)
    seen = native.probe()
    return _Gpu(
        multiprocessors=properties.multi_processor_count,
        capability=properties.major * 10 + properties.minor,
        code=native.code_for(seen.architectures if seen else (), (properties.major, properties.minor)),
        settings=settings(properties.name),
    )


def _launch(prepared: Any, device: torch.device, stream: int, *tensors: Tensor | None) -> None:
    """Starts a call with the tensors' addresses, on their device. The address of a tensor without elements is 0."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        prepared.launch(*addresses, stream)
    else:
        with torch.cuda.device(device):
            prepared.launch(*addresses, stream)


def _type(tensor: Tensor | None) -> int:
    return 0 if tensor is None else _TYPES[tensor.dtype]


def _readable(rows: Rows) -> bool:
    most = native.load().most_dim
    inner = all(tensor.shape[-1] == 1 or tensor.stride(-1) == 1 for tensor in (rows.key, rows.value))
    return rows.query.dtype != torch.float64 and inner and 0 < rows.query.shape[-1] <= most and 0 < rows.value.shape[-1] <= most


@dataclass(frozen=True)
class _Attention:
    """Everything about an attention call that its tensors' forms decide.

    Attributes:
        attention: the extension's call object.
        decide: that of the second launch, where importance is asked for.
        scratch: elements of each scratch buffer, by name; None where it is not used.
    """

    attention: Any
    decide: Any
    scratch: dict[str, int | None]


_attentions: dict[Hashable, _Attention] = {}
_calls: dict[Hashable, Any] = {}  # call objects of the other operators, by name and forms


def _prepare_attention(rows: Rows, logits: bool, importance: bool, output: bool, decide: Decide | None) -> _Attention:
    query, key, value, kept, visual_capacity = rows.query, rows.key, rows.value, rows.kept, rows.visual_capacity
    batch, heads, dim = query.shape
    width = 0 if kept is None else kept.shape[1]
    gpu = _gpu(query.device)
    how = override or gpu.settings
    attention = native.load().Attention(
        type=_type(query), batch=batch, heads=heads, kv_heads=key.shape[1], dim=dim, value_dim=value.shape[-1], capacity=key.shape[2],
        visual_capacity=visual_capacity, list_width=width, window=rows.window or 0, write_logits=int(logits), scale=rows.scale,
        query_stride=(*query.stride()[:2], 1), key_stride=(*key.stride()[:3], 1), value_stride=(*value.stride()[:3], 1),
        new_key_stride=strides(rows.new_key, 2), new_value_stride=strides(rows.new_value, 2), kept_stride=strides(kept, 1)[0],
        text_type_stride=strides(rows.text_type, 1)[0], position_stride=strides(rows.position, 1)[0],
        query_position_stride=strides(rows.query_position, 1)[0], multiprocessors=gpu.multiprocessors,
        capability=gpu.capability, code=gpu.code, tensor_cores=how.tensor_cores, stages=how.stages, bulk=how.bulk,
        most_splits=_cut[0], least_rows=_cut[1],
    )  # fmt: skip
    decision = None
    if importance:
        weight, bias, _, _, score, alive, _ = decide or Decide()
        decision = native.load().Decide(
            batch=batch, heads=heads, visual_capacity=visual_capacity, list_width=width, logit_capacity=attention.logit_capacity,
            decide=int(decide is not None), classes=0 if weight is None else weight.shape[0], weight_type=_type(weight),
            bias_type=_type(bias), score_type=_type(score), weight_stride=strides(weight, 2), bias_stride=strides(bias, 2),
            score_stride=strides(score, 2), alive_stride=strides(alive, 2), kept_in_stride=strides(kept, 1)[0],
        )  # fmt: skip
    sizes = attention.scratch
    scratch = {
        "part": sizes["part"] if output else None,
        "part_stat": sizes["part_stat"],
        "head_stat": sizes["head_stat"] if logits else None,
        "logits": sizes["logits"] if logits else None,
        "counters": sizes["counters"] + batch,  # the decision's
    }
    return _Attention(attention, decision, scratch)


def _attend(rows: Rows, *, mass: bool, importance: bool, output: bool = True, decide: Decide | None = None) -> Step:
    """One launch of the attention, a second one where importance is asked for."""
    (
        query, key, value, n_visual, n_text, visual_capacity, scale, kept, n_kept, text_type, position, query_position, window, _, _, _,
        new_key, new_value, _, _,
    ) = rows  # fmt: skip
    device = query.device
    batch, heads, _ = query.shape
    made = empty_step(query, value, visual_capacity, output=output, mass=mass, importance=importance, decide=decide is not None)
    if batch == 0 or heads == 0:
        return made
    weight, bias, rates, count, score, alive, max_kept = decide or Decide()
    if decide is not None:
        rates, count, max_kept = vector(rates), vector(count), vector(max_kept)
        if bias is not None and bias.dim() == 1:
            bias = bias.expand(batch, -1)
        if alive is not None:
            alive = alive.view(torch.uint8)
    kept, n_kept = readable_list(last_contiguous(kept), vector(n_kept))
    query, new_key, new_value = last_contiguous(query), last_contiguous(new_key), last_contiguous(new_value)
    text_type = last_contiguous(text_type) if mass else None
    position, query_position = (None, None) if window is None else (last_contiguous(position), query_position)
    forms = (
        device, visual_capacity, scale, window, mass, importance, output, decide is not None, _cut, override, form(query), form(key),
        form(value), form(kept), form(text_type), form(position), form(query_position), form(new_key), form(new_value), form(weight),
        form(bias), form(score), form(alive),
    )  # fmt: skip
    known = _attentions.get(forms)
    if known is None:
        readable = rows._replace(
            query=query, kept=kept, text_type=text_type, position=position, query_position=query_position, new_key=new_key,
            new_value=new_value,
        )  # fmt: skip
        by = None if decide is None else Decide(weight, bias, rates, count, score, alive, max_kept)
        known = remember(_attentions, forms, _prepare_attention(readable, mass or importance, importance, output, by))
    stream = stream_of(device)
    part, part_stat, head_stat, logits, counters = workspace.for_stream(device, stream).buffers_for(known.scratch)
    n_visual, n_text = vector(n_visual), vector(n_text)
    _launch(
        known.attention, device, stream, query, key, value if output else None, made.output, n_visual, n_text, kept, n_kept, text_type,
        position, query_position, new_key, new_value, part, part_stat, head_stat, logits, counters, made.mass,
    )  # fmt: skip
    if known.decide is not None:
        _launch(
            known.decide, device, stream, n_visual, kept, n_kept, head_stat, logits, made.mass, made.importance, weight, bias, rates, count,
            max_kept, score, alive, made.kept, made.n_kept, made.rate, counters,
        )  # fmt: skip
    return made


def _call(name: str, forms: Hashable, **shape: Any) -> Any:
    """The extension's call object of that name and shape; ``forms`` decide the shape."""
    known = _calls.get((name, forms))
    return remember(_calls, (name, forms), getattr(native.load(), name)(**shape)) if known is None else known


def decode_attention(rows: Rows, *, mass: bool, importance: bool) -> tuple[Tensor, Any, Any]:
    """See ``dyrate_kernels.ops.decode_attention``. The bounds and ``clean`` are not needed: lengths are read on the device.

    Rotary embedding is left to torch.
    """
    rows = reference.rotate(rows)
    if not _readable(rows):
        return reference.decode_attention(rows, mass=mass, importance=importance)
    return _attend(rows, mass=mass, importance=importance)[:3]


def score_last_query(rows: Rows) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.score_last_query``: the same kernels, without values and output."""
    if not _readable(rows):
        return reference.score_last_query(rows)
    return _attend(rows, mass=True, importance=True, output=False)[1:3]


def decode_step(rows: Rows, decide: Decide) -> Step:
    """See ``dyrate_kernels.ops.decode_step``: two launches. Rotary embedding is left to torch."""
    rows = reference.rotate(rows)
    if not _readable(rows):
        return Step(*reference.decode_step(rows, decide))
    return _attend(rows, mass=True, importance=True, decide=decide)


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
        prepared = _call(
            "Predict", (form(mass), form(weight), form(bias)), batch=batch, features=mass.shape[1] * 4, classes=weight.shape[0],
            mass_type=_type(mass), weight_type=_type(weight), bias_type=_type(bias), weight_stride=weight.stride(),
            bias_stride=bias.stride(),
        )  # fmt: skip
        _launch(prepared, device, stream_of(device), mass, weight, bias, rates, rate, index)
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
        prepared = _call(
            "Select", (form(score), form(alive)), batch=batch, tokens=tokens, score_type=_type(score), score_stride=score.stride(),
            alive_stride=strides(alive, 2),
        )  # fmt: skip
        _launch(prepared, score.device, stream_of(score.device), score, alive, vector(count), vector(n_visual), kept, n_kept)
    return kept, n_kept


# ---- rows that move ---------------------------------------------------------------------------------------------------------------

# a tensor whose rows move: address, strides of sequence, head and row in bytes, heads, bytes of a row, rows of a head
_Rows = tuple[int, int, int, int, int, int, int]


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
        return tensor.data_ptr(), tensor.stride(0) * size, 0, tensor.stride(1) * size, 1, size, tensor.shape[1]
    if tensor.stride(3) != 1 and tensor.shape[3] != 1:
        return None
    sequence, head, row = (stride * size for stride in tensor.stride()[:3])
    return tensor.data_ptr(), sequence, head, row, tensor.shape[1], tensor.shape[3] * size, tensor.shape[2]


def compact_(rows: list[Tensor], kept: Tensor, n_kept: Tensor, n_visual: Tensor) -> None:
    """See ``dyrate_kernels.ops.compact_``: one launch for up to 80 tensors."""
    batch, width = kept.shape
    rows = [tensor for tensor in rows if tensor.numel()]
    if not rows or batch == 0 or width == 0:
        return
    kept = last_contiguous(kept)
    lines = [_describe(tensor) for tensor in rows]
    others = [tensor for tensor, line in zip(rows, lines, strict=True) if line is None]
    if others:
        reference.compact_(others, kept, n_kept, n_visual)
    n_kept, n_visual = vector(n_kept), vector(n_visual)
    for prepared in _launches("Compact", [line for line in lines if line is not None], batch, width, kept.stride(0)):
        _launch(prepared, kept.device, stream_of(kept.device), kept, n_kept, n_visual)


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
            lines.append((tensor.data_ptr(), size, 0, 0, 1, size, 1))
    index = index.contiguous()
    for prepared in _launches("Reorder", lines, batch):
        _launch(prepared, index.device, stream_of(index.device), index)
