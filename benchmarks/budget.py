"""Budgets of experts: what they save and what they cost, for every score, rest, number and scope.

The demo model in float32, n-gram drafts of seven tokens, its own tasks. Exact match is paired with the model's own
answers (95 % intervals); agreement and perplexity are of the next tokens of its own answers, code and chat included,
led along them step by step with real drafts. Savings are exact counts: distinct experts per layer of a request's steps
after its prompt, and of those that verify drafts alone. Every request has a list of its own (as when it is served
alone), unless the scope says otherwise; then ``batch`` requests share one rank, and the step's experts count. Experts
are taken to be contiguous on ``ranks`` ranks, whose busiest one is counted too.
`benchmarks/budget_time` has the time, `benchmarks/budget_traffic` the bytes between ranks.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.calibration.paired import paired_matches
from ..cluster.calibration.quality import greedy_answers, next_token_agreement, perplexity_ratio, with_drafts
from ..cluster.calibration.teacher_forcing import Text, TextScores, score_texts
from ..cluster.config import EngineConfig
from ..cluster.engine.ranks import LocalRanks, make_runner
from ..demo import prompts
from ..demo.records import Family, generate
from ..router.budgeted_choice import LayerRanks
from ..router.expert_budget import ExpertBudget
from ..router.placement import contiguous
from ..workers.runner import ModelRunner
from .counted_ranks import CountedRanks, Counts
from .decode import DEMO
from .harness import Measurement, Options, Row, Target, run

TASKS: tuple[Family, ...] = ("math", "extraction")
TEXTS: tuple[Family, ...] = ("code", "chat")
NUM_PAIRS = 1000
"""Of each task."""
QUICK_PAIRS = 40
NUM_TEXTS = 48
"""Of each family, for agreement and perplexity."""
QUICK_TEXTS = 8
DRAFT_LEN = 7
MAX_TOKENS = 192
BATCH = 32
"""Requests that share steps and nothing else."""
SHARING = 8
"""Requests that share a list, at the scopes where they do."""
NONE = "none"
PAPER = "experts=16,score=probabilities"
RECOMMENDED = "experts=12"
"""Of those that lose less than a point here, the one that reads least."""
SEED_OFFSET = 100
"""Apart from the seeds of calibration and of what budgets were chosen on."""
OWN_LISTS = (
    *(f"experts={n},score=probabilities" for n in (16, 12)),
    "experts=12,score=selected",
    *(f"experts={n}" for n in (14, 12, 11, 10)),
    "experts=12,score=survival",
    "experts=12,rest=truncation",
    "experts=12,protect_first_row=true",
    "coverage=0.9,score=selected",
    "coverage=0.9",
)
SHARED_LISTS = ("experts=12,scope=source",)
EVEN = f"{RECOMMENDED},rank_balance=0.5"
"""The same where the experts are on two ranks."""
EVEN_RANKS = 2
QUICK_LISTS = (PAPER, RECOMMENDED, "coverage=0.9")
MAX_LOSS = 0.01
MAX_PERPLEXITY = 1.02
REQUIRED_SAVING = 0.30


@dataclass(frozen=True, slots=True)
class Task:
    """Questions of one family with their right answers."""

    family: str
    prompts: list[list[int]]
    answers: list[str]


@dataclass(frozen=True, slots=True)
class Run:
    """One task answered under one budget."""

    texts: list[str]
    token_ids: list[list[int]]
    counts: Counts


class Bench:
    """Answers and scores under budgets, one after another, on one rank, of the demo model or one with its tokenizer."""

    def __init__(self, seed: int, num_pairs: int, num_texts: int, model: Path = DEMO) -> None:
        self.config = EngineConfig(
            model=str(model),
            dtype="float32",
            device="cpu",
            num_threads=1,
            max_num_seqs=BATCH,
            max_num_batched_tokens=1024,
            kv_cache_bytes=64 << 20,
        )
        self.runner: ModelRunner = make_runner(self.config, 0)
        self.tokenizer = ChatTokenizer(str(model))
        self.tasks = [self._task(family, SEED_OFFSET + seed, num_pairs) for family in TASKS]
        self._texts = self._make_texts(num_texts)
        self._plain_scores = self._scores(None, 1)

    def _task(self, family: Family, seed: int, num_pairs: int) -> Task:
        records = list(islice(generate(family, "held_out", seed), num_pairs))
        return Task(
            family,
            [self.tokenizer.encode_chat(record.chat()) for record in records],
            [record.answer for record in records],
        )

    def _make_texts(self, num_texts: int) -> list[Text]:
        """Return the model's own greedy answers of all families."""
        questions = [prompt for task in self.tasks for prompt in task.prompts[:num_texts]]
        for family in TEXTS:
            questions += [self.tokenizer.encode_chat(record.chat()) for record in prompts.load(family)[:num_texts]]
        answers = greedy_answers(with_drafts(self.config, 0, None), LocalRanks(self.runner), questions, MAX_TOKENS)
        return [Text(prompt, output) for prompt, output in zip(questions, answers.token_ids, strict=True)]

    def _scores(self, budget: ExpertBudget | None, num_ranks: int) -> TextScores:
        config = with_drafts(self.config, DRAFT_LEN, budget)
        return score_texts(config, self._ranks(num_ranks), self._texts)

    def _ranks(self, num_ranks: int) -> CountedRanks:
        """Return the rank; it takes its experts to be on ``num_ranks`` of them, contiguous."""
        model = self.runner.info.model
        placement = contiguous(model.num_moe_layers, model.num_experts, num_ranks)
        owners = [placement.owner_table(layer, 0)[:-1] for layer in range(model.num_moe_layers)]
        return CountedRanks(self.runner, [LayerRanks(owner, num_ranks, 0) for owner in owners])

    def fidelity(self, budget: ExpertBudget, num_ranks: int = 1) -> tuple[float, float]:
        """Return (next-token agreement, perplexity ratio) on the model's own answers."""
        scores = self._scores(budget, num_ranks)
        return next_token_agreement(self._plain_scores, scores)[0], perplexity_ratio(self._plain_scores, scores)

    def answer(self, task: Task, budget: ExpertBudget | None, batch: int = BATCH, num_ranks: int = 1) -> Run:
        """Answer a task's questions, ``batch`` at a time, as if experts were on ``num_ranks`` ranks."""
        ranks = self._ranks(num_ranks)
        config = replace(with_drafts(self.config, DRAFT_LEN, budget), max_num_seqs=batch)
        answers = greedy_answers(config, ranks, task.prompts, MAX_TOKENS)
        texts = [self.tokenizer.decode(ids) for ids in answers.token_ids]
        return Run(texts, answers.token_ids, ranks.counts)


def measure(options: Options) -> Measurement:
    """Answer every task under every budget, beside no budget."""
    torch.set_num_threads(1)
    bench = Bench(
        options.seed,
        QUICK_PAIRS if options.quick else NUM_PAIRS,
        QUICK_TEXTS if options.quick else NUM_TEXTS,
    )
    rows: list[Row] = []
    settings = [(text, 1, 1) for text in (QUICK_LISTS if options.quick else OWN_LISTS)]
    settings += [(EVEN, 1, EVEN_RANKS)]
    settings += [(text, SHARING, 1) for text in (() if options.quick else SHARED_LISTS)]
    plain = {
        (task.family, batch, num_ranks): bench.answer(task, None, BATCH if batch == 1 else batch, num_ranks)
        for task in bench.tasks
        for batch, num_ranks in sorted({(batch, num_ranks) for _, batch, num_ranks in settings})
    }
    for text, batch, num_ranks in settings:
        budget = ExpertBudget.parse(text if "scope=" in text else f"{text},scope=request")
        agreement, perplexity = bench.fidelity(budget, num_ranks) if batch == 1 else (None, None)
        for task in bench.tasks:
            found = bench.answer(task, budget, BATCH if batch == 1 else batch, num_ranks)
            row = _row(text, batch, task, plain[task.family, batch, num_ranks], found)
            rows.append(row | {"ranks": num_ranks, "agreement": agreement, "perplexity_ratio": perplexity})
            print(rows[-1], file=sys.stderr)
    return Measurement(rows, targets(rows), "float32", 1)


def _row(text: str, batch: int, task: Task, plain: Run, found: Run) -> Row:
    pairs = paired_matches(plain.texts, found.texts, task.answers)
    low, high = pairs.interval
    return {
        "budget": text,
        "batch": batch,
        "task": task.family,
        "pairs": pairs.num_pairs,
        "exact_match": pairs.share,
        "plain_exact_match": pairs.reference_share,
        "points_lost": 100 * pairs.loss,
        "lost_low_95": 100 * low,
        "lost_high_95": 100 * high,
        "same_answers": statistics.fmean(a == b for a, b in zip(plain.token_ids, found.token_ids, strict=True)),
        **_savings(plain.counts, found.counts, shared=batch > 1),
        "tokens_per_step": found.counts.num_tokens / len(found.counts.steps),
        "plain_tokens_per_step": plain.counts.num_tokens / len(plain.counts.steps),
    }


def _savings(plain: Counts, found: Counts, *, shared: bool) -> Row:
    if shared:
        before, after = plain.shared_experts_per_layer, found.shared_experts_per_layer
        return {"experts": after, "plain_experts": before, "saved": 1 - after / before}
    before, after = plain.experts_per_layer, found.experts_per_layer
    verified, left = plain.verifications().experts_per_layer, found.verifications().experts_per_layer
    return {
        "experts": after,
        "plain_experts": before,
        "saved": 1 - after / before,
        "verified_experts": left,
        "plain_verified_experts": verified,
        "verified_saved": 1 - left / verified,
        "busiest_saved": 1 - found.busiest_experts_per_layer / plain.busiest_experts_per_layer,
    }


def targets(rows: Sequence[Row]) -> list[Target]:
    """Compare the recommended budgets with what a budget must do."""
    mine = [row for row in rows if (row["budget"], row["batch"]) == (RECOMMENDED, 1)]
    even = [row for row in rows if row["budget"] == EVEN]
    return [
        Target("base exact match, worst task", min(_column(mine, "plain_exact_match")), 0.4),
        Target(
            f"{RECOMMENDED}: exact match lost, worst task", max(_column(mine, "points_lost")), at_most=100 * MAX_LOSS
        ),
        Target(f"{RECOMMENDED}: perplexity ratio", max(_column(mine, "perplexity_ratio")), at_most=MAX_PERPLEXITY),
        Target(
            f"{RECOMMENDED}: distinct experts saved, all steps, worst task",
            min(_column(mine, "saved")),
            REQUIRED_SAVING,
        ),
        Target(
            f"{RECOMMENDED}: distinct experts saved, verifications, worst task",
            min(_column(mine, "verified_saved")),
            REQUIRED_SAVING,
        ),
        Target(f"{EVEN}: exact match lost, worst task", max(_column(even, "points_lost")), at_most=100 * MAX_LOSS),
        Target(f"{EVEN}: perplexity ratio", max(_column(even, "perplexity_ratio")), at_most=MAX_PERPLEXITY),
        Target(
            f"{EVEN}: distinct experts saved, all steps, worst task",
            min(_column(even, "saved")),
            REQUIRED_SAVING,
        ),
    ]


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(run("budget", measure))
