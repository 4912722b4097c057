"""``train_predictor``: the budget is met, a killed run resumes to the same weights, and nothing of the model changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

import dyrate_kernels as dk
from dyrate_kernels import chat
from dyrate_kernels.cli.common import First
from dyrate_kernels.policies.base import ModelShape
from dyrate_kernels.shapes import draw, make_scene
from dyrate_kernels.training import predictor_training as module
from dyrate_kernels.training.data import ConversationSource, ShapesSource
from dyrate_kernels.training.predictor_training import Options, PredictorModule, step_cost, train_predictor

ROOT = Path(__file__).parents[2]
QUICK = {"batch_size": 4, "log_every": 2, "max_answer": 24, "max_length": None}


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "CALIBRATION", 8)


class Kill(TrainerCallback):
    """Ends the run after a step, as a signal would: nothing more is written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(demo, out, callbacks=(), source=None, resume=True, **options):
    model, processor = demo
    source = ShapesSource(60, seed=1) if source is None else source
    return train_predictor(model, processor, source, out, Options(**{**QUICK, **options}), callbacks=callbacks, quiet=True, resume=resume)


def test_a_killed_run_resumes_to_the_same_weights(demo, tmp_path):
    options = {"k": 2, "target_keep": 0.5, "steps": 6, "save_every": 2}
    whole = train(demo, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(demo, tmp_path / "killed", [Kill(5)], **options)
    assert sorted(p.name for p in (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "killed" / "dyrate_predictor.safetensors").exists()
    resumed = train(demo, tmp_path / "killed", **options)
    assert torch.equal(whole.predictor.weight, resumed.predictor.weight) and torch.equal(whole.predictor.bias, resumed.predictor.bias)
    assert whole.predictor.weight.abs().max() > 0
    other = train(demo, tmp_path / "other", **{**options, "seed": 1})
    assert not torch.equal(whole.predictor.weight, other.predictor.weight)
    with pytest.raises(ValueError, match=r"other target_keep.*0\.5, now 0\.3.*another folder"):
        train(demo, tmp_path / "killed", **{**options, "target_keep": 0.3})
    train(demo, tmp_path / "killed", **{**options, "target_keep": 0.3, "steps": 1}, resume=False)


def test_a_run_that_ended_or_was_killed_after_its_last_step_makes_no_further_one(demo, tmp_path):
    options = {"k": 2, "target_keep": 0.5, "steps": 4, "save_every": 2}
    whole = train(demo, tmp_path / "run", **options)
    for _ in range(2):
        (tmp_path / "run" / "dyrate_predictor.json").unlink()  # as after a kill while the predictor was about to be saved
        again = train(demo, tmp_path / "run", **options)
        assert torch.equal(whole.predictor.weight, again.predictor.weight) and torch.equal(whole.predictor.bias, again.predictor.bias)
        assert again.summary["log"] == whole.summary["log"]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("cut", ["no state", "half a state"])
def test_a_checkpoint_that_a_kill_cut_is_passed_over(demo, tmp_path, cut):
    options = {"k": 2, "target_keep": 0.5, "steps": 6, "save_every": 2}
    whole = train(demo, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(demo, tmp_path / "killed", [Kill(5)], **options)
    state = tmp_path / "killed" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    content = state.read_bytes()
    state.unlink() if cut == "no state" else state.write_bytes(content[: len(content) // 2])
    (state.parent / "optimizer.pt").write_bytes(b"")
    resumed = train(demo, tmp_path / "killed", **options)
    assert torch.equal(whole.predictor.weight, resumed.predictor.weight)


def test_options_that_cannot_be_read_and_checkpoints_of_another_run(demo, tmp_path):
    options = {"k": 2, "target_keep": 0.5, "steps": 4, "save_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(demo, tmp_path, [Kill(3)], **options)
    path = tmp_path / "checkpoints" / "options.json"
    before = path.read_bytes()
    for content in (b"", b"{", b"[]", b"caf\xe9", before.decode().encode("utf-16")[:-3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"options\.json"):
            train(demo, tmp_path, **options)
    path.write_bytes(b"\xef\xbb\xbf" + before)
    with pytest.raises(KeyboardInterrupt):
        train(demo, tmp_path, [Kill(1)], **{**options, "seed": 1}, resume=False)
    fresh = train(demo, tmp_path / "fresh", **{**options, "seed": 1})
    resumed = train(demo, tmp_path, **{**options, "seed": 1})
    assert torch.equal(fresh.predictor.weight, resumed.predictor.weight)


def test_a_run_of_another_model_or_of_other_data_is_not_taken_for_this_one(demo, tmp_path):
    options = {"k": 2, "target_keep": 0.5, "steps": 1, "max_answer": 6}
    for n, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        draw(make_scene(n)).save(tmp_path / name / "1.png")
    entry = {"image": "1.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red square."}]}
    files = [tmp_path / name / "data.json" for name in ("a", "b")]
    for file in files:
        file.write_text(json.dumps([entry] * 6))
    source = ConversationSource(files[0])
    made = train(demo, tmp_path / "run", source=source, **options)
    again = train(demo, tmp_path / "run", source=ConversationSource(os.path.relpath(files[0])), **options)  # the same by another name
    assert torch.equal(made.predictor.weight, again.predictor.weight) and First(source, 9).origin == source.origin
    others = [ConversationSource(files[1]), ConversationSource(files[0], tmp_path / "c"), First(source, 5), ShapesSource(6), [*source]]
    for other in others:
        with pytest.raises(ValueError, match=r"holds a run with other data: data '.*', now '.*'; give another folder \(--out\), .*--fresh"):
            train(demo, tmp_path / "run", source=other, **options)
    files[0].write_text(json.dumps([entry] * 7))
    with pytest.raises(ValueError, match="holds a run with other data"):
        train(demo, tmp_path / "run", source=ConversationSource(files[0]), **options)
    files[0].write_text(json.dumps([entry] * 6))
    before = demo[0].config._name_or_path
    try:
        demo[0].config._name_or_path = str(tmp_path / "a")
        with pytest.raises(ValueError, match="holds a run with other model: model "):
            train(demo, tmp_path / "run", source=source, **options)
    finally:
        demo[0].config._name_or_path = before
    assert train(demo, tmp_path / "run", source=others[3], resume=False, **options).summary["examples"] == 6


def test_data_of_which_no_picture_can_be_read(demo, tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This it is."}]
    (tmp_path / "t.json").write_text(json.dumps([{"conversations": turns}] * 2 + [{"image": "gone.png", "conversations": turns}]))
    with pytest.raises(ValueError, match=r"none of the 3 examples has a picture that can be read; skipped: .*gone\.png"):
        train(demo, tmp_path / "out", source=ConversationSource(tmp_path / "t.json"), k=2, target_keep=0.5, steps=2)
    assert not (tmp_path / "out" / "dyrate_predictor.json").exists()


@pytest.mark.parametrize("target", [{"target_keep": 0.35}, {"target_cost": 0.75}], ids=str)
def test_the_budget_is_met(demo, tmp_path, target):
    """On the data it was trained on, and in generations: within two points of the target."""
    model, processor = demo
    trained = train(demo, tmp_path, k=2, steps=40, batch_size=6, **target)
    wanted = next(iter(target.values()))
    assert trained.summary["cost_on_calibration"] == pytest.approx(wanted, abs=0.02)
    assert trained.summary["log"][-1]["cost"] == pytest.approx(wanted, abs=0.1)  # training itself came near
    loaded = dk.DyRatePredictor.from_pretrained(tmp_path)
    assert torch.equal(loaded.weight, trained.predictor.weight) and loaded.notes["options"]["k"] == 2
    loaded.check(ModelShape.from_config(model.config), 2)
    source = ShapesSource(60, seed=1)
    costs = []
    for index in range(8):
        example = source[index]
        inputs = processor(images=example.images, text=chat.render(processor, example.messages), return_tensors="pt")
        with dk.patch(model, "dyrate", predictor=loaded, k=2) as handle:
            model.generate(**inputs, max_new_tokens=24, do_sample=False)
            stats = handle.stats()
        kept = [step.kept[0] / stats.visual_tokens[0] for step in stats.steps[1:]]
        costs.append((sum(kept), len(kept)) if "target_keep" in target else (stats.paper_cost * len(stats.steps), len(stats.steps)))
    mean = sum(cost for cost, _ in costs) / sum(weight for _, weight in costs)
    assert mean == pytest.approx(wanted, abs=0.05)  # eight answers, of which some are a word


def test_what_is_written(demo, tmp_path):
    trained = train(demo, tmp_path, k=1, target_keep=0.5, steps=4)
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary == json.loads(json.dumps(trained.summary))
    assert summary["skipped"] == 0 and summary["examples"] == 60
    last = summary["log"][-1]
    assert {"loss", "entropy", "cost", "keep", "tau", "rate 0", "rate 0.8"} <= set(last)
    assert sum(value for name, value in last.items() if name.startswith("rate ")) == pytest.approx(1, abs=1e-5)
    assert 1000 < summary["saved_bytes_per_answer_token"] < 1 << 20
    pytest.importorskip("tensorboard")
    assert list((tmp_path / "checkpoints").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("text", [False, True])
def test_standardisation_is_folded_in(demo, text):
    shape = ModelShape.from_config(demo[0].config)
    made = PredictorModule(shape, Options(k=2, target_keep=0.5, text=text))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
        made.mean.uniform_(), made.scale.uniform_(0.01, 0.1)
    mass, hidden = torch.rand(5, shape.num_heads, 4), torch.randn(5, shape.hidden_size)
    folded = made.predictor(shift=0.7)(mass, hidden)
    torch.testing.assert_close(folded, made.logits(mass, hidden) + 0.7 * made.rates.float(), rtol=1e-4, atol=1e-3)


def test_cost_is_the_papers(demo):
    shape = ModelShape.from_config(demo[0].config)
    rates = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    got = step_cost(shape, 2, torch.tensor(200.0), torch.tensor(144), rates)
    for rate, cost in zip(rates.tolist(), got.tolist(), strict=True):
        assert cost == pytest.approx(dk.flops.fastv_cost(shape, n=200, visual=144, k=2, rate=rate).ratio, rel=1e-12)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "one of target_keep and target_cost"),
        ({"target_keep": 0.5, "target_cost": 0.5}, "one of target_keep and target_cost"),
        ({"target_keep": 1.5}, "target_keep must be in"),
        ({"target_keep": 0.5, "steps": 0}, "steps"),
        ({"target_keep": 0.5, "tau_end": 0.0}, "tau_end"),
        ({"target_keep": 0.5, "budget_weight": -1.0}, "budget_weight"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Options(**options)


def test_k_must_fit(demo, tmp_path):
    with pytest.raises(ValueError, match="k must be in"):
        train(demo, tmp_path, k=6, target_keep=0.5)


@pytest.mark.slow
def test_two_processes(demo, tmp_path):
    """Data-parallel on a CPU: both processes end with the same predictor, and it is written once."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, torch, dyrate_kernels as dk\n"
        "from dyrate_kernels.training import predictor_training\n"
        "from dyrate_kernels.training.data import ConversationSource, ShapesSource\n"
        "predictor_training.CALIBRATION = 8\n"
        "model, processor = dk.load_demo()\n"
        "options = predictor_training.Options(k=2, target_keep=.5, steps=4, batch_size=2, max_answer=16, max_length=None)\n"
        "source = ShapesSource(40, seed=1)\n"
        "made = predictor_training.train_predictor(model, processor, source, sys.argv[1], options, quiet=True).predictor\n"
        "torch.save(made.state_dict(), sys.argv[1] + '/rank' + os.environ['RANK'])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2))
    assert torch.equal(first["weight"], second["weight"])
    assert torch.equal(dk.DyRatePredictor.from_pretrained(tmp_path).weight, first["weight"])


@pytest.mark.parametrize(
    "options", [{"target_keep": 0.1}, {"target_cost": 0.2, "rates": "closed"}, {"target_keep": 0.9, "rates": [0.5, 0.6]}], ids=str
)
def test_a_target_out_of_reach(demo, tmp_path, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"{name} .* cannot be met: with k=2 .* at the least and .* at the most"):
        train(demo, tmp_path, k=2, steps=2, **options)
    assert not (tmp_path / "dyrate_predictor.json").exists()
