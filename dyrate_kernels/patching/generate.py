"""``generate()`` of a patched model, and methods that it calls on its way: which cache it gets, when a turn begins, what is told of it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from transformers.generation import GenerationMode

from dyrate_kernels.generation.record import Snapshot
from dyrate_kernels.generation.session import Session
from dyrate_kernels.patching import calls, leaving
from dyrate_kernels.patching.assisted import NoDrafts, of_this_turn, one_at_a_time
from dyrate_kernels.patching.cache import VisualCache, why_unpruned
from dyrate_kernels.patching.calls import Call, PatchOwner
from dyrate_kernels.patching.lookup import cache_in, cache_name
from dyrate_kernels.patching.path import path_of
from dyrate_kernels.patching.reduction import ReducedPrompts
from dyrate_kernels.stats import Path


class Generations:
    """Answers in place of the methods of one patched model (``overrides.Override``).

    Args:
        owner: its ``Handle``.
        reduced: what shortens its prompts.

    Attributes:
        last: what ``stats()`` tells of the last generation; a str: why it cannot; None: there was none.
        path: of the last generation.
    """

    def __init__(self, owner: PatchOwner, reduced: ReducedPrompts) -> None:
        self.owner, self.reduced = owner, reduced
        self.last: Snapshot | str | None = None
        self.path: Path | None = None
        self._told = self._told_undrafted = self._told_round = False

    def answer_generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """``generate`` as the model has it, and then a word if nothing was dropped."""
        with calls.begin(self.owner) as call:
            call.asks = _asked_cache(self.owner.model, args, kwargs)
            self.owner.running.append(call)
            try:
                if self.owner.vision:
                    args, kwargs = self.reduced.prompt(call, args, kwargs)
                output = original(*args, **kwargs)
                if not call.nested:
                    self.last = call.unpruned if call.session is None else call.session.snapshot()
                    self.path = path_of(self.owner, call)
                    self._tell_if_nothing_dropped(call)
                return output
            except BaseException as error:
                if not call.nested:
                    self.last, self.path = f"it ended with {type(error).__name__}", path_of(self.owner, call)
                raise
            finally:
                self.owner.running.remove(call)
                if self.owner.fused is not None:
                    self.owner.fused.off()
                if call.graph is not None:
                    call.graph.end()
                if call.widens is not None:
                    call.widens.remove()
                call.session = call.features = call.graph = call.present = call.widens = None

    def answer_prepare_cache(
        self,
        original: Any,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
    ) -> Any:
        """Makes the cache of a generation, and begins its turn."""
        call = calls.current(self.owner)
        rest = (generation_mode, batch_size, max_cache_length, *args)
        cache = cache_in(model_kwargs)
        ours = isinstance(cache, VisualCache)
        if call is not None:
            call.asks_features = False  # from here on passes of the base model with this call's cache do
        else:
            self._tell_of_a_way_round(bool(self.owner.vision))
        if not ours:
            why = why_unpruned(cache, {} if call is None else call.asks)
            if why is not None:
                if call is not None:
                    call.unpruned = why
                return original(generation_config, model_kwargs, *rest)
            # what is left says nothing but what the checkpoint was saved with, in training or for another way to run it
            generation_config.use_cache, generation_config.cache_implementation = True, None
        if generation_config.output_attentions:
            raise ValueError(
                "output_attentions=True is not available on a patched model (fused attention makes no attention matrix); "
                "use patch(..., record_importance=True) and handle.stats(), or unpatch the model first"
            )
        if ours:
            if cache.session.policy != self.owner.policy or str(cache.session.retention) != self.owner.retention:
                raise ValueError(
                    f"{cache_name()} was made under another policy or retention ({cache.session.retention}) than this model is patched "
                    f"with ({self.owner.retention}); "
                    f"start again without {cache_name()}"
                )
            original(generation_config, model_kwargs, *rest)
        else:
            session = Session(
                self.owner.policy,
                self.owner.shape,
                self.owner.retention,
                self.owner.backend,
                self.owner.record_importance,
                self.owner.heads,
            )
            cache = model_kwargs[cache_name()] = VisualCache(session)
        assistant = bool(getattr(generation_config, "is_assistant", False))
        mask = model_kwargs.get("attention_mask")
        # transformers drops a mask of ones and notes its length
        prompt = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION and not one_at_a_time(self.owner.policy)
        if self.owner.vision:
            names = "+".join(reducer.name for reducer in self.owner.vision)
            cache.session.reduced_by(names, call is not None and call.reduced, call is not None and call.keeps_width)
        cache.session.begin_turn(prompt, max_cache_length + 1, frozen=assisted or assistant, assistant=assistant, mask=mask)
        if call is not None:
            call.session, call.plain = cache.session, generation_mode in leaving.PLAIN
            self._choose_path(call, cache.session)
        return None

    def _choose_path(self, call: Call, session: Session) -> None:
        """Decides for the generation that begins whether its steps are captured and its layers fused."""
        owner, device = self.owner, next(self.owner.model.parameters()).device
        call.layers = owner.unfused if owner.fused is None else owner.fused.begin(owner.model, session.backend, device)
        if owner.graph is not None:
            owner.graph.begin(call)

    def answer_refuse_batching(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{original.__name__}() (continuous batching) keeps its own paged cache and cannot drop visual tokens; "
            "use model.generate(...) with a batch, or dyrate_kernels.unpatch(model) first"
        )

    def answer_prepare_inputs(self, original: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs)
        if "next_sequence_length" in kwargs and isinstance(cache, VisualCache):
            kwargs = of_this_turn(cache.session, input_ids.shape[1], kwargs)
        inputs = original(input_ids, *args, **kwargs)
        call = calls.current(self.owner)
        if call is None or call.session is None or not isinstance(cache, VisualCache) or cache.session is not call.session:
            return inputs
        call.prepares = True
        return leaving.narrowed(call, inputs)

    def answer_candidates(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns what drafts tokens in assisted decoding: nothing does for a policy whose steps come one at a time."""
        if not isinstance(cache_in(kwargs.get("model_kwargs", {})), VisualCache):
            return original(*args, **kwargs)
        if not self._told_undrafted:
            self._told_undrafted = True
            warnings.warn(
                f"policy {self.owner.policy.name!r} needs what came of each step before it decides the next one, so no token can be "
                "drafted ahead: generate() goes on token by token, without assistant model or prompt lookup; leave these out or change the "
                "policy",
                stacklevel=2,
            )
        return NoDrafts()

    def _tell_of_a_way_round(self, reduces: bool) -> None:
        """A generation that did not come through the patched ``generate()``: it prunes, but nobody can tell when it ends."""
        what = "stats() cannot tell of it" + (", and no reducer works in it" if reduces else "")
        self.last = f"it called generate() past the patched one, so {what}; call model.generate as it is after dyrate_kernels.patch()"
        if not self._told_round:
            self._told_round = True
            warnings.warn(
                f"this generation calls generate() past the patched one (of the class, or taken before dyrate_kernels.patch()), so {what}; "
                "call model.generate as it is after the patch",
                stacklevel=2,
            )

    def _tell_if_nothing_dropped(self, call: Call) -> None:
        session = call.session
        if self._told or not self.owner.policy.drops:
            return
        if session is None and call.unpruned is not None:
            self._told = True
            warnings.warn(f"nothing is dropped in this generation with policy {self.owner.policy.name!r}: {call.unpruned}", stacklevel=4)
        steps = 0 if session is None else session.steps_without_a_drop()
        if not steps:
            return
        self._told = True
        reason = (
            "recoverable retention prunes from the second token on"
            if steps == 1 and self.owner.retention == "recoverable"
            else (f"the policy chose to keep every visual token at each of the {steps} steps")
        )
        warnings.warn(f"nothing was dropped in this generation with policy {self.owner.policy.name!r}: {reason}", stacklevel=4)


_CACHE_SETTINGS = ("use_cache", "cache_implementation")


def _asked_cache(model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns what the caller of ``generate`` says about the cache: by an argument, or in a generation config where that differs from the
    checkpoint's own.
    """
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    asked = {}
    for name in _CACHE_SETTINGS:
        value = kwargs.get(name, getattr(config, name, None))
        if value is not None and (name in kwargs or value != getattr(model.generation_config, name, None)):
            asked[name] = value
    return asked
