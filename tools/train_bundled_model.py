"""Trains the bundled model: a small LLaVA that describes drawn scenes (``dyrate_kernels.shapes``).

    python -m tools.train_bundled_model --out DIR           train (or go on, when DIR holds a checkpoint), then evaluate
    python -m tools.train_bundled_model --eval DIR          only evaluate

Everything follows from ``--seed``: sample i is scene ``seed * 10**9 + i``, so a killed run goes on with the very same data. The vision
tower first learns alone, from a label for every patch (which colour, shape, size and place covers it); its label heads are dropped at the
end. Held-out scenes have negative seeds, which training never uses.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyrate_kernels import shapes
from dyrate_kernels.files import replaced, write_json
from dyrate_kernels.shapes.tasks import corpus

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


@dataclass
class Settings:
    """Settings of a run; stored with its checkpoints."""

    seed: int = 1
    image_size: int = 96
    patch_size: int = 8
    width: int = 128
    vision_layers: int = 4
    text_layers: int = 6
    heads: int = 8
    batch: int = 32
    tower_steps: int = 300
    steps: int = 1500
    learning_rate: float = 1.5e-3
    decay_share: float = 0.3
    short_questions: int = 4
    label_weight: float = 0.3

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a picture."""
        return (self.image_size // self.patch_size) ** 2


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


# ---- data ---------------------------------------------------------------------------------------------------------------------------


def picture_tensor(scene: shapes.Scene, settings: Settings) -> Tensor:
    """float32 ``[3, S, S]`` in [-1, 1], as the image processor makes it."""
    pixels = np.asarray(shapes.draw(scene, settings.image_size), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


LABELS = {
    "colour": list(shapes.COLOURS),
    "shape": list(shapes.SHAPES),
    "size": list(shapes.SIZES),
    "place": list(shapes.PLACES),
}


def patch_labels(scene: shapes.Scene, settings: Settings) -> Tensor:
    """int64 ``[4, patches]``: colour, shape, size and place of the thing at each patch; 0 where there is none, else 1 + its index."""
    side = settings.image_size // settings.patch_size
    centre = (torch.arange(side) + 0.5) / side
    labels = torch.zeros(4, side, side, dtype=torch.int64)
    for thing in sorted(scene.things, key=lambda thing: -thing.radius):
        reach = thing.radius + 0.25 / side
        covered = ((centre[None, :] - thing.x) ** 2 + (centre[:, None] - thing.y) ** 2) < reach**2
        for row, (name, values) in enumerate(LABELS.items()):
            labels[row][covered] = 1 + values.index(thing.words[name])
    return labels.flatten(1)


class Dialogues:
    """Batches of conversations: one picture, its description and some short questions in random order; only answers are learned."""

    def __init__(self, settings: Settings, processor: Any) -> None:
        self.settings, self.tokenizer = settings, processor.tokenizer
        self._ids: dict[str, list[int]] = {}
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        self.opening = self._encode(SYSTEM_PROMPT + " USER: ") + [image] * settings.visual_tokens
        self.newline = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            if len(self._ids) > 200_000:
                self._ids.clear()
            self._ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def _sentences(self, text: str) -> list[int]:
        """A description sentence by sentence: few different sentences, so nearly all come from the memo."""
        parts = text.split(". ")
        pieces = [part if part.endswith(".") else part + "." for part in parts]
        return [i for n, piece in enumerate(pieces) for i in self._encode(("" if n == 0 else " ") + piece)]

    def conversation(self, seed: int, scene: shapes.Scene) -> tuple[list[int], list[int]]:
        """Token ids and labels (-100 where nothing is learned) of one conversation."""
        rng = random.Random(f"dialogue {seed}")
        questions = [shapes.make_sample(seed, "describe", scene)]
        for number in range(self.settings.short_questions):
            questions.append(shapes.make_sample(seed * 16 + number, rng.choice(shapes.SHORT_TASKS), scene))
        rng.shuffle(questions)
        ids, labels = list(self.opening), [-100] * len(self.opening)
        for number, sample in enumerate(questions):
            prompt = self.newline + self._encode(sample.prompt) if number == 0 else self._encode(f" USER: {sample.prompt}")
            prompt = prompt + self._encode(" ASSISTANT:")
            answer = " " + sample.answer
            answer_ids = (self._sentences(answer) if sample.task == "describe" else self._encode(answer)) + [self.tokenizer.eos_token_id]
            ids += prompt + answer_ids
            labels += [-100] * len(prompt) + answer_ids
        return ids, labels

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step."""
        first = self.settings.seed * 10**9 + step * self.settings.batch
        scenes = [shapes.make_scene(first + i) for i in range(self.settings.batch)]
        rows = [self.conversation(scene.seed, scene) for scene in scenes]
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return {
            "pixel_values": torch.stack([picture_tensor(scene, self.settings) for scene in scenes]),
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
            "patches": torch.stack([patch_labels(scene, self.settings) for scene in scenes]),
        }


# ---- training -----------------------------------------------------------------------------------------------------------------------


class Trainer:
    """One run: model, label heads, optimiser, schedule, checkpoints."""

    def __init__(self, settings: Settings, out: Path, device: str) -> None:
        self.settings, self.out, self.device = settings, out, torch.device(device)
        self.processor = build_processor(settings)
        self.model = build_model(settings, self.processor).to(self.device)
        self.data = Dialogues(settings, self.processor)
        self.heads = nn.ModuleList(nn.Linear(settings.width, 1 + len(values)) for values in LABELS.values()).to(self.device)
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.step = 0
        self.decay_from: int | None = None

    def _tower(self, pixels: Tensor) -> Tensor:
        return self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

    def _label_loss(self, features: Tensor, patches: Tensor) -> Tensor:
        losses = [
            nn.functional.cross_entropy(head(features).flatten(0, 1), patches[:, row].flatten()) for row, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        features = self._tower(batch["pixel_values"])
        label_loss = self._label_loss(features, batch["patches"])
        if self.step < self.settings.tower_steps:
            return label_loss, {"labels": label_loss.item()}
        inner = self.model.model
        embeds = inner.get_input_embeddings()(batch["input_ids"])
        is_image = (batch["input_ids"] == self.model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_image, inner.multi_modal_projector(features).to(embeds.dtype))
        hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        learned = batch["labels"][:, 1:] != -100
        logits = self.model.lm_head(hidden[:, :-1][learned]).float()
        truth = batch["labels"][:, 1:][learned]
        answer_loss = nn.functional.cross_entropy(logits, truth)
        right = (logits.argmax(-1) == truth).float().mean().item()
        total = answer_loss + self.settings.label_weight * label_loss
        return total, {"answers": answer_loss.item(), "right": right, "labels": label_loss.item()}

    def _rate(self) -> float:
        """Warm-up, stable, then linear decay to zero; each of the two stages warms up."""
        s = self.settings
        since = self.step if self.step < s.tower_steps else self.step - s.tower_steps
        decay_from = self.decay_from if self.decay_from is not None else s.steps - int(s.decay_share * s.steps)
        left = (s.steps - self.step) / max(s.steps - decay_from, 1)
        return s.learning_rate * min(1.0, (since + 1) / 100) * min(1.0, max(left, 0.0))

    def run(self, until: int | None = None, save_every: int = 100) -> None:
        """Trains to the end (or to step ``until``), saving as it goes."""
        s = self.settings
        end = s.steps if until is None else min(until, s.steps)
        started, first = time.time(), self.step
        recent: dict[str, float] = {}
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        self.model.train()
        while self.step < end:
            batch = {name: tensor.to(self.device) for name, tensor in self.data.batch(self.step).items()}
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate()
            with autocast:
                loss, parts = self._loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None], 1.0)
            self.optimizer.step()
            self.step += 1
            recent = {name: 0.9 * recent.get(name, value) + 0.1 * value for name, value in parts.items()}
            if self.step % 20 == 0 or self.step == end:
                pace = (time.time() - started) / (self.step - first)
                figures = "  ".join(f"{name} {value:.4f}" for name, value in recent.items())
                left = (s.steps - self.step) * pace / 60
                print(
                    f"step {self.step}/{s.steps}  {figures}  lr {self._rate():.1e}  {pace:.2f} s/step  {left:.1f} min left",
                    flush=True,
                )
            if self.step % save_every == 0 or self.step == end:
                self.save()

    def save(self) -> None:
        """Writes a checkpoint; a kill at any moment leaves the previous one or the new one."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "decay_from": self.decay_from,
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replaced(self.out / "checkpoint.pt") as part:
            torch.save(state, part)

    def load(self) -> bool:
        """Goes on from the checkpoint in ``out``; False if there is none."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.decay_from = state["step"], state["decay_from"]
        return True

    def export(self, folder: Path) -> None:
        """Writes model and processor as ``from_pretrained`` wants them."""
        self.model.eval()
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


# ---- evaluation ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: Any, processor: Any, scenes: int, first_seed: int = -1, batch: int = 25) -> dict[str, dict[str, float]]:
    """Greedy answers on held-out scenes (seeds ``first_seed``, ``first_seed - 1``, ..): accuracy by task with a 95 % interval."""
    size = processor.image_processor.size["height"]
    table = {}
    for task in shapes.TASKS:
        samples = [shapes.make_sample(first_seed - i, task) for i in range(scenes)]
        right = total = 0
        for start in range(0, scenes, batch):
            part = samples[start : start + batch]
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.prompt}]}],
                    add_generation_prompt=True,
                )
                for sample in part
            ]
            inputs = processor(images=[sample.image(size) for sample in part], text=texts, padding=True, return_tensors="pt").to(
                model.device
            )
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=160 if task == "describe" else 12)
            answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for sample, answer in zip(part, answers, strict=True):
                result = shapes.score(sample, answer)
                right, total = right + result.right, total + result.total
        accuracy, low, high = shapes.accuracy_interval(right, total)
        table[task] = {"accuracy": accuracy, "low": low, "high": high, "n": total}
    return table


def print_table(table: dict[str, dict[str, float]]) -> None:
    """The held-out accuracy, a line a task."""
    for task, row in table.items():
        print(
            f"{task:<10} {100 * row['accuracy']:6.2f} %   95 % interval {100 * row['low']:.2f} .. {100 * row['high']:.2f}   n = {row['n']}"
        )


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
