"""What a budget of experts asks for: how many a verification may read, chosen how, and what becomes of the rest.

A budget is lossy: a verified token is no longer exactly the model's own. It acts on rows that verify drafts and on no
others; docs/budgets.md says when it pays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

SCORES = ("probabilities", "selected", "squared", "survival")
RESTS = ("substitution", "truncation")
SCOPES = ("request", "source", "owner", "global")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBudget:
    """Limits on the experts, and on the other ranks, that budgeted rows use in every layer.

    Raises ``ValueError`` naming the field and its valid range.
    """

    experts: int | None = None
    """Experts kept (MoE-Spec's B, arXiv 2602.16052); those that other rows load anyway may be used besides."""
    coverage: float | None = None
    """Keep the fewest experts that hold this share of the score, in (0, 1], instead of a fixed number."""
    score: str = "squared"
    """What ranks experts, summed over budgeted rows: probabilities (the router's, of all experts; MoE-Spec's), selected
    (the weight shares of each row's own choice), squared (their squares) or survival (those, times the row's
    probability of being reached)."""
    rest: str = "substitution"
    """What becomes of a row's experts that are not kept: substitution (the row chooses again among those kept; its
    router's own rule weighs them) or truncation (they contribute nothing, the others keep their weights)."""
    scope: str = "source"
    """Who shares a list of kept experts: the rows of a request, those of a rank (source), those of a rank with a list
    for each owner (owner: loads stay even), or those of all ranks (global: one small all-reduce a layer)."""
    rank_balance: float = 0.0
    """Share of their worth, in [0, 1), that experts beyond a rank's part of ``experts`` lose when they are ranked: a
    step waits for the rank that reads most."""
    protect_first_row: bool = False
    """Leave a request's first row, whose token is sure to be used, to the model."""
    max_ranks_per_row: int | None = None
    """Most other ranks that a budgeted row is sent to."""
    min_rank_share: float = 0.0
    """Least share of a row's weight that justifies sending it to another rank, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.experts is not None and self.coverage is not None:
            raise ValueError("expert_budget: experts and coverage exclude each other")
        if not self.limits_experts and not self.limits_ranks:
            raise ValueError("expert_budget: expected experts, coverage, max_ranks_per_row or min_rank_share")
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise ValueError(f"expert_budget: coverage {self.coverage!r} is not in (0, 1]")
        for name, valid in (("score", SCORES), ("rest", RESTS), ("scope", SCOPES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"expert_budget: {name} {getattr(self, name)!r} is not one of {', '.join(valid)}")
        if self.max_ranks_per_row is not None and self.max_ranks_per_row < 1:
            raise ValueError(f"expert_budget: max_ranks_per_row {self.max_ranks_per_row} is not at least 1")
        if not 0 <= self.min_rank_share < 1:
            raise ValueError(f"expert_budget: min_rank_share {self.min_rank_share!r} is not in [0, 1)")
        if self.coverage is not None and self.scope == "owner":
            raise ValueError("expert_budget: coverage has no scope owner; choose experts, or another scope")
        if not 0 <= self.rank_balance < 1:
            raise ValueError(f"expert_budget: rank_balance {self.rank_balance!r} is not in [0, 1)")
        if self.rank_balance and (self.experts is None or self.scope == "owner"):
            raise ValueError(
                "expert_budget: rank_balance goes with experts, and with another scope than owner, where ranks are even"
            )

    @classmethod
    def parse(cls, text: str) -> ExpertBudget:
        """Build from what ``str`` writes: fields and values as in ``experts=20,scope=owner``.

        Raises ``ValueError`` naming the field and its valid range.
        """
        values: dict[str, object] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, separator, value = part.partition("=")
            if name not in _READERS or not separator:
                raise ValueError(
                    f"expert_budget: expected name=value with a name of {', '.join(_READERS)}; got {part!r}"
                )
            if name in values:
                raise ValueError(f"expert_budget: {name} is given twice")
            try:
                values[name] = _READERS[name](value)
            except (KeyError, ValueError):
                raise ValueError(f"expert_budget: {value!r} is no value of {name}") from None
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return the fields that are not as they are by default; `parse` reads it."""
        parts = [(spec.name, getattr(self, spec.name)) for spec in fields(self)]
        said = [(name, value) for name, value in parts if value != _DEFAULTS[name]]
        return ",".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in said)

    @property
    def limits_experts(self) -> bool:
        """Whether it keeps some experts only."""
        return self.experts is not None or self.coverage is not None

    @property
    def is_per_owner(self) -> bool:
        """Whether what is kept depends on which rank holds an expert."""
        return self.scope == "owner" or self.rank_balance > 0

    @property
    def keeps_some(self) -> bool:
        """Whether it takes a list of kept experts: all of a share has none, as sums round and might not reach it."""
        return self.limits_experts and self.coverage != 1

    @property
    def allows_top_k(self) -> bool:
        """Whether every row gets as many experts as it would use without it, of those that it allows."""
        return self.rest == "substitution" and not self.limits_ranks

    @property
    def limits_ranks(self) -> bool:
        """Whether it keeps rows from other ranks."""
        return self.max_ranks_per_row is not None or self.min_rank_share > 0

    def check(self, num_experts: int, top_k: int, *, steerable: bool) -> None:
        """Raise ``ValueError`` unless a model with these routers can keep to it."""
        if self.experts is not None and not top_k <= self.experts <= num_experts:
            raise ValueError(
                f"expert_budget: experts {self.experts} is not in [{top_k}, {num_experts}]: every row uses {top_k} of "
                f"the model's {num_experts}"
            )
        if not steerable and (self.rest != "truncation" or self.score == "probabilities"):
            raise ValueError(
                "expert_budget: this model's router does not select by top-k, so a row cannot choose again and only "
                "what it chose is known; choose rest truncation, and another score than probabilities"
            )

    def is_void(self, num_experts: int, num_ranks: int) -> bool:
        """Whether it can change nothing."""
        all_experts = not self.limits_experts or self.experts == num_experts or self.coverage == 1
        all_ranks = not self.min_rank_share and (self.max_ranks_per_row or num_ranks) >= num_ranks - 1
        return all_experts and (all_ranks or num_ranks == 1)


_READERS: dict[str, Callable[[str], object]] = {
    "experts": int,
    "coverage": float,
    "score": str,
    "rest": str,
    "scope": str,
    "rank_balance": float,
    "protect_first_row": {"true": True, "false": False}.__getitem__,
    "max_ranks_per_row": int,
    "min_rank_share": float,
}
_DEFAULTS = {spec.name: spec.default for spec in fields(ExpertBudget)}
