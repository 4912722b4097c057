"""``dyrate eval`` from the command line."""

from __future__ import annotations

import json

import pytest

from dyrate_kernels.cli.eval import contenders
from dyrate_kernels.cli.main import main


def run(capsys, *arguments):
    status = main(["eval", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_table_and_files(capsys, tmp_path):
    given = ("--out", str(tmp_path), "--scenes", "3", "--tasks", "describe,shape", "--policies", "fixed:rate=0.9@evict,random:rate=0.5")
    status, out, _ = run(capsys, *given)
    assert status == 0 and "long answers (3 questions" in out and "short answers (3 questions" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fixed_rate=0.9@evict.jsonl", "none.jsonl", "random_rate=0.5.jsonl", "table.json"]
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
        (("--policies", "fixed@never"), "retention must be recoverable or evict"),
        (("--policies", "none"), "--policies is empty"),
        (("--policies", "fixed,fixed"), "names one twice"),
        (("--tasks", "poem"), "tasks must be some of"),
        (("--scenes", "0"), "scenes must be at least 1"),
        (("--batch-size", "0"), "--batch-size"),
    ],
)
def test_mistakes(capsys, tmp_path, arguments, words):
    status, _, err = run(capsys, "--out", str(tmp_path / "run"), *arguments)
    assert status == 1 and words in err and len(err.strip().splitlines()) == 1


def test_contenders():
    found = contenders("fixed:rate=0.5, schedule:kept=[(0, 50), (3, 20)]@evict")
    assert [c.retention for c in found] == ["recoverable", "recoverable", "evict"]
    assert [c.label for c in contenders("fixed@evict as mine, random:rate=0.1")] == ["none", "mine", "random_rate=0.1"]
    wrapped = contenders("recycle:policy=(fastv:k=2:rate=0.9):share=1, fixed")[1].policy
    assert wrapped.share == 1 and (wrapped.policy.name, wrapped.policy.k, wrapped.policy.rate) == ("fastv", 2, 0.9)
    assert found[2].policy.kept == ((0, 50), (3, 20)) and found[0].policy.name == "none"
