"""Whether a budget may be served: only one whose loss is known, and small enough."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...router.expert_budget import ExpertBudget
from ...workers.architectures import UNSTEERABLE
from ...workers.checkpoint import resolve
from ...workers.config_file import load_config
from ...workers.model_config import num_experts_of, num_experts_per_tok
from ..config import AUTO_BUDGET, EngineConfig
from ..engine.budget import EngineBudget
from .fingerprint import file_sha256, model_fingerprint
from .profile import FILE_NAME, BudgetProfile, CalibratedBudget, read_profile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedBudgets:
    """What may be served."""

    config: EngineConfig
    """As given, with the budgets themselves in the place of ``auto``."""
    entries: tuple[CalibratedBudget | None, ...] = ()
    """What is known of each of ``config.budgets``; None of one that can change nothing, or is not known."""

    @property
    def known(self) -> list[EngineBudget]:
        """What an engine is told of those that are known."""
        return [
            EngineBudget(budget, entry.experts_saved, entry.conditions.draft_len + 1)
            for budget, entry in zip(self.config.budgets, self.entries, strict=True)
            if entry is not None
        ]


def check_budget_profile(config: EngineConfig) -> ServedBudgets:
    """Return the budgets that ``config`` serves and what is known of them.

    For whoever starts ranks, before it does; an `Engine` as such serves any budget. Raises ``ValueError`` naming the
    field and what to do unless the profile of this very model holds each budget, under conditions that the server
    keeps to, within ``max_quality_loss`` and ``max_perplexity_increase``. With ``allow_uncalibrated`` that is a
    warning. ``auto`` is what passes all this, and at least one budget.
    """
    if not config.budget_names:
        return ServedBudgets(config)
    directory = resolve(config.model, config.revision)
    if config.budget_names == (AUTO_BUDGET,):
        return _every_budget(config, directory)
    return ServedBudgets(config, tuple(_known(config, budget, directory) for budget in config.budgets))


def _known(config: EngineConfig, budget: ExpertBudget, directory: Path) -> CalibratedBudget | None:
    if not _can_change_anything(budget, directory, config.expert_parallel_size):
        return None
    try:
        return _allowed(config, budget, directory)
    except ValueError as error:
        if not config.allow_uncalibrated:
            raise
        logger.warning("serving %s all the same (allow_uncalibrated): %s", budget, error)
        return None


def _every_budget(config: EngineConfig, directory: Path) -> ServedBudgets:
    """Return all that may be served, the least lossy first, less those that lose no less than another and save no more.

    A limit on ranks saves what no profile tells, so budgets with different ones are not compared.
    """
    command = f"`penstock calibrate {config.model} --data FILE.jsonl`"
    profile = _profile(config, directory, "what any budget costs", command)
    found = [
        entry
        for entry in servable(profile, config)
        if _can_change_anything(entry.parsed, directory, config.expert_parallel_size)
    ]
    if not found:
        raise ValueError(
            f"expert_budget: none in {profile_file(config, directory)} may be served as configured; measure others, or "
            f"as you serve them, with {command[:-1]} {_flags(config)}`, or name one to learn what is missing"
        )
    found.sort(key=lambda entry: (entry.quality_loss, -entry.experts_saved))
    kept: list[CalibratedBudget] = []
    for entry in found:
        limits = _rank_limits(entry)
        if all(_rank_limits(other) != limits or other.experts_saved < entry.experts_saved for other in kept):
            kept.append(entry)
    config = replace(config, expert_budget=tuple(str(entry.parsed) for entry in kept))
    return ServedBudgets(config, tuple(kept[: len(config.budgets)]))


def _rank_limits(entry: CalibratedBudget) -> tuple[int | None, float]:
    return entry.parsed.max_ranks_per_row, entry.parsed.min_rank_share


def servable(profile: BudgetProfile, config: EngineConfig) -> list[CalibratedBudget]:
    """Return one entry of each budget of ``profile`` that ``config`` may serve: of several, that which lost most."""
    found = []
    for budget in dict.fromkeys(entry.parsed for entry in profile.budgets):
        entry = _worst_fitting(profile, config, budget)
        if isinstance(entry, CalibratedBudget) and is_allowed(entry, config):
            found.append(entry)
    return found


def profile_file(config: EngineConfig, directory: Path) -> Path:
    """Return where the profile of the model in ``directory`` is."""
    return Path(config.budget_profile).expanduser() if config.budget_profile else directory / FILE_NAME


def describe(entry: CalibratedBudget) -> str:
    """Return one line about what a budget saves and loses."""
    saved = f"{100 * entry.experts_saved:.0f} % fewer experts a verification"
    perplexity = f"perplexity {100 * entry.perplexity_increase:+.1f} %"
    return f"{saved}, {_loss(entry)}, {perplexity}"


def is_allowed(entry: CalibratedBudget, config: EngineConfig) -> bool:
    """Tell whether its loss is within what ``config`` allows."""
    return entry.quality_loss <= config.max_quality_loss and entry.perplexity_increase <= config.max_perplexity_increase


def _can_change_anything(budget: ExpertBudget, directory: Path, num_ranks: int) -> bool:
    model = load_config(directory)
    text = model.get_text_config()
    num_experts = num_experts_of(text)
    budget.check(num_experts, num_experts_per_tok(text), steerable=model.model_type not in UNSTEERABLE)
    return not budget.is_void(num_experts, num_ranks)


def _allowed(config: EngineConfig, budget: ExpertBudget, directory: Path) -> CalibratedBudget:
    command = f"`penstock calibrate {config.model} --data FILE.jsonl --budget {budget}`"
    profile = _profile(config, directory, f"what {budget} costs", command)
    found = _worst_fitting(profile, config, budget)
    if found is None:
        known = _names(profile.budgets) or "none"
        file = profile_file(config, directory)
        raise ValueError(f"expert_budget: {budget} is not in {file}, which has: {known}; measure it with {command}")
    if isinstance(found, str):
        raise ValueError(f"{found}, or measure it as you serve it: {command[:-1]} {_flags(config)}`")
    _check_loss(found, config, profile)
    return found


def _profile(config: EngineConfig, directory: Path, what: str, command: str) -> BudgetProfile:
    file = profile_file(config, directory)
    if not file.is_file():
        raise ValueError(f"expert_budget: nothing is known of {what}, as there is no {file}; write it with {command}")
    profile = read_profile(file)
    if profile.fingerprint != model_fingerprint(directory):
        raise ValueError(
            f"budget_profile: {file} is of another model ({profile.model}) or of other weights; write one with "
            f"{command}"
        )
    return profile


def _worst_fitting(profile: BudgetProfile, config: EngineConfig, budget: ExpertBudget) -> CalibratedBudget | str | None:
    """Return of the measurements that the server keeps to the one that lost most; a problem if there is none of these.

    None if ``budget`` was not measured at all.
    """
    entries = _entries(profile, config, budget)
    problems = [_problem(entry, config, budget) for entry in entries]
    fitting = [entry for entry, problem in zip(entries, problems, strict=True) if problem is None]
    if not fitting:
        return problems[-1] if problems else None
    return max(fitting, key=lambda entry: (not is_allowed(entry, config), entry.quality_loss))


def _entries(profile: BudgetProfile, config: EngineConfig, budget: ExpertBudget) -> Sequence[CalibratedBudget]:
    wanted = [budget]
    if budget.scope == "source" and config.max_num_seqs == 1:  # a rank's only request has its list to itself
        wanted.append(replace(budget, scope="request"))
    return [entry for entry in profile.budgets if entry.parsed in wanted]


def _names(entries: Iterable[CalibratedBudget]) -> str:
    return ", ".join(dict.fromkeys(str(entry.parsed) for entry in entries))


def _problem(entry: CalibratedBudget, config: EngineConfig, budget: ExpertBudget) -> str | None:
    """Return how the server goes beyond what was measured, None if it does not: more rows would share a list."""
    measured = entry.conditions
    if entry.kept_weight is None or not entry.num_tokens:
        return f"expert_budget: no draft was verified when {budget} was calibrated; take data that drafts are found for"
    if config.drafter != measured.drafter:
        return f"drafter: {config.drafter} is not {measured.drafter}, which {budget} was calibrated with"
    drafted = {"off": 0, "fixed": config.fixed_draft_len}.get(config.policy, config.max_draft_len)
    if drafted > measured.draft_len:
        field = "draft_len" if config.policy == "fixed" else "max_draft_len"
        return f"{field}: {drafted} is more than the {measured.draft_len} tokens that {budget} was calibrated with"
    ranks_matter = budget.limits_ranks or budget.is_per_owner or budget.scope == "global"
    if ranks_matter and measured.num_ranks != config.expert_parallel_size:
        return (
            f"expert_parallel_size: {config.expert_parallel_size} is not {measured.num_ranks}, the number of ranks "
            f"that {budget} was calibrated on"
        )
    if config.enable_eplb and (budget.limits_ranks or budget.is_per_owner):
        return f"enable_eplb: it moves experts, and {budget} was calibrated where they stay"
    if ranks_matter and measured.placement_sha256 != placement_sha256(config):
        return f"placement: {config.placement} is not what {budget} was calibrated with"
    has_shared_list = budget.limits_experts and budget.scope != "request" and entry.parsed == budget
    if has_shared_list and config.max_num_seqs > measured.max_num_seqs:
        return (
            f"max_num_seqs: {config.max_num_seqs} requests may share a list of experts, but {budget} was "
            f"calibrated for {measured.max_num_seqs}; choose scope=request, where each has its own"
        )
    return None


def placement_sha256(config: EngineConfig) -> str | None:
    """Return what tells the placement file of ``config`` from others, None without one."""
    return None if config.placement is None else file_sha256(Path(config.placement).expanduser())


def _flags(config: EngineConfig) -> str:
    drafted = config.fixed_draft_len if config.policy == "fixed" else config.max_draft_len
    placement = f" --placement {config.placement}" if config.placement else ""
    return (
        f"--draft-len {drafted} --max-num-seqs {config.max_num_seqs} "
        f"--drafter {config.drafter} --expert-parallel-size {config.expert_parallel_size}{placement}"
    )


def _check_loss(entry: CalibratedBudget, config: EngineConfig, profile: BudgetProfile) -> None:
    if is_allowed(entry, config):
        return
    if entry.quality_loss > config.max_quality_loss:
        said = f"{entry.parsed} has {_loss(entry)}: more than max_quality_loss = {config.max_quality_loss:g}"
    else:
        said = (
            f"{entry.parsed} has perplexity {100 * entry.perplexity_increase:+.1f} %: more than "
            f"max_perplexity_increase = {config.max_perplexity_increase:g}"
        )
    fine = _names(servable(profile, config))
    raise ValueError(f"expert_budget: {said} allows; within it: {fine or 'none calibrated'}")


def _loss(entry: CalibratedBudget) -> str:
    if not entry.is_of_tasks or entry.exact_match_loss is None or entry.exact_match_loss_interval is None:
        return f"{100 * entry.quality_loss:.1f} % of {entry.num_tokens} next tokens changed"
    low, high = entry.exact_match_loss_interval
    return (
        f"{100 * entry.exact_match_loss:.1f} points of exact match lost (95 % CI {100 * low:.1f} to {100 * high:.1f}, "
        f"{entry.num_pairs} pairs)"
    )
