"""How a command generates: one answer a prompt, as long as it is, whatever a checkpoint's generation defaults are."""

import contextlib
import io
import json
import warnings

import pytest
import torch
from transformers import GenerationConfig

import dyrate_kernels as dk
from dyrate_kernels import answering, chat, shapes
from dyrate_kernels.cli.main import main
from dyrate_kernels.demo.engine import Engine, Wish
from dyrate_kernels.evaluation.curves import measure
from dyrate_kernels.evaluation.runner import Contender, ask_all, encode
from dyrate_kernels.evaluation.suite import ShapesSuite, Subset
from dyrate_kernels.training.data import ShapesSource
from dyrate_kernels.training.layer_search import search_layer

MOST = 14
ODD = {
    "several sequences": {"num_return_sequences": 2, "do_sample": True, "temperature": 3.0},
    "a dict": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "beams": {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True, "length_penalty": 0.5},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "lengths": {"max_length": 5, "min_new_tokens": 400, "max_time": 1e-9},
    "no cache": {"use_cache": False},
    "a static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 8},
    "guidance": {"guidance_scale": 3.0},
    "healing": {"token_healing": True},
}


@pytest.fixture
def demo():
    return dk.load_demo()


@pytest.fixture(scope="module")
def plain():
    model, processor = dk.load_demo()
    return answers(model, processor)


def suite():
    return Subset(ShapesSuite(2, tasks=("describe", "colour")), [0, 1, 2, 3])


def answers(model, processor, most=MOST):
    items = [suite()[place] for place in range(4)]
    inputs = encode(processor, items, model)
    with dk.patch(model, dk.policies.Fixed(k=1, rate=0.5)) as handle:
        rows = answering.generate(model, processor, inputs, most)
        return rows, [round(handle.stats(place, len(row)).kept_mean, 6) for place, row in enumerate(rows)]


@pytest.mark.parametrize("odd", ODD)
def test_a_checkpoints_odd_defaults_change_no_answer(demo, plain, odd):
    model, processor = demo
    for name, value in ODD[odd].items():
        setattr(model.generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows, kept = answers(model, processor)
    if odd == "lengths":  # as many as the checkpoint wants at least, but no more than the command allows
        assert [len(row) for row in rows] == [MOST] * 4
        return
    assert (rows, kept) == plain


def test_every_command_answers_under_a_checkpoints_odd_defaults(demo, tmp_path):
    model, processor = demo
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    for odd in ("several sequences", "a dict", "beams", "lookup", "lengths", "no cache"):
        config |= ODD[odd]
    (folder / "generation_config.json").write_text(json.dumps(config))
    shapes.draw(shapes.make_scene(3)).save(tmp_path / "a.png")
    shared = ["--model", str(folder), "--json"]
    picture = ["--image", str(tmp_path / "a.png"), "--max-new-tokens", "4"]
    for given in (
        ["generate", *picture],
        ["compare", *picture, "--policies", "none,fixed:k=1:rate=0.5"],
        ["eval", "--out", str(tmp_path / "eval"), "--scenes", "1", "--tasks", "colour", "--policies", "fixed:k=1:rate=0.5"],
        ["calibrate", "--samples", "1"],
        ["caption", "--images", str(tmp_path), "--out", str(tmp_path / "out"), "--engine", "local", "--max-new-tokens", "4"],
    ):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main([*given, *shared]) == 0
        found = json.loads(said.getvalue())
        if given[0] == "compare":
            assert found["policies"][0]["agreement"] == 1.0
        if given[0] == "generate":
            assert found["new_tokens"] <= 4
        if given[0] == "caption":
            assert found["captioned"] == found["pictures"] == 1


def test_the_search_the_page_and_the_curves_generate_the_same_way(demo):
    model, processor = demo
    engine = Engine(model, processor)
    picture = shapes.draw(shapes.make_scene(3))

    def found():
        last = [*engine.compare(picture, Wish("Describe the picture.", max_new_tokens=6))][-1]
        curves = measure(model, processor, Subset(ShapesSuite(1, tasks=("colour",)), [0]), [1], least=1)
        divergence = search_layer(model, processor, ShapesSource(2), samples=1).divergence
        return last.plain.text, last.pruned.text, curves[0].answers, divergence

    want = found()
    for name, value in {"num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True, "do_sample": True}.items():
        setattr(model.generation_config, name, value)
    assert found() == want


@pytest.mark.slow
def test_an_answers_length_does_not_depend_on_its_batch(demo):
    """Several end tokens, of which one pads, or none; and strings that end an answer."""
    model, processor = demo
    tokenizer = processor.tokenizer
    free, _ = answers(model, processor, 40)
    common = [token for token in free[0] if all(token in row for row in free[:2])][2]
    for end, pad in (([2, common], 2), ([common, 2], 0), ([2, common], common), (common, common), ([2, 3], 0)):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
        _same_alone(model, processor, 40)
    model.generation_config.eos_token_id = 2
    words = tokenizer.decode(free[0], skip_special_tokens=True).split()
    for stop, pad in ((words[3], 0), ([words[3], "nowhere"], 2)):
        model.generation_config.stop_strings, model.generation_config.pad_token_id = stop, pad
        rows = _same_alone(model, processor, 40)
        text = tokenizer.decode(rows[0], skip_special_tokens=True)
        assert words[3] in text and len(rows[0]) < len(free[0])


def _same_alone(model, processor, most):
    """The rows; each with its costs is that of its question asked alone."""
    contender = Contender("x", dk.policies.Fixed(k=1, rate=0.5))
    questions = suite()
    rows = {}
    for size in (4, 1):
        for answer in ask_all(model, processor, questions, contender, batch_size=size):
            told = (answer.tokens, round(answer.kept, 9), round(answer.visual_share, 9), answer.flops, answer.text)
            assert rows.setdefault(answer.item, told) == told
    together, _ = answers(model, processor, most)
    for place, row in enumerate(together):
        inputs = encode(processor, [questions[place]], model)
        with dk.patch(model, contender.policy):
            assert answering.generate(model, processor, inputs, most) == [row]
        assert len(set(row[:-1]) & set(answering.end_ids(model))) == 0
    return together


def test_a_checkpoint_that_names_no_end_ends_at_its_tokenizers(demo, plain):
    model, processor = demo
    model.generation_config.eos_token_id = None
    assert answers(model, processor) == plain


def test_the_prompt_is_no_place_for_a_stop_string(demo):
    model, processor = demo
    model.generation_config.stop_strings = ["ASSISTANT:"]
    text = chat.render(processor, [chat.user("Describe the picture.", images=1)])
    inputs = chat.encode(processor, [text], [[shapes.draw(shapes.make_scene(3))]], model)
    assert len(answering.generate(model, processor, inputs, 6)[0]) == 6


def test_what_is_not_followed_is_told(demo):
    model, _ = demo
    assert answering.overridden(model) == {}
    model.generation_config.num_beams, model.generation_config.do_sample = 4, True
    assert answering.overridden(model) == {"num_beams": 4, "do_sample": True}
    assert answering.overridden(model, sample=True) == {"num_beams": 4}
    assert answering.settings(model, 5) == {"max_new_tokens": 5, "do_sample": False, "num_beams": 1}
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        answering.settings(model, 0)


def test_sampling_needs_a_temperature_above_zero(demo):
    model, processor = demo
    model.generation_config = GenerationConfig(**model.generation_config.to_dict() | {"temperature": 0.0})
    inputs = encode(processor, [suite()[0]], model)
    torch.manual_seed(0)
    assert len(answering.generate(model, processor, inputs, 3, sample=True)[0]) <= 3
