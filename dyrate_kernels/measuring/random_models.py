"""Models of real shapes with random weights, made where they run: no download.

The text models are those of ``flops.MODELS``; the towers are CLIP ViT-L/14 at 336 pixels (576 tokens a picture), SigLIP so400m/14 at
384 pixels and Qwen2.5-VL's own, which takes one picture of any size. ``small`` and the ``toy`` ones are for CPUs. What a step costs does
not depend on what the weights are, only on how many rows are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import flops
from dyrate_kernels.policies.base import ModelShape
from dyrate_kernels.request_model import CROPS, nearest_square

CLIP_336: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
_SIGLIP: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "patch_size": 14, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_THIN: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TINY: dict[str, Any] = {"image_size": 28, "patch_size": 14}
_TINY_QWEN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "window_size": 16,
    "fullatt_block_indexes": [1],
}  # fmt: skip


@dataclass(frozen=True)
class RandomModel:
    """A model of random weights (:func:`build`).

    Attributes:
        text: of the text model.
        tower: arguments of the vision config; SigLIP's for LLaVA-OneVision, Qwen2.5-VL's own, CLIP's else.
        visual_tokens: of a sequence, unless asked otherwise; of LLaVA-OneVision by its own count of ``tiles`` x ``tiles`` crops.
        family: ``"llava"``, which is given as many pictures as make up the visual tokens (LLaVA-NeXT's crops cost what pictures cost);
            ``"llava_onevision"``, whose picture is one view of the whole and ``tiles`` x ``tiles`` crops; or ``"qwen2_5_vl"``, whose one
            picture is of as many pixels as make up the visual tokens.
        tiles: crops along a side.
        crops: a picture of the real model is so many of those that ``"llava"`` is given.
    """

    text: ModelShape
    tower: dict[str, Any]
    visual_tokens: int
    family: str = "llava"
    tiles: int = 2
    crops: int = 1


def _named(name: str, **more: Any) -> RandomModel:
    found = flops.named_model(name)
    return RandomModel(replace(found.shape, dtype=torch.bfloat16), CLIP_336, found.visual_tokens, crops=CROPS.get(name, 1), **more)


_SMALL = ModelShape(8, 8, 8, 64, 512, 1376, 1000, torch.float32)
_TOY = ModelShape(4, 2, 2, 16, 32, 64, 200, torch.float32)

MODELS: dict[str, RandomModel] = {
    **{name: _named(name) for name in ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-next-13b", "llava-next-mistral-7b")},
    "llava-onevision-7b": replace(_named("llava-onevision-7b"), tower=_SIGLIP, visual_tokens=3699, family="llava_onevision", crops=1),
    "qwen2.5-vl-7b": replace(_named("qwen2.5-vl-7b"), tower=_QWEN, family="qwen2_5_vl"),
    "small": RandomModel(_SMALL, {**CLIP_336, **_THIN, "num_hidden_layers": 1}, 2880),
    "toy": RandomModel(_TOY, {**_THIN, "projection_dim": 32, **_TINY}, 20),
    "toy-onevision": RandomModel(replace(_TOY, num_kv_heads=1, model_type="qwen2"), {**_THIN, **_TINY}, 24, "llava_onevision"),
    "toy-qwen": RandomModel(replace(_TOY, num_kv_heads=1, model_type="qwen2"), _TINY_QWEN, 20, "qwen2_5_vl"),
}


def _text_config(shape: ModelShape) -> Any:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    kind = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[shape.model_type]
    window = {"sliding_window": None} if shape.model_type == "mistral" else {}
    return kind(
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, vocab_size=shape.vocab_size,
        max_position_embeddings=32768, rms_norm_eps=1e-5, pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
        **window,
    )  # fmt: skip


def build(name: str, device: torch.device, *, dtype: torch.dtype | None = None, layers: int | None = None) -> Any:
    """A model with random weights that never ends an answer by itself.

    Args:
        name: of ``MODELS``.
        dtype: None is bfloat16 for the real shapes and float32 for ``small`` and ``toy``.
        layers: fewer decoder layers than the shape has.

    Raises:
        ValueError: there is no such model; the message lists them.
    """
    import transformers

    if name not in MODELS:
        raise ValueError(f"config: expected one of {', '.join(MODELS)}, got {name!r}")
    spec = MODELS[name]
    shape = spec.text if layers is None else replace(spec.text, num_layers=layers)
    text, image = _text_config(shape), shape.vocab_size - 1
    config: Any
    kind: Any
    if spec.family == "llava_onevision":
        side = spec.tower["image_size"]
        config = transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**spec.tower, vision_use_head=False), text_config=text, image_token_index=image,
            video_token_index=shape.vocab_size - 2, image_grid_pinpoints=[[side * spec.tiles, side * spec.tiles]],
        )  # fmt: skip
        kind = transformers.LlavaOnevisionForConditionalGeneration
    elif spec.family == "qwen2_5_vl":
        sections = [shape.head_dim // 8, 3 * shape.head_dim // 16, 3 * shape.head_dim // 16]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**text.to_dict(), "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
            vision_config={**spec.tower, "out_hidden_size": shape.hidden_size}, image_token_id=image, video_token_id=shape.vocab_size - 2,
            vision_start_token_id=shape.vocab_size - 3, vision_end_token_id=shape.vocab_size - 4,
        )  # fmt: skip
        kind = transformers.Qwen2_5_VLForConditionalGeneration
    else:
        vision = transformers.CLIPVisionConfig(**spec.tower)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
        kind = transformers.LlavaForConditionalGeneration
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=dtype or shape.dtype)
    model = model.eval().requires_grad_(False).to(device)
    settings = model.generation_config
    settings.pad_token_id, settings.eos_token_id = 0, None
    settings.suppress_tokens = [config.image_token_id, *([config.video_token_id] if spec.family != "llava" else [])]
    return model


def tokens_per_picture(model: Any) -> int | None:
    """Visual tokens of one picture; None where a picture can have any number of them."""
    vision = model.config.vision_config
    if model.config.model_type == "qwen2_5_vl":
        return None
    side = vision.image_size // vision.patch_size
    if model.config.model_type != "llava_onevision":
        return side**2
    tiles = _tiles(model)
    return side**2 + side * tiles * (side * tiles + 1)  # the whole, and the crops with a line break behind each row of patches


def pictures(model: Any, visual_tokens: int, name: str | None = None) -> float:
    """Returns how many pictures of a sequence so many visual tokens are.

    Args:
        name: of ``MODELS``, where that cuts a picture into crops; None: each picture that the model is given is one.
    """
    given = visual_tokens // (tokens_per_picture(model) or visual_tokens)
    return given / (1 if name is None else MODELS[name].crops)


_USUAL = 20  # visual tokens of a picture that can have any number of them


def _tiles(model: Any) -> int:
    return model.config.image_grid_pinpoints[0][0] // model.config.vision_config.image_size


def inputs(model: Any, batch: int, visual_tokens: int | None = None, text_tokens: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of ``model.generate``: noise pictures between two stretches of text.

    Args:
        visual_tokens: of each sequence, a multiple of ``tokens_per_picture(model)``; None is one picture (of 20 tokens where it can have
            any number).
        text_tokens: of each sequence.

    Raises:
        ValueError: the visual tokens are no whole number of pictures.
    """
    per_picture = tokens_per_picture(model)
    visual_tokens = (per_picture or _USUAL) if visual_tokens is None else visual_tokens
    if visual_tokens < 1 or (per_picture and visual_tokens % per_picture):
        raise ValueError(f"visual_tokens: expected a multiple of {per_picture}, the tokens of a picture of this model, got {visual_tokens}")
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    image, vision = model.config.image_token_id, model.config.vision_config
    before = text_tokens // 2
    words = torch.randint(3, image - 4, (batch, text_tokens), generator=generator)
    placeholders = torch.full((batch, visual_tokens), image)
    if per_picture is None and before:
        words[:, before - 1] = model.config.vision_start_token_id
    ids = torch.cat([words[:, :before], placeholders, words[:, before:]], 1).to(parameter.device)
    fields: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape: tuple[int, ...]
    if per_picture is None:
        merged, area = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = [1, *(side * merged for side in nearest_square(visual_tokens))]
        fields["image_grid_thw"] = torch.tensor([grid] * batch, device=parameter.device)
        fields["mm_token_type_ids"] = (ids == image).int()
        shape = (batch * visual_tokens * merged**2, area)
    else:
        count = batch * (visual_tokens // per_picture)
        shape = (count, 3, vision.image_size, vision.image_size)
        if model.config.model_type == "llava_onevision":
            tiles = _tiles(model)
            shape = (count, 1 + tiles**2, *shape[1:])
            fields["image_sizes"] = torch.full((count, 2), vision.image_size * tiles, device=parameter.device)
    with torch.random.fork_rng(devices=[parameter.device] if parameter.device.type == "cuda" else []):
        torch.manual_seed(seed)
        fields["pixel_values"] = torch.randn(*shape, device=parameter.device, dtype=parameter.dtype)
    return fields
