"""A generation belongs to its own call: other threads, and calls made in the middle of it, neither see nor change it."""

from __future__ import annotations

import contextvars
import threading
import warnings

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import dyrate_kernels as dk
from tests import models
from tests.checks import RETENTIONS, fingerprint, greedy
from tests.fake_graph import TapeRecorder

RETENTION = pytest.mark.parametrize("retention", RETENTIONS)
FIXED = dk.policies.Fixed(k=2, rate=0.6)
WAIT = 15
STEPS = 6

# model, and the reducers before it: none, on the features alone, by the tower's attention, inside the tower, where positions have three
# dimensions, where features come for each tile
VARIANTS = [
    ("llava", "llama", None),
    ("llava", "llama", "uniform:keep=0.5"),
    ("llava", "llama", "hired:keep=0.5"),
    ("llava", "llama", "tome:keep=0.5"),
    ("llava_onevision", "qwen2", "fastervlm:keep=0.4+aim:keep=0.5"),
    ("qwen2_5_vl", "own", "uniform:keep=0.5"),
    ("internvl", "qwen2", "aim:keep=0.5"),
]
VARIANT = pytest.mark.parametrize(("family", "text", "vision"), VARIANTS, ids=["-".join(map(str, v)) for v in VARIANTS])


class AtStep:
    """Does something once, in the step ``step``."""

    def __init__(self, do, step=2):
        self.do, self.step, self.calls = do, step, 0

    def count(self):
        self.calls += 1
        if self.calls == self.step:
            self.do()


class Processor(AtStep, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.count()
        return scores


class Criterion(AtStep, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.count()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def processors(do, step=2):
    return {"logits_processor": LogitsProcessorList([Processor(do, step)])}


def criteria(do, step=2):
    return {"stopping_criteria": StoppingCriteriaList([Criterion(do, step)])}


def tokens(model, fields, **options):
    return model.generate(**fields, max_new_tokens=STEPS, do_sample=False, **options).tolist()


def prompts(model):
    """Two prompts that differ in picture, length and batch."""
    one = models.inputs(model, [["text 3", "image", "text 5"]], seed=1)
    two = models.inputs(model, [["text 4", "image", "text 2"], ["text 1", "image", "text 4"]], seed=2)
    return one, two


class Threads:
    """Runs functions side by side and hands their errors on."""

    def __init__(self, *functions):
        self.errors = []
        self.threads = [threading.Thread(target=self._run, args=(each,)) for each in functions]

    def _run(self, function):
        try:
            function()
        except BaseException as error:
            self.errors.append(error)

    def finish(self):
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(2 * WAIT)
        if self.errors:
            raise self.errors[0]


def overlapping(model, one, two):
    """Two generations in two threads: the second starts, and both its prompt and its first steps run, within the first's second step."""
    found = {}
    first_in, second_in, first_done = (threading.Event() for _ in range(3))

    def hold(here, go):
        def do():
            here.set()
            assert go.wait(WAIT)

        return processors(do)

    def first():
        try:
            found["one"] = tokens(model, one, **hold(first_in, second_in))
        finally:
            first_in.set()
            first_done.set()

    def second():
        assert first_in.wait(WAIT)
        try:
            found["two"] = tokens(model, two, **hold(second_in, first_done))
        finally:
            second_in.set()

    Threads(first, second).finish()
    return found


@VARIANT
def test_two_threads_at_once_answer_as_each_alone(family, text, vision):
    model = models.build(family, text)
    one, two = prompts(model)
    plain = tokens(model, one), tokens(model, two)
    dk.patch(model, FIXED).unpatch()  # what transformers registers once for all is there from here on
    before = fingerprint(model)
    retention = RETENTIONS[len(family) % 2]
    with dk.patch(model, FIXED, retention=retention, vision=vision) as handle:
        want = {"one": tokens(model, one), "two": tokens(model, two)}
        alone = handle.stats()
        assert overlapping(model, one, two) == want
        assert handle.session is None and not handle.running  # nothing of either is held
        assert handle.stats() == alone  # of the one that ended last
        tokens(model, one)
        assert handle.stats().visual_tokens != alone.visual_tokens
    assert fingerprint(model) == before
    assert (tokens(model, one), tokens(model, two)) == plain


@pytest.mark.parametrize("vision", ["hired:keep=0.5", "tome:keep=0.5", "uniform:keep=0.5"])
def test_two_threads_in_the_tower_at_once(vision):
    """Both reduce their pictures at the same time, beside a third that looks at its picture with the model as it is."""
    model = models.build("llava")
    one, two = prompts(model)
    tokens(model, one)
    before = fingerprint(model)
    met, barrier = threading.local(), threading.Barrier(3)
    found = {}

    def meet(module, args):
        if getattr(met, "waits", False):
            met.waits = False
            barrier.wait(WAIT)

    def run(name, do):
        def job():
            met.waits = True
            found[name] = do()

        return job

    def look():
        with torch.no_grad():
            return model.get_image_features(one["pixel_values"]).pooler_output[0].tolist()

    with dk.patch(model, "none", vision=vision):
        want = {"one": tokens(model, one), "two": tokens(model, two), "look": look()}
        inner = model.base_model.vision_tower
        hook = inner.register_forward_pre_hook(meet)
        Threads(
            *(run(*each) for each in (("one", lambda: tokens(model, one)), ("two", lambda: tokens(model, two)), ("look", look)))
        ).finish()
        hook.remove()
        assert found == want
    assert fingerprint(model) == before


@VARIANT
@pytest.mark.parametrize("where", [processors, criteria])
def test_calls_in_the_middle_of_a_generation(family, text, vision, where):
    """A generate(), a forward and a look at a picture, inside a logits processor or a stopping criterion."""
    model = models.build(family, text)
    one, two = prompts(model)

    def ask(fields):
        with torch.no_grad():
            logits = model(**fields).logits
        return tokens(model, fields), logits

    with dk.patch(model, FIXED, vision=vision) as handle:
        want, (nested, forward) = tokens(model, one), ask(two)
        tokens(model, one)
        alone = handle.stats()
        for step in (1, 3):  # right after the prompt, and in the middle
            inside = []
            assert tokens(model, one, **where(lambda inside=inside: inside.append(ask(two)), step)) == want
            (got, logits) = inside[0]
            assert got == nested
            assert torch.equal(logits, forward)
            assert handle.stats() == alone  # the outer one ended last
        assert not handle.running


HOOKED = {
    "embedding": lambda model: model.get_input_embeddings().register_forward_pre_hook,
    "embedding, after": lambda model: model.get_input_embeddings().register_forward_hook,
    "base": lambda model: model.base_model.register_forward_pre_hook,
    "text": lambda model: model.get_decoder().register_forward_pre_hook,
    "layer": lambda model: model.get_decoder().layers[2].register_forward_hook,
    "head": lambda model: model.lm_head.register_forward_hook,
}


@pytest.mark.parametrize("place", HOOKED)
@pytest.mark.parametrize(("family", "text"), [("llava", "llama"), ("qwen2_5_vl", "own")])
def test_a_look_at_another_picture_in_a_hook_of_the_model(family, text, place):
    """In every pass, a forward on another picture of the same size, and another thread that has inherited this one's context."""
    model = models.build(family, text)
    one, _ = prompts(model)
    two = models.inputs(model, [["text 3", "image", "text 5"]], seed=7)
    inside, found = threading.local(), []

    def look():
        with torch.no_grad():
            return model(**two).logits

    def hook(*args):
        if getattr(inside, "busy", False):
            return
        inside.busy = True
        found.append(look())
        context = contextvars.copy_context()
        Threads(lambda: (setattr(inside, "busy", True), found.append(context.run(look)))).finish()
        inside.busy = False

    want = look()
    with dk.patch(model, FIXED, vision="uniform:keep=0.5"):
        answer = tokens(model, one)
        handle = HOOKED[place](model)(hook)
        assert tokens(model, one) == answer
        handle.remove()
    assert len(found) >= 2 * STEPS and all(torch.equal(each, want) for each in found)


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_a_random_choice_does_not_depend_on_the_batch(family):
    model = models.build(family, "qwen2")
    rows = [["text 3", "image", "text 5"], ["text 2", "image", "text 2", "image", "text 4"], ["text 6", "image", "text 1"]]
    with dk.patch(model, FIXED, vision="random:keep=0.4") as handle:
        model.generate(**models.inputs(model, rows), **greedy(STEPS))
        together = handle.stats()
        for index, row in enumerate(rows):
            model.generate(**models.inputs(model, [row]), **greedy(STEPS))
            assert handle.stats().visual_places[0] == together.visual_places[index]


@pytest.mark.parametrize("vision", [None, "uniform:keep=0.5"])
def test_a_generation_past_the_patched_generate_says_that_stats_knows_nothing_of_it(vision):
    model = models.build("llava")
    one, two = prompts(model)
    before = model.generate
    with dk.patch(model, FIXED, vision=vision) as handle:
        tokens(model, two)
        model.generate = lambda **given: before(**given)
        with pytest.warns(UserWarning, match="past the patched one.*" + ("no reducer" if vision else "stats")):
            tokens(model, one)
        with pytest.raises(RuntimeError, match="past the patched one"):
            handle.stats()


def test_stats_inside_a_generation_are_its_own(make_model):
    model = make_model()
    one, two = prompts(model)
    seen = []
    with dk.patch(model, FIXED) as handle:
        tokens(model, two)
        tokens(model, one, **processors(lambda: seen.append(handle.stats()), 4))
        assert len(seen[0].visual_tokens) == 1 and len(seen[0].steps) == 4
        assert len(handle.stats().steps) == STEPS


def test_a_failed_generation_leaves_nothing_under_way(make_model):
    model = make_model()
    one, _ = prompts(model)

    def fail():
        raise KeyError("theirs")

    with dk.patch(model, FIXED, vision="uniform:keep=0.5") as handle:
        want = tokens(model, one)
        with pytest.raises(KeyError, match="theirs"):
            tokens(model, one, **processors(fail))
        assert not handle.running and handle.session is None
        with pytest.raises(RuntimeError, match="nothing of the last generate.*ended with KeyError"):
            handle.stats()  # not those of the one before
        assert tokens(model, one) == want


def test_captured_steps_of_two_threads(monkeypatch):
    """One is captured; the other, meanwhile, runs eagerly."""
    from dyrate_kernels.patching import graph

    monkeypatch.setattr(graph, "recorder_for", lambda device: TapeRecorder())
    monkeypatch.setattr(graph, "CAPTURE_FROM", 1)
    model = models.build("llava")
    one, two = prompts(model)
    with dk.patch(model, FIXED) as handle:
        want = {"one": tokens(model, one), "two": tokens(model, two)}
        captures = handle.graph.captures
        first_in, first_go = threading.Event(), threading.Event()
        found = {}

        def first():
            def do():
                first_in.set()
                assert first_go.wait(WAIT)

            found["one"] = tokens(model, one, **processors(do, 4))

        def second():
            assert first_in.wait(WAIT)
            try:
                found["two"] = tokens(model, two)
            finally:
                first_go.set()

        Threads(first, second).finish()
        assert found == want
        assert handle.graph.captures == captures + 1
        assert tokens(model, two) == want["two"] and handle.graph.captures == captures + 2


# ---- generate() of the instance's own -------------------------------------------------------------------------------------------------


def test_a_generate_of_the_instances_own_is_called_and_comes_back(make_model):
    model = models.build("llava")
    one, _ = prompts(model)
    seen = []
    kind = type(model)

    def own(*args, **kwargs):
        seen.append("own")
        return kind.generate(model, *args, **kwargs)

    want = tokens(model, one)
    model.generate = own
    with dk.patch(model, FIXED) as handle:
        pruned = model.generate(**one, **greedy(STEPS))
        assert seen == ["own"] and handle.stats().kept_mean < 1
    assert vars(model)["generate"] is own
    assert tokens(model, one) == want and seen == ["own", "own"]
    del model.generate
    with dk.patch(model, FIXED):
        assert torch.equal(torch.stack(model.generate(**one, **greedy(STEPS)).logits), torch.stack(pruned.logits))
    assert "generate" not in vars(model)


def test_a_wrapper_put_around_generate_after_the_patch_stays():
    model = models.build("llava")
    one, _ = prompts(model)
    want = tokens(model, one)
    seen = []
    handle = dk.patch(model, FIXED)
    inner = model.generate

    def wrapper(*args, **kwargs):
        seen.append("wrapper")
        return inner(*args, **kwargs)

    model.generate = wrapper
    tokens(model, one)
    assert handle.stats().kept_mean < 1
    handle.unpatch()
    assert vars(model)["generate"] is wrapper
    assert tokens(model, one) == want
    with dk.patch(model, FIXED) as again:
        tokens(model, one)
        assert again.stats().kept_mean < 1
    assert vars(model)["generate"] is wrapper and len(seen) == 3


# ---- what a checkpoint says of the cache ----------------------------------------------------------------------------------------------

SAVED = [
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"cache_implementation": "dynamic"},
    {"cache_implementation": "offloaded"},
]


@pytest.mark.parametrize("saved", SAVED, ids=str)
@pytest.mark.parametrize("how", ["the checkpoint's", "a config like it", "assisted", "beams"])
def test_a_checkpoint_saved_without_a_cache_of_its_own_is_pruned(saved, how):
    model = models.build("llava")
    one, _ = prompts(model)
    options = {"assisted": {"prompt_lookup_num_tokens": 2}, "beams": {"num_beams": 2}}.get(how, {})
    with dk.patch(model, FIXED) as handle:
        want = tokens(model, one, **options)
        kept = handle.stats().kept_mean
    for name, value in saved.items():
        setattr(model.generation_config, name, value)
    if how == "a config like it":
        import copy

        options["generation_config"] = copy.deepcopy(model.generation_config)
    with dk.patch(model, FIXED) as handle:
        assert tokens(model, one, **options) == want
        assert handle.stats().kept_mean == kept < 1
    for name, value in saved.items():
        assert getattr(model.generation_config, name) == value


@pytest.mark.parametrize("asked", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("vision", [None, "uniform:keep=0.5"])
def test_a_caller_that_asks_for_another_cache_is_told_that_nothing_is_dropped(asked, vision):
    model = models.build("llava")
    one, _ = prompts(model)
    want = tokens(model, one, **asked)
    name = next(iter(asked))
    with dk.patch(model, FIXED, vision=vision) as handle:
        with pytest.warns(UserWarning, match=f"nothing is dropped.*{name}"):
            assert tokens(model, one, **asked) == want
        with pytest.raises(RuntimeError, match=f"stats.. has nothing of the last.*{name}"):
            handle.stats()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tokens(model, one, **asked) == want  # said once
        tokens(model, one)
        assert handle.stats().kept_mean < 1
