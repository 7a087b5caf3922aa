"""Whether a budget may be served: only one whose loss is known, and small enough."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ...router.expert_budget import ExpertBudget
from ...workers.architectures import UNSTEERABLE
from ...workers.checkpoint import load_config, resolve
from ...workers.runner import num_experts_of, num_experts_per_tok
from ..config import EngineConfig
from .fingerprint import file_sha256, model_fingerprint
from .profile import FILE_NAME, BudgetProfile, CalibratedBudget, read_profile

logger = logging.getLogger(__name__)


def check_budget_profile(config: EngineConfig) -> CalibratedBudget | None:
    """Return what is known of the budget that ``config`` serves; None without one, or one that can change nothing.

    For whoever starts ranks, before it does; an `Engine` as such serves any budget. Raises ``ValueError`` naming the
    field and what to do unless the profile of this very model holds this budget, under conditions that the server
    keeps to, within ``max_quality_loss`` and ``max_perplexity_increase``. With ``allow_uncalibrated`` that is a
    warning, and the result None.
    """
    budget = config.budget
    if budget is None:
        return None
    directory = resolve(config.model, config.revision)
    if not _can_change_anything(budget, directory, config.expert_parallel_size):
        return None
    try:
        return _allowed(config, budget, directory)
    except ValueError as error:
        if not config.allow_uncalibrated:
            raise
        logger.warning("serving %s all the same (allow_uncalibrated): %s", budget, error)
        return None


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
    file = profile_file(config, directory)
    command = f"`penstock calibrate {config.model} --data FILE.jsonl --budget {budget}`"
    if not file.is_file():
        raise ValueError(
            f"expert_budget: nothing is known of what {budget} costs, as there is no {file}; write it with {command}"
        )
    profile = read_profile(file)
    if profile.fingerprint != model_fingerprint(directory):
        raise ValueError(
            f"budget_profile: {file} is of another model ({profile.model}) or of other weights; write one with "
            f"{command}"
        )
    entries = _entries(profile, config, budget)
    if not entries:
        known = _names(profile.budgets) or "none"
        raise ValueError(f"expert_budget: {budget} is not in {file}, which has: {known}; measure it with {command}")
    problems = [_problem(entry, config, budget) for entry in entries]
    fitting = [entry for entry, problem in zip(entries, problems, strict=True) if problem is None]
    if not fitting:
        raise ValueError(f"{problems[-1]}, or measure it as you serve it: {command[:-1]} {_flags(config)}`")
    worst = max(fitting, key=lambda entry: (not is_allowed(entry, config), entry.quality_loss))
    _check_loss(worst, config, profile)
    return worst


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
    ranks_matter = budget.limits_ranks or budget.scope in ("owner", "global")
    if ranks_matter and measured.num_ranks != config.expert_parallel_size:
        return (
            f"expert_parallel_size: {config.expert_parallel_size} is not {measured.num_ranks}, the number of ranks "
            f"that {budget} was calibrated on"
        )
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
    fine = _names(other for other in profile.budgets if is_allowed(other, config))
    raise ValueError(f"expert_budget: {said} allows; within it: {fine or 'none calibrated'}")


def _loss(entry: CalibratedBudget) -> str:
    if not entry.is_of_tasks or entry.exact_match_loss is None or entry.exact_match_loss_interval is None:
        return f"{100 * entry.quality_loss:.1f} % of {entry.num_tokens} next tokens changed"
    low, high = entry.exact_match_loss_interval
    return (
        f"{100 * entry.exact_match_loss:.1f} points of exact match lost (95 % CI {100 * low:.1f} to {100 * high:.1f}, "
        f"{entry.num_pairs} pairs)"
    )
