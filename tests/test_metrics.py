from __future__ import annotations

from dataclasses import replace
from itertools import count

from prometheus_client.parser import text_string_to_metric_families

from penstock.cluster.api.metric import PREFIX
from penstock.cluster.api.metrics import engine_samples, parse_samples, render
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.balance import Balance
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.events import FINISHED, REBALANCE, Event, EventLog
from penstock.cluster.engine.layer_totals import COUNTS
from penstock.cluster.engine.output import LENGTH, STOP, EngineStats
from penstock.cluster.engine.scheduler import Scheduler
from penstock.cluster.engine.stats import Counters
from penstock.cluster.speculation.controller import PHASES
from penstock.cluster.speculation.options import AUTO, SpeculationOptions
from penstock.router.expert_budget import ExpertBudget
from penstock.workers.plan import LayerCounts, RankPlan, RankResult, StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

from .scripted_ranks import ScriptedRanks

VLLM_NAMES = """
e2e_request_latency_seconds generation_tokens inter_token_latency_seconds kv_cache_usage_perc num_preemptions
num_requests_running num_requests_waiting prompt_tokens request_decode_time_seconds request_prefill_time_seconds
request_queue_time_seconds request_success spec_decode_num_accepted_tokens spec_decode_num_accepted_tokens_per_pos
spec_decode_num_draft_tokens spec_decode_num_drafts time_per_output_token_seconds time_to_first_token_seconds
"""
OFF = SpeculationOptions("off")


def served(num_requests: int) -> EngineStats:
    """Totals of an engine that has served some requests and still runs one."""
    engine = Engine(EngineConfig(model="m", block_size=4), ScriptedRanks([10], 4, 40))
    for index in range(num_requests):
        engine.add_request(str(index), [4, 5, 6], SamplingParams(temperature=0, max_tokens=20))
        while engine.has_requests:
            engine.step()
    engine.add_request("live", [4] * 8, SamplingParams(temperature=0, max_tokens=20))
    engine.step()
    return replace(engine.stats(), num_requests_refused=num_requests)


def test_every_gang_is_named_and_every_metric_has_its_query() -> None:
    text = render({"one": served(2), "two": served(3)}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {f"{PREFIX}{name}" for name in VLLM_NAMES.split()} <= set(families)
    for name, family in families.items():
        assert "PromQL" in family.documentation
        assert name in family.documentation
        if name != f"{PREFIX}engine_up":
            assert {sample.labels["gang"] for sample in family.samples} <= {"one", "two"}
    assert f'{PREFIX}generation_tokens_total{{gang="one"}} 41.0' in text
    assert f'{PREFIX}generation_tokens_total{{gang="two"}} 61.0' in text
    assert f'{PREFIX}time_to_first_token_seconds_bucket{{gang="two",le="+Inf"}} 4.0' in text
    assert f'{PREFIX}time_to_first_token_seconds_count{{gang="two"}} 4.0' in text


def test_a_client_sees_all_gangs_as_one() -> None:
    gangs = {"one": served(2), "two": served(3)}
    samples = engine_samples(gangs)
    assert parse_samples(render(gangs).decode()) == samples
    assert samples[f'{PREFIX}request_success_total{{finished_reason="length"}}'] == 5
    assert samples[f"{PREFIX}request_queue_full_total"] == 5
    assert samples[f"{PREFIX}e2e_request_latency_seconds_count"] == 5
    assert samples[f"{PREFIX}num_requests_running"] == 2
    assert samples[f"{PREFIX}prompt_tokens_total"] == 5 * 3 + 2 * 8
    assert samples[f"{PREFIX}kv_cache_usage_perc"] == gangs["one"].num_kv_blocks_used / 10 > 0, "a mean, not a sum"
    assert samples[f"{PREFIX}engine_up"] == 1


def test_gangs_add_up_their_draft_lengths_utilities_and_phases() -> None:
    def speculating(policy: str, num_live: int) -> Engine:
        ticks = count()
        config = EngineConfig(model="m", block_size=4, speculation=policy)
        engine = Engine(config, ScriptedRanks([20], 4, 64), clock=lambda: float(next(ticks)))
        sampling = SamplingParams(temperature=0, max_tokens=40)
        engine.add_request("done", [4, 7, 5], sampling)
        while engine.has_requests:
            engine.step()
        for index in range(num_live):
            engine.add_request(str(index), [4, 7, 5], sampling, OFF if index == 0 else AUTO)
        for _ in range(3):
            engine.step()
        return engine

    gangs = {"one": speculating("cascade", 3).stats(), "two": speculating("fixed", 2).stats()}
    samples = engine_samples(gangs)
    phases = {
        name.split('"')[1]: value
        for name, value in samples.items()
        if name.startswith(f"{PREFIX}spec_decode_phase{{") and value
    }
    assert phases == {"off": 2, "fixed": 1, "baseline": 2}
    assert samples[f"{PREFIX}spec_decode_utility_count"] == 1, "a fixed length is not measured"
    assert samples[f"{PREFIX}spec_decode_utility_sum"] == gangs["one"].spec_decode_utility.total > 0
    drafted = sum(stats.spec_decode_num_draft_tokens for stats in gangs.values())
    assert samples[f"{PREFIX}spec_decode_draft_len_sum"] == drafted > 0
    for stats in gangs.values():
        lengths = stats.spec_decode_draft_len
        assert sum(lengths.counts) - lengths.counts[0] == stats.spec_decode_num_drafts
    idle = speculating("cascade", 0).stats()
    assert set(idle.spec_decode_phases) == set(PHASES)
    assert not any(idle.spec_decode_phases.values()), "a phase that nobody is in is 0, and not missing"


def test_counts_have_a_series_for_each_rank_and_for_each_layer() -> None:
    counts = [
        LayerCounts([2, 2], [4, 5], [1, 0], [80, 0], [96, 16], [2, 2], [1.5, 2.0]),
        LayerCounts([3, 3], [6, 1], [2, 3], [160, 240], [170, 250]),
    ]
    ranks = [RankResult(0, 0, rank, [], found, 0, 0, 0.0, 0.0) for rank, found in enumerate(counts)]
    budget = ExpertBudget(experts=5)
    counters = Counters(2, 2)
    for _ in range(3):
        plans = [RankPlan(0, 0, budget=budget) for _ in ranks]
        counters.add_step(StepPlan(0, 0, plans), StepResult(ranks, 0.1), 0)
    counters.add_step(StepPlan(0, 0, [RankPlan(0, 0)] * 2), StepResult(ranks[1:] * 2, 0.1), 0)
    stats = counters.snapshot(Scheduler([], 1, 1), {}, EventLog().totals())
    samples = engine_samples({"one": stats})
    found = {
        place: {
            count: [samples[f'{PREFIX}{place}_{count}_total{{{place}="{number}"}}'] for number in range(2)]
            for count in COUNTS
        }
        for place in ("rank", "layer")
    }
    assert found["rank"] == {
        "rows": [3 * 4 + 6, 4 * 6],
        "experts": [3 * 9 + 7, 4 * 7],
        "rows_sent": [3 + 5, 4 * 5],
        "payload_bytes": [3 * 80 + 400, 4 * 400],
        "wire_bytes": [3 * 112 + 420, 4 * 420],
        "budgeted_rows": [12, 0],
        "weight_kept": [10.5, 0],
    }
    assert found["layer"]["experts"] == [3 * 10 + 12, 3 * 6 + 2]
    assert found["layer"]["rows_sent"] == [3 * 3 + 4, 3 * 3 + 6]
    assert found["layer"]["weight_kept"] == [4.5, 6.0]
    for place in found.values():
        assert sum(place["rows_sent"]) == stats.rows_sent == 28
        assert sum(place["payload_bytes"]) == stats.payload_bytes
        assert sum(place["wire_bytes"]) == stats.wire_bytes
        assert (sum(place["budgeted_rows"]), sum(place["weight_kept"])) == (stats.budgeted_rows, stats.kept_weight)
    assert samples[f'{PREFIX}expert_budget_steps_total{{budget="experts=5"}}'] == 3
    counters.add_step(StepPlan(0, 0, [RankPlan(0, 0)] * 2), StepResult(ranks, 0.1), 0)
    assert stats.by_rank["rows"] == [18, 24], "a snapshot stays as it is"


def test_rebalances_are_counted_where_experts_may_move() -> None:
    still = served(1)
    events = EventLog([Event(REBALANCE, FINISHED, "", expert_bytes_loaded=64, num_experts_moved=2)])
    moving = replace(still, events=events.totals(), balance=Balance(7.0, 1.25))
    samples = engine_samples({"moving": moving, "still": still})
    assert samples[f'{PREFIX}rebalances_total{{what="finished"}}'] == 1
    assert samples[f"{PREFIX}rebalance_experts_total"] == 2
    assert samples[f"{PREFIX}rebalance_bytes_total"] == 64
    assert samples[f"{PREFIX}last_rebalance_age_seconds"] == 7.0
    assert samples[f"{PREFIX}expert_load_imbalance"] == 1.25
    assert samples[f"{PREFIX}expert_bytes_loaded_total"] == 0
    assert f"{PREFIX}last_rebalance_age_seconds" not in engine_samples({"still": still})


def test_without_an_engine_there_is_only_the_news_of_that() -> None:
    assert engine_samples({}) == {f"{PREFIX}engine_up": 0.0}


def test_a_request_that_its_reader_stopped_is_a_success() -> None:
    engine = Engine(EngineConfig(model="m", block_size=4), ScriptedRanks([10], 4, 40))
    for name in ("stopped", "left"):
        engine.add_request(name, [4, 5, 6], SamplingParams(temperature=0, max_tokens=20))
    engine.step()
    engine.abort("stopped", STOP)
    engine.abort("left")
    assert engine.stats().num_requests_finished == {STOP: 1, "abort": 1}
    assert sum(engine.stats().latencies["e2e_request_latency"].counts) == 1
    assert LENGTH not in engine.stats().num_requests_finished
