"""The runner: right answers at the right cost, whatever the batch; nothing that was computed is lost."""

from __future__ import annotations

import json
import os

import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels.evaluation import runner, suites
from dyrate_kernels.evaluation.runner import Contender, run
from dyrate_kernels.evaluation.suite import ShapesSuite
from dyrate_kernels.measuring import timing
from tests.evaluation.datasets_as_published import publish

P = dk.policies


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.fixture(scope="module")
def suite():
    return ShapesSuite(4, tasks=("describe", "colour"))


def test_answers_do_not_depend_on_the_batch(demo, suite, tmp_path):
    contender = Contender("fixed", P.Fixed(k=2, rate=0.6), "evict")
    one = run(*demo, suite, contender, tmp_path / "one", batch_size=1)
    all_ = run(*demo, suite, contender, tmp_path / "all", batch_size=4)
    assert len({len(answer.tokens) for answer in one if answer.group == "describe"}) > 1  # some end before others
    assert [a.batch for a in one] == [1] * 8 and [a.batch for a in all_] == [4] * 8
    weights = dk.flops.weight_bytes(P.ModelShape.from_config(demo[0].config))
    steps = [max(len(a.tokens) - 1 for a in one if a.group == group) for group in ("describe", "colour")]
    rows = sum(a.read - weights * (len(a.tokens) - 1) for a in one)  # one by one, each step of a sequence reads the weights
    assert sum(a.read for a in all_) == pytest.approx(weights * sum(steps) + rows)
    assert all(a.seconds > 0 and a.first > 0 for a in all_)
    bandwidth, _ = timing.copy_bandwidth(device=demo[0].device)  # what bench e2e prints, too
    assert all(a.floor * bandwidth == pytest.approx(a.read) for a in one) and 1e8 < bandwidth < 1e13
    for a, b in zip(one, all_, strict=True):
        assert (a.item, a.tokens, a.right, a.kept, a.n, a.kv_bytes) == (b.item, b.tokens, b.right, b.kept, b.n, b.kv_bytes)
        assert a.flops == pytest.approx(b.flops, rel=1e-12) and a.paper_cost == pytest.approx(b.paper_cost, rel=1e-12)


def test_unpruned_is_the_model_itself(demo, suite, tmp_path):
    model, processor = demo
    answers = run(*demo, suite, Contender("none", P.KeepAll()), tmp_path)
    for index in (0, 5):
        item = suite[index]
        inputs = runner.encode(processor, [item])
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=item.most)[0, inputs["input_ids"].shape[1] :].tolist()
        assert answers[index].tokens == tokens and (answers[index].right, answers[index].total) == suite.score(index, answers[index].text)
        assert answers[index].kept == 1.0 and answers[index].paper_cost == 1.0 and answers[index].flops == answers[index].flops_unpruned
    assert sum(a.right for a in answers) / sum(a.total for a in answers) > 0.9


def test_costs_of_reducers_are_shares_of_the_unreduced_model(demo, suite, tmp_path):
    """Against the same tokens counted by hand: 72 of 144 before the language model, then a half of those in layers >= 2 of 6."""
    half = dk.vision.get("uniform", keep=0.5)
    whole = run(*demo, suite, Contender("none", P.KeepAll()), tmp_path)
    alone = run(*demo, suite, Contender("alone", P.KeepAll(), vision=(half,)), tmp_path)
    both = run(*demo, suite, Contender("both", P.Fixed(k=2, rate=0.5), "evict", vision=(half,)), tmp_path)
    shape = P.ModelShape.from_config(demo[0].config)
    width, inner = shape.hidden_size, shape.intermediate_size

    def layer(n):
        return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * inner

    for one, other, unpruned in zip(alone, both, whole, strict=True):
        assert (one.kept, one.visual_share, one.n) == (0.5, 0.5, unpruned.n)
        assert (other.kept, other.n) == (0.25, unpruned.n) and other.visual_share == pytest.approx((2 * 0.5 + 4 * 0.25) / 6)
        for answer, kept in ((one, [72, 72]), (other, [72, 36])):
            steps, text = len(answer.tokens), answer.n - 144
            lengths = [[count + text + step for step in range(steps)] for count in kept]
            full = [144 + text + step for step in range(steps)]
            want = sum((2 * layer(a) + 4 * layer(b)) / (6 * layer(n)) for a, b, n in zip(*lengths, full, strict=True)) / steps
            assert answer.paper_cost == pytest.approx(want)
            if len(answer.tokens) == len(unpruned.tokens):
                assert answer.flops_unpruned == pytest.approx(unpruned.flops)
    with pytest.raises(ValueError, match="holds answers of"):
        run(*demo, suite, Contender("alone", P.KeepAll()), tmp_path)


def test_a_killed_run_goes_on(demo, suite, tmp_path, monkeypatch):
    contender = Contender("fastv", P.FastV(k=2, rate=0.5))
    whole = run(*demo, suite, contender, tmp_path / "whole", batch_size=2)
    asked = []
    original = runner._ask

    def ask(model, processor, handle, suite, part, side):
        asked.append(len(part))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(model, processor, handle, suite, part, side)

    monkeypatch.setattr(runner, "_ask", ask)
    with pytest.raises(KeyboardInterrupt):
        run(*demo, suite, contender, tmp_path / "killed", batch_size=2)
    path = tmp_path / "killed" / "fastv.jsonl"
    assert len(path.read_text().splitlines()) == 5  # the setting and two batches
    with path.open("a") as file:
        file.write('{"item": "cut')  # a kill in the middle of a line
    asked.clear()
    asked += [0, 0, 0]
    again = run(*demo, suite, contender, tmp_path / "killed", batch_size=2)
    assert asked[3:] == [2, 2]
    assert [a.tokens for a in again] == [a.tokens for a in whole]
    assert [json.loads(line)["item"] for line in path.read_text().splitlines()[1:]] == [suite[i].name for i in range(8)]
    assert run(*demo, suite, contender, tmp_path / "killed") == again and len(asked) == 5  # nothing left to ask
    with pytest.raises(ValueError, match="holds answers of"):
        run(*demo, suite, Contender("fastv", P.FastV(k=2, rate=0.25)), tmp_path / "killed")


def test_answers_of_another_model_or_data_set_are_not_taken_for_this_ones(demo, suite, tmp_path):
    """Folders of one name, weights that were rounded while they were loaded, files whose questions have the same numbers."""
    contender, model = Contender("none", P.KeepAll()), demo[0]
    part = ShapesSuite(1, tasks=("colour",))
    original = model.config._name_or_path
    try:
        for name in ("a", "b"):
            (tmp_path / name / "final").mkdir(parents=True)
        model.config._name_or_path = str(tmp_path / "a" / "final")
        run(*demo, part, contender, tmp_path / "out")
        model.config._name_or_path = os.path.relpath(tmp_path / "a" / "final")
        run(*demo, part, contender, tmp_path / "out")  # the same folder by another name
        model.config._name_or_path = str(tmp_path / "b" / "final")
        with pytest.raises(ValueError, match="holds answers of .*/a/final .*this run is of .*/b/final "):
            run(*demo, part, contender, tmp_path / "out")
        model.config._name_or_path = str(tmp_path / "a" / "final")
        for rounded in ({"quant_method": "torchao", "bits": 8}, {"quant_method": "torchao", "bits": 4}):
            model.config.quantization_config = rounded
            with pytest.raises(ValueError, match="holds answers of .*this run is of .* torchao "):
                run(*demo, part, contender, tmp_path / "out")
            run(*demo, part, contender, tmp_path / f"bits {rounded['bits']}")
        with pytest.raises(ValueError, match="torchao .*this run is of .* torchao "):
            run(*demo, part, contender, tmp_path / "bits 8")
    finally:
        model.config._name_or_path = original
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    files = [publish("pope", tmp_path / name, 1) for name in ("one", "two")]
    run(*demo, suites.get("pope", *files[0]), contender, tmp_path / "pope")
    for file, images in ((files[1][0], files[0][1]), (files[0][0], files[1][1])):
        with pytest.raises(ValueError, match="holds answers of .*/one.*this run is of .*/two"):
            run(*demo, suites.get("pope", file, images), contender, tmp_path / "pope")


def test_errors_are_raised_not_counted_as_wrong(demo, tmp_path):
    class Broken(ShapesSuite):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            if index == 3:
                item.images.clear()
            return item

    with pytest.raises(Exception, match=r"(?i)image"):
        run(*demo, Broken(4, tasks=("colour",)), Contender("none", P.KeepAll()), tmp_path, batch_size=1)
    assert len((tmp_path / "none.jsonl").read_text().splitlines()) == 4  # three answers are kept
    assert not hasattr(demo[0], "_dyrate_handle")


def test_suites():
    one, two = ShapesSuite(3), ShapesSuite(3, seed=1)
    assert len(one) == 18 and len({one[i].name for i in range(18)}) == 18
    assert not {one[i].name for i in range(18)} & {two[i].name for i in range(18)}
    assert all(one.samples[i].scene.seed < 0 for i in range(18))
    right, total = one.score(0, one.samples[0].answer)
    assert right == total > 1 and one.score(0, "Nothing.")[0] == 0
    for wrong in ({"scenes": 0}, {"seed": -1}, {"tasks": ("poem",)}, {"tasks": ()}):
        with pytest.raises(ValueError, match="must be"):
            ShapesSuite(**{"scenes": 2, **wrong})
    assert torch.is_grad_enabled()
