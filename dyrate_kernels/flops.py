"""Costs and savings of pruning: FLOPs by FastV's formula and exactly, and the bytes that a decode step reads
(docs/costs.md).

Three cost axes, never mixed:

1. *Paper cost* (:func:`fastv_cost`, ``GenerationCost.paper_cost``): FastV's formula on the whole sequence. Its unit
   is the multiply-add, which the paper calls a FLOP, and it counts two of the three MLP matrices.
2. *Executed FLOPs* (:func:`layer_flops`, :func:`prefill_flops`, :func:`decode_flops`, ``GenerationCost.flops``):
   every matrix product of the text model with its real shape (SwiGLU, grouped key/value heads, output head), two
   FLOPs a multiply-add: what ``torch.utils.flop_counter`` counts of the text model and its head when the unpatched
   model with eager attention answers each sequence alone. Attention counts all pairs of a pass's rows and the rows that
   the pass reads: in a prompt all of its own, the causal half and what a sliding window hides included; of rows that
   were in the cache before, those that the window of the layer still shows to one of the pass's rows. Norms, softmax,
   rotations, padding and adapters are not counted; a prompt that comes in chunks counts as one pass.
3. *Bytes read* (:func:`decode_bytes`, ``GenerationCost.bytes_read``): a decode step reads the weights once and every
   KV row once that the layer's window shows.

Numbers are floats or NumPy arrays; nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dyrate_kernels.policies.base import ModelShape, check_rate

# ---- axis 1: FastV's formula ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FastVCost:
    """One pass over a whole sequence by FastV's formula.

    Attributes:
        n: sequence length the numbers hold for, visual tokens and text.
        full: multiply-adds of a layer that sees all n tokens.
        pruned: multiply-adds of a layer, mean over all layers (the "Flops(B)" column of FastV's Table 1, in units).
        ratio: pruned / full.
    """

    n: float
    full: float
    pruned: float
    ratio: float


def fastv_layer(n: Any, hidden_size: int, intermediate_size: int) -> Any:
    """Multiply-adds of one layer over n tokens: ``4 n d^2 + 2 n^2 d + 2 n d m`` (FastV, section 4.2). n may be an
    array.
    """
    d, m = float(hidden_size), float(intermediate_size)
    return 4.0 * n * d * d + 2.0 * n * n * d + 2.0 * n * d * m


def fastv_cost(shape: ModelShape, *, n: float, visual: float, k: int, rate: float) -> FastVCost:
    """``[k f(n) + (L-k) f(n - N R)] / (L f(n))`` and its parts.

    At n = 611 this is FastV's Table 1 for LLaVA-1.5 within about 1 % (7B and 13B, K = 2, 3, 5; the paper does not
    state its n). K = 0, R = 90 % of 7B is printed there as 18.9 G (19 %), the formula gives 14.6 G; the QwenVL rows
    fit no n with its 256 visual tokens.

    Args:
        n: all tokens of the sequence.
        visual: N of them are visual.
        k: first pruned layer, 0 to L (0: pruned before the language model, as in the paper's K = 0 rows).
        rate: fraction of the visual tokens removed.

    Raises:
        ValueError: k, rate or the token counts are out of range.
    """
    check_rate(rate)
    if not 0 <= k <= shape.num_layers:
        raise ValueError(f"k must be in [0, {shape.num_layers}] for a model of {shape.num_layers} layers, got {k}")
    if not 0 <= visual <= n or n <= 0:
        raise ValueError(f"visual must be in [0, n] and n positive, got visual={visual}, n={n}")
    full = fastv_layer(n, shape.hidden_size, shape.intermediate_size)
    after = fastv_layer(n - visual * rate, shape.hidden_size, shape.intermediate_size)
    pruned = (k * full + (shape.num_layers - k) * after) / shape.num_layers
    return FastVCost(n, full, pruned, pruned / full)


# ---- axis 2: executed FLOPs ----------------------------------------------------------------------------------------


def layer_flops(shape: ModelShape, rows: Any, context: Any) -> Any:
    """FLOPs of one decoder layer.

    Args:
        rows: tokens that pass through the layer (arrays are taken element by element).
        context: rows of key/value that each of them is multiplied with, its own among them.
    """
    heads = shape.num_heads * shape.head_dim
    projections = shape.hidden_size * (2.0 * heads + 2.0 * shape.num_kv_heads * shape.head_dim)
    mlp = 3.0 * shape.hidden_size * shape.intermediate_size
    return 2.0 * (rows * (projections + mlp) + 2.0 * heads * rows * context)


def head_flops(shape: ModelShape, rows: Any = 1) -> Any:
    """FLOPs of the output head over ``rows`` tokens (``generate`` computes the logits of the last one only)."""
    return 2.0 * rows * shape.hidden_size * float(shape.vocab_size)


def prefill_flops(shape: ModelShape, rows_per_layer: Any, head: bool = True) -> float:
    """A whole prompt in one pass.

    Args:
        rows_per_layer: tokens in each layer, a number or L of them (a pruned prompt has fewer in layers >= k).
        head: count the output head for the last token.
    """
    rows = np.broadcast_to(np.asarray(rows_per_layer, dtype=np.float64), (shape.num_layers,))
    return float(layer_flops(shape, rows, rows).sum() + (head_flops(shape) if head else 0.0))


def decode_flops(shape: ModelShape, context_per_layer: Any, head: bool = True) -> float:
    """One decode step with a KV cache.

    Args:
        context_per_layer: KV rows that each layer reads, the new token's among them; a number or L of them.
        head: count the output head.
    """
    context = np.broadcast_to(np.asarray(context_per_layer, dtype=np.float64), (shape.num_layers,))
    return float(layer_flops(shape, 1.0, context).sum() + (head_flops(shape) if head else 0.0))


# ---- axis 3: bytes -------------------------------------------------------------------------------------------------


def parameters(shape: ModelShape) -> int:
    """Parameters of the text model with its embedding and output head (one matrix where they are tied)."""
    d, m, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, kv = shape.num_heads * dim, shape.num_kv_heads * dim
    layer = d * (2 * q + 2 * kv) + 3 * d * m + shape.layer_norms * d
    layer += (q + 2 * kv) * shape.qkv_bias + d * shape.output_bias + (2 * m + d) * shape.mlp_bias + 2 * dim * shape.qk_norm
    return shape.num_layers * layer + d + shape.vocab_size * d * (1 if shape.tied_embeddings else 2)


def item_bytes(dtype: torch.dtype) -> int:
    """Bytes of one number."""
    return torch.empty((), dtype=dtype).element_size()


def weight_bytes(shape: ModelShape) -> int:
    """Bytes of the text model's weights in ``shape.dtype``, or as stored where they are quantised ("the weights" of docs/costs.md).

    The input embedding is among them although a step reads only a row a sequence of it (2 % of a 7B Llama, 7 % of
    Qwen2.5-7B), so a bound computed from this errs on the side of promising less.
    """
    return parameters(shape) * item_bytes(shape.dtype) if shape.stored_weights is None else shape.stored_weights


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Bytes of one token's keys and values in all layers."""
    return shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * item_bytes(shape.dtype)


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that one decode step of a batch reads.

    Attributes:
        batch, visual, text, kept, k: what it was computed for.
        weights: read once for the whole batch.
        text_kv, visual_kv: keys and values of text, and of visual tokens unpruned.
        visual_kv_pruned: the same after pruning.
        total, total_pruned: sums.
        bound: total / total_pruned, the most that pruning can speed a bandwidth-bound step up.
    """

    batch: int
    visual: float
    text: float
    kept: float
    k: int
    weights: float
    text_kv: float
    visual_kv: float
    visual_kv_pruned: float

    @property
    def total(self) -> float:
        return self.weights + self.text_kv + self.visual_kv

    @property
    def total_pruned(self) -> float:
        return self.weights + self.text_kv + self.visual_kv_pruned

    @property
    def bound(self) -> float:
        return self.total / self.total_pruned


def decode_bytes(shape: ModelShape, *, batch: int, visual: float, text: float = 128, kept: float = 0, k: int = 0) -> DecodeBytes:
    """The byte model of a decode step.

    Args:
        shape: any text model; ``shape.dtype`` is that of weights and cache.
        batch: B sequences.
        visual: N visual tokens of each.
        text: text tokens of each.
        kept: visual tokens that layers >= k read; 0 with k = 0 is "all visual KV gone", the most that any method can
            reach.
        k: layers that read all N.

    Raises:
        ValueError: a number is out of range.
    """
    if batch < 1 or visual < 0 or text < 0:
        raise ValueError(f"batch must be positive, visual and text not negative, got {batch}, {visual}, {text}")
    if not 0 <= kept <= visual:
        raise ValueError(f"kept must be in [0, {visual}], got {kept}")
    if not 0 <= k <= shape.num_layers:
        raise ValueError(f"k must be in [0, {shape.num_layers}] for a model of {shape.num_layers} layers, got {k}")
    token = batch * kv_bytes_per_token(shape)
    read = (k * visual + (shape.num_layers - k) * kept) / shape.num_layers
    return DecodeBytes(batch, visual, text, kept, k, float(weight_bytes(shape)), token * text, token * visual, token * read)


# ---- a whole generation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationCost:
    """A generation on the three axes, summed over its steps and sequences.

    Attributes:
        n: tokens of each sequence when its prompt ended, visual and text: what ``paper_cost`` starts from (it grows
            by one a step).
        paper_cost: mean over steps and sequences of FastV's ratio.
        exact_cost: the same with the real layer (:func:`layer_flops`: a gated MLP, grouped key/value heads) in place of FastV's formula.
        flops, flops_unpruned: executed FLOPs, prefill and decode steps.
        prefill_flops, prefill_flops_unpruned: the prefill's part of them.
        bytes_read, bytes_read_unpruned: of all decode steps.
    """

    n: tuple[int, ...]
    paper_cost: float
    exact_cost: float
    flops: float
    flops_unpruned: float
    prefill_flops: float
    prefill_flops_unpruned: float
    bytes_read: float
    bytes_read_unpruned: float


def generation_cost(
    shape: ModelShape,
    *,
    text_rows: Sequence[int],
    visual_tokens: Sequence[int],
    group_layers: Sequence[int],
    kept: Any,
    prefill_shrunk: bool,
    again: Any = None,
    bytes_per_row: Sequence[float] | None = None,
    cached_text: Sequence[int] | None = None,
    cached_visual: Sequence[int] | None = None,
    weights: float | None = None,
    hidden: Any = 0,
    hidden_again: Any = 0,
    hidden_unpruned: Any = 0,
    computed: Any = None,
) -> GenerationCost:
    """Costs from what a generation recorded: T steps (the prefill first), G groups of layers, B sequences.

    Args:
        text_rows: ``[B]`` text tokens when the prompt ended.
        visual_tokens: ``[B]`` visual tokens N.
        group_layers: ``[G]`` layers in each group; they sum to L.
        kept: ``[T, G, B]`` visual tokens that the layers of a group read in a step.
        again: ``[T, G, B]``, likewise of a first pass of a decode step that ran twice; -1 where it did not. None: none did.
        prefill_shrunk: the prompt itself was shrunk to ``kept[0]`` in each group (``evict``; ``pool``: to the pool). Else it ran unpruned.
        bytes_per_row: ``[G]`` bytes of one token's key and value in one layer; by default from ``shape``.
        cached_text, cached_visual: ``[B]`` how many of the tokens were in the cache before this prompt (earlier
            turns of a chat).
        weights: bytes of weights a step reads; by default :func:`weight_bytes`.
        hidden: ``[T, G, B]`` rows, text and kept visual tokens, that are live but that the sliding window of a group's
            layers hides from the step (in step 0 from all of the prompt). ``hidden_again``: from a first pass.
            ``hidden_unpruned``: the same where every token was kept. They are no part of paper and exact cost.
        computed: ``[G, B]`` visual tokens of this prompt that the layers of a group compute where it was shrunk; None: the
            kept tokens are taken to be old and new in proportion.

    Raises:
        ValueError: the lengths do not fit each other.
    """
    layers = np.asarray(group_layers, dtype=np.float64)[None, :, None]
    text, visual = (np.asarray(values, dtype=np.float64) for values in (text_rows, visual_tokens))
    kept = np.asarray(kept, dtype=np.float64)
    hidden, hidden_again, hidden_unpruned = (
        np.broadcast_to(np.asarray(rows, dtype=np.float64), kept.shape) for rows in (hidden, hidden_again, hidden_unpruned)
    )
    batch = text.shape[0]
    if int(layers.sum()) != shape.num_layers:
        raise ValueError(f"group_layers must sum to {shape.num_layers} layers, got {list(group_layers)}")
    if kept.ndim != 3 or kept.shape[0] < 1 or kept.shape[1:] != (layers.shape[1], batch) or visual.shape != (batch,):
        raise ValueError(
            f"kept must be [steps, {layers.shape[1]} groups, {batch} sequences] and visual_tokens [{batch}], "
            f"got {list(kept.shape)} and {list(visual.shape)}"
        )
    before_text, before_visual = (np.zeros(batch) if v is None else np.asarray(v, dtype=np.float64) for v in (cached_text, cached_visual))
    rows_of = np.full(layers.shape[1], kv_bytes_per_token(shape) / shape.num_layers) if bytes_per_row is None else np.asarray(bytes_per_row)
    row_bytes = layers * rows_of.astype(np.float64)[None, :, None]
    weights = float(weight_bytes(shape) if weights is None else weights)
    steps = kept.shape[0] - 1
    full = np.broadcast_to(visual[None, None], kept.shape)
    # [T, B]: a decode step's own token is in the cache when it attends
    text_at = text[None] + np.arange(steps + 1)[:, None]

    def executed(context: np.ndarray, prompt_new: np.ndarray) -> tuple[float, float]:
        rows = (text - before_text) + prompt_new
        prompt = (layers[0] * layer_flops(shape, rows, context[0])).sum() + batch * head_flops(shape)
        decode = (layers * layer_flops(shape, 1.0, context[1:])).sum() + steps * batch * head_flops(shape)
        return float(prompt), float(prompt + decode)

    def read(context: np.ndarray) -> float:
        return float(steps * weights + (row_bytes * context[1:]).sum())

    twice = np.zeros(kept.shape, dtype=bool) if again is None else np.asarray(again) >= 0
    first_pass = np.where(twice, 0.0 if again is None else again, 0.0) + text_at[:, None]
    rows_again = first_pass - hidden_again
    flops_again = float((twice * layers * layer_flops(shape, 1.0, rows_again)).sum()) + float(twice[:, 0].sum()) * head_flops(shape)
    read_again = float(twice.any((1, 2)).sum() * weights + (twice * row_bytes * rows_again).sum())

    context, everything = kept + text_at[:, None] - hidden, full + text_at[:, None] - hidden_unpruned
    new = np.broadcast_to(visual - before_visual, full[0].shape)
    if prefill_shrunk:
        share = np.divide(new, full[0], out=np.ones_like(full[0]), where=full[0] > 0)
        prompt_new = kept[0] * share if computed is None else np.asarray(computed, dtype=np.float64)
    else:
        context[0], prompt_new = everything[0], new
    prompt, total = executed(context, prompt_new)
    prompt_unpruned, total_unpruned = executed(everything, new)
    length = visual[None] + text_at

    def whole_passes(layer: Callable[[np.ndarray], np.ndarray]) -> float:
        """Mean ratio of passes over the whole sequence, for the cost of a layer over so many tokens."""
        passes = layer(kept + text_at[:, None]) + twice * layer(first_pass)
        ratio = (layers * passes).sum(1) / (shape.num_layers * np.where(length > 0, layer(length), 1.0))
        return float(np.where(length > 0, ratio, 1.0).mean())

    return GenerationCost(
        n=tuple(int(value) for value in length[0]),
        paper_cost=whole_passes(lambda n: fastv_layer(n, shape.hidden_size, shape.intermediate_size)),
        exact_cost=whole_passes(lambda n: layer_flops(shape, n, n)),
        flops=total + flops_again,
        flops_unpruned=total_unpruned,
        prefill_flops=prompt,
        prefill_flops_unpruned=prompt_unpruned,
        bytes_read=read(context) + read_again,
        bytes_read_unpruned=read(everything),
    )


# ---- models by name ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedModel:
    """A published model whose weights need not be at hand.

    Attributes:
        shape: of its text model, float16.
        visual_tokens: of a typical input.
        note: what that input is.
    """

    shape: ModelShape
    visual_tokens: int
    note: str


def _llama(
    layers: int,
    heads: int,
    hidden: int,
    intermediate: int,
    vocab: int = 32064,
    kv_heads: int | None = None,
    **more: Any,
) -> ModelShape:
    dim = more.pop("head_dim", 128)
    return ModelShape(layers, heads, kv_heads or heads, dim, hidden, intermediate, vocab, **more)


_VICUNA_7B = _llama(32, 32, 4096, 11008)
_VICUNA_13B = _llama(40, 40, 5120, 13824)
_QWEN2_7B: dict[str, Any] = {"kv_heads": 4, "model_type": "qwen2", "qkv_bias": True}

MODELS: dict[str, NamedModel] = {
    "llava-1.5-7b": NamedModel(_VICUNA_7B, 576, "one picture of 336 x 336"),
    "llava-1.5-13b": NamedModel(_VICUNA_13B, 576, "one picture of 336 x 336"),
    "llava-next-7b": NamedModel(_VICUNA_7B, 2880, "five crops of 336 x 336"),
    "llava-next-13b": NamedModel(_VICUNA_13B, 2880, "five crops of 336 x 336"),
    "llava-next-mistral-7b": NamedModel(_llama(32, 32, 4096, 14336, kv_heads=8, model_type="mistral"), 2880, "five crops of 336 x 336"),
    "video-llava-7b": NamedModel(_VICUNA_7B, 2056, "eight frames of 257 tokens"),
    "llava-onevision-7b": NamedModel(_llama(28, 28, 3584, 18944, 152000, **_QWEN2_7B), 3645, "five crops of 384 x 384"),
    "qwen2.5-vl-7b": NamedModel(_llama(28, 28, 3584, 18944, 152064, **_QWEN2_7B), 1280, "one picture of a megapixel"),
}


def named_model(name: str) -> NamedModel:
    """A model of ``MODELS`` by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name]
