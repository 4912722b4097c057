"""``patch(model, cuda_graph=True)``: captured decode steps against eager ones. Without a GPU a tape stands in for the graph."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.generation import kv_store
from dyrate_kernels.generation.session import Session
from dyrate_kernels.measuring import decoding
from dyrate_kernels.ops import workspace
from dyrate_kernels.patching import graph
from dyrate_kernels.patching.families import cache_name
from dyrate_kernels.policies.base import Decision
from dyrate_kernels.policies.fixed import Fixed
from tests import models
from tests.checks import METHODS, RETENTIONS, ROWS, assert_same, fingerprint, greedy, logits, patched, policy, rows_for_beams, single
from tests.fake_graph import Tape, TapeRecorder

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
STEPS = 8  # tokens: the first comes of the prompt, the second of the warm-up step, the third of the captured one


@pytest.fixture
def tape(monkeypatch):
    """Captures on the CPU."""
    recorder = TapeRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    return recorder


@pytest.fixture
def told():
    """For ``TOLD``."""


TOLD = pytest.mark.usefixtures("told")


@pytest.fixture(autouse=True)
def no_warning(request):
    """A step that could not be captured says so in a warning: only tests marked ``TOLD`` may see one."""
    with warnings.catch_warnings():
        if "told" not in request.fixturenames:
            warnings.filterwarnings("error", message="cuda_graph=True has no effect")
        yield


def run(model, fields, options, patch_options, *, seed=5):
    with dk.patch(model, **patch_options) as handle:
        torch.manual_seed(seed)
        output = model.generate(**fields, **options)
        return output, handle.stats(), handle


def both(model, fields, options, **patch_options):
    """Eager, then captured."""
    want, want_stats, _ = run(model, fields, options, patch_options)
    got, got_stats, handle = run(model, fields, options, {**patch_options, "cuda_graph": True})
    assert_same(got, want)
    assert_same_stats(got_stats, want_stats)
    assert handle.graph.off is None
    return handle.graph


def assert_same_stats(got, want, tolerance=1e-5):
    _assert_close(got.to_dict(), want.to_dict(), tolerance, "stats")


def _assert_close(got, want, tolerance, where):
    assert type(got) is type(want), where
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for name in want:
            _assert_close(got[name], want[name], tolerance, f"{where}.{name}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            _assert_close(a, b, tolerance, f"{where}[{index}]")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=tolerance, abs=tolerance), where
    else:
        assert got == want, where


# -- the same answers ----------------------------------------------------------------------------------------------------------------------


@RETENTION
@pytest.mark.parametrize("method", METHODS)
def test_method(make_model, tape, method, retention):
    model = make_model()
    used = both(model, models.inputs(model, ROWS), greedy(STEPS), policy=policy(METHODS[method]), retention=retention)
    assert (used.captures, used.replays, tape.steps) == (1, STEPS - 2, 1)


@RETENTION
@pytest.mark.parametrize("name", ["random", "uniform", "fixed"])
def test_kept_tokens(make_model, tape, name, retention):
    model = make_model()
    chosen = dk.policies.get(name, k=2, rate=0.6)
    both(model, models.inputs(model, ROWS[:2]), greedy(STEPS), policy=chosen, retention=retention, record_importance=True)


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "dyrate-trained", "fixed", "fastv", "depth", "schedule"])
def test_bit_for_bit(make_model, tape, monkeypatch, method, retention):
    """With the text bound at capacity in both, a replay does to the bit what an eager step does."""
    monkeypatch.setattr(Session, "bounds_at_capacity", True)
    model = make_model()
    options = {"policy": policy(METHODS[method]), "retention": retention, "record_importance": True}
    fields = models.inputs(model, ROWS)
    want, want_stats, _ = run(model, fields, greedy(STEPS), options)
    got, got_stats, handle = run(model, fields, greedy(STEPS), {**options, "cuda_graph": True})
    assert handle.graph.replays == STEPS - 2
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(logits(got), logits(want))
    assert got_stats.to_dict() == want_stats.to_dict()
    for a, b in zip(got.past_key_values.store.keys, want.past_key_values.store.keys, strict=True):
        assert torch.equal(a, b)


MODES = {
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 30},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 2, "do_sample": True},
    "several-answers": {"do_sample": True, "num_return_sequences": 2},
    "rows-end-early": {"eos_token_id": list(range(5, 30))},
    "no-cache-of-masks": {"use_cache": True, "repetition_penalty": 1.2},
}


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fixed", "fastv", "depth"])
@pytest.mark.parametrize("mode", MODES)
def test_mode(make_model, tape, method, retention, mode):
    model = make_model()
    fields = models.inputs(model, rows_for_beams(ROWS) if "beams" in mode else ROWS)
    used = both(model, fields, greedy(STEPS, **MODES[mode]), policy=policy(METHODS[method]), retention=retention, record_importance=True)
    if mode == "rows-end-early":
        assert used.replays >= used.captures
    else:
        assert (used.captures, used.replays) == (1, STEPS - 2)


@RETENTION
@pytest.mark.parametrize(("family", "text"), models.VARIANTS, ids=["-".join(each) for each in models.VARIANTS])
def test_family(make_model, tape, family, text, retention):
    model = make_model(family, text)
    rows = ROWS[:2] if family != "video_llava" else [["text 4", "image", "text 6"], ["text 7"]]
    used = both(model, models.inputs(model, rows), greedy(STEPS), policy="dyrate", retention=retention)
    assert used.captures == 1


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fastv"])
def test_a_sliding_window_is_reached_in_the_middle(tape, method, retention):
    model = models.build("llava", "mistral", sliding_window=39)
    fields = models.inputs(model, [["text 4", "image", "text 6"], ["text 7"]])
    assert fields["input_ids"].shape[1] == 35
    used = both(model, fields, greedy(14), policy=policy(METHODS[method]), retention=retention)
    assert used.captures == 2
    assert used.replays == 13 - 2


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fixed"])
def test_text_region_and_record_grow_in_the_middle(make_model, tape, monkeypatch, method, retention):
    monkeypatch.setattr(kv_store, "ROUND", 4)
    begin = Session.begin_turn
    monkeypatch.setattr(
        Session, "begin_turn", lambda self, prompt, longest, frozen, **options: begin(self, prompt, prompt + 2, frozen, **options)
    )
    model = make_model()
    used = both(model, models.inputs(model, ROWS[:2]), greedy(40), policy=policy(METHODS[method]), retention=retention)
    assert 3 <= used.captures <= 8
    assert used.replays == 39 - used.captures


@RETENTION
def test_no_picture(make_model, tape, retention):
    model = make_model()
    used = both(model, models.inputs(model, [["text 9"], ["text 4"]]), greedy(STEPS), policy="dyrate", retention=retention)
    assert used.captures == 1


@RETENTION
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_answers(make_model, tape, length, retention):
    model = make_model()
    used = both(model, models.inputs(model, ROWS[:1]), greedy(length), policy="dyrate", retention=retention)
    assert used.replays == max(length - 2, 0)


@RETENTION
def test_several_generations_in_a_row(make_model, tape, retention):
    model = make_model()
    wanted, got = [], []
    batches = (ROWS, ROWS[:1], ROWS, [["text 5"]], ROWS[:2])
    for results, options in ((wanted, {}), (got, {"cuda_graph": True})):
        with patched(model, METHODS["dyrate"], retention, **options) as handle:
            for rows in batches:
                results.append((model.generate(**models.inputs(model, rows), **greedy(6)), handle.stats()))
    assert handle.graph.captures == len(batches)
    for (output, stats), (want, want_stats) in zip(got, wanted, strict=True):
        assert_same(output, want)
        assert_same_stats(stats, want_stats)


@RETENTION
@pytest.mark.parametrize("method", ["none", "dyrate", "fixed", "fastv", "depth"])
def test_chat(make_model, tape, method, retention):
    model = make_model()
    first = models.inputs(model, ROWS)

    def talk(**options):
        results = []
        generator = torch.Generator().manual_seed(1)
        with patched(model, METHODS[method], retention, **options) as handle:
            output = model.generate(**first, **greedy(6))
            results.append((output, handle.stats()))
            mask = first["attention_mask"]
            for _ in range(2):
                new = torch.randint(models.FIRST_WORD, models.IMAGE_TOKEN, (4, 3), generator=generator)
                ids = torch.cat([output.sequences, new], 1)
                mask = torch.cat([mask, torch.ones(4, ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
                output = model.generate(input_ids=ids, attention_mask=mask, **{cache_name(): output.past_key_values}, **greedy(6))
                results.append((output, handle.stats()))
        return results, handle

    want, _ = talk()
    got, handle = talk(cuda_graph=True)
    assert handle.graph.captures == 3
    for (output, stats), (wanted, wanted_stats) in zip(got, want, strict=True):
        assert_same(output, wanted)
        assert_same_stats(stats, wanted_stats)


@RETENTION
def test_a_second_picture_in_the_chat(make_model, tape, retention):
    model = make_model()
    first, second = single(model, ["text 4", "image", "text 5"]), single(model, ["text 3", "image", "text 4"], seed=9)

    def talk(**options):
        with patched(model, METHODS["fastv"], retention, **options):
            output = model.generate(**first, **greedy(5))
            ids = torch.cat([output.sequences, second["input_ids"]], 1)
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=second["pixel_values"],
                **{cache_name(): output.past_key_values},
                **greedy(6),
            )

    assert_same(talk(cuda_graph=True), talk())


@RETENTION
def test_an_eager_step_by_hand_after_captured_ones(make_model, tape, retention):
    """The cache that generate() returns is whole: a forward by the user goes on from it."""
    model = make_model()
    fields = models.inputs(model, ROWS[:2])

    def go_on(**options):
        with patched(model, METHODS["dyrate"], retention, **options), torch.no_grad():
            output = model.generate(**fields, **greedy(6))
            steps = []
            token = output.sequences[:, -1:]
            for _ in range(4):
                steps.append(model(input_ids=token, **{cache_name(): output.past_key_values}, use_cache=True).logits)
                token = steps[-1].argmax(-1)
            return torch.stack(steps)

    got, want = go_on(cuda_graph=True), go_on()
    assert torch.allclose(got, want, atol=1e-4)


@RETENTION
def test_results_of_a_step_are_not_overwritten(make_model, tape, retention):
    model = make_model()
    seen = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with patched(model, METHODS["dyrate"], retention, cuda_graph=True) as handle:
            output = model.generate(**models.inputs(model, ROWS), **greedy(STEPS))
    finally:
        hook.remove()
    assert handle.graph.replays == STEPS - 2
    assert {type(each) for each in seen} == {type(seen[0])}
    assert all(each.past_key_values is output.past_key_values for each in seen)
    assert torch.equal(torch.stack([each.logits[:, -1].float() for each in seen]), logits(output))


@RETENTION
def test_without_position_ids(make_model, tape, retention):
    """The model then counts on the host, which a replay would not."""
    model = make_model()
    fields = single(model, ROWS[0])

    def drop(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name != "position_ids"}

    hook = model.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        used = both(model, fields, greedy(STEPS), policy="dyrate", retention=retention)
    finally:
        hook.remove()
    assert used.replays == STEPS - 2


@pytest.mark.parametrize("method", ["fastv", "depth"])
def test_a_kept_list_that_someone_replaces(make_model, tape, method):
    """A list that steps only read is looked up again before every replay."""
    model = make_model()
    calls = []

    def shorten(module, args, output):
        calls.append(1)
        if len(calls) == 5:
            for group in output.past_key_values.store.groups[1:]:
                group.n_kept = (group.n_kept - 2).clamp(min=0)

    def generate(**options):
        calls.clear()
        with patched(model, METHODS[method], **options) as handle:
            return model.generate(**models.inputs(model, ROWS), **greedy(STEPS)), handle.stats(), handle

    unchanged, *_ = generate()
    hook = model.register_forward_hook(shorten)
    try:
        want, want_stats, _ = generate()
        got, got_stats, handle = generate(cuda_graph=True)
    finally:
        hook.remove()
    assert not torch.equal(logits(want), logits(unchanged))
    assert_same(got, want)
    assert_same_stats(got_stats, want_stats)
    assert handle.graph.captures == 2


def test_an_eager_step_between_replays(make_model, tape, monkeypatch):
    """The kept list of the last step is the one that the cache names, whoever made it."""
    model = make_model()
    split = graph._split
    calls = []

    def sometimes(kwargs):
        calls.append(1)
        return None if len(calls) == 8 else split(kwargs)  # the prompt does not come here

    monkeypatch.setattr(graph, "_split", sometimes)
    options = {"policy": policy(METHODS["dyrate"]), "retention": "recoverable"}
    want, _, _ = run(model, models.inputs(model, ROWS), greedy(12), options)
    assert not calls
    got, _, handle = run(model, models.inputs(model, ROWS), greedy(12), {**options, "cuda_graph": True})
    assert (handle.graph.captures, handle.graph.replays) == (1, 11 - 2)
    assert_same(got, want)
    for a, b in zip(got.past_key_values.store.groups[1:], want.past_key_values.store.groups[1:], strict=True):
        assert torch.equal(a.kept, b.kept) and torch.equal(a.n_kept, b.n_kept)


# -- passes that stay eager ----------------------------------------------------------------------------------------------------------------


@RETENTION
@pytest.mark.parametrize(
    "options", [{"output_hidden_states": True}, {"prompt_lookup_num_tokens": 3, "eos_token_id": -1}, {"use_cache": False}], ids=str
)
def test_other_passes_run_as_before(make_model, tape, retention, options):
    model = make_model()
    fields = single(model, ["text 5", "image", "text 8"])
    used = both_without_stats(model, fields, greedy(STEPS, **options), policy=policy(METHODS["fixed"]), retention=retention)
    assert used.captures == 0


def both_without_stats(model, fields, options, **patch_options):
    with dk.patch(model, **patch_options):
        want = model.generate(**fields, **options)
    with dk.patch(model, cuda_graph=True, **patch_options) as handle:
        assert_same(model.generate(**fields, **options), want)
    return handle.graph


def test_the_drafting_model_runs_eagerly(make_model, tape):
    model = make_model()
    drafter = copy.deepcopy(model)
    fields = single(model, ["text 5", "image", "text 8"])
    want = model.generate(**fields, **greedy(10))
    with patched(drafter, METHODS["dyrate"], cuda_graph=True) as handle:
        got = model.generate(**fields, **greedy(10, assistant_model=drafter))
    assert_same(got, want)
    assert handle.graph.captures == 0


@RETENTION
def test_gradients_and_plain_forwards(make_model, tape, retention):
    model = make_model()
    fields = models.inputs(model, ROWS[:1])
    want = model(**fields).logits
    with patched(model, METHODS["fixed"], retention, cuda_graph=True):
        got = model(**fields)
        assert got.logits.requires_grad
    assert torch.equal(got.logits, want)


def warned(caught):
    return [str(each.message) for each in caught if "cuda_graph" in str(each.message)]


@TOLD
@RETENTION
def test_cpu_model_runs_eagerly_and_says_so_once(make_model, retention):
    model = make_model()
    fields = models.inputs(model, ROWS)
    with patched(model, METHODS["dyrate"], retention) as handle:
        want, want_stats = model.generate(**fields, **greedy(STEPS)), handle.stats()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with patched(model, METHODS["dyrate"], retention, cuda_graph=True) as handle:
            got = [model.generate(**fields, **greedy(STEPS)) for _ in range(2)]
            stats = handle.stats()
    assert len(warned(caught)) == 1
    assert "'cpu'" in warned(caught)[0] and "CUDA" in warned(caught)[0]
    assert handle.graph.captures == 0
    for output in got:
        assert torch.equal(logits(output), logits(want))
    assert stats.to_dict() == want_stats.to_dict()


@TOLD
def test_a_hook_inside_of_the_model_keeps_steps_eager(make_model, tape):
    model = make_model()
    fields = models.inputs(model, ROWS[:1])
    calls = []
    hook = model.get_decoder().layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    try:
        with patched(model, METHODS["dyrate"], cuda_graph=True) as handle, pytest.warns(UserWarning, match=r"mlp has a hook"):
            model.generate(**fields, **greedy(STEPS))
            assert len(calls) == STEPS
            hook.remove()
            model.generate(**fields, **greedy(STEPS))
        assert handle.graph.captures == 1
    finally:
        hook.remove()


def test_the_hooks_of_transformers_do_no_harm(make_model, tape):
    """output_hidden_states leaves hooks behind, which act in such passes only."""
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    model.generate(**fields, **greedy(2, output_hidden_states=True))
    assert both(model, fields, greedy(STEPS), policy="dyrate").captures == 1


@TOLD
def test_training_mode_keeps_steps_eager(make_model, tape):
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    with patched(model, METHODS["dyrate"], cuda_graph=True) as handle:
        model.train()
        with pytest.warns(UserWarning, match=r"model\.eval\(\)"):
            model.generate(**fields, **greedy(4))
        assert handle.graph.captures == 0
        model.eval()
        model.generate(**fields, **greedy(4))
        assert handle.graph.captures == 1


def test_autocast_is_refused(make_model, tape):
    with dk.patch(make_model(), cuda_graph=True) as handle:
        assert handle.graph._checked_recorder() is tape
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(graph.CannotCapture, match="autocast"):
            handle.graph._checked_recorder()


# -- captures that fail --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadsTheHost(Fixed):
    """A policy that breaks the rule of policies.base: it reads a device value."""

    constant = False  # decides in every step, whatever the retention

    def decide(self, view):
        float(view.mass.sum())
        return super().decide(view)


@dataclass(frozen=True)
class ReplacesItsState(Fixed):
    """A policy that breaks the other rule: its state is a new tensor in every step. Every third step keeps fewer."""

    constant = False

    def start(self, n_visual):
        return {"seen": torch.zeros_like(n_visual)}

    def decide(self, view):
        decision = super().decide(view)
        view.state["seen"] = view.state["seen"] + 1
        fewer = torch.where(view.state["seen"] % 3 == 0, decision.count // 2, decision.count)
        return Decision(decision.rate, fewer)


@TOLD
@RETENTION
@pytest.mark.parametrize(
    ("broken", "word"), [(ReadsTheHost, "not permitted when stream is capturing"), (ReplacesItsState, "in place")], ids=["host", "state"]
)
def test_a_step_that_cannot_be_captured(make_model, tape, retention, broken, word):
    model = make_model()
    fields = models.inputs(model, ROWS)
    options = {"policy": broken(k=2, rate=0.4), "retention": retention}
    want, want_stats, _ = run(model, fields, greedy(STEPS), options)
    with dk.patch(model, cuda_graph=True, **options) as handle:
        with pytest.warns(UserWarning, match=word) as caught:
            got = model.generate(**fields, **greedy(STEPS))
        assert len(warned(caught)) == 1
        stats = handle.stats()
        assert word in handle.graph.off
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = model.generate(**fields, **greedy(STEPS))
    assert handle.graph.captures == 0
    assert_same(got, want)
    assert_same(again, want)
    assert_same_stats(stats, want_stats)


@TOLD
@RETENTION
@pytest.mark.parametrize("layer", [0, 1, 3, models.LAYERS - 1])
def test_an_operator_that_fails_in_a_capture(make_model, tape, monkeypatch, retention, layer):
    """At whatever layer it breaks off: rows, lengths and records are as if nothing had been tried."""
    model = make_model()
    fields = models.inputs(model, ROWS)
    want, want_stats, _ = run(model, fields, greedy(STEPS), {"policy": policy(METHODS["fixed"]), "retention": retention})
    attend = Session.attend

    def failing(self, index, *args):
        output = attend(self, index, *args)
        if index == layer and isinstance(torch.utils._python_dispatch._get_current_dispatch_mode(), Tape):
            raise NotImplementedError("no such operator in a graph")
        return output

    monkeypatch.setattr(Session, "attend", failing)
    with patched(model, METHODS["fixed"], retention, cuda_graph=True) as handle:
        with pytest.warns(UserWarning, match="NotImplementedError: no such operator in a graph"):
            got = model.generate(**fields, **greedy(STEPS))
        stats = handle.stats()
    assert_same(got, want)
    assert_same_stats(stats, want_stats)


def test_an_interrupted_capture_leaves_the_cache_whole(make_model, tape, monkeypatch):
    model = make_model()
    fields = models.inputs(model, ROWS)
    seen = []

    def interrupted(step):
        seen.append(step)
        raise KeyboardInterrupt

    with patched(model, METHODS["dyrate"], cuda_graph=True) as handle:
        with monkeypatch.context() as patching:
            patching.setattr(tape, "record", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(**fields, **greedy(STEPS))
        assert seen and handle.session is None
        want = model.generate(**fields, **greedy(STEPS))
        assert handle.graph.replays == STEPS - 2
    assert_same(run(model, fields, greedy(STEPS), {"policy": "dyrate"})[0], want)


def test_a_replay_that_fails_spoils_the_cache_as_a_forward_would(make_model, tape, monkeypatch):
    model = make_model()
    fields = models.inputs(model, ROWS)
    caches = []
    hook = model.register_forward_hook(lambda module, args, output: caches.append(output.past_key_values))
    replay = Tape.replay

    def failing(self):
        failing.calls += 1
        if failing.calls == 3:
            raise RuntimeError("device-side assert")
        replay(self)

    failing.calls = 0
    try:
        with patched(model, METHODS["dyrate"], cuda_graph=True):
            with monkeypatch.context() as patching:
                patching.setattr(Tape, "replay", failing)
                with pytest.raises(RuntimeError, match="device-side assert"):
                    model.generate(**fields, **greedy(STEPS))
            with torch.no_grad(), pytest.raises(RuntimeError, match="did not finish"):
                model(input_ids=fields["input_ids"][:, -1:], **{cache_name(): caches[-1]})
            model.generate(**fields, **greedy(STEPS))
    finally:
        hook.remove()


# -- what is left behind -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["yes", 1, None])
def test_argument(make_model, argument):
    with pytest.raises(TypeError, match="cuda_graph must be True or False"):
        dk.patch(make_model(), cuda_graph=argument)


def test_signature_and_repr(make_model):
    model = make_model()
    want = inspect.signature(model.forward)
    with dk.patch(model, cuda_graph=True) as handle:
        assert inspect.signature(model.forward) == want
        assert "cuda_graph=True" in repr(handle) and "captures=0" in repr(handle.graph)
        with pytest.raises(ValueError, match="model_kwargs"):  # generate() still knows which arguments forward takes
            model.generate(**models.inputs(model, ROWS[:1]), no_such_argument=1, max_new_tokens=2)
    with dk.patch(model) as handle:
        assert handle.graph is None
        assert "forward" not in vars(model)


@RETENTION
def test_unpatch_leaves_nothing(tape, retention):
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    dk.patch(model, "fixed", retention=retention)
    dk.unpatch(model)
    before, want = fingerprint(model), model.generate(**fields, **greedy(6))
    dk.patch(model, "fixed", retention=retention, cuda_graph=True)
    model.generate(**fields, **greedy(6))
    dk.unpatch(model)
    assert fingerprint(model) == before
    assert torch.equal(logits(model.generate(**fields, **greedy(6))), logits(want))


@RETENTION
def test_deepcopy(tape, retention):
    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    want = model.generate(**fields, **greedy(6))
    handle = dk.patch(model, "fixed", retention=retention, cuda_graph=True)
    pruned = model.generate(**fields, **greedy(6))
    twin = copy.deepcopy(model)
    assert_same(twin.generate(**fields, **greedy(6)), pruned)
    own = vars(twin)["forward"]
    assert own is not handle.graph and own.owner.model is twin
    assert (handle.graph.captures, own.captures) == (1, 2)  # the copy went on counting for itself
    dk.unpatch(model)
    assert_same(model.generate(**fields, **greedy(6)), want)
    assert_same(twin.generate(**fields, **greedy(6)), pruned)
    dk.unpatch(twin)
    assert_same(twin.generate(**fields, **greedy(6)), want)


def test_a_copy_made_in_the_middle_of_a_generation(tape):
    """A copy taken by a hook of the user while a graph exists."""
    model = models.build("llava")
    fields = models.inputs(model, ROWS[:1])
    twins = []
    with dk.patch(model, "fixed", cuda_graph=True) as handle:
        want = model.generate(**fields, **greedy(STEPS))
        hook = model.register_forward_hook(lambda *args: twins.append(copy.deepcopy(handle.graph)) if len(twins) < 6 else None)
        assert_same(model.generate(**fields, **greedy(STEPS)), want)
        hook.remove()
    assert len(twins) == 6 and all(not twin.owner.running for twin in twins)


@TOLD
@RETENTION
@pytest.mark.parametrize("first", ["accelerate", "patch"])
def test_accelerate_hooks(tape, retention, first):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_module

    model = models.build("llava")
    fields = models.inputs(model, ROWS)
    with dk.patch(model, "fixed", retention=retention):
        want = model.generate(**fields, **greedy(6))
    plain = model.generate(**fields, **greedy(6))
    if first == "accelerate":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.warns(UserWarning, match="accelerate"):
        handle = dk.patch(model, "fixed", retention=retention, cuda_graph=True)
        if first == "patch":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        got = model.generate(**fields, **greedy(6))
    assert handle.graph.captures == 0
    assert_same(got, want)
    dk.unpatch(model)
    assert_same(model.generate(**fields, **greedy(6)), plain)
    if first == "patch":
        remove_hook_from_module(model, recurse=True)
        assert not isinstance(vars(model).get("forward"), graph.StepGraph)
        assert_same(model.generate(**fields, **greedy(6)), plain)


@RETENTION
def test_a_graph_ends_with_its_generation(make_model, tape, retention):
    model = make_model()
    with patched(model, METHODS["dyrate"], retention, cuda_graph=True) as handle:
        output = model.generate(**models.inputs(model, ROWS), **greedy(STEPS))
        last = weakref.ref(tape.tapes.pop())
        gc.collect()
        assert last() is None  # though the cache lives
        cache = weakref.ref(output.past_key_values)
        del output
        gc.collect()
        assert cache() is None
        assert handle.stats().steps


@dataclass(frozen=True)
class UsesScratchMemory(Fixed):
    """A policy that looks at what the kernels of a step would write to, on one and the same stream in every step."""

    constant = False

    def decide(self, view):
        space = workspace.for_stream(torch.device("cpu"), 7)
        space.buffers_for({"part": 8})
        SPACES.append(weakref.ref(space))
        return super().decide(view)


SPACES = []


def test_each_captured_step_owns_its_scratch_memory(make_model, tape, monkeypatch):
    """Two generations on one stream share none, and what they had goes with them. Prompts, and an eager generation, use the stream's."""
    model, fields = make_model(), models.inputs(make_model(), ROWS)
    original, captures = tape.record, []

    def record(step):
        made = original(step)
        captures.append(SPACES[-1]() is SPACES[-2]())  # the warm-up and the capture
        return made

    monkeypatch.setattr(tape, "record", record)
    for cuda_graph in (True, True, False):
        SPACES.clear()
        with dk.patch(model, policy=UsesScratchMemory(), cuda_graph=cuda_graph):
            model.generate(**fields, **greedy(5))
        gc.collect()
        gone = [space() is None for space in SPACES]
        assert gone == [False, True, True] if cuda_graph else not any(gone)
    assert captures == [True, True]


def test_a_patched_model_can_be_collected(tape):
    model = models.build("llava")
    dk.patch(model, "fixed", cuda_graph=True)
    model.generate(**models.inputs(model, ROWS[:1]), **greedy(STEPS))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@RETENTION
@pytest.mark.parametrize("method", ["dyrate", "fastv", "depth"])
def test_no_host_sync_in_a_replay(make_model, tape, host_sync, monkeypatch, method, retention):
    model = make_model()
    mode = host_sync()
    original = graph.StepGraph._replay

    def counted(self, *args):
        with mode:
            return original(self, *args)

    monkeypatch.setattr(graph.StepGraph, "_replay", counted)
    with patched(model, METHODS[method], retention, cuda_graph=True) as handle:
        model.generate(**models.inputs(model, ROWS), **greedy(STEPS, num_beams=2))
    assert handle.graph.replays == STEPS - 2
    assert not mode.found


# -- the stand-in itself -------------------------------------------------------------------------------------------------------------------


def test_the_tape_is_a_graph():
    state, weight = torch.zeros(3), torch.arange(3.0)

    def step():
        state.add_(1)
        return (state * weight)[1:] + 1

    tape = Tape()
    with tape:
        result = step()
    tape.put_back()
    tape.spoil()
    assert state.tolist() == [0, 0, 0] and result.isnan().all()
    for turn in (1, 2, 3):
        tape.replay()
        assert state.tolist() == [turn] * 3 and result.tolist() == [turn + 1, 2 * turn + 1]
    weight.mul_(2)
    tape.replay()
    assert result.tolist() == [9, 17]
    for forbidden in (lambda: state.sum().item(), lambda: state[state > 0], lambda: torch.tensor([1.0]), lambda: state.nonzero()):
        with pytest.raises(RuntimeError, match="not permitted"), Tape():
            forbidden()


class FakeCuda:
    """Notes what a ``CudaRecorder`` asks ``torch.cuda`` for."""

    def __init__(self, monkeypatch):
        self.log = log = []
        self.broken = False

        class Stream:
            def __init__(self, device):
                self.name = "side"

            def wait_stream(self, other):
                log.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            def capture_begin(this, pool, capture_error_mode):
                log.append(f"begin {capture_error_mode} in {pool}")

            def capture_end(this):
                log.append("end")
                if self.broken:
                    raise RuntimeError("capture was invalidated")

            def replay(this):
                log.append("replay")

        class Generator:
            def clone_state(self):
                return "a state in no capture"

            def graphsafe_set_state(self, state):
                log.append(state)

        @contextlib.contextmanager
        def stream(which):
            log.append(f"on {which.name}")
            try:
                yield
            finally:
                log.append("back")

        main = Stream(None)
        main.name = "main"
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda index, pool, name=name: log.append(f"{name} {index} {pool}"), raising=False)
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "current_stream": lambda device: main,
            "synchronize": lambda device: log.append("synchronize"),
            "graph_pool_handle": lambda: "a pool",
            "default_generators": [Generator()],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def fake_cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_what_the_cuda_recorder_does(fake_cuda):
    recorder = graph.recorder_for(torch.device("cuda", 0))
    assert recorder.stream is not graph.recorder_for(torch.device("cuda", 0)).stream
    with recorder.warm_up():
        fake_cuda.log.append("step")
    assert fake_cuda.log == ["side waits for main", "on side", "step", "back", "main waits for side"]
    fake_cuda.log.clear()
    replay, result = recorder.record(lambda: fake_cuda.log.append("step") or "result")
    assert result == "result"
    assert fake_cuda.log == ["synchronize", "on side", "begin thread_local in a pool", "step", "end", "back"]
    replay()
    assert fake_cuda.log[-1] == "replay"


def test_a_broken_cuda_capture_names_its_cause(fake_cuda):
    recorder = graph.recorder_for(torch.device("cuda", 0))
    fake_cuda.broken = True
    with pytest.raises(ZeroDivisionError):
        recorder.record(lambda: 1 // 0)
    cleaned = ["_cuda_endAllocateToPool 0 a pool", "_cuda_releasePool 0 a pool", "a state in no capture"]
    assert fake_cuda.log[-5:] == ["end", *cleaned, "back"]
    with pytest.raises(RuntimeError, match="invalidated"):  # broken without a word from the step
        recorder.record(lambda: None)
    assert fake_cuda.log[-4:] == [*cleaned, "back"]
    with pytest.raises(graph.CannotCapture, match="'mps'"):
        graph.recorder_for(torch.device("mps"))


# -- a real GPU ----------------------------------------------------------------------------------------------------------------------------

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@CUDA
@RETENTION
@pytest.mark.parametrize("method", ["none", "dyrate", "dyrate-trained", "fixed", "fastv", "vtw", "depth", "schedule", "uniform"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_on_cuda(method, retention, options):
    model = models.build("llava").cuda()
    fields = {name: value.cuda() for name, value in models.inputs(model, rows_for_beams(ROWS)).items()}
    used = both(model, fields, greedy(20, **options), policy=policy(METHODS[method]), retention=retention)
    assert (used.captures, used.replays) == (1, 18)


@pytest.mark.gpu
@CUDA
@RETENTION
def test_window_and_chat_on_cuda(retention):
    model = models.build("llava", "mistral", sliding_window=39).cuda()
    fields = {name: value.cuda() for name, value in models.inputs(model, [["text 4", "image", "text 6"], ["text 7"]]).items()}
    assert both(model, fields, greedy(14), policy="dyrate", retention=retention).captures == 2


@pytest.mark.gpu
@CUDA
@TOLD
def test_a_failed_capture_on_cuda():
    model = models.build("llava").cuda()
    fields = {name: value.cuda() for name, value in models.inputs(model, ROWS).items()}
    options = {"policy": ReadsTheHost(k=2, rate=0.4)}
    want, want_stats, _ = run(model, fields, greedy(STEPS), options)
    with pytest.warns(UserWarning, match="could not be captured"):
        got, stats, handle = run(model, fields, greedy(STEPS), {**options, "cuda_graph": True})
    assert handle.graph.captures == 0
    assert_same(got, want)
    assert_same_stats(stats, want_stats)
    # torch is out of the capture: its allocator, its random numbers, and the next capture
    torch.cuda.empty_cache()
    torch.rand(1, device="cuda")
    with pytest.warns(UserWarning, match="could not be captured"):
        run(model, fields, greedy(STEPS, do_sample=True), {**options, "cuda_graph": True})
    assert both(model, fields, greedy(STEPS), policy="dyrate").captures == 1


@pytest.mark.gpu
@CUDA
def test_memory_of_a_graph_is_given_back():
    model = models.build("llava").cuda()
    fields = {name: value.cuda() for name, value in models.inputs(model, ROWS).items()}
    held = []
    with dk.patch(model, "dyrate", cuda_graph=True):
        for _ in range(6):
            model.generate(**fields, max_new_tokens=STEPS)
            gc.collect()
            torch.cuda.empty_cache()
            held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[1]


def test_a_clock_finds_the_replays_of_its_generation(make_model, tape, monkeypatch):
    model = make_model()
    wrapped = []
    monkeypatch.setattr(decoding.Clock, "_timed", lambda self, replay: wrapped.append(replay) or replay)
    with patched(model, METHODS["fixed"], cuda_graph=True) as handle:
        model.generate(**models.inputs(model, ROWS[:1]), **greedy(5, logits_processor=[decoding.Clock(handle)]))
        assert handle.graph.replays == 3 and len(wrapped) == 1
