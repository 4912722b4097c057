"""The bundled model and the script that trains it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dyrate_kernels import shapes
from dyrate_kernels.bundled import MODEL_FOLDER, load_demo
from tools import train_bundled_model as training

TINY = training.Settings(
    image_size=24,
    patch_size=8,
    width=16,
    vision_layers=1,
    text_layers=1,
    heads=2,
    batch=2,
    tower_steps=2,
    steps=6,
    short_questions=1,
)


# ---- the bundled model


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return load_demo()


def _question(processor: Any, prompt: str, images: int = 1) -> str:
    content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_the_folder_is_small_and_holds_no_code() -> None:
    files = [path for path in MODEL_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}
    assert not any("auto_map" in path.read_text(encoding="utf-8") for path in files if path.suffix == ".json")
    assert "held-out" in (MODEL_FOLDER / "README.md").read_text(encoding="utf-8").lower()


def test_transformers_loads_it_without_code_of_ours(demo: tuple[Any, Any]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

    model, processor = demo
    assert type(model) is LlavaForConditionalGeneration and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    again = AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    assert type(again) is LlavaForConditionalGeneration
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    assert type(AutoProcessor.from_pretrained(MODEL_FOLDER)) is type(processor)
    assert processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_other_devices_and_types_can_be_asked_for() -> None:
    model, _ = load_demo(device=torch.device("cpu"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_missing_weights_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dyrate_kernels.bundled.MODEL_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors.*python -m tools\.train_bundled_model"):
        load_demo()


@pytest.mark.slow
def test_it_names_95_percent_of_the_attributes_of_held_out_scenes(demo: tuple[Any, Any]) -> None:
    table = training.evaluate(*demo, scenes=60, first_seed=-100_001, batch=30)
    assert table["describe"]["accuracy"] >= 0.95, table
    for task in ("colour", "shape"):
        assert table[task]["accuracy"] >= 0.95, (task, table)
    assert table["place"]["accuracy"] >= 2 / 9, table  # weak, as its README says, but well above one place in nine


def test_a_description_is_long_and_ends_by_itself(demo: tuple[Any, Any]) -> None:
    model, processor = demo
    sample = shapes.make_sample(-200_001, "describe", shapes.make_scene(-200_001, 5, 5))
    inputs = processor(images=sample.image(336), text=_question(processor, sample.prompt), return_tensors="pt")
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
    assert 40 <= len(answer) <= 120
    assert answer[-1] == processor.tokenizer.eos_token_id


def test_a_prompt_has_system_text_before_the_image(demo: tuple[Any, Any]) -> None:
    model, processor = demo
    text = _question(processor, "Describe the picture.")
    ids = processor(images=Image.new("RGB", (96, 96)), text=text, return_tensors="pt")["input_ids"][0]
    where = (ids == model.config.image_token_id).nonzero().flatten()
    assert len(where) == (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    assert where[0] > 4 and len(ids) - 1 - where[-1] > 4
    assert torch.equal(where, torch.arange(int(where[0]), int(where[-1]) + 1))


@pytest.mark.parametrize(
    ("mode", "size"),
    [("L", (200, 50)), ("RGBA", (33, 97)), ("CMYK", (96, 96)), ("P", (9, 9)), ("1", (64, 64)), ("RGB", (1, 1))],
)
def test_pictures_of_other_modes_and_sizes(demo: tuple[Any, Any], mode: str, size: tuple[int, int]) -> None:
    model, processor = demo
    inputs = processor(images=Image.new(mode, size), text=_question(processor, "What is this?"), return_tensors="pt")
    side = model.config.vision_config.image_size
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    assert model.generate(**inputs, do_sample=False, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("text", ["Was ist das? äöü", "这是什么", "\U0001f642 \t\x07", "<s> {{ messages }} \\n"])
def test_any_text_encodes_and_comes_back(demo: tuple[Any, Any], text: str) -> None:
    tokenizer = demo[1].tokenizer
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_several_turns_and_several_pictures(demo: tuple[Any, Any]) -> None:
    model, processor = demo
    sample = shapes.make_sample(-300_001, "describe")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.prompt}]},
        {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "How many objects are there?"}],
        },
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text.count("<image>") == 3 and text.endswith(" ASSISTANT:") and f" ASSISTANT: {sample.answer}</s> USER:" in text
    inputs = processor(images=[sample.image()] * 3, text=text, return_tensors="pt")
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 3 * patches
    assert model.generate(**inputs, do_sample=False, max_new_tokens=4).shape[1] <= inputs["input_ids"].shape[1] + 4


def test_the_question_as_trained_is_the_question_as_asked(demo: tuple[Any, Any]) -> None:
    """The training ids of a conversation are what the chat template and the tokenizer give for it."""
    _, processor = demo
    data = training.Dialogues(training.Settings(), processor, training.FRAME)
    for seed in range(20):
        ids, labels = data.conversation(seed, shapes.make_scene(seed))
        text = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert sum(label != -100 for label in labels) > 30
        turns: list[dict[str, Any]] = []
        body = text.replace("<image>" * training.Settings().visual_tokens, "")
        for turn in body.split(" USER: ")[1:]:
            question, answer = turn.split(" ASSISTANT: ")
            turns.append(
                {
                    "role": "user",
                    "content": ([] if turns else [{"type": "image"}]) + [{"type": "text", "text": question.lstrip("\n")}],
                }
            )
            turns.append({"role": "assistant", "content": answer.removesuffix("</s>")})
        said = processor.apply_chat_template(turns).replace("<image>", "<image>" * training.Settings().visual_tokens)
        assert said == text


# ---- the training script


def _trainer(folder: Path) -> training.Trainer:
    return training.Trainer(TINY, folder, "cpu")


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole")
    whole.run()
    first = _trainer(tmp_path / "parts")
    first.run(until=3)
    second = _trainer(tmp_path / "parts")
    assert second.load() and second.step == 3
    second.run()
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.model.state_dict().items())


def test_a_kill_while_saving_leaves_the_former_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(tmp_path)
    trainer.run(until=2)

    def torn(state: Any, path: Path) -> None:
        Path(path).write_bytes(b"half a checkp")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(until=3)
    again = _trainer(tmp_path)
    assert again.load() and again.step == 2


def test_the_command_trains_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--scenes", "2"]
    for name in (
        "image_size",
        "patch_size",
        "width",
        "vision_layers",
        "text_layers",
        "heads",
        "batch",
        "tower_steps",
        "steps",
        "short_questions",
    ):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(TINY, name))]
    training.main(arguments)
    shown = capsys.readouterr().out
    assert "step 6/6" in shown and "min left" in shown
    for task in shapes.TASKS:
        assert any(line.startswith(task) and "interval" in line for line in shown.splitlines())
    training.main(["--eval", str(tmp_path / "export"), "--device", "cpu", "--scenes", "1"])


def test_training_never_sees_held_out_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training draws scenes of positive seeds, the evaluation of negative ones; a step's batch is always the same."""
    seen: list[int] = []
    make_scene = shapes.make_scene
    monkeypatch.setattr(shapes, "make_scene", lambda seed: seen.append(seed) or make_scene(seed))
    data = training.Dialogues(TINY, training.build_processor(TINY), training.FRAME)
    first, second = data.batch(3), data.batch(3)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    data.batch(0)
    assert min(seen) > 0
    assert inspect.signature(training.evaluate).parameters["first_seed"].default < 0
