"""``dyrate eval --engine vllm`` without vLLM: an engine a row, resuming, refusals by name. What it answers: tests/engines/vllm."""

from __future__ import annotations

import json

import pytest

from dyrate_kernels.bundled import MODEL_FOLDER
from dyrate_kernels.cli.main import main
from dyrate_kernels.engines.vllm import presence
from tests.fake_vllm import KEPT, VISUAL, fake_vllm, tokens_of  # noqa: F401  # a fixture


def evaluate(capsys, out, *more):
    given = ["--out", str(out), "--scenes", "3", "--tasks", "describe", "--engine", "vllm", "--model", str(MODEL_FOLDER)]
    status = main(["eval", *given, *more])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_each_row_has_an_engine_of_its_own(fake_vllm, capsys, tmp_path):  # noqa: F811
    given = ("--policies", "fixed:k=2:rate=0.5,fastv", "--batch-size", "2", "--seed", "7", "--json")
    status, out, err = evaluate(capsys, tmp_path, *given)
    assert status == 0, err
    asked = [made.arguments for made in fake_vllm.made]
    assert [each["additional_config"].get("dyrate", {}).get("policy") for each in asked] == [None, "fixed", "fastv"]
    assert all(each["max_num_seqs"] == 2 and each["seed"] == 7 for each in asked)
    assert all(made.llm_engine.ended for made in fake_vllm.made)
    table = json.loads(out)
    assert (table["engine"], table["batch_size"], table["machine"]["vllm"]) == ("vllm", 2, "0.32.0")
    answers = [json.loads(line) for line in (tmp_path / "fixed_k=2_rate=0.5.jsonl").read_text().splitlines()][1:]
    for answer in answers:
        steps = len(answer["tokens"])
        assert answer["kept"] == pytest.approx((VISUAL + KEPT * (steps - 1)) / (VISUAL * steps))
        assert answer["visual_share"] == pytest.approx(2 / 6 + 4 / 6 * answer["kept"])
    status, again, _ = evaluate(capsys, tmp_path, *given)
    assert status == 0 and json.loads(again) == table and len(fake_vllm.made) == 3  # nothing was left to ask


def test_an_answer_that_cannot_be_had_is_an_error(fake_vllm, capsys, tmp_path):  # noqa: F811
    fake_vllm.broken = (96,)
    status, _, err = evaluate(capsys, tmp_path, "--policies", "fixed")
    assert status == 1 and "96 is too wide" in err and fake_vllm.made[0].llm_engine.ended


REFUSED = [
    (("--policies", "fixed,none+aim:keep=0.5 as small"), "--policies: small: reducers (AIM"),
    (("--policies", "coarse:side=4"), "--policies: coarse_side=4: a coarser picture"),
    (("--policies", "fixed@evict"), "--policies: fixed@evict: retention must be 'recoverable' inside of vLLM"),
    (("--policies", "klguard"), "--policies: klguard: policy 'klguard' cannot run inside of vLLM"),
    (("--cost", "50"), "--cost tunes with models in this process"),
    (("--report", "x"), "--report draws attention that vLLM does not tell"),
    (("--suite", "lmms-eval", "--tasks", "gqa"), "--suite lmms-eval asks models in this process"),
    (("--backend", "reference"), "--backend reference: vLLM chooses by itself"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_what_cannot_be_had_is_refused_by_name(fake_vllm, capsys, tmp_path, arguments, words):  # noqa: F811
    fixed = () if "--policies" in arguments else ("--policies", "fixed")
    status, _, err = evaluate(capsys, tmp_path / "out", *fixed, *arguments)
    assert status == 1 and words in err.splitlines()[-1] and fake_vllm.made == []


def test_vllm_is_named_where_it_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("dyrate_kernels.answering_vllm.has_vllm", lambda: False)
    status, _, err = evaluate(capsys, tmp_path, "--policies", "fixed")
    assert status == 1 and "--engine vllm needs vLLM: pip install 'dyrate-kernels[vllm]'" in err


def test_info_says_that_vllm_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(presence, "has_vllm", lambda: False)
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["vllm"]
    assert found == {
        "version": None, "platform": None, "attention_backends": [], "why_not": "not installed: pip install 'dyrate-kernels[vllm]'"
    }  # fmt: skip


def test_info_says_why_policies_cannot_run(fake_vllm, monkeypatch, capsys):  # noqa: F811
    monkeypatch.undo()
    monkeypatch.setattr(presence, "has_vllm", lambda: True)
    monkeypatch.setattr(presence, "import_vllm", lambda: (_ for _ in ()).throw(ImportError("libcudart.so is not there")))
    assert main(["info"]) == 0
    assert "vllm:       libcudart.so is not there\n" in capsys.readouterr().out
