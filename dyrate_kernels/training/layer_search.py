"""VTW's search for its layer (arXiv 2405.05803): the first K from which visual tokens may leave without changing the next token much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels import answering, chat
from dyrate_kernels.patching.api import patch
from dyrate_kernels.policies.vtw import VTW
from dyrate_kernels.training.data import Example, Unreadable


@dataclass(frozen=True)
class LayerSearch:
    """Result of the search.

    Attributes:
        k: the first layer whose divergence is at most ``eta``; None: there is none.
        divergence: mean KL(unpruned || withdrawn) of the distribution after the prompt, in nats, by K.
        eta: the limit.
        samples: prompts that it is the mean over.
        skipped: examples that could not be read, or have no picture.
    """

    k: int | None
    divergence: dict[int, float]
    eta: float
    samples: int
    skipped: int


@torch.no_grad()
def search_layer(
    model: Any,
    processor: Any,
    source: Sequence[Example],
    *,
    eta: float = 0.003,
    samples: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> LayerSearch:
    """Tries K = 1 .. L-1 on those of the first ``samples`` examples that can be used: one pruned prefill each.

    Raises:
        ValueError: a bad option, or no example can be used.
        TypeError: the model is not supported.
    """
    if not eta >= 0.0:
        raise ValueError(f"eta must not be negative, got {eta}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    layers = range(1, model.config.get_text_config().num_hidden_layers)
    total = torch.zeros(len(layers), dtype=torch.float64)
    used = skipped = 0
    count = min(samples, len(source))
    for index in range(count):
        if progress is not None:
            progress(index, count)
        try:
            example = source[index]
        except Unreadable:
            skipped += 1
            continue
        if not example.images:
            skipped += 1
            continue
        inputs = chat.encode(processor, [chat.render(processor, example.messages)], [example.images], model)
        whole = _next_token(model, inputs)
        for number, k in enumerate(layers):
            with patch(model, VTW(k=k), retention="evict"):
                total[number] += divergence(whole, _next_token(model, inputs))
        used += 1
    if progress is not None:
        progress(count, count)
    if not used:
        raise ValueError(f"none of the {count} examples can be used: each needs a picture that can be read")
    mean = {k: float(value) / used for k, value in zip(layers, total, strict=True)}
    return LayerSearch(next((k for k in layers if mean[k] <= eta), None), mean, eta, used, skipped)


def _next_token(model: Any, inputs: Any) -> Tensor:
    """Log-probabilities after the prompt, float64 ``[V]``."""
    settings = answering.settings(model, 1) | {"output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **settings)
    return output.logits[0][0].double().log_softmax(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats; a probability of 0 in p counts nothing."""
    p = log_p.exp()
    return float(torch.where(p > 0, p * (log_p - log_q), 0.0).sum().clamp(min=0.0))
