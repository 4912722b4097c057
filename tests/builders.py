"""One builder a family: its tiny configuration, its pictures, and what else of its inputs differs. A new family is one class here and one
entry of ``BUILDERS``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

VOCAB = 99
IMAGE_TOKEN = 97
VIDEO_TOKEN = 98
PAD_TOKEN = 0
EOS_TOKEN = 1
BESIDE = 2  # id of the token that stands before each picture in some families
FIRST_WORD = 3  # ids below are special
FRAMES = 2
LAYERS = 5
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 12
HIDDEN = 48

Noise = Callable[..., Tensor]

_TOWER = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


def text_config(text: str, **overrides: Any) -> Any:
    """A tiny text config of the given kind."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    common = text_fields(intermediate_size=64)
    if text == "mistral":
        common["sliding_window"] = 24  # shorter than every prompt with a picture
    if text == "qwen3":
        common["head_dim"] = HEAD_DIM
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return kinds[text](**{**common, **overrides})


def text_fields(**more: Any) -> dict[str, Any]:
    """Returns the fields that all text configs have."""
    return {
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
    } | more


def pick(sizes: list[tuple[int, int]], generator: torch.Generator) -> tuple[int, int]:
    """One of the sizes, at random."""
    return sizes[int(torch.randint(len(sizes), (1,), generator=generator))]


class Builder:
    """A family. The name in transformers is in ``classes``: ``..Config``, ``..ForConditionalGeneration``.

    Attributes:
        texts: text models that it is tested with; ``own`` where it has one of its own.
        side: of a picture, in pixels.
        patches: visual tokens of a picture along a side, where its projector gives a grid; None: as ``grids`` says.
        beside: a token of its own stands before each picture.
        videos: it takes videos.
        row_holds_pictures: the pictures of a sequence come side by side, empty ones behind them.
        zero_centred: its text model's norms multiply by 1 + weight.
        llava: of the first families, whose configuration, inputs and towers are alike.
    """

    classes: str
    texts: tuple[str, ...] = ("llama",)
    side = 32
    patches: int | None = None
    beside = True
    videos = False
    row_holds_pictures = False
    zero_centred = False
    llava = False

    def config(self, text: str, **overrides: Any) -> Any:
        """``overrides`` go to the text config."""
        raise NotImplementedError

    def made(self, kind: str, **fields: Any) -> Any:
        """A configuration by the family's own class: ``kind`` is ``Config``, ``VisionConfig``, .."""
        import transformers

        return getattr(transformers, f"{self.classes}{kind}")(**fields)

    def pixels(self, kind: str, noise: Noise, generator: torch.Generator, alone: bool) -> dict[str, Tensor]:
        """One picture or video as the model takes it; ``alone``: it is the only one of its sequence."""
        return {"pixel_values": noise(1, 3, self.side, self.side)}

    def placeholders(self, kind: str, token: int, count: int) -> list[int]:
        """The ids that stand for ``count`` visual tokens."""
        return [BESIDE] * self.beside + [token] * count

    def count(self, model: Any, kind: str, fields: dict[str, Tensor], alone: bool) -> int:
        """Visual tokens of one picture or video."""
        features = getattr(model.model, f"get_{kind}_features")(**fields, return_dict=True)
        return sum(item.shape[0] for item in features.pooler_output)

    def finish(self, fields: dict[str, Tensor], images_per_row: list[int]) -> None:
        """Adds what ``generate`` needs besides ids, mask and pixels."""

    def grids(self, fields: dict[str, Tensor], kind: str) -> list[tuple[int, int, int]]:
        """Frames, height and width of each picture, tile or video in visual tokens, from the inputs alone."""
        assert self.patches is not None
        return [] if kind == "video" else [(1, self.patches, self.patches)] * len(fields["pixel_values"])


class Llava(Builder):
    classes, texts, side, beside, llava = "Llava", ("llama", "mistral", "qwen2", "qwen3"), 20, False, True

    def tower(self) -> Any:
        """A tiny CLIP tower: 5 x 5 patches, 2 x 2 for the families that cut a picture into crops."""
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(**{**_TOWER, "num_hidden_layers": 3}, image_size=self.side, projection_dim=32)

    def more(self) -> dict[str, Any]:
        """Fields of the family's own."""
        return {}

    def config(self, text: str, **overrides: Any) -> Any:
        fields = {"text_config": text_config(text, **overrides), "vision_config": self.tower(), "image_token_index": IMAGE_TOKEN}
        return self.made("Config", **fields, **self.more())


class VipLlava(Llava):
    classes, texts = "VipLlava", ("llama",)

    def more(self) -> dict[str, Any]:
        import transformers

        newer = hasattr(transformers.VipLlavaConfig, "vision_feature_layer")  # renamed between 5.17 and 5.23
        return {"vision_feature_layer" if newer else "vision_feature_layers": [-2, -1, 1]}


class VideoLlava(Llava):
    classes, texts, videos = "VideoLlava", ("llama",), True

    def more(self) -> dict[str, Any]:
        return {"video_token_index": VIDEO_TOKEN}

    def pixels(self, kind: str, noise: Noise, generator: torch.Generator, alone: bool) -> dict[str, Tensor]:
        import transformers

        if kind == "video":
            return {"pixel_values_videos": noise(1, FRAMES, 3, self.side, self.side)}
        known = inspect.signature(transformers.VideoLlavaForConditionalGeneration.forward).parameters
        name = "pixel_values" if "pixel_values" in known else "pixel_values_images"  # a name of its own up to transformers 5.22
        return {name: noise(1, 3, self.side, self.side)}


class LlavaNext(Llava):
    classes, texts, side = "LlavaNext", ("llama",), 8

    def more(self) -> dict[str, Any]:
        return {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}

    def cut(self, size: tuple[int, int], alone: bool) -> int:
        """How many crops a picture is cut into."""
        return {(16, 16): 5, (8, 16): 3, (16, 8): 3, (10, 16): 5, (12, 16): 5}[size]

    def pixels(self, kind: str, noise: Noise, generator: torch.Generator, alone: bool) -> dict[str, Tensor]:
        size = pick([(16, 16), (8, 16), (10, 16), (16, 8), (12, 16)], generator)
        crops = self.cut(size, alone)
        pixels = torch.zeros(1, 5, 3, self.side, self.side)
        pixels[:, :crops] = noise(1, crops, 3, self.side, self.side)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


class LlavaOnevision(LlavaNext):
    classes, texts, videos = "LlavaOnevision", ("qwen2",), True

    def tower(self) -> Any:
        from transformers import SiglipVisionConfig

        return SiglipVisionConfig(**{**_TOWER, "num_hidden_layers": 3}, image_size=self.side, vision_use_head=False)

    def more(self) -> dict[str, Any]:
        return super().more() | {"video_token_index": VIDEO_TOKEN}

    def cut(self, size: tuple[int, int], alone: bool) -> int:
        return super().cut(size, alone) if alone else 1  # several pictures in a row are not cut into crops

    def pixels(self, kind: str, noise: Noise, generator: torch.Generator, alone: bool) -> dict[str, Tensor]:
        if kind == "video":
            return {"pixel_values_videos": noise(1, FRAMES, 3, self.side, self.side)}
        return super().pixels(kind, noise, generator, alone)

    def count(self, model: Any, kind: str, fields: dict[str, Tensor], alone: bool) -> int:
        if kind == "video":
            if "pixel_values_videos" not in inspect.signature(model.model.get_video_features).parameters:
                fields = {"pixel_values": fields["pixel_values_videos"]}  # its name in older versions of transformers
            rows = super().count(model, kind, fields, alone)
            return rows + (rows % FRAMES == 0)  # the newline after a video, which older versions add later
        if alone:
            return super().count(model, kind, fields, alone)
        twice = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in fields.items()}
        features = model.model.get_image_features(**twice, batch_num_images=torch.tensor([2]), return_dict=True)
        return int(features.pooler_output[0].shape[0])

    def finish(self, fields: dict[str, Tensor], images_per_row: list[int]) -> None:
        if "pixel_values" in fields:
            fields["batch_num_images"] = torch.tensor(images_per_row)


class InternVL(Builder):
    classes, texts, side, patches = "InternVL", ("qwen2", "llama"), 24, 3

    def config(self, text: str, **overrides: Any) -> Any:
        tower = self.made("VisionConfig", **{**_TOWER, "patch_size": [4, 4]}, image_size=[24, 24])
        text_part = text_config(text, **overrides)
        return self.made("Config", vision_config=tower, text_config=text_part, image_token_id=IMAGE_TOKEN, downsample_ratio=0.5)


class Mistral3(Builder):
    classes, texts = "Mistral3", ("mistral",)

    def config(self, text: str, **overrides: Any) -> Any:
        import transformers

        tower = transformers.PixtralVisionConfig(**_TOWER, image_size=40)
        text_part = text_config(text, **overrides)
        return self.made("Config", vision_config=tower, text_config=text_part, image_token_index=IMAGE_TOKEN, spatial_merge_size=2)

    def pixels(self, kind: str, noise: Noise, generator: torch.Generator, alone: bool) -> dict[str, Tensor]:
        high, wide = pick([(16, 24), (24, 24), (24, 16), (32, 32)], generator)
        pixels = torch.zeros(1, 3, 32, 32)
        pixels[..., :high, :wide] = noise(1, 3, high, wide)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[high, wide]])}

    def grids(self, fields: dict[str, Tensor], kind: str) -> list[tuple[int, int, int]]:
        return [] if kind == "video" else [(1, high // 8, wide // 8) for high, wide in fields["image_sizes"].tolist()]


class Idefics3(Builder):
    classes, row_holds_pictures, patches = "Idefics3", True, 4

    def config(self, text: str, **overrides: Any) -> Any:
        tower = self.made("VisionConfig", **_TOWER, image_size=32).to_dict()
        text_part = text_config(text, **overrides)
        own = {"image_token_id": IMAGE_TOKEN, "scale_factor": 2, "pad_token_id": PAD_TOKEN}
        return self.made("Config", vision_config=tower, text_config=text_part, **own)

    def pixels(self, kind: str, noise: Noise, generator: torch.Generator, alone: bool) -> dict[str, Tensor]:
        return {"pixel_values": noise(1, 1, 3, self.side, self.side)}

    def grids(self, fields: dict[str, Tensor], kind: str) -> list[tuple[int, int, int]]:
        return [] if kind == "video" else [(1, 4, 4)] * int((fields["pixel_values"].flatten(2) != 0).any(-1).sum())


class SmolVLM(Idefics3):
    classes = "SmolVLM"


class Gemma3(Builder):
    classes, texts, patches, zero_centred = "Gemma3", ("own",), 4, True

    def config(self, text: str, **overrides: Any) -> Any:
        fields = text_fields(
            head_dim=HEAD_DIM, sliding_window=12, query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ) | overrides  # fmt: skip
        tower = {**_TOWER, "image_size": 32}
        return self.made("Config", text_config=fields, vision_config=tower, image_token_index=IMAGE_TOKEN, mm_tokens_per_image=16)

    def finish(self, fields: dict[str, Tensor], images_per_row: list[int]) -> None:
        fields["token_type_ids"] = (fields["input_ids"] == IMAGE_TOKEN).long()


class PaliGemma(Builder):
    classes, texts, side, patches, zero_centred = "PaliGemma", ("own",), 20, 5, True

    def config(self, text: str, **overrides: Any) -> Any:
        import transformers

        tower = transformers.SiglipVisionConfig(**_TOWER, image_size=20, vision_use_head=False, projection_dim=HIDDEN)
        text_part = transformers.GemmaConfig(**text_fields(head_dim=HEAD_DIM) | overrides)
        own = {"image_token_index": IMAGE_TOKEN, "projection_dim": HIDDEN}
        return self.made("Config", text_config=text_part, vision_config=tower, **own)

    def finish(self, fields: dict[str, Tensor], images_per_row: list[int]) -> None:
        fields["token_type_ids"] = torch.zeros_like(fields["input_ids"])


class Qwen2VL(Builder):
    """Pictures come as the processor cuts them: a row a patch of two frames, merged two by two."""

    classes, texts, videos = "Qwen2VL", ("own",), True
    text: dict[str, Any] = {}
    tower: dict[str, Any] = {"embed_dim": 32, "hidden_size": HIDDEN, "depth": 2, "num_heads": 2, "mlp_ratio": 2}

    def config(self, text: str, **overrides: Any) -> Any:
        rope = {"rope_type": "default", "mrope_section": [1, 2, 3], "rope_theta": 10000.0}
        tower = {**self.tower, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        ids = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "vision_start_token_id": BESIDE}
        return self.made("Config", text_config=text_fields(**self.text, rope_parameters=rope) | overrides, vision_config=tower, **ids)

    def pixels(self, kind: str, noise: Noise, generator: torch.Generator, alone: bool) -> dict[str, Tensor]:
        high, wide = pick([(4, 8), (8, 8), (6, 4), (8, 6)], generator)
        frames = FRAMES if kind == "video" else 1
        rows = noise(frames * high * wide, 3 * 2 * 4 * 4)
        suffix = "_videos" if kind == "video" else ""
        return {f"pixel_values{suffix}": rows, f"{kind}_grid_thw": torch.tensor([[frames, high, wide]])}

    def finish(self, fields: dict[str, Tensor], images_per_row: list[int]) -> None:
        fields["mm_token_type_ids"] = (fields["input_ids"] == IMAGE_TOKEN).int() + 2 * (fields["input_ids"] == VIDEO_TOKEN).int()

    def grids(self, fields: dict[str, Tensor], kind: str) -> list[tuple[int, int, int]]:
        shapes: Iterable[list[int]] = fields.get(f"{kind}_grid_thw", torch.zeros(0, 3).long()).tolist()
        return [(frames, high // 2, wide // 2) for frames, high, wide in shapes]


class Qwen25VL(Qwen2VL):
    classes = "Qwen2_5_VL"
    tower = {"hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 40, "depth": 2, "num_heads": 2, "window_size": 16,
             "fullatt_block_indexes": [1]}  # fmt: skip


class Qwen3VL(Qwen2VL):
    classes, text = "Qwen3VL", {"head_dim": HEAD_DIM}
    tower = {"hidden_size": 32, "intermediate_size": 40, "depth": 3, "num_heads": 2, "out_hidden_size": HIDDEN,
             "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}  # fmt: skip

    def placeholders(self, kind: str, token: int, count: int) -> list[int]:
        parts = FRAMES if kind == "video" else 1  # a time stands before each frame
        return [BESIDE, *[token] * (count // parts)] * parts


BUILDERS: dict[str, Builder] = {
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "video_llava": VideoLlava(),
    "vipllava": VipLlava(),
    "internvl": InternVL(),
    "mistral3": Mistral3(),
    "idefics3": Idefics3(),
    "smolvlm": SmolVLM(),
    "qwen2_vl": Qwen2VL(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "gemma3": Gemma3(),
    "paligemma": PaliGemma(),
}
