"""Speculation policies by CPU time: the demo model with a real model's experts, one thread, one request at a time.

The subset of `benchmarks/speculation` whose time is measured and not priced: the engine's own step, drafting, control
and acceptance included, by the thread's CPU time, which is also the clock that the controllers see. Every request is
served without speculation and under a policy one after the other, so both meet the same machine; policies keep what
they learned from one request to the next. Intervals: 95 % of the mean over requests, by bootstrap. ``altered``:
requests whose output differs from that without speculation, which bfloat16 does not promise against.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.engine.engine import Engine
from ..cluster.engine.ranks import LocalRanks
from ..demo.records import FAMILIES
from .decode import DEMO
from .harness import Measurement, Options, Row, Target, quantile, run
from .inflated import inflated_runner
from .policy_run import PolicyRun, make_engine, serve
from .recorded_ranks import Job
from .workloads import JobMaker

POLICIES = ("fixed 3", "fixed 7", "cascade", "shadow")
NUM_REQUESTS = 6
LENGTH = 128
QUICK_REQUESTS = 2
QUICK_LENGTH = 48
NO_LOSS = 0.95
RESAMPLES = 2000


def measure(options: Options) -> Measurement:
    """Serve every family's requests under every policy, each beside no speculation."""
    torch.set_num_threads(1)
    num_requests, length = (QUICK_REQUESTS, QUICK_LENGTH) if options.quick else (NUM_REQUESTS, LENGTH)
    config, runner = inflated_runner()
    ranks = LocalRanks(runner)
    maker = JobMaker(ChatTokenizer(str(DEMO)), ranks.infos[0].model.eos_token_ids, options.seed)
    engines = {policy: make_engine(policy, config, ranks, time.thread_time) for policy in ("off", *POLICIES)}
    pairs: dict[tuple[str, str], list[tuple[PolicyRun, PolicyRun]]] = {}
    for number in range(num_requests):
        for family in FAMILIES:
            job = maker.long(family, number, length)
            for policy in POLICIES:
                pairs.setdefault((family, policy), []).append(_pair(engines, policy, job))
    rows = [_row(family, policy, found, options.seed) for (family, policy), found in pairs.items()]
    worst = {
        policy: min(float(row["relative"]) for row in rows if row["policy"] == policy)  # type: ignore[arg-type]
        for policy in POLICIES
    }
    return Measurement(
        rows, [Target("shadow over no speculation, worst family", worst["shadow"], NO_LOSS)], "bfloat16", 1
    )


def _pair(engines: dict[str, Engine], policy: str, job: Job) -> tuple[PolicyRun, PolicyRun]:
    return serve(engines["off"], [job], 1), serve(engines[policy], [job], 1)


def _row(family: str, policy: str, pairs: Sequence[tuple[PolicyRun, PolicyRun]], seed: int) -> Row:
    ratios = [other.tokens_per_s / plain.tokens_per_s for plain, other in pairs]
    rng = random.Random(seed)
    means = [statistics.fmean(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)]
    return {
        "family": family,
        "policy": policy,
        "requests": len(pairs),
        "off_cpu_ms_per_token": 1e3 * statistics.median(plain.time_s / plain.num_tokens for plain, _ in pairs),
        "relative": statistics.fmean(ratios),
        "low_95": quantile(means, 0.025),
        "high_95": quantile(means, 0.975),
        "drafted": sum(other.num_drafted for _, other in pairs),
        "accepted": sum(other.num_accepted for _, other in pairs),
        "altered": sum(plain.outputs != other.outputs for plain, other in pairs),
    }


if __name__ == "__main__":
    sys.exit(run("speculation_time", measure))
