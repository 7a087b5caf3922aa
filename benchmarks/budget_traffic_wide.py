"""Bytes between 2 to 64 ranks: the counts of `benchmarks/budget_traffic` on a model of 128 experts, eight a token.

The model is the one that `python -m penstock.benchmarks.train_wide` trains first: the demo model's recipe and data, but
a fraction of its training, so many of its answers are wrong. Its routing is a trained model's; what budgets do to its
answers is told by the share that they leave as they were, which says nothing of another model. Counts are exact, at
draft length 7: rows sent to other ranks times two hidden states in bfloat16, over the tokens of steps after the prompt.
Homes are at most eight ranks, spread evenly.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..router.affine import affine
from ..router.expert_budget import ExpertBudget
from ..router.placement import contiguous
from .budget import NONE, Bench, Task
from .budget_traffic import HIDDEN_ITEMSIZE, Homes, answer, trace
from .harness import Measurement, Options, Row, Target, run
from .train_wide import MODEL

RANKS = (2, 4, 8, 16, 32, 64)
QUICK_RANKS = (64,)
NUM_QUESTIONS = 24
"""Of each task."""
QUICK_QUESTIONS = 2
NUM_TRACED = 48
"""Records of each task whose routing the affine placement is made from."""
QUICK_TRACED = 4
MOST_HOMES = 8
EXPERTS = "experts=48"
"""The share of the experts that the demo model's served budget keeps."""
SETTINGS = (
    ("contiguous", NONE),
    ("affine", NONE),
    ("affine", EXPERTS),
    ("contiguous", "max_ranks_per_row=4"),
    ("affine", "max_ranks_per_row=4"),
    ("affine", "max_ranks_per_row=2"),
    ("affine", f"{EXPERTS},max_ranks_per_row=4"),
)
REQUIRED_SAVING = 0.25


def measure(options: Options) -> Measurement:
    """Count every setting at every number of ranks."""
    if not MODEL.is_dir():
        raise ValueError(f"there is no {MODEL}; `python -m penstock.benchmarks.train_wide` makes it")
    torch.set_num_threads(1)
    bench = Bench(options.seed, QUICK_QUESTIONS if options.quick else NUM_QUESTIONS, 1, MODEL)
    recorded = trace(bench, QUICK_TRACED if options.quick else NUM_TRACED)
    model = bench.runner.info.model
    rows: list[Row] = []
    for num_ranks in QUICK_RANKS if options.quick else RANKS:
        places = {
            "contiguous": spread(Homes.of(contiguous(model.num_moe_layers, model.num_experts, num_ranks))),
            "affine": spread(Homes.of(affine(recorded, model.num_experts, num_ranks))),
        }
        for task in bench.tasks:
            rows += _rows(bench, task, num_ranks, places)
    return Measurement(rows, targets(rows), "float32 rows, bfloat16 payload", 1)


def spread(homes: Homes) -> Homes:
    """Return at most `MOST_HOMES` of them, evenly."""
    return replace(homes, layers=homes.layers[:: max(1, len(homes.layers) // MOST_HOMES)])


def _rows(bench: Bench, task: Task, num_ranks: int, places: dict[str, Homes]) -> list[Row]:
    model = bench.runner.info.model
    rows: list[Row] = []
    before: list[str] = []
    for placement, text in SETTINGS:
        budget = None if text == NONE else ExpertBudget.parse(f"{text},scope=request")
        if budget is not None and budget.is_void(model.num_experts, num_ranks):
            continue
        texts, counts = answer(bench, task, places[placement], budget)
        before = before or texts
        payload = counts.visits_per_token * 2 * model.hidden_size * HIDDEN_ITEMSIZE
        rows.append(
            {
                "ranks": num_ranks,
                "placement": placement,
                "budget": text,
                "task": task.family,
                "payload_bytes_per_token": payload,
                "ranks_visited_per_token": counts.visits_per_token,
                "saved": 1 - payload / float(rows[0]["payload_bytes_per_token"]) if rows else 0.0,  # type: ignore[arg-type]
                "experts_per_layer": counts.experts_per_layer,
                "tokens_per_step": counts.num_tokens / len(counts.steps),
                "answers": len(texts),
                "same_answers": sum(map(str.__eq__, texts, before)) / len(texts),
                "right_without_budget": sum(map(str.__eq__, before, task.answers)) / len(texts),
            }
        )
        print(rows[-1], file=sys.stderr)
    return rows


def targets(rows: Sequence[Row]) -> list[Target]:
    """Compare a limit of four ranks with contiguous experts and no budget, at 64 ranks."""
    mine = [r for r in rows if (r["ranks"], r["placement"], r["budget"]) == (64, "affine", "max_ranks_per_row=4")]
    worst = min(float(row["saved"]) for row in mine)  # type: ignore[arg-type]
    return [Target("affine, max_ranks_per_row=4: payload saved at 64 ranks, worst task", worst, REQUIRED_SAVING)]


if __name__ == "__main__":
    sys.exit(run("budget_traffic_wide", measure))
