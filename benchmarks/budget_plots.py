"""The plots of docs/budgets.md: quality over experts saved, and bytes between ranks.

``python -m penstock.benchmarks.budget_plots`` reads results/budget.json and results/budget_traffic.json and writes PNG
into docs/images/.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from ..router.expert_budget import ExpertBudget
from .budget import TASKS
from .budget_traffic import BOTH, LIMITED, NONE
from .harness import Row

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
BARS = (("contiguous", NONE), ("affine", NONE), ("contiguous", LIMITED), ("affine", LIMITED), ("affine", BOTH))


def draw_quality(rows: Sequence[Row], target: Path) -> None:
    """Points of exact match lost over distinct experts saved, a line for each way to choose; one plot a task."""
    figure, axes = pyplot.subplots(1, len(TASKS), figsize=(11, 4.5), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        lines: dict[str, list[Row]] = {}
        for row in rows:
            if (row["task"], row["batch"]) == (task, 1):
                lines.setdefault(_line(str(row["budget"])), []).append(row)
        for name, points in sorted(lines.items()):
            points.sort(key=lambda row: float(row["saved"]))  # type: ignore[arg-type]
            saved = [100 * float(row["saved"]) for row in points]  # type: ignore[arg-type]
            lost = [float(row["points_lost"]) for row in points]  # type: ignore[arg-type]
            spread = [
                [found - float(row["lost_low_95"]) for found, row in zip(lost, points, strict=True)],  # type: ignore[arg-type]
                [float(row["lost_high_95"]) - found for found, row in zip(lost, points, strict=True)],  # type: ignore[arg-type]
            ]
            axis.errorbar(saved, lost, yerr=spread, marker="o", markersize=4, capsize=2, label=name)
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=-1)
        axis.set_title(task)
        axis.set_xlabel("distinct experts saved, % of all steps'")
    axes[0].set_ylabel("points of exact match lost (95 % CI)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(target, dpi=110)


def _line(text: str) -> str:
    budget = ExpertBudget.parse(text)
    size = "coverage" if budget.coverage is not None else "experts"
    first = ", first row protected" if budget.protect_first_row else ""
    return f"{size}, {budget.score}, {budget.rest}{first}"


def draw_traffic(rows: Sequence[Row], target: Path) -> None:
    """Payload per output token by number of ranks, mean of the tasks."""
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    numbers = sorted({int(row["ranks"]) for row in rows})  # type: ignore[arg-type]
    width = 0.8 / len(BARS)
    for place, (placement, budget) in enumerate(BARS):
        heights = []
        for number in numbers:
            found = [
                float(row["payload_bytes_per_token"])  # type: ignore[arg-type]
                for row in rows
                if (row["ranks"], row["placement"], row["budget"]) == (number, placement, budget)
            ]
            # A limit that changes nothing there was not run again
            heights.append(statistics.fmean(found) / 1024 if found else 0.0)
        positions = [index + (place - len(BARS) / 2 + 0.5) * width for index in range(len(numbers))]
        axis.bar(positions, heights, width, label=f"{placement}, {budget}")
    axis.set_xticks(range(len(numbers)), [str(number) for number in numbers])
    axis.set_xlabel("ranks")
    axis.set_ylabel("KiB between ranks per output token")
    axis.legend(fontsize=7)
    figure.savefig(target, dpi=110)


def main() -> int:
    """Draw both."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in (("budget", draw_quality), ("budget_traffic", draw_traffic)):
        rows = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        draw(rows, IMAGES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
