"""Calls that the extension refuses (``csrc/binding.cpp``): wrong names, types, counts, sizes, strides, addresses, before any kernel runs.

Both modules: that of the emulation and, where it was built, that of the GPU. An address that looks valid but is not cannot be told
from a good one; on a machine without a GPU the launch then fails with the driver's word, so there anything may be thrown at it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from dyrate_kernels import native
from tests.emulated import build

SHAPES: dict[str, dict[str, Any]] = {
    "Attention": {
        "type": 2, "batch": 2, "heads": 4, "kv_heads": 2, "dim": 8, "value_dim": 8, "capacity": 20, "visual_capacity": 12,
        "list_width": 6, "window": 5, "write_logits": 1, "scale": 0.5, "query_stride": (32, 8, 1), "key_stride": (320, 160, 8, 1),
        "value_stride": (320, 160, 8, 1), "new_key_stride": (16, 8), "new_value_stride": (16, 8), "kept_stride": 6,
        "text_type_stride": 8, "position_stride": 20, "query_position_stride": 1, "multiprocessors": 4, "capability": 90, "code": 90,
        "tensor_cores": 2, "stages": 0, "bulk": 0, "most_splits": 0, "least_rows": 0,
    },
    "Decide": {
        "batch": 2, "heads": 4, "visual_capacity": 12, "list_width": 6, "logit_capacity": 16, "decide": 1, "classes": 9,
        "weight_type": 2, "bias_type": 1, "score_type": 0, "weight_stride": (16, 1), "bias_stride": (9, 1), "score_stride": (12, 1),
        "alive_stride": (12, 1), "kept_in_stride": 6,
    },
    "Select": {"batch": 2, "tokens": 12, "score_type": 3, "score_stride": (12, 1), "alive_stride": (12, 1)},
    "Predict": {
        "batch": 2, "features": 16, "classes": 9, "mass_type": 2, "weight_type": 1, "bias_type": 0, "weight_stride": (16, 1),
        "bias_stride": (9, 1),
    },
    "Compact": {"rows": ((4096, 640, 320, 32, 2, 32, 10), (8192, 320, 0, 32, 1, 32, 10)), "batch": 2, "width": 6, "kept_stride": 6},
    "Reorder": {"rows": ((4096, 64, 0, 0, 1, 64, 1),), "batch": 2},
}  # fmt: skip
ADDRESSES = {"Attention": 19, "Decide": 18, "Select": 6, "Predict": 6, "Compact": 3, "Reorder": 1}
REFUSALS = (TypeError, ValueError, OverflowError)  # what a wrong argument may end in
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**63, 2**70)
THINGS = (*NUMBERS, None, "1", 1.5, float("nan"), (), (1,), (1, 2), (8, 8, 1), (1, 2, 3, 4), (-1, 1), (None, 1), [16, 1], {}, b"8")


def _module(name: str) -> ModuleType:
    if name == "emulated":
        if build.missing_reason() is not None:
            pytest.skip(str(build.missing_reason()))
        return build.load()
    if native.missing_reason() is not None:
        pytest.skip(str(native.missing_reason()))
    return native.load()


@pytest.fixture(scope="module", params=["emulated", "native"])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return _module(request.param)


def make(module: ModuleType, kind: str, **changes: Any) -> Any:
    return getattr(module, kind)(**(SHAPES[kind] | changes))


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(REFUSALS) as error:
        call()
    message = str(error.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("kind", SHAPES)
def test_the_shapes_are_accepted(module: ModuleType, kind: str) -> None:
    make(module, kind)


@pytest.mark.parametrize("kind", SHAPES)
def test_names_of_arguments(module: ModuleType, kind: str) -> None:
    for name in SHAPES[kind]:
        rest = {key: value for key, value in SHAPES[kind].items() if key != name}
        with pytest.raises(TypeError):
            getattr(module, kind)(**rest)
        if kind not in ("Compact", "Reorder"):  # pybind11's own words for those
            with pytest.raises(TypeError, match=f"^{name}: missing"):
                getattr(module, kind)(**rest)
    with pytest.raises(TypeError):
        make(module, kind, tokns=3)


@pytest.mark.parametrize("kind", SHAPES)
def test_types_of_arguments(module: ModuleType, kind: str) -> None:
    for name, value in SHAPES[kind].items():
        for wrong in (None, "8", b"8", [1, 2], {}, object()):
            refused(lambda name=name, wrong=wrong: make(module, kind, **{name: wrong}))
        if isinstance(value, tuple):
            refused(lambda name=name, value=value: make(module, kind, **{name: list(value)}))
            refused(lambda name=name, value=value: make(module, kind, **{name: (*value[:-1], 1.5)}))
        elif name != "scale":
            refused(lambda name=name: make(module, kind, **{name: 1.0}))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Attention", {"type": 3}, "type: expected 0 .. 2, got 3"),
    ("Attention", {"batch": 0}, "batch: expected 1 .."),
    ("Attention", {"batch": 2**40}, "batch"),
    ("Attention", {"batch": 65536}, "batch"),
    ("Attention", {"heads": 0}, "heads"),
    ("Attention", {"heads": 5}, "kv_heads: expected a divisor of the 5 heads, got 2"),
    ("Attention", {"kv_heads": 0}, "kv_heads"),
    ("Attention", {"kv_heads": 8}, "kv_heads"),
    ("Attention", {"dim": 257}, "dim"),
    ("Attention", {"value_dim": 0}, "value_dim"),
    ("Attention", {"capacity": -1}, "capacity"),
    ("Attention", {"capacity": 2**31 - 1}, "capacity"),
    ("Attention", {"visual_capacity": 21}, "visual_capacity: expected 0 .. 20, got 21"),
    ("Attention", {"list_width": -1}, "list_width"),
    ("Attention", {"window": -5}, "window"),
    ("Attention", {"write_logits": 2}, "write_logits"),
    ("Attention", {"scale": float("nan")}, "scale"),
    ("Attention", {"query_stride": (32, 8, 2)}, "query_stride: expected a last stride of 1, got 2"),
    ("Attention", {"query_stride": (32, 8)}, "query_stride: expected 3 strides, got 2"),
    ("Attention", {"key_stride": (320, 160, 8, 0)}, "key_stride"),
    ("Attention", {"value_stride": (-320, 160, 8, 1)}, "value_stride"),
    ("Attention", {"kept_stride": -1}, "kept_stride"),
    ("Attention", {"multiprocessors": 0}, "multiprocessors"),
    ("Attention", {"capability": -1}, "capability"),
    ("Attention", {"code": 10000}, "code"),
    ("Attention", {"tensor_cores": -1}, "tensor_cores"),
    ("Attention", {"stages": 5}, "stages: expected 0 .. 4, got 5"),
    ("Attention", {"bulk": 2}, "bulk"),
    ("Attention", {"most_splits": 65}, "max_splits"),
    ("Attention", {"most_splits": -1}, "max_splits"),
    ("Attention", {"least_rows": -1}, "min_rows"),
    ("Decide", {"logit_capacity": 5}, "logit_capacity"),
    ("Decide", {"decide": 2}, "decide"),
    ("Decide", {"classes": -1}, "classes"),
    ("Decide", {"weight_type": 4}, "weight_type"),
    ("Decide", {"bias_type": -1}, "bias_type"),
    ("Decide", {"weight_stride": (16, -1)}, "weight_stride"),
    ("Select", {"batch": 0}, "batch"),
    ("Select", {"tokens": 0}, "tokens"),
    ("Select", {"tokens": 2**30 + 1}, "tokens"),
    ("Select", {"score_type": 9}, "score_type"),
    ("Predict", {"features": 0}, "features"),
    ("Predict", {"classes": 0}, "classes"),
    ("Compact", {"rows": ()}, "rows: expected 1 .. 80, got 0"),
    ("Compact", {"rows": ((4096, 640, 320, 32, 2, 32, 10),) * 81}, "rows"),
    ("Compact", {"rows": ((4096, 640, 320, 32, 2, 32),)}, "rows: expected 7 numbers"),
    ("Compact", {"rows": ((0, 640, 320, 32, 2, 32, 10),)}, "rows: expected the address of a tensor, got 0"),
    ("Compact", {"rows": ((4096, 640, 320, -32, 2, 32, 10),)}, "rows"),
    ("Compact", {"rows": ((4096, 640, 320, 31, 2, 32, 10),)}, "strides that step over the 32 elements within"),
    ("Compact", {"rows": ((4096, 640, 300, 32, 2, 32, 10),)}, "strides that step over"),
    ("Compact", {"rows": ((4096, 639, 320, 32, 2, 32, 10),)}, "strides that step over"),
    ("Compact", {"rows": ((4096, 640, 320, 32, 2, 32, 10),) * 2}, "tensors apart from each other"),
    ("Compact", {"rows": ((4096, 640, 320, 32, 2, 32, 10), (4096 + 1279, 320, 0, 32, 1, 32, 10))}, "tensors apart from each other"),
    ("Compact", {"rows": ((4096, 2**60, 2**60, 2**60, 2**30, 32, 10),)}, "rows"),
    ("Compact", {"width": 0}, "width"),
    ("Compact", {"kept_stride": -1}, "kept_stride"),
    ("Compact", {"batch": 0}, "batch"),
    ("Reorder", {"batch": 2049}, "batch"),
    ("Reorder", {"rows": ((4096, 128, 64, 0, 2, 32, 1),)}, "one head and one row a sequence"),
    ("Reorder", {"rows": ((4096, 63, 0, 0, 1, 64, 1),)}, "strides that step over"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED)
def test_sizes_and_strides(module: ModuleType, kind: str, changes: dict[str, Any], words: str) -> None:
    refused(lambda: make(module, kind, **changes), words)


@pytest.mark.parametrize("kind", SHAPES)
def test_addresses(module: ModuleType, kind: str) -> None:
    prepared, count = make(module, kind), ADDRESSES[kind]
    for wrong in (0, 1, count, count + 2):
        with pytest.raises(TypeError, match=re.escape(f"expected {count} addresses and a stream, got {wrong} arguments")):
            prepared.launch(*[4096] * wrong)
    for place in range(count):
        for wrong in (None, 1.5, "4096", -1, 2**63, 2**70):
            addresses: list[Any] = [65536 * (i + 1) for i in range(count)]
            addresses[place] = wrong
            refused(lambda addresses=addresses: prepared.launch(*addresses, 0))
    refused(lambda: prepared.launch(*[0] * count, 0), "expected the address of a tensor, got 0")
    refused(lambda: prepared.launch(*[65537] * count, 0), "address that is a multiple of")
    refused(lambda: prepared.launch(*[2**62] * count, 0), "address")
    if kind not in ("Compact", "Reorder"):  # their addresses are only read
        refused(lambda: prepared.launch(*[1 << 20] * count, 0), "memory apart from")
    with pytest.raises(TypeError):
        prepared.launch(*[4096] * count, stream=0)


def test_results_must_not_lie_in_arguments(module: ModuleType) -> None:
    select = make(module, "Select")
    score, alive, count, n_visual, kept, n_kept = (1 << 20 << i for i in range(6))
    refused(lambda: select.launch(score, alive, count, n_visual, score + 184, n_kept, 0), "kept: expected memory apart from score")
    refused(lambda: select.launch(score, alive, count, n_visual, kept, count, 0), "n_kept: expected memory apart from count")
    refused(lambda: select.launch(score, alive, count, n_visual, kept, kept + 92, 0), "memory apart from kept")
    compact = make(module, "Compact")
    refused(lambda: compact.launch(4096 + 640, 1 << 20, 1 << 21, 0), "rows: expected memory apart from kept")
    refused(lambda: compact.launch(1 << 20, 8192 + 636, 1 << 21, 0), "rows: expected memory apart from n_kept")
    refused(lambda: compact.launch(1 << 20, 1 << 21, 4096, 0), "rows: expected memory apart from n_visual")
    reorder = make(module, "Reorder")
    refused(lambda: reorder.launch(4096 + 120, 0), "rows: expected memory apart from index")


@pytest.mark.parametrize("kind", SHAPES)
def test_any_shape(module: ModuleType, kind: str) -> None:
    """Random arguments: a shape is made or refused in words, and null addresses are refused whatever the shape."""
    chosen = random.Random(kind)
    made = 0
    for _ in range(3000):
        names = chosen.sample(sorted(SHAPES[kind]), min(chosen.choice((1, 1, 2, 3)), len(SHAPES[kind])))
        changes = {name: _anything(chosen, SHAPES[kind][name]) for name in names}
        try:
            prepared = make(module, kind, **changes)
        except REFUSALS as error:
            assert str(error), changes
            continue
        made += 1
        refused(lambda prepared=prepared: prepared.launch(*[0] * ADDRESSES[kind], 0))
    assert made > 20


def _anything(chosen: random.Random, usual: Any) -> Any:
    if isinstance(usual, tuple) and chosen.random() < 0.7:  # a number of it, deep inside
        items = list(usual)
        place = chosen.randrange(len(items))
        items[place] = _anything(chosen, items[place])
        return tuple(items)
    return chosen.choice(NUMBERS) if isinstance(usual, int) and chosen.random() < 0.5 else chosen.choice(THINGS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="wrong addresses would reach the GPU")
@pytest.mark.parametrize("kind", SHAPES)
def test_any_address_without_a_gpu(kind: str) -> None:
    """Nothing that is launched on a machine without a GPU returns: it is refused, or the launch fails and says so."""
    module = _module("native")
    prepared, chosen = make(module, kind), random.Random(kind)
    failed = 0
    for _ in range(2000):
        addresses = [
            chosen.choice((0, 8, 4096, 4100, 1 << 20, chosen.randrange(2**63), chosen.randrange(2**48) * 16))
            for _ in range(ADDRESSES[kind])
        ]
        addresses = [chosen.choice((a, chosen.randrange(2**40) * 4096)) for a in addresses] if chosen.random() < 0.8 else addresses
        with pytest.raises((ValueError, RuntimeError)) as error:
            prepared.launch(*addresses, 0)
        failed += "did not launch" in str(error.value)
    assert failed, "no call came as far as the driver"
