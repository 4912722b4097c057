"""Hooks on the base model, the text model and the model as a whole: arguments and results of a pass on a ``VisualCache``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.generation.index import marked, scattered
from dyrate_kernels.generation.passes import MultiTokenPass
from dyrate_kernels.generation.session import Session
from dyrate_kernels.patching import attention, calls
from dyrate_kernels.patching.cache import VisualCache
from dyrate_kernels.patching.calls import Call, PatchOwner
from dyrate_kernels.patching.lookup import blocks_ahead, by_name, cache_in, decoder_of, positional_names, visual_columns
from dyrate_kernels.patching.shrink import gather_columns


class PassHooks:
    """The hooks of one patched model.

    Args:
        owner: its ``Handle``.
    """

    def __init__(self, owner: PatchOwner) -> None:
        self.owner = owner
        self._decoder_names = positional_names(decoder_of(owner.model).forward)
        self._base_names = positional_names(owner.model.base_model.forward)
        self._handles: list[Any] = []

    def install(self) -> None:
        """Registers those that are needed."""
        model, decoder = self.owner.model, decoder_of(self.owner.model)
        self._handles += [
            model.base_model.register_forward_pre_hook(self.before_base, with_kwargs=True),
            decoder.register_forward_pre_hook(self.before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self.after_decoder, with_kwargs=True),
        ]
        if self.owner.vision:
            self._handles.append(model.base_model.register_forward_hook(self.after_base, always_call=True))
        if self.owner.policy.reads_logits:
            self._handles.append(model.register_forward_hook(self.after_model, with_kwargs=True))

    def remove(self) -> None:
        """Takes every hook away."""
        for handle in self._handles:
            handle.remove()

    def before_base(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        bound = by_name(self._base_names, args, kwargs)
        cache = cache_in(bound)
        session = cache.session if isinstance(cache, VisualCache) else None
        call = calls.current(self.owner) if self.owner.vision else None
        if call is not None:
            call.passes.append(session is not None and call.session is session)
        if session is None:
            return None
        if not _is_step(session, bound):
            pictures = bound.get("pixel_values") is not None
            blocks = blocks_ahead(self.owner.family, bound, pictures or not cache.is_initialized)
            visual = visual_columns(self.owner.model, self.owner.family, bound.get("input_ids"), bound.get("inputs_embeds"))
            session.stage(visual, blocks, None if self.owner.family.sees_ahead is None else bound.get("attention_mask"))
        if self.owner.family.sees_ahead is None:
            return None
        # such a model makes its masks here, before the text model is called
        device = next(value.device for name in ("inputs_embeds", "input_ids") if (value := bound.get(name)) is not None)
        return (), bound | {"attention_mask": torch.zeros(1, 1, 1, 1, device=device)}

    def after_base(self, module: Any, args: tuple, output: Any) -> None:
        call = calls.current(self.owner)
        if call is not None and call.passes:
            call.passes.pop()

    def before_decoder(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        bound = by_name(self._decoder_names, args, kwargs)
        cache = cache_in(bound)
        call = calls.current(self.owner) if self.owner.vision else None
        if call is not None and call.passes:
            call.passes[-1] = False  # the base model has its features
        fused = self.owner.fused
        fused = None if fused is None or not fused.installed else fused
        if fused is not None:
            fused.off()
        if not isinstance(cache, VisualCache):
            return None
        if bound.get("output_attentions"):
            raise ValueError("output_attentions=True is not available on a patched model; use handle.stats(), or unpatch the model first")
        session = cache.session
        hidden = bound.get("inputs_embeds")
        hidden = bound["input_ids"] if hidden is None else hidden
        mask = bound.get("attention_mask") if self.owner.family.sees_ahead is None else None
        session.begin_forward(hidden.shape[0], hidden.shape[1], mask, hidden.device)
        if isinstance(session.passing, MultiTokenPass) and session.passing.narrow is not None:
            hidden = _narrowed(bound, *session.passing.narrow)
        if session.reads_embeddings:
            session.read_embeddings(hidden if hidden.is_floating_point() else module.get_input_embeddings()(hidden))
        # a 4D mask passes transformers' mask creation untouched, which saves its time and its host sync
        bound["attention_mask"] = torch.zeros(1, 1, 1, 1, device=hidden.device)
        bound[attention.CARRIER] = cache
        if fused is not None and (not fused.automatic or _fuses(calls.current(self.owner), session)):
            fused.on(session.backend, hidden.device)
        return (), bound

    def after_decoder(self, module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        cache = kwargs.get(attention.CARRIER)
        if cache is None:
            return None
        if self.owner.fused is not None and self.owner.fused.installed:
            self.owner.fused.off()
        passing = cache.session.passing
        cache.session.finish_forward()
        narrow = passing.narrow if isinstance(passing, MultiTokenPass) else None
        return None if narrow is None else _widened(output, *narrow, passing.length)

    def after_model(self, module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        """Shows the policy what came of the pass; where it asks for it, the step runs once more unpruned, and that is its result."""
        cache = cache_in(kwargs)
        if not isinstance(cache, VisualCache):
            return None
        graphed = self.owner.graph is not None and vars(module).get("forward") is self.owner.graph
        forward = self.owner.graph.eager if graphed else module.forward
        return cache.session.see_logits(output.logits[:, -1], lambda: forward(*args, **kwargs))


def _narrowed(bound: dict[str, Any], source: Tensor, filled: Tensor) -> Tensor:
    """Leaves only these columns (``MultiTokenPass.narrow``) in the arguments of the text model. Returns what enters its first layer."""
    name = "input_ids" if bound.get("inputs_embeds") is None else "inputs_embeds"
    bound[name] = gather_columns(bound[name], source)
    positions = bound.get("position_ids")
    if positions is None:
        raise ValueError("position_ids are missing; a prompt whose visual tokens were reduced is read through generate(), which makes them")
    if positions.dim() == 3:  # of three or four kinds (M-RoPE)
        bound["position_ids"] = torch.stack([gather_columns(each, source) for each in positions])
    else:
        bound["position_ids"] = gather_columns(positions, source)
    if bound.get("cache_position") is not None:
        bound["cache_position"] = bound["cache_position"][-source.shape[1] :]
    visual = bound.get("visual_pos_masks")
    if visual is not None:  # with features that are added to these columns after the first layers
        stays = marked(torch.where(filled, source, -1).to(visual.device), visual.shape[1])[visual]
        bound["visual_pos_masks"] = gather_columns(visual, source) & filled.to(visual.device)
        bound["deepstack_visual_embeds"] = [each[stays.to(each.device)] for each in bound["deepstack_visual_embeds"]]
    return bound[name]


def _widened(output: Any, source: Tensor, filled: Tensor, length: int) -> Any:
    """Puts hidden states back to their columns; those that were left out are 0."""
    hidden = output[0]
    full = scattered(torch.where(filled, source, -1).to(hidden.device), hidden, length)
    if isinstance(output, tuple):
        return (full, *output[1:])
    output.last_hidden_state = full
    return output


def _fuses(call: Call | None, session: Session) -> bool:
    """This pass is one of a generation that fuses."""
    return call is not None and call.session is session and call.layers is None


def _is_step(session: Session, bound: dict[str, Any]) -> bool:
    """A decode step: its column is text, whatever its id."""
    ids = bound.get("input_ids")
    return ids is not None and session.is_decode(ids.shape[1])
