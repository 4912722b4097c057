"""Prompts that reducers shorten: what ``generate()`` of a patched model is given instead, and what answers its own calls for features."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.patching import calls
from dyrate_kernels.patching.cache import VisualCache, why_unpruned
from dyrate_kernels.patching.calls import Call, PatchOwner
from dyrate_kernels.patching.lookup import cache_in
from dyrate_kernels.patching.vision import features_for, pixel_kinds, prepare


class ReducedPrompts:
    """Those of one patched model.

    Args:
        owner: its ``Handle``.
    """

    def __init__(self, owner: PatchOwner) -> None:
        self.owner = owner

    def prompt(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Reduces the visual tokens of a prompt: the arguments of ``generate`` with what went masked. The model's own calls for features
        in this call are answered by the reduced ones.
        """
        given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        config = given.get("generation_config") or self.owner.model.generation_config
        cache = cache_in(given)
        ours = isinstance(cache, VisualCache)
        if not ours and why_unpruned(cache, call.asks) is not None:
            return args, kwargs  # as unpatched
        if getattr(config, "is_assistant", False):  # what it drafts decides nothing, and it may be given the features of another model
            if call.nested and call.outer is not None:
                call.features, call.asks_features = call.outer.features, True
            return args, kwargs
        reduced = ours and cache.session.reduction.active
        kinds, active = pixel_kinds(given), [reducer for reducer in self.owner.vision if reducer.drops]
        ids = given.get("input_ids")
        ids = given.get("inputs") if ids is None else ids
        if given.get("mm_encoder_outputs"):
            raise ValueError("mm_encoder_outputs hold features that no reducer has seen; give generate() the pixel values, or vision=None")
        if ids is None or ids.dim() != 2 or given.get("inputs_embeds") is not None:
            if kinds:
                raise ValueError(
                    "vision reducers find the visual tokens by input_ids; give generate() input_ids and pixel values, no inputs_embeds"
                )
            warnings.warn("generate() got inputs_embeds and no pixel values: what is visual in them is passed on unreduced", stacklevel=5)
            return args, kwargs
        if not (kinds and active) and not reduced:
            return args, kwargs
        past = cache.get_seq_length() if ours else 0
        mask = given.get("attention_mask")
        mask = self._default_mask(ids, config, given, past) if mask is None else mask
        if past and mask.shape[1] == ids.shape[1]:
            ids = ids[:, past:]  # the whole conversation was given: as transformers does
        call.mask = mask
        if reduced:
            known = cache.session.reduction.valid.to(mask.device)
            if known.shape[0] != mask.shape[0] or mask.shape[1] < past:
                raise ValueError(
                    f"attention_mask must be [{known.shape[0]}, {past} + new columns] for this cache, got {list(mask.shape)}; "
                    "give the mask of the whole conversation"
                )
            mask = mask.clone()
            mask[:, : known.shape[1]] *= known.to(mask.dtype)
        if kinds and active:
            call.features = prepare(self.owner.model, active, self.owner.backend, given, ids, mask)
            call.asks_features = True
            mask = call.features.mask
        call.reduced = True
        call.keeps_width = bool(given.get("output_hidden_states", getattr(config, "output_hidden_states", False)))
        return args, kwargs | {"attention_mask": mask}

    def answer_image_features(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self._features("image", original, args, kwargs)

    def answer_video_features(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self._features("video", original, args, kwargs)

    def _features(self, kind: str, original: Any, args: tuple, kwargs: dict) -> Any:
        """The reduced features, where the call of this thread asks for them; else the model's own."""
        call, found = calls.current(self.owner), None
        if call is not None and call.features is not None and (call.passes[-1] if call.passes else call.asks_features):
            found = features_for(call.features, kind, args, kwargs)
        return original(*args, **kwargs) if found is None else found

    def answer_prepare_positions(self, original: Any, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Positions of three dimensions are made from the mask before it was reduced: they follow from the size of each picture, so a
        token keeps its place in it whatever else went.
        """
        call = calls.current(self.owner)
        if call is not None and call.mask is not None:
            model_kwargs = model_kwargs | {"attention_mask": call.mask}
        return original(inputs_tensor, model_kwargs)

    def _default_mask(self, ids: Tensor, config: Any, given: dict[str, Any], past: int) -> Tensor:
        """Returns the mask that transformers makes where none is given: 0 at padding, if that can be told from the end of an answer."""
        if past and ids.shape[1] <= past:
            return torch.ones(ids.shape[0], past + ids.shape[1], dtype=torch.long, device=ids.device)
        pad, end = (given.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
        if pad is None or (end is not None and pad in (end if isinstance(end, list | tuple) else [end])):
            return torch.ones_like(ids)
        return (ids != pad).long()
