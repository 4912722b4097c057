"""Calibration on the bundled model: its choice against the best of the grid on held-back scenes, budgets, the predictor in a patch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import dyrate_kernels as dk
from dyrate_kernels import chat, shapes
from dyrate_kernels.cli.main import main
from dyrate_kernels.predictor import CONFIG_FILE
from dyrate_kernels.training import calibration, rate_fit
from dyrate_kernels.training.calibration import Candidate, Options, Sweeps, Trial, calibrate
from dyrate_kernels.training.data import Example, ShapesSource
from dyrate_kernels.training.masked_pass import training_hooks
from dyrate_kernels.training.own_answers import PromptedPictures, answer_all, read_prompts

OPTIONS = Options(costs=(0.5, 0.15), layers=(1, 2), spreads=(0.0, 1.0), batch_size=24, max_new_tokens=48, most_loss=0.05)


@pytest.fixture(scope="module")
def demo():
    return dk.load_demo()


@pytest.fixture(scope="module")
def found(demo):
    return calibrate(*demo, ShapesSource(24, seed=5, describe=1.0), OPTIONS)


@pytest.fixture(scope="module")
def held_back(demo):
    return answer_all(*demo, ShapesSource(16, seed=77, describe=1.0), 48, 16)


def test_the_choice_is_as_good_as_the_best_of_the_grid_on_held_back_scenes(demo, found, held_back):
    (level,) = found.levels
    shape = dk.policies.ModelShape.from_config(demo[0].config)
    trials = [Trial(level.chosen, (found.predictor, found.predictor))]
    for candidate, _ in level.tried:
        if candidate.signal in ("constant", "random") and candidate != level.chosen:
            made = rate_fit.constant(shape, candidate.k, candidate.spread, 1.0 - candidate.keep)
            trials.append(Trial(candidate, (made, made)))
    with training_hooks(demo[0]) as passes:
        sweeps = Sweeps(demo[0], shape, passes, held_back, OPTIONS, None)
        measured = sweeps.measure("", trials)
    losses = {candidate: float(each.loss.mean()) for candidate, each in measured.items()}
    best = min(losses.values())
    assert len(losses) == 6 if level.chosen.signal == "constant" else 7
    assert losses[level.chosen] <= best + 0.01, losses
    assert max(losses.values()) > best + 0.1, "every candidate is as good: nothing was tested"
    assert abs(float(measured[level.chosen].visual.mean()) - 0.5) < 0.02


def test_budgets_are_met_and_intervals_hold_their_means(found):
    (level,) = found.levels
    assert abs(level.visual - level.cost) < 0.02
    for low in (level.loss, level.same, *(each for control in level.controls.values() for each in (control.loss, control.lead))):
        assert low[1] <= low[0] <= low[2]
    assert set(level.controls) == {"uniform", "random"} and level.controls["random"].lead[0] > 0
    assert {each.signal for each, _ in level.tried} == {"constant", "random", "mass", "text"}
    assert [loss for _, loss in level.tried] == sorted(loss for _, loss in level.tried)
    assert found.pictures == 24 and found.skipped == []
    assert len(found.left_out) == 1 and "15 % of the visual rows" in found.left_out[0] and "k=1 of 6 layers" in found.left_out[0]
    assert level.safe == (level.loss[2] <= OPTIONS.most_loss) and (found.predictor is not None) == level.safe
    assert json.dumps(found.to_dict())


def test_every_signal_meets_the_budget(demo, held_back):
    """Also where a predictor is fitted on one half and runs on the other."""
    shape = dk.policies.ModelShape.from_config(demo[0].config)
    with training_hooks(demo[0]) as passes:
        sweeps = Sweeps(demo[0], shape, passes, held_back, OPTIONS, None)
        rows = sweeps.at_all_rates({(1, 1.0)})
        fits = [calibration._Fit(shape, rows, (1, 1.0), signal) for signal in ("mass", "text")]
        for cost in (0.6, 0.4):
            candidates, _ = calibration._at_constant_rates(shape, (1,), held_back.tokens, Options(costs=(cost,)))
            at = next(each for each in candidates if each.is_uniform)
            for candidate, each in (sweeps.constant("", [at]) | sweeps.measure("", [fit.trial(at) for fit in fits])).items():
                assert abs(float(each.visual.mean()) - cost) < 0.02, candidate


def test_what_is_saved_runs_in_a_patch_with_these_settings(demo, found, tmp_path):
    model, processor = demo
    made = found.predictor
    assert made is not None
    made.save_pretrained(tmp_path)
    example = ShapesSource(1, seed=78, describe=1.0)[0]
    fields = chat.encode(processor, [chat.render(processor, example.messages)], [example.images], model)
    for source in (tmp_path, str(tmp_path / CONFIG_FILE)):
        with dk.patch(model, predictor=source) as handle:
            assert (handle.policy.k, handle.policy.spread, handle.policy.rate_values) == (made.k, made.spread, made.rates)
            output = model.generate(**fields, max_new_tokens=48, do_sample=False)
            stats = handle.stats()
    assert stats.k == made.k and {round(step.rate[0], 4) for step in stats.steps[1:]} <= {round(rate, 4) for rate in made.rates}
    whole = model.generate(**fields, max_new_tokens=48, do_sample=False)
    assert torch.equal(whole, output), "another scene, please: of an answer that pruning changes, a pass over it tells nothing"
    answers = answer_all(model, processor, [example] * 2, 48, 2)
    shape = dk.policies.ModelShape.from_config(model.config)
    candidate = Candidate(0.5, made.k, made.spread, "text", 0.5)
    with training_hooks(model) as passes:
        each = Sweeps(model, shape, passes, answers, OPTIONS, None).measure("", [Trial(candidate, (made, made))])[candidate]
    assert each.visual == pytest.approx([stats.visual_share] * 2, abs=1e-6) and each.same == pytest.approx([1.0, 1.0])


def test_a_picture_takes_no_part_in_the_choice_that_it_judges():
    """The loss that is reported is not that of the minimum over noise."""
    best, reported = [], []
    for seed in range(200):
        noise, zero = np.random.default_rng(seed).normal(size=(39, 12)), np.zeros(12)
        measured = {Candidate(0.5, k + 1, 0.0, "constant", 0.5): calibration.Measured(each, zero, zero) for k, each in enumerate(noise)}
        chosen, across = calibration._choose(list(measured), measured)
        assert chosen.k - 1 == noise.mean(1).argmin()
        picks = [np.delete(noise, picture, 1).mean(1).argmin() for picture in range(12)]
        assert np.array_equal(across.loss, noise[picks, range(12)])
        best.append(measured[chosen].loss.mean())
        reported.append(across.loss.mean())
    assert np.mean(best) < -0.5 and abs(np.mean(reported)) < 0.1


def test_a_signal_must_be_worth_it():
    zero = np.zeros(8)
    made = {signal: Candidate(0.5, 1, 1.0, signal, 0.5) for signal in ("text", "mass", "constant")}
    measured = {made[signal]: calibration.Measured(zero + loss, zero, zero) for signal, loss in zip(made, (0.0, 0.004, 0.03), strict=True)}
    for slack, signal in ((0.0, "text"), (0.005, "mass"), (0.05, "constant")):
        chosen, across = calibration._choose(list(measured), measured, slack)
        assert chosen.signal == signal and np.array_equal(across.loss, measured[made[signal]].loss)


def test_it_is_seeded(demo):
    source = ShapesSource(8, seed=3, describe=1.0)
    small = Options(costs=(0.5,), layers=(1,), spreads=(1.0,), batch_size=8, max_new_tokens=16, most_loss=9.0)
    first, again = (calibrate(*demo, source, small) for _ in range(2))
    assert first.to_dict() == again.to_dict() and torch.equal(first.predictor.weight, again.predictor.weight)
    assert not hasattr(demo[0], "_dyrate_handle")


def test_what_cannot_be_calibrated_is_refused_by_name(demo):
    words = Example("words", [chat.user("Hello.")], [], "")
    with pytest.raises(ValueError, match=r"at least 8 pictures .* got 0 \(2 were skipped: words: it has no picture"):
        calibrate(*demo, [words] * 2, OPTIONS)
    short = ShapesSource(8, seed=1, describe=1.0)
    with pytest.raises(ValueError, match="none of the costs can be had: 20 % of the visual rows: answers of 2.0 tokens"):
        calibrate(*demo, short, Options(costs=(0.2,), max_new_tokens=2))
    with pytest.raises(ValueError, match="k must be"):
        calibrate(*demo, short, Options(layers=(6,)))
    with pytest.raises(TypeError, match="must be a transformers"):
        with training_hooks(torch.nn.Linear(2, 2)):
            pass
    for wrong in (
        {"costs": ()},
        {"costs": (1.5,)},
        {"spreads": (-0.1,)},
        {"max_new_tokens": 1},
        {"batch_size": 0},
        {"most_loss": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Options(**wrong)


def test_a_prompt_without_visual_tokens_is_refused(demo, monkeypatch):
    real = training_hooks

    def blind(model):
        hooks = real(model)

        class Blind:
            def __enter__(self):
                passes = hooks.__enter__()
                read = passes.read
                passes.read = lambda prompt: _without(read(prompt))
                return passes

            def __exit__(self, *error):
                return hooks.__exit__(*error)

        return Blind()

    def _without(found):
        found.visual[:] = False
        return found

    monkeypatch.setattr(calibration, "training_hooks", blind)
    with pytest.raises(ValueError, match="no visual token: the processor's chat template"):
        calibrate(*demo, ShapesSource(8, seed=1, describe=1.0), Options(costs=(0.5,), layers=(1,), max_new_tokens=8))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(9):
        shapes.draw(shapes.make_scene(-number - 1)).save(folder / f"{number}.png")
    return folder


def test_prompts_go_round_or_name_their_pictures(pictures, tmp_path):
    (tmp_path / "asked.txt").write_text("\ufeffDescribe the picture.\n\n  How many?  \n", encoding="utf-8")
    source = PromptedPictures(pictures, read_prompts(tmp_path / "asked.txt"))
    assert [source[index].messages[0]["content"][-1]["text"] for index in range(3)] == [
        "Describe the picture.",
        "How many?",
        "Describe the picture.",
    ]
    assert len(source) == 9 and source[8].name == "8.png" and source[8].images[0].size == (96, 96)
    lines = [{"image": "3.png", "prompt": "One?"}, {"image": "3.png", "question": "Two?"}]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = PromptedPictures(pictures, read_prompts(tmp_path / "asked.jsonl"))
    assert [(each.name, each.messages[0]["content"][-1]["text"]) for each in source] == [("3.png", "One?"), ("3.png", "Two?")]
    (tmp_path / "texts.json").write_text(json.dumps(["One?", {"text": "Two?"}]))
    assert read_prompts(tmp_path / "texts.json") == ["One?", "Two?"]
    with pytest.raises(ValueError, match="1 pictures that are not in .*: gone.png"):
        PromptedPictures(pictures, [("gone.png", "One?")])
    with pytest.raises(ValueError, match="prompts are missing"):
        PromptedPictures(pictures, [])
    for name, content, words in (
        ("empty.txt", " \n", "holds no prompt"), ("a.json", "[3]", "entry 0: must be a text"), ("b.json", '[{"image": "x"}]', "entry 0"),
        ("c.json", '["One?", {"image": "x", "prompt": "y"}]', "1 of 2 entries name an image"), ("d.json", '[" "]', "entry 0"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=words):
            read_prompts(tmp_path / name)


def run(capsys, *arguments):
    status = main(["calibrate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_writes_a_predictor_that_generate_takes(capsys, demo, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("dyrate_kernels.load_demo", lambda *_: demo)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    out = "run"
    (pictures / "broken.png").write_bytes(b"nothing")
    given = ("--out", out, "--images", pictures, "--prompt", "Describe the picture.", "--k", 1, "--max-new-tokens", 16, "--batch-size", 9)
    status, text, _ = run(capsys, *given, "--cost", "60", "--most-loss", "9")
    assert status == 0 and max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80, text
    assert "by 9 unpruned answers" in text and "skipped:    1: broken.png" in text and "chosen:     60 % of the visual rows" in text
    assert "uniform" in text and "random" in text and f"--predictor {out}" in text and "fewer than 33 % of pictures" in text
    record = json.loads((tmp_path / out / "calibration.json").read_text())
    made = dk.DyRatePredictor.from_pretrained(out)
    assert record["predictor"] == {"k": 1, "spread": made.spread, "rates": list(made.rates), "text": made.text_size > 0}
    assert made.notes["made by"] == "calibration" and made.notes["pictures"] == 9
    assert main(["info", "--predictor", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictor"]["notes"] == made.notes
    assert main(["info", "--predictor", str(out)]) == 0
    assert "by dyrate calibrate, 9 pictures at 60 % of the visual rows" in " ".join(capsys.readouterr().out.split())
    assert main(["generate", "--image", str(pictures / "0.png"), "--predictor", str(out), "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["k"] == 1


def test_command_says_that_nothing_is_safe(capsys, demo, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("dyrate_kernels.load_demo", lambda *_: demo)
    out = tmp_path / "run"
    given = ("--out", out, "--images", pictures, "--prompt", "Describe the picture.", "--k", 1, "--max-new-tokens", 16, "--batch-size", 9)
    status, text, _ = run(capsys, *given, "--cost", "25", "--most-loss", "0", "--no-text")
    assert status == 1 and "nothing:    is safe at these costs" in text and "No predictor" in text and "saved" not in text
    assert not (out / CONFIG_FILE).exists() and json.loads((out / "calibration.json").read_text())["out"] is None


def test_command_refuses_before_the_model_is_loaded(capsys, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("dyrate_kernels.loading.load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "none").mkdir()
    out, prompt = ("--out", tmp_path / "run"), ("--prompt", "What?")
    for given, words in (
        (("--cost", "50"), "--cost goes with --out DIR"),
        (("--no-text",), "--no-text goes with --out DIR"),
        (("--prompt", "What?"), "--prompt goes with --out DIR"),
        ((*out, "--eta", "1"), "--eta belongs to the search"),
        ((*out, "--images", tmp_path / "none", *prompt), "no picture in this folder"),
        ((*out, "--images", tmp_path / "gone", *prompt), "no such folder"),
        ((*out, "--images", pictures), "--prompts is missing"),
        ((*out, *prompt), "--images is missing"),
        ((*out, "--images", pictures, "--prompts", tmp_path / "gone.txt"), "gone.txt: no such file"),
        ((*out, "--images", pictures, "--prompts", "x", *prompt), "leave one of them out"),
        ((*out, "--images", pictures, "--prompt", " "), "--prompt is empty"),
        ((*out, "--cost", "120"), "--cost must be percentages"),
        ((*out, "--most-loss", "-1"), "most_loss must be"),
    ):
        status, _, err = run(capsys, *given)
        assert status == 1 and words in err, (given, err)
