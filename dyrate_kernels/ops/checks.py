"""Checks of operator arguments on the host: shapes, dtypes, devices. Nothing here reads device data."""

from __future__ import annotations

import torch
from torch import Tensor

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
    if value.device != device:
        raise ValueError(f"{name}: expected it on {device}, where the first argument is, got {value.device}; move it there")
    return value


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


def rows(query: Tensor, key: Tensor, value: Tensor, n_visual: Tensor, n_text: Tensor, visual_capacity: int) -> None:
    """The row layout that all attention operators share."""
    floating("query", query, ("B", "Hq", "D"))
    batch, heads, dim = query.shape
    device, same = query.device, (query.dtype,)
    tensor("key", key, (batch, "Hkv", "C", dim), same, device)
    tensor("value", value, (batch, key.shape[1], key.shape[2], "D"), same, device)
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"key: expected a number of heads that divides the {heads} heads of query, got {key.shape[1]}")
    int32("n_visual", n_visual, (batch,), device)
    int32("n_text", n_text, (batch,), device)
    whole("visual_capacity", visual_capacity)
    if not 0 <= visual_capacity <= key.shape[2]:
        raise ValueError(f"visual_capacity: expected 0 .. {key.shape[2]}, the rows of key, got {visual_capacity}")


def window(position: Tensor | None, query_position: Tensor | None, size: int | None, key: Tensor) -> None:
    """A sliding window needs all three of its arguments."""
    if size is None:
        return
    whole("window", size)
    if position is None or query_position is None:
        raise ValueError("window: expected position and query_position beside it, got none; pass both, or window=None")
    if size < 1:
        raise ValueError(f"window: expected at least 1, got {size}")
    int32("position", position, (key.shape[0], key.shape[2]), key.device)
    int32("query_position", query_position, (key.shape[0],), key.device)


def new_row(new_key: Tensor | None, new_value: Tensor | None, key: Tensor, value: Tensor) -> None:
    """The row to append: both or neither."""
    if (new_key is None) != (new_value is None):
        raise ValueError("new_key, new_value: expected both or neither, got one; a new row has a key and a value")
    if new_key is not None:
        if key.shape[2] == 0:
            raise ValueError("key: expected room for the new row, a capacity of at least 1, got 0")
        for name, new, rows in (("new_key", new_key, key), ("new_value", new_value, value)):
            tensor(name, new, (rows.shape[0], rows.shape[1], rows.shape[3]), (rows.dtype,), rows.device)


def rotary(cos: Tensor | None, sin: Tensor | None, query: Tensor) -> None:
    """cos and sin of the newest position: both or neither, ``[B, D]`` or ``[1, D]``."""
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or neither, got one; a rotation has both")
    if cos is not None:
        batch, _, dim = query.shape
        if dim % 2:
            raise ValueError(f"cos: expected an even head dim, whose halves turn against each other, got {dim}; rotate before the call")
        for name, rotation in (("cos", cos), ("sin", sin)):
            one = isinstance(rotation, Tensor) and rotation.dim() == 2 and rotation.shape[0] == 1
            tensor(name, rotation, (1 if one else batch, dim), (query.dtype,), query.device)


def paged(
    query: Tensor, key: Tensor, value: Tensor, block_table: Tensor, n_rows: Tensor, sequence: Tensor | None, visual_position: Tensor | None,
    n_visual: Tensor | None, text_position: Tensor | None, text_type: Tensor | None, kept: Tensor | None, n_kept: Tensor | None,
    window: int | None, row_bound: int | None, mass: bool, importance: bool,
) -> int:  # fmt: skip
    """The arguments that both operators over paged rows share; returns the columns of a query row's visual places."""
    floating("query", query, ("R", "Hq", "D"))
    rows, heads, dim = query.shape
    device, same = query.device, (query.dtype,)
    tensor("key", key, ("blocks", "block_size", "Hkv", dim), same, device)
    if key.shape[0] == 0 or key.shape[1] == 0:
        raise ValueError(f"key: expected at least one block of at least one row, got shape {list(key.shape)}")
    tensor("value", value, (*key.shape[:3], "D"), same, device)
    if key.shape[2] == 0 or heads % key.shape[2]:
        raise ValueError(f"key: expected a number of heads that divides the {heads} heads of query, got {key.shape[2]}")
    int32("block_table", block_table, ("S", "M"), device)
    int32("n_rows", n_rows, (rows,), device)
    sequences = block_table.shape[0]
    if sequence is not None:
        int32("sequence", sequence, (rows,), device)
    elif sequences != rows:
        raise ValueError(
            f"sequence: expected int32 [{rows}], the line of block_table of each query row, as block_table has {sequences} lines, got None"
        )
    if (kept is None) != (n_kept is None):
        raise ValueError("kept, n_kept: expected both or neither, got one; n_kept is the length of each list in kept")
    if window is not None:
        whole("window", window)
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
    bound("row_bound", row_bound)
    if kept is not None:
        int32("kept", kept, (rows, "W"), device)
        int32("n_kept", n_kept, (rows,), device)
    if kept is None and not (mass or importance):
        return 0
    wanted = {"n_visual": n_visual, "text_position": text_position}
    if kept is None:
        wanted["visual_position"] = visual_position
    for name, value_of in wanted.items():
        if value_of is None:
            raise ValueError(f"{name}: expected a tensor, which statistics and kept lists need, got None")
    int32("n_visual", n_visual, (rows,), device)
    texts = int32("text_position", text_position, (sequences, "T"), device)
    listed = kept if kept is not None else int32("visual_position", visual_position, (sequences, "N"), device)
    if mass:
        if text_type is None:
            raise ValueError("text_type: expected uint8 [S, T], which the mass by type needs, got None")
        tensor("text_type", text_type, tuple(texts.shape), (torch.uint8,), device)
    return listed.shape[1]


def bound(name: str, value: int | None) -> None:
    if value is None:
        return
    whole(name, value)
    if value < 0:
        raise ValueError(f"{name}: expected a number of rows >= 0 or None, got {value}")


def text_types(text_type: Tensor | None, key: Tensor, visual_capacity: int) -> None:
    if text_type is None:
        raise ValueError("text_type: expected uint8 [B, Ct], which the mass by type needs, got None")
    tensor("text_type", text_type, (key.shape[0], key.shape[2] - visual_capacity), (torch.uint8,), key.device)


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


def decision(
    weight: object, bias: object, rates: object, count: Tensor | None, score: Tensor | None, alive: Tensor | None, max_kept: Tensor | None,
    batch: int, heads: int, tokens: int, device: torch.device,
) -> None:  # fmt: skip
    """Checks what a step decides by: a predictor or a count, and what narrows the choice."""
    given = [part is not None for part in (weight, bias, rates)]
    if any(given) == (count is not None) or any(given) != all(given):
        raise ValueError("count: expected either count or all of weight, bias and rates, got neither, both or a part")
    if count is None:
        predictor(weight, bias, rates, batch, heads, device)
    else:
        int32("count", count, (batch,), device)
    if score is not None:
        floating("score", score, (batch, tokens), device)
    if alive is not None:
        tensor("alive", alive, (batch, tokens), (torch.bool,), device)
    if max_kept is not None:
        int32("max_kept", max_kept, (batch,), device)


def selection(score: Tensor, count: Tensor | None, n_visual: Tensor, alive: Tensor | None) -> None:
    """Arguments of ``select_tokens``; count may come later (``decode_step`` computes it)."""
    batch = score.shape[0]
    if count is not None:
        int32("count", count, (batch,), score.device)
    int32("n_visual", n_visual, (batch,), score.device)
    if alive is not None:
        tensor("alive", alive, tuple(score.shape), (torch.bool,), score.device)
