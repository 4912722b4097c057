"""Sequences that have ended leave the batch: the others' tokens, and everything that is told of each, are what they are without it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import answering, chat, shapes
from dyrate_kernels.captioning.captioner import Captioner, Task
from dyrate_kernels.captioning.inputs import Source
from dyrate_kernels.patching import graph, leaving
from tests import models
from tests.checks import METHODS, RETENTIONS, ROWS, patched, rows_for
from tests.fake_graph import TapeRecorder
from tests.patching.graph.kit import assert_same_stats
from tests.patching.test_families import KNOWS_BLOCKS

POOL = "pool=0.5"
RETENTION = pytest.mark.parametrize("retention", [*RETENTIONS, POOL])
FAMILIES = [
    variant for variant in (*models.VARIANTS, *models.MORE_VARIANTS)
    if variant != ("llava", "llama") and (KNOWS_BLOCKS or variant[0] not in ("gemma3", "paligemma"))
]  # fmt: skip
MOST = 22
EIGHT = [*ROWS, ["text 9", "image", "text 1"], ["image", "text 5"], ["text 12", "image", "text 2"], ["text 1"]]


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(answering, "EVERY", 2)


class Sizes:
    """Counts the sequences of each pass of a text model."""

    def __init__(self, handle):
        self.handle, self.of_passes = handle, []

    def __enter__(self):
        decoder = self.handle.model.get_decoder()
        self.hook = decoder.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def _note(self, module, args, kwargs):
        self.of_passes.append(kwargs["inputs_embeds"].shape[0])

    def __exit__(self, *_):
        self.hook.remove()


def fitting(method):
    """The retentions that a method can have."""
    rule = METHODS[method]
    return ["recoverable", *(["evict"] if rule.name != "dycoke" else []), *([POOL] if rule.decides_while_decoding else [])]


def lengths(rows, ends):
    return [len(answering.until_end(row, ends)) for row in rows]


def some_ends(rows):
    """Up to five tokens by which the rows end at many different times, one of them as late as can be."""
    chance, tokens = random.Random(1), sorted({token for row in rows for token in row})
    tried = [chance.sample(tokens, min(len(tokens), chance.randint(1, 5))) for _ in range(400)]
    return max(tried, key=lambda ends: (len({length for length in lengths(rows, ends) if length > 1}), max(lengths(rows, ends))))


def asked(model, handle, fields, leave, **options):
    """Rows, what is told of each, and the sequences of each pass."""
    processor = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None))
    torch.manual_seed(3)
    with Sizes(handle) as sizes:
        rows = answering.generate(model, processor, fields, MOST, handle=handle if leave else None, **options)
    return rows, [handle.stats(place, len(row)) for place, row in enumerate(rows)], sizes.of_passes


def both(model, handle, fields, monkeypatch, **options):
    """Without leaving, then with it; the tokens that end answers are chosen so that they end at different times."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    whole, _, _ = asked(model, handle, fields, False, **options)
    ends = some_ends(whole)
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    rows, told, sizes = asked(model, handle, fields, False, **options)
    assert len(set(sizes)) == 1 and rows == [answering.until_end(row, ends) for row in whole]
    got, got_told, got_sizes = asked(model, handle, fields, True, **options)
    assert got == rows
    for each, want in zip(got_told, told, strict=True):
        assert_same_stats(each, want)
    assert got_sizes == sorted(got_sizes, reverse=True) and len(got_sizes) == len(sizes)
    assert sum(got_sizes) < sum(sizes), (sizes, got_sizes, list(map(len, rows)))
    return rows, got_sizes


@pytest.mark.parametrize(("method", "retention"), [(method, retention) for method in METHODS for retention in fitting(method)])
def test_every_policy(make_model, monkeypatch, method, retention):
    model = make_model()
    with patched(model, METHODS[method], retention) as handle:
        both(model, handle, models.inputs(model, EIGHT), monkeypatch)


@RETENTION
@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_every_family(make_model, monkeypatch, family, text, retention):
    model = make_model(family, text)
    with patched(model, METHODS["sparsevlm-k2" if retention == "evict" else "dyrate"], retention) as handle:
        both(model, handle, models.inputs(model, [*rows_for(family), *EIGHT[4:]]), monkeypatch)


@RETENTION
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_reducers(make_model, monkeypatch, family, retention):
    model = make_model(family, "llama" if family == "llava" else "own")
    with patched(model, METHODS["fixed"], retention, vision="aim:keep=0.6") as handle:
        both(model, handle, models.inputs(model, EIGHT), monkeypatch)


@RETENTION
def test_importance_is_told_of_each(make_model, monkeypatch, retention):
    model = make_model()
    with patched(model, METHODS["fixed"], retention, record_importance=True) as handle:
        both(model, handle, models.inputs(model, EIGHT), monkeypatch)


def test_samples_are_the_same(make_model, monkeypatch):
    """The random numbers of a step are drawn for the whole batch."""
    model = make_model()
    with patched(model, METHODS["dyrate"]) as handle:
        both(model, handle, models.inputs(model, EIGHT), monkeypatch, sample=True, temperature=1.5)


def test_processors_see_all_sequences(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.3)
    with patched(model, METHODS["dyrate"]) as handle:
        both(model, handle, models.inputs(model, EIGHT), monkeypatch, no_repeat_ngram_size=3)


@pytest.mark.parametrize(
    ("family", "method", "retention"),
    [("llava", method, retention) for method in ("none", "dyrate", "fastv", "depth", "st3") for retention in fitting(method)]
    + [("qwen2_vl", "fixed", retention) for retention in fitting("fixed")],
)
def test_captured_steps(make_model, monkeypatch, family, method, retention):
    """A step is captured anew for each size of the batch, and serves until the next one."""
    model = make_model(family, "llama" if family == "llava" else "own")
    recorder = TapeRecorder()
    monkeypatch.setattr(graph, "recorder_for", lambda device: recorder)
    monkeypatch.setattr(answering, "EVERY", 4)
    fields = models.inputs(model, EIGHT)
    with patched(model, METHODS[method], retention) as handle:
        want, sizes = both(model, handle, fields, monkeypatch)
        told = [handle.stats(place, len(row)) for place, row in enumerate(want)]
    processor = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None))
    with patched(model, METHODS[method], retention, cuda_graph=True) as handle:
        rows = answering.generate(model, processor, fields, MOST, handle=handle)
        assert rows == want and handle.graph.off is None
        for place, row in enumerate(rows):
            assert_same_stats(handle.stats(place, len(row)), told[place])
    steps = [sizes[1:].count(size) for size in dict.fromkeys(sizes[1:])]
    assert handle.graph.captures == sum(count > 1 for count in steps) > 1
    assert handle.graph.replays == len(sizes) - 1 - len(steps)  # all but the first of each size


def test_stop_strings_let_go_as_well(make_model, monkeypatch):
    model = make_model()
    words = SimpleNamespace(decode=lambda row: "".join(f"<{token}>" for token in row), eos_token_id=None)
    fields, processor = models.inputs(model, EIGHT), SimpleNamespace(tokenizer=words)
    with patched(model, METHODS["dyrate"]) as handle:
        whole = answering.generate(model, processor, fields, MOST)
        stop = [f"<{token}>" for token in some_ends(whole)]
        want = answering.generate(model, processor, fields, MOST, stop=stop)
        with Sizes(handle) as sizes:
            assert answering.generate(model, processor, fields, MOST, stop=stop, handle=handle) == want
        assert len(set(map(len, want))) > 2 and sizes.of_passes[-1] < len(EIGHT)


def test_the_rule():
    assert [size for size in range(1, 9) if leaving.worth(8, size)] == [1, 2, 3, 4, 5, 6]
    assert not leaving.worth(8, 0) and not leaving.worth(1, 1)
    sizes, present = [], 32
    while present > 1:
        present = max(size for size in range(1, present) if leaving.worth(present, size))
        sizes.append(present)
    assert sizes == [24, 18, 13, 9, 6, 4, 3, 2, 1]


def test_all_together_is_not_told_once_some_have_left(make_model, monkeypatch):
    model = make_model()
    with patched(model, METHODS["dyrate"]) as handle:
        both(model, handle, models.inputs(model, EIGHT), monkeypatch)
        with pytest.raises(RuntimeError, match=r"of 8 sequences left the batch .* stats\(sequence, new_tokens\)"):
            handle.stats()
        with pytest.raises(ValueError, match=r"sequence must be in \[0, 7\], got 8"):
            handle.stats(8)
        with pytest.raises(ValueError, match="new_tokens must be in"):
            handle.stats(0, MOST + 1)
        model.generate(**models.inputs(model, EIGHT[:2]), max_new_tokens=3)
        assert len(handle.stats().visual_tokens) == 2  # the next one is whole again


def test_where_sequences_do_not_go_on_by_themselves_all_stay(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(3, 50)))
    fields, processor = models.inputs(model, ROWS), SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None))
    with patched(model, METHODS["dyrate"]) as handle:
        for options in ({"num_beams": 2, "num_return_sequences": 1}, {"prompt_lookup_num_tokens": 2}):
            rows = fields if "num_beams" in options else models.inputs(model, ROWS[:1])
            want = answering.generate(model, processor, rows, 9, **options)
            assert answering.generate(model, processor, rows, 9, handle=handle, **options) == want


def test_an_error_half_way_leaves_nothing_behind(make_model, monkeypatch):
    model = make_model()
    fields = models.inputs(model, EIGHT)
    with patched(model, METHODS["dyrate"]) as handle:
        want, sizes = both(model, handle, fields, monkeypatch)
        hooks = list(model._forward_hooks.values())
        last = sizes.index(sizes[-1])

        def fail(input_ids, scores):
            if input_ids.shape[1] - fields["input_ids"].shape[1] == last + 1:
                raise RuntimeError("half way")
            return scores

        with pytest.raises(RuntimeError, match="half way"):
            asked(model, handle, fields, True, logits_processor=[fail])
        assert list(model._forward_hooks.values()) == hooks
        with pytest.raises(RuntimeError, match="it ended with RuntimeError"):
            handle.stats(0)
        assert asked(model, handle, fields, True)[0] == want


def test_flags_of_another_batch_are_refused(make_model):
    model = make_model()
    fields = models.inputs(model, ROWS)
    with patched(model, METHODS["dyrate"]) as handle:
        assert leaving.dismiss(handle, torch.ones(3, dtype=torch.bool)) is False  # outside of a generate()

        def judge(input_ids, scores, **_):
            leaving.dismiss(handle, torch.ones(3, dtype=torch.bool))

        with pytest.raises(ValueError, match=r"ended must be \[4\], a flag for each sequence of this generate\(\), got \[3\]"):
            model.generate(**fields, max_new_tokens=4, stopping_criteria=[judge])


def test_the_bundled_model_captions_as_before(monkeypatch):
    model, processor = dk.load_demo()
    monkeypatch.setattr(answering, "EVERY", 8)
    texts = [chat.render(processor, [chat.user("Describe the picture.", images=1)])] * 8
    fields = chat.encode(processor, texts, [[shapes.draw(shapes.make_scene(seed))] for seed in range(8)], model)
    with dk.patch(model, "dyrate") as handle:
        want = answering.generate(model, processor, fields, 120)
        told = [handle.stats(place, len(row)) for place, row in enumerate(want)]
        with Sizes(handle) as sizes:
            assert answering.generate(model, processor, fields, 120, handle=handle) == want
        for place, row in enumerate(want):
            assert_same_stats(handle.stats(place, len(row)), told[place])
    longest = max(map(len, want))
    assert len(sizes.of_passes) == longest and sum(sizes.of_passes) < 0.95 * 8 * longest


@RETENTION
def test_what_left_counts_where_it_is_told_that_nothing_was_dropped(make_model, monkeypatch, recwarn, retention):
    """The last ones to go on have no picture, so nothing is dropped of theirs."""
    model = make_model()
    fields, processor = models.inputs(model, [*EIGHT[:2], ["text 5"]]), SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None))
    with patched(model, METHODS["fixed"], retention) as handle:
        *first, last = answering.generate(model, processor, fields, MOST)
    ends = [token for row in first for token in row[3:] if token not in last][:6]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    with patched(model, METHODS["fixed"], retention) as handle, Sizes(handle) as sizes:
        answering.generate(model, processor, fields, MOST, handle=handle)
    assert sizes.of_passes[-1] < 3 and not [each for each in recwarn if "nothing was dropped" in str(each.message)]


def test_a_workers_captions_leave_their_batch_on_a_cpu(tmp_path):
    for seed in range(8):
        shapes.draw(shapes.make_scene(seed)).save(tmp_path / f"{seed}.png")
    sources = [Source(f"{seed}", str(tmp_path / f"{seed}.png")) for seed in range(8)]
    found, passes = {}, {}
    for leave in (False, None, True):
        worker = Captioner(Task(max_new_tokens=120, early_leave=leave))
        with Sizes(worker.handle) as sizes:
            found[leave] = [(caption.name, caption.caption, caption.read, caption.tokens) for caption in worker(sources)]
        passes[leave] = sum(sizes.of_passes)
    assert found[None] == found[True] == found[False]
    assert passes[None] == passes[True] < passes[False]


def left(wrapped, handle):
    """Asks without and with leaving for the same answers; returns whether some left."""
    model = handle.model
    fields, processor = models.inputs(model, EIGHT), SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=None))
    model.generation_config.eos_token_id = some_ends(answering.generate(wrapped, processor, fields, MOST))
    want = answering.generate(wrapped, processor, fields, MOST)
    with Sizes(handle) as sizes:
        assert answering.generate(wrapped, processor, fields, MOST, handle=handle) == want
    assert len(set(map(len, want))) > 2
    return sizes.of_passes[-1] < len(EIGHT)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_adapters(task):
    peft = pytest.importorskip("peft")
    model = models.build("llava")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type=task)).eval()
    with patched(wrapped, METHODS["fixed"]) as handle:
        assert left(wrapped, handle)


def test_inputs_that_are_prepared_past_the_patch_keep_their_batch():
    model = models.build("llava")
    with patched(model, METHODS["fixed"]) as handle:
        vars(model)["prepare_inputs_for_generation"] = type(model).prepare_inputs_for_generation.__get__(model)
        assert not left(model, handle)
