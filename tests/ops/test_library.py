"""The registration through torch.library and the choice of a backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import devices, ops
from dyrate_kernels.ops import cuda, dispatch, library
from tests.ops import paged_spec, spec


def attention_arguments(dtype=torch.float32, kept=False, window=None, mass=True, importance=True):
    case = (2, 4, 2, 8, 12, 6, [12, 5], [6, 2])
    a = spec.problem(*case, dtype=dtype, poison=False)
    lists = spec.lists(case[6], [4, 3], 5) if kept else (None, None)
    inside = (a["position"], a["query_position"], window) if window else (None, None, None)
    rows = (a["query"], a["key"], a["value"], a["n_visual"], a["n_text"], 12, 0.5)
    return rows, (*rows, *lists, a["text_type"], *inside, mass, importance, None, 6, kept, "auto"), a


SAMPLES = []
for _options in ({}, {"dtype": torch.float64, "kept": True}, {"window": 4, "mass": False}, {"dtype": torch.bfloat16, "importance": False}):
    _rows, _arguments, _a = attention_arguments(**_options)
    SAMPLES.append(("decode_attention", _arguments))
_types = _a["text_type"]
_new = (torch.randn(2, 2, 8, dtype=_rows[0].dtype), torch.randn(2, 2, 8, dtype=_rows[0].dtype))
_int = torch.full((2,), 3, dtype=torch.int32)
_weight, _bias, _rates = torch.randn(3, 16), torch.randn(3), torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)
SAMPLES += [
    ("score_last_query", (*_rows, _types, None, None, None, 12, None, "reference")),
    ("predict_rate", (torch.rand(2, 4, 4), _weight, _bias, _rates, "auto")),
    ("predict_rate", (torch.rand(2, 4, 4).double(), _weight, _bias.expand(2, 3), _rates, "auto")),
    ("select_tokens", (torch.rand(2, 9), _int, _int + 4, None, "auto")),
    ("select_tokens", (torch.rand(2, 9).half(), _int, _int + 4, torch.rand(2, 9) < 0.5, "auto")),
    ("compact_", ([torch.rand(2, 2, 9, 4), torch.zeros(2, 9)], torch.tensor([[1, 5], [0, 2]]).int(), _int - 1, _int + 3, "auto")),
    ("reorder_", ([torch.rand(2, 2, 9, 4), torch.zeros(2, 9)], torch.tensor([1, 1]), "auto")),
    (
        "append_decode_attention",
        (*_rows[:3], *_new, *_rows[3:], None, None, _types, None, None, None, True, False, None, None, False, "auto"),
    ),
    (
        "append_decode_step",
        (
            *_rows[:3],
            *_new,
            *_rows[3:],
            _types,
            None,
            None,
            None,
            _weight,
            _bias,
            _rates,
            None,
            None,
            None,
            None,
            None,
            None,
            False,
            "auto",
        ),
    ),
    ("decode_step", (*_rows, _types, None, None, None, _weight, _bias, _rates, None, None, None, None, None, None, False, "auto")),
    (
        "decode_step",
        (*_rows, _types, None, None, None, None, None, None, _int, torch.rand(2, 12), torch.ones(2, 12).bool(), _int, 12, 6, True, "auto"),
    ),
]

_turn = tuple(torch.randn(2, 8, dtype=_rows[0].dtype) for _ in range(2))
SAMPLES += [(name, (*arguments, *_turn)) for name, arguments in SAMPLES if name in ("append_decode_attention", "append_decode_step")]
SAMPLES.append((*SAMPLES[3][:1], (*SAMPLES[3][1], *_turn)))

_paged = paged_spec.problem(paged_spec.SHAPES[1], torch.float32)
_kept = tuple(paged_spec.lists(_paged, 0.5).values())
_pages = (*(_paged[n] for n in ("query", "key", "value", "block_table", "n_rows")), 0.5, _paged["sequence"])
_tokens = tuple(_paged[n] for n in ("visual_position", "n_visual", "text_position", "text_type"))
_six = torch.full((6,), 3, dtype=torch.int32)
SAMPLES += [
    ("paged_attention", (*_pages, *[None] * 6, 7, None, False, False, "auto")),
    ("paged_attention", (*_pages, *_tokens, None, None, None, 64, True, True, "auto")),
    ("paged_attention", (*_pages, *_tokens, *_kept, None, None, True, False, "auto")),
    ("paged_step", (*_pages, *_tokens, None, None, None, None, _weight, _bias, _rates, None, None, None, None, "auto")),
    ("paged_step", (*_pages, *_tokens, *_kept, 9, None, None, None, None, _six, torch.rand(6, _kept[0].shape[1]), None, _six, "auto")),
]


@pytest.mark.parametrize(("name", "arguments"), SAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SAMPLES)])
def test_opcheck(name, arguments):
    results = torch.library.opcheck(getattr(torch.ops.dyrate, name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def test_only_what_changes_rows_declares_mutation():
    changing = ("compact_", "reorder_", "append_decode_attention", "append_decode_step", "paged_attention_out")
    reading = ("decode_attention", "score_last_query", "predict_rate", "select_tokens", "decode_step", "paged_attention", "paged_step")
    for name in (*reading, *changing):
        schema = getattr(torch.ops.dyrate, name).default._schema
        assert schema.is_mutable == (name in changing), name


def test_compiles_whole():
    rows, _, a = attention_arguments()
    weight, bias, rates = torch.randn(3, 16), torch.randn(3), torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)

    def step(query, key, value, n_visual, n_text, types):
        out = ops.decode_step(
            query, key, value, n_visual, n_text, visual_capacity=12, text_type=types, weight=weight, bias=bias, rates=rates
        )
        ops.compact_([key, value], out.kept, out.n_kept, n_visual)
        again = ops.decode_attention(query, key, value, out.n_kept, n_text, visual_capacity=12)
        return out.output, out.rate, again.output

    tensors = [*rows[:5], a["text_type"]]
    plain = [tensor.clone() for tensor in tensors]
    expected = step(*plain)
    compiled = [tensor.clone() for tensor in tensors]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for x, y in zip([*expected, *plain], [*got, *compiled], strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(plain[1], tensors[1])  # something was moved


def test_backends():
    found = dk.backends()
    assert list(found) == ["triton", "cuda", "reference"]
    assert found["reference"] == "available"
    for name in ("triton", "cuda"):
        assert found[name] == "available" or len(found[name].removeprefix("unavailable: ")) > 5


def test_an_unknown_backend_lists_the_names():
    for call in (
        lambda: dispatch.resolve("cudnn", "cpu"),
        lambda: ops.select_tokens(torch.rand(1, 2), torch.ones(1).int(), torch.ones(1).int(), backend=None),
    ):
        with pytest.raises(ValueError, match="auto, triton, cuda, reference"):
            call()


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(name):
    with pytest.raises(RuntimeError) as caught:
        ops.select_tokens(torch.rand(1, 2), torch.ones(1).int(), torch.ones(1).int(), backend=name)
    state = dk.backends()[name]
    reason = "runs on a CUDA device" if state == "available" else state.removeprefix("unavailable: ")
    assert reason in str(caught.value) and "auto" in str(caught.value)


def test_auto_on_a_cpu_is_the_reference():
    assert dispatch.name_for("auto", "cpu") == "reference"
    assert dispatch.resolve("auto", torch.device("cpu")) is sys.modules["dyrate_kernels.ops.reference"]


def test_auto_on_cuda_takes_the_first_that_can_run_and_warns_when_none_is_fast(monkeypatch):
    for cached in (dispatch._load, dispatch.name_for, dispatch._warn_slow):
        cached.cache_clear()
    try:
        able = object()
        monkeypatch.setattr(dispatch, "_load", lambda name: (able, None) if name != "triton" else (None, "no device"))
        assert dispatch.name_for("auto", "cuda") == "cuda"
        dispatch.name_for.cache_clear()
        monkeypatch.setattr(dispatch, "_load", lambda name: (able, None) if name == "reference" else (None, f"{name} is away"))
        with pytest.warns(UserWarning, match="triton is away.*cuda is away"):
            assert dispatch.name_for("auto", "cuda:1") == "reference"
        assert dispatch.name_for("auto", "cpu") == "reference"
    finally:
        dispatch.name_for.cache_clear()


def test_auto_takes_the_backend_that_was_measured_to_be_faster(tmp_path, monkeypatch):
    (tmp_path / devices.file_name("ACME GPU")).write_text('{"backend": {"compact_": "cuda", "decode_step": "triton", "reorder_": "gone"}}')
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "ACME GPU")
    able = {"triton", "cuda", "reference"}
    monkeypatch.setattr(dispatch, "_load", lambda name: (object(), None) if name in able else (None, "away"))

    def chosen(operator):
        dispatch.name_for.cache_clear()
        return dispatch.name_for("auto", "cuda", operator)

    devices.measured.cache_clear()
    try:
        assert [chosen(name) for name in ("compact_", "decode_step", "reorder_", None)] == ["cuda", "triton", "triton", "triton"]
        assert dispatch.name_for("triton", "cuda", "compact_") == "triton"  # who names one gets it
        able.remove("cuda")
        assert chosen("compact_") == "triton"
        able.remove("triton")
        able.add("cuda")
        assert chosen("decode_step") == "cuda"
    finally:
        devices.measured.cache_clear()
        dispatch.name_for.cache_clear()


def test_a_backend_without_an_operator_is_passed_over_or_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "_load", lambda name: (object(), None) if name != "triton" else (None, "away"))
    monkeypatch.setattr(dispatch, "_faster", lambda operator, device: "cuda")
    dispatch.name_for.cache_clear()
    try:
        assert dispatch.name_for("auto", "cuda", "decode_step") == "cuda"
        with pytest.warns(UserWarning, match="plain PyTorch reference"):
            dispatch._warn_slow.cache_clear()
            assert dispatch.name_for("auto", "cuda", "paged_step") == "reference"
        with pytest.raises(RuntimeError, match="'cuda' has no paged_step.*auto"):
            dispatch.name_for("cuda", "cuda", "paged_step")
    finally:
        dispatch.name_for.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "decode_attention", "decode_step", "score_last_query", "select_tokens", "predict_rate", "compact_", "reorder_", "paged_attention",
        "paged_step",
    ],
)  # fmt: skip
def test_every_operator_asks_for_its_own_backend(name, monkeypatch):
    asked = []

    class Stop(Exception):
        pass

    def resolve(backend, device, operator):
        asked.append(operator)
        raise Stop

    monkeypatch.setattr(library, "resolve", resolve)
    two, lengths = torch.rand(2, 4, 8), torch.ones(2).int()
    rows = torch.rand(2, 4, 6, 8)
    attention = (two, rows, rows.clone(), lengths, lengths)
    shared = {"visual_capacity": 3, "text_type": torch.zeros(2, 3, dtype=torch.uint8)}
    linear = {"weight": torch.rand(3, 16), "bias": torch.rand(3), "rates": torch.rand(3).double()}
    calls = {
        "decode_attention": lambda: ops.decode_attention(*attention, visual_capacity=3),
        "decode_step": lambda: ops.decode_step(*attention, **shared, **linear),
        "score_last_query": lambda: ops.score_last_query(*attention, **shared),
        "select_tokens": lambda: ops.select_tokens(torch.rand(2, 3), lengths, lengths),
        "predict_rate": lambda: ops.predict_rate(two[:, :, :4].contiguous(), *linear.values()),
        "compact_": lambda: ops.compact_([rows], torch.zeros(2, 3, dtype=torch.int32), lengths, lengths),
        "reorder_": lambda: ops.reorder_([rows], torch.arange(2)),
        "paged_attention": lambda: ops.paged_attention(**_paged),
        "paged_step": lambda: ops.paged_step(**_paged, count=_six),
    }
    with pytest.raises(Stop):
        calls[name]()
    assert asked == [name]


def test_a_backend_whose_import_fails_does_not_take_the_others_along(monkeypatch):
    monkeypatch.setitem(dispatch._MODULES, "triton", "dyrate_kernels.not_there")
    dispatch._load.cache_clear()
    try:
        found = dispatch.backends()
        assert "not_there" in found["triton"] and found["reference"] == "available"
    finally:
        dispatch._load.cache_clear()


def test_importing_the_package_imports_no_torch():
    code = "import sys, dyrate_kernels; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_of_the_cuda_attention_come_from_the_device_file(tmp_path, monkeypatch):
    (tmp_path / devices.file_name("ACME GPU")).write_text('{"cuda": {"tensor_cores": 1, "bulk": 1}}')
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    devices.measured.cache_clear()
    try:
        assert cuda.settings("ACME GPU") == cuda.Settings(tensor_cores=1, stages=0, bulk=1)
        assert cuda.settings("another") == cuda.Settings()
    finally:
        devices.measured.cache_clear()
    for wrong in ({"stages": 5}, {"bulk": 2}, {"bulk": True}, {"tensor_cores": -1}, {"tensor_cores": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a whole number from 0 to"):
            cuda.Settings(**wrong)
