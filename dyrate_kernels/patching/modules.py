"""Types for the parts that are read of transformers' modules: ``nn.Module`` says of each attribute that it may be a tensor or a module.

No such class is ever made. ``families`` and ``tower`` take a part of a loaded model for one (``typing.cast``) where they find it, of a
family that is known to have these attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn


class Norm(nn.Module):
    """RMSNorm of a text model."""

    weight: nn.Parameter


class Attention(nn.Module):
    """Of a decoder layer; ``config`` is the text model's."""

    layer_idx: int
    config: Any


class Swapped(Attention):
    """One whose class ``attention.swap`` has changed; it had this one."""

    _dyrate_original: ClassVar[type[nn.Module]]


class DecoderLayer(nn.Module):
    """Of a text model."""

    self_attn: Attention
    input_layernorm: Norm


class Decoder(nn.Module):
    """A text model."""

    layers: Sequence[DecoderLayer]
    norm: Norm
    dtype: torch.dtype


class TowerAttention(nn.Module):
    """Of a CLIP or SigLIP layer."""

    num_heads: int
    q_proj: nn.Linear
    k_proj: nn.Linear


class TowerLayer(nn.Module):
    """Of a CLIP or SigLIP tower."""

    self_attn: TowerAttention
    layer_norm1: nn.LayerNorm
    layer_norm2: nn.LayerNorm
    mlp: nn.Module


class Projecting(nn.Module):
    """A base model with a CLIP or SigLIP tower and a projector behind it."""

    multi_modal_projector: nn.Module
