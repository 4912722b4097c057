"""One option means the same in every command, names of files are looked at before the model runs, and first lines say what is done."""

from __future__ import annotations

import argparse
import json
import os
import xml.etree.ElementTree

import pytest

import dyrate_kernels as dk
from dyrate_kernels import shapes
from dyrate_kernels.cli import common, contenders
from dyrate_kernels.cli.main import COMMANDS, build_parser, main
from dyrate_kernels.training.predictor_training import train_predictor

P = dk.policies


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.fixture(autouse=True)
def one_model(demo, monkeypatch):
    monkeypatch.setattr("dyrate_kernels.load_demo", lambda *_: demo)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    shapes.draw(shapes.make_scene(-4)).save(path)
    return str(path)


def run(capsys, *arguments):
    try:
        status = main(list(arguments))
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def subcommands(parser):
    """Name -> parser; empty where there are none."""
    return next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


def options():
    """command -> option -> action."""
    commands = subcommands(build_parser())
    return {name: {option: action for action in each._actions for option in action.option_strings} for name, each in commands.items()}


def test_an_option_of_several_commands_has_one_type_and_one_way_to_write_it():
    every = options()
    for option, holders in {
        "--limit": ("eval", "train", "calibrate", "caption"), "--images": ("eval", "train", "calibrate"), "--policies": ("eval", "compare"),
        "--seed": ("eval", "train", "calibrate", "generate", "compare"), "--batch-size": ("eval", "caption"),
    }.items():  # fmt: skip
        found = [every[name][option] for name in holders]
        assert len({(action.type, action.metavar) for action in found}) == 1, option
        if option in ("--images", "--seed"):
            assert len({(action.help, action.default) for action in found}) == 1
        if option == "--policies":
            assert all(action.help.startswith(contenders.HELP) for action in found)
    assert every["eval"]["--limit"] is every["eval"]["--scenes"]
    assert every["train"]["--limit"] is every["train"]["--examples"] and every["calibrate"]["--limit"] is every["calibrate"]["--samples"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_what_all_have(command):
    parser = subcommands(build_parser())[command]
    for each in subcommands(parser).values() or [parser]:  # `dyrate bench` has commands of its own
        assert {"--json", "--debug"} <= set(each._option_string_actions), f"{each.prog}: add_parser must call common.add_common(parser)"


@pytest.mark.parametrize("command", ["eval", "train", "calibrate", "caption", "generate", "compare"])
def test_a_wrong_number_is_refused_in_the_same_words(capsys, tmp_path, picture, command):
    given = {
        "eval": ("--out", str(tmp_path)), "train": ("--out", str(tmp_path), "--target-keep", "0.5"), "calibrate": (),
        "caption": ("--images", str(tmp_path), "--out", str(tmp_path)), "generate": ("--image", picture), "compare": ("--image", picture),
    }[command]  # fmt: skip
    if command not in ("generate", "compare"):
        for value, words in (("0", "must be at least 1, got 0"), ("-3", "must be at least 1, got -3"), ("x", "integer at least 1, got")):
            status, _, err = run(capsys, command, *given, "--limit", value)
            assert status == 2 and "--limit" in err and words in err
    if command != "caption":
        for value in ("-1", "1000000", "x"):
            status, _, err = run(capsys, command, *given, "--seed", value)
            assert status == 2 and "in [0, 999999], got" in err


def test_a_limit_takes_the_first_examples_of_any_source(tmp_path):
    entries = [{"image": f"{n}.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]}
               for n in range(5)]  # fmt: skip
    (tmp_path / "set.json").write_text(json.dumps(entries))
    parser = build_parser()
    given = ["train", "--out", str(tmp_path), "--target-keep", "0.5"]
    for limit in (2, 5, 9):
        shared = [*given, "--limit", str(limit)]
        assert len(common.open_source(parser.parse_args([*shared, "--data", str(tmp_path / "set.json")]), 4000)) == min(limit, 5)
        assert len(common.open_source(parser.parse_args(shared), 4000)) == limit
    assert len(common.open_source(parser.parse_args(given), 4000)) == 4000
    first = common.First(list("abc"), 2)
    assert list(first) == ["a", "b"] and len(first) == 2


@pytest.mark.parametrize("command", ["train", "calibrate", "eval"])
def test_images_belong_to_a_file_and_must_be_a_folder(capsys, tmp_path, command):
    given = {"train": ("--out", str(tmp_path), "--target-keep", "0.5"), "calibrate": (), "eval": ("--out", str(tmp_path))}[command]
    status, _, err = run(capsys, command, *given, "--images", str(tmp_path))
    assert status == 1 and "--images belongs to" in err and "leave it out" in err
    (tmp_path / "set.json").write_text("[]")
    of_file = ("--data", str(tmp_path / "set.json"), *(("--suite", "gqa") if command == "eval" else ()))
    status, _, err = run(capsys, command, *given, *of_file, "--images", str(tmp_path / "nowhere"))
    assert status == 1 and "nowhere: no such folder; give the one with the pictures that" in err
    if command != "eval":
        status, _, err = run(capsys, command, *given, "--data", str(tmp_path / "GONE.NDJSON"), "--images", str(tmp_path))
        assert status == 1 and "GONE.NDJSON: no such file" in err


@pytest.mark.parametrize("command", ["compare", "eval"])
def test_policies_have_one_grammar(capsys, tmp_path, picture, command):
    given = ("compare", "--image", picture, "--max-new-tokens", "3") if command == "compare" else (
        "eval", "--out", str(tmp_path), "--limit", "1", "--tasks", "colour")  # fmt: skip
    for text, words in (
        ("", "--policies is empty; name at least one"), ("fixed,fixed", "--policies names one twice: fixed,fixed"),
        ("fixed@never", "--policies: retention must be recoverable, evict or pool, got 'never'"), ("poem", "policy must be one of"),
        ("downsample:side=0", "downsample takes one option, side"), ("fixed:rate", "policy options are NAME=VALUE, got 'rate'"),
        ("none+poem", "reducer must be one of"), ("fixed as none", "'none' is the unpruned model's row; give 'fixed' another name"),
        ("none+random as none", "'none' is the unpruned model's row"), ("downsample as none", "'none' is the unpruned model's row"),
    ):  # fmt: skip
        status, _, err = run(capsys, *given, "--policies", text)
        assert status == 1 and words in err, text
    text = "none,fixed:k=1:rate=0.5@evict as mine,downsample:side=6,none+random:keep=0.5 as +half"
    status, out, _ = run(capsys, *given, "--policies", text, "--json")
    found = json.loads(out)
    coarse = "downsample:side=6" if command == "compare" else "downsample_side=6"  # there it names a file
    assert status == 0 and list(found["settings"]) == ["none", "mine", coarse, "+half"]
    assert found["settings"]["mine"]["retention"] == "evict" and found["settings"]["mine"]["options"] == {"rate": 0.5}
    if command == "compare":
        coarse = found["policies"][2]
        assert (coarse["visual_tokens_in"], coarse["visual_tokens"]) == (144, 36) and coarse["paper_cost"] < 0.5


@pytest.mark.parametrize("spec", ["fixed:k=1:rate=0.75", "fixed"])
def test_a_policy_is_named_alike_alone(capsys, picture, spec):
    more = () if ":" in spec else ("--k", "1", "--rate", "0.75")
    status, out, _ = run(capsys, "generate", "--image", picture, "--policy", spec, *more, "--max-new-tokens", "3", "--json")
    assert status == 0 and json.loads(out)["steps"][1]["kept"] == [36]


@pytest.mark.parametrize("ending", ["png", "PNG", "svg", "pdf", "jpg", "webp"])
def test_the_plot_that_is_reported_is_the_file_that_was_written(capsys, picture, tmp_path, ending):
    path = tmp_path / f"kept.x.{ending}"
    status, out, _ = run(capsys, "generate", "--image", picture, "--max-new-tokens", "3", "--plot", str(path), "--json")
    assert status == 0 and json.loads(out)["plot"] == str(path) and [*tmp_path.iterdir()] == [path]
    begin = {"png": b"\x89PNG", "pdf": b"%PDF", "jpg": b"\xff\xd8", "webp": b"RIFF"}.get(ending.lower())
    assert path.read_bytes().startswith(begin) if begin else xml.etree.ElementTree.parse(path)


@pytest.mark.parametrize(
    "name, words",
    [
        ("kept", "the name has no ending; its ending chooses the format, one of .*png.*svg"),
        ("kept.poem", "the name ends in .poem; its ending chooses the format"),
        (".png", "the name has no ending"),
        ("kept.", "the name has no ending"),
        ("nowhere/kept.png", "the folder .*nowhere does not exist"),
        ("folder.png", "is a folder"),
        ("new.png/", "cannot be written"),
    ],
)
def test_a_plot_that_cannot_be_is_refused_before_the_model_runs(capsys, picture, tmp_path, monkeypatch, name, words):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(common, "load_model", lambda given: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=f"--plot .*{words}"):
        main(["generate", "--image", picture, "--plot", f"{tmp_path}/{name}", "--debug"])
    assert [each.name for each in tmp_path.iterdir()] == ["folder.png"]


def test_files_of_the_other_commands_are_looked_at_before_the_model_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_model", lambda given: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "report" / "shapes.md").mkdir(parents=True)
    (tmp_path / "report2" / "shapes-curves.png").mkdir(parents=True)
    (tmp_path / "out" / "table.json").mkdir(parents=True)
    for name in ("training.json", "dyrate_predictor.safetensors", "training.part"):
        (tmp_path / name / name).mkdir(parents=True)
    (tmp_path / "rows" / "fixed.jsonl").mkdir(parents=True)
    (tmp_path / "rows" / "fixed_k=1@80.jsonl").mkdir()
    fine = str(tmp_path / "fine")
    for given, words in (
        (("eval", "--out", str(tmp_path / "file")), "--out .*file: is a file; give a folder"),
        (("eval", "--out", str(tmp_path / "out")), "--out .*table.json: is a folder"),
        (("eval", "--out", fine, "--report", str(tmp_path / "report")), "--report .*shapes.md: is a folder"),
        (("eval", "--out", fine, "--report", str(tmp_path / "report2")), "--report .*shapes-curves.png: is a folder"),
        (("eval", "--out", str(tmp_path / "rows"), "--policies", "fixed"), "--policies .*fixed.jsonl: is a folder.*' as NAME' names a row"),
        (("eval", "--out", str(tmp_path / "rows"), "--policies", "fixed:k=1", "--cost", "80"), "--policies .*@80.jsonl: is a folder"),
        (("eval", "--out", str(tmp_path / "rows"), "--policies", "random", "--cost", "80", "--also", "fixed"), "fixed.jsonl: is a folder"),
        (("eval", "--out", fine, "--policies", "fastv as " + "x" * 300), "--policies .*File name too long.*' as NAME' names a row"),
        (("eval", "--out", fine, "--policies", f"dyrate:predictor=/{'x/' * 150}"), "--policies .*File name too long"),
        (("eval", "--out", fine, "--policies", "fixed:k=1", "--cost", "80", "--also", "random as fixed_k=1@80"), "two rows of one name"),
        (("eval", "--out", fine, "--policies", "fixed:k=1", "--cost", "80,80.00000001"), "--cost names one twice"),
        (("train", "--out", str(tmp_path / "file" / "x"), "--target-keep", "0.5"), "--out .*x: cannot be written"),
        (("train", "--out", str(tmp_path / "training.json"), "--target-keep", "0.5"), "--out .*: training.json is a folder, but"),
        (("train", "--out", str(tmp_path / "training.part"), "--target-keep", "0.5"), "--out .*: training.part is a folder, but"),
        (("train", "--out", str(tmp_path / "dyrate_predictor.safetensors"), "--target-keep", "0.5"), "safetensors is a folder, but"),
        (("bench", "e2e", "--out", str(tmp_path)), "--out .*: is a folder"),
        (("bench", "e2e", "--out", str(tmp_path / "no" / "x.json")), "the folder .*no does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            main([*given, "--debug"])


def test_eval_and_train_refuse_a_folder_that_another_run_writes_to(capsys, demo, tmp_path):
    from dyrate_kernels.files import locked

    with locked(tmp_path):
        given = ("--out", str(tmp_path), "--limit", "1", "--tasks", "colour", "--policies", "fixed")
        status, _, err = run(capsys, "eval", *given)
        assert (status, err) == (1, f"dyrate: error: another run is writing to {tmp_path}; wait for it, or give another --out\n")
        with pytest.raises(RuntimeError, match="another run is writing to"):
            train_predictor(*demo, [], tmp_path, None)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert run(capsys, "eval", *given)[0] == 0


def test_the_first_lines_say_which_predictor_and_which_defaults(capsys, demo, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    quick = ("--image", picture, "--max-new-tokens", "2")
    status, out, _ = run(capsys, "generate", *quick)
    first = out.splitlines()[0]
    start = "with:       dyrate, k=1 of 6 layers, rates 0.4 0.6 0.8 0.9 1.0, spread 1.0, predictor trained, of "
    assert status == 0 and first.startswith(start)
    assert first.endswith("the bundled model, retention recoverable, backend reference")
    status, out, _ = run(capsys, "generate", *quick, "--retention", "evict", "--json")
    found = json.loads(out)["settings"]
    assert (found["policy"], found["k"], found["retention"], found["backend"]) == ("dyrate", 3, "evict", "reference")
    assert found["predictor"] == "closed form: a trained one in the model's folder is for retention recoverable"
    assert found["options"]["rates"] == [0.0, 0.2, 0.4, 0.6, 0.8]
    status, out, _ = run(capsys, "compare", *quick, "--policies", "dyrate:predictor=closed-form,vtw,recycle")
    lines = out.splitlines()
    assert lines[0].startswith("saved:")  # what was bought comes first, what ran last
    lines = lines[lines.index("settings:") + 1 :]
    assert "predictor closed form, as asked for" in lines[0] and lines[1].startswith("vtw: vtw, k=3 of 6 layers, retention recoverable")
    assert lines[2].startswith("recycle: recycle, k=1 of 6 layers, policy dyrate") and "predictor trained, of" in lines[2]
    status, out, _ = run(capsys, "eval", "--out", str(tmp_path), "--limit", "1", "--tasks", "colour", "--policies", "fastv")
    assert out.splitlines()[:2] == [
        "none: every visual token, retention recoverable, backend reference",
        "fastv: fastv, k=3 of 6 layers, rate 0.5, ranking last, retention recoverable, backend reference",
    ]
    status, out, _ = run(capsys, "calibrate", "--limit", "1")
    assert out.startswith("with:       vtw, every k from 1 to 5, retention evict")
    (tmp_path / "pictures").mkdir()
    shapes.draw(shapes.make_scene(1)).save(tmp_path / "pictures" / "a.png")
    given = ("caption", "--images", str(tmp_path / "pictures"), "--engine", "local", "--max-new-tokens", "2", "--policy", "fixed")
    _, _, err = run(capsys, *given, "--out", str(tmp_path / "out"))
    dk.unpatch(demo[0])  # which the worker patched for as long as it lives
    assert "with fixed, k=3 of 6 layers, rate 0.5, retention recoverable, backend reference" in err.splitlines()[1]


def test_a_model_without_a_trained_predictor_says_so(demo):
    config = type(demo[0].config).from_dict(demo[0].config.to_dict())
    config._name_or_path = ""
    found = contenders.settings(config, P.get("dyrate"), "recoverable", "auto", "cpu")
    assert found["predictor"] == "closed form: the model's folder holds no trained one (dyrate train makes one)"
    found = contenders.settings(config, P.get("dyrate", num_rates=4), "recoverable", "auto", "cpu")
    assert found["predictor"] == "closed form, of the rates asked for"


def test_generation_defaults_that_are_not_followed_are_told(capsys, demo, picture, monkeypatch):
    monkeypatch.setattr(demo[0].generation_config, "num_beams", 4)
    monkeypatch.setenv("COLUMNS", "400")
    status, out, _ = run(capsys, "generate", "--image", picture, "--max-new-tokens", "2")
    assert status == 0 and out.splitlines()[1] == "but:        the checkpoint's num_beams=4 not followed: one greedy answer a prompt"
    status, out, _ = run(capsys, "compare", "--image", picture, "--max-new-tokens", "2", "--policies", "fixed", "--json")
    assert "num_beams=4" in json.loads(out)["not_followed"]


def test_a_run_in_which_no_picture_can_be_read_fails(capsys, demo, tmp_path):
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red one."}]
    entries = [{"image": f"{n}.png", "conversations": said} for n in range(3)]
    words = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Nobody at all."}]}
    for name, content in (("all", entries), ("words", [*entries, words])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    questions = [{"question_id": n, "image": f"{n}.png", "text": "Is it red?", "label": "yes"} for n in range(3)]
    (tmp_path / "pope.json").write_text("\n".join(map(json.dumps, questions)))
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(b"\x89PNG nothing")
    quick = ("--steps", "1", "--batch-size", "1", "--target-keep", "0.5", "--k", "1")
    for given, why in (
        (("train", "--out", str(tmp_path / "a"), "--data", str(tmp_path / "all.json"), *quick), "none of the 3 examples can be used"),
        (("train", "--out", str(tmp_path / "b"), "--data", str(tmp_path / "words.json"), *quick), "none of the 4 examples has a picture"),
        (("calibrate", "--data", str(tmp_path / "words.json")), "none of the 4 examples can be used"),
        (("eval", "--out", str(tmp_path / "c"), "--suite", "pope", "--data", str(tmp_path / "pope.json"), "--policies", "fixed"), "0.png"),
    ):
        status, _, err = run(capsys, *given)
        assert status == 1 and why in err, err
        assert dk.patching.api._HANDLE not in vars(demo[0])
    assert not (tmp_path / "a" / "dyrate_predictor.json").exists() and not (tmp_path / "b" / "dyrate_predictor.json").exists()


@pytest.mark.parametrize("policy, retention", [("vtw", "pool"), ("recycle", "evict")])
def test_a_retention_that_a_policy_cannot_have_is_refused_at_once(capsys, picture, tmp_path, monkeypatch, policy, retention):
    monkeypatch.setattr("dyrate_kernels.captioning.run.run", lambda *_, **__: pytest.fail("an engine was started"))
    asked = ("--engine", "ray", "--policy", policy, "--retention", retention)
    status, _, err = run(capsys, "caption", "--images", os.path.dirname(picture), "--out", str(tmp_path), *asked)
    assert status != 0 and policy in err and retention in err and "Traceback" not in err
