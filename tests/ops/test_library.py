"""The registration through torch.library and the choice of a backend."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import devices, ops
from dyrate_kernels.ops import cuda, dispatch, library
from tests.ops import paged_spec, spec


def attention_rows(dtype=torch.float32, kept=False, window=None):
    case = (2, 4, 2, 8, 12, 6, [12, 5], [6, 2])
    a = spec.problem(*case, dtype=dtype, poison=False)
    lists = spec.lists(case[6], [4, 3], 5) if kept else (None, None)
    inside = (a["position"], a["query_position"], window) if window else (None, None, None)
    return ops.Rows(
        a["query"], a["key"], a["value"], a["n_visual"], a["n_text"], 12, 0.5, *lists, a["text_type"], *inside, text_bound=6, clean=kept
    )


def _samples():
    """(operator, arguments of ``torch.ops.dyrate``)."""
    for mass, importance, how in (
        (True, True, {}), (True, True, {"dtype": torch.float64, "kept": True}), (False, True, {"window": 4}),
        (True, False, {"dtype": torch.bfloat16}),
    ):  # fmt: skip
        yield "decode_attention", (*attention_rows(**how), mass, importance, "auto")
    rows = attention_rows()
    new = rows._replace(new_key=torch.randn(2, 2, 8), new_value=torch.randn(2, 2, 8))
    turned = dict(zip(("cos", "sin"), torch.randn(2, 2, 8)))
    three = torch.full((2,), 3, dtype=torch.int32)
    linear = (torch.randn(3, 16), torch.randn(3), torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64))
    by_rate = ops.Decide(*linear)
    by_count = ops.Decide(count=three, score=torch.rand(2, 12), alive=torch.ones(2, 12).bool(), max_kept=three)
    for given in (new, new._replace(**turned)):
        yield "append_decode_attention", (*given, True, False, "auto")
        yield "append_decode_step", (*given, *by_rate, "auto")
    yield "decode_attention", (*rows._replace(**turned), True, True, "auto")
    yield "decode_step", (*rows, *by_rate, "auto")
    yield "decode_step", (*rows._replace(visual_bound=12, clean=True), *by_count, "auto")
    yield "score_last_query", (*rows, "reference")
    yield "predict_rate", (torch.rand(2, 4, 4), *linear, "auto")
    yield "predict_rate", (torch.rand(2, 4, 4).double(), linear[0], linear[1].expand(2, 3), linear[2], "auto")
    yield "select_tokens", (torch.rand(2, 9), three, three + 4, None, "auto")
    yield "select_tokens", (torch.rand(2, 9).half(), three, three + 4, torch.rand(2, 9) < 0.5, "auto")
    columns = [torch.rand(2, 2, 9, 4), torch.zeros(2, 9)]
    yield "compact_", (columns, torch.tensor([[1, 5], [0, 2]]).int(), three - 1, three + 3, "auto")
    yield "reorder_", (columns, torch.tensor([1, 1]), "auto")
    tokens = paged_spec.problem(paged_spec.SHAPES[1], torch.float32) | {"scale": 0.5}
    listed = ops.PagedRows(**tokens, **paged_spec.lists(tokens, 0.5))
    plain = ops.PagedRows(**{name: tokens[name] for name in ("query", "key", "value", "block_table", "n_rows", "scale", "sequence")})
    six = torch.full((6,), 3, dtype=torch.int32)
    yield "paged_attention", (*plain._replace(window=7), False, False, "auto")
    yield "paged_attention", (*ops.PagedRows(**tokens, row_bound=64), True, True, "auto")
    yield "paged_attention", (*listed, True, False, "auto")
    yield "paged_step", (*ops.PagedRows(**tokens), *by_rate, "auto")
    score = torch.rand(6, listed.kept.shape[1])
    yield "paged_step", (*listed._replace(window=9), *ops.Decide(count=six, score=score, max_kept=six), "auto")


SAMPLES = list(_samples())


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


def test_what_a_schema_lists_and_its_operator_does_not_take_is_refused():
    """An operator whose schema says that it writes nothing writes nothing."""
    rows, call = attention_rows(), torch.ops.dyrate
    new = rows._replace(new_key=torch.randn(2, 2, 8), new_value=torch.randn(2, 2, 8))
    listed, before = attention_rows(kept=True), rows.key.clone()
    decide = ops.Decide(count=torch.ones(2, dtype=torch.int32))
    for name, asked in {
        "new_key: .*append_decode_attention": lambda: call.decode_attention(*new, True, True, "auto"),
        "new_key: .*append_decode_step": lambda: call.decode_step(*new, *decide, "auto"),
        "new_key: .*a prompt": lambda: call.score_last_query(*new, "auto"),
        "kept: .*a prompt": lambda: call.score_last_query(*listed, "auto"),
        "kept: .*a score layer": lambda: call.decode_step(*listed, *decide, "auto"),
    }.items():
        with pytest.raises(ValueError, match=name):
            asked()
    assert torch.equal(rows.key, before)


def test_public_operators_and_schemas_list_the_arguments_of_the_contract():
    every = {"mass", "importance", "backend"}
    for name, fields, more in (
        ("decode_attention", ops.Rows._fields, every),
        ("append_decode_attention", ops.Rows._fields, every),
        ("decode_step", (*ops.Rows._fields, *ops.Decide._fields), {"backend"}),
        ("append_decode_step", (*ops.Rows._fields, *ops.Decide._fields), {"backend"}),
        ("paged_attention", ops.PagedRows._fields, every),
        ("paged_step", (*ops.PagedRows._fields, *ops.Decide._fields), {"backend"}),
    ):
        declared = [argument.name for argument in getattr(torch.ops.dyrate, name).default._schema.arguments]
        assert declared[: len(fields)] == list(fields) and set(declared[len(fields) :]) == more, name
        public = set(inspect.signature(getattr(ops, name.removeprefix("append_"))).parameters)
        left_out = {"kept", "n_kept"} if "decode_step" in name else set()  # a score layer reads every visual row
        assert public == set(fields) - left_out | more | ({"out"} if name == "paged_attention" else set()), name


@pytest.mark.parametrize("module", ["dyrate_kernels.ops.cuda", "dyrate_kernels.triton_kernels.backend"])
def test_every_backend_takes_what_the_reference_takes(module):
    if "triton" in module:
        pytest.importorskip("triton")
    backend = importlib.import_module(module)
    for name, function in vars(ops.reference).items():
        if name in ops.__all__ and hasattr(backend, name):
            want, got = (inspect.signature(one).parameters for one in (function, getattr(backend, name)))
            assert list(want) == [parameter for parameter in got if parameter != "prepared"], name


def test_compiles_whole():
    rows = attention_rows()
    weight, bias, rates = torch.randn(3, 16), torch.randn(3), torch.tensor([0.0, 0.4, 0.8], dtype=torch.float64)

    def step(query, key, value, n_visual, n_text, types):
        out = ops.decode_step(
            query, key, value, n_visual, n_text, visual_capacity=12, text_type=types, weight=weight, bias=bias, rates=rates
        )
        ops.compact_([key, value], out.kept, out.n_kept, n_visual)
        again = ops.decode_attention(query, key, value, out.n_kept, n_text, visual_capacity=12)
        return out.output, out.rate, again.output

    tensors = [*rows[:5], rows.text_type]
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
    (tmp_path / devices.file_name("ACME GPU")).write_text('{"backend": {"compact_": "cuda", "decode_step": "triton"}}')
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
    pages = paged_spec.problem(paged_spec.SHAPES[1], torch.float32)
    calls = {
        "decode_attention": lambda: ops.decode_attention(*attention, visual_capacity=3),
        "decode_step": lambda: ops.decode_step(*attention, **shared, **linear),
        "score_last_query": lambda: ops.score_last_query(*attention, **shared),
        "select_tokens": lambda: ops.select_tokens(torch.rand(2, 3), lengths, lengths),
        "predict_rate": lambda: ops.predict_rate(two[:, :, :4].contiguous(), *linear.values()),
        "compact_": lambda: ops.compact_([rows], torch.zeros(2, 3, dtype=torch.int32), lengths, lengths),
        "reorder_": lambda: ops.reorder_([rows], torch.arange(2)),
        "paged_attention": lambda: ops.paged_attention(**pages),
        "paged_step": lambda: ops.paged_step(**pages, count=torch.full((6,), 3, dtype=torch.int32)),
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
