"""The plots of docs/speculation.md: the policies over the workloads, and one request step by step.

``python -m penstock.benchmarks.speculation_plots`` reads results/speculation.json and writes PNG into docs/images/.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot

from .harness import Row
from .policy_run import FIXED, TABLE, TracedStep, make_engine, trace
from .recorded_ranks import Job
from .speculation import BATCHES, NUM_TOKENS, Bench
from .workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results" / "speculation.json"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
TRACED = ("code", 0, 256)
"""Family, number and tokens of the request that is shown."""
SHOWN = (*(policy for policy in FIXED if policy in ("fixed 1", "fixed 3", "fixed 7")), TABLE, "cascade", "shadow")


def draw_policies(rows: Sequence[Row], target: Path) -> None:
    """Bars: each policy over no speculation, per workload and batch; mean over request lengths, one rank."""
    figure, axes = pyplot.subplots(len(BATCHES), 1, figsize=(11, 9), sharex=True, layout="constrained")
    width = 0.8 / len(SHOWN)
    for axis, batch in zip(axes, BATCHES, strict=True):
        for place, policy in enumerate(SHOWN):
            heights = [_mean(rows, policy, workload, batch) for workload in WORKLOADS]
            positions = [index + (place - len(SHOWN) / 2 + 0.5) * width for index in range(len(WORKLOADS))]
            axis.bar(positions, heights, width, label=policy, bottom=0)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel(f"batch {batch}")
        axis.set_ylim(bottom=0.4)
    axes[0].legend(ncols=len(SHOWN), loc="upper center", bbox_to_anchor=(0.5, 1.25))
    axes[-1].set_xticks(range(len(WORKLOADS)), list(WORKLOADS), rotation=15)
    figure.supylabel("tokens per second over no speculation (priced clock)")
    figure.savefig(target, dpi=110)


def _mean(rows: Sequence[Row], policy: str, workload: str, batch: int) -> float:
    return statistics.fmean(
        float(row[policy])  # type: ignore[arg-type]
        for row in rows
        if (row["workload"], row["batch"], row["ranks"]) == (workload, batch, 1)
    )


def traced(bench: Bench, policy: str, job: Job) -> list[tuple[TracedStep, float]]:
    """Return a request's steps under ``policy`` and the distinct experts of each, mean over layers."""
    ranks = bench.ranks(1, [job])
    config = replace(bench.config, max_num_batched_tokens=2048)  # the whole prompt in one step
    steps = list(trace(make_engine(policy, config, ranks, ranks.clock), job))
    counts = [statistics.fmean(layers[0]) for _, layers in ranks.steps[1:]]
    return list(zip(steps, counts, strict=False))


def draw_request(steps: dict[str, list[tuple[TracedStep, float]]], target: Path) -> None:
    """Lines: draft length, utility and distinct experts of one request, step by step, one column per policy."""
    figure, axes = pyplot.subplots(3, len(steps), figsize=(11, 7), sharex="col", sharey="row", layout="constrained")
    for column, (policy, found) in enumerate(steps.items()):
        axes[0, column].set_title(policy)
        axes[0, column].step(range(len(found)), [step.num_drafted for step, _ in found], where="mid")
        axes[1, column].plot([step.utility for step, _ in found])
        axes[1, column].axhline(1, color="black", linewidth=0.8)
        axes[2, column].plot([experts for _, experts in found])
        axes[2, column].set_xlabel("step")
    for row, name in enumerate(("drafted tokens", "utility so far", "distinct experts per layer")):
        axes[row, 0].set_ylabel(name)
    figure.savefig(target, dpi=110)


def main() -> int:
    """Draw both."""
    torch.set_num_threads(1)
    IMAGES.mkdir(exist_ok=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw_policies(found["rows"], IMAGES / "speculation_policies.png")
    bench = Bench("ngram", 0, NUM_TOKENS)
    family, number, length = TRACED
    job = bench.maker.long(family, number, length)
    draw_request(
        {policy: traced(bench, policy, job) for policy in ("cascade", "shadow")}, IMAGES / "speculation_request.png"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
