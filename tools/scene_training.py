"""Training a LLaVA on drawn scenes (``dyrate_kernels.shapes``): conversations, a run with checkpoints, evaluation.

Everything follows from a seed: sample i is scene ``seed * 10**9 + i``, so a killed run goes on with the very same data. Held-out scenes
have negative seeds, which training never uses.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyrate_kernels import shapes
from dyrate_kernels.files import replaced


@dataclass
class SceneSettings:
    """Settings of a run, stored with its checkpoints.

    Attributes:
        tower_steps: first steps, in which the tower learns alone, from labels of what is at each patch: colour, shape, size, place.
        steps: all steps, those of the tower among them.
        warmup: steps in which the learning rate of a stage rises.
        decay_share: share of the steps, at the end, in which it falls to zero.
        short_questions: of each conversation, beside the description.
        label_weight: of the labels' loss once answers are learned; with 0 the tower then stays as it is.
        rows: conversations that go through the model at once; a step adds up the gradients of its batch. 0: the whole batch.
    """

    seed: int = 1
    image_size: int = 96
    patch_size: int = 8
    batch: int = 32
    rows: int = 0
    tower_steps: int = 300
    steps: int = 1500
    learning_rate: float = 1.5e-3
    warmup: int = 100
    decay_share: float = 0.3
    short_questions: int = 4
    label_weight: float = 0.3

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a picture."""
        return (self.image_size // self.patch_size) ** 2


# ---- data ---------------------------------------------------------------------------------------------------------------------------


def picture_tensor(scene: shapes.Scene, settings: SceneSettings) -> Tensor:
    """float32 ``[3, S, S]`` in [-1, 1], as the image processor makes it."""
    pixels = np.asarray(shapes.draw(scene, settings.image_size), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


LABELS = {
    "colour": list(shapes.COLOURS),
    "shape": list(shapes.SHAPES),
    "size": list(shapes.SIZES),
    "place": list(shapes.PLACES),
}


def patch_labels(scene: shapes.Scene, settings: SceneSettings) -> Tensor:
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


@dataclass(frozen=True)
class Frame:
    """The marks of a chat template around the parts of a conversation; the end-of-sequence token follows each answer.

    Attributes:
        opening: before the picture.
        first: between the picture and the first question.
        later: before a later question.
        question_end: between a question and its answer.
        answer: around the answer, of which it holds the place as ``{}``.
    """

    opening: str
    first: str
    later: str
    question_end: str
    answer: str = "{}"


class Dialogues:
    """Batches of conversations: one picture, its description and some short questions in random order; only answers are learned."""

    def __init__(self, settings: SceneSettings, processor: Any, frame: Frame) -> None:
        self.settings, self.tokenizer, self.frame = settings, processor.tokenizer, frame
        self._ids: dict[str, list[int]] = {}
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        self.opening = self._encode(frame.opening) + [image] * settings.visual_tokens

    def answer(self, sample: shapes.Sample) -> str:
        """The words to learn as the answer."""
        return sample.answer

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
            if number == 0:
                prompt = self._encode(self.frame.first) + self._encode(sample.prompt)
            else:
                prompt = self._encode(self.frame.later + sample.prompt)
            prompt = prompt + self._encode(self.frame.question_end)
            answer = self.frame.answer.format(self.answer(sample))
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


class Run:
    """A training: model, label heads, optimiser, schedule, checkpoints. Of the model those parameters learn that require a gradient."""

    def __init__(self, settings: SceneSettings, out: Path, device: str, model: Any, processor: Any, data: Dialogues) -> None:
        self.settings, self.out, self.device = settings, out, torch.device(device)
        self.model, self.processor, self.data = model.to(self.device), processor, data
        width = model.config.vision_config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, 1 + len(values)) for values in LABELS.values()).to(self.device)
        self.trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        parameters = [*self.trained.values(), *self.heads.parameters()]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.step = 0
        self.decay_from: int | None = None
        self.log: list[dict[str, float]] = []

    def _tower(self, pixels: Tensor) -> Tensor:
        return self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]

    def _label_loss(self, features: Tensor, patches: Tensor) -> Tensor:
        losses = [
            nn.functional.cross_entropy(head(features).flatten(0, 1), patches[:, row].flatten()) for row, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()

    def _answer_loss(self, features: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the answers' cross-entropy, and how many of their tokens are the most likely ones."""
        inner = self.model.model
        embeds = inner.get_input_embeddings()(input_ids)
        is_image = (input_ids == self.model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(is_image, inner.multi_modal_projector(features).to(embeds.dtype))
        hidden = inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        learned = labels[:, 1:] != -100
        logits = self.model.lm_head(hidden[:, :-1][learned]).float()
        truth = labels[:, 1:][learned]
        return nn.functional.cross_entropy(logits, truth, reduction="sum"), (logits.argmax(-1) == truth).sum()

    def _backward(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Adds up the gradients of a batch; returns its figures, averages over its tokens (answers, right) and patches (labels)."""
        s = self.settings
        answering = self.step >= s.tower_steps
        rows, learned = s.rows or s.batch, int((batch["labels"][:, 1:] != -100).sum())
        figures: dict[str, float] = {}
        for start in range(0, s.batch, rows):
            part = {name: tensor[start : start + rows] for name, tensor in batch.items()}
            share = len(part["labels"]) / s.batch
            total = torch.zeros((), device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                with torch.set_grad_enabled(not answering or s.label_weight > 0):
                    features = self._tower(part["pixel_values"])
                if not answering or s.label_weight > 0:
                    label_loss = self._label_loss(features, part["patches"]) * share
                    figures["labels"] = figures.get("labels", 0.0) + label_loss.item()
                    total = total + label_loss * (s.label_weight if answering else 1.0)
                if answering:
                    longest = int((part["labels"] != -100).any(0).nonzero().max()) + 1
                    loss, right = self._answer_loss(features, part["input_ids"][:, :longest], part["labels"][:, :longest])
                    figures["answers"] = figures.get("answers", 0.0) + loss.item() / learned
                    figures["right"] = figures.get("right", 0.0) + right.item() / learned
                    total = total + loss / learned
            total.backward()
        return figures

    def _rate(self) -> float:
        """Warm-up, stable, then linear decay to zero; each of the two stages warms up."""
        s = self.settings
        since = self.step if self.step < s.tower_steps else self.step - s.tower_steps
        decay_from = self.decay_from if self.decay_from is not None else s.steps - int(s.decay_share * s.steps)
        left = (s.steps - self.step) / max(s.steps - decay_from, 1)
        return s.learning_rate * min(1.0, (since + 1) / s.warmup) * min(1.0, max(left, 0.0))

    def run(self, until: int | None = None, save_every: int = 100) -> None:
        """Trains to the end (or to step ``until``), saving as it goes."""
        s = self.settings
        end = s.steps if until is None else min(until, s.steps)
        started, first = time.time(), self.step
        recent: dict[str, float] = {}
        self.model.train()
        while self.step < end:
            batch = {name: tensor.to(self.device) for name, tensor in self.data.batch(self.step).items()}
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate()
            self.optimizer.zero_grad(set_to_none=True)
            figures = self._backward(batch)
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None], 1.0)
            self.optimizer.step()
            self.step += 1
            self.log.append({"step": self.step} | figures)
            recent = {name: 0.9 * recent.get(name, value) + 0.1 * value for name, value in figures.items()}
            if self.step % min(20, save_every) == 0 or self.step == end:
                pace = (time.time() - started) / (self.step - first)
                shown = "  ".join(f"{name} {value:.4f}" for name, value in recent.items())
                left = (s.steps - self.step) * pace / 60
                print(f"step {self.step}/{s.steps}  {shown}  lr {self._rate():.1e}  {pace:.2f} s/step  {left:.1f} min left", flush=True)
            if self.step % save_every == 0 or self.step == end:
                self.save()

    def save(self) -> None:
        """Writes a checkpoint, and the figures of every step so far; a kill at any moment leaves the previous ones or the new ones."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "decay_from": self.decay_from,
            "settings": asdict(self.settings),
            "model": {name: parameter.detach() for name, parameter in self.trained.items()},
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }
        with replaced(self.out / "checkpoint.pt") as part:
            torch.save(state, part)
        with replaced(self.out / "log.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.log), encoding="utf-8")

    def load(self) -> bool:
        """Goes on from the checkpoint in ``out``; False if there is none.

        Raises:
            ValueError: it is of other settings (``steps`` may change).
        """
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, value in asdict(self.settings).items():
            if name != "steps" and state["settings"].get(name) != value:
                was = state["settings"].get(name)
                raise ValueError(
                    f"{path} was trained with {name} {was}, and now {value} is asked for; ask for {was}, or give another --out"
                )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["model"][name])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.decay_from, self.log = state["step"], state["decay_from"], state["log"]
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
