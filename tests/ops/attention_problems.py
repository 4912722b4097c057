"""Problems of attention by name, and how their results are held against ``spec``: for the tests of decode_attention, score_last_query and
decode_step on every backend.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tests.gpu import kit
from tests.ops import spec
from tests.ops.compare import close

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# batch, heads, kv_heads, dim, visual capacity, text capacity, visual lengths, text lengths
SHAPES: dict[str, kit.Case] = {
    "one number": (1, 1, 1, 1, 1, 1, [1], [1]),
    "one row": (1, 1, 1, 16, 1, 1, [1], [1]),
    "heads": (3, 2, 2, 16, 24, 9, [24, 7, 0], [9, 1, 5]),  # unequal rows, no visual token
    "pairs": (2, 4, 2, 20, 37, 6, [33, 1], [3, 6]),
    "fours": (2, 8, 2, 8, 33, 17, [20, 33], [17, 2]),
    "sevens": (2, 7, 1, 5, 40, 3, [0, 39], [1, 0]),
    "eights": (2, 8, 1, 12, 6, 30, [3, 6], [30, 12]),
    "twelves": (1, 12, 1, 16, 70, 40, [65], [33]),
    "longer": (1, 8, 2, 32, 70, 40, [65], [33]),
    "nothing": (3, 2, 2, 4, 5, 4, [0, 5, 0], [0, 0, 3]),  # a sequence without any row
    "no visual region": (2, 2, 1, 4, 0, 5, [0, 0], [5, 2]),
    "no text region": (2, 2, 2, 8, 6, 0, [6, 2], [0, 0]),
    "much text": (2, 2, 2, 4, 9, 150, [9, 0], [150, 65]),  # more than its mass is summed of at once
    "much text of threes": (2, 6, 2, 4, 21, 150, [20, 3], [150, 129]),
    "many tiles": (2, 3, 3, 24, 700, 133, [697, 257], [131, 64]),
    **{f"large {number}": case for number, case in enumerate(kit.LARGE)},  # for a GPU
}
LARGE = tuple(name for name in SHAPES if name.startswith("large") and kit.ON_GPU)
ON_DEVICE = ("one row", "heads", "pairs", "fours", "sevens", "eights", "nothing", "no visual region", *LARGE)
TOLERANCE = {F64: 1e-12, F32: 3e-6, F16: 2e-3, BF16: 1.6e-2}  # of an output


def statistics_tolerance(dtype: torch.dtype) -> float:
    """Of mass and importance, which are float32 at least, whatever the inputs."""
    return min(TOLERANCE[dtype], 3e-6)


def spread(tensor: Tensor, rows: int = 3, columns: int = 0) -> Tensor:
    """A view with the content of ``tensor`` ``[B, H, C, D]`` in a wider buffer of NaN: ``rows`` more a head, ``columns`` more a row."""
    batch, heads, capacity, dim = tensor.shape
    wide = torch.full((batch, heads, capacity + rows, dim + columns), float("nan"), dtype=tensor.dtype)
    view = wide[:, :, :capacity, :dim]
    view.copy_(tensor)
    return view


def buffer_of(tensor: Tensor) -> Tensor:
    """All elements of the memory that a tensor is a view of, ``[..]``."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def problem(case: str | tuple[Any, ...], dtype: torch.dtype, window: bool = False, **options: Any) -> dict[str, Any]:
    """Arguments of an attention operator; dead rows, and those behind the capacity, hold NaN. window: with positions."""
    arguments = spec.problem(*(SHAPES[case] if isinstance(case, str) else case), dtype=dtype, **options)
    for name in ("key", "value"):
        arguments[name] = spread(arguments[name])
    if not window:
        del arguments["position"], arguments["query_position"]
    return arguments


def lists(arguments: dict[str, Any], share: float, width: int | None = None) -> dict[str, Tensor]:
    """``kept`` and ``n_kept`` of a share of each sequence's visual rows; ``width``: not as narrow as can be."""
    lengths = arguments["n_visual"].tolist()
    counts = [int(n * share) for n in lengths]
    return dict(zip(("kept", "n_kept"), spec.lists(lengths, counts, max(counts) if width is None else width), strict=True))


def unlisted(arguments: dict[str, Any], kept: Tensor, n_kept: Tensor) -> None:
    """Writes NaN to the visual rows that a list does not name."""
    for b, n in enumerate(arguments["n_visual"].tolist()):
        others = sorted({*range(n)} - {*kept[b, : int(n_kept[b])].tolist()})
        for name in ("key", "value"):
            arguments[name][b, :, others] = float("nan")


def new_row(arguments: dict[str, Any], seed: int = 9) -> dict[str, Tensor]:
    """``new_key`` and ``new_value``."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name in ("key", "value"):
        batch, heads, _, dim = arguments[name].shape
        made[f"new_{name}"] = torch.randn(batch, heads, dim, generator=g, dtype=F64).to(arguments[name].dtype)
    return made


def assert_close(got: Iterable[Tensor | None], want: Iterable[Any], dtype: torch.dtype, device: bool = False) -> None:
    """output, mass and importance, where they were asked for. device: with the tolerances of a GPU."""
    for what, value, expected in zip(("output", "mass", "importance"), got, want, strict=False):
        if value is None:
            continue
        if what == "output":
            assert value.dtype == dtype
        else:
            assert value.dtype == (F64 if dtype == F64 else F32), what
        if not device:
            close(value, expected, TOLERANCE[dtype] if what == "output" else statistics_tolerance(dtype), what)
        elif what == "output":
            kit.assert_output(value, expected, dtype)
        else:
            kit.assert_statistics(value, expected)
