"""``patch(model)``, ``unpatch(model)`` and the ``Handle`` between them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode

from dyrate_kernels import policies
from dyrate_kernels import vision as reducers
from dyrate_kernels.cache import VisualCache
from dyrate_kernels.ops import dispatch
from dyrate_kernels.patching import attention, calls
from dyrate_kernels.patching.calls import Call
from dyrate_kernels.patching.drafts import NoDrafts, of_this_turn, one_at_a_time
from dyrate_kernels.patching.families import (
    blocks_ahead,
    by_name,
    cache_in,
    cache_name,
    check_supported,
    decoder_layers,
    deepstack_layers,
    positional_names,
    shape_of,
    text_model,
    visual_columns,
)
from dyrate_kernels.patching.forward import Forward
from dyrate_kernels.patching.fused import Fused, check_fusable
from dyrate_kernels.patching.graph import StepGraph
from dyrate_kernels.patching.overrides import Override
from dyrate_kernels.patching.parallel import head_shards
from dyrate_kernels.patching.session import Session
from dyrate_kernels.patching.shrink import ShrinkHooks, gather_columns
from dyrate_kernels.patching.vision import PIXELS, features_for, pixel_kinds, prepare
from dyrate_kernels.patching.vision import check_supported as check_reducers
from dyrate_kernels.patching.wrapped import unwrapped
from dyrate_kernels.policies.base import ModelShape, Policy
from dyrate_kernels.specs import RETENTIONS
from dyrate_kernels.stats import Snapshot, Stats, collect, snapshot
from dyrate_kernels.vision import Reducer

logger = logging.getLogger(__name__)

_HANDLE = "_dyrate_handle"
_NO_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def patch(
    model: Any,
    policy: str | Policy = "dyrate",
    *,
    retention: str = "recoverable",
    backend: str = "auto",
    predictor: Any = None,
    k: int | None = None,
    record_importance: bool = False,
    cuda_graph: bool = False,
    fuse: bool = False,
    vision: str | Reducer | Sequence[str | Reducer] | None = None,
) -> Handle:
    """Makes ``model.generate`` drop visual tokens while it generates. Works on this instance only; ``unpatch`` undoes it.

    Args:
        model: a supported vision-language model (``patching.families.FAMILIES``), or what ``torch.compile`` or PEFT made of one: then the
            model inside is patched.
        policy: a name of ``dyrate_kernels.policies.names()``, with options if wanted (``"fastv:rate=0.5"``), or a policy object, e.g.
            ``policies.FastV(k=3, rate=0.5)``.
        retention: ``"recoverable"`` (every row stays; layers >= k read only the chosen ones, which may come back) or ``"evict"`` (dropped
            rows are gone, the prompt is shrunk in layers >= k).
        backend: ``"auto"``, ``"triton"``, ``"cuda"`` or ``"reference"``; see ``dyrate_kernels.backends()``.
        predictor: for the policy name ``"dyrate"``: a ``DyRatePredictor``, a folder or a hub id; None is the
            one in the model's own folder (with retention ``recoverable``, which it was trained for), else the closed form.
        k: for a policy given by name: first layer that sees the pruned set, 1 .. L-1.
        record_importance: keep importance and kept tokens of every step for ``stats()`` (costs ``5 * N`` bytes a step and sequence).
        cuda_graph: capture a decode step once in every ``generate()`` and replay it for the tokens that follow (``patching.graph``). Needs
            the model on one CUDA device; where a step cannot be captured it runs eagerly, and a warning says why, once.
        fuse: RMSNorm, rotary embedding and gate of the decoder layers in one launch each (``patching.fused``), for text models of Llama,
            Mistral, Qwen2, Qwen3, Gemma, Gemma 3 and Qwen-VL on backend ``triton``. Results differ by rounding. Elsewhere it has no effect,
            and says so.
        vision: reducers that leave fewer visual tokens before the language model: a name of ``dyrate_kernels.vision.names()``, with options
            (``"aim:keep=0.5"``), several (``"tome+aim"``), a ``Reducer``, or a list of these; None: none. They work in ``generate``;
            those that look into the vision tower (``Reducer.reads_tower``) need a LLaVA or PaliGemma with CLIP or SigLIP.

    Returns:
        A ``Handle``, also a context manager that unpatches at its end.

    Raises:
        TypeError: the model is not supported; the message names what is.
        ValueError: a bad argument, or one that does not fit this model.
        RuntimeError: the model is patched already, or the named backend cannot run.
    """
    model = unwrapped(model)
    family = check_supported(model)
    if _HANDLE in vars(model):
        raise RuntimeError("model is patched already; call dyrate_kernels.unpatch(model) first, then patch it with the new settings")
    if retention not in RETENTIONS:
        raise ValueError(f"retention must be one of {', '.join(RETENTIONS)}; got {retention!r}")
    for name, value in (("cuda_graph", cuda_graph), ("fuse", fuse)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if fuse:
        check_fusable(model)
    if isinstance(policy, str):
        options = {name: value for name, value in (("k", k), ("predictor", predictor)) if value is not None}
        policy = policies.parse(policy, **options)
    elif not isinstance(policy, Policy):
        raise TypeError(f"policy must be a name ({', '.join(policies.names())}) or a Policy object, got {type(policy).__name__}")
    elif predictor is not None or k is not None:
        raise ValueError("k and predictor go with a policy given by name; this policy object holds its own: set them there")
    if policy.needs_recoverable and retention != "recoverable":
        raise ValueError(f"policy {policy.name!r} brings tokens back, which retention={retention!r} cannot; use retention='recoverable'")
    chain = reducers.chain(vision)
    check_reducers(model, chain)
    bound = policy.bind(shape_for(model, retention))
    deepstack = deepstack_layers(model)
    first = bound.layer_groups(len(decoder_layers(model)))[0]
    if retention == "evict" and bound.at_prefill and first < deepstack:
        raise ValueError(
            f"k must be at least {deepstack} for this {model.config.model_type} with retention='evict', got {first}: visual features are "
            f"added to the hidden states after its first {deepstack} layers, so no token can leave before; raise k, or use 'recoverable'"
        )
    dispatch.name_for(backend, next(model.parameters()).device)  # raises now, not in the middle of a generation
    if bound.merges and retention == "recoverable":
        warnings.warn(
            f"policy {bound.name!r} merges dropped tokens into others, but retention='recoverable' drops none, so nothing is merged; "
            "patch with retention='evict', or set recycle=0",
            stacklevel=2,
        )
    handle = Handle(model, family, bound, retention, backend, record_importance, cuda_graph, chain, fuse)
    logger.info("%s", handle)
    return handle


def unpatch(model: Any) -> None:
    """Puts everything back as it was before ``patch``, bit for bit.

    Raises:
        RuntimeError: the model is not patched.
    """
    handle = vars(unwrapped(model)).get(_HANDLE)
    if handle is None:
        raise RuntimeError("model is not patched; nothing to undo")
    handle.unpatch()


def shape_for(model: Any, retention: str) -> ModelShape:
    """What policies are bound to. Under ``evict`` the predictor in the model's folder is no default: it was trained for tokens that can
    come back, and here its boldest step would be the last word.
    """
    return ModelShape.from_config(model.config).replace(trained_by_default=retention == "recoverable")


class Handle:
    """A patched model's controls. Made by ``patch``; usable as a context manager.

    Attributes:
        model: the patched model.
        policy: the policy, bound to the model.
        retention: as asked for.
        fused: with ``fuse=True`` what turns the fused modules on and off; else None.
        graph: with ``cuda_graph=True`` what captures and replays decode steps, and counts them; else None.
        vision: the reducers before the language model, in order; empty: none.
        running: the calls of ``generate()`` under way, in all threads, the newest last.
    """

    def __init__(
        self,
        model: Any,
        family: Any,
        policy: Policy,
        retention: str,
        backend: str,
        record_importance: bool,
        cuda_graph: bool = False,
        vision: Sequence[Reducer] = (),
        fuse: bool = False,
    ) -> None:
        self.model, self.family, self.policy, self.retention = model, family, policy, retention
        self.vision = tuple(vision)
        self._asked_backend = backend
        self.record_importance = record_importance
        self.heads = head_shards(model)
        if cuda_graph and self.heads is not None:
            raise ValueError("cuda_graph=True is not available for a model whose heads are shared among processes; leave it out")
        self.running: list[Call] = []
        self._last: Snapshot | str | None = None  # of the last generation; a str: why there is none
        self._told = self._told_undrafted = self._told_round = False
        self._active = True
        self._hooks: list[Any] = []
        self._overrides: list[Override] = []
        self._shrink: ShrinkHooks | None = None
        self.graph = StepGraph(self) if cuda_graph else None
        self.fused = Fused() if fuse else None
        try:
            self._install()
        except BaseException:
            self.unpatch()
            raise

    @property
    def backend(self) -> str:
        """The backend of the next generation: ``auto`` follows the model when it is moved to another device."""
        return dispatch.name_for(self._asked_backend, next(self.model.parameters()).device)

    @property
    def shape(self) -> ModelShape:
        """The text model's shape as it is now; another after ``model.to(dtype)`` or with an adapter."""
        shape = shape_of(self.model)
        return shape if self.heads is None else shape.replace(stored_weights=None)  # costs are of the whole model, not of a process's share

    def _install(self) -> None:
        model, layers = self.model, len(decoder_layers(self.model))
        vars(model)[_HANDLE] = self
        self._decoder_names = positional_names(text_model(model).forward)
        self._base_names = positional_names(model.base_model.forward)
        reads = self.policy.reads_hidden or (self.retention == "evict" and self.policy.merges)
        deciding = {start - 1 for start in self.policy.layer_groups(layers)} if reads else set()
        for index, layer in enumerate(decoder_layers(model)):
            attention.swap(layer.self_attn, shows_hidden=index in deciding)
        if self.fused is not None:
            self.fused.install(text_model(model))
        self._hooks += [
            model.base_model.register_forward_pre_hook(self._before_base, with_kwargs=True),
            text_model(model).register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            text_model(model).register_forward_hook(self._after_decoder, with_kwargs=True),
        ]
        if self.vision:
            self._hooks.append(model.base_model.register_forward_hook(self._after_base, always_call=True))
        if self.retention == "evict" and self.policy.at_prefill:
            self._shrink = ShrinkHooks(decoder_layers(model), self.policy.layer_groups(layers))
        self._override(model, "generate", "generate")
        self._override(model, "_prepare_cache_for_generation", "prepare_cache")
        self._override(model, "prepare_inputs_for_generation", "prepare_inputs")
        if one_at_a_time(self.policy):
            self._override(model, "_get_candidate_generator", "candidates")
        for name in _NO_BATCHING:
            if hasattr(model, name):
                self._override(model, name, "refuse_batching")
        if self.vision:
            for kind in PIXELS:
                if hasattr(model.base_model, f"get_{kind}_features"):
                    self._override(model.base_model, f"get_{kind}_features", f"{kind}_features")
            if hasattr(model.base_model, "get_rope_index"):
                self._override(model, "_prepare_position_ids_for_generation", "prepare_positions")
        if self.policy.reads_logits:
            self._hooks.append(model.register_forward_hook(self._after_model, with_kwargs=True))
        if self.graph is not None:
            self.graph.install()

    def _override(self, owner: Any, name: str, answer: str) -> None:
        self._overrides.append(Override(owner, name, self, f"_answer_{answer}"))

    def unpatch(self) -> None:
        """Undoes the patch; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        model = self.model
        for hook in self._hooks:
            hook.remove()
        if self._shrink is not None:
            self._shrink.remove()
        if self.fused is not None:
            self.fused.remove(text_model(model))
        for layer in decoder_layers(model):
            attention.restore(layer.self_attn)
        for override in self._overrides:
            override.remove()
        vars(model).pop(_HANDLE, None)
        if self.graph is not None:
            self.graph.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """The handle of a copied model, in which nothing is under way."""
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self) | {"running": []}, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(attention.UNPATCH_FIRST)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        layers = decoder_layers(self.model)
        state = "patched" if self._active else "no longer patched"
        return (
            f"Handle({type(self.model).__name__} {state}: {len(layers)} text attention modules "
            f"({type(layers[0].self_attn).__name__}), policy={self.policy}, retention={self.retention}, backend={self.backend}"
            f"{f', vision={list(self.vision)}' if self.vision else ''}{', cuda_graph=True' if self.graph is not None else ''}"
            f"{', fuse=True' if self.fused is not None else ''})"
        )

    def stats(self, sequence: int | None = None, new_tokens: int | None = None) -> Stats:
        """What the last generation really did. Reads the device once.

        Args:
            sequence: what this sequence of the batch would have reported alone; None: of all.
            new_tokens: of its first tokens, where it ended before others of its batch; None: of all steps.

        Raises:
            RuntimeError: nothing was generated yet.
            ValueError: there is no such sequence or step.
        """
        session = self.session
        last = self._last if session is None else snapshot(session)
        if last is None:
            raise RuntimeError("nothing was generated yet: call model.generate(...) on the patched model, then stats()")
        if isinstance(last, str):
            raise RuntimeError(f"stats() has nothing of the last generate(): {last}")
        return collect(last, sequence, new_tokens)

    @property
    def session(self) -> Session | None:
        """Of the generation under way: of this thread, else the newest one; None while there is none."""
        call = calls.current(self)
        if call is not None:
            return call.session
        return next((call.session for call in reversed([*self.running]) if call.session is not None), None)

    # ---- generate ---------------------------------------------------------------------------------------------------------------

    def _answer_generate(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """``generate`` as the model has it, and then a word if nothing was dropped."""
        with calls.begin(self) as call:
            call.asks = _asked_cache(self.model, args, kwargs)
            self.running.append(call)
            try:
                if self.vision:
                    args, kwargs = self._reduce(call, args, kwargs)
                output = original(*args, **kwargs)
                if not call.nested:
                    self._last = call.unpruned if call.session is None else snapshot(call.session)
                    self._tell_if_nothing_dropped(call)
                return output
            except BaseException as error:
                if not call.nested:
                    self._last = f"it ended with {type(error).__name__}"
                raise
            finally:
                self.running.remove(call)
                if self.fused is not None:
                    self.fused.off()
                if call.graph is not None:
                    call.graph.end()
                session, call.session, call.features, call.graph = call.session, None, None, None
                if session is not None:
                    session.part_from_cache()

    def _reduce(self, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Reduces the visual tokens of a prompt: the arguments of ``generate`` with what went masked. The model's own calls for features
        in this call are answered by the reduced ones.
        """
        given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        config = given.get("generation_config") or self.model.generation_config
        cache = cache_in(given)
        ours = isinstance(cache, VisualCache)
        if not ours and _why_unpruned(cache, call.asks) is not None:
            return args, kwargs  # as unpatched
        if getattr(config, "is_assistant", False):  # what it drafts decides nothing, and it may be given the features of another model
            if call.nested:
                call.features, call.asks_features = call.outer.features, True
            return args, kwargs
        reduced = ours and cache.session is not None and cache.session.reduced
        kinds, active = pixel_kinds(given), [reducer for reducer in self.vision if reducer.drops]
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
            known = cache.session.column_valid.to(mask.device)
            if known.shape[0] != mask.shape[0] or mask.shape[1] < past:
                raise ValueError(
                    f"attention_mask must be [{known.shape[0]}, {past} + new columns] for this cache, got {list(mask.shape)}; "
                    "give the mask of the whole conversation"
                )
            mask = mask.clone()
            mask[:, : known.shape[1]] *= known.to(mask.dtype)
        if kinds and active:
            call.features = prepare(self.model, active, self.backend, given, ids, mask)
            call.asks_features = True
            mask = call.features.mask
        call.reduced = True
        call.keeps_width = bool(given.get("output_hidden_states", getattr(config, "output_hidden_states", False)))
        return args, kwargs | {"attention_mask": mask}

    def _answer_image_features(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self._features("image", original, args, kwargs)

    def _answer_video_features(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return self._features("video", original, args, kwargs)

    def _features(self, kind: str, original: Any, args: tuple, kwargs: dict) -> Any:
        """The reduced features, where the call of this thread asks for them; else the model's own."""
        call, found = calls.current(self), None
        if call is not None and call.features is not None and (call.passes[-1] if call.passes else call.asks_features):
            found = features_for(call.features, kind, args, kwargs)
        return original(*args, **kwargs) if found is None else found

    def _answer_prepare_positions(self, original: Any, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Positions of three dimensions are made from the mask before it was reduced: they follow from the size of each picture, so a
        token keeps its place in it whatever else went.
        """
        call = calls.current(self)
        if call is not None and call.mask is not None:
            model_kwargs = model_kwargs | {"attention_mask": call.mask}
        return original(inputs_tensor, model_kwargs)

    def _default_mask(self, ids: Tensor, config: Any, given: dict[str, Any], past: int) -> Tensor:
        """What transformers makes where no mask is given: 0 at padding, if that can be told from the end of an answer."""
        if past and ids.shape[1] <= past:
            return torch.ones(ids.shape[0], past + ids.shape[1], dtype=torch.long, device=ids.device)
        pad, end = (given.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
        if pad is None or (end is not None and pad in (end if isinstance(end, list | tuple) else [end])):
            return torch.ones_like(ids)
        return (ids != pad).long()

    def _answer_prepare_cache(
        self,
        original: Any,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
    ) -> Any:
        call = calls.current(self)
        rest = (generation_mode, batch_size, max_cache_length, *args)
        cache = cache_in(model_kwargs)
        ours = isinstance(cache, VisualCache)
        if call is not None:
            call.asks_features = False  # from here on passes of the base model with this call's cache do
        else:
            self._tell_of_a_way_round(bool(self.vision))
        if not ours:
            why = _why_unpruned(cache, {} if call is None else call.asks)
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
            if cache.session is None or cache.session.policy != self.policy or cache.session.retention != self.retention:
                raise ValueError(
                    f"{cache_name()} was made under another policy or retention than this model is patched with; "
                    f"start again without {cache_name()}"
                )
            original(generation_config, model_kwargs, *rest)
        else:
            session = Session(self.policy, self.shape, self.retention, self.backend, self.record_importance, self.heads)
            cache = model_kwargs[cache_name()] = session.cache
        assistant = bool(getattr(generation_config, "is_assistant", False))
        mask = model_kwargs.get("attention_mask")
        # transformers drops a mask of ones and notes its length
        prompt = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION and not one_at_a_time(self.policy)
        if self.vision:
            cache.session.vision = "+".join(reducer.name for reducer in self.vision)
            if call is not None and call.reduced:
                cache.session.reduced, cache.session.keeps_width = True, call.keeps_width
        cache.session.turn_mask = mask
        cache.session.begin_turn(prompt, max_cache_length + 1, frozen=assisted or assistant, assistant=assistant)
        if call is not None:
            call.session = cache.session
        return None

    def _answer_refuse_batching(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{original.__name__}() (continuous batching) keeps its own paged cache and cannot drop visual tokens; "
            "use model.generate(...) with a batch, or dyrate_kernels.unpatch(model) first"
        )

    def _answer_prepare_inputs(self, original: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs)
        if "next_sequence_length" in kwargs and isinstance(cache, VisualCache) and cache.session is not None:
            kwargs = of_this_turn(cache.session, input_ids.shape[1], kwargs)
        return original(input_ids, *args, **kwargs)

    def _answer_candidates(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """What drafts tokens in assisted decoding: nothing does for a policy whose steps come one at a time."""
        if not isinstance(cache_in(kwargs.get("model_kwargs", {})), VisualCache):
            return original(*args, **kwargs)
        if not self._told_undrafted:
            self._told_undrafted = True
            warnings.warn(
                f"policy {self.policy.name!r} needs what came of each step before it decides the next one, so no token can be drafted "
                "ahead: generate() goes on token by token, without assistant model or prompt lookup; leave these out or change the policy",
                stacklevel=2,
            )
        return NoDrafts()

    def _tell_of_a_way_round(self, reduces: bool) -> None:
        """A generation that did not come through the patched ``generate()``: it prunes, but nobody can tell when it ends."""
        what = "stats() cannot tell of it" + (", and no reducer works in it" if reduces else "")
        self._last = f"it called generate() past the patched one, so {what}; call model.generate as it is after dyrate_kernels.patch()"
        if not self._told_round:
            self._told_round = True
            warnings.warn(
                f"this generation calls generate() past the patched one (of the class, or taken before dyrate_kernels.patch()), so {what}; "
                "call model.generate as it is after the patch",
                stacklevel=2,
            )

    def _tell_if_nothing_dropped(self, call: Call) -> None:
        session = call.session
        if self._told or not self.policy.drops:
            return
        if session is None and call.unpruned is not None:
            self._told = True
            warnings.warn(f"nothing is dropped in this generation with policy {self.policy.name!r}: {call.unpruned}", stacklevel=4)
        if session is None or session.record is None:
            return
        record = session.record
        visual = session.cache.full.n_visual
        if session.cache.full.bound == 0 or bool((record.kept[: record.steps] < visual).any()):
            return
        self._told = True
        reason = (
            "recoverable retention prunes from the second token on"
            if record.steps == 1 and not session.evict
            else (f"the policy chose to keep every visual token at each of the {record.steps} steps")
        )
        warnings.warn(f"nothing was dropped in this generation with policy {self.policy.name!r}: {reason}", stacklevel=4)

    # ---- forward ----------------------------------------------------------------------------------------------------------------

    def _before_base(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        bound = by_name(self._base_names, args, kwargs)
        cache = cache_in(bound)
        session = cache.session if isinstance(cache, VisualCache) else None
        call = calls.current(self) if self.vision else None
        if call is not None:
            call.passes.append(session is not None and call.session is session)
        if session is None:
            return None
        if not _is_step(session, bound):
            pictures = bound.get("pixel_values") is not None
            blocks = blocks_ahead(self.family, bound, pictures or not cache.is_initialized)
            session.stage(visual_columns(self.model, self.family, bound.get("input_ids"), bound.get("inputs_embeds")), blocks)
        if self.family.sees_ahead is None:
            return None
        # such a model makes its masks here, before the text model is called
        session.staged_mask = bound.get("attention_mask")
        device = next(value.device for name in ("inputs_embeds", "input_ids") if (value := bound.get(name)) is not None)
        return (), bound | {"attention_mask": torch.zeros(1, 1, 1, 1, device=device)}

    def _after_base(self, module: Any, args: tuple, output: Any) -> None:
        call = calls.current(self)
        if call is not None and call.passes:
            call.passes.pop()

    def _before_decoder(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        bound = by_name(self._decoder_names, args, kwargs)
        cache = cache_in(bound)
        call = calls.current(self) if self.vision else None
        if call is not None and call.passes:
            call.passes[-1] = False  # the base model has its features
        if self.fused is not None:
            self.fused.off()
        if not isinstance(cache, VisualCache):
            return None
        if bound.get("output_attentions"):
            raise ValueError("output_attentions=True is not available on a patched model; use handle.stats(), or unpatch the model first")
        if cache.session is None:
            raise RuntimeError("this VisualCache has no session; let generate() make it")
        hidden = bound.get("inputs_embeds")
        hidden = bound["input_ids"] if hidden is None else hidden
        mask = bound.get("attention_mask") if self.family.sees_ahead is None else cache.session.staged_mask
        cache.session.begin_forward(hidden.shape[0], hidden.shape[1], mask, hidden.device)
        if cache.session.forward.narrow is not None:
            hidden = _narrowed(bound, cache.session.forward)
        if cache.session.raters is not None:
            cache.session.raters.read(hidden if hidden.is_floating_point() else module.get_input_embeddings()(hidden))
        # a 4D mask passes transformers' mask creation untouched, which saves its time and its host sync
        bound["attention_mask"] = torch.zeros(1, 1, 1, 1, device=hidden.device)
        bound[attention.CARRIER] = cache
        if self.fused is not None:
            self.fused.on(cache.session.backend, hidden.device)
        return (), bound

    def _after_decoder(self, module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        cache = kwargs.get(attention.CARRIER)
        if cache is None:
            return None
        if self.fused is not None:
            self.fused.off()
        forward = cache.session.forward
        cache.session.finish_forward()
        return None if forward.narrow is None else _widened(output, forward)

    def _after_model(self, module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        """Shows the policy what came of the pass; where it asks for it, the step runs once more unpruned, and that is its result."""
        cache = cache_in(kwargs)
        session = cache.session if isinstance(cache, VisualCache) else None
        if session is None or session.frozen or not session.state or cache.length < session.turn_end:
            return None
        step, logits = cache.length - session.turn_end, output.logits[:, -1]
        if step > 0 and cache.full.bound > 0 and self.policy.checks(step):
            graphed = self.graph is not None and vars(module).get("forward") is self.graph
            forward = self.graph.eager if graphed else module.forward
            with session.again():
                output = forward(*args, **kwargs)
            self.policy.see_unpruned(logits, output.logits[:, -1], session.state)
            logits = output.logits[:, -1]
        self.policy.see_logits(logits, session.state)
        return output


def _narrowed(bound: dict[str, Any], forward: Forward) -> Tensor:
    """Leaves only the columns ``forward.narrow`` in the arguments of the text model. Returns what enters its first layer."""
    source, filled = forward.narrow
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
        stays = torch.zeros(visual.shape[0], visual.shape[1] + 1, dtype=torch.bool, device=visual.device)
        stays.scatter_(1, torch.where(filled, source, visual.shape[1]).to(visual.device), True)
        stays = stays[:, :-1][visual]
        bound["visual_pos_masks"] = gather_columns(visual, source) & filled.to(visual.device)
        bound["deepstack_visual_embeds"] = [each[stays.to(each.device)] for each in bound["deepstack_visual_embeds"]]
    return bound[name]


def _widened(output: Any, forward: Forward) -> Any:
    """Puts hidden states back to their columns; those that were left out are 0."""
    source, filled = forward.narrow
    hidden = output[0]
    place = torch.where(filled, source, forward.length).to(hidden.device)
    wide = hidden.new_zeros(hidden.shape[0], forward.length + 1, hidden.shape[2])
    wide = wide.scatter_(1, place[..., None].expand_as(hidden), hidden)[:, :-1]
    if isinstance(output, tuple):
        return (wide, *output[1:])
    output.last_hidden_state = wide
    return output


def _is_step(session: Session, bound: dict[str, Any]) -> bool:
    """A decode step: its column is text, whatever its id."""
    ids = bound.get("input_ids")
    return ids is not None and session.is_decode(ids.shape[1])


_CACHE_SETTINGS = ("use_cache", "cache_implementation")


def _asked_cache(model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the caller of ``generate`` says about the cache: by an argument, or in a generation config where that differs from the
    checkpoint's own.
    """
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    asked = {}
    for name in _CACHE_SETTINGS:
        value = kwargs.get(name, getattr(config, name, None))
        if value is not None and (name in kwargs or value != getattr(model.generation_config, name, None)):
            asked[name] = value
    return asked


def _why_unpruned(cache: Any, asked: dict[str, Any]) -> str | None:
    """Why a generation runs as on an unpatched model: its caller wants another cache, or none. None where it does not."""
    if cache is not None:
        return f"generate() was given a {type(cache).__name__}; leave {cache_name()} out, or give one that a patched generate() returned"
    if asked.get("use_cache") is False:
        return "generate() was called with use_cache=False; leave it out"
    if asked.get("cache_implementation") is not None:
        return f"generate() was called with cache_implementation={asked['cache_implementation']!r}; leave it out"
    return None
