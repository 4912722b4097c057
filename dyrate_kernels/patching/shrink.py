"""Prefill shrink (retention ``evict``): layers >= k compute only the tokens that stay, so compute falls, not only masks.

Hooks on the decoder layers: the first layer of each pruned group gathers hidden states, position embeddings and position ids to the kept
columns (right aligned); every later layer gets the gathered positions; after the last layer the hidden states are scattered back to
their columns. An early chunk of a chunked prompt waits (``turn.EarlyChunk``) until the last chunk decides, so chunking changes no result.
Where a policy merges (``Decision.merge``), a token that stays enters the group as the mean of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyrate_kernels.generation.index import scattered
from dyrate_kernels.generation.passes import DecodePass, MultiTokenPass
from dyrate_kernels.generation.session import Session
from dyrate_kernels.patching.attention import CARRIER

POSITIONS = ("position_embeddings", "position_ids")


def gather_columns(value: Any, source: Tensor) -> Any:
    """Picks the columns ``source`` (int64 ``[B, s]``) of ``[B or 1, q, ..]`` tensors, and of rotary embeddings ``[3, B, q, D]`` (M-RoPE,
    whose sections older versions of transformers join in each layer), through tuples; None stays None.
    """
    if value is None:
        return None
    if isinstance(value, tuple | list):
        return type(value)(gather_columns(v, source) for v in value)
    if value.ndim == 4:
        return torch.stack([gather_columns(each, source) for each in value])
    source = source.to(value.device)
    if value.shape[0] == 1 and source.shape[0] > 1:
        value = value.expand(source.shape[0], *value.shape[1:])
    return value[torch.arange(source.shape[0], device=value.device)[:, None], source]


def _join(parts: list[Any], batch: int) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], tuple | list):
        return type(parts[0])(_join(list(p), batch) for p in zip(*parts, strict=True))
    if parts[0].ndim == 4:
        return torch.stack([_join(list(each), batch) for each in zip(*parts, strict=True)])
    return torch.cat([p.expand(batch, *p.shape[1:]) for p in parts], dim=1)


def merge_columns(hidden: Tensor, token: Tensor, kept: Tensor, kept_token: Tensor, merge: Tensor) -> Tensor:
    """The columns that stay, those with several parts replaced by the mean over them (float32 sums, in a fixed order).

    Args:
        hidden: ``[B, q, d]``, before columns go.
        token: int64 ``[B, q]``, visual token of each column, -1 for all others.
        kept: ``[B, s, d]``, the columns that stay.
        kept_token: int64 ``[B, s]``, likewise.
        merge: ``Decision.merge``.
    """
    token, kept_token, merge = (each.to(hidden.device) for each in (token, kept_token, merge))
    target = torch.where(token < 0, -1, merge.gather(1, token.clamp(min=0)))
    part = (target[:, None] == kept_token[:, :, None]) & (kept_token >= 0)[:, :, None]
    count = part.sum(-1, keepdim=True)
    accumulator = torch.promote_types(hidden.dtype, torch.float32)
    mean = part.to(accumulator) @ hidden.to(accumulator) / count.clamp(min=1)
    return torch.where(count > 1, mean.to(hidden.dtype), kept)


class ShrinkHooks:
    """The hooks of one patched model.

    Args:
        layers: the decoder layers of the text model.
        group_starts: first layer of each pruned group.
    """

    def __init__(self, layers: Sequence[nn.Module], group_starts: list[int]) -> None:
        self.starts = {layer: index for index, layer in enumerate(group_starts, 1)}
        self.first, self.last = group_starts[0], len(layers) - 1
        self.handles = []
        for index in range(self.first, len(layers)):
            self.handles.append(layers[index].register_forward_pre_hook(_Before(self, index), with_kwargs=True))
        self.handles.append(layers[-1].register_forward_hook(_After(self), with_kwargs=True))

    def remove(self) -> None:
        """Takes every hook away."""
        for handle in self.handles:
            handle.remove()

    def before(self, index: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Shrinks what layer ``index`` receives."""
        found = _shrinking(kwargs)
        if found is None:
            return None
        session, passing = found
        hidden = args[0] if args else kwargs["hidden_states"]
        positions = tuple(kwargs.get(name) for name in POSITIONS)
        if passing.deferred:
            chunk = session.hold_back(hidden) if index == self.first else session.turn.waiting[-1]
            chunk.positions[index] = positions
            if index == self.first:
                hidden = hidden[:, -1:]  # a token amount of work, whose result nobody reads: layers cannot be skipped from a hook
            last = torch.full((hidden.shape[0], 1), passing.width - 1, dtype=torch.int64, device=hidden.device)
            return self._with(args, kwargs, hidden, gather_columns(positions, last))
        group = self.starts.get(index)
        if group is not None:
            hidden = self._kept(session, passing, group, hidden)
        return self._with(args, kwargs, hidden, self._gathered(session, index, positions, hidden.shape[0]))

    def _kept(self, session: Session, passing: MultiTokenPass, group: int, hidden: Tensor) -> Tensor:
        """Returns what the first layer of a group receives: the columns that it keeps, merged where the policy merges."""
        shrunk, joined = session.effects.shrunk, passing.joined
        here, source = shrunk[group], shrunk[group].source
        assert joined is not None
        if group == 1:
            hidden, token = torch.cat([chunk.hidden.to(hidden.device) for chunk in session.turn.waiting] + [hidden], dim=1), joined.token
        else:  # a deeper group keeps fewer: from columns of all the prompt to indices among what the previous group kept
            previous = shrunk[group - 1].source.to(source.device)
            index = torch.arange(previous.shape[1], device=source.device).expand_as(previous)
            among_previous = torch.zeros(source.shape[0], joined.column.shape[1], dtype=torch.int64, device=source.device)
            source, token = among_previous.scatter_(1, previous, index).gather(1, source), shrunk[group - 1].slots.stored_token
        kept = gather_columns(hidden, source)
        return kept if here.merge is None else merge_columns(hidden, token, kept, here.slots.stored_token, here.merge)

    def _gathered(self, session: Session, index: int, positions: tuple, batch: int) -> tuple:
        """The positional arguments of layer ``index`` at the columns that its group keeps; shared by layers that are given the same."""
        effects = session.effects
        group = max(number for start, number in self.starts.items() if start <= index)
        key = (group, *map(id, positions))
        if key not in effects.gathered:
            earlier = [chunk.positions[index] for chunk in session.turn.waiting]
            joined = tuple(_join(list(each), batch) for each in zip(*earlier, positions, strict=True)) if earlier else positions
            effects.gathered[key] = (positions, gather_columns(joined, effects.shrunk[group].source))  # held, so that ids stay theirs
        return effects.gathered[key][1]

    @staticmethod
    def _with(args: tuple, kwargs: dict, hidden: Tensor, positions: tuple) -> tuple[tuple, dict]:
        kwargs = kwargs | {name: value for name, value in zip(POSITIONS, positions, strict=True) if value is not None}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def after(self, kwargs: dict, output: Any) -> Any:
        """Puts the last layer's hidden states back to their columns; dropped columns are zero."""
        found = _shrinking(kwargs)
        if found is None:
            return None
        session, passing = found
        hidden = output[0] if isinstance(output, tuple) else output
        width = passing.width
        if passing.deferred:
            restored = hidden.new_zeros(hidden.shape[0], width, hidden.shape[2])
            restored[:, width - 1] = hidden[:, -1]
        else:
            here, joined = session.effects.shrunk[len(self.starts)], passing.joined
            assert joined is not None
            source = here.source.to(hidden.device) - (joined.column.shape[1] - width)
            # columns of earlier chunks, and the filler of shorter sequences, fall away
            restored = scattered(torch.where(here.filled.to(hidden.device), source, -1), hidden, width)
        return (restored, *output[1:]) if isinstance(output, tuple) else restored


def _shrinking(kwargs: dict) -> tuple[Session, MultiTokenPass] | None:
    """The session and its pass, where layers receive fewer columns in it."""
    cache = kwargs.get(CARRIER)
    if cache is None:
        return None
    passing = cache.session.passing
    if not isinstance(passing, MultiTokenPass) or not (passing.deferred or cache.session.effects.shrunk):
        return None
    return cache.session, passing


class _Before:
    """Pre-hook of one layer (a class, so that a deep copy of the model gets hooks of its own)."""

    def __init__(self, hooks: ShrinkHooks, index: int) -> None:
        self.hooks, self.index = hooks, index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        cache = kwargs.get(CARRIER)
        if cache is None or isinstance(cache.session.passing, DecodePass):  # in most passes, in every layer
            return None
        return self.hooks.before(self.index, args, kwargs)


class _After:
    """Hook of the last layer."""

    def __init__(self, hooks: ShrinkHooks) -> None:
        self.hooks = hooks

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return self.hooks.after(kwargs, output)
