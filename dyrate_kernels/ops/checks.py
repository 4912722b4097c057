"""Checks of operator arguments on the host: shapes, dtypes, devices. Nothing here reads device data."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Decide, PagedRows, Rows

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensor(
    name: str, value: object, shape: tuple[int | str | None, ...], dtypes: tuple[torch.dtype, ...], device: torch.device | None
) -> Tensor:
    """Checks one tensor argument. ``shape`` holds sizes, or a word where any size will do."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(
        want is None or isinstance(want, str) or got == want for got, want in zip(value.shape, shape, strict=False)
    )
    if not fits:
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {value.dtype}; convert it first"
        )
    dense(name, value)
    if value.device != device:
        raise ValueError(f"{name}: expected it on {device}, where the first argument is, got {value.device}; move it there")
    return value


def dense(name: str, value: Tensor) -> None:
    """A tensor with an address and strides."""
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}; call to_dense() first")


def whole(name: str, value: object) -> None:
    """A whole number, as Python, numpy or a compiler that traces has it; not a tensor, which would be read on the host."""
    if not isinstance(value, int) and (
        isinstance(value, Tensor) or not hasattr(value, "__index__") and not isinstance(value, torch.SymInt)
    ):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")


def floating(name: str, value: object, shape: tuple[int | str | None, ...], device: torch.device | None = None) -> Tensor:
    """A float tensor of any of the four supported dtypes."""
    home = value.device if device is None and isinstance(value, Tensor) else device
    return tensor(name, value, shape, _FLOATS, home)


def int32(name: str, value: object, shape: tuple[int | str | None, ...], device: torch.device) -> Tensor:
    return tensor(name, value, shape, (torch.int32,), device)


def scale(value: float | None, query: object, unit: str = "B") -> float:
    """Checks the query; returns the factor of the logits, ``D ** -0.5`` for None."""
    _, heads, dim = floating("query", query, (unit, "Hq", "D")).shape
    if heads == 0 or dim == 0:
        raise ValueError(f"query: expected at least one head of at least one element, got {heads} of {dim}")
    if value is None:
        return dim**-0.5
    try:
        if not isinstance(value, Tensor):  # which would be read on the host
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"scale: expected a number or None, which is D ** -0.5, got {value!r}")


def rows(given: Rows) -> None:
    """The row layout that all attention operators share, and what is optional in it but ``text_type``."""
    query, key, value, device = given.query, given.key, given.value, given.query.device
    batch, heads, dim = query.shape
    same = (query.dtype,)
    tensor("key", key, (batch, "Hkv", "C", dim), same, device)
    tensor("value", value, (batch, key.shape[1], key.shape[2], "D"), same, device)
    _heads(heads, key.shape[1])
    int32("n_visual", given.n_visual, (batch,), device)
    int32("n_text", given.n_text, (batch,), device)
    whole("visual_capacity", given.visual_capacity)
    if not 0 <= given.visual_capacity <= key.shape[2]:
        raise ValueError(f"visual_capacity: expected 0 .. {key.shape[2]}, the rows of key, got {given.visual_capacity}")
    _window(given)
    bound("visual_bound", given.visual_bound)
    bound("text_bound", given.text_bound)
    _kept(given, batch, "M")
    _new_row(given)
    _rotary(given)


def _heads(heads: int, kv_heads: int) -> None:
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key: expected a number of heads that divides the {heads} heads of query, got {kv_heads}")


def _window(given: Rows) -> None:
    """A sliding window needs all three of its arguments."""
    size, position, query_position, key = given.window, given.position, given.query_position, given.key
    if size is None:
        return
    _window_size(size)
    if position is None or query_position is None:
        raise ValueError("window: expected position and query_position beside it, got none; pass both, or window=None")
    int32("position", position, (key.shape[0], key.shape[2]), key.device)
    int32("query_position", query_position, (key.shape[0],), key.device)


def _window_size(size: int) -> None:
    """Positions are int32, and a comparison with what no int32 holds wraps around."""
    whole("window", size)
    if not 1 <= size < 2**31:
        raise ValueError(f"window: expected 1 .. {2**31 - 1}, as positions are int32, got {size}; None is no window")


def _kept(given: Rows | PagedRows, units: int, width: str) -> None:
    """The list of kept rows and its lengths: both or neither."""
    if (given.kept is None) != (given.n_kept is None):
        raise ValueError("kept, n_kept: expected both or neither, got one; n_kept is the length of each list in kept")
    if given.kept is not None:
        int32("kept", given.kept, (units, width), given.query.device)
        int32("n_kept", given.n_kept, (units,), given.query.device)


def _new_row(given: Rows) -> None:
    """The row to append: both or neither."""
    if (given.new_key is None) != (given.new_value is None):
        raise ValueError("new_key, new_value: expected both or neither, got one; a new row has a key and a value")
    if given.new_key is not None:
        if given.key.shape[2] == 0:
            raise ValueError("key: expected room for the new row, a capacity of at least 1, got 0")
        for name, new, rows in (("new_key", given.new_key, given.key), ("new_value", given.new_value, given.value)):
            tensor(name, new, (rows.shape[0], rows.shape[1], rows.shape[3]), (rows.dtype,), rows.device)


def _rotary(given: Rows) -> None:
    """cos and sin of the newest position: both or neither, ``[B, D]`` or ``[1, D]``."""
    query = given.query
    if (given.cos is None) != (given.sin is None):
        raise ValueError("cos, sin: expected both or neither, got one; a rotation has both")
    if given.cos is not None:
        batch, _, dim = query.shape
        if dim % 2:
            raise ValueError(f"cos: expected an even head dim, whose halves turn against each other, got {dim}; rotate before the call")
        for name, rotation in (("cos", given.cos), ("sin", given.sin)):
            one = isinstance(rotation, Tensor) and rotation.dim() == 2 and rotation.shape[0] == 1
            tensor(name, rotation, (1 if one else batch, dim), (query.dtype,), query.device)


def paged(given: PagedRows, mass: bool, importance: bool) -> int:
    """The arguments that both operators over paged rows share; returns the columns of a query row's visual places."""
    query, key = given.query, given.key
    rows, heads, dim = query.shape
    device, same = query.device, (query.dtype,)
    tensor("key", key, ("blocks", "block_size", "Hkv", dim), same, device)
    if key.shape[0] == 0 or key.shape[1] == 0:
        raise ValueError(f"key: expected at least one block of at least one row, got shape {list(key.shape)}")
    tensor("value", given.value, (*key.shape[:3], "D"), same, device)
    _heads(heads, key.shape[2])
    int32("block_table", given.block_table, ("S", "M"), device)
    int32("n_rows", given.n_rows, (rows,), device)
    sequences = given.block_table.shape[0]
    if given.sequence is not None:
        int32("sequence", given.sequence, (rows,), device)
    elif sequences != rows:
        raise ValueError(
            f"sequence: expected int32 [{rows}], the line of block_table of each query row, as block_table has {sequences} lines, got None"
        )
    if given.window is not None:
        _window_size(given.window)
    bound("row_bound", given.row_bound)
    _kept(given, rows, "W")
    if given.kept is None and not (mass or importance):
        return 0
    wanted = {"n_visual": given.n_visual, "text_position": given.text_position}
    if given.kept is None:
        wanted["visual_position"] = given.visual_position
    for name, value_of in wanted.items():
        if value_of is None:
            raise ValueError(f"{name}: expected a tensor, which statistics and kept lists need, got None")
    int32("n_visual", given.n_visual, (rows,), device)
    texts = int32("text_position", given.text_position, (sequences, "T"), device)
    listed = given.kept if given.kept is not None else int32("visual_position", given.visual_position, (sequences, "N"), device)
    if mass:
        if given.text_type is None:
            raise ValueError("text_type: expected uint8 [S, T], which the mass by type needs, got None")
        tensor("text_type", given.text_type, tuple(texts.shape), (torch.uint8,), device)
    return listed.shape[1]


def bound(name: str, value: int | None) -> None:
    if value is None:
        return
    whole(name, value)
    if not 0 <= value < 2**63:
        raise ValueError(f"{name}: expected a number of rows >= 0 or None, got {value}")


def text_types(given: Rows) -> None:
    key = given.key
    if given.text_type is None:
        raise ValueError("text_type: expected uint8 [B, Ct], which the mass by type needs, got None")
    tensor("text_type", given.text_type, (key.shape[0], key.shape[2] - given.visual_capacity), (torch.uint8,), key.device)


def predictor(weight: object, bias: object, rates: object, batch: int, heads: int, device: torch.device) -> None:
    """weight ``[R, Hq * 4]``, bias ``[R]`` or ``[B, R]``, rates float64 ``[R]``."""
    classes = floating("weight", weight, ("R", heads * 4), device).shape[0]
    if classes == 0:
        raise ValueError("weight: expected at least one rate class, got 0 rows")
    if isinstance(bias, Tensor) and bias.dim() == 2:
        floating("bias", bias, (batch, classes), device)
    else:
        floating("bias", bias, (classes,), device)
    tensor("rates", rates, (classes,), (torch.float64,), device)


def decision(decide: Decide, query: Tensor, tokens: int) -> None:
    """Checks what a step decides by: a predictor or a count, and what narrows the choice among ``tokens``."""
    (batch, heads, _), device = query.shape, query.device
    given = [part is not None for part in decide[:3]]
    if any(given) == (decide.count is not None) or any(given) != all(given):
        raise ValueError("count: expected either count or all of weight, bias and rates, got neither, both or a part")
    if decide.count is None:
        predictor(decide.weight, decide.bias, decide.rates, batch, heads, device)
    else:
        int32("count", decide.count, (batch,), device)
    if decide.score is not None:
        floating("score", decide.score, (batch, tokens), device)
    if decide.alive is not None:
        tensor("alive", decide.alive, (batch, tokens), (torch.bool,), device)
    if decide.max_kept is not None:
        int32("max_kept", decide.max_kept, (batch,), device)


def selection(score: Tensor, count: Tensor | None, n_visual: Tensor, alive: Tensor | None) -> None:
    """Arguments of ``select_tokens``; count may come later (``decode_step`` computes it)."""
    batch = score.shape[0]
    if count is not None:
        int32("count", count, (batch,), score.device)
    int32("n_visual", n_visual, (batch,), score.device)
    if alive is not None:
        tensor("alive", alive, tuple(score.shape), (torch.bool,), score.device)
