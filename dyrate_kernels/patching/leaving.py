"""Sequences that have ended leave the passes of a ``generate()`` under way, whose caller goes on counting all of them.

``generate`` keeps its batch: tokens, masks and criteria are of all sequences until the last one ends. What the model is given of them are
those still present, and what it returns gets back its rows, with logits of 0 for sequences that left: no token of theirs counts any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode

from dyrate_kernels.patching import calls
from dyrate_kernels.patching.cache import VisualCache
from dyrate_kernels.patching.calls import Call, PatchOwner
from dyrate_kernels.patching.lookup import cache_in

PLAIN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""Modes in which each sequence goes on by itself, a token at a time."""

_BY_SEQUENCE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


def worth(present: int, going_on: int) -> bool:
    """Returns whether a batch of ``present`` sequences becomes one of those that go on: some do, and a quarter or more have ended.
    So a batch of 32 becomes smaller nine times at most, and a step is captured anew as often.
    """
    return 0 < going_on and 4 * going_on <= 3 * present


def dismiss(owner: PatchOwner, ended: Tensor) -> bool:
    """Lets sequences leave the passes of the ``generate()`` under way in this thread, where it is ``worth`` it. One host read.

    Nothing happens where each sequence does not go on by itself (beams, assisted decoding), where the model's inputs are prepared past the
    patch (its method was replaced), or where its heads are shared among processes.

    Args:
        owner: the ``Handle`` of the model.
        ended: bool ``[B]``, of the batch that ``generate`` counts: what a sequence would say from now on is of no use.

    Returns:
        Whether some left.
    """
    call = calls.current(owner)
    session = None if call is None else call.session
    if call is None or session is None or not (call.plain and call.prepares) or session.turn.frozen or session.heads is not None:
        return False
    batch = session.roster.batch or session.store.batch
    if ended.shape != (batch,):
        raise ValueError(f"ended must be [{batch}], a flag for each sequence of this generate(), got {list(ended.shape)}")
    flags = ended.tolist()
    present = range(batch) if session.roster.present is None else session.roster.present
    stays = [place for place, number in enumerate(present) if not flags[number]]
    if not worth(len(present), len(stays)):
        return False
    session.dismiss(stays)
    call.present = torch.tensor(session.roster.present, dtype=torch.int64).to(session.store.device, non_blocking=True)
    if call.widens is None:
        call.widens = owner.model.register_forward_hook(_Widen(call), with_kwargs=True)
    return True


def narrowed(call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pass (``prepare_inputs_for_generation``) for the sequences that are present."""
    if call.present is None or call.session is None:
        return inputs
    batch = call.session.roster.batch
    chosen = {}
    for name in _BY_SEQUENCE:
        value = inputs.get(name)
        if isinstance(value, Tensor):
            dim = 1 if name == "position_ids" and value.dim() == 3 else 0  # positions of several kinds (M-RoPE)
            if value.shape[dim] == batch:
                chosen[name] = value.index_select(dim, call.present.to(value.device))
    return inputs | chosen


class _Widen:
    """A forward hook on the model: gives the logits of a narrowed pass the rows of the batch that ``generate`` counts."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        call, cache = self.call, cache_in(kwargs)
        session = call.session
        if session is None or call.present is None or not isinstance(cache, VisualCache) or cache.session is not session:
            return None
        logits = output.logits
        full = logits.new_zeros(session.roster.batch, *logits.shape[1:])
        output.logits = full.index_copy_(0, call.present.to(logits.device), logits)
        return output
