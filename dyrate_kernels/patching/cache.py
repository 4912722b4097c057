"""``VisualCache``: what transformers sees of a conversation's rows. It answers *logical* lengths, passes on rows, and keeps none itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dyrate_kernels.generation.attend import as_autocast
from dyrate_kernels.generation.kv_store import RowStore
from dyrate_kernels.generation.session import Session
from dyrate_kernels.patching.lookup import cache_name


class VisualCache(Cache):
    """Key/value cache of a patched model; a Hugging Face ``Cache``.

    ``generate()`` makes one by itself on a patched model. It counts every column of the prompt, padding and dropped tokens included
    (``get_seq_length``), while the rows that are really stored are fewer.

    Args:
        session: whose rows these are.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(layers=[])
        self.session = session

    @property
    def store(self) -> RowStore:
        """The rows."""
        return self.session.store

    # ---- one layer ------------------------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new rows of a layer. The attention of the same layer must follow, through a patched model."""
        if not self.session.in_forward:
            raise RuntimeError(
                "this VisualCache was handed to a model that is not patched (or no longer is): its rows can only be read by the "
                "attention of the model that dyrate_kernels.patch() was called on. Patch the model again, or start without this cache."
            )
        key_states, value_states = as_autocast(key_states, value_states)
        self.session.write(layer_idx, key_states, value_states)
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """The attention of ``layer`` over the rows stored here (``patching.attention.Carrier``)."""
        if query.dtype != key.dtype:  # under autocast ``update`` has made the key what attention takes
            query, key, value = as_autocast(query, key, value)
        return self.session.attend(layer, query, key, value, scale, window)

    def rotate(self, layer: int, cos: Tensor, sin: Tensor) -> bool:
        """``Session.rotate``; False outside of a pass."""
        return self.session.in_forward and self.session.rotate(layer, cos, sin)

    def see(self, layer: int, hidden: Tensor) -> None:
        """Takes the hidden states that go into the attention of ``layer`` (``patching.attention.Carrier``)."""
        self.session.see(layer, hidden)

    # ---- lengths --------------------------------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far (logical length)."""
        return self.store.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the next token (logical)."""
        return self.store.length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Logical key length and offset for ``query_length`` new tokens."""
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.store.length + count, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows when it must."""
        return -1

    get_max_cache_shape = get_max_length

    def __len__(self) -> int:
        return self.store.num_layers

    def __repr__(self) -> str:
        groups = [(group.first, group.last) for group in self.store.groups]
        return f"VisualCache(layers={len(self)}, columns={self.store.length}, groups={groups})"

    @property
    def batch_size(self) -> int:
        return self.store.batch

    @property
    def is_initialized(self) -> bool:
        return self.store.started

    # What kind of layer each is: transformers reads these of ``Cache.layers``, which this cache does not use.

    @property
    def is_linear(self) -> list[bool]:
        """No layer is a linear one (a Mamba layer, say)."""
        return [False] * len(self)

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets rows by itself: a sliding window is applied when the rows are read."""
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        """Every layer holds rows."""
        return [False] * len(self)

    @property
    def is_compileable(self) -> bool:
        return False

    # ---- sequences and columns that go ------------------------------------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        return self.session.croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest columns: ``-n`` removes n of them, a positive n keeps the first n, 0 changes nothing.

        Raises:
            RuntimeError: what was dropped cannot come back (``Session.crop``).
        """
        length = self.store.length
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(length - tokens_to_remove, 0)
        if remove > 0 and self.is_initialized:
            self.session.crop(max(length - remove, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence ``i`` goes on from sequence ``beam_idx[i]``. In place."""
        self.session.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence ``repeats`` times."""
        if self.is_initialized:
            self.session.select(torch.arange(self.batch_size, device=self.store.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices``."""
        self.session.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Forgets everything; the buffers stay for the next use."""
        self.session.reset()


def why_unpruned(cache: Any, asked: dict[str, Any]) -> str | None:
    """Why a generation runs as on an unpatched model: its caller wants another cache, or none. None where it does not."""
    if cache is not None:
        return f"generate() was given a {type(cache).__name__}; leave {cache_name()} out, or give one that a patched generate() returned"
    if asked.get("use_cache") is False:
        return "generate() was called with use_cache=False; leave it out"
    if asked.get("cache_implementation") is not None:
        return f"generate() was called with cache_implementation={asked['cache_implementation']!r}; leave it out"
    return None
