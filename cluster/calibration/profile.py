"""What calibration has found out about budgets of one model, as a file beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from ...router.expert_budget import ExpertBudget
from .quality import BudgetQuality, Reference

FILE_NAME = "expert_budgets.json"
VERSION = 1
_STRICT = {"extra": "forbid", "strict": True}
"""How pydantic reads these classes."""
MIN_PAIRS = 100
"""Fewer right answers tell nothing of a loss of one in a hundred."""
MIN_EXACT_MATCH = 0.4
"""What the model must get right without a budget before its exact match says anything about one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Under what a budget was calibrated."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    draft_len: int
    drafter: str
    max_num_seqs: int
    """Requests at once on each rank: those that shared a list, unless every request had its own."""
    num_ranks: int
    placement_sha256: str | None
    """Of the placement file; null without one."""
    dtype: str
    max_tokens: int
    data: str
    """Name of the file."""
    data_sha256: str
    num_records: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedBudget:
    """One budget and what it did. Shares are in [0, 1]; "reference" is the model without a budget."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    budget: str
    """Every field of it (`spelled_out`)."""
    conditions: Conditions
    num_pairs: int
    """Records whose right answer was known; the next four are of them, and null if there were none."""
    reference_exact_match: float | None
    exact_match: float | None
    exact_match_loss: float | None
    exact_match_loss_interval: tuple[float, float] | None
    """At 95 % (`PairedMatches.interval`)."""
    num_tokens: int
    """Tokens of the reference's answers that the next two are of."""
    next_token_agreement: float
    perplexity_ratio: float
    reference_experts_per_layer: float
    experts_per_layer: float
    """Distinct experts of a verification that is alone in its step, all ranks together, mean over layers."""
    kept_weight: float | None
    reference_tokens_per_step: float
    tokens_per_step: float

    @property
    def parsed(self) -> ExpertBudget:
        """``budget``, read; ``str`` of it is what people write."""
        return ExpertBudget.parse(self.budget)

    @property
    def is_of_tasks(self) -> bool:
        """Whether `quality_loss` is one of exact match."""
        known = self.num_pairs >= MIN_PAIRS and self.reference_exact_match is not None
        return known and (self.reference_exact_match or 0.0) >= MIN_EXACT_MATCH

    @property
    def quality_loss(self) -> float:
        """What the gate compares: paired loss of exact match; tokens changed where that is not known or says nothing.

        The second is the stricter: most tokens that change leave an answer right.
        """
        if self.is_of_tasks and self.exact_match_loss is not None:
            return self.exact_match_loss
        return 1 - self.next_token_agreement

    @property
    def perplexity_increase(self) -> float:
        """What the reference's answers gain in perplexity, as a share."""
        return self.perplexity_ratio - 1

    @property
    def experts_saved(self) -> float:
        """Share of the distinct experts that are no longer read."""
        if not self.reference_experts_per_layer:
            return 0.0
        return 1 - self.experts_per_layer / self.reference_experts_per_layer

    @property
    def key(self) -> tuple[object, ...]:
        """What a later calibration under the same conditions replaces."""
        conditions = self.conditions
        where = conditions.num_ranks, conditions.placement_sha256
        return self.budget, conditions.draft_len, conditions.max_num_seqs, *where


def spelled_out(budget: ExpertBudget) -> str:
    """Return every field of ``budget`` that has a value, for `ExpertBudget.parse`: defaults may change one day."""
    values = ((spec.name, getattr(budget, spec.name)) for spec in fields(budget))
    return ",".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in values
        if value is not None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetProfile:
    """The calibrated budgets of one model."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    version: int = VERSION
    model: str
    """Name of its directory."""
    fingerprint: str
    """`model_fingerprint` of its files."""
    budgets: list[CalibratedBudget]

    def with_budgets(self, budgets: Sequence[CalibratedBudget]) -> BudgetProfile:
        """Return this with ``budgets`` added, or put in the place of earlier ones under the same conditions."""
        found = {entry.key: entry for entry in [*self.budgets, *budgets]}
        return BudgetProfile(model=self.model, fingerprint=self.fingerprint, budgets=list(found.values()))


def calibrated(
    budget: ExpertBudget, conditions: Conditions, reference: Reference, quality: BudgetQuality
) -> CalibratedBudget:
    """Return what a profile says of one measurement."""
    matches = quality.matches
    return CalibratedBudget(
        budget=spelled_out(budget),
        conditions=conditions,
        num_pairs=matches.num_pairs if matches else 0,
        reference_exact_match=matches.reference_share if matches else None,
        exact_match=matches.share if matches else None,
        exact_match_loss=matches.loss if matches else None,
        exact_match_loss_interval=matches.interval if matches else None,
        num_tokens=quality.num_tokens,
        next_token_agreement=quality.agreement,
        perplexity_ratio=quality.perplexity_ratio,
        reference_experts_per_layer=reference.experts_per_layer,
        experts_per_layer=quality.experts_per_layer,
        kept_weight=quality.kept_weight,
        reference_tokens_per_step=reference.answers.tokens_per_step,
        tokens_per_step=quality.tokens_per_step,
    )


def write_profile(profile: BudgetProfile, file: Path) -> None:
    """Write ``profile``, figures to six digits."""
    file.write_text(json.dumps(_rounded(asdict(profile)), indent=1) + "\n", encoding="utf-8")


def read_profile(file: Path) -> BudgetProfile:
    """Return what ``file`` says; raise ``ValueError`` naming ``budget_profile`` for one that is no profile."""
    from pydantic import TypeAdapter, ValidationError

    try:
        text = file.read_text(encoding="utf-8")
        version = json.loads(text).get("version")
    except OSError as error:
        raise ValueError(f"budget_profile: cannot read {file}: {error.strerror}") from error
    except (AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"budget_profile: {file} is not a profile: {error}") from error
    if version != VERSION:
        raise ValueError(
            f"budget_profile: {file} is of version {version!r}, expected {VERSION}; write it again with "
            "`penstock calibrate`"
        )
    try:
        profile = TypeAdapter(BudgetProfile).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"budget_profile: {file} is not a profile: {where}: {first['msg']}") from error
    for entry in profile.budgets:
        try:
            ExpertBudget.parse(entry.budget)
        except ValueError as error:
            raise ValueError(f"budget_profile: {file} is not a profile: {error}") from error
    return profile


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(found) for key, found in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(found) for found in value]
    return round(value, 6) if isinstance(value, float) else value
