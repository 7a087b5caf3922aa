"""Speculation policies on real texts: off, every fixed length, a static table by batch, cascade and shadow.

Eight workloads, batches of 1, 4 and 16, answers and requests of 64 to 512 tokens, one and two expert-parallel ranks.
The demo model's own routing, tokens and drafts; the engine's own scheduler, drafters and controllers. The clock is
priced: exact counts of every step (rows and distinct experts per rank) at the prices that `benchmarks/step_times`
measured, results/step_times.json. It repeats exactly, and controllers see this clock and nothing else.
`benchmarks/speculation_time` measures a subset by CPU time.

Every output is compared with that of no speculation. Rates are relative to no speculation on the same requests,
prompts' steps included.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.config import EngineConfig
from ..cluster.engine.ranks import LocalRanks, make_runner
from ..cluster.speculation.drafter import DraftContext, drafter_factory
from ..cluster.speculation.output_store import OutputStore
from ..cluster.speculation.phase_machine import DISABLED, TEST
from ..workers.model_info import RankInfo
from .decode import DEMO
from .harness import Measurement, Options, Row, Target, run
from .policy_run import FIXED, POLICIES, TABLE, PolicyRun, make_engine, serve, trace
from .recorded_ranks import Job, RecordedRanks, RowComputer
from .step_times import PRICES, StepTimes
from .workloads import MIX, WORKLOADS, JobMaker

BATCHES = (1, 4, 16)
LENGTHS: tuple[int | None, ...] = (None, 64, 256, 512)
"""Tokens of a request; None: answers as long as they are."""
NUM_TOKENS = {1: 3072, 4: 6144, 16: 12288}
"""Of a workload, by batch. Answers have as many as the committed prompts give."""
RANKS = (1, 2)
QUICK_TOKENS = {1: 512, 4: 1024, 16: 2048}
QUICK_LENGTHS: tuple[int | None, ...] = (None, 128)
QUICK_RANKS = (1,)

NO_LOSS = 0.98
OVER_FIXED = 1.08
OF_TABLE = 0.98
CASCADE_NO_LOSS = 0.95
CASCADE_FROM = 256
PROBED = ("chat", 1400)
"""Family and tokens of the requests whose probing is measured: speculation does not pay there."""
NUM_PROBED = 4
LONGEST_DISABLED = 128
PROBING = 0.02


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting, served under every policy."""

    workload: str
    length: int | None
    batch: int
    num_ranks: int


class Bench:
    """Serves cells under policies, remembering rows and outputs between them."""

    def __init__(self, drafter: str, seed: int, num_tokens: dict[int, int], prices: Path = PRICES) -> None:
        self.config = EngineConfig(
            model=str(DEMO),
            dtype="float32",
            device="cpu",
            num_threads=1,
            max_num_seqs=32,
            kv_cache_bytes=16 << 20,
            drafter=drafter,
        )
        self._runner = make_runner(self.config, 0)
        self.info: RankInfo = self._runner.info
        self.computer = RowComputer(DEMO, self.info.model)
        self.times = StepTimes.load(prices)
        self.maker = JobMaker(ChatTokenizer(str(DEMO)), self.info.model.eos_token_ids, seed)
        self._num_tokens = num_tokens
        self._lengths: dict[tuple[str, int, str], int] = {}

    @property
    def plain_step_s(self) -> float:
        """The price of a step of one row on one rank."""
        top_k, layers = self.info.model.num_experts_per_tok, self.info.model.num_moe_layers
        return self.times.step_s([1], [[top_k] * layers], top_k)

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Let the engine serve ``jobs`` without speculation, and compute all rows of those texts and their drafts."""
        engine = make_engine("off", self.config, LocalRanks(self._runner), time.perf_counter)
        outputs = serve(engine, jobs, self.config.max_num_seqs).outputs
        for job in jobs:
            drafter = drafter_factory(self.config.drafter)(DraftContext(len(job.prompt)), OutputStore(0))
            self.computer.prepare(job, outputs[job.name], drafter)
            self._lengths[job.name] = len(outputs[job.name])

    def prepare_all(self, cells: Sequence[Cell]) -> None:
        """Compute what is the same in all of ``cells``; the longest request of a name holds the others."""
        longest: dict[tuple[str, int, str], Job] = {}
        for cell in sorted(cells, key=lambda cell: cell.length or 0):
            longest |= {job.name: job for job in self.jobs(cell)}
        self.prepare([job for name, job in longest.items() if name not in self._lengths])

    def ranks(self, num_ranks: int, jobs: Sequence[Job]) -> RecordedRanks:
        """Return new ranks at time 0 for these requests."""
        ranks = RecordedRanks(self.computer, self.info, num_ranks, self.times)
        ranks.jobs = list(jobs)
        return ranks

    def jobs(self, cell: Cell) -> list[Job]:
        """Return the requests of a cell."""
        return self.maker.workload(WORKLOADS[cell.workload], cell.length, self._num_tokens[cell.batch], self._tokens_of)

    def run(self, policy: str, cell: Cell, jobs: Sequence[Job], lengths: dict[int, int] | None = None) -> PolicyRun:
        """Serve ``jobs`` under one policy by the priced clock."""
        ranks = self.ranks(cell.num_ranks, jobs)
        config = replace(self.config, expert_parallel_size=cell.num_ranks)
        return serve(make_engine(policy, config, ranks, ranks.clock, lengths), jobs, cell.batch)

    def probe_share(self) -> float:
        """Return what cascade's tests add to the time of requests, from their first disabled phase of 128 steps on."""
        family, length = PROBED
        lost_s = time_s = 0.0
        jobs = [self.maker.long(family, number, length) for number in range(NUM_PROBED)]
        self.prepare(jobs)
        for job in jobs:
            ranks = self.ranks(1, [job])
            steps = list(trace(make_engine("cascade", self.config, ranks, ranks.clock), job))
            disabled = 0
            for index, step in enumerate(steps):
                disabled = disabled + 1 if step.report.phase == DISABLED else 0
                if disabled == LONGEST_DISABLED:
                    rest = steps[index + 1 :]
                    time_s += sum(s.time_s for s in rest)
                    plain_s = statistics.median(s.time_s for s in rest if not s.num_drafted)
                    lost_s += sum(s.time_s - s.num_tokens * plain_s for s in rest if s.report.phase == TEST)
                    break
        return lost_s / time_s if time_s else math.nan

    def _tokens_of(self, job: Job) -> int:
        if job.sampling.ignore_eos:
            assert job.sampling.max_tokens is not None
            return job.sampling.max_tokens
        if job.name not in self._lengths:
            self.prepare([job])
        return self._lengths[job.name]


def cells(options: Options) -> list[Cell]:
    """Return all settings, the mix first: the table is fitted on it."""
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    num_ranks = QUICK_RANKS if options.quick else RANKS
    names = [MIX, *(name for name in WORKLOADS if name != MIX)]
    return [Cell(*setting) for setting in itertools.product(names, lengths, BATCHES, num_ranks)]


def measure(options: Options) -> Measurement:
    """Serve every cell under every policy."""
    torch.set_num_threads(1)
    num_tokens = QUICK_TOKENS if options.quick else NUM_TOKENS
    bench = Bench(options.given.drafter, options.seed, num_tokens, options.given.prices)
    todo = cells(options)
    bench.prepare_all(todo)
    fixed: dict[Cell, dict[str, PolicyRun]] = {}
    for cell in todo:
        jobs = bench.jobs(cell)
        fixed[cell] = {policy: bench.run(policy, cell, jobs) for policy in ("off", *FIXED)}
        print(f"{cell}: {len(jobs)} requests, {bench.computer.num_computed} rows computed", file=sys.stderr)
    tables = {ranks: fit_table(fixed, ranks) for ranks in {cell.num_ranks for cell in todo}}
    rows = []
    num_altered = 0
    for cell in todo:
        jobs = bench.jobs(cell)
        runs = dict(fixed[cell])
        for policy in (TABLE, "cascade", "shadow"):
            runs[policy] = bench.run(policy, cell, jobs, tables[cell.num_ranks])
        num_altered += sum(run.outputs != runs["off"].outputs for run in runs.values())
        rows.append(_row(cell, len(jobs), runs) | {"table_draft_lens": str(tables[cell.num_ranks])})
        print(rows[-1], file=sys.stderr)
    found = targets(rows, num_altered)
    if not options.quick:
        share = bench.probe_share()
        found.append(Target("cascade's probing once disabled for 128 steps, of the time", share, at_most=PROBING))
    return Measurement(rows, found, "float32 rows, bfloat16 prices", 1)


def fit_table(runs: dict[Cell, dict[str, PolicyRun]], num_ranks: int) -> dict[int, int]:
    """Return per batch size the length with the best rate over the mix, all lengths of requests together."""
    table = {}
    for batch in sorted({cell.batch for cell in runs if cell.num_ranks == num_ranks}):
        mixes = [found for cell, found in runs.items() if cell == Cell(MIX, cell.length, batch, num_ranks)]
        rates = {policy: statistics.fmean(_relative(found, policy) for found in mixes) for policy in ("off", *FIXED)}
        best = max(rates, key=lambda policy: rates[policy])
        table[batch] = 0 if best == "off" else int(best.removeprefix("fixed "))
    return table


def _relative(runs: dict[str, PolicyRun], policy: str) -> float:
    return runs[policy].tokens_per_s / runs["off"].tokens_per_s


def _row(cell: Cell, num_requests: int, runs: dict[str, PolicyRun]) -> Row:
    row: Row = {
        "workload": cell.workload,
        "length": cell.length or "answers",
        "batch": cell.batch,
        "ranks": cell.num_ranks,
        "requests": num_requests,
        "tokens": runs["off"].num_tokens,
        "off_tokens_per_s": round(runs["off"].tokens_per_s, 2),
    }
    row |= {policy: round(_relative(runs, policy), 4) for policy in POLICIES if policy != "off"}
    shadow = runs["shadow"]
    row["shadow_drafted_per_step"] = round(shadow.num_drafted / shadow.num_steps, 3)
    row["shadow_acceptance"] = round(shadow.num_accepted / max(shadow.num_drafted, 1), 3)
    return row


def targets(rows: Sequence[Row], num_altered: int) -> list[Target]:
    """Compare the policies as the mission's claim does."""
    found = [
        Target("runs whose output differs from that of no speculation", num_altered, at_most=0),
        Target("shadow over no speculation, worst of all", min(_column(rows, "shadow")), NO_LOSS),
        Target(
            "shadow over the static table, worst of all",
            min(float(r["shadow"]) / float(r[TABLE]) for r in rows),  # type: ignore[arg-type]
            OF_TABLE,
        ),
    ]
    mix = [row for row in rows if row["workload"] == MIX]
    single = max(statistics.fmean(_column(mix, policy)) for policy in FIXED)
    whole = statistics.fmean(_column(mix, "shadow"))
    found.append(Target("shadow over the best single fixed length over the mix", whole / single, OVER_FIXED))
    for batch, ranks in sorted({(int(r["batch"]), int(r["ranks"])) for r in rows}):  # type: ignore[arg-type]
        mixes = [row for row in mix if (row["batch"], row["ranks"]) == (batch, ranks)]
        best = max(1.0, *(statistics.fmean(_column(mixes, policy)) for policy in FIXED))
        where = f"over the mix, batch {batch}, {ranks} ranks"
        shadow = statistics.fmean(_column(mixes, "shadow"))
        found.append(Target(f"shadow over the fixed length that is best there, {where}", shadow / best, 1.0))
        found.append(Target(f"shadow over the table {where}", shadow / statistics.fmean(_column(mixes, TABLE)), 1.0))
    long = [r for r in rows if r["batch"] == 1 and isinstance(r["length"], int) and r["length"] >= CASCADE_FROM]
    if long:
        found.append(
            Target(
                f"cascade over no speculation, batch 1, {CASCADE_FROM}+ tokens, worst of all",
                min(_column(long, "cascade")),
                CASCADE_NO_LOSS,
            )
        )
    return found


def _column(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]  # type: ignore[arg-type]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark alone takes."""
    parser.add_argument("--drafter", default="ngram", help="drafter of all policies: ngram or suffix")
    parser.add_argument("--prices", type=Path, default=PRICES, help="results of step_times whose prices are to hold")


if __name__ == "__main__":
    sys.exit(run("speculation", measure, add_options=add_options))
