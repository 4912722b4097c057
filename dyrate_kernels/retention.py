"""The kinds of retention as values: whoever asks whether prompts shrink or rows move asks one of these, not a name."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

from dyrate_kernels.policies.base import Policy

RETENTIONS = ("recoverable", "evict", "pool")
DEFAULT_POOL = 0.25
RANKINGS = ("policy", "uniform")


@dataclass(frozen=True)
class Retention:
    """A retention with its options; ``str()`` gives text that ``specs.retention`` reads.

    Attributes:
        name: ``recoverable``, ``evict`` or ``pool``.
        pool: of ``pool``, in (0, 1]: the fraction of each picture's visual tokens that layers >= k hold; None: ``DEFAULT_POOL``.
        pool_by: of ``pool``, which tokens these are: ``"policy"`` (the highest by the policy's ranking at the prompt's last row),
            ``"uniform"`` (evenly spaced over each picture), or the share of the pool, in [0, 1], that is evenly spaced, the rest ranked;
            None: ``"policy"``.

    Raises:
        TypeError, ValueError: another name or value, or an option of ``pool`` with another retention.
    """

    name: str = "recoverable"
    pool: float | None = None
    pool_by: str | float | None = None

    def __post_init__(self) -> None:
        if self.name not in RETENTIONS:
            raise ValueError(f"retention must be one of {', '.join(RETENTIONS)}; got {self.name!r}")
        if self.name != "pool":
            for option, value in (("pool", self.pool), ("pool_by", self.pool_by)):
                if value is not None:
                    raise ValueError(
                        f"{option} goes with retention='pool' alone, got {option}={value!r} with retention={self.name!r}; "
                        f"leave {option} out, or use retention='pool'"
                    )
            return
        object.__setattr__(self, "pool", DEFAULT_POOL if self.pool is None else _checked_pool(self.pool))
        object.__setattr__(self, "pool_by", "policy" if self.pool_by is None else _checked_ranking(self.pool_by))

    def __str__(self) -> str:
        if self.pool is None:
            return self.name
        return f"{self.name}={self.pool!r}" + ("" if self.pool_by == "policy" else f":by={self.pool_by}")

    @property
    def shrinks(self) -> bool:
        """Layers >= k compute and hold a part of a prompt's visual tokens alone."""
        return self.name != "recoverable"

    @property
    def moves(self) -> bool:
        """Rows leave while decoding; else steps read through lists, and none binds another."""
        return self.name == "evict"

    @property
    def spaced(self) -> float:
        """The share of a pool that is evenly spaced."""
        return {"policy": 0.0, "uniform": 1.0}[self.pool_by] if isinstance(self.pool_by, str) else float(self.pool_by or 0.0)

    def suits(self, policy: Policy) -> bool:
        """:meth:`check` has nothing against it."""
        try:
            self.check(policy)
        except ValueError:
            return False
        return True

    def check(self, policy: Policy) -> None:
        """Refuses policies that cannot mean under this retention what they mean elsewhere.

        Args:
            policy: bound to a model or not.

        Raises:
            ValueError: the policy needs another one; names it.
        """
        if policy.needs_recoverable and self.name != "recoverable":
            raise ValueError(
                f"policy {policy.name!r} brings tokens back, which retention={self.name!r} cannot; use retention='recoverable'"
            )
        if self.pool is None or not policy.decides:
            return
        why = None
        if not policy.at_decode:
            why = "decides once, at the prompt"
        elif not policy.at_prefill:
            why = "does not rank at the prompt"
        elif policy.merges:
            why = "merges tokens that go into others"
        if why is not None:
            raise ValueError(
                "retention='pool' needs a policy that ranks at the prompt and chooses anew at every decode step, got "
                f"{policy.name!r}, which {why}; use retention='{'evict' if policy.at_prefill else 'recoverable'}' with it"
            )


def _checked_pool(value: Any) -> float:
    expected = "pool must be a number in (0, 1] (the fraction of the visual tokens that layers >= k hold)"
    advice = "pool=1 holds all of them; to hold none, use policy 'vtw'"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{expected}, got {value!r}; {advice}")
    if not 0.0 < float(value) <= 1.0:  # also refuses NaN
        raise ValueError(f"{expected}, got {value!r}; {advice}")
    return float(value)


def _checked_ranking(value: Any) -> str | float:
    advice = f"give one of {', '.join(map(repr, RANKINGS))}, or the share of the pool that is evenly spaced"
    expected = "pool_by must be 'policy', 'uniform' or a number in [0, 1]"
    if isinstance(value, str):
        if value not in RANKINGS:
            raise ValueError(f"{expected}, got {value!r}; {advice}")
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{expected}, got {value!r}; {advice}")
    if not 0.0 <= float(value) <= 1.0:  # also refuses NaN
        raise ValueError(f"{expected}, got {value!r}; {advice}")
    return float(value)
