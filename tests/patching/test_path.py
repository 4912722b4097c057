"""The path that ``patch(model)`` chooses by itself, what it says of it, and what the switches change."""

from __future__ import annotations

import copy
import json
import types
import warnings

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import devices
from dyrate_kernels.ops import layers
from dyrate_kernels.patching import fused, graph
from dyrate_kernels.patching.lookup import decoder_of
from dyrate_kernels.patching.path import of_machine
from tests import models
from tests.checks import METHODS, ROWS, assert_same, greedy, patched
from tests.fake_graph import TapeRecorder


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU: steps can be captured, and the functions of ``ops.layers`` are its fused kernels."""
    monkeypatch.setattr(graph, "recorder_for", lambda device: TapeRecorder())
    monkeypatch.setattr(layers, "fused", lambda backend, device: layers)


@pytest.fixture(autouse=True)
def no_warnings():
    """The automatic path never warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no effect")
        yield


def answer(model, tokens=10, rows=ROWS, handle=None, **patching):
    with dk.patch(model, "fixed", **patching) as handle:
        output = model.generate(**models.inputs(model, rows), **greedy(tokens))
        return output, handle.stats().path


def test_nothing_is_switched_on_a_cpu(make_model):
    model = make_model()
    before = dict(vars(model))
    kinds = [type(module) for module in model.modules()]
    output, path = answer(model)
    assert (path.steps, path.replayed, path.layers) == ("eager", 0, "own")
    assert "'cpu'" in path.why_not["steps"] and "'reference'" in path.why_not["layers"]
    assert dict(vars(model)).keys() == before.keys() and [type(module) for module in model.modules()] == kinds
    assert answer(model, cuda_graph=False)[1].why_not["steps"] == "cuda_graph=False"
    assert answer(model, fuse=False)[1].why_not["layers"] == "fuse=False"
    assert answer(model, exact=True)[1].why_not["layers"] == "exact=True"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_captured_and_fused(gpu, dtype):
    model = models.build("llava", dtype=dtype)
    output, path = answer(model)
    assert (path.steps, path.replayed, path.layers, path.why_not) == ("captured", 8, "fused", {})
    assert str(path) == "captured steps, fused layers"
    assert "forward" not in vars(model) and not any("Fused" in type(module).__name__ for module in model.modules())


def test_float32_is_captured_in_the_models_own_operations(gpu, make_model):
    model = make_model()
    want, _ = answer(model, cuda_graph=False, fuse=False)
    output, path = answer(model)
    assert_same(output, want)
    assert (path.steps, path.layers) == ("captured", "own") and "float32" in path.why_not["layers"]
    _, path = answer(model, fuse=True)
    assert path.layers == "fused"


def test_exact_keeps_the_models_own_operations(gpu):
    model = models.build("llava", dtype=torch.bfloat16)
    want, _ = answer(model, cuda_graph=False, fuse=False)
    output, path = answer(model, exact=True)
    assert (path.steps, path.layers, path.why_not) == ("captured", "own", {"layers": "exact=True"})
    assert torch.equal(output.sequences, want.sequences)


@pytest.mark.parametrize(("tokens", "steps"), [(graph.CAPTURE_FROM - 1, "eager"), (graph.CAPTURE_FROM, "captured")])
def test_a_capture_must_pay(gpu, make_model, tokens, steps):
    model = make_model()
    _, path = answer(model, tokens)
    assert path.steps == steps
    if steps == "eager":
        assert path.why_not["steps"] == f"at most {tokens} new tokens may come, and a capture pays from {graph.CAPTURE_FROM} on"
    _, path = answer(model, 4, cuda_graph=True)
    assert path.steps == "captured"  # asked for


def test_a_turn_that_goes_on_counts_the_tokens_that_are_left(gpu, make_model):
    """A second call on the same cache may come to fewer new tokens than the first."""
    model = make_model()
    fields = models.inputs(model, ROWS[:1])
    with dk.patch(model, "fixed") as handle:
        first = model.generate(**fields, **greedy(10))
        assert handle.path.steps == "captured"
        rest = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
        model.generate(**rest, past_key_values=first.past_key_values, **greedy(3))
        assert handle.path.steps == "eager" and "at most 3 new tokens" in handle.path.why_not["steps"]


def test_the_devices_file_says_from_how_many_tokens_it_pays(tmp_path, monkeypatch):
    (tmp_path / devices.file_name("ACME")).write_text(json.dumps({"capture_from": 3}))
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(name="ACME"))
    devices.measured.cache_clear()
    try:
        assert graph._capture_from(torch.device("cuda", 0)) == 3
        for wrong in (0, True, "3", 2.5):
            (tmp_path / devices.file_name("ACME")).write_text(json.dumps({"capture_from": wrong}))
            devices.measured.cache_clear()
            with pytest.raises(ValueError, match=r"ACME\.json: capture_from: expected a whole number"):
                graph._capture_from(torch.device("cuda", 0))
    finally:
        devices.measured.cache_clear()


REASONS = {
    "assisted": ({"prompt_lookup_num_tokens": 3, "eos_token_id": -1}, "draft tokens"),
    "hidden": ({"output_hidden_states": True}, "output_hidden_states"),
    "no-cache": ({"use_cache": False}, "use_cache=False"),
    "static": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "ends-at-once": ({"eos_token_id": list(range(models.VOCAB))}, "ended before a step was captured"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_generation_that_stays_eager_says_why(gpu, make_model, reason):
    options, words = REASONS[reason]
    model = make_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing (is|was) dropped")
        with dk.patch(model, "fixed") as handle:
            model.generate(**models.inputs(model, ROWS[:1]), **greedy(10, **options))
    assert handle.path.steps == "eager" and words in handle.path.why_not["steps"]


def test_a_hook_within_the_model(gpu, make_model):
    model = make_model()
    hook = model.get_decoder().layers[1].mlp.register_forward_hook(lambda *args: None)
    _, path = answer(model)
    hook.remove()
    assert path.steps == "eager" and "mlp has a hook" in path.why_not["steps"]


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules(gpu, make_model, register):
    model, called = make_model(), []
    hook = getattr(torch.nn.modules.module, register)(lambda module, *rest: called.append(module) if module is model.lm_head else None)
    try:
        _, path = answer(model)
    finally:
        hook.remove()
    assert path.steps == "eager" and register in path.why_not["steps"]
    assert len(called) == 10


@pytest.mark.parametrize("first", ["compile", "patch"])
@pytest.mark.parametrize("asked", [None, True])
def test_a_call_compiled_in_place(gpu, first, asked):
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    with dk.patch(model, "fixed", cuda_graph=False):
        want = model.generate(**fields, **greedy(10))
    if first == "compile":
        model.compile(backend="eager")
    with dk.patch(model, "fixed", cuda_graph=asked) as handle, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cuda_graph=True has no effect: .*compile")
        if first == "patch":
            model.compile(backend="eager")
        assert_same(model.generate(**fields, **greedy(10)), want)
    assert handle.path.steps == "eager" and "model.compile()" in handle.path.why_not["steps"]


def test_the_path_is_that_of_the_last_generation_also_where_it_failed(gpu, make_model):
    model = make_model()
    fields = models.inputs(model, ROWS[:1])

    def fails(ids, scores):
        raise ArithmeticError

    with dk.patch(model, "fixed") as handle:
        model.generate(**fields, **greedy(10))
        assert handle.path.steps == "captured"
        with pytest.raises(ArithmeticError):
            model.generate(**fields, **greedy(10, logits_processor=[fails]))
        assert handle.path.steps == "eager"


def test_a_module_with_a_forward_of_its_own_is_called_in_every_step(gpu):
    model = models.build("llava")
    mlp = model.get_decoder().layers[1].mlp
    calls, original = [], mlp.forward

    def forward(x):
        calls.append(1)
        return original(x)

    mlp.forward = forward
    _, path = answer(model)
    assert len(calls) == 10 and path.steps == "eager" and "mlp has a forward of its own" in path.why_not["steps"]
    assert answer(model, cuda_graph=True)[1].steps == "captured"


def test_who_counts_operators_counts_those_of_every_step(gpu, make_model):
    from torch.utils.flop_counter import FlopCounterMode

    model, found = make_model(), []
    for options in ({"cuda_graph": False}, {}):
        with FlopCounterMode(display=False) as counter:
            _, path = answer(model, **options)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] and "TorchDispatchMode" in path.why_not["steps"]


def test_weights_quantised_elsewhere_are_not_tried(gpu, make_model):
    model = models.build("llava")
    model.hf_quantizer = types.SimpleNamespace(is_compileable=False)
    assert "quantised" in answer(model)[1].why_not["steps"]
    assert answer(model, cuda_graph=True)[1].steps == "captured"


def test_a_policy_that_reads_the_host_runs_eagerly_from_then_on(gpu, make_model):
    from tests.patching.graph.kit import ReadsTheHost

    model = make_model()
    fields = models.inputs(model, ROWS)
    with dk.patch(model, ReadsTheHost(k=2, rate=0.4), cuda_graph=False):
        want = model.generate(**fields, **greedy(10))
    with dk.patch(model, ReadsTheHost(k=2, rate=0.4)) as handle:
        for _ in range(2):
            assert_same(model.generate(**fields, **greedy(10)), want)
            assert "could not be captured" in handle.stats().path.why_not["steps"]


def test_repr_and_json(gpu, make_model):
    model = make_model()
    with dk.patch(model, "fixed") as handle:
        assert "last:" not in repr(handle) and handle.path is None
        model.generate(**models.inputs(model, ROWS), **greedy(10))
        assert "last: captured steps, own layers (the weights are float32" in repr(handle)
        path = handle.stats().to_dict()["path"]
        assert json.loads(json.dumps(path)) == path == {
            "steps": "captured", "replayed": 8, "layers": "own", "why_not": {"layers": path["why_not"]["layers"]}
        }  # fmt: skip
    with dk.patch(model, "fixed", cuda_graph=False, exact=True) as handle:
        assert "cuda_graph=False, exact=True" in repr(handle)


def test_the_path_is_that_of_the_call_under_way(gpu, make_model):
    model = make_model()
    seen = []
    with dk.patch(model, "fixed") as handle:
        model.generate(**models.inputs(model, ROWS[:1]), **greedy(10))

        def look(ids, scores):
            seen.append((handle.path.steps, handle.path.replayed))
            return scores

        model.generate(**models.inputs(model, ROWS[:1]), **greedy(10), logits_processor=[look])
    assert seen[0] == ("eager", 0) and seen[-1] == ("captured", 8)


def test_a_deep_copy_chooses_for_itself(gpu):
    model = models.build("llava", dtype=torch.bfloat16)
    fields = models.inputs(model, ROWS)
    with dk.patch(model, "fixed") as handle:
        want = model.generate(**fields, **greedy(10))
        twin = copy.deepcopy(model)
        assert torch.equal(twin.generate(**fields, **greedy(10)).sequences, want.sequences)
        own = vars(twin)["_dyrate_handle"]
        assert str(own.path) == "captured steps, fused layers" and own.graph is not handle.graph
        dk.unpatch(twin)
        assert not any("Fused" in type(module).__name__ for module in twin.modules()) and "forward" not in vars(twin)
        assert torch.equal(model.generate(**fields, **greedy(10)).sequences, want.sequences)


def test_a_model_that_changes_its_precision_changes_its_path(gpu):
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    with dk.patch(model, "fixed") as handle:
        for dtype, layers_ in ((torch.float32, "own"), (torch.bfloat16, "fused"), (torch.float32, "own")):
            model.to(dtype)
            model.generate(**{name: value.to(dtype) if value.is_floating_point() else value for name, value in fields.items()}, **greedy(9))
            assert handle.path.layers == layers_
    assert not any("Fused" in type(module).__name__ for module in model.modules())


HERE = [(family, text) for family, text in (*models.VARIANTS, *models.MORE_VARIANTS)]


@pytest.mark.parametrize(("family", "text"), HERE, ids=["-".join(each) for each in HERE])
def test_every_family_is_captured_and_fused(gpu, family, text, monkeypatch):
    """Every norm, block and attention of the text model is one of ours, and the answer is that of the model's own operations."""
    if not _knows(family):
        pytest.skip("this transformers has other masks")
    called = set()
    for name in ("_norm", "_feed_forward", "_attention"):
        _note(monkeypatch, name, called)
    fused._fused_class.cache_clear()
    model = models.build(family, text)
    fields = models.inputs(model, ROWS[:2])
    with patched(model, METHODS["fixed"], cuda_graph=False, fuse=False):
        want = model.generate(**fields, **greedy(9))
    with patched(model, METHODS["fixed"], fuse=True) as handle:  # float32, so that rounding chooses no other token
        assert_same(model.generate(**fields, **greedy(9)), want, tolerance=1e-4)
        assert str(handle.path) == "captured steps, fused layers"
    called.clear()
    model = models.build(family, text, dtype=torch.bfloat16)
    decoder = decoder_of(model)
    with patched(model, METHODS["fixed"]) as handle:
        model.generate(**models.inputs(model, ROWS[:2]), **greedy(9))
        assert str(handle.path) == "captured steps, fused layers"
        names = ("norm", "mlp", "self_attn")
        parts = {name for name, module in decoder.named_modules() if name.split(".")[-1] in names or name.endswith("layernorm")}
    assert {decoder.get_submodule(name) for name in parts} <= called and len(parts) >= 4 * models.LAYERS + 1
    fused._fused_class.cache_clear()


def _note(monkeypatch, name, called):
    """Notes which modules ran in the class that ``fused.<name>`` makes."""
    make = getattr(fused, name)

    def noting(original):
        members = make(original)
        forward = members["forward"]

        def run(self, *args, **kwargs):
            if fused._kernels(self) is not None:
                called.add(self)
            return forward(self, *args, **kwargs)

        return {"forward": run}

    monkeypatch.setattr(fused, name, noting)


def _knows(family):
    from tests.patching.test_families import AHEAD_NAMES, KNOWS_BLOCKS

    return KNOWS_BLOCKS or family not in AHEAD_NAMES


@pytest.mark.parametrize(("wrong", "words"), [
    ({"exact": "yes"}, "exact must be True or False, got 'yes'"),
    ({"record_importance": "no"}, "record_importance must be True or False, got 'no'"),
    ({"exact": True, "fuse": True}, "exact=True keeps .* fuse=True replaces: leave one of them out"),
])  # fmt: skip
def test_arguments(make_model, wrong, words):
    with pytest.raises((TypeError, ValueError), match=words):
        dk.patch(make_model(), **wrong)


def test_what_info_says_of_this_machine(monkeypatch):
    assert of_machine("reference") == {
        "steps": "eager", "layers": "own",
        "why_not": {"steps": "there is no CUDA device", "layers": "backend 'reference' has no such kernels, 'triton' has"},
    }  # fmt: skip
