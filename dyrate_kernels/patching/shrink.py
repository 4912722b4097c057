"""Prefill shrink (retention ``evict``): layers >= k compute only the tokens that stay, so compute falls, not only masks.

Hooks on the decoder layers: the first layer of each pruned group gathers hidden states, position embeddings and position ids to the kept
columns (right aligned); every later layer gets the gathered positions; after the last layer the hidden states are scattered back to
their columns. An early chunk of a chunked prompt waits in the session until the last chunk decides, so chunking changes no result.
Where a policy merges (``Decision.merge``), a token that stays enters the group as the mean of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyrate_kernels.patching.attention import CARRIER

POSITIONS = ("position_embeddings", "position_ids")


@dataclass
class Waiting:
    """An early chunk of a prompt, held back from the pruned layers.

    Attributes:
        slot: the chunk's ``Slot``.
        hidden: ``[B, q, d]``, what the first pruned layer would have received.
        positions: by layer, its positional arguments (``POSITIONS``). Layers may have different ones: two rotary bases in Gemma 3.
    """

    slot: Any
    hidden: Tensor
    positions: dict[int, tuple[Any, ...]]


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


def _tokens(slot: Any) -> Tensor:
    """int64 ``[B, q]``: the visual token of each column, -1 for text, filler and dropped tokens."""
    return torch.where(slot.stored, slot.token, -1)


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

    def __init__(self, layers: nn.ModuleList, group_starts: list[int]) -> None:
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
        cache = kwargs.get(CARRIER)
        if cache is None:
            return None
        session = cache.session
        forward = session.forward
        if forward is None or forward.decode or not (forward.deferred or forward.shrunk):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        positions = tuple(kwargs.get(name) for name in POSITIONS)
        if forward.deferred:
            if index == self.first:
                session.waiting.append(Waiting(forward.slots[0], hidden, {}))
            session.waiting[-1].positions[index] = positions
            if index == self.first:
                hidden = hidden[:, -1:]  # a token amount of work, whose result nobody reads: layers cannot be skipped from a hook
            last = torch.full((hidden.shape[0], 1), forward.width - 1, dtype=torch.int64, device=hidden.device)
            return self._with(args, kwargs, hidden, gather_columns(positions, last))
        group = self.starts.get(index)
        if group is not None:
            source = forward.source[group]
            if group == 1:
                hidden = torch.cat([waiting.hidden.to(hidden.device) for waiting in session.waiting] + [hidden], dim=1)
            else:  # a deeper group keeps fewer: from columns of all the prompt to places among what the previous group kept
                previous = forward.source[group - 1].to(source.device)
                place = torch.zeros(source.shape[0], forward.joined_length, dtype=torch.int64, device=source.device)
                place.scatter_(1, previous, torch.arange(previous.shape[1], device=source.device).expand_as(previous))
                source = place.gather(1, source)
            kept = gather_columns(hidden, source)
            if group in forward.merge:
                before = forward.joined[2] if group == 1 else _tokens(forward.slots[group - 1])
                kept = merge_columns(hidden, before, kept, _tokens(forward.slots[group]), forward.merge[group])
            hidden = kept
        positions = self._gathered(session, index, positions, hidden.shape[0])
        if index == self.last:
            session.waiting = []
        return self._with(args, kwargs, hidden, positions)

    def _gathered(self, session: Any, index: int, positions: tuple, batch: int) -> tuple:
        """The positional arguments of layer ``index`` at the columns that its group keeps; shared by layers that are given the same."""
        forward = session.forward
        group = max(number for start, number in self.starts.items() if start <= index)
        key = (group, *map(id, positions))
        if key not in forward.positions:
            earlier = [waiting.positions[index] for waiting in session.waiting]
            joined = tuple(_join(list(each), batch) for each in zip(*earlier, positions, strict=True)) if earlier else positions
            forward.positions[key] = (positions, gather_columns(joined, forward.source[group]))  # held, so that ids stay theirs
        return forward.positions[key][1]

    @staticmethod
    def _with(args: tuple, kwargs: dict, hidden: Tensor, positions: tuple) -> tuple[tuple, dict]:
        kwargs = kwargs | {name: value for name, value in zip(POSITIONS, positions, strict=True) if value is not None}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    def after(self, kwargs: dict, output: Any) -> Any:
        """Puts the last layer's hidden states back to their columns; dropped columns are zero."""
        cache = kwargs.get(CARRIER)
        forward = cache.session.forward if cache is not None else None
        if forward is None or forward.decode or not (forward.deferred or forward.shrunk):
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        batch = hidden.shape[0]
        restored = hidden.new_zeros(batch, forward.width + 1, hidden.shape[2])
        if forward.deferred:
            restored[:, forward.width - 1] = hidden[:, -1]
        else:
            source = forward.source[len(self.starts)].to(hidden.device) - (forward.joined_length - forward.width)
            # columns of earlier chunks, and the filler of shorter sequences, fall into the spare column
            filled = forward.filled[len(self.starts)].to(hidden.device)
            source = torch.where((source < 0) | ~filled, forward.width, source)
            restored.scatter_(1, source[:, :, None].expand_as(hidden), hidden)
        restored = restored[:, :-1]
        return (restored, *output[1:]) if isinstance(output, tuple) else restored


class _Before:
    """Pre-hook of one layer (a class, so that a deep copy of the model gets hooks of its own)."""

    def __init__(self, hooks: ShrinkHooks, index: int) -> None:
        self.hooks, self.index = hooks, index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return self.hooks.before(self.index, args, kwargs)


class _After:
    """Hook of the last layer."""

    def __init__(self, hooks: ShrinkHooks) -> None:
        self.hooks = hooks

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return self.hooks.after(kwargs, output)
