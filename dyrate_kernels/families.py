"""The particulars of each model family, text model and vision tower: one row each, and nothing of it stands elsewhere.

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
    """A text model: what its decoder layers hold and compute besides what its config says.

    Attributes:
        title: what its classes in transformers are named by; the module is named by its ``model_type``.
        qkv_bias: queries, keys and values have a bias and the output has none, whatever the config's ``attention_bias`` says.
        qk_norm: queries and keys are normalised per head, before they are rotated (``q_norm``, ``k_norm``).
        layer_norms: normalisations of the hidden width in a layer; of four, two are of what attention and feed-forward block give.
        one_plus: a normalisation multiplies by ``1 + weight``.
        block_title: what its feed-forward block is named by, where that is another model's.
        fusable: its layers compute, but for the above, what ``ops.layers`` does (compared line by line with transformers 5.6.2 and 5.24;
            tests/patching/test_fused.py runs them).
    """

    title: str = ""
    qkv_bias: bool = False
    qk_norm: bool = False
    layer_norms: int = 2
    one_plus: bool = False
    block_title: str = ""
    fusable: bool = False

    @property
    def norm(self) -> str:
        """Name of the normalisation's class."""
        return f"{self.title}RMSNorm"

    @property
    def feed_forward(self) -> str:
        """Name of the feed-forward block's class."""
        return f"{self.block_title or self.title}MLP"

    @property
    def attention(self) -> str:
        """Name of the attention's class."""
        return f"{self.title}Attention"

    @property
    def layer(self) -> str:
        """Name of the decoder layer's class."""
        return f"{self.title}DecoderLayer"

    @property
    def four_norms(self) -> bool:
        """Returns whether what attention and feed-forward block give is normalised before it joins the residual stream."""
        return self.layer_norms == 4


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
    "llama": TextModel("Llama", fusable=True),
    "mistral": TextModel("Mistral", fusable=True),
    "qwen2": TextModel("Qwen2", qkv_bias=True, fusable=True),
    "qwen2_vl_text": TextModel("Qwen2VL", qkv_bias=True, block_title="Qwen2", fusable=True),
    "qwen2_5_vl_text": TextModel("Qwen2_5_VL", qkv_bias=True, block_title="Qwen2", fusable=True),
    "qwen3": TextModel("Qwen3", qk_norm=True, fusable=True),
    "qwen3_vl_text": TextModel("Qwen3VLText", qk_norm=True, fusable=True),
    "gemma": TextModel("Gemma", one_plus=True, fusable=True),
    "gemma3_text": TextModel("Gemma3", qk_norm=True, layer_norms=4, one_plus=True, fusable=True),
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


def module_of(model_type: str) -> str:
    """Returns the module of transformers that defines a text model."""
    name = model_type.removesuffix("_text")
    return f"transformers.models.{name}.modeling_{name}"


def names(where: Callable[[Family], bool] = lambda family: True) -> list[str]:
    """Returns the families for which this holds, sorted, for messages."""
    return sorted(name for name, family in FAMILIES.items() if where(family))
