"""The lmms-eval plugin against a stand-in for lmms-eval: the same answers as the model alone, costs of every request, nothing swallowed."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
from PIL import Image

import dyrate_kernels as dk
from dyrate_kernels import chat, shapes
from dyrate_kernels.cli.main import main
from dyrate_kernels.evaluation.runner import Contender
from tests.evaluation import fake_lmms_eval as fake

P = dk.policies


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.fixture(scope="module")
def plugin():
    with pytest.MonkeyPatch.context() as patch:
        fake.install(patch)
        yield importlib.import_module("dyrate_kernels.evaluation.lmms")
    sys.modules.pop("dyrate_kernels.evaluation.lmms", None)


DOCS = [{"scene": -8_000_000 - i, "ask": "Describe the picture." if i % 3 else "How many objects are there?"} for i in range(5)]


def visual(doc):
    return [shapes.draw(shapes.make_scene(doc["scene"]), 96)]


def requests(generation=None, docs=DOCS, visual=visual, context=None, task="drawn"):
    generation = {"max_new_tokens": 12, "temperature": 0, "until": []} if generation is None else generation
    return [
        fake.Instance("generate_until", (context or doc["ask"], dict(generation), visual, i, task, "test"), 0) for i, doc in enumerate(docs)
    ]


def ask(plugin, demo, given, policy=None, **options):
    model = plugin.PatchedModel.of(*demo, Contender("it", policy or P.KeepAll()), **options)
    model.task_dict["drawn"] = {"test": DOCS}
    return model.generate_until(given), model


def alone(demo, doc, most):
    model, processor = demo
    text = chat.render(processor, [chat.user(doc["ask"], images=1)])
    inputs = processor(images=visual(doc), text=text, return_tensors="pt")
    row = model.generate(**inputs, do_sample=False, max_new_tokens=most)[0, inputs["input_ids"].shape[1] :].tolist()
    return processor.decode(row, skip_special_tokens=True).strip(), len(row)


def test_pictures_are_read_as_everywhere(plugin, demo):
    """16 bits a channel, which Pillow's own conversion clips, and EXIF's orientation."""
    ramp = Image.fromarray((np.arange(96 * 96) * 7).astype("uint16").reshape(96, 96))
    turned = shapes.draw(shapes.make_scene(3), 96)
    turned.getexif()[0x0112] = 6
    for picture, wanted in ((ramp, np.repeat((np.asarray(ramp) >> 8)[..., None], 3, 2)), (turned, np.rot90(np.asarray(turned), -1))):
        model = plugin.PatchedModel.of(*demo, Contender("it", P.KeepAll()))
        model.task_dict["drawn"] = {"test": DOCS}
        item = model._item(requests(visual=lambda doc, picture=picture: [picture])[0])
        assert np.array_equal(item.images[0], wanted)
    floating = Image.fromarray(np.zeros((8, 8), "float32"))
    with pytest.raises(OSError, match="task drawn, document 0: its picture cannot be read .*floating point"):
        model._item(requests(visual=lambda doc: [floating])[0])


def test_answers_and_costs(plugin, demo, tmp_path):
    answers, model = ask(plugin, demo, requests(), batch_size=3, stats=tmp_path / "a" / "stats.jsonl")
    for doc, answer, one in zip(DOCS, answers, model.answered, strict=True):
        text, tokens = alone(demo, doc, 12)
        assert (answer.text, answer.token_counts.output_tokens) == (one.text, one.new_tokens) == (text, tokens)
    lines = [json.loads(line) for line in (tmp_path / "a" / "stats.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"setting"} and sorted(line["doc_id"] for line in lines[1:]) == [0, 1, 2, 3, 4]
    for line in lines[1:]:
        assert (line["task"], line["visual_tokens"], line["kept_mean"], line["rate"]) == ("drawn", 144, 1.0, 0.0)
        assert line["ttft_seconds"] > 0 and line["seconds_per_token"] > 0 and line["kv_bytes"] > 0
    seconds, tokens, speed, more = fake.LOGGED[-1]
    assert (
        tokens == sum(line["new_tokens"] for line in lines[1:]) and speed == pytest.approx(tokens / seconds) and more["num_requests"] == 5
    )
    assert seconds == pytest.approx(sum(line["seconds"] for line in lines[1:])) and more["ttft_seconds"] > 0
    assert not hasattr(demo[0], "_dyrate_handle")


def test_costs_are_those_of_the_policy_and_of_the_sequence(plugin, demo):
    fastv = P.FastV(k=2, rate=0.75)
    _, together = ask(plugin, demo, requests(), fastv, batch_size=5)
    _, single = ask(plugin, demo, requests(), fastv, batch_size=1)
    for a, b in zip(together.answered, single.answered, strict=True):
        for name in ("key", "text", "new_tokens", "prompt_tokens", "kept_mean", "rate", "kv_bytes"):
            assert getattr(a, name) == getattr(b, name), name
    assert len({one.new_tokens for one in single.answered}) > 1  # of different lengths
    assert all(one.kept_mean < 0.4 and 0.6 < one.rate <= 0.75 for one in single.answered if one.new_tokens > 8)


def test_stop_strings(plugin, demo):
    whole, _ = ask(plugin, demo, requests())
    for until in (" in", [" in", "never said"]):
        answers, model = ask(plugin, demo, requests({"max_new_tokens": 12, "until": until}), batch_size=5)
        for before, after, one in zip(whole, answers, model.answered, strict=True):
            assert after.text == before.text.split(" in")[0].strip()
            if " in" in before.text:
                assert one.new_tokens < before.token_counts.output_tokens
    one_token, model = ask(plugin, demo, requests({"max_new_tokens": 1}))
    assert all(one.new_tokens == 1 and one.seconds_per_token is None for one in model.answered) and len(one_token) == 5


def test_groups_and_order(plugin, demo):
    short, long = requests({"max_new_tokens": 2}), requests({"max_new_tokens": 9, "do_sample": False, "num_beams": 1, "top_p": 1.0})
    mixed = [request for pair in zip(short, long, strict=True) for request in pair]
    answers, model = ask(plugin, demo, mixed, batch_size=4)
    assert [one.new_tokens <= 2 for one in model.answered][::2] == [True] * 5
    assert [a.text for a in answers[1::2]] == [alone(demo, doc, 9)[0] for doc in DOCS]


def test_sampling_and_pictures_within_the_text(plugin, demo):
    sampled, _ = ask(plugin, demo, requests({"max_new_tokens": 12, "temperature": 5.0, "do_sample": True}))
    assert [a.text for a in sampled] != [alone(demo, doc, 12)[0] for doc in DOCS]
    inside = plugin.PatchedModel.of(*demo, Contender("it", P.KeepAll()))
    inside.task_dict["drawn"] = {"test": DOCS}
    (request,) = requests(docs=DOCS[:1], visual=lambda doc: visual(doc) * 2, context="First <image> then <image> and?")
    kinds = [part.get("text", part["type"]) for part in inside._item(request).messages[0]["content"]]
    assert kinds == ["First", "image", "then", "image", "and?"]
    answers, model = ask(plugin, demo, requests(visual=lambda doc: None))  # no picture at all
    assert [one.visual_tokens for one in model.answered] == [0] * 5 and len(answers) == 5


def test_an_error_loses_nothing(plugin, demo, tmp_path):
    path = tmp_path / "stats.jsonl"
    whole, _ = ask(plugin, demo, requests(), P.Fixed(k=2, rate=0.5))

    def breaks(doc):
        if doc is DOCS[3]:
            raise OSError("picture 3 is truncated")
        return visual(doc)

    with pytest.raises(OSError, match=r"task drawn, document 3: its picture cannot be read \(picture 3 is truncated\)"):
        ask(plugin, demo, requests(visual=breaks), P.Fixed(k=2, rate=0.5), stats=path, batch_size=1)
    assert len(path.read_text().splitlines()) == 4 and not hasattr(demo[0], "_dyrate_handle")
    before = path.read_text()
    answers, _ = ask(plugin, demo, requests(), P.Fixed(k=2, rate=0.5), stats=path, batch_size=2)
    assert [a.text for a in answers] == [a.text for a in whole]
    assert path.read_text().startswith(before) and len(path.read_text().splitlines()) == 6
    with pytest.raises(ValueError, match="holds answers of"):
        ask(plugin, demo, requests(), P.Fixed(k=2, rate=0.25), stats=path)
    path.write_text(path.read_text() + '{"key": "x"}\n')
    with pytest.raises(ValueError, match=r"stats.jsonl line 7 is no answer"):
        ask(plugin, demo, requests(), P.Fixed(k=2, rate=0.5), stats=path)


@pytest.mark.parametrize(
    "given, words",
    [
        (requests({"num_beams": 3}), "num_beams must be 1"),
        (requests({"poem": 3, "until": ["."]}), "poem not supported"),
        (requests({"max_new_tokens": 0}), "max_new_tokens must be at least 1, got 0"),
        (requests(visual=lambda doc: ["film.mp4"]), "task drawn, document 0: dyrate takes pictures"),
        (requests(context="a <image> and <image>"), "has 2 <image> marks for 1 pictures"),
    ],
)
def test_what_a_task_may_not_ask(plugin, demo, given, words):
    with pytest.raises(ValueError, match=words):
        ask(plugin, demo, given)


def test_not_supported(plugin, demo):
    model = plugin.PatchedModel.of(*demo, Contender("it", P.KeepAll()))
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="one round"):
        model.generate_until_multi_round([])


def test_options_as_the_command_line_gives_them(plugin):
    model = plugin.PatchedModel(
        pretrained="demo", policy="schedule", kept="[(0, 50), (3, 20)]", k=2, retention="evict", batch_size="4", device="cpu"
    )
    assert model.contender.policy == P.Schedule(k=2, kept=[(0, 50), (3, 20)]) and model.contender.retention == "evict"
    assert model.batch_size == 4 and model.setting["retention"] == "evict" and model.is_simple
    for options in ({"retention": "pool=0.5:by=uniform"}, {"retention": "pool", "pool": "0.5", "pool_by": "uniform"}):
        assert plugin.PatchedModel(policy="fixed", device="cpu", **options).setting["retention"] == "pool=0.5:by=uniform"
    manifest = plugin.manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert manifest.model_id == "dyrate" and getattr(importlib.import_module(module), name) is plugin.PatchedModel
    for options, error, words in (
        ({"rat": 0.5}, TypeError, "dyrate has no option 'rat'; it has pretrained, policy"),
        ({"policy": "poem"}, ValueError, "policy must be one of"),
        ({"policy": "fastv", "rate": 2}, ValueError, "rate must be in"),
        ({"retention": "never"}, ValueError, "retention must be recoverable, evict or pool"),
        ({"pool": "0.5"}, ValueError, "pool goes with retention='pool' alone"),
        ({"retention": "pool", "policy": "vtw"}, ValueError, "retention='pool' needs a policy"),
        ({"batch_size": "auto"}, ValueError, "batch_size must be an integer"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer"),
        ({"policy": "vtw", "k": 99}, ValueError, "k"),
        ({"pretrained": "/nowhere"}, ValueError, "no such folder"),
    ):
        with pytest.raises(error, match=words):
            plugin.PatchedModel(device="cpu", **options)


@pytest.fixture
def tasks(monkeypatch):
    def task(docs, most):
        return fake.Task(docs, lambda doc: doc["ask"], visual, lambda doc, text: float("objects" in text), {"max_new_tokens": most})

    monkeypatch.setattr(fake, "TASKS", {"drawn": task(DOCS, 6), "drawn_short": task(DOCS[:2], 1), "nothing": task([], 4)})


CONTENDERS = [Contender("none", P.KeepAll()), Contender("fixed@evict", P.Fixed(k=2, rate=0.9), "evict")]


def test_evaluate(plugin, demo, tmp_path, tasks, monkeypatch):
    said = []
    found = plugin.evaluate(*demo, CONTENDERS, ["drawn", "drawn_short"], tmp_path, batch_size=3, progress=said.append)
    assert said == ["drawn: none", "drawn: fixed@evict", "drawn_short: none", "drawn_short: fixed@evict"]
    assert {p.name for p in tmp_path.iterdir()} == {
        f"{label}.{task}.{kind}" for label in ("none", "fixed@evict") for task in ("drawn", "drawn_short") for kind in ("json", "jsonl")
    }
    none, fixed = found["none"]["drawn"], found["fixed@evict"]["drawn"]
    assert none["metrics"] == {"accuracy": [pytest.approx(0.6), None]} and none["costs"]["questions"] == 5
    assert none["costs"]["kept_mean"] == none["costs"]["flops_share"] == 1.0 and fixed["costs"]["kept_mean"] < 0.12
    assert fixed["costs"]["flops_share"] < 0.8 and found["none"]["drawn_short"]["costs"]["seconds_per_token"] is None
    monkeypatch.setattr("lmms_eval.evaluator.simple_evaluate", None)
    assert plugin.evaluate(*demo, CONTENDERS, ["drawn", "drawn_short"], tmp_path) == found  # nothing is run again
    monkeypatch.undo()


def test_a_killed_evaluation_goes_on(plugin, demo, tmp_path, tasks, monkeypatch):
    whole = plugin.evaluate(*demo, CONTENDERS, ["drawn"], tmp_path / "whole", batch_size=1)
    asked = []
    original = plugin.PatchedModel._ask

    def killed(self, *given):
        asked.append(given)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return original(self, *given)

    monkeypatch.setattr(plugin.PatchedModel, "_ask", killed)
    with pytest.raises(KeyboardInterrupt):
        plugin.evaluate(*demo, CONTENDERS, ["drawn"], tmp_path / "killed", batch_size=1)
    again = plugin.evaluate(*demo, CONTENDERS, ["drawn"], tmp_path / "killed", batch_size=1)
    assert len(asked) == 8 + 3  # two of the second policy's five answers were there
    assert {label: by["drawn"]["metrics"] for label, by in again.items()} == {label: by["drawn"]["metrics"] for label, by in whole.items()}
    fewer = plugin.evaluate(*demo, CONTENDERS, ["drawn"], tmp_path / "killed", limit=2)
    assert fewer["none"]["drawn"]["costs"]["questions"] == 2 and len(asked) == 11


def test_mistakes(plugin, demo, tmp_path, tasks):
    with pytest.raises(ValueError, match="lmms-eval knows no task 'drwan'; alike: drawn"):
        plugin.evaluate(*demo, CONTENDERS, ["drwan"], tmp_path)
    with pytest.raises(ValueError, match="task nothing has no questions"):
        plugin.evaluate(*demo, CONTENDERS, ["nothing"], tmp_path)
    with pytest.raises(ValueError, match="include_path .*nowhere: no such folder"):
        plugin.evaluate(*demo, CONTENDERS, ["drawn"], tmp_path, include_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="coarser picture"):
        plugin.evaluate(*demo, [Contender("downsample", P.KeepAll(), side=6)], ["drawn"], tmp_path)
    (tmp_path / "none.drawn.json").write_text("{nonsense")
    with pytest.raises(ValueError, match=r"none.drawn.json holds no results"):
        plugin.evaluate(*demo, CONTENDERS, ["drawn"], tmp_path)


def test_command(plugin, capsys, tmp_path, tasks):
    given = [
        "eval",
        "--suite",
        "lmms-eval",
        "--tasks",
        "drawn,drawn_short",
        "--policies",
        "fixed:k=2:rate=0.9@evict",
        "--out",
        str(tmp_path),
    ]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "drawn (5 questions)" in out and "accuracy" in out and "drawn_short (2 questions)" in out and "TTFT ms" in out
    assert main([*given, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table == json.loads((tmp_path / "table.json").read_text()) and set(table["policies"]) == {"none", "fixed_k=2_rate=0.9@evict"}
    for more, words in (
        (("--tasks", "drwan"), "knows no task 'drwan'"),
        (("--tasks", ","), "needs --tasks A,B"),
        (("--cost", "30"), "--cost is not there for --suite lmms-eval"),
        (("--data", "x.json"), "--data belongs to a data set"),
        (("--policies", "fixed as " + "x" * 245), "File name too long); give another file; ' as NAME' names a row"),
    ):
        assert main([*given, *more]) == 1
        assert words in capsys.readouterr().err
    assert main([*given[:-1], str(tmp_path / "fewer"), "--limit", "1"]) == 0
    assert "drawn (1 questions)" in capsys.readouterr().out


def test_command_without_lmms_eval(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["eval", "--suite", "lmms-eval", "--tasks", "gqa", "--out", str(tmp_path)]) == 1
    assert "pip install 'dyrate-kernels[lmms-eval]'" in capsys.readouterr().err
