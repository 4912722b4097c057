"""Every operator, how often it is drawn, and how."""

from __future__ import annotations

from collections.abc import Callable

from tests.differential import layers, operators, paged
from tests.differential.draw import Draw
from tests.differential.operators import Call

OPERATORS: dict[str, tuple[float, Callable[[Draw], Call]]] = {
    "decode_attention": (6, operators.decode_attention),
    "decode_step": (5, operators.decode_step),
    "score_last_query": (2, operators.score_last_query),
    "select_tokens": (4, operators.select_tokens),
    "predict_rate": (2, operators.predict_rate),
    "compact_": (3, operators.compact_),
    "reorder_": (2, operators.reorder_),
    "paged_attention": (3, paged.paged_attention),
    "paged_step": (3, paged.paged_step),
    "rms_norm": (0.7, layers.rms_norm),
    "residual_norm": (0.7, layers.residual_norm),
    "gate_mul": (0.7, layers.gate_mul),
    "rotate": (1, layers.rotate),
    "linears": (1.5, layers.linears),
    "gated": (1.5, layers.gated),
    "norm_linears": (0.7, layers.norm_linears),
    "norm_gated": (0.7, layers.norm_gated),
}
LAYERS = ("rms_norm", "residual_norm", "gate_mul", "rotate", "linears", "gated", "norm_linears", "norm_gated")
PAGED = ("paged_attention", "paged_step")
