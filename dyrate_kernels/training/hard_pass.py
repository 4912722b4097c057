"""Passes over an answer without gradients: of the unpruned model, which note what predictors read, and of a pruned one.

A pruned pass equals the decode steps of a recoverable generation that is given the answer's tokens (``masked_pass``): row t reads what
step t + 1 would. Nothing of it depends on what another row keeps but through the hidden states, so all rows go through together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from dyrate_kernels import ops
from dyrate_kernels.policies.dyrate import spread_score
from dyrate_kernels.policies.random import Random
from dyrate_kernels.training.masked_pass import MaskedPass, statistics, take_likeliest


class ReadingPass(MaskedPass):
    """The unpruned model over its answer; mass and hidden states of some layers are noted.

    Args:
        layers: whose.
        types, valid, columns: as of ``MaskedPass``.

    Attributes:
        mass: by layer, ``[B, T, Hq, 4]``.
        hidden: by layer, ``[B, T, d]``.
    """

    def __init__(self, layers: Collection[int], types: Tensor, valid: Tensor, columns: Tensor) -> None:
        super().__init__(_no_logits, 1, torch.zeros(1, dtype=torch.float64), take_likeliest, types, valid, columns)
        self.layers = frozenset(layers)
        self.mass: dict[int, Tensor] = {}
        self.hidden: dict[int, Tensor] = {}

    def see(self, layer: int, hidden: Tensor) -> None:
        if layer in self.layers:
            self.hidden[layer] = hidden.detach()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        allowed = self._allowed_columns(query.shape[2], window)
        if layer in self.layers:
            self.mass[layer], _ = statistics(query, key, scale, allowed, self.types, self.columns)
        return _attention(query, key, value, allowed, scale)


class HardPass(MaskedPass):
    """A pruned pass: each row keeps what its likeliest rate keeps.

    Args:
        predictor, k, rates, types, valid, columns, spread: as of ``MaskedPass``.
        random: seed of the ranking of policy ``random``, in place of importance; None: importance.

    Attributes:
        count: int ``[B, T]``, kept by each row.
    """

    def __init__(
        self, predictor: Callable[[Tensor, Tensor], Tensor], k: int, rates: Tensor, types: Tensor, valid: Tensor, columns: Tensor,
        spread: float = 0.0, random: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(predictor, k, rates, take_likeliest, types, valid, columns, spread)
        self.random = random
        self.count = torch.zeros(0)
        self._left: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        allowed = self._allowed_columns(query.shape[2], window)
        if layer == self.k - 1:
            self._choose(query, key, scale, allowed)
        if layer >= self.k:
            assert self._left is not None, "layer k-1 chooses before layer k reads"
            allowed = allowed & self._left
        return _attention(query, key, value, allowed, scale)

    def _choose(self, query: Tensor, key: Tensor, scale: float, allowed: Tensor) -> None:
        mass, importance = statistics(query, key, scale, allowed, self.types, self.columns)
        assert self._hidden is not None
        batch, rows = mass.shape[:2]
        logits = self.predictor(mass.flatten(0, 1), self._hidden.flatten(0, 1)).float()
        rate = self.rates[logits.argmax(-1)].view(batch, rows)
        real = (self.columns >= 0)[:, None].expand(-1, rows, -1)
        n_visual = real.sum(-1, dtype=torch.int32)
        self.count = ops.keep_count(n_visual.flatten(), rate.flatten()).view(batch, rows)
        score = importance if self.random is None else self._hashed(rows).to(importance.dtype).expand_as(importance)
        if self.spread:
            score = spread_score(self.count.flatten(), score.flatten(0, 1), real.flatten(0, 1), self.spread).view_as(importance)
        order = score.masked_fill(~real, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        kept = torch.arange(order.shape[-1], device=order.device) < self.count[..., None]
        kept = torch.zeros_like(kept).scatter_(-1, order, kept)
        total = self.valid.shape[1]
        left = torch.ones(batch, rows, total + 1, dtype=torch.bool, device=kept.device)  # the last: where a sequence has fewer tokens
        index = torch.where(self.columns >= 0, self.columns, total)[:, None].expand(-1, rows, -1)
        self._left = left.scatter_(-1, index, kept)[..., :-1]

    def _hashed(self, rows: int) -> Tensor:
        """Scores ``[rows, N]`` of policy ``random``; row t is step t + 1."""
        assert self.random is not None
        step = torch.arange(1, rows + 1, device=self.columns.device)
        return Random(seed=self.random).scores(step, self.columns.shape[1])


def _no_logits(mass: Tensor, hidden: Tensor) -> Tensor:
    raise AssertionError("nothing is chosen in the unpruned model's pass")


def _attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """``[B, q, Hq, D]`` over the columns of ``allowed`` ``[B, q, S]``."""
    grouped = key.shape[1] != query.shape[1]
    output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None], scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)
