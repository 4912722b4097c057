"""Assisted decoding of transformers: what a policy allows to be drafted, and what its passes are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.generation.session import Session
from dyrate_kernels.policies.base import Policy


def one_at_a_time(policy: Policy) -> bool:
    """Returns whether no token can be drafted for this policy: it decides a step by the logits of the one before (``reads_logits``), which
    are not known yet, or by a state that every layer of the one before has changed (``remembers`` and ``rescores``).
    """
    return policy.reads_logits or (policy.remembers and policy.rescores)


def of_this_turn(session: Session, columns: int, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``prepare_inputs_for_generation`` for ``columns`` ids, as plain decoding gives them. In a chat, assisted decoding gives
    the whole conversation to its first pass, whatever the cache holds; where it was given new ids alone, it cuts the mask to their number.
    """
    turn, held, new = session.turn, session.store.length, given.get("next_sequence_length")
    if new is None:
        new = columns - held if 0 < held < turn.end <= columns else columns
        given = given | {"next_sequence_length": new}
    mask, whole = given.get("attention_mask"), turn.mask
    if mask is None or whole is None or mask.dim() != 2 or not 0 < turn.start < whole.shape[1]:
        return given  # no later turn, or one whose caller gave no mask of the whole conversation
    if mask.shape[1] < held + new:
        ones = mask.new_ones(mask.shape[0], max(held + new - whole.shape[1], 0))
        given = given | {"attention_mask": torch.cat([whole.to(mask), ones], dim=1)[:, : held + new]}
    return given


class NoDrafts:
    """A candidate generator of transformers that drafts nothing, so that assisted decoding goes token by token, as plain decoding does."""

    requires_model_outputs = False

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """The sequence so far, int64 ``[1, S]``, and no logits."""
        return input_ids, None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """There is none."""
