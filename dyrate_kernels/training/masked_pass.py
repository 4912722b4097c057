"""The training pass: a frozen model reads its own answer again, each row under the rate that the predictor chose for it.

As in a recoverable generation: the prompt is read unpruned, once, without gradients. Then the answer's rows go through the model together;
layer ``k-1`` gives every row its mass and importance, the predictor a rate, and layers >= k attend to the tokens that are left through
``masked_attention``. What must be kept for the backward pass therefore grows with the answer, not with the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dyrate_kernels import families, ops
from dyrate_kernels.generation.attend import as_autocast
from dyrate_kernels.ops.contract import accumulator
from dyrate_kernels.ops.reference import IMAGE, INSTRUCTION, RESPONSE, SYSTEM, TYPES
from dyrate_kernels.patching import attention
from dyrate_kernels.patching.lookup import (
    by_name,
    cache_name,
    check_supported,
    decoder_layers,
    decoder_of,
    positional_names,
    visual_columns,
)
from dyrate_kernels.policies.dyrate import spread_score
from dyrate_kernels.training.masked_attention import masked_attention, row_chunks, scores


@dataclass
class RateChoice:
    """The predictor's choice for the rows of an answer.

    Attributes:
        mass: float32 ``[B, T, Hq, 4]`` at layer ``k-1``.
        hidden: ``[B, T, d]``, what goes into the attention of layer ``k-1``.
        importance: float32 ``[B, T, N]``.
        logits: float32 ``[B, T, K]``, with gradient.
        share: float32 ``[B, T, K]``: one-hot, the gradient straight through to the logits.
        n_visual: int32 ``[B]``.
    """

    mass: Tensor
    hidden: Tensor
    importance: Tensor
    logits: Tensor
    share: Tensor
    n_visual: Tensor

    @property
    def index(self) -> Tensor:
        """int64 ``[B, T]``: the rate taken."""
        return self.share.detach().argmax(-1)


Chooser = Callable[[Tensor], Tensor]
"""logits ``[B, T, K]`` -> one-hot ``[B, T, K]`` with a straight-through gradient."""


def take_likeliest(logits: Tensor) -> Tensor:
    """The argmax, as at inference; the gradient is that of the softmax."""
    soft = logits.softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return hard + soft - soft.detach()


def gumbel(tau: float) -> Chooser:
    """``gumbel_softmax(log_softmax(logits), tau, hard=True)`` (docs/methods/dyrate.md)."""
    return lambda logits: nn.functional.gumbel_softmax(logits.log_softmax(-1), tau, hard=True)


def column_types(visual: Tensor, valid: Tensor, answer: int) -> Tensor:
    """Token types uint8 ``[B, P + answer]`` of a prompt with these visual columns and an answer, as a generation sees them."""
    seen = visual.cumsum(1) > 0
    kind = torch.where(seen | ~visual.any(1, keepdim=True), INSTRUCTION, SYSTEM)
    kind = torch.where(visual, IMAGE, kind)
    kind = torch.where(valid, kind, SYSTEM)  # padding is never looked at
    return nn.functional.pad(kind, (0, answer), value=RESPONSE).to(torch.uint8)


class MaskedPass:
    """The attention of one pass over an answer (``patching.attention.Carrier``).

    Args:
        predictor: mass ``[n, Hq, 4]`` and hidden states ``[n, d]`` -> logits ``[n, K]``.
        k: first pruned layer.
        rates: float64 ``[K]``, fractions removed.
        choose: makes a one-hot of the logits.
        types: uint8 ``[B, S]`` of all columns.
        valid: bool ``[B, S]``: not padding.
        columns: int64 ``[B, N]``, column of each visual token, -1 past the last.
        spread: of the ranking (``policies.DyRate.spread``).
    """

    def __init__(
        self, predictor: Callable[[Tensor, Tensor], Tensor], k: int, rates: Tensor, choose: Chooser, types: Tensor, valid: Tensor,
        columns: Tensor, spread: float = 0.0,
    ) -> None:  # fmt: skip
        self.predictor, self.k, self.rates, self.choose = predictor, k, rates, choose
        self.types, self.valid, self.columns, self.spread = types, valid, columns, spread
        self.choice: RateChoice | None = None
        self._mask: Tensor | None = None
        self._hidden: Tensor | None = None
        self._allowed: dict[tuple[int, int | None], Tensor] = {}

    def see(self, layer: int, hidden: Tensor) -> None:
        if layer == self.k - 1:
            self._hidden = hidden.detach()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        query, key, value = as_autocast(query, key, value)
        allowed = self._allowed_columns(query.shape[2], window)
        if layer < self.k:
            if layer == self.k - 1:
                self._choose(query.detach(), key.detach(), scale, allowed)
            with torch.no_grad():  # nothing here depends on the predictor
                grouped = key.shape[1] != query.shape[1]
                output = nn.functional.scaled_dot_product_attention(
                    query, key, value, attn_mask=allowed[:, None], scale=scale, enable_gqa=grouped
                )
        else:
            assert self._mask is not None, "layer k-1 chooses before layer k reads"
            output = masked_attention(query, key, value, self._mask, allowed, self.columns, scale)
        return output.transpose(1, 2)

    def _allowed_columns(self, rows: int, window: int | None) -> Tensor:
        if (rows, window) not in self._allowed:
            total = self.valid.shape[1]
            column = torch.arange(total, device=self.valid.device)
            distance = torch.arange(total - rows, total, device=self.valid.device)[:, None] - column
            near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._allowed[rows, window] = near & self.valid[:, None]
        return self._allowed[rows, window]

    def _choose(self, query: Tensor, key: Tensor, scale: float, allowed: Tensor) -> None:
        with torch.no_grad():
            mass, importance = statistics(query, key, scale, allowed, self.types, self.columns)
        n_visual = (self.columns >= 0).sum(1, dtype=torch.int32)
        assert self._hidden is not None
        logits = self.predictor(mass.flatten(0, 1), self._hidden.flatten(0, 1)).float().view(*mass.shape[:2], -1)
        share = self.choose(logits)
        self.choice = RateChoice(mass, self._hidden, importance, logits, share, n_visual)
        self._mask = mask_for(share, importance, n_visual, self.rates, self.spread)


def statistics(query: Tensor, key: Tensor, scale: float, allowed: Tensor, types: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mass ``[B, q, Hq, 4]`` and importance ``[B, q, N]`` of every query row, float32 (float64 for float64)."""
    batch, heads, rows, _ = query.shape
    exact = accumulator(query)
    mass = torch.zeros(batch, rows, heads, TYPES, dtype=exact, device=query.device)
    importance = torch.zeros(batch, rows, columns.shape[1], dtype=exact, device=query.device)
    of_type = nn.functional.one_hot(types.long(), TYPES).to(exact)  # [B, S, 4]
    index = columns.clamp(min=0)
    for part in row_chunks(rows, batch, heads, key.shape[2]):
        score = scores(query[:, :, part], key, scale).masked_fill(~allowed[:, None, part], float("-inf"))
        probability = score.softmax(-1).nan_to_num(0.0)  # a row that may look nowhere
        mass[:, part] = (probability @ of_type[:, None]).transpose(1, 2)
        mean = probability.mean(1)
        importance[:, part] = mean.gather(2, index[:, None].expand(-1, mean.shape[1], -1))
    return mass, importance.masked_fill((columns < 0)[:, None], 0.0)


def mask_for(share: Tensor, importance: Tensor, n_visual: Tensor, rates: Tensor, spread: float = 0.0) -> Tensor:
    """The K masks of the tokens that each rate keeps, mixed by a one-hot: float ``[B, T, N]`` with the gradient of ``share``."""
    batch, rows, tokens = importance.shape
    real = (torch.arange(tokens, device=importance.device) < n_visual[:, None, None]).expand(-1, rows, -1)
    mask = importance.new_zeros(batch, rows, tokens)
    rank = None
    for index in range(rates.shape[0]):
        count = ops.keep_count(n_visual, rates[index].expand(batch).to(torch.float64))
        if rank is None or spread > 0:  # with a spread, each count has a ranking of its own
            score = importance
            if spread > 0:
                each = count.repeat_interleave(rows)
                score = spread_score(each, importance.flatten(0, 1), real.flatten(0, 1), spread).view_as(importance)
            rank = _ranks(score.masked_fill(~real, float("-inf")))
        mask = mask + share[..., index, None] * (rank < count[:, None, None])
    return mask


def _ranks(score: Tensor) -> Tensor:
    """The rank of each value in its row, the highest first, ties in order: int64, as ``score``."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


@dataclass
class AnswerPass:
    """Result of a pass over an answer.

    Attributes:
        logits: ``[B, T, V]``: row t predicts answer token t + 1.
        first_logits: ``[B, V]``: the prompt's last row, which predicts answer token 0. Not pruned.
        choice: the rates and what they were chosen from.
    """

    logits: Tensor
    first_logits: Tensor
    choice: RateChoice


@dataclass
class ReadPrompt:
    """Prompts that were read unpruned: what passes over their answers begin with.

    Attributes:
        cache: keys and values of the prompts.
        first_logits: ``[B, V]`` of the last row.
        visual, mask: bool ``[B, P]``: visual columns, and those that are not padding.
    """

    cache: DynamicCache
    first_logits: Tensor
    visual: Tensor
    mask: Tensor

    def again(self) -> None:
        """Takes what stands behind the prompts out of the cache. (``DynamicCache.crop`` takes other arguments in other releases.)"""
        rows = self.mask.shape[1]
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[..., :rows, :], layer.values[..., :rows, :]


class AnswerPasses:
    """Runs training passes; made by :func:`training_hooks`.

    Attributes:
        carrier: the attention of the pass under way.
    """

    def __init__(self, model: Any, family: families.Family) -> None:
        self.model, self.family = model, family
        self.carrier: MaskedPass | None = None

    def __call__(
        self, prompt: dict[str, Tensor], answer: Tensor, answer_mask: Tensor, predictor: Callable[[Tensor, Tensor], Tensor], k: int,
        rates: Tensor, choose: Chooser, spread: float = 0.0,
    ) -> AnswerPass:  # fmt: skip
        """A prompt and the pass over its answer; ``predictor`` and what follows as :class:`MaskedPass` takes them."""
        read = self.read(prompt)

        def make(types: Tensor, valid: Tensor, columns: Tensor) -> MaskedPass:
            return MaskedPass(predictor, k, rates, choose, types, valid, columns, spread)

        passing = self.over(read, answer, answer_mask, make)
        assert passing.carrier.choice is not None
        return AnswerPass(passing.logits, read.first_logits, passing.carrier.choice)

    def read(self, prompt: dict[str, Tensor]) -> ReadPrompt:
        """Reads prompts of ``chat.encode``, without gradients."""
        ids, mask = prompt["input_ids"], prompt["attention_mask"].bool()
        visual = visual_columns(self.model, self.family, ids, None)
        visual = torch.zeros_like(mask) if visual is None else visual & mask
        cache = DynamicCache()  # without the config: a sliding layer would forget rows
        with torch.no_grad():
            given = {**prompt, "position_ids": _positions(mask), cache_name(): cache}
            first = self.model(**given, use_cache=True, logits_to_keep=1)
        return ReadPrompt(cache, first.logits[:, -1], visual, mask)

    def over(self, read: ReadPrompt, answer: Tensor, answer_mask: Tensor, make: Callable[[Tensor, Tensor, Tensor], MaskedPass]) -> Passed:
        """A pass over answers int64 ``[B, T]``. It leaves their rows in ``read.cache``; ``read.again()`` makes that ready for another one.

        Args:
            make: of the carrier, from types, valid and columns as :class:`MaskedPass` has them.
        """
        valid = torch.cat([read.mask, answer_mask[:, :-1].bool()], 1)
        types = column_types(read.visual, read.mask, answer.shape[1] - 1)
        self.carrier = made = make(types, valid, _visual_columns(read.visual))
        try:
            given = {"input_ids": answer[:, :-1], "position_ids": _positions(valid)[:, read.mask.shape[1] :], cache_name(): read.cache}
            logits = self.model(**given, attention_mask=valid.long(), use_cache=True).logits
        finally:
            self.carrier = None
        return Passed(logits, made)


@dataclass
class Passed:
    """Logits ``[B, T, V]`` of a pass, row t of answer token t + 1, and what carried it."""

    logits: Tensor
    carrier: MaskedPass


def _positions(valid: Tensor) -> Tensor:
    """int64 ``[B, S]``: what is not padding is counted from 0."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)


@contextlib.contextmanager
def training_hooks(model: Any) -> Iterator[AnswerPasses]:
    """Makes a model ready for training passes; yields what runs them. Everything is put back at the end.

    Raises:
        TypeError: the model is not supported.
        RuntimeError: it is patched by ``dyrate_kernels.patch``.
    """
    family = check_supported(model)
    if not family.trainable:
        known = ", ".join(families.names(lambda each: each.trainable))
        raise TypeError(
            f"predictors are trained for {known}, not for {model.config.model_type}: its prompts are not plain causal text. "
            "It runs with the closed-form predictor and with every other policy"
        )
    if any(attention.is_swapped(layer.self_attn) for layer in decoder_layers(model)):
        raise RuntimeError("model is patched: call dyrate_kernels.unpatch(model) before training a predictor for it")
    passes = AnswerPasses(model, family)
    names = positional_names(decoder_of(model).forward)

    def carry(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if passes.carrier is None:
            return None
        given = by_name(names, args, kwargs)
        # a 4D mask passes transformers' mask creation untouched
        given["attention_mask"] = torch.zeros(1, 1, 1, 1, device=passes.carrier.valid.device)
        given[attention.CARRIER] = passes.carrier
        return (), given

    handles = [decoder_of(model).register_forward_pre_hook(carry, with_kwargs=True)]
    for layer in decoder_layers(model):
        attention.swap(layer.self_attn, shows_hidden=True)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()
        for layer in decoder_layers(model):
            attention.restore(layer.self_attn)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen.get(name, parameter.requires_grad))
        model.train(training)


def _visual_columns(visual: Tensor) -> Tensor:
    """bool ``[B, P]`` -> int64 ``[B, N]``: the columns that are set, -1 past a row's last."""
    count = visual.sum(1)
    tokens = int(count.max()) if visual.shape[0] else 0
    order = (~visual).to(torch.int8).argsort(dim=1, stable=True)[:, :tokens]
    return order.masked_fill(torch.arange(tokens, device=visual.device) >= count[:, None], -1)
