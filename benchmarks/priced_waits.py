"""The default policy by a priced clock, where a step that is planned after the one before makes ranks wait.

What `benchmarks/draft_or_send` measures on one machine, here for any ratio of that wait to a step, and repeatable to
the last digit: the demo model's own tokens, routing and drafts, the engine's own scheduler, drafters and controllers,
and the clock of `benchmarks/speculation`, to which every step adds a share of a plain step of one row: ``wait`` where
it was planned after the one before, `RESIDUE` of that where it was sent while that one ran. `shadow` and no
speculation, each with steps sent ahead and without; one rank; requests of about `LENGTH` tokens of each family.

``ahead``: the share of steps that were sent while another ran. Rates are tokens per second, prompts' steps included.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..demo.records import FAMILIES
from .harness import Measurement, Options, Row, Target, run
from .policy_run import PolicyRun, make_engine, serve
from .sent_ranks import SentRanks, Waits
from .speculation import Bench, Cell

SHARES = (0.03, 0.1, 0.2, 0.4)
"""Of a plain step's time, that ranks wait for a step which is planned after the one before."""
RESIDUE = 0.15
"""What is left of that where they have it already."""
BATCHES = (1, 4)
LENGTH = 256
NUM_TOKENS = {1: 3072, 4: 6144}
QUICK_SHARES = (0.1,)
QUICK_BATCHES = (1,)
QUICK_TOKENS = {1: 768}
POLICIES = ("off", "shadow")
NO_LOSS = 0.98


def measure(options: Options) -> Measurement:
    """Serve all families under both policies, at every wait."""
    torch.set_num_threads(1)
    bench = Bench("suffix", options.seed, QUICK_TOKENS if options.quick else NUM_TOKENS)
    batches = QUICK_BATCHES if options.quick else BATCHES
    cells = [Cell(family, LENGTH, batch, 1) for family, batch in itertools.product(FAMILIES, batches)]
    bench.prepare_all(cells)
    rows = list(_rows(bench, cells, QUICK_SHARES if options.quick else SHARES))
    targets = [
        Target(f"shadow over {what}, worst setting", min(float(row[name]) for row in rows), NO_LOSS)  # type: ignore[arg-type]
        for what, name in (
            ("no speculation, both with steps sent ahead", "over_off"),
            ("shadow without steps sent ahead", "over_shadow_after"),
        )
    ]
    num_altered = float(sum(row["altered"] for row in rows))  # type: ignore[misc]
    targets.append(Target("outputs that differ", num_altered, at_most=0))
    return Measurement(rows, targets, "float32 rows, bfloat16 prices", 1)


def _rows(bench: Bench, cells: list[Cell], shares: tuple[float, ...]) -> Iterator[Row]:
    for share, cell in itertools.product(shares, cells):
        runs = {
            (policy, ahead): _run(bench, policy, cell, share, ahead) for policy in POLICIES for ahead in (False, True)
        }
        shadow, num_ahead = runs["shadow", True]
        off_after, off = runs["off", False][0], runs["off", True][0]
        yield {
            "wait": share,
            "family": cell.workload,
            "batch": cell.batch,
            "ahead": num_ahead / shadow.num_steps,
            "over_off": shadow.tokens_per_s / off.tokens_per_s,
            "over_shadow_after": shadow.tokens_per_s / runs["shadow", False][0].tokens_per_s,
            "off_over_off_after": off.tokens_per_s / off_after.tokens_per_s,
            "drafted": shadow.num_drafted,
            "accepted": shadow.num_accepted,
            "altered": sum(found.outputs != off_after.outputs for found, _ in runs.values()),
        }


def _run(bench: Bench, policy: str, cell: Cell, share: float, ahead: bool) -> tuple[PolicyRun, int]:
    """Return what became of the requests, and how many steps were sent ahead."""
    after_s = share * bench.plain_step_s
    jobs = bench.jobs(cell)
    ranks = SentRanks(bench.computer, bench.info, 1, bench.times, Waits(after_s, RESIDUE * after_s))
    ranks.jobs = list(jobs)
    engine = make_engine(policy, replace(bench.config, async_scheduling=ahead), ranks, ranks.clock)
    return serve(engine, jobs, cell.batch), ranks.num_ahead


if __name__ == "__main__":
    sys.exit(run("priced_waits", measure))
