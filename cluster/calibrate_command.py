"""The command `penstock calibrate`: what budgets of experts cost a model, written beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..router.expert_budget import ExpertBudget
from .config import EngineConfig
from .flags import CalibrationFlags, given

if TYPE_CHECKING:
    from .calibration.profile import BudgetProfile, CalibratedBudget
    from .engine.ranks import Ranks

_MAX_TOKENS = 256
_WIDTH = 140
"""Of the table where no terminal says how wide it is."""


def calibrate(
    model: str,
    /,
    *,
    data: Path,
    output: Path | None = None,
    budget: Annotated[tuple[str, ...], Parameter(negative=(), show_default=False)] = (),
    draft_len: int | None = None,
    max_tokens: int = _MAX_TOKENS,
    num_records: int | None = None,
    plot: Path | None = None,
    engine: Annotated[CalibrationFlags, Parameter(name="*")] = CalibrationFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Measure what budgets of experts do to MODEL's answers and write it where `penstock serve` looks for it.

    Budgets that are in the file already, measured otherwise or earlier, stay in it.

    Parameters
    ----------
    model
        A directory with config.json and safetensors weights, or a model id on the Hugging Face hub.
    data
        JSONL whose lines have `messages` (a chat) or `prompt` (a text), and `answer` where there is one right answer.
    output
        File to write; expert_budgets.json beside the model when absent.
    budget
        A budget as `serve` takes it, such as `experts=20,scope=request`; once for each. A grid when absent.
    draft_len
        Tokens drafted at each step: the most that will be served. [default: 7]
    max_tokens
        Most tokens of an answer.
    num_records
        Records of the data to use, from the first; all when absent.
    plot
        PNG to write: what is lost over experts read. Needs matplotlib.
    """
    from ..workers.checkpoint import resolve
    from .calibration.plot import check_plotting, plot_profile
    from .calibration.profile import FILE_NAME, write_profile
    from .client.llm import make_ranks

    for name, value in (("max_tokens", max_tokens), ("num_records", num_records), ("draft_len", draft_len)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is not at least 1")
    budgets = [ExpertBudget.parse(text) for text in budget]
    if plot is not None:
        check_plotting()
    config = EngineConfig.from_mapping({"model": model, **given(engine)})
    file = output or resolve(config.model, config.revision) / FILE_NAME
    # A run takes long: what it cannot write is known now
    for name, target in (("output", file), ("plot", plot)):
        if target is not None and not os.access(target if target.exists() else target.parent, os.W_OK):
            raise ValueError(f"{name}: cannot write {target}")
    profile = _profile(config, file)
    if not data.is_file():
        raise ValueError(f"data: cannot read {data}: No such file")
    ranks = make_ranks(config)
    try:
        entries = _measure(config, ranks, data, budgets, draft_len, max_tokens, num_records)
    finally:
        ranks.close()
    write_profile(profile.with_budgets(entries), file)
    out = Console()
    (out if out.is_terminal else Console(width=_WIDTH)).print(_table(entries))
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"written to {file}")
    if plot is not None:
        plot_profile(entries, plot)


def _profile(config: EngineConfig, file: Path) -> BudgetProfile:
    """Return what ``file`` holds of this model, so that a later run adds to it; nothing if it is of another."""
    from ..workers.checkpoint import resolve
    from .calibration.fingerprint import model_fingerprint
    from .calibration.profile import BudgetProfile, read_profile

    directory = resolve(config.model, config.revision)
    fingerprint = model_fingerprint(directory)
    if file.is_file():
        found = read_profile(file)
        if found.fingerprint == fingerprint:
            return found
    return BudgetProfile(model=directory.resolve().name, fingerprint=fingerprint, budgets=[])


def _measure(
    config: EngineConfig,
    ranks: Ranks,
    data: Path,
    budgets: Sequence[ExpertBudget],
    draft_len: int | None,
    max_tokens: int,
    num_records: int | None,
) -> list[CalibratedBudget]:
    from .api.chat_tokenizer import ChatTokenizer
    from .calibration.calibrate import DRAFT_LEN, default_budgets
    from .calibration.calibrate import calibrate as run
    from .calibration.fingerprint import file_sha256
    from .calibration.gate import placement_sha256
    from .calibration.profile import Conditions
    from .client.question_file import read_questions

    info = ranks.infos[0].model
    tokenizer = ChatTokenizer(config.tokenizer_source, config.revision)
    questions = read_questions(data, tokenizer, max_prompt_tokens=info.max_model_len - 1, num_records=num_records)
    grid = budgets or default_budgets(info)
    conditions = Conditions(
        draft_len=draft_len or DRAFT_LEN,
        drafter=config.drafter,
        max_num_seqs=config.max_num_seqs,
        num_ranks=config.expert_parallel_size,
        placement_sha256=placement_sha256(config),
        dtype=info.dtype,
        max_tokens=max_tokens,
        data=data.name,
        data_sha256=file_sha256(data),
        num_records=len(questions),
    )
    with _progress() as progress:
        tasks: dict[str, Any] = {
            name: progress.add_task(name, total=2 * len(questions)) for name in ["no budget", *map(str, grid)]
        }
        measured = run(
            config,
            ranks,
            questions,
            grid,
            tokenizer.decode,
            conditions,
            lambda name, done: progress.advance(tasks[name], done),
        )
        return list(measured)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers and texts"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _table(entries: Sequence[CalibratedBudget]) -> Table:
    measured = entries[0].conditions
    title = (
        f"{measured.num_records} records of {measured.data}; draft length {measured.draft_len}, {measured.drafter} "
        f"drafts, {measured.dtype}; without a budget {entries[0].reference_experts_per_layer:.1f} experts a layer, "
        f"{entries[0].reference_tokens_per_step:.2f} tokens a step"
    )
    table = Table(title=title)
    table.add_column("budget", overflow="fold")
    for name in ("experts", "saved", "exact match", "points lost (95 % CI)", "agreement", "perplexity", "tokens/step"):
        table.add_column(name, justify="right")
    for entry in entries:
        table.add_row(
            str(entry.parsed),
            f"{entry.experts_per_layer:.1f}",
            f"{100 * entry.experts_saved:.0f} %",
            "" if entry.exact_match is None else f"{100 * entry.exact_match:.1f} %",
            _lost(entry),
            f"{entry.next_token_agreement:.4f}",
            f"x {entry.perplexity_ratio:.4f}",
            f"{entry.tokens_per_step:.2f}",
        )
    return table


def _lost(entry: CalibratedBudget) -> str:
    if entry.exact_match_loss is None or entry.exact_match_loss_interval is None:
        return ""
    low, high = entry.exact_match_loss_interval
    return f"{100 * entry.exact_match_loss:.1f} ({100 * low:.1f} to {100 * high:.1f})"
