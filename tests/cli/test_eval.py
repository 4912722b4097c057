"""``dyrate eval`` from the command line."""

from __future__ import annotations

import json

import pytest

from dyrate_kernels.cli.eval import with_unpruned as contenders
from dyrate_kernels.cli.main import main
from tests.evaluation.datasets_as_published import publish


def run(capsys, *arguments):
    status = main(["eval", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_table_and_files(capsys, tmp_path):
    given = ("--out", str(tmp_path), "--scenes", "3", "--tasks", "describe,shape", "--policies", "fixed:rate=0.9@evict,random:rate=0.5")
    status, out, _ = run(capsys, *given)
    assert status == 0 and "long answers (3 questions" in out and "short answers (3 questions" in out
    names = [".lock", "fixed_rate=0.9@evict.jsonl", "none.jsonl", "random_rate=0.5.jsonl", "table.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    table = json.loads((tmp_path / "table.json").read_text())
    status, out, _ = run(capsys, *given, "--json")  # everything is there already
    assert status == 0 and json.loads(out) == table
    by_name = {(line["label"], line["group"]): line for line in table["lines"]}
    none, fixed = by_name["none", "long"], by_name["fixed_rate=0.9@evict", "long"]
    assert none["retained"] == none["agreement"] == none["kept"] == none["flops_share"] == 1.0 and none["score"] > 0.9
    assert fixed["score"] < none["score"] and fixed["kept"] < 0.11 and fixed["flops_share"] < 0.8 and fixed["kv_bytes"] < none["kv_bytes"]
    assert {line["group"] for line in table["lines"]} == {"long", "short", "describe", "shape"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--policies", "poem"), "policy must be one of"),
        (("--policies", "fixed@never"), "retention must be recoverable, evict or pool"),
        (("--policies", ","), "--policies is empty"),
        (("--policies", "fixed,fixed"), "names one twice"),
        (("--tasks", "poem"), "tasks must be some of"),
        (("--suite", "gpa"), "--suite must be one of shapes, gqa, vizwiz"),
        (("--suite", "gqa"), "--suite gqa needs --data FILE"),
        (("--suite", "gqa", "--data", "nowhere.json"), "nowhere.json: no such file"),
        (("--suite", "gqa", "--data", "x.json", "--tasks", "colour"), "--tasks belongs to shapes, not to --suite gqa"),
        (("--images", "."), "--images belongs to a data set, not to --suite shapes"),
        (("--suite", "gqa", "--data", "x.json", "--images", "nowhere"), "--images nowhere: no such folder"),
        (("--report", "pyproject.toml"), "--report pyproject.toml: is a file; give a folder"),
    ],
)
def test_mistakes(capsys, tmp_path, arguments, words):
    status, _, err = run(capsys, "--out", str(tmp_path / "run"), *arguments)
    assert status == 1 and words in err and len(err.strip().splitlines()) == 1


def test_a_data_set(capsys, tmp_path):
    file, images = publish("pope", tmp_path, 12)
    given = (
        "--out", str(tmp_path / "out"), "--suite", "pope", "--data", str(file), "--images", str(images), "--limit", "4", "--policies",
        "fixed:k=1@evict,downsample,none+random as +random", "--cost", "56",
    )  # fmt: skip
    status, out, err = run(capsys, *given, "--report", str(tmp_path / "report"))
    assert (status, err) == (0, "") and "short answers (4 questions" in out and "none: precision " in out and "f1 " in out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert (table["suite"], table["data"], table["questions"]) == ("pope", "pope.json", 4) and set(table["summary"]["none"]) > {"f1"}
    assert {(line["label"], line["group"]) for line in table["lines"]} == {
        (label, group) for label in ("none", "fixed_k=1@evict@56", "downsample@56", "+random@56") for group in ("short", "pope")
    }
    shares = [line["visual_share"] for line in table["lines"] if line["label"] == "+random@56"]
    assert shares == pytest.approx([0.56] * len(shares), abs=0.01)
    assert table["tuned"]["fixed_k=1@evict@56"]["cost"] == pytest.approx(0.56, abs=0.01)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "pope.json", "pope.md", "pope.png", "pope-curves.json", "pope-curves.png"
    }  # fmt: skip
    assert "# pope: data pope.json, questions 4" in (tmp_path / "report" / "pope.md").read_text()
    status, out, _ = run(capsys, *given, "--json")
    assert status == 0 and json.loads(out) == table
    status, _, err = run(capsys, *given, "--limit", "5")
    assert status == 1 and "tuning needs 8 to 24 questions" in err


def test_captions_are_long_answers(capsys, tmp_path):
    file, images = publish("nocaps", tmp_path)
    given = ("--out", str(tmp_path), "--suite", "nocaps", "--data", str(file), "--images", str(images), "--policies", "random")
    status, out, _ = run(capsys, *given, "--json")
    table = json.loads(out)
    assert status == 0 and "summary" not in table and {line["group"] for line in table["lines"]} == {"long", "in-domain", "out-domain"}


def test_contenders():
    found = contenders("fixed:rate=0.5, schedule:kept=[(0, 50), (3, 20)]@evict")
    assert [c.retention for c in found] == ["recoverable", "recoverable", "evict"]
    assert [c.label for c in contenders("fixed@evict as mine, random:rate=0.1")] == ["none", "mine", "random_rate=0.1"]
    reduced = contenders("none+tome:keep=0.5+aim, fixed:k=2+downsample@evict as mine")
    assert [c.label for c in reduced] == ["none", "none+tome_keep=0.5+aim", "mine"] and reduced[2].retention == "evict"
    assert [[r.name for r in c.vision] for c in reduced] == [[], ["tome", "aim"], ["downsample"]] and reduced[1].vision[0].keep == 0.5
    with pytest.raises(ValueError, match="reducer must be one of|no policy|must be one of"):
        contenders("none+nothing")
    wrapped = contenders("recycle:policy=(fastv:k=2:rate=0.9):share=1, fixed")[1].policy
    assert wrapped.share == 1 and (wrapped.policy.name, wrapped.policy.k, wrapped.policy.rate) == ("fastv", 2, 0.9)
    assert found[2].policy.kept == ((0, 50), (3, 20)) and found[0].policy.name == "none"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"fixed@80": 3}', b"caf\xe9", b""])
def test_damaged_tuning_is_named(capsys, tmp_path, content):
    (tmp_path / "tuned.json").write_bytes(content)
    status, _, err = run(capsys, "--out", str(tmp_path), "--scenes", "2", "--tasks", "colour", "--cost", "80", "--policies", "fixed")
    assert status == 1 and str(tmp_path / "tuned.json") in err and (tmp_path / "tuned.json").read_bytes() == content


def test_a_cost_that_cannot_be_met_is_refused_before_anything_is_asked_or_left_out_by_name(capsys, tmp_path):
    given = ("--out", str(tmp_path), "--scenes", "2", "--tasks", "describe,colour", "--cost", "33.3")
    status, out, err = run(capsys, *given, "--policies", "fixed:k=1,fastv,downsample:side=3 as coarse,vtw@evict")
    words = "fastv cannot cost 33.3 %: pruning from layer 3 of 6 on it costs 50.0 to 100.0 %; with k=1 it can"
    assert status == 1 and words in err and "answers:" not in out
    assert not [*tmp_path.glob("*.jsonl")] and not (tmp_path / "tuned.json").exists()
    status, _, err = run(capsys, "--out", str(tmp_path), "--cost", "57.9", "--policies", "downsample,vtw@evict,none+downsample as +small")
    assert status == 1 and "downsample cannot cost 57.9 %: it would cost 56.2 % with side=9" in err and not [*tmp_path.glob("*.jsonl")]
    assert "vtw@evict cannot cost 57.9 %" in err and "+small cannot cost 57.9 %: it would cost 56.2 %" in err
    report = tmp_path / "report"
    status, out, _ = run(capsys, *given, "--policies", "fixed:k=1,fastv,vtw@evict", "--leave-out", "--report", str(report))
    table = json.loads((tmp_path / "table.json").read_text())
    assert status == 0 and {line["label"] for line in table["lines"]} == {"none", "fixed_k=1@33.3", "vtw@evict@33.3"}
    for line in table["lines"]:  # under recoverable a short answer's prompt, which reads everything, weighs more
        if line["label"] != "none" and line["group"] == "long":
            assert line["visual_share"] == pytest.approx(0.333, abs=0.02)
    short = next(line for line in table["lines"] if line["label"] == "fixed_k=1@33.3" and line["group"] == "short")
    text = (report / "shapes.md").read_text()
    shown = f"fixed_k=1@33.3 (here {100 * short['visual_share']:.1f})"
    assert short["visual_share"] > 0.5 and shown in out and shown in text
    assert len(table["left_out"]) == 1 and table["left_out"][0] in out and table["left_out"][0] in text
    where = "Pruned from layer 1 on: fixed_k=1; from layer 2 on: vtw@evict."
    assert table["first_layers"] == {"fixed_k=1@33.3": 1, "vtw@evict@33.3": 2} and where in out and where in text
    assert "| vtw@evict | - |" in text.partition("## short")[2]


def test_costs_are_those_of_the_tasks_that_are_asked(capsys, tmp_path):
    """Answers of two tokens cost more than long ones, whose prompt weighs less."""
    status, _, err = run(capsys, "--out", str(tmp_path), "--limit", "6", "--tasks", "colour", "--cost", "80", "--policies", "fixed:k=1")
    assert status == 0, err
    lines = [line for line in json.loads((tmp_path / "table.json").read_text())["lines"] if line["label"] != "none"]
    assert {line["label"] for line in lines} == {"fixed_k=1@80"}
    assert all(abs(line["visual_share"] - 0.8) < 0.02 for line in lines)
