"""Trains the bundled model: a small LLaVA that describes drawn scenes (``dyrate_kernels.shapes``).

    python -m tools.train_bundled_model --out DIR           train (or go on, when DIR holds a checkpoint), then evaluate
    python -m tools.train_bundled_model --eval DIR          only evaluate

The vision tower first learns alone, from a label for every patch; its label heads are dropped at the end. Data, checkpoints and
evaluation: ``tools/scene_training.py``.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dyrate_kernels.files import write_json
from dyrate_kernels.shapes.tasks import corpus
from tools.scene_training import Dialogues, Frame, Run, SceneSettings, evaluate, print_table

SYSTEM_PROMPT = "A chat between a curious user and an assistant that looks at pictures."
CHAT_TEMPLATE = (
    "{% set ns = namespace(first=true) %}{{ '" + SYSTEM_PROMPT + "' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ASSISTANT: ' }}{% else %}{{ ' USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{% set ns = namespace(first=true) %}", "")


FRAME = Frame(SYSTEM_PROMPT + " USER: ", "\n", " USER: ", " ASSISTANT:", " {}")


@dataclass
class Settings(SceneSettings):
    """Settings of a run; stored with its checkpoints."""

    width: int = 128
    vision_layers: int = 4
    text_layers: int = 6
    heads: int = 8


# ---- model and processor ------------------------------------------------------------------------------------------------------------


def build_processor(settings: Settings) -> Any:
    """Tokenizer (byte-level BPE over the sentences of ``shapes``, so that any text encodes) and image processor, from scratch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM_PROMPT] * 50 + corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        additional_special_tokens=["<image>"], model_max_length=4096,
    )  # fmt: skip
    side = {"height": settings.image_size, "width": settings.image_size}
    pictures = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=pictures, tokenizer=fast, patch_size=settings.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_model(settings: Settings, processor: Any) -> Any:
    """A ``LlavaForConditionalGeneration`` with random weights of the seed."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(settings.seed)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=settings.width, intermediate_size=3 * settings.width, num_hidden_layers=settings.vision_layers,
        num_attention_heads=4, image_size=settings.image_size, patch_size=settings.patch_size,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=settings.width, intermediate_size=int(2.75 * settings.width),
        num_hidden_layers=settings.text_layers, num_attention_heads=settings.heads, num_key_value_heads=settings.heads,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=settings.visual_tokens,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


# ---- training -----------------------------------------------------------------------------------------------------------------------


class Trainer(Run):
    """A run of the bundled model, from random weights."""

    def __init__(self, settings: Settings, out: Path, device: str) -> None:
        processor = build_processor(settings)
        model = build_model(settings, processor)
        super().__init__(settings, out, device, model, processor, Dialogues(settings, processor, FRAME))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the run: checkpoint.pt, and export/ at the end")
    parser.add_argument("--eval", type=Path, dest="evaluate", help="only evaluate this exported folder")
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes (default 500)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decay-now", action="store_true", help="on resuming: begin the final decay at this step")
    parser.add_argument("--until", type=int, help="stop at this step, without evaluating")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(arguments)
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = given.evaluate
    if folder is None:
        if given.out is None:
            parser.error("--out DIR (train) or --eval DIR (evaluate) is needed")
        settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
        trainer = Trainer(settings, given.out, given.device)
        if trainer.load():
            print(f"going on from step {trainer.step}")
        if given.decay_now and trainer.decay_from is None:
            trainer.decay_from = trainer.step
        trainer.run(given.until)
        folder = given.out / "export"
        trainer.export(folder)
        if given.until is not None:
            return
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(given.device).eval()
    table = evaluate(model, AutoProcessor.from_pretrained(folder), given.scenes)
    print_table(table)
    if given.out is not None:
        write_json(given.out / "accuracy.json", table)
    if not all(math.isfinite(row["accuracy"]) for row in table.values()):
        raise SystemExit("evaluation gave no figures")


if __name__ == "__main__":
    main()
