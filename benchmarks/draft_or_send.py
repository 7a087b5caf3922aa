"""The default policy over ranks that can be sent a step while another runs: when it sends, when it waits to draft.

The demo model on one rank in a process of its own, and its twin with experts 16 times as wide, whose steps take as long
as a larger model's; one request at a time, of each of the families of text. Four engines take turns over the same rank:
`shadow` and no speculation, each with steps sent ahead and with every step planned after the one before. ``ahead``:
the share of its steps that were sent while another ran. ``relative``: tokens per second by the clock over those of the
same policy without, the median over requests.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.config import EngineConfig
from ..demo.inflate import inflate
from ..demo.records import FAMILIES
from .ahead_ranks import AheadRanks
from .decode import DEMO
from .harness import Measurement, Options, Row, Target, run
from .policy_run import PolicyRun, make_engine, serve
from .workloads import JobMaker

FACTOR = 16
NUM_REQUESTS = 16
LENGTH = 128
POLICIES = ("off", "shadow")
NO_LOSS = 0.97


def measure(options: Options) -> Measurement:
    """Serve all families' requests through the four engines, over both models."""
    num_requests = 3 if options.quick else NUM_REQUESTS
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide"
        inflate(DEMO, wide, FACTOR)
        return compared({"demo": DEMO, f"demo, experts x{FACTOR}": wide}, num_requests, LENGTH, options.seed)


def compared(models: Mapping[str, Path], num_requests: int, length: int, seed: int) -> Measurement:
    """Serve ``num_requests`` of ``length`` tokens of each family through the four engines, over each of ``models``."""
    rows: list[Row] = []
    for name, model in models.items():
        config = EngineConfig(model=str(model), num_threads=1, max_model_len=1024, kv_cache_bytes=64 << 20)
        with closing(AheadRanks(config)) as ranks:
            jobs = JobMaker(ChatTokenizer(str(DEMO)), ranks.infos[0].model.eos_token_ids, seed)
            rows += _rows(name, config, ranks, _Work(jobs, num_requests, length))
    targets = [
        Target(
            f"{row['model']}, {row['family']}: shadow with steps sent ahead over shadow without",
            float(row["relative"]),  # type: ignore[arg-type]
            NO_LOSS,
        )
        for row in rows
        if row["policy"] == "shadow"
    ]
    return Measurement(rows, targets, "float32", 1)


@dataclass(frozen=True, slots=True)
class _Work:
    jobs: JobMaker
    num_requests: int
    length: int


def _rows(name: str, config: EngineConfig, ranks: AheadRanks, work: _Work) -> Iterator[Row]:
    engines = {
        (policy, ahead): make_engine(policy, replace(config, async_scheduling=ahead), ranks, time.perf_counter)
        for policy in POLICIES
        for ahead in (False, True)
    }
    runs: dict[tuple[str, str, bool], list[tuple[PolicyRun, float]]] = {}
    for number in range(work.num_requests):
        for family in FAMILIES:
            job = work.jobs.long(family, number, work.length)
            # Whoever comes later meets another machine, so all do
            for (policy, ahead), engine in list(engines.items())[:: 1 if number % 2 else -1]:
                before = ranks.num_steps, ranks.num_ahead
                found = serve(engine, [job], 1)
                share = (ranks.num_ahead - before[1]) / (ranks.num_steps - before[0])
                runs.setdefault((family, policy, ahead), []).append((found, share))
    for family in FAMILIES:
        plain = runs[family, "off", False]
        for policy in POLICIES:
            without, with_it = runs[family, policy, False], runs[family, policy, True]
            yield {
                "model": name,
                "family": family,
                "policy": policy,
                "requests": len(with_it),
                "ahead": statistics.fmean(share for _, share in with_it),
                "relative": _ratio(with_it, without),
                "over_no_speculation": _ratio(with_it, runs[family, "off", True]),
                "over_neither": _ratio(with_it, plain),
                "drafted": sum(found.num_drafted for found, _ in with_it),
                "drafted_without": sum(found.num_drafted for found, _ in without),
                "accepted": sum(found.num_accepted for found, _ in with_it),
                "accepted_without": sum(found.num_accepted for found, _ in without),
                "altered": sum(
                    one.outputs != other.outputs for (one, _), (other, _) in zip(with_it, plain, strict=True)
                ),
            }


def _ratio(runs: list[tuple[PolicyRun, float]], others: list[tuple[PolicyRun, float]]) -> float:
    return statistics.median(
        one.tokens_per_s / other.tokens_per_s for (one, _), (other, _) in zip(runs, others, strict=True)
    )


if __name__ == "__main__":
    sys.exit(run("draft_or_send", measure))
