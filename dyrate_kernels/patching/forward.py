"""What is known of the forward pass under way: where its columns go, and what was decided in it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dyrate_kernels.patching.cpu_step import CpuStep
    from dyrate_kernels.patching.stages import Noted


@dataclass
class Slot:
    """What the layers of one group receive in a wide pass.

    Attributes:
        column: int64 ``[B, q]``, absolute column of each hidden-state row.
        stored: bool ``[B, q]``, False for padding and for tokens that are dropped here.
        token: int64 ``[B, q]``, visual token index, -1 for text.
        text: int64 ``[B, q]``, text row index, -1 for visual tokens and padding.
        type: uint8 ``[B, q]``, token type.
        row: int64 ``[B, q]``, destination row in the buffers, -1 for rows that are not stored.
        fresh: the group held nothing before, so the new rows are all there is to read.
        plain: besides ``fresh``: no padding, every sequence equally long, columns ascending (causal attention needs no mask).
    """

    column: Tensor
    stored: Tensor
    token: Tensor
    text: Tensor
    type: Tensor
    row: Tensor
    fresh: bool
    plain: bool


@dataclass
class Forward:
    """The forward pass under way."""

    start: int
    length: int
    decode: bool
    row: Tensor | None = None  # decode: int64 [B, 1], text row index (not yet offset by the visual capacity)
    moved: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)  # decode: by id and device, metadata and their copies
    new_row: tuple[Tensor, Tensor] | None = None  # decode: key and value [B, Hkv, D] that the layer's attention is to store
    rotation: tuple[Tensor, Tensor] | None = None  # decode: cos and sin by which the layer's attention is to rotate query and new key
    on_cpu: CpuStep | None = None  # decode: what attends on a CPU, without the reference operators
    slots: dict[int, Slot] = field(default_factory=dict)  # wide: by index of the group
    allowed: dict[int, Tensor] = field(default_factory=dict)  # wide: by group, bool [B, d, N] visual tokens each decode row may read
    drafted: int = 0  # rows at the end of this pass that come after the prompt
    ends_prompt: bool = False
    deferred: bool = False  # an early chunk of a prompt: pruned layers wait for the last chunk
    width: int = 0  # columns that the layers before the first pruned one receive: ``length``, or fewer where reducers left fewer
    narrow: tuple[Tensor, Tensor] | None = None  # then: int64 [B, width], which columns these are, and bool, False for filler
    shrunk: bool = False  # pruned layers receive fewer columns; then, by group:
    source: dict[int, Tensor] = field(default_factory=dict)  # int64 [B, s], which columns (of this and the waiting chunks) stay
    filled: dict[int, Tensor] = field(default_factory=dict)  # bool [B, s], False for the filler of shorter sequences
    merge: dict[int, Tensor] = field(default_factory=dict)  # int64 [B, N], Decision.merge of policies that merge
    noted: Noted | None = None  # where groups decide one by one: what the first one saw
    drafts: Noted | None = None  # likewise, for drafted rows
    joined: tuple[Tensor, ...] | None = None  # column, stored, token, text and type of this and the waiting chunks
    joined_length: int = 0  # columns of this and the waiting chunks
    positions: dict[tuple, Any] = field(default_factory=dict)  # gathered for a group, with what they were gathered from
