"""Bytes between ranks per output token: placements, limits on the ranks a row visits, and budgets of experts.

Exact counts of the demo model's own routing at draft length 7, as a request is served whose home is one of 2 to 32
ranks: rows sent to other ranks times two hidden states in bfloat16 (there and back), over the tokens of its steps after
the prompt. Homes take turns over the requests. Affine placements are made from the routing of other records. At 8 ranks
quality is measured too: exact match paired with the model's own answers. With 32 experts every one of 32 ranks holds a
single one, so no placement can help there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from ..cluster.calibration.paired import paired_matches
from ..cluster.calibration.quality import greedy_answers, with_drafts
from ..demo.records import generate
from ..router.affine import affine
from ..router.budgeted_choice import LayerRanks
from ..router.expert_budget import ExpertBudget
from ..router.placement import Placement, contiguous
from ..workers.plan import StepPlan, StepResult
from .budget import DRAFT_LEN, MAX_TOKENS, NONE, RECOMMENDED, TASKS, Bench, Task
from .counted_ranks import CountedRanks, Counts
from .harness import Measurement, Options, Row, Target, run

RANKS = (2, 4, 8, 16, 32)
MEASURED_RANKS = 8
NUM_PAIRS = 1000
"""Of each task, at 8 ranks under the two budgets that are held to targets."""
NUM_COUNTED = 80
"""Of each task elsewhere: bytes are what matters there."""
QUICK_PAIRS = 16
NUM_TRACED = 96
"""Records of each task whose routing the affine placement is made from."""
TRACE_SEED = 7
LIMITED = "max_ranks_per_row=2"
BOTH = f"{RECOMMENDED},max_ranks_per_row=2"
SETTINGS = (
    ("contiguous", NONE),
    ("affine", NONE),
    ("contiguous", RECOMMENDED),
    ("affine", RECOMMENDED),
    ("contiguous", LIMITED),
    ("affine", LIMITED),
    ("affine", "max_ranks_per_row=1"),
    ("affine", "min_rank_share=0.15"),
    ("affine", "experts=14,max_ranks_per_row=2"),
    ("affine", BOTH),
)
REQUIRED_SAVING = 0.25
MOST_LOST = 1.0
HIDDEN_ITEMSIZE = 2


class TracedRanks(CountedRanks):
    """Keeps the expert ids of all rows that decode."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.runner)
        self.ids: list[np.ndarray] = []

    def step(self, plan: StepPlan) -> StepResult:
        """Run the step and keep what its routers chose."""
        result = super().step(plan)
        self.ids.append(np.stack([layer.numpy() for layer in self.step_ids], axis=1))
        return result


@dataclass(frozen=True, slots=True)
class Homes:
    """Where the experts of all layers are, as each rank sees it."""

    layers: list[list[LayerRanks]]

    @classmethod
    def of(cls, placement: Placement) -> Homes:
        """Return them for every rank of a placement."""
        return cls(
            [
                [
                    LayerRanks(placement.owner_table(layer, rank)[:-1], placement.num_ranks, rank)
                    for layer in range(placement.num_layers)
                ]
                for rank in range(placement.num_ranks)
            ]
        )


def trace(bench: Bench, num_records: int = NUM_TRACED) -> np.ndarray:
    """Return the experts [N, L, K] that rows of other records choose."""
    questions = [
        bench.tokenizer.encode_chat(record.chat())
        for family in TASKS
        for record in islice(generate(family, "held_out", TRACE_SEED), num_records)
    ]
    ranks = TracedRanks(bench)
    greedy_answers(with_drafts(bench.config, DRAFT_LEN, None), ranks, questions, MAX_TOKENS)
    return np.concatenate(ranks.ids)


def measure(options: Options) -> Measurement:
    """Count every setting at every number of ranks."""
    torch.set_num_threads(1)
    bench = Bench(options.seed, QUICK_PAIRS if options.quick else NUM_PAIRS, 1)
    recorded = trace(bench)
    model = bench.runner.info.model
    rows: list[Row] = []
    for num_ranks in (MEASURED_RANKS,) if options.quick else RANKS:
        places = {
            "contiguous": Homes.of(contiguous(model.num_moe_layers, model.num_experts, num_ranks)),
            "affine": Homes.of(affine(recorded, model.num_experts, num_ranks)),
        }
        plain: dict[tuple[str, int], tuple[list[str], float]] = {}
        for placement, text in SETTINGS:
            budget = None if text == NONE else ExpertBudget.parse(f"{text},scope=request")
            if budget is not None and budget.is_void(model.num_experts, num_ranks):
                continue
            for task in tasks_of(bench, num_ranks, placement, text):
                size = task.family, len(task.prompts)
                if size not in plain:
                    plain[size] = _answer(bench, task, places["contiguous"], None)
                before, visits_before = plain[size]
                is_plain = (placement, text) == ("contiguous", NONE)
                texts, visits = plain[size] if is_plain else _answer(bench, task, places[placement], budget)
                pairs = paired_matches(before, texts, task.answers)
                rows.append(
                    {
                        "ranks": num_ranks,
                        "placement": placement,
                        "budget": text,
                        "task": task.family,
                        "payload_bytes_per_token": visits * 2 * model.hidden_size * HIDDEN_ITEMSIZE,
                        "ranks_visited_per_token": visits,
                        "saved": 1 - visits / visits_before,
                        "pairs": pairs.num_pairs,
                        "points_lost": 100 * pairs.loss,
                        "lost_low_95": 100 * pairs.interval[0],
                        "lost_high_95": 100 * pairs.interval[1],
                    }
                )
                print(rows[-1], file=sys.stderr)
    return Measurement(rows, targets(rows), "float32 rows, bfloat16 payload", 1)


def tasks_of(bench: Bench, num_ranks: int, placement: str, text: str) -> list[Task]:
    """Return the questions of a setting: all of them where quality is held to a target."""
    is_target = num_ranks == MEASURED_RANKS and (placement, text) in (("affine", LIMITED), ("affine", BOTH))
    most = NUM_PAIRS if is_target else NUM_COUNTED
    return [Task(task.family, task.prompts[:most], task.answers[:most]) for task in bench.tasks]


def _answer(bench: Bench, task: Task, homes: Homes, budget: ExpertBudget | None) -> tuple[list[str], float]:
    """Return the answers, and the other ranks that rows visit per output token, all layers."""
    texts, counts = answer(bench, task, homes, budget)
    return texts, counts.visits_per_token


def answer(bench: Bench, task: Task, homes: Homes, budget: ExpertBudget | None) -> tuple[list[str], Counts]:
    """Return the answers, and the counts of all homes, which requests take in turns."""
    num_homes = len(homes.layers)
    texts = [""] * len(task.prompts)
    counts = Counts()
    for home, layers in enumerate(homes.layers):
        mine = range(home, len(task.prompts), num_homes)
        ranks = CountedRanks(bench.runner, layers)
        ranks.budget = budget
        config = with_drafts(bench.config, DRAFT_LEN, None)
        answers = greedy_answers(config, ranks, [task.prompts[index] for index in mine], MAX_TOKENS)
        for index, ids in zip(mine, answers.token_ids, strict=True):
            texts[index] = bench.tokenizer.decode(ids)
        counts.steps += ranks.counts.steps
    return texts, counts


def targets(rows: Sequence[Row]) -> list[Target]:
    """Compare the limited rows at 8 ranks with contiguous experts and no budget."""
    found = []
    for text in (LIMITED, BOTH):
        mine = [r for r in rows if (r["ranks"], r["placement"], r["budget"]) == (MEASURED_RANKS, "affine", text)]
        found += [
            Target(
                f"affine, {text}: payload saved at 8 ranks, worst task",
                min(float(row["saved"]) for row in mine),  # type: ignore[arg-type]
                REQUIRED_SAVING,
            ),
            Target(
                f"affine, {text}: points of exact match lost, worst task",
                max(float(row["points_lost"]) for row in mine),  # type: ignore[arg-type]
                at_most=MOST_LOST,
            ),
        ]
    return found


if __name__ == "__main__":
    sys.exit(run("budget_traffic", measure))
