"""FastV (arXiv 2403.06764): one choice at prefill, kept for the whole generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dyrate_kernels.policies.base import check_choice
from dyrate_kernels.policies.fixed import Fixed

RANKINGS = ("last", "mean")


@dataclass(frozen=True)
class FastV(Fixed):
    """Removes the ``rate`` least attended visual tokens from layers >= k, decided at prefill and never again.

    Attributes:
        k: first pruned layer (the paper's K).
        rate: fraction removed, in [0, 1] (the paper's R).
        ranking: ``"last"``: attention of the last prompt row, as FastV's code does; ``"mean"``: attention received
            from all prompt rows, as its paper says (section 3).
    """

    ranking: str = "last"

    name: ClassVar[str] = "fastv"
    at_decode: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ranking", self.ranking, RANKINGS)

    @property
    def query_rows(self) -> Literal["last", "mean"]:
        return "mean" if self.ranking == "mean" else "last"
