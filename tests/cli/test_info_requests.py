"""``dyrate info``: what it predicts of whole requests, and by which rates."""

from __future__ import annotations

import json

import pytest

from dyrate_kernels import flops, policies, request_model, specs
from dyrate_kernels.cli.main import main
from dyrate_kernels.measuring import timing
from dyrate_kernels.request_model import Plan


def told(capsys, *arguments: str) -> dict:
    assert main(["info", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["requests"]


def test_each_row_is_the_models(capsys):
    arguments = [
        "--config",
        "llava-next-7b",
        "--batch",
        "1",
        "32",
        "--new-tokens",
        "64",
        "256",
        "--text",
        "64",
        "--policy",
        "fixed:k=2:rate=0.75",
    ]
    found = told(capsys, *arguments)
    rates = request_model.named_rates("h200")
    assert found["prediction"] and (found["bandwidth"], found["flops_per_s"]) == (rates.bandwidth, rates.flops) == (4.28e12, 989e12)
    assert (found["kept"], found["kept_is_assumed"], found["k"], found["visual_tokens"]) == (0.25, False, 2, 2880)
    cases = [(batch, tokens, name) for batch in (1, 32) for tokens in (64, 256) for name in ("dense", *specs.RETENTIONS)]
    assert [(row["batch"], row["new_tokens"], row["retention"]) for row in found["rows"]] == cases
    for row in found["rows"]:
        request = request_model.named_request("llava-next-7b", row["batch"], row["new_tokens"], text=64)
        want = request_model.predict(request, Plan(row["retention"], 2, 0.25), rates)
        assert json.loads(json.dumps(want.to_dict())) == {name: row[name] for name in want.to_dict()}
    once = told(capsys, "--batch", "1", "--policy", "fastv:k=2:rate=0.75")  # what decides once has no pool
    assert [row["retention"] for row in once["rows"]] == ["dense", "recoverable", "evict"]


def test_rates_are_given_measured_or_a_devices(capsys, monkeypatch):
    found = told(capsys, "--batch", "1", "--bandwidth", "100", "--tflops", "2", "--kept", "0.5", "--retention", "recoverable")
    assert (found["bandwidth"], found["flops_per_s"], found["rates"], found["kept"]) == (1e11, 2e12, "given", 0.5)
    assert [row["retention"] for row in found["rows"]] == ["dense", "recoverable"]
    found = told(capsys, "--batch", "1", "--device", "a100", "--tflops", "2")
    assert (found["bandwidth"], found["flops_per_s"]) == (2039e9, 2e12) and found["rates"].endswith("; tflops given")
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: (3e9, None))
    monkeypatch.setattr(timing, "product_rate", lambda: (5e9, None))
    found = told(capsys, "--batch", "1", "--measure")
    assert (found["bandwidth"], found["flops_per_s"]) == (3e9, 5e9) and "measured here" in found["rates"]


def test_what_is_assumed_is_said(capsys):
    def printed(*arguments):
        assert main(["info", "--batch", "1", *arguments]) == 0
        return " ".join(capsys.readouterr().out.split())  # wherever lines fold

    found = printed()
    assert "predicted, not measured: what dyrate takes" in found and "20.0 % kept (assumed, --kept says another)" in found
    assert "a falling share kept rates:" in printed("--policy", "schedule")
    assert "k=8, 50.0 % kept (the most that it keeps in any layer and step: it may take less" in printed("--policy", "pyramiddrop")


@pytest.mark.parametrize("policy", ["fastv", "vtw", "pyramiddrop", "sparsevlm", "aim", "depth", "none"])
def test_what_is_predicted_is_what_a_patched_model_would_do(capsys, policy):
    """Its own first pruned layer, nothing left out of a prompt that it leaves whole, and a bound only where it is one."""
    found = told(capsys, "--batch", "1", "--new-tokens", "2", "--policy", policy)
    bound = policies.parse(policy).bind(flops.named_model("llava-1.5-7b").shape)
    assert found["k"] == bound.layer_groups(32)[0]
    rows = {row["retention"]: row for row in found["rows"]}
    assert found["kept_is_most"] == (policy not in ("fastv", "vtw", "none"))
    assert (rows["evict"]["prefill"]["flops"] < rows["dense"]["prefill"]["flops"]) == (policy != "none")
    if policy == "none":
        assert all(row["prefill"] == rows["dense"]["prefill"] and row["kv_bytes"] == rows["dense"]["kv_bytes"] for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h300"], "device must be one of h200"),
        (["--device", "h200", "--measure"], "--measure takes the rates of this machine"),
        (["--kept", "2"], "--kept must be in [0, 1], got 2.0"),
        (["--pool", "0"], "--pool: pool must be a number in (0, 1]"),
        (["--pool", "nan"], "--pool: pool must be a number in (0, 1]"),
        (["--policy", "dyrate:k=40"], "k must be in [1, 31] for a model of 32 layers, got 40"),
        (["--tflops", "0"], "--tflops must be above 0 and finite, got 0.0"),
        (["--bandwidth", "inf"], "--bandwidth must be above 0 and finite, got inf"),
        (["--policy", "fastw"], "policy must be one of"),
        (["--policy", "klguard", "--retention", "evict"], "policy 'klguard' brings tokens back, which retention='evict' cannot"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["info", *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


def test_the_rate_of_a_product_is_that_of_its_flops(monkeypatch):
    """By a clock that says how long one product took."""
    monkeypatch.setattr(timing, "_time_on_host", lambda calls, count: (calls[0](), timing.Times(0.5, 0.5, 0.5))[1])
    rate, times = timing.product_rate.__wrapped__(size=64)
    assert rate == 2 * 64**3 / 0.5 and times.median == 0.5
