"""Device files with entries that are wrong: the error names the file, the entry, what was expected and what came."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("triton")

from dyrate_kernels import devices
from dyrate_kernels.ops import cuda, dispatch, layer_settings
from dyrate_kernels.patching import aside
from dyrate_kernels.triton_kernels import plan

KEY = "gn-d128-b2-list"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes the content of ACME's file."""
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"name": "ACME"}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "ACME")
    path = tmp_path / devices.file_name("ACME")

    def forget():
        for cached in (devices.measured, plan.settings, layer_settings._shipped):
            cached.cache_clear()

    forget()
    yield lambda content: path.write_text(content if isinstance(content, str) else json.dumps(content))
    forget()


def read():
    plan.settings("ACME", 7, 128, 2, "list")
    cuda.settings("ACME")
    layer_settings.settings(torch.device("cuda", 0))
    dispatch._faster("decode_step", torch.device("cuda", 0))


def test_a_right_file_is_read(file):
    products = {"linear 96x64": [{"rows": [2, 8], "tile": {"rows": 64}}]}
    file({
        "settings": {KEY: {"waves": 2, "max_registers": None}}, "cuda": {"stages": 3}, "backend": {"decode_step": "cuda"},
        "layers": {"products": products, "norm_prologue": True}, "dependent_launch": True, "decision_aside": True,
        "commit": "abc", "figures": {"any": "thing"},
    })  # fmt: skip
    read()
    assert plan.settings("ACME", 7, 128, 2, "list").waves == 2 and cuda.settings("ACME").stages == 3
    assert layer_settings.settings(torch.device("cuda", 0)).norm_prologue
    assert aside.wanted(torch.device("cuda", 0)) and not aside.wanted(torch.device("cpu"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ([], r"expected an object, got \[\]"),
        ({"setings": {}}, "unknown setings; known: settings, .* dependent_launch, decision_aside, capture_from, and as facts device, "),
        ({"settings": []}, r"settings: expected an object, got \[\]"),
        ({"settings": {"g7-d128-b2-list": {}}}, "settings: expected names like 'g1-d128-b2-score' .kinds: plain, .*got 'g7-d128-b2-list'"),
        ({"settings": {KEY: 3}}, f"settings: {KEY}: expected an object, got 3"),
        ({"settings": {KEY: {"wave": 2}}}, f"settings: {KEY}: unknown wave; known: block_n, "),
        ({"settings": {"g1-d64-b4-score": {"num_warps": 3}}}, "settings: g1-d64-b4-score: num_warps: expected a power of two, got 3"),
        ({"settings": {KEY: {"num_stages": 0}}}, "num_stages: expected a whole number from 1 on, got 0"),
        ({"settings": {KEY: {"max_registers": "64"}}}, "max_registers: expected a whole number from 1 on, got '64'"),
        ({"settings": {KEY: {"waves": True}}}, "waves: expected a whole number from 1 on, got True"),
        ({"settings": {KEY: {"block_n": 32.0}}}, "block_n: expected a whole number from 1 on, got 32.0"),
        ({"settings": {KEY: {"tensor_cores": "no"}}}, "tensor_cores: expected true or false, got 'no'"),
        ({"settings": {KEY: {"warp_rows": 1}}}, "warp_rows: expected true or false, got 1"),
        ({"cuda": {"stage": 3}}, "cuda: unknown stage; known: bulk, stages, tensor_cores"),
        ({"cuda": {"stages": 5}}, "cuda: stages: expected a whole number from 0 to 4, got 5"),
        ({"backend": "triton"}, "backend: expected an object, got 'triton'"),
        ({"backend": {"reorder_": "cudda"}}, "backend: reorder_: expected one of triton, cuda, reference; got 'cudda'"),
        ({"backend": {"reorder_": ["cuda"]}}, r"backend: reorder_: expected one of triton, cuda, reference; got \['cuda'\]"),
        ({"settings": {"g1-d80-b2-list": {}}}, "head dims: powers of two from 16 on.*got 'g1-d80-b2-list'"),
        ({"dependent_launch": "true"}, "dependent_launch: expected true or false, got 'true'"),
        ({"decision_aside": 1}, "decision_aside: expected true or false, got 1"),
        ({"layers": {"residual_norm": "yes"}}, "layers: residual_norm: expected true or false, got 'yes'"),
        ({"layers": {"products": []}}, r"layers: products: expected an object, got \[\]"),
        ({"layers": {"products": {"linear x": []}}}, "expected names like 'linear 4096x4096'.*got 'linear x'"),
        ({"layers": {"products": {"linear 4x4": {}}}}, "linear 4x4: expected a list of ranges of rows, got {}"),
        ({"layers": {"products": {"linear 4x4": [{"rows": [4, 2]}]}}}, 'expected {"rows": .fewest, most.*got'),
        ({"layers": {"products": {"linear 4x4": [{"tile": {}}]}}}, 'expected {"rows": .fewest, most.*got'),
        (
            {"layers": {"products": {"linear 4x4": [{"rows": [2, 4], "tile": {"row": 16}}]}}},
            "linear 4x4: unknown row; known: columns, rows",
        ),
        ({"layers": {"products": {"linear 4x4": [{"rows": [2, 4], "tile": {"rows": 48}}]}}}, "linear 4x4: rows: expected a power of two"),
    ],
)
def test_a_wrong_file_is_named_with_the_entry(file, content, why):
    file(content)
    path = str(devices.FOLDER / "ACME.json")
    with pytest.raises(ValueError, match=f"{re.escape(path)}: .*{why}") as error:
        read()
    assert str(error.value).count(path) == 1
