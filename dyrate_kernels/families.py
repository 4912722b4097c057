"""What is particular about each model family, text model and vision tower: one row each, and nothing of it stands elsewhere.

A table without imports, since everything above the operators asks it: policies and cost models (the shape of a text model), ``patching``
(what can be patched, fused, and where reducers work), ``training``. A new family is a row here, a builder in ``tests/builders.py`` and a
line in ``docs/families.md``; code only where its attention differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

IMAGES, PREFIX = "images", "prefix"  # of ``Family.sees_ahead``


@dataclass(frozen=True)
class TextModel:
    """A text model: what its decoder layers hold besides what its config says.

    Attributes:
        qkv_bias: queries, keys and values have a bias and the output has none, whatever the config's ``attention_bias`` says.
        qk_norm: queries and keys are normalised per head.
        layer_norms: normalisations of the hidden width in a layer.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    layer_norms: int = 2


@dataclass(frozen=True)
class Tower:
    """A vision tower that reducers can look into: layers with ``self_attn`` (``q_proj``, ``k_proj``), two norms and ``mlp``.

    Attributes:
        has_cls: its first row is a [CLS] token, which the language model does not see.
    """

    has_cls: bool


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        text_models: those of ``TEXT_MODELS`` that it is supported with.
        visual_ids: names of the config entries that hold the ids of visual placeholder tokens.
        sees_ahead: columns of a prompt that read each other in both directions: ``IMAGES`` (those of one picture: ``token_type_ids`` 1),
            ``PREFIX`` (the whole prompt: ``token_type_ids`` 0), or None.
        tower: reducers can look into its tower, where that is one of ``TOWERS``.
        grid: what comes out of its projector is a grid in raster order for each picture, tile or frame, which ``patching.grids`` finds the
            sides of: reducers that ask nothing of the tower work on it.
        trainable: predictors can be trained for it: its prompts are plain causal text, its positions the columns' own numbers.
    """

    text_models: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3")
    visual_ids: tuple[str, ...] = ("image_token_id",)
    sees_ahead: str | None = None
    tower: bool = False
    grid: bool = False
    trainable: bool = False


TEXT_MODELS = {
    "gemma": TextModel(),
    "gemma3_text": TextModel(qk_norm=True, layer_norms=4),
    "llama": TextModel(),
    "mistral": TextModel(),
    "qwen2": TextModel(qkv_bias=True),
    "qwen2_vl_text": TextModel(qkv_bias=True),
    "qwen2_5_vl_text": TextModel(qkv_bias=True),
    "qwen3": TextModel(qk_norm=True),
    "qwen3_vl_text": TextModel(qk_norm=True),
}

TOWERS = {
    "clip_vision_model": Tower(has_cls=True),
    "siglip_vision_model": Tower(has_cls=False),
}

_BOTH = ("image_token_id", "video_token_id")

FAMILIES = {
    "gemma3": Family(("gemma3_text",), sees_ahead=IMAGES, grid=True),
    "idefics3": Family(grid=True),
    "internvl": Family(grid=True),
    "llava": Family(tower=True, grid=True, trainable=True),
    "llava_next": Family(tower=True, trainable=True),
    "llava_onevision": Family(visual_ids=_BOTH, tower=True, trainable=True),
    "mistral3": Family(grid=True),
    "paligemma": Family(("gemma",), sees_ahead=PREFIX, tower=True),
    "qwen2_vl": Family(("qwen2_vl_text",), _BOTH, grid=True),
    "qwen2_5_vl": Family(("qwen2_5_vl_text",), _BOTH, grid=True),
    "qwen3_vl": Family(("qwen3_vl_text",), _BOTH, grid=True),
    "smolvlm": Family(grid=True),
    "video_llava": Family(visual_ids=_BOTH, tower=True, trainable=True),
    "vipllava": Family(tower=True, trainable=True),
}


def text_model(model_type: str) -> TextModel:
    """Returns the row of a text model, plain where there is none: costs are counted for text models that cannot be patched, too."""
    return TEXT_MODELS.get(model_type, TextModel())


def names(where: Callable[[Family], bool] = lambda family: True) -> list[str]:
    """Returns the families for which this holds, sorted, for messages."""
    return sorted(name for name, family in FAMILIES.items() if where(family))
