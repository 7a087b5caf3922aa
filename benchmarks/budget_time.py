"""What a budget of experts does to speed, and what choosing within it costs.

``priced``: the demo model's tasks under off, fixed 3, fixed 7, cascade and shadow, each with and without the budget of
`benchmarks/budget`, and shadow with all that the model's profile lets it choose from (auto), on one rank and on two
(gloo, processes of their own); real tokens, drafts and counts, at the prices of results/step_times.json, which
controllers see as their clock. Selection costs nothing there. ``cpu``: one request at a time on the inflated
model, fixed 7, with and without the budget in turns, by the thread's CPU time; 95 % of the mean over requests, by
bootstrap. ``selection``: the same step of eight rows on the inflated model without a budget and under one that allows
every expert, so that nothing is saved, in turns; scope global on one rank lacks the all-reduce, so two ranks of the
small model show what that adds, in CPU time of the busier rank.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import torch

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.calibration.gate import check_budget_profile
from ..cluster.config import AUTO_BUDGET, EngineConfig
from ..cluster.engine.ranks import LocalRanks, Ranks, make_runner
from ..cluster.transport.process_ranks import ProcessRanks
from ..demo import prompts
from ..demo.records import Family, generate
from ..router.expert_budget import SCOPES, ExpertBudget
from ..workers.plan import RankPlan, StepPlan
from ..workers.runner import ModelRunner
from ..workers.sampling_params import SamplingParams
from .budget import EVEN, RECOMMENDED, SEED_OFFSET
from .decode import DEMO
from .harness import Measurement, Options, Row, Target, quantile, run
from .inflated import inflated_runner
from .policy_run import PolicyRun, make_engine, serve
from .priced_ranks import PricedRanks
from .recorded_ranks import Job
from .step_times import StepTimes, plan_of

BUDGETS = {1: f"{RECOMMENDED},scope=request", 2: f"{EVEN},scope=request"}
"""By number of ranks."""
TASKS: tuple[Family, ...] = ("math", "extraction")
POLICIES = ("off", "fixed 3", "fixed 7", "cascade", "shadow")
TOKENS = {"math": 48, "extraction": 64, "code": 8, "chat": 24}
"""Requests of each family."""
QUICK_SHARE = 8
MAX_TOKENS = 192
CPU_REQUESTS = 12
QUICK_CPU_REQUESTS = 3
STEPS = 60
QUICK_STEPS = 12
ROWS = 8
RESAMPLES = 2000
REQUIRED_SPEEDUP = 1.15
MOST_SELECTION = 0.03


def jobs(tokenizer: ChatTokenizer, family: Family, number: int, seed: int) -> list[Job]:
    """Return the first questions of a family, answered greedily until the model ends them."""
    if family in TASKS:
        records = list(islice(generate(family, "held_out", SEED_OFFSET + seed), number))
    else:
        records = prompts.load(family)[:number]
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    return [
        Job((family, place, "answer"), tuple(tokenizer.encode_chat(record.chat())), sampling)
        for place, record in enumerate(records)
    ]


def measure(options: Options) -> Measurement:
    """Price policies, time the budget, time the selection."""
    torch.set_num_threads(1)
    tokenizer = ChatTokenizer(str(DEMO))
    numbers = {name: max(2, n // (QUICK_SHARE if options.quick else 1)) for name, n in TOKENS.items()}
    work = {family: jobs(tokenizer, family, number, options.seed) for family, number in numbers.items()}  # type: ignore[arg-type]
    rows = _priced(work)
    config, runner = inflated_runner()
    num_requests = QUICK_CPU_REQUESTS if options.quick else CPU_REQUESTS
    rows += [_cpu(config, runner, family, work[family][:num_requests], options.seed) for family in TASKS]
    steps = QUICK_STEPS if options.quick else STEPS
    rows += [_selection(runner, scope, steps) for scope in SCOPES]
    rows.append(_all_reduce(steps))
    return Measurement(rows, targets(rows), "float32 priced, bfloat16 timed", 1)


def _small(num_ranks: int) -> EngineConfig:
    return EngineConfig(
        model=str(DEMO),
        dtype="float32",
        device="cpu",
        num_threads=1,
        max_num_seqs=8,
        kv_cache_bytes=16 << 20,
        expert_parallel_size=num_ranks,
    )


def _priced(work: dict[str, list[Job]]) -> list[Row]:
    rows: list[Row] = []
    times = StepTimes.load()
    for num_ranks in BUDGETS:
        config = _small(num_ranks)
        ranks: Ranks = LocalRanks(make_runner(config, 0)) if num_ranks == 1 else ProcessRanks(config)
        try:
            for family, wanted in work.items():
                runs = {
                    (policy, budget): _serve_priced(config, ranks, times, wanted, policy, budget)
                    for policy in POLICIES
                    for budget in (None, BUDGETS[num_ranks], AUTO_BUDGET)
                    if (policy != "off" or budget is None) and (policy == "shadow" or budget != AUTO_BUDGET)
                }
                rows += [_priced_row(family, num_ranks, *setting, runs) for setting in runs]
                print(rows[-1], file=sys.stderr)
        finally:
            ranks.close()
    return rows


def _serve_priced(
    config: EngineConfig, ranks: Ranks, times: StepTimes, wanted: Sequence[Job], policy: str, budget: str | None
) -> PolicyRun:
    priced = PricedRanks(ranks, times)
    served = check_budget_profile(replace(config, expert_budget=budget))
    return serve(make_engine(policy, served.config, priced, priced.clock, budgets=served.known), wanted, 1)


def _priced_row(
    family: str, num_ranks: int, policy: str, budget: str | None, runs: dict[tuple[str, str | None], PolicyRun]
) -> Row:
    mine, plain = runs[policy, budget], runs["off", None]
    return {
        "part": "priced",
        "family": family,
        "ranks": num_ranks,
        "policy": policy,
        "budget": budget or "none",
        "tokens_per_s": mine.tokens_per_s,
        "over_off": mine.tokens_per_s / plain.tokens_per_s,
        "over_no_budget": mine.tokens_per_s / runs[policy, None].tokens_per_s,
        "drafted_per_step": mine.num_drafted / mine.num_steps,
        "acceptance": mine.num_accepted / max(1, mine.num_drafted),
        "budgeted_steps_share": mine.num_budgeted_steps / mine.num_steps,
    }


def _cpu(config: EngineConfig, runner: ModelRunner, family: str, wanted: Sequence[Job], seed: int) -> Row:
    engines = {
        budget: make_engine("fixed 7", replace(config, expert_budget=budget), LocalRanks(runner), time.thread_time)
        for budget in (None, BUDGETS[1])
    }
    ratios = []
    for job in wanted:
        plain, budgeted = serve(engines[None], [job], 1), serve(engines[BUDGETS[1]], [job], 1)
        ratios.append(budgeted.tokens_per_s / plain.tokens_per_s)
    rng = random.Random(seed)
    means = [statistics.fmean(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)]
    return {
        "part": "cpu",
        "family": family,
        "ranks": 1,
        "policy": "fixed 7",
        "budget": BUDGETS[1],
        "over_no_budget": statistics.fmean(ratios),
        "low_95": quantile(means, 0.025),
        "high_95": quantile(means, 0.975),
        "requests": len(ratios),
    }


def _verification(step_id: int, budget: ExpertBudget | None) -> RankPlan:
    plan = plan_of(ROWS, step_id)
    requests = [replace(request, first_budgeted_row=0 if budget else None) for request in plan.requests]
    return replace(plan, requests=requests, budget=budget)


def _in_turns(
    step_s: Callable[[int, ExpertBudget | None], float], budget: ExpertBudget, num: int
) -> tuple[float, float]:
    """Return the median times (without, under ``budget``) of a step; the first of each warms up."""
    times: dict[ExpertBudget | None, list[float]] = {None: [], budget: []}
    for number in range(num + 1):
        for place, kind in enumerate(times):
            times[kind].append(step_s(2 * number + place, kind))
    return statistics.median(times[None][1:]), statistics.median(times[budget][1:])


def _selection(runner: ModelRunner, scope: str, num_steps: int) -> Row:
    def step_s(step_id: int, budget: ExpertBudget | None) -> float:
        plan = _verification(step_id, budget)
        started = time.thread_time()
        runner.step(plan)
        return time.thread_time() - started

    plain_s, budget_s = _in_turns(step_s, ExpertBudget(experts=runner.info.model.num_experts, scope=scope), num_steps)
    return {
        "part": "selection",
        "scope": scope,
        "ranks": 1,
        "step_ms": 1e3 * plain_s,
        "added_ms": 1e3 * (budget_s - plain_s),
        "added_share": budget_s / plain_s - 1,
    }


def _all_reduce(num_steps: int) -> Row:
    """Time scope global on two ranks of the small model, beside no budget."""
    config = _small(2)
    ranks = ProcessRanks(config)
    try:
        # An engine would refuse to send what changes nothing
        def step_s(step_id: int, budget: ExpertBudget | None) -> float:
            plans = [_verification(step_id, budget) for _ in range(2)]
            result = ranks.step(StepPlan(0, step_id, plans))
            return max(rank.thread_time_s for rank in result.ranks)

        num_experts = ranks.infos[0].model.num_experts
        plain_s, budget_s = _in_turns(step_s, ExpertBudget(experts=num_experts, scope="global"), num_steps)
    finally:
        ranks.close()
    return {
        "part": "selection",
        "scope": "global",
        "ranks": 2,
        "step_ms": 1e3 * plain_s,
        "added_ms": 1e3 * (budget_s - plain_s),
    }


def targets(rows: Sequence[Row]) -> list[Target]:
    """Compare with what a budget must bring, and what it may cost."""
    fixed = [
        float(row["over_no_budget"])  # type: ignore[arg-type]
        for row in rows
        if (row["part"], row.get("policy")) == ("priced", "fixed 7")
        and row["budget"] in BUDGETS.values()
        and row["family"] in TASKS
    ]
    cpu = [float(row["over_no_budget"]) for row in rows if row["part"] == "cpu"]  # type: ignore[arg-type]
    source = next(row for row in rows if (row["part"], row.get("scope")) == ("selection", "source"))
    return [
        Target(
            "fixed 7 with a budget over without, priced, worst task and number of ranks", min(fixed), REQUIRED_SPEEDUP
        ),
        Target("fixed 7 with a budget over without, CPU time, worst task", min(cpu), REQUIRED_SPEEDUP),
        Target(
            "selection at scope source, share of a step of eight rows",
            float(source["added_share"]),  # type: ignore[arg-type]
            at_most=MOST_SELECTION,
        ),
    ]


if __name__ == "__main__":
    sys.exit(run("budget_time", measure))
