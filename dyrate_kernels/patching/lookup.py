"""Look-ups in a loaded model by the table of families (``families.FAMILIES``): can it be patched, its parts, its calls' arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from dyrate_kernels.families import FAMILIES, PREFIX, Family, names
from dyrate_kernels.patching.attention import sliding_window
from dyrate_kernels.patching.modules import Decoder, DecoderLayer
from dyrate_kernels.policies.base import ModelShape

CACHE_NAMES = ("cache", "past_key_values")  # the argument that carries the cache: its name from transformers 5.24 on, and before


@cache
def cache_name() -> str:
    """Returns the installed transformers' name of the cache in ``generate``'s ``model_kwargs``: one of ``CACHE_NAMES``."""
    return next(name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call by name; None where there is none. A caller may still use the older name."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def check_supported(model: Any) -> Family:
    """The family of ``model``.

    Raises:
        TypeError: not a supported vision-language model; says which are.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    supported = f"supported: {', '.join(names())}"
    if not issubclass(type(model), nn.Module) or name is None:
        raise TypeError(f"model must be a transformers vision-language model, got {type(model).__name__}; {supported}")
    if name not in FAMILIES:
        raise TypeError(f"model of type {name!r} ({type(model).__name__}) is not supported; {supported}")
    if not issubclass(type(model), PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model itself, not what wraps or stands for one, got {type(model).__name__}; "
            "patch the model inside"
        )
    if not hasattr(model, "generate") or not hasattr(model, "lm_head"):
        raise TypeError(
            f"model must be the ...ForConditionalGeneration class, got {type(model).__name__}: "
            "patch the model that has generate(), not its inner part"
        )
    if FAMILIES[name].sees_ahead is not None and "block_sequence_ids" not in inspect.signature(create_causal_mask).parameters:
        raise TypeError(f"{name} needs a newer transformers, whose masks are those that it was trained with: 5.17 is, 5.6 is not")
    text = config.get_text_config()
    known = FAMILIES[name].text_models
    if text.model_type not in known:
        raise TypeError(f"the text model {text.model_type!r} of this {name} is not supported; supported: {', '.join(known)}")
    for entry, why in {"attn_logit_softcapping": "logit softcapping", "kv_lora_rank": "latent attention"}.items():
        if getattr(text, entry, None):
            raise TypeError(f"the text model uses {why} ({entry}), which is not supported; load a model without it")
    for layer in decoder_layers(model):
        attention = layer.self_attn
        if getattr(attention, "sinks", None) is not None:
            raise TypeError("the text model uses attention sinks, which is not supported; load a model without them")
        kind = getattr(type(attention), "_dyrate_original", type(attention))
        if not hasattr(attention, "layer_idx") or not hasattr(sys.modules[kind.__module__], "eager_attention_forward"):
            raise TypeError(
                f"the text model's attention is a {type(attention).__name__}, not transformers' own, so it cannot be patched (PEFT's "
                "modules_to_save puts such a module around it): merge or unload what replaces it, then patch"
            )
    return FAMILIES[name]


def deepstack_layers(model: Any) -> int:
    """Returns how many of the first decoder layers visual features are added behind (Qwen3-VL); 0 for all others."""
    return len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def decoder_of(model: Any) -> Decoder:
    """The decoder: the module that owns ``layers``."""
    decoder = model.get_decoder()
    return cast(Decoder, decoder if hasattr(decoder, "layers") else decoder.model)


def decoder_layers(model: Any) -> Sequence[DecoderLayer]:
    """The decoder layers of the text model."""
    return decoder_of(model).layers


def shape_of(model: Any) -> ModelShape:
    """The text model's shape as it is now: its weights' dtype and bytes, and the windows of its layers, from the modules themselves."""
    windows = tuple(sliding_window(layer.self_attn) for layer in decoder_layers(model))
    return ModelShape.from_config(model.config, dtype=decoder_of(model).dtype).replace(
        stored_weights=stored_weights(model), windows=windows if any(windows) else ()
    )


def stored_weights(model: Any, embedding: bool = True) -> int:
    """Bytes of the weights that a pass of the text model and its head reads, as they are held: in their own dtypes, or quantised with
    their scales; adapters where they are active and not merged; what is shared counts once.

    Args:
        embedding: with the input embedding, although a step reads only a row a sequence of it (a head tied to it counts in any case).
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    modules = [*decoder_of(model).modules(), *head.modules()]
    left_out = {id(tensor) for module in modules for tensor in _unread(module)}
    if not embedding:
        left_out |= {id(tensor) for tensor in table.parameters()} - {id(tensor) for tensor in head.parameters()}
    held = {}
    for module in modules:
        persistent = [buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set]
        for tensor in (*module._parameters.values(), *persistent):
            if tensor is not None and id(tensor) not in left_out:
                held[_storage(tensor)] = tensor
    return sum(map(_stored_bytes, held.values()))


def _unread(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of a module that peft has wrapped which its forward does not read: adapters that are off, merged or not the active one, and
    the original where a trained copy stands in for it.
    """
    active = () if getattr(module, "disable_adapters", False) else getattr(module, "active_adapters", ())
    names = getattr(module, "adapter_layer_names", ())
    saved, original = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
    if saved is not None and original is not None:
        names = ("modules_to_save",)
        if any(name in saved for name in active):
            yield from original.parameters()
    elif getattr(module, "merged", False):
        active = ()
    for name in names:
        for adapter, part in getattr(module, name, {}).items():
            if adapter not in active:
                yield from part.parameters() if isinstance(part, nn.Module) else (part,)


def _storage(tensor: Tensor) -> tuple:
    """Returns what tells a tensor from others: where its numbers are; itself where they are nowhere (offloaded) or in it (torchao)."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.shape


def _stored_bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "to_local"):  # torchao: values and scales inside of one
        return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes + _scale_bytes(getattr(tensor, "quant_state", None)) + getattr(getattr(tensor, "SCB", None), "nbytes", 0)


def _scale_bytes(state: Any) -> int:
    """Of a ``quant_state`` of bitsandbytes: scales, which may be quantised themselves."""
    if state is None:
        return 0
    return state.absmax.nbytes + _scale_bytes(getattr(state, "state2", None))


def visual_columns(model: Any, family: Family, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
    """bool ``[B, q]``: which columns are placeholders of visual tokens; None where neither ids nor embeddings were given."""
    ids = [getattr(model.config, name) for name in family.visual_ids if getattr(model.config, name, None) is not None]
    if input_ids is None and inputs_embeds is None:
        return None
    mask = None
    for token_id in ids:
        if input_ids is not None:
            hit = input_ids == token_id
        else:  # as transformers itself finds them
            assert inputs_embeds is not None
            weight = model.get_input_embeddings().weight
            hit = (inputs_embeds == weight[token_id].to(inputs_embeds.device, inputs_embeds.dtype)).all(-1)
        mask = hit if mask is None else mask | hit
    return mask


def blocks_ahead(family: Family, bound: Mapping[str, Any], first: bool) -> Tensor | None:
    """int64 ``[B, S]``: by column, the block whose columns read each other in both directions, -1 for none; None: causal throughout.

    Args:
        bound: arguments of the base model, by name.
        first: this pass starts with an empty cache, or brings pictures.
    """
    types = bound.get("token_type_ids")
    if types is None or family.sees_ahead is None or (family.sees_ahead == PREFIX and not first):
        return None
    if family.sees_ahead == PREFIX:
        return torch.where(types == 0, 0, -1)
    image = types == 1
    starts = image & ~torch.nn.functional.pad(image, (1, 0))[:, :-1]
    return torch.where(image, starts.cumsum(1) - 1, -1)


def positional_names(forward: Any) -> tuple[str, ...]:
    """Names of the arguments that may be given by position. Read once: torch.compile cannot look into a signature."""
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


def by_name(names: tuple[str, ...], args: tuple, kwargs: dict) -> dict[str, Any]:
    """All arguments by name, whether they were given by position or not."""
    return dict(zip(names, args, strict=False)) | kwargs if args else dict(kwargs)
