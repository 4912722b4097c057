"""``dyrate caption --engine vllm`` without vLLM: order, failures, resuming, arguments. What it answers: tests/engines/vllm."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from dyrate_kernels import DyRatePredictor, load_demo, policies, shapes
from dyrate_kernels.answering_vllm import Checkpoint, Setup, sampling
from dyrate_kernels.bundled import MODEL_FOLDER
from dyrate_kernels.captioning import inputs, on_ray, run, vllm_on_ray
from dyrate_kernels.captioning.captioner import Task
from dyrate_kernels.cli.main import main
from dyrate_kernels.engines.vllm import presence
from tests.fake_vllm import KEPT, VISUAL, fake_vllm, tokens_of  # noqa: F401  # a fixture

PICTURES = 90


@pytest.fixture
def folder(tmp_path):
    """Pictures of one colour each, some of them broken, one that the engine refuses."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number in range(PICTURES):
        wide = 77 if number == 20 else 10
        Image.new("RGB", (wide, 10), (number, 2 * number % 256, 255 - number)).save(place / f"{number:03}.png")
    for number in (0, 7, 8, PICTURES - 1):
        (place / f"{number:03}.png").write_bytes(b"no picture")
    return place


@pytest.fixture
def few(tmp_path):
    """Two pictures."""
    place = tmp_path / "few"
    place.mkdir()
    for number in range(2):
        Image.new("RGB", (10, 10), (number, 9, 9)).save(place / f"{number}.png")
    return place


def task(max_new_tokens=2):
    return Task(model=str(MODEL_FOLDER), policy=policies.get("fixed", k=2, rate=0.75), max_new_tokens=max_new_tokens)


def caption(capsys, folder, out, *more):
    status = main(["caption", "--images", str(folder), "--out", str(out), "--engine", "vllm", "--model", str(MODEL_FOLDER), *more])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def lines(out):
    return [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()][1:]


def test_captions_come_in_the_order_of_the_pictures(fake_vllm, folder, tmp_path):  # noqa: F811
    fake_vllm.broken = (77,)
    report = run.run(task(), inputs.find(str(folder)), tmp_path / "out", engine="vllm")
    found = lines(tmp_path / "out")
    assert [line["name"] for line in found] == [f"{number:03}.png" for number in range(PICTURES)]
    assert report["failures"] == {"not a picture": 4, "model": 1} and "77 is too wide" in found[20]["error"]
    processor = load_demo()[1]
    layers = 4 / 6  # of the bundled model's, from layer 2 on
    for number, line in enumerate(found):
        if line["error"] is None:
            tokens = tokens_of(Image.open(folder / f"{number:03}.png"))[:2]
            share = (VISUAL + KEPT * (len(tokens) - 1)) / (VISUAL * len(tokens))
            assert line["caption"] == processor.decode(tokens, skip_special_tokens=True).strip()
            assert (line["tokens"], line["visual_tokens"]) == (len(tokens), VISUAL)
            assert line["read"] == pytest.approx(VISUAL * (1 - layers * (1 - share)))
    (made,) = fake_vllm.made
    assert made.llm_engine.ended and 3 < made.llm_engine.most_seen <= 6  # no more pictures are held than the engine has use for


def test_a_caption_without_room_for_its_end_is_a_failure(fake_vllm, few, tmp_path):  # noqa: F811
    fake_vllm.cut = (10,)
    report = run.run(task(max_new_tokens=9), inputs.find(str(few)), tmp_path / "out", engine="vllm")
    assert report["failures"] == {"model": 2}
    assert "max_model_len: 40 tokens of the prompt leave room for 1 of 9 new ones" in lines(tmp_path / "out")[0]["error"]


def test_a_run_that_died_goes_on(fake_vllm, folder, tmp_path):  # noqa: F811
    out, sources = tmp_path / "out", inputs.find(str(folder))
    fake_vllm.dies_after = 72
    with pytest.raises(RuntimeError, match="the engine is dead"):
        run.run(task(), sources, out, engine="vllm")
    done = len(lines(out))
    assert 60 <= done < PICTURES and fake_vllm.made[0].llm_engine.ended
    fake_vllm.dies_after = None
    report = run.run(task(), sources, out, engine="vllm")
    assert report["new"] == PICTURES - done and len({line["name"] for line in lines(out)}) == len(lines(out)) == PICTURES


def test_an_engine_is_asked_for_what_the_options_say(fake_vllm, capsys, few, tmp_path):  # noqa: F811
    given = (
        "--policy", "fastv:k=2:rate=0.5", "--batch-size", "5", "--engine-option", "max_model_len=512", "--engine-option",
        "enforce_eager=True",
    )  # fmt: skip
    status, _, err = caption(capsys, few, tmp_path / "out", *given, "--json")
    assert status == 0, err
    asked = fake_vllm.made[0].arguments
    assert asked["additional_config"] == {
        "dyrate": {"policy": "fastv", "retention": "recoverable", "k": 2, "rate": 0.5, "ranking": "last"}
    }  # fmt: skip
    assert (asked["dtype"], asked["max_num_seqs"], asked["max_model_len"], asked["enforce_eager"]) == ("float32", 5, 512, True)
    status, _, err = caption(capsys, few, tmp_path / "dense", "--policy", "none")
    assert status == 0 and fake_vllm.made[1].arguments["additional_config"] == {}
    assert all(line["read"] == line["visual_tokens"] for line in lines(tmp_path / "dense"))


def test_a_checkpoints_generation_defaults_are_followed_or_named():
    checkpoint = Checkpoint(str(MODEL_FOLDER))
    checkpoint.generation_config.update(min_new_tokens=9, repetition_penalty=1.3, stop_strings=["a."], eos_token_id=[2, 7], do_sample=True)
    found = sampling(checkpoint, 4)
    assert (found["temperature"], found["max_tokens"], found["min_tokens"], found["repetition_penalty"]) == (0.0, 4, 4, 1.3)
    assert (found["stop"], found["stop_token_ids"], found["ignore_eos"]) == (["a."], [2, 7], True)
    checkpoint.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ValueError, match="no_repeat_ngram_size=3: expected none that vLLM cannot follow"):
        sampling(checkpoint, 4)


REFUSED = [
    (("--policy", "klguard"), "policy 'klguard' cannot run inside of vLLM: it reads the model's logits"),
    (("--policy", "fastv:ranking=mean"), "policy 'fastv' cannot run inside of vLLM"),
    (("--policy", "dyrate"), "its predictor reads hidden states"),  # the bundled one does
    (("--retention", "evict"), "retention must be 'recoverable' inside of vLLM"),
    (("--retention", "pool=0.5"), "retention must be 'recoverable' inside of vLLM"),
    (("--vision", "aim:keep=0.5"), "--vision AIM"),
    (("--early-leave",), "--early-leave: vLLM lets captions"),
    (("--no-early-leave",), "--early-leave: vLLM lets captions"),
    (("--quantize", "int8"), "--quantize int8: vLLM chooses by itself"),
    (("--device", "cpu"), "--device cpu: vLLM chooses by itself"),
    (("--backend", "reference"), "--backend reference: vLLM chooses by itself"),
    (("--workers", "2"), "--workers goes with --engine ray, or with --engine vllm on a cluster"),
    (("--compare-dense", "2"), "--compare-dense measures models in this process"),
    (("--engine-option", "seed=3"), "--engine-option: seed cannot be set"),
    (("--engine-option", "seed"), "--engine-option must be NAME=VALUE"),
    (("--batch-size", "2", "--engine-option", "max_num_seqs=3"), "are one setting of engine vllm"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_cannot_be_had_is_refused_by_name(fake_vllm, capsys, few, tmp_path, arguments, words):  # noqa: F811
    fixed = () if "--policy" in arguments else ("--policy", "fixed")
    status, _, err = caption(capsys, few, tmp_path / "out", *fixed, *arguments)
    assert status == 1 and words in err.splitlines()[-1] and fake_vllm.made == []


def test_the_bundled_model_and_options_of_other_engines_are_refused(capsys, few, tmp_path):
    status = main(["caption", "--images", str(few), "--out", str(tmp_path / "out"), "--engine", "vllm"])
    assert status == 1 and "--engine vllm needs --model" in capsys.readouterr().err
    given = ["--engine", "local", "--engine-option", "max_model_len=3"]
    status = main(["caption", "--images", str(few), "--out", str(tmp_path / "out"), *given])
    assert status == 1 and "--engine-option goes with --engine vllm, not with local" in capsys.readouterr().err


def test_vllm_is_named_where_it_is_missing(monkeypatch, capsys, few, tmp_path):
    monkeypatch.setattr("dyrate_kernels.answering_vllm.has_vllm", lambda: False)
    status, _, err = caption(capsys, few, tmp_path / "out")
    assert status == 1 and "--engine vllm needs vLLM: pip install 'dyrate-kernels[vllm]'" in err and len(err.splitlines()) == 1


def test_another_version_is_refused(fake_vllm, monkeypatch, capsys, few, tmp_path):  # noqa: F811
    monkeypatch.setattr(presence.import_vllm(), "__version__", "0.40.1")
    status, _, err = caption(capsys, few, tmp_path / "out", "--policy", "fixed")
    assert status == 1 and "vllm: expected a version from 0.32 to 0.33" in err and "got 0.40.1" in err


def test_an_engine_without_the_plug_in_is_refused(fake_vllm, monkeypatch, capsys, few, tmp_path):  # noqa: F811
    """It would ignore the policy, and nobody would know."""
    monkeypatch.setattr(presence, "state", lambda: {"why_not": "the plug-in is not loaded (VLLM_PLUGINS=)"})
    status, _, err = caption(capsys, few, tmp_path / "out", "--policy", "fixed")
    assert status == 1 and "--engine vllm cannot prune here: the plug-in is not loaded" in err and fake_vllm.made == []


def test_a_policys_object_is_no_configuration():
    checkpoint = Checkpoint(str(MODEL_FOLDER))
    predictor = DyRatePredictor(checkpoint.shape.num_heads, (0.5, 0.9), k=2)
    with pytest.raises(TypeError, match="policy 'dyrate': predictor must be a number, text or a list for vLLM"):
        Setup(checkpoint, policies.get("dyrate", k=2, predictor=predictor))


# -- on a cluster ----------------------------------------------------------------------------------------------------------------------


def test_rows_of_a_cluster_hold_what_the_engine_is_asked(folder):
    reads, ask = vllm_on_ray._Read(task()), vllm_on_ray._Ask([5, 3, 6], {"max_tokens": 2, "stop_token_ids": [2]})
    rows = on_ray.rows_of(inputs.find(str(folder)).sources[:3])
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    found = reads(batch)
    assert found["name"] == ["000.png", "001.png", "002.png"] and found["kind"] == ["not a picture", "", ""]
    asked = [ask({name: values[number] for name, values in found.items()}) for number in range(3)]
    assert asked[0]["tokenized_prompt"] == [2] and asked[0]["sampling_params"] == {"max_tokens": 1} and "multimodal_data" not in asked[0]
    (picture,) = asked[1]["multimodal_data"]["image"]
    assert picture.tobytes() == Image.open(folder / "001.png").convert("RGB").tobytes()
    assert asked[1]["tokenized_prompt"] == [5, 3, 6] and asked[1]["sampling_params"]["max_tokens"] == 2


def test_answers_of_a_cluster_become_captions():
    checkpoint = Checkpoint(str(MODEL_FOLDER))
    good = vllm_on_ray._kept_columns(
        {"name": "a", "kind": "", "words": "", "prompt_token_ids": [3, 3, 9], "generated_tokens": [8, 2], "__inference_error__": ""}
    )
    bad = vllm_on_ray._kept_columns({"name": "b", "kind": "empty", "words": "no bytes", "generated_tokens": [1]})
    wrong = vllm_on_ray._kept_columns({"name": "c", "kind": "", "words": "", "__inference_error__": "ValueError: too long"})
    rules = {"max_tokens": 4, "stop": [], "stop_token_ids": [2]}
    found = [vllm_on_ray._caption(row, checkpoint, 0.5, rules) for row in (good, bad, wrong, good | {"tokens": [8, 9]})]
    assert (found[0].visual_tokens, found[0].read, found[0].tokens, found[0].seconds) == (2, None, 2, 0.5) and found[0].caption
    assert found[3].error == (
        "ValueError: max_model_len: 3 tokens of the prompt leave room for 2 of 4 new ones; give --engine-option max_model_len=N"
    )
    assert (found[1].kind, found[1].error, found[2].kind, found[2].error) == ("empty", "no bytes", "model", "ValueError: too long")


def test_a_cluster_without_room_for_an_engine_is_refused():
    assert vllm_on_ray._room({"GPU": 8.0}, {"tensor_parallel_size": 2}, None) == 4
    with pytest.raises(ValueError, match="an engine of vLLM needs 2 GPUs, the cluster has 1"):
        vllm_on_ray._room({"GPU": 1.0}, {"tensor_parallel_size": 2}, None)


def test_a_report_without_what_was_read(tmp_path):
    line = {"name": "a", "caption": "x", "error": None, "kind": None, "visual_tokens": 4, "read": None, "tokens": 1}
    assert run.report([line], inputs.Sources([], None, 0), 1, 1.0)["visual_rows_read"] is None
    assert run.report([line, line | {"read": 3.0}], inputs.Sources([], None, 0), 1, 1.0)["visual_rows_read"] == 0.75


def test_pictures_are_drawn_apart():
    """The fake's tokens tell them apart, else an order would be none."""
    found = {tuple(tokens_of(shapes.draw(shapes.make_scene(seed)).convert("RGB"))) for seed in range(20)}
    assert len(found) > 10
