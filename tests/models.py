"""Tiny random vision-language models and inputs for them: no download, no tokenizer, no processor.

The weights are drawn so that a random model behaves like a trained one where it matters to a test: attention is far from uniform (logits of
standard deviation about 2) and the highest output logit stands clear of the second, so rounding changes neither a ranking nor a token.
"""

from __future__ import annotations

import contextlib
import inspect
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 99
IMAGE_TOKEN = 97
VIDEO_TOKEN = 98
PAD_TOKEN = 0
EOS_TOKEN = 1
FIRST_WORD = 3  # ids below are special
FRAMES = 2
LAYERS = 5
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 12
HIDDEN = 48

FAMILIES = ("llava", "llava_next", "llava_onevision", "video_llava", "vipllava")
TEXTS = ("llama", "mistral", "qwen2", "qwen3")
# families whose config and inputs differ more: (family, text model)
MORE_VARIANTS = (
    ("internvl", "qwen2"),
    ("internvl", "llama"),
    ("mistral3", "mistral"),
    ("idefics3", "llama"),
    ("smolvlm", "llama"),
    ("qwen2_vl", "own"),
    ("qwen2_5_vl", "own"),
    ("qwen3_vl", "own"),
    ("gemma3", "own"),
    ("paligemma", "own"),
)
BESIDE = 2  # id of the token that stands before each picture in these
# every architecture named in the README's table: (family, text model)
VARIANTS = (
    ("llava", "llama"),
    ("llava", "mistral"),
    ("llava", "qwen2"),
    ("llava", "qwen3"),
    ("llava_next", "llama"),
    ("llava_onevision", "qwen2"),
    ("video_llava", "llama"),
    ("vipllava", "llama"),
)

Row = Sequence[str]


def text_config(text: str, **overrides: Any) -> Any:
    """A tiny text config of the given kind."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD_TOKEN,
        "bos_token_id": 2,
        "eos_token_id": EOS_TOKEN,
    }
    if text == "mistral":
        common["sliding_window"] = 24  # shorter than every prompt with a picture
    if text == "qwen3":
        common["head_dim"] = HEAD_DIM
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return kinds[text](**{**common, **overrides})


def vision_config(family: str) -> Any:
    """A tiny CLIP tower (SigLIP for OneVision): 5 x 5 patches, 2 x 2 for the families that cut a picture into crops."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    common: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 4,
        "image_size": 8 if family in ("llava_next", "llava_onevision") else 20,
    }
    if family == "llava_onevision":
        return SiglipVisionConfig(**common, vision_use_head=False)
    return CLIPVisionConfig(**common, projection_dim=32)


def config(family: str, text: str = "llama", **overrides: Any) -> Any:
    """The tiny config of a family. ``overrides`` go to the text config."""
    import transformers

    if family in dict(MORE_VARIANTS):
        return _more_config(family, text, **overrides)

    kinds = {
        "llava": "LlavaConfig",
        "llava_next": "LlavaNextConfig",
        "llava_onevision": "LlavaOnevisionConfig",
        "video_llava": "VideoLlavaConfig",
        "vipllava": "VipLlavaConfig",
    }
    fields: dict[str, Any] = {
        "text_config": text_config(text, **overrides),
        "vision_config": vision_config(family),
        "image_token_index": IMAGE_TOKEN,
    }
    if family in ("video_llava", "llava_onevision"):
        fields["video_token_index"] = VIDEO_TOKEN
    if family in ("llava_next", "llava_onevision"):
        fields["image_grid_pinpoints"] = [[8, 16], [16, 8], [16, 16]]
    if family == "vipllava":
        newer = hasattr(transformers.VipLlavaConfig, "vision_feature_layer")  # renamed between 5.17 and 5.23
        fields["vision_feature_layer" if newer else "vision_feature_layers"] = [-2, -1, 1]
    return getattr(transformers, kinds[family])(**fields)


def _more_config(family: str, text: str, **overrides: Any) -> Any:
    import transformers

    def text_fields(**more: Any) -> dict[str, Any]:
        fields = text_config("llama").to_dict()
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
        return {name: fields[name] for name in names} | more | overrides

    if family == "internvl":
        tower = transformers.InternVLVisionConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=[24, 24], patch_size=[4, 4]
        )
        return transformers.InternVLConfig(
            vision_config=tower, text_config=text_config(text, **overrides), image_token_id=IMAGE_TOKEN, downsample_ratio=0.5
        )
    if family == "mistral3":
        tower = transformers.PixtralVisionConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=4
        )
        return transformers.Mistral3Config(
            vision_config=tower, text_config=text_config(text, **overrides), image_token_index=IMAGE_TOKEN, spatial_merge_size=2
        )
    if family in ("idefics3", "smolvlm"):
        kind = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
        tower = getattr(transformers, f"{kind}VisionConfig")(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
        )
        return getattr(transformers, f"{kind}Config")(
            vision_config=tower.to_dict(), text_config=text_config(text, **overrides), image_token_id=IMAGE_TOKEN, scale_factor=2,
            pad_token_id=PAD_TOKEN,
        )  # fmt: skip
    if family == "gemma3":
        fields = text_fields(
            head_dim=HEAD_DIM, sliding_window=12, query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        )  # fmt: skip
        tower = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
                 "patch_size": 4}  # fmt: skip
        return transformers.Gemma3Config(text_config=fields, vision_config=tower, image_token_index=IMAGE_TOKEN, mm_tokens_per_image=16)
    if family == "paligemma":
        tower = transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=20, patch_size=4,
            vision_use_head=False, projection_dim=HIDDEN,
        )  # fmt: skip
        return transformers.PaliGemmaConfig(
            text_config=transformers.GemmaConfig(**text_fields(head_dim=HEAD_DIM)), vision_config=tower, image_token_index=IMAGE_TOKEN,
            projection_dim=HIDDEN,
        )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 2, 3], "rope_theta": 10000.0}
    ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "vision_start_token_id": BESIDE}
    if family == "qwen3_vl":
        tower = {"hidden_size": 32, "intermediate_size": 40, "depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
                 "temporal_patch_size": 2, "out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0, 1],
                 "num_position_embeddings": 64}  # fmt: skip
        fields = text_fields(head_dim=HEAD_DIM, rope_parameters=rope)
        return transformers.Qwen3VLConfig(text_config=fields, vision_config=tower, **ids)
    fields = text_fields(rope_parameters=rope)
    if family == "qwen2_vl":
        tower = {"embed_dim": 32, "hidden_size": HIDDEN, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
                 "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
        return transformers.Qwen2VLConfig(text_config=fields, vision_config=tower, **ids)
    tower = {"hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 40, "depth": 2, "num_heads": 2, "patch_size": 4,
             "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=fields, vision_config=tower, **ids)


def build(family: str, text: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny random model in eval mode on the CPU, the same for the same arguments.

    Args:
        family: one of ``FAMILIES``.
        text: one of ``TEXTS``.
        seed: of the weights.
        dtype: of the weights; they are drawn in float32 and then rounded.
        overrides: fields of the text config.
    """
    import transformers

    kinds = {
        "llava": "LlavaForConditionalGeneration",
        "llava_next": "LlavaNextForConditionalGeneration",
        "llava_onevision": "LlavaOnevisionForConditionalGeneration",
        "video_llava": "VideoLlavaForConditionalGeneration",
        "vipllava": "VipLlavaForConditionalGeneration",
        "internvl": "InternVLForConditionalGeneration",
        "mistral3": "Mistral3ForConditionalGeneration",
        "idefics3": "Idefics3ForConditionalGeneration",
        "smolvlm": "SmolVLMForConditionalGeneration",
        "qwen2_vl": "Qwen2VLForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "gemma3": "Gemma3ForConditionalGeneration",
        "paligemma": "PaliGemmaForConditionalGeneration",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        model = getattr(transformers, kinds[family])(config(family, text, **overrides))
        _draw(model, torch.Generator().manual_seed(zlib.crc32(f"{family}/{text}/{seed}".encode())))
    model = model.eval().to(dtype)
    _settle(model)
    return model


def build_text(seed: int = 0, **overrides: Any) -> Any:
    """A text-only model with the same vocabulary."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        model = LlamaForCausalLM(text_config("llama", **overrides))
        _draw(model, torch.Generator().manual_seed(77 + seed))
    model = model.eval()
    _settle(model)
    return model


def _settle(model: Any) -> None:
    settings = model.generation_config
    settings.pad_token_id = PAD_TOKEN
    settings.eos_token_id = None  # lengths are the test's choice
    settings.suppress_tokens = [IMAGE_TOKEN, VIDEO_TOKEN]


@torch.no_grad()
def _draw(model: nn.Module, generator: torch.Generator) -> None:
    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    for name, parameter in model.named_parameters():
        text = not any(tower in name for tower in ("vision_tower", "image_tower", "video_tower", "vision_model", ".visual."))
        fan_in = parameter.shape[-1]
        if name.endswith("image_newline"):
            normal(parameter, 1.0)
        elif "embed_tokens" in name:
            normal(parameter, 1.0)
        elif "norm" in name and name.endswith("weight"):
            zero_centred = model.config.model_type in ("gemma3", "paligemma") and text
            parameter.fill_(0.0 if zero_centred else 1.0)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(0.4 if zero_centred else 1.4)
        elif parameter.ndim == 1:
            normal(parameter, 0.1)
        elif name.endswith("lm_head.weight"):
            normal(parameter, 4.0 / fan_in**0.5)
        elif "q_proj" in name or "k_proj" in name:
            normal(parameter, (1.4 if text else 1.0) / fan_in**0.5)
        elif "multi_modal_projector" in name:
            normal(parameter, 1.6 / fan_in**0.5)
        elif parameter.ndim == 2 and "embedding" not in name:
            normal(parameter, 1.0 / fan_in**0.5)
        elif "patch_embedding" in name:
            normal(parameter, 1.0 / parameter[0].numel() ** 0.5)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The text model's decoder layers."""
    return model.get_decoder().layers


def _pixels(family: str, kind: str, generator: torch.Generator, alone: bool) -> dict[str, Tensor]:
    """One picture or video as the model takes it."""

    def noise(*shape: int) -> Tensor:
        # smooth blobs rather than white noise: neighbouring patches differ, but not all in the same way
        return torch.randn(shape, generator=generator) * 0.8 + torch.randn((*shape[:-2], 1, 1), generator=generator)

    if family in dict(MORE_VARIANTS):
        return _more_pixels(family, kind, noise, generator)
    side = 8 if family in ("llava_next", "llava_onevision") else 20
    if kind == "video":
        return {"pixel_values_videos": noise(1, FRAMES, 3, side, side)}
    if family in ("llava_next", "llava_onevision"):
        sizes = [(16, 16), (8, 16), (10, 16), (16, 8), (12, 16)]
        size = sizes[int(torch.randint(len(sizes), (1,), generator=generator))]
        crops = {(16, 16): 5, (8, 16): 3, (16, 8): 3, (10, 16): 5, (12, 16): 5}[size]
        if not alone and family == "llava_onevision":  # several pictures in a row are not cut into crops there
            crops = 1
        pixels = torch.zeros(1, 5, 3, side, side)
        pixels[:, :crops] = noise(1, crops, 3, side, side)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}
    return {_image_field(family): noise(1, 3, side, side)}


def _more_pixels(family: str, kind: str, noise: Any, generator: torch.Generator) -> dict[str, Tensor]:
    if family.startswith("qwen"):  # as the processor cuts it: a row a patch of 2 frames, merged two by two
        sizes = [(4, 8), (8, 8), (6, 4), (8, 6)]
        high, wide = sizes[int(torch.randint(len(sizes), (1,), generator=generator))]
        frames = FRAMES if kind == "video" else 1
        rows = noise(frames * high * wide, 3 * 2 * 4 * 4)
        suffix = "_videos" if kind == "video" else ""
        return {f"pixel_values{suffix}": rows, f"{kind}_grid_thw": torch.tensor([[frames, high, wide]])}
    if family == "mistral3":
        sizes = [(16, 24), (24, 24), (24, 16), (32, 32)]
        high, wide = sizes[int(torch.randint(len(sizes), (1,), generator=generator))]
        pixels = torch.zeros(1, 3, 32, 32)
        pixels[..., :high, :wide] = noise(1, 3, high, wide)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[high, wide]])}
    side = {"internvl": 24, "paligemma": 20}.get(family, 32)
    return {"pixel_values": noise(1, 1, 3, side, side) if family in ("idefics3", "smolvlm") else noise(1, 3, side, side)}


def _image_field(family: str) -> str:
    """What the model calls its pictures; Video-LLaVA had a name of its own up to transformers 5.22."""
    import transformers

    fields = inspect.signature(transformers.VideoLlavaForConditionalGeneration.forward).parameters
    return "pixel_values_images" if family == "video_llava" and "pixel_values" not in fields else "pixel_values"


@torch.no_grad()
def _count(model: Any, kind: str, pixels: dict[str, Tensor], alone: bool) -> int:
    parameter = next(model.parameters())
    dtype, pixels = parameter.dtype, {name: value.to(parameter.device) for name, value in pixels.items()}
    if kind == "video":
        fields = {name: value.to(dtype) if value.is_floating_point() else value for name, value in pixels.items()}
        known = inspect.signature(model.model.get_video_features).parameters
        if "pixel_values_videos" not in known:  # OneVision's name for them in older versions of transformers
            fields["pixel_values"] = fields.pop("pixel_values_videos")
        features = model.model.get_video_features(**fields, return_dict=True)
    else:
        fields = {name: value.to(dtype) if value.is_floating_point() else value for name, value in pixels.items()}
        if not alone and model.config.model_type == "llava_onevision":
            fields["batch_num_images"] = torch.tensor([2])
            fields = {
                name: value.repeat(2, *[1] * (value.ndim - 1)) if name != "batch_num_images" else value for name, value in fields.items()
            }
            return int(model.model.get_image_features(**fields, return_dict=True).pooler_output[0].shape[0])
        features = model.model.get_image_features(**fields, return_dict=True)
    rows = sum(item.shape[0] for item in features.pooler_output)
    if kind == "video" and model.config.model_type == "llava_onevision" and rows % FRAMES == 0:
        rows += 1  # the newline after a video, which older versions of transformers add later
    return rows


def inputs(model: Any, rows: Sequence[Row], *, seed: int = 0, pad_to: int | None = None) -> dict[str, Tensor]:
    """Inputs of ``model.generate``, left padded.

    What a row holds depends only on the row itself and the seed: ``inputs(model, [row])`` has the same tokens and pictures as that row
    in a batch.

    Args:
        model: made by :func:`build`.
        rows: each a list such as ``["text 3", "image", "text 5"]``; items are ``text N``, ``image``, ``video``.
        seed: of the content.
        pad_to: the padded length; the longest row's if None.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 ``[B, S]``, and ``pixel_values``, ``image_sizes``, ``batch_num_images``,
        ``pixel_values_videos`` as the family and the rows need them.
    """
    family = model.config.model_type
    ids: list[list[int]] = []
    pictures: dict[str, list[Tensor]] = {}
    images_per_row: list[int] = []
    for row in rows:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}|{'|'.join(row)}".encode()))
        alone = sum(item == "image" for item in row) < 2
        tokens: list[int] = []
        for item in row:
            if item.startswith("text"):
                count = int(item.split()[1])
                tokens += torch.randint(FIRST_WORD, IMAGE_TOKEN, (count,), generator=generator).tolist()
                continue
            pixels = _pixels(family, item, generator, alone)
            count, token = _count(model, item, pixels, alone), VIDEO_TOKEN if item == "video" else IMAGE_TOKEN
            if family in dict(MORE_VARIANTS):
                parts = FRAMES if family == "qwen3_vl" and item == "video" else 1  # there a time stands before each frame
                tokens += [BESIDE, *[token] * (count // parts)] * parts
            else:
                tokens += [token] * count
            for name, value in pixels.items():
                pictures.setdefault(name, []).append(value)
        ids.append(tokens)
        images_per_row.append(sum(item == "image" for item in row))
    length = max(pad_to or 0, *(len(tokens) for tokens in ids))
    dtype = next(model.parameters()).dtype
    fields = {
        "input_ids": torch.tensor([[PAD_TOKEN] * (length - len(tokens)) + tokens for tokens in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in ids]),
    }
    if family in ("idefics3", "smolvlm") and pictures:  # a row's pictures side by side, empty ones behind them
        each = iter(pictures["pixel_values"])
        most = max(images_per_row)
        rows_of = [[next(each) for _ in range(count)] for count in images_per_row]
        empty = torch.zeros_like(pictures["pixel_values"][0])
        pictures["pixel_values"] = [torch.cat([*row, *[empty] * (most - len(row))], dim=1) for row in rows_of]
    if family == "gemma3":
        fields["token_type_ids"] = (fields["input_ids"] == IMAGE_TOKEN).long()
    if family == "paligemma":
        fields["token_type_ids"] = torch.zeros_like(fields["input_ids"])
    if family.startswith("qwen"):
        fields["mm_token_type_ids"] = (fields["input_ids"] == IMAGE_TOKEN).int() + 2 * (fields["input_ids"] == VIDEO_TOKEN).int()
    for name, values in pictures.items():
        joined = torch.cat(values)
        fields[name] = joined.to(dtype) if joined.is_floating_point() else joined
    if family == "llava_onevision" and "pixel_values" in fields:
        fields["batch_num_images"] = torch.tensor(images_per_row)
    return fields


@contextlib.contextmanager
def poisoned(parameter: Tensor, value: float = float("nan")) -> Iterator[None]:
    """Fills a parameter with ``value`` for a while."""
    saved = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(saved)
