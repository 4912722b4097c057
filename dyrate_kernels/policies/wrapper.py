"""The base of ``klguard`` and ``recycle``: any policy, some of whose dropped tokens come back while the model is unsure without them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from typing_extensions import Self

from dyrate_kernels import registry
from dyrate_kernels.policies.base import Decision, ModelShape, Policy, View


@dataclass(frozen=True)
class Wrapper(Policy):
    """Another policy's decision, with a share of the tokens that it drops brought back: the highest ranked ones of them.

    The share is ``state["relief"]``, float64 ``[B]``, 0 at first; a subclass moves it. Where the other policy decides only at prefill, its
    ranking and count of the prefill are kept and the relief applies to them in every decode step.

    Attributes:
        k: first pruned layer; None: the other policy's.
        policy: the other one, or its name with options, as text (``fastv:k=2``).
    """

    k: int | None = None  # type: ignore[assignment]  # an int once bound
    policy: Policy | str = "dyrate"

    remembers: ClassVar[bool] = True
    needs_recoverable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        inner = self.policy
        if isinstance(inner, str):
            inner = registry.parse("policy", inner)
        elif not isinstance(inner, Policy):
            raise TypeError(f"policy must be a policy or its name, got {type(inner).__name__}")
        if self.k is not None:
            inner = replace(inner, k=self.k)
        object.__setattr__(self, "policy", inner)

    @property
    def inner(self) -> Policy:
        """``policy``, made."""
        return cast(Policy, self.policy)

    @property
    def _options(self) -> Any:
        """``inner``, of whose options some are asked for only where ``query_rows`` says that it has them."""
        return self.policy

    def bind(self, shape: ModelShape) -> Self:
        inner = self.inner.bind(shape)
        return replace(self, policy=inner, k=inner.k)

    @property
    def rescores(self) -> bool:  # type: ignore[override]  # read on instances alone
        return self.inner.rescores

    def layer_groups(self, num_layers: int) -> list[int]:
        return self.inner.layer_groups(num_layers)

    @property
    def query_rows(self) -> Literal["last", "mean", "raters", "pagerank"]:
        return self.inner.query_rows

    @property
    def temperature(self) -> float:
        return self._options.temperature

    @property
    def iterations(self) -> int:
        return self._options.iterations

    def raters(self, hidden: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        return self.inner.raters(hidden, visual, text)

    @property
    def merges(self) -> bool:
        return self.inner.merges

    @property
    def reads_hidden(self) -> bool:
        return self.inner.reads_hidden

    @property
    def drops(self) -> bool:
        return self.inner.drops

    @property
    def predictor_name(self) -> str | None:
        return self.inner.predictor_name

    def predictor_words(self, asked: Self, shape: ModelShape, retention: str) -> str | None:
        return self.inner.predictor_words(asked.inner, shape, retention)

    def at_strength(self, strength: float, num_layers: int) -> Self:
        return replace(self, policy=self.inner.at_strength(strength, num_layers))

    def start(self, n_visual: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(False):  # a chat may go on outside of the inference mode it began in
            return {**self.inner.start(n_visual), "relief": torch.zeros(n_visual.shape[0], dtype=torch.float64, device=n_visual.device)}

    def decide(self, view: View) -> Decision:
        inner = self.inner
        decision = inner.decide(view)
        if not inner.at_decode:
            decision = self._of_the_prefill(view, decision)
        left = 1.0 - view.state["relief"]
        n_visual = view.n_visual.to(decision.count.dtype)
        dropped = ((n_visual - decision.count).double() * left + 1e-6).floor()
        return Decision(decision.rate * left, n_visual - dropped.to(n_visual.dtype), decision.score)

    def _of_the_prefill(self, view: View, decision: Decision) -> Decision:
        """The decision of step 0, in every step. It is kept in the state."""
        now = {"rate": decision.rate, "count": decision.count, "score": view.importance if decision.score is None else decision.score}
        if decision.count.dim() == 2:  # [G, B]: the state's first dimension is that of the sequences
            now["count"] = decision.count.t()
        kept = {}
        for name, value in now.items():
            key, value = f"{name} of group {view.group}", value.detach()
            if key not in view.state or view.state[key].shape != value.shape:  # the first step, on the host's side of a capture
                with torch.inference_mode(False):
                    view.state[key] = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            first = (view.step == 0).view(-1, *[1] * (value.dim() - 1))
            kept[name] = view.state[key].copy_(torch.where(first, value, view.state[key])).clone()
        count = kept["count"].t() if decision.count.dim() == 2 else kept["count"]
        return Decision(kept["rate"], count.contiguous(), kept["score"])
