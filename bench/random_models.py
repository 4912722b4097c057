"""Models of real shapes with random weights, made where they run: no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS_PER_PICTURE = 576  # CLIP ViT-L/14 at 336 pixels: 24 x 24 patches


def llava_7b(device: torch.device, *, toy: bool = False) -> Any:
    """LLaVA-1.5-7B (Vicuna-7B and CLIP ViT-L/14-336) in bfloat16 with random weights.

    LLaVA-NeXT-7B has the same text model; its pictures take up to five crops of 576 tokens, which :func:`inputs` gives by five pictures.

    Args:
        device: where the weights are drawn.
        toy: the same architecture at a size for a CPU, in float32: 4 layers of 2 heads of 16, 4 tokens a picture.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "projection_dim": 768}
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32064}
    size = {"image_size": 336, "patch_size": 14}
    if toy:
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32}
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 200}
        size = {"image_size": 28, "patch_size": 14}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, **size),
        text_config=LlamaConfig(
            **text,
            num_key_value_heads=text["num_attention_heads"],
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        image_token_index=text["vocab_size"] - 1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32 if toy else torch.bfloat16)
    model = model.eval().requires_grad_(False).to(device)
    settings = model.generation_config
    settings.pad_token_id, settings.eos_token_id = 0, None
    settings.suppress_tokens = [config.image_token_id]
    return model


def tokens_per_picture(model: Any) -> int:
    """Visual tokens of one picture."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def inputs(model: Any, batch: int, visual_tokens: int, text_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of ``model.generate``: ``visual_tokens`` of noise pictures between two stretches of text, ``text_tokens`` in all.

    Args:
        visual_tokens: a multiple of ``tokens_per_picture(model)``.
    """
    per_picture = tokens_per_picture(model)
    if visual_tokens % per_picture:
        raise ValueError(f"visual_tokens: expected a multiple of {per_picture}, got {visual_tokens}")
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    image = model.config.image_token_id
    before = text_tokens // 2
    words = torch.randint(3, image, (batch, text_tokens), generator=generator)
    pictures = torch.full((batch, visual_tokens), image)
    ids = torch.cat([words[:, :before], pictures, words[:, before:]], 1).to(parameter.device)
    side = model.config.vision_config.image_size
    count = batch * (visual_tokens // per_picture)
    with torch.random.fork_rng(devices=[parameter.device] if parameter.device.type == "cuda" else []):
        torch.manual_seed(seed)
        pixels = torch.randn(count, 3, side, side, device=parameter.device, dtype=parameter.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
