"""The interface of every method: how many visual tokens stay, and how they are ranked.

A policy knows no kernel, no cache and no model module. It receives what the score layer ``k-1`` measured
(:class:`View`, device tensors) and answers with counts and, if it does not rank by importance, with scores
(:class:`Decision`, device tensors). The selection itself is ``ops.select_tokens``, the same for all. ``decide`` runs
inside a decode step: tensor operations only, nothing read on the host.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels.families import text_model

IMAGE = 1  # column of ``mass`` that belongs to visual tokens (docs/design.md, section 3)


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder-only text model that policies and the cost models need.

    Attributes:
        num_layers: L.
        num_heads: Hq, query heads.
        num_kv_heads: Hkv, key/value heads.
        head_dim: D.
        hidden_size: d.
        intermediate_size: m, width of the gated (SwiGLU) MLP.
        vocab_size: V.
        dtype: of weights, activations and KV cache.
        model_type: the text config's ``model_type``.
        tied_embeddings: the output head shares the embedding's weights.
        qkv_bias, output_bias, mlp_bias: which projections have a bias.
        qk_norm: queries and keys are normalised per head (qwen3, gemma3).
        layer_norms: normalisations of width d in a layer: 2, in gemma3 4.
        folder: where the model was loaded from, if that is a folder here; a predictor saved beside it is found there.
        trained_by_default: that predictor is taken where none is named.
        stored_weights: bytes of the weights that a loaded model reads, as it holds them; None: all of ``parameters`` in ``dtype``.
        windows: sliding window of each layer, None for a layer without; empty: no layer has one.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtype: torch.dtype = torch.float16
    model_type: str = "llama"
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_norms: int = 2
    folder: str | None = None
    trained_by_default: bool = True
    stored_weights: int | None = None
    windows: tuple[int | None, ...] = ()

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype | None = None) -> ModelShape:
        """Reads a transformers config, of a text model or of any VLM around one.

        Args:
            config: ``PretrainedConfig``.
            dtype: overrides the config's own (float32 where the config has none).

        Raises:
            ValueError: the config describes no decoder with attention heads and an MLP.
        """
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

        def read(name: str) -> int:
            value = getattr(text, name, None)
            if not isinstance(value, int):
                raise ValueError(
                    f"config must describe a text model with an integer {name}, got {type(text).__name__} with "
                    f"{name}={value!r}; pass the config of a decoder-only model or of a VLM around one"
                )
            return value

        heads, hidden = read("num_attention_heads"), read("hidden_size")
        kind = getattr(text, "model_type", "") or ""
        chain, bias = text_model(kind), bool(getattr(text, "attention_bias", False))
        found = dtype or getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.float32
        if isinstance(found, str):
            found = getattr(torch, found.removeprefix("torch."), torch.float32)
        tied = getattr(config, "tie_word_embeddings", None)
        folder = getattr(config, "_name_or_path", None)
        return cls(
            num_layers=read("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            hidden_size=hidden,
            intermediate_size=read("intermediate_size"),
            vocab_size=read("vocab_size"),
            dtype=found,
            model_type=kind,
            tied_embeddings=bool(getattr(text, "tie_word_embeddings", False) if tied is None else tied),
            qkv_bias=bias or chain.qkv_bias,
            output_bias=bias and not chain.qkv_bias,
            mlp_bias=bool(getattr(text, "mlp_bias", False)),
            qk_norm=chain.qk_norm,
            layer_norms=chain.layer_norms,
            folder=folder if folder and os.path.isdir(folder) else None,
        )

    def replace(self, **changes: Any) -> ModelShape:
        """The same shape with some fields changed, e.g. ``dtype``."""
        return dataclasses.replace(self, **changes)


@dataclass
class View:
    """One step as a policy sees it. All tensors are on one device; B sequences, N the widest sequence's visual
    tokens.

    Attributes:
        step: int64 ``[B]``, 0 = prefill (statistics of the last prompt row), 1 = first decode step. Rows may differ
            (drafted tokens).
        mass: float32 ``[B, Hq, 4]``, attention mass by token type at layer ``k-1``; rows sum to 1.
        importance: float32 ``[B, N]``, attention to each visual token, mean over heads; 0 past a sequence's end.
        n_visual: int32 ``[B]``, all visual tokens of the sequence, dropped ones included.
        alive: bool ``[B, N]`` or None: the tokens that can still be chosen (retention ``evict``, ``pool``); None: all.
        state: the dict that :meth:`Policy.start` made. Tensors with first dimension B, updated in place.
        hidden: ``[B, d]``, what goes into the attention of layer ``k-1``, normalised, for policies that read it (``reads_hidden``).
        group: which group of layers is decided for, where each is for itself (``Policy.rescores``); mass, importance and hidden are then
            of the layer before that group, and alive what the group before it keeps.
        visual: ``[B, N, d]``, like hidden, of the visual tokens (any value where not ``mergeable``), for policies that merge
            (``Policy.merges``) where tokens can be merged: a prompt under ``evict``; else None.
        mergeable: bool ``[B, N]`` with it: the tokens that this prompt brought and the layer still holds.
    """

    step: Tensor
    mass: Tensor
    importance: Tensor
    n_visual: Tensor
    alive: Tensor | None
    state: dict[str, Tensor]
    hidden: Tensor | None = None
    group: int = 0
    visual: Tensor | None = None
    mergeable: Tensor | None = None


@dataclass
class Decision:
    """A policy's answer.

    Attributes:
        rate: float64 ``[B]``, the fraction removed that it asked for (the mean over pruned layers where they differ).
        count: int32 ``[B]``, or ``[G, B]`` with one row a group of layers: how many stay, in [0, n_visual].
        score: float ``[B, N]``, the highest stay; None: rank by importance.
        merge: int64 ``[B, N]`` or None, where ``View.visual`` was given: the token that each token becomes part of: itself for those that
            stay, -1 for those that leave no trace. What the (first) group computes with is the mean over each token's parts.
    """

    rate: Tensor
    count: Tensor
    score: Tensor | None = None
    merge: Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """Base of every method. Subclasses are frozen dataclasses: options are fields, checked when made.

    Attributes:
        k: first layer that sees the pruned set; scores come from layer ``k-1``. 1 <= k <= L-1.
        name: registry name.
        at_prefill: decides from the last prompt row: ``evict`` shrinks layers >= k of the prompt by it, ``pool`` ranks by it; under
            ``recoverable`` it binds the decode steps if the policy does not decide again there.
        at_decode: decides again at every decode step.
        constant: the count never changes after prefill, so under ``evict`` a decode step has nothing to decide.
        remembers: a decode step may change the state (in place), and so what later steps decide. Tokens that are drafted for assisted
            decoding decide one after the other then; the state goes back where they are refused. Where it ``rescores``, none is drafted.
        rescores: each group of layers (``layer_groups``) is decided for at the layer before it, in a call of its own.
        needs_recoverable: tokens that it dropped must be able to come back, so retentions ``evict`` and ``pool`` are refused.
    """

    k: int = 3

    name: ClassVar[str]
    at_prefill: ClassVar[bool] = True
    at_decode: ClassVar[bool] = True
    constant: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    rescores: ClassVar[bool] = False
    needs_recoverable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_k(self.k)

    def bind(self, shape: ModelShape) -> Self:
        """The policy for one model: defaults resolved, everything checked that depends on the model.

        Raises:
            ValueError: k outside [1, L-1].
        """
        check_k_range(self.k, shape.num_layers)
        return self

    def layer_groups(self, num_layers: int) -> list[int]:
        """First layer of each group of layers that shares one kept set; layers before the first see every token."""
        return [self.k]

    @property
    def query_rows(self) -> Literal["last", "mean", "raters", "pagerank"]:
        """Which prompt rows rank at prefill: the last one, the mean over all, the mean over those that :meth:`raters` chooses, or all, each
        by the weight that the others give it (``temperature`` and ``iterations`` are then options of the policy).
        """
        return "last"

    def raters(self, hidden: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """The prompt rows that rank, for ``query_rows == "raters"``; a sequence for which none is chosen is ranked by its last row. Tensor
        operations only.

        Args:
            hidden: ``[B, q, d]``, the embeddings that the prompt enters the first layer with.
            visual: bool ``[B, q]``, its visual tokens.
            text: bool ``[B, q]``, its instruction tokens.

        Returns:
            bool ``[B, q]``, a subset of ``text``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define raters(hidden, visual, text)")

    @property
    def merges(self) -> bool:
        """Returns whether ``Decision.merge`` is used: tokens that go are averaged into tokens that stay. Needs retention ``evict``."""
        return False

    @property
    def reads_hidden(self) -> bool:
        """Returns whether ``View.hidden`` is wanted."""
        return False

    @property
    def reads_logits(self) -> bool:
        """Returns whether ``see_logits``, ``checks``, ``see_unpruned`` are wanted. Then no tokens are drafted: ``generate()`` says so."""
        return False

    def see_logits(self, logits: Tensor, state: dict[str, Tensor]) -> None:
        """``[B, V]`` of the prompt's last row and of every decode step, after it. Changes the state in place; tensor operations only."""

    def checks(self, step: int) -> bool:
        """Returns whether this decode step (1 = the first) is to run once more with all visual tokens, for ``see_unpruned``."""
        return False

    def see_unpruned(self, pruned: Tensor, unpruned: Tensor, state: dict[str, Tensor]) -> None:
        """Logits ``[B, V]`` of a step that ``checks`` asked for, without and with all visual tokens. As ``see_logits``."""

    @property
    def decides(self) -> bool:
        """Returns whether it ever decides anything; a policy that never does is the unpruned model."""
        return self.at_prefill or self.at_decode

    @property
    def drops(self) -> bool:
        """Returns whether these options ask for any token to be dropped at all."""
        return True

    def settings(self) -> dict[str, Any]:
        """Returns the options of a bound policy as they took effect, for JSON; k and a predictor are told beside them."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "k" and not field.metadata.get("bound") and value is not None:
                found[field.name] = value if isinstance(value, str | int | float | bool | list) else getattr(value, "name", str(value))
        return found

    @property
    def predictor_name(self) -> str | None:
        """Returns the name of what predicts the rate, for ``stats()``; None for methods without a predictor."""
        return None

    def predictor_words(self, asked: Self, shape: ModelShape, retention: str) -> str | None:
        """Returns, for people, what predicts the rate of this bound policy, and why; None for methods without a predictor.

        Args:
            asked: the policy as it was before ``bind``.
            shape: that it was bound to.
            retention: that it will run under.
        """
        return None

    def at_strength(self, strength: float, num_layers: int) -> Self:
        """The same method pruning more or less, for comparisons at equal cost: its one knob in place of what it was set to.

        Args:
            strength: in [0, 1]: 0 prunes as little as the method can, 1 as much; the cost never rises with it.
            num_layers: L.

        Raises:
            ValueError: the method has no such knob.
        """
        check_fraction("strength", strength, "how much to prune")
        if "rate" not in {field.name for field in dataclasses.fields(self)}:
            raise ValueError(f"policy {self.name!r} has no one knob to tune to a cost")
        options: dict[str, Any] = {"rate": float(strength)}  # a field of the method, not of every policy
        return dataclasses.replace(self, **options)

    def kept_bound(self, n_visual: int) -> int:
        """The most tokens this policy ever keeps of ``n_visual`` (host integers): how wide a kept list must be. At
        least 1 where n_visual is.
        """
        return n_visual

    def start(self, n_visual: Tensor) -> dict[str, Tensor]:
        """State of a generation.

        Args:
            n_visual: int32 ``[B]``; its device is where the state lives.

        Returns:
            Tensors with first dimension B (beam search reorders them by it).
        """
        return {}

    def decide(self, view: View) -> Decision:
        """One step's decision. Tensor operations only; state changes in rows whose step is 0, and where ``remembers``."""
        raise NotImplementedError(f"{type(self).__name__} must define decide(view)")

    def predictor_tensors(self, state: dict[str, Tensor], hidden: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """(weight, bias, rates) for the fused decode step if the policy is a linear rate predictor ranked by
        importance; else None. ``hidden`` as in :class:`View`.
        """
        return None


def constant_rate(rate: float, like: Tensor) -> Tensor:
    """float64 ``[B]`` filled with ``rate``, on the device of ``like`` (``[B]``)."""
    return torch.full(like.shape, rate, dtype=torch.float64, device=like.device)


def constant_count(rate: float, n_visual: Tensor) -> Tensor:
    """int32 ``[B]``: ``ops.keep_count`` of ``n_visual`` (int32 ``[B]``) for one ``rate`` in [0, 1], in half as many operations."""
    return n_visual.double().mul_(1.0 - float(rate)).add_(1e-6).floor_().to(torch.int32)


def bound_for_rate(n_visual: int, rate: float) -> int:
    """``ops.keep_count`` of host numbers, but at least 1 where n_visual is (a list of width 0 is no list)."""
    return max(min(math.floor(n_visual * (1.0 - rate) + 1e-6), n_visual), min(n_visual, 1))


def check_k(k: Any) -> None:
    """k must be a positive integer.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(k, bool) or not isinstance(k, Integral):
        raise TypeError(f"k must be an integer (the first layer that sees the pruned set), got {k!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1 (layer k-1 scores the tokens), got {k}")


def check_k_range(k: int, num_layers: int) -> None:
    """k must leave a layer before it to score and a layer after it to prune.

    Raises:
        ValueError: it does not.
    """
    if num_layers < 2:
        raise ValueError(f"a model of {num_layers} layer cannot be pruned: one layer must score and one must follow it")
    if not 1 <= k <= num_layers - 1:
        raise ValueError(
            f"k must be in [1, {num_layers - 1}] for a model of {num_layers} layers, got {k}; "
            "k is the first layer that sees the pruned set, layer k-1 scores the tokens"
        )


def check_fraction(name: str, value: Any, meaning: str) -> None:
    """``value`` must be a number in [0, 1].

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [0, 1] ({meaning}), got {value!r}")
    if not 0.0 <= float(value) <= 1.0:  # also refuses NaN
        raise ValueError(f"{name} must be in [0, 1] ({meaning}), got {value!r}")


def check_count(name: str, value: Any, meaning: str) -> None:
    """``value`` must be an integer of at least 1.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer ({meaning}), got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 ({meaning}), got {value!r}")


def check_positive(name: str, value: Any, meaning: str) -> None:
    """``value`` must be a number of at least 0.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number of at least 0 ({meaning}), got {value!r}")
    if not float(value) >= 0.0:  # also refuses NaN
        raise ValueError(f"{name} must be at least 0 ({meaning}), got {value!r}")


def check_rate(rate: Any) -> None:
    """A rate is the fraction removed, in [0, 1].

    Raises:
        TypeError, ValueError: it is not.
    """
    check_fraction("rate", rate, "the fraction of visual tokens removed")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """``value`` must be one of ``choices``.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
