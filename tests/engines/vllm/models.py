"""Tiny models in folders that both vLLM and Hugging Face load, made here: random weights (but for ``demo``, the bundled trained model), a
processor each, no download.

``python -m tests.engines.vllm.models FOLDER [NAME ..]`` writes them.
"""

from __future__ import annotations

import copy
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 2, 32, 5
HIDDEN = 128
VOCAB = 480
_WORDS = 459  # ids of the bundled tokenizer, its four special tokens among them
_IMAGE = "<image>"
_TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]


@dataclass(frozen=True)
class Family:
    """Attributes:
    classes: of transformers, ``..Config`` and ``..ForConditionalGeneration``.
    image: what a picture is in a prompt.
    more: tokens that the bundled tokenizer lacks, by the names that the family's processor knows them under.
    """

    classes: str
    image: str = _IMAGE
    more: tuple[tuple[str, str], ...] = ()


_QWEN_TOKENS = (
    ("vision_start_token", "<|vision_start|>"), ("vision_end_token", "<|vision_end|>"),
    ("image_token", "<|image_pad|>"), ("video_token", "<|video_pad|>"),
)  # fmt: skip
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

FAMILIES: dict[str, Family] = {
    "demo": Family("Llava", f"{_IMAGE}\n"),
    "llava": Family("Llava", f"{_IMAGE}\n"),
    "llava_next": Family("LlavaNext", f"{_IMAGE}\n"),
    "llava_onevision": Family("LlavaOnevision", f"{_IMAGE}\n", (("video_token", "<video>"),)),
    "qwen2_vl": Family("Qwen2VL", _QWEN_IMAGE, _QWEN_TOKENS),
    "qwen2_5_vl": Family("Qwen2_5_VL", _QWEN_IMAGE, _QWEN_TOKENS),
    "qwen3_vl": Family("Qwen3VL", _QWEN_IMAGE, _QWEN_TOKENS),
    "internvl": Family(
        "InternVL", "<IMG_CONTEXT>\n",
        (
            ("start_image_token", "<img>"), ("end_image_token", "</img>"), ("context_image_token", "<IMG_CONTEXT>"),
            ("video_token", "<video>"),
        ),
    ),
}  # fmt: skip


def prompt(name: str, question: str, images: int) -> str:
    """A question about so many pictures, as the family's prompts are."""
    return (
        f"A chat between a curious user and an assistant that looks at pictures. USER: {FAMILIES[name].image * images}{question} ASSISTANT:"
    )


def picture(seed: int) -> Image.Image:
    """One of the examples, turned and resized as the seed says; the first sixty differ."""
    files = sorted((Path(__file__).parents[3] / "examples").glob("shapes_*.png"))
    turned, which = divmod(seed, len(files))
    image = Image.open(files[which]).convert("RGB").rotate(90 * (turned % 4))
    return image.resize([(96, 96), (96, 64), (64, 96), (64, 64), (128, 72)][seed % 5], Image.Resampling.BICUBIC)


def _tokenizer(family: Family) -> Any:
    import dyrate_kernels as dk

    tokenizer = dk.load_demo()[1].tokenizer
    if family.more:
        tokenizer.add_tokens([token for _, token in family.more], special_tokens=True)
        tokenizer._set_model_specific_special_tokens(dict(family.more))
    return tokenizer


def _text(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS // 2, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 4096,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    } | more  # fmt: skip


def _llava_config(name: str) -> Any:
    import transformers

    if name == "llava_onevision":
        vision: Any = transformers.SiglipVisionConfig(**_TOWER, image_size=32, vision_use_head=False)
        text: Any = transformers.Qwen2Config(**_text())
        more: dict[str, Any] = {"video_token_index": _WORDS, "image_grid_pinpoints": _PINPOINTS}
        return transformers.LlavaOnevisionConfig(vision_config=vision, text_config=text, image_token_index=3, **more)
    side = 32 if name == "llava_next" else 96
    vision = transformers.CLIPVisionConfig(**{**_TOWER, "num_hidden_layers": 3}, image_size=side, projection_dim=32)
    if name == "llava_next":
        text = transformers.LlamaConfig(**_text())
        return transformers.LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=3, image_grid_pinpoints=_PINPOINTS)
    text = transformers.LlamaConfig(**_text(num_attention_heads=HEADS))
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)


def _config(name: str) -> Any:
    import transformers

    family = FAMILIES[name]
    if name.startswith("llava"):
        return _llava_config(name)
    ids = {key: _WORDS + i for i, (key, _) in enumerate(family.more)}
    kind = getattr(transformers, f"{family.classes}Config")
    if name == "internvl":
        vision: dict[str, Any] = {**_TOWER, "patch_size": [8, 8], "image_size": [64, 64]}
        text = transformers.Qwen2Config(**_text())
        return kind(vision_config=vision, text_config=text, image_token_id=ids["context_image_token"], tie_word_embeddings=False)
    shared = {"num_heads": 2, "depth": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {
        "qwen2_vl": {"embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2},
        "qwen2_5_vl": {
            "hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 96, "window_size": 32, "fullatt_block_indexes": [1],
        },
        "qwen3_vl": {
            "hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 96, "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64, "depth": 3,
        },
    }[name]  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    if name == "qwen3_vl":
        rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return kind(
        vision_config=shared | vision, text_config=_text(rope_parameters=rope), tie_word_embeddings=False,
        **{f"{key}_id": value for key, value in ids.items()},
    )  # fmt: skip


def _image_processor(name: str) -> Any:
    import transformers

    side = {"height": 32, "width": 32}
    if name in ("demo", "llava"):
        import dyrate_kernels as dk

        return dk.load_demo()[1].image_processor
    if name == "llava_next":
        return transformers.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=_PINPOINTS)
    if name == "llava_onevision":
        return transformers.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=_PINPOINTS)
    if name == "internvl":
        return transformers.GotOcr2ImageProcessor(size={"height": 64, "width": 64}, crop_to_patches=True, min_patches=1, max_patches=4)
    return transformers.Qwen2VLImageProcessor(
        patch_size=8, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    )


def _processor(name: str) -> Any:
    import transformers

    family = FAMILIES[name]
    tokenizer, images = _tokenizer(family), _image_processor(name)
    if name in ("demo", "llava"):
        import dyrate_kernels as dk

        return dk.load_demo()[1]
    if name == "llava_next":
        one = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaNextProcessor(images, tokenizer, **one)
    if name == "llava_onevision":
        videos: Any = transformers.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32})
        return transformers.LlavaOnevisionProcessor(images, tokenizer, videos, num_image_tokens=16, vision_feature_select_strategy="full")
    if name == "internvl":
        videos = transformers.InternVLVideoProcessor(size={"height": 64, "width": 64})
        return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=16)
    kind = "Qwen3VL" if name == "qwen3_vl" else "Qwen2VL"
    videos = getattr(transformers, f"{kind}VideoProcessor")(patch_size=8, temporal_patch_size=2, merge_size=2)
    return getattr(transformers, f"{family.classes}Processor")(images, tokenizer, videos)


def _wide_heads() -> Any:
    """The bundled model with heads of 32 numbers in place of 16, which vLLM's CPU attention has no kernel for: the same function.

    Rotary angle j of 8 is angle 2 j of 16, so number j of a half of a query or key goes to 2 j of the wider half and zeros go between.
    Queries are longer by the root of 2, which the softmax's wider scale takes back.
    """
    import transformers

    import dyrate_kernels as dk

    model, _ = dk.load_demo()
    config = copy.deepcopy(model.config)
    width = config.text_config.head_dim
    config.text_config.head_dim = 2 * width
    places = torch.cat([torch.arange(0, width, 2), width + torch.arange(0, width, 2)])
    state = model.state_dict()
    for name, value in state.items():
        if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")) or "language_model" not in name:
            continue
        heads = value.T if "o_proj" in name else value
        wide = torch.zeros(heads.shape[0] // width, 2 * width, heads.shape[1])
        wide[:, places] = heads.unflatten(0, (-1, width)) * (2**0.5 if "q_proj" in name else 1)
        state[name] = wide.flatten(0, 1).T.contiguous() if "o_proj" in name else wide.flatten(0, 1)
    made = transformers.LlavaForConditionalGeneration(config)
    made.load_state_dict(state)
    made.generation_config = model.generation_config
    return made.eval()


def _model(name: str) -> Any:
    import transformers

    from tests.models import draw

    if name == "demo":
        return _wide_heads()
    config = _config(name)
    model = getattr(transformers, f"{FAMILIES[name].classes}ForConditionalGeneration")(config)
    draw(model, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    with torch.no_grad():
        model.lm_head.weight[:5].zero_()  # special tokens are never the likeliest
        model.lm_head.weight[_WORDS:].zero_()
    model.generation_config.eos_token_id = None
    return model.eval()


def _published_names(folder: Path) -> None:
    """transformers saves a CLIP or SigLIP tower as ``vision_tower.embeddings..``; checkpoints on the hub, and vLLM, say
    ``vision_tower.vision_model.embeddings..``. transformers loads both."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = {key.replace("vision_tower.", "vision_tower.vision_model."): value.contiguous() for key, value in load_file(path).items()}
    if not any("vision_model.vision_model" in key for key in state):
        save_file(state, path, metadata={"format": "pt"})


def make(name: str, place: Path) -> Path:
    """The folder of a model, made if it is not there.

    Args:
        name: of ``FAMILIES``.
        place: parent folder.
    """
    folder = place / name
    if not (folder / "done").exists():
        model = _model(name)
        model.save_pretrained(folder)
        _processor(name).save_pretrained(folder)
        if name in ("demo", "llava", "llava_next", "llava_onevision"):
            _published_names(folder)
        if name == "demo":
            from dyrate_kernels import DyRatePredictor
            from dyrate_kernels.bundled import MODEL_FOLDER

            DyRatePredictor.from_pretrained(MODEL_FOLDER).save_pretrained(folder)
        (folder / "done").touch()
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """The Hugging Face model, float32, and its processor."""
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


def shape(folder: Path) -> Any:
    """The text model's :class:`~dyrate_kernels.policies.ModelShape`."""
    from transformers import AutoConfig

    from dyrate_kernels.policies import ModelShape

    return ModelShape.from_config(AutoConfig.from_pretrained(folder).get_text_config(), torch.float32)


if __name__ == "__main__":
    for chosen in sys.argv[2:] or FAMILIES:
        print(make(chosen, Path(sys.argv[1])))
