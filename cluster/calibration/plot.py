"""Quality over experts read, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .profile import CalibratedBudget


def check_plotting() -> None:
    """Raise ``ValueError`` naming ``plot`` unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("plot: matplotlib is not installed; `pip install matplotlib`, or leave plot out")


def plot_profile(entries: Sequence[CalibratedBudget], file: Path) -> None:
    """Draw what each budget loses over the share of experts that it still reads; at least one entry."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for entry in entries:
        read = 100 * (1 - entry.experts_saved)
        if entry.exact_match_loss is not None and entry.exact_match_loss_interval is not None:
            low, high = (100 * bound for bound in entry.exact_match_loss_interval)
            upper.vlines(read, low, high, color="tab:blue")
            upper.plot(read, 100 * entry.exact_match_loss, "o", color="tab:blue")
        upper.plot(read, 100 * (1 - entry.next_token_agreement), "x", color="tab:orange")
        lower.plot(read, 100 * entry.perplexity_increase, "o", color="tab:green")
        lower.annotate(
            f" {entry.parsed}", (read, 100 * entry.perplexity_increase), fontsize=6, rotation=90, ha="center"
        )
    lower.margins(y=0.8)  # names stand above their points
    upper.set_ylabel("points of exact match lost (95 % CI)\nx: % of next tokens changed")
    lower.set_ylabel("perplexity increase, %")
    lower.set_xlabel("distinct experts of a verification, % of those without a budget")
    measured = entries[0].conditions
    figure.suptitle(
        f"{measured.num_records} records of {measured.data}, draft length {measured.draft_len}, {measured.dtype}"
    )
    figure.savefig(file, dpi=120)
