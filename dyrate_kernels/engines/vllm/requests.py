"""Requests: where the visual tokens of each stand, its policy's state and what it decided, in tensors with one line a slot.

A request has a slot from its first step until it has ended, also while it is preempted: what the prompt's last row decided lasts, and that
row is not computed again where its blocks are found in the prefix cache. Where slots run out, the lines of a request that is out of the
batch are set aside.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dyrate_kernels.policies.base import Policy

RESPONSE = 3  # token types as ``ops.paged_attention`` names them
_SYSTEM, _INSTRUCTION = 0, 2
_REMEMBERED = 4096  # ended requests whose figures are kept
_FIRST_WIDTH = 2048


class Prompt(NamedTuple):
    """A request as it comes.

    Attributes:
        length: of its prompt, in tokens.
        visual: spans ``[first, last]`` of positions that hold embeddings of images or videos, ascending.
    """

    length: int
    visual: tuple[tuple[int, int], ...]

    @property
    def n_visual(self) -> int:
        return sum(last - first + 1 for first, last in self.visual)


@dataclass(frozen=True)
class Figures:
    """The outcome of a request.

    Attributes:
        request: its id.
        n_visual: visual tokens of its prompt.
        rows: answer rows computed, drafts that were refused and rows that were computed again included.
        kept: visual tokens that an answer row kept, mean over pruned layers and rows.
        rate: the fraction of them that was removed, likewise.
        share: cache rows read in decode steps, all layers, as a fraction of those that the unpruned model reads.
    """

    request: str
    n_visual: int
    rows: int
    kept: float
    rate: float
    share: float


class RequestTable:
    """The requests of one engine.

    Args:
        policy: bound to the model.
        starts: first layer of each pruned group.
        num_layers: L.
        slots: how many requests a batch can hold.
        longest: positions of the longest request there can be.
        device: of the tensors.

    Attributes:
        width: columns of the lists, for the longest prompt so far. Of a policy that remembers ``longest``: its state is as wide.
        visual_position, text_position: int32 ``[slots, width]``; text_type uint8 likewise; as ``ops.paged_attention`` takes them.
        n_visual, prompt: int32 ``[slots]``, visual tokens and tokens of each prompt.
        kept: of each pruned group int32 ``[slots, width]``: positions that the prompt's last row chose, ascending, -1 past their end; at
            first all. n_kept int32 ``[slots]`` each.
        tally: int64 ``[slots, 3]``: answer rows, visual tokens that they kept, summed over pruned layers, and cache rows that they would
            have read unpruned, in all layers.
        ended: figures of the requests that ended last.
    """

    def __init__(
        self, policy: Policy, starts: Sequence[int], num_layers: int, slots: int, longest: int, device: torch.device
    ) -> None:  # fmt: skip
        self.policy, self.num_layers, self.longest, self.device = policy, num_layers, longest, device
        self.width = width = longest if policy.remembers else min(longest, _FIRST_WIDTH)
        edges = [*starts, num_layers]
        self.layers = [after - first for first, after in zip(edges[:-1], edges[1:], strict=True)]  # of each pruned group

        def lines(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.visual_position, self.text_position = lines(torch.int32, width), lines(torch.int32, width)
        self.text_type = lines(torch.uint8, width)
        self.n_visual, self.prompt = lines(torch.int32), lines(torch.int32)
        self.lasts = policy.at_prefill and not policy.at_decode  # what the prompt's last row chose is what its answer reads
        self.kept = [lines(torch.int32, width) for _ in starts] if self.lasts else []
        self.n_kept = [lines(torch.int32) for _ in starts] if self.lasts else []
        self.tally = lines(torch.int64, 3)
        self.state: dict[str, Tensor] = {}
        self.prompts: dict[str, Prompt] = {}
        self.ended: deque[tuple[str, int, Tensor]] = deque(maxlen=_REMEMBERED)
        self._slot: dict[str, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._aside: dict[str, dict[str, Tensor]] = {}

    # ---- which ------------------------------------------------------------------------------------------------------------------

    def __contains__(self, request: str) -> bool:
        return request in self.prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def slots_of(self, requests: Sequence[str]) -> list[int]:
        """Slots of the requests of a batch, all of which were added. One that was set aside comes back."""
        batch = set(requests)
        for request in requests:
            if request not in self._slot:
                self._slot[request] = self._take(batch)
                self._bring_back(request)
        return [self._slot[request] for request in requests]

    def add(self, request: str, prompt: Prompt, batch: Iterable[str] = ()) -> None:
        """A request comes; one of the same id that has not ended is forgotten. ``batch``: those that must keep their slots."""
        if request in self.prompts:
            self.remove(request)
        slot = self._take({*batch, request})
        self.prompts[request], self._slot[request] = prompt, slot
        self._write(slot, prompt)
        for tensor in self.state.values():
            tensor[slot] = 0
        self.tally[slot] = 0

    def remove(self, request: str) -> None:
        """A request has ended; one that is not known is none."""
        if request not in self.prompts:
            return
        prompt = self.prompts.pop(request)
        self.ended.append((request, prompt.n_visual, self._tally(request).clone()))
        self._aside.pop(request, None)
        slot = self._slot.pop(request, None)
        if slot is not None:
            self._free.append(slot)

    def figures(self) -> list[Figures]:
        """Of the requests that ended last, and of those that have not, where they had visual tokens; oldest first. Reads the device."""
        present = [(request, prompt.n_visual, self._tally(request)) for request, prompt in self.prompts.items()]
        return [found for each in (*self.ended, *present) if (found := self._figures(*each)) is not None]

    def _tally(self, request: str) -> Tensor:
        slot = self._slot.get(request)
        return self._aside[request]["tally"] if slot is None else self.tally[slot]

    def _figures(self, request: str, n_visual: int, tally: Tensor) -> Figures | None:
        rows, kept, dense = tally.tolist()
        if n_visual == 0 or rows == 0:
            return None
        of_all = rows * n_visual * sum(self.layers)
        return Figures(request, n_visual, rows, kept / (rows * sum(self.layers)), 1.0 - kept / of_all, 1.0 - (of_all - kept) / dense)

    # ---- slots ------------------------------------------------------------------------------------------------------------------

    def _take(self, batch: set[str]) -> int:
        if not self._free:
            request = next(request for request in self._slot if request not in batch)
            slot = self._slot.pop(request)
            self._aside[request] = {name: tensor[slot].clone() for name, tensor in self._lasting().items()}
            self._free.append(slot)
        return self._free.pop()

    def _bring_back(self, request: str) -> None:
        slot, aside = self._slot[request], self._aside.pop(request)
        self._write(slot, self.prompts[request])
        for name, tensor in self._lasting().items():
            if name not in aside:
                tensor[slot] = 0
            elif name.startswith("kept"):  # the lists may have grown
                tensor[slot, : len(aside[name])] = aside[name]
            else:
                tensor[slot] = aside[name]

    def _lasting(self) -> dict[str, Tensor]:
        """Tensors whose lines cannot be made from the prompt."""
        lists = {f"kept {group}": tensor for group, tensor in enumerate(self.kept)}
        counts = {f"n_kept {group}": tensor for group, tensor in enumerate(self.n_kept)}
        return {"tally": self.tally, **lists, **counts, **{f"state {name}": tensor for name, tensor in self.state.items()}}

    def _grow(self, columns: int) -> None:
        width = min(max(2 * self.width, columns), self.longest)
        self.width, more = width, width - self.width
        self.visual_position, self.text_position = (pad(each, (0, more), value=-1) for each in (self.visual_position, self.text_position))
        self.text_type = pad(self.text_type, (0, more), value=RESPONSE)
        self.kept = [pad(each, (0, more), value=-1) for each in self.kept]

    def _write(self, slot: int, prompt: Prompt) -> None:
        if prompt.length > self.width:
            self._grow(prompt.length)
        position = torch.arange(prompt.length, dtype=torch.int32)
        image = torch.zeros(prompt.length, dtype=torch.bool)
        for first, last in prompt.visual:
            image[first : last + 1] = True
        visual, text = position[image], position[~image]
        first = prompt.visual[0][0] if prompt.visual else 0
        lines = {
            "visual_position": visual, "text_position": text,
            "text_type": torch.where(text < first, _SYSTEM, _INSTRUCTION).to(torch.uint8),
        }  # fmt: skip
        past = {"visual_position": -1, "text_position": -1, "text_type": RESPONSE}
        for name, values in lines.items():
            line = torch.full((self.width,), past[name], dtype=values.dtype)
            line[: len(values)] = values
            getattr(self, name)[slot].copy_(line, non_blocking=True)
        self.n_visual[slot], self.prompt[slot] = len(visual), prompt.length
        for kept, n_kept in zip(self.kept, self.n_kept, strict=True):
            kept[slot].copy_(self.visual_position[slot])
            n_kept[slot] = len(visual)

    # ---- the policy's state -------------------------------------------------------------------------------------------------------

    def begin(self, slots: Tensor) -> None:
        """The prompts of these slots, int64 ``[E]``, are decided about now: their state is what ``Policy.start`` makes."""
        fresh = self.policy.start(self.n_visual[slots])
        self.put({name: value for name, value in fresh.items() if name not in self.state or self._fits(name, value)}, slots)

    def state_of(self, slots: Tensor) -> dict[str, Tensor]:
        """The state of these slots, int64 ``[R]``: copies."""
        return {name: tensor[slots] for name, tensor in self.state.items()}

    def put(self, state: dict[str, Tensor], slots: Tensor) -> None:
        """The state of these slots, each of which stands there once, is this from now on."""
        for name, value in state.items():
            if name not in self.state or not self._fits(name, value):  # a policy may size it by what it is shown first
                self.state[name] = value.new_zeros(self.n_visual.shape[0], *value.shape[1:])
            self.state[name][slots] = value

    def _fits(self, name: str, value: Tensor) -> bool:
        return self.state[name].shape[1:] == value.shape[1:]
