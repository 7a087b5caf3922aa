"""Prometheus metrics, under vLLM's names after the prefix ``penstock:``, each gang with its name as the label ``gang``.

All of them are counted by the engines, so that every server answers for all gangs and for all other servers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from ..engine.output import EngineStats
from .metric import GANG, PREFIX, Distribution, Value, by_place, counter, gauge, latency

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MEANS = tuple(
    PREFIX + name
    for name in (
        *("kv_cache_usage_perc", "decode_experts_per_layer"),
        *("last_rebalance_age_seconds", "expert_load_imbalance"),
    )
)
"""What several gangs have on average; all else they have together."""
_METRICS: tuple[Value | Distribution, ...] = (
    gauge(
        "num_requests_running",
        "Requests in steps now. PromQL: sum(penstock:num_requests_running)",
        lambda stats: stats.num_requests_running,
    ),
    gauge(
        "num_requests_waiting",
        "Requests in the queue. PromQL: sum(penstock:num_requests_waiting)",
        lambda stats: stats.num_requests_waiting,
    ),
    gauge(
        "kv_cache_usage_perc",
        "Used share of the KV blocks, all ranks together; 1 is full. PromQL: max(penstock:kv_cache_usage_perc)",
        lambda stats: stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0,
    ),
    counter(
        "num_preemptions",
        "Times a running request lost its KV to older ones, to be computed again. "
        "PromQL: sum(rate(penstock:num_preemptions_total[5m]))",
        lambda stats: stats.num_preemptions,
    ),
    counter(
        "prompt_tokens",
        "Prompt tokens computed, each once. PromQL: sum(rate(penstock:prompt_tokens_total[1m]))",
        lambda stats: stats.num_prompt_tokens,
    ),
    counter(
        "generation_tokens",
        "Tokens generated. PromQL: sum(rate(penstock:generation_tokens_total[1m]))",
        lambda stats: stats.num_generation_tokens,
    ),
    counter(
        "request_success",
        "Requests ended: stop, length, abort (the client went away), timeout or error. "
        "PromQL: sum by (finished_reason) (rate(penstock:request_success_total[5m]))",
        lambda stats: stats.num_requests_finished,
        "finished_reason",
    ),
    counter(
        "request_queue_full",
        "Requests refused because the queue was full. PromQL: sum(rate(penstock:request_queue_full_total[5m]))",
        lambda stats: stats.num_requests_refused,
    ),
    counter(
        "unknown_request_fields",
        "Fields of request bodies that were ignored because no API we know has them. "
        "PromQL: sum by (endpoint) (increase(penstock:unknown_request_fields_total[1d]))",
        lambda stats: stats.unknown_request_fields,
        "endpoint",
    ),
    latency("time_to_first_token", "Arrival of a request at its gang to its first token."),
    latency(
        "inter_token_latency",
        "Between the outputs of a request; tokens that came in one step, accepted drafts among them, are one output.",
    ),
    latency("time_per_output_token", "Mean time per token after the first, one observation a request."),
    latency("e2e_request_latency", "Arrival of a request at its gang to its last token."),
    latency("request_queue_time", "Arrival of a request at its gang to a place and blocks for it."),
    latency("request_prefill_time", "From there to its first token."),
    latency("request_decode_time", "Its first token to its last."),
    counter(
        "engine_steps", "Steps committed. PromQL: rate(penstock:engine_steps_total[1m])", lambda stats: stats.num_steps
    ),
    counter(
        "engine_failed_steps",
        "Steps discarded and planned again. PromQL: increase(penstock:engine_failed_steps_total[1h])",
        lambda stats: stats.num_failed_steps,
    ),
    counter(
        "engine_step_seconds",
        "Time spent in steps. "
        "PromQL, mean step: rate(penstock:engine_step_seconds_total[1m]) / rate(penstock:engine_steps_total[1m])",
        lambda stats: stats.step_wall_s,
    ),
    counter(
        "faults",
        "Faults by what they were: a process that died, was silent or unreachable, or a coordinator_died. "
        "PromQL: sum by (what) (increase(penstock:faults_total[1h]))",
        lambda stats: stats.events.faults,
        "what",
    ),
    counter(
        "recoveries",
        "Recoveries by what they recovered from; resubmission is an ingress that sent its requests to another "
        "coordinator. PromQL: sum by (what) (increase(penstock:recoveries_total[1h]))",
        lambda stats: stats.events.recoveries,
        "what",
    ),
    Distribution(
        "recovery_seconds",
        "From noticing a fault to going on. PromQL: "
        "histogram_quantile(0.5, sum by (le) (increase(penstock:recovery_seconds_bucket[1d])))",
        lambda stats: stats.events.recovery_s,
    ),
    counter(
        "requests_replayed",
        "Requests computed again because their KV was lost with a rank or a coordinator. "
        "PromQL: sum(increase(penstock:requests_replayed_total[1h]))",
        lambda stats: stats.events.num_requests_replayed,
    ),
    counter(
        "requests_resumed",
        "Requests that a coordinator took over in the middle of their output. "
        "PromQL: sum(increase(penstock:requests_resumed_total[1h]))",
        lambda stats: stats.num_requests_resumed,
    ),
    counter(
        "expert_bytes_loaded",
        "Bytes of experts loaded again to replace lost ranks. "
        "PromQL: sum(increase(penstock:expert_bytes_loaded_total[1h]))",
        lambda stats: stats.events.expert_bytes_loaded,
    ),
    gauge(
        "last_rebalance_age_seconds",
        "Since experts were last moved, or found to need no moving, or the start; only where they may move. "
        "PromQL: max(penstock:last_rebalance_age_seconds)",
        lambda stats: None if stats.balance is None else stats.balance.last_rebalance_age_s,
    ),
    gauge(
        "expert_load_imbalance",
        "Busiest rank's rows over the mean of all, each layer by its rows, as last counted; 1 is balanced; only where "
        "experts may move. PromQL: max(penstock:expert_load_imbalance)",
        lambda stats: None if stats.balance is None else stats.balance.imbalance,
    ),
    counter(
        "rebalances",
        "Rebalances that moved experts by what became of them: finished, timed_out or interrupted. "
        "PromQL: sum by (what) (increase(penstock:rebalances_total[1h]))",
        lambda stats: stats.events.rebalances,
        "what",
    ),
    counter(
        "rebalance_experts",
        "Experts moved between ranks. PromQL: sum(increase(penstock:rebalance_experts_total[1h]))",
        lambda stats: stats.events.num_experts_moved,
    ),
    counter(
        "rebalance_bytes",
        "Bytes of experts moved between ranks. PromQL: sum(rate(penstock:rebalance_bytes_total[5m]))",
        lambda stats: stats.events.expert_bytes_moved,
    ),
    counter(
        "spec_decode_num_drafts",
        "Drafts verified. PromQL, mean accepted length: 1 + sum(rate("
        "penstock:spec_decode_num_accepted_tokens_total[1m])) / sum(rate(penstock:spec_decode_num_drafts_total[1m]))",
        lambda stats: stats.spec_decode_num_drafts,
    ),
    counter(
        "spec_decode_num_draft_tokens",
        "Tokens drafted. PromQL, acceptance: sum(rate(penstock:spec_decode_num_accepted_tokens_total[1m])) "
        "/ sum(rate(penstock:spec_decode_num_draft_tokens_total[1m]))",
        lambda stats: stats.spec_decode_num_draft_tokens,
    ),
    counter(
        "spec_decode_num_accepted_tokens",
        "Drafted tokens accepted. PromQL: sum(rate(penstock:spec_decode_num_accepted_tokens_total[1m]))",
        lambda stats: stats.spec_decode_num_accepted_tokens,
    ),
    counter(
        "spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens accepted at each place in the draft. PromQL, acceptance by place: "
        "sum by (position) (rate(penstock:spec_decode_num_accepted_tokens_per_pos_total[1m])) "
        "/ scalar(sum(rate(penstock:spec_decode_num_drafts_total[1m])))",
        lambda stats: {str(i): n for i, n in enumerate(stats.spec_decode_num_accepted_tokens_per_pos)},
        "position",
    ),
    Distribution(
        "spec_decode_draft_len",
        "Tokens drafted by each decoding request in each step, 0 where it drafted none. PromQL, mean: "
        "sum(rate(penstock:spec_decode_draft_len_sum[1m])) / sum(rate(penstock:spec_decode_draft_len_count[1m]))",
        lambda stats: stats.spec_decode_draft_len,
    ),
    Distribution(
        "spec_decode_utility",
        "Tokens per step over the step's time relative to plain decoding, one observation a request that ended and "
        "was measured; above 1 speculation has paid. PromQL, share of requests where it has not: "
        'sum(rate(penstock:spec_decode_utility_bucket{le="1"}[5m])) '
        "/ sum(rate(penstock:spec_decode_utility_count[5m]))",
        lambda stats: stats.spec_decode_utility,
    ),
    gauge(
        "spec_decode_phase",
        "Decoding requests by what decides their draft length: off, fixed, shadow, or cascade's baseline, test, set "
        "and disabled; at most a second old. PromQL: sum by (phase) (penstock:spec_decode_phase)",
        lambda stats: stats.spec_decode_phases,
        "phase",
    ),
    counter(
        "decode_steps",
        "Steps without prompt rows. PromQL: rate(penstock:decode_steps_total[1m])",
        lambda stats: stats.num_decode_steps,
    ),
    counter(
        "decode_tokens",
        "Tokens generated by decode steps. "
        "PromQL, tokens a step: rate(penstock:decode_tokens_total[1m]) / rate(penstock:decode_steps_total[1m])",
        lambda stats: stats.decode_tokens,
    ),
    gauge(
        "decode_experts_per_layer",
        "Mean distinct experts computed per MoE layer and decode step, all ranks together, since the start. "
        "PromQL: avg(penstock:decode_experts_per_layer)",
        lambda stats: stats.decode_experts_per_layer,
    ),
    counter(
        "decode_payload_bytes",
        "Bytes of rows that ranks needed of each other in decode steps. PromQL, bytes a token: "
        "rate(penstock:decode_payload_bytes_total[1m]) / rate(penstock:decode_tokens_total[1m])",
        lambda stats: stats.decode_payload_bytes,
    ),
    counter(
        "expert_rows_sent",
        "Rows sent between ranks. PromQL: rate(penstock:expert_rows_sent_total[1m])",
        lambda stats: stats.rows_sent,
    ),
    counter(
        "expert_payload_bytes",
        "Bytes of rows that ranks needed of each other. PromQL: rate(penstock:expert_payload_bytes_total[1m])",
        lambda stats: stats.payload_bytes,
    ),
    counter(
        "expert_wire_bytes",
        "Bytes that went between ranks, padding included. "
        "PromQL, overhead: "
        "rate(penstock:expert_wire_bytes_total[1m]) / rate(penstock:expert_payload_bytes_total[1m])",
        lambda stats: stats.wire_bytes,
    ),
    counter(
        "expert_budgeted_rows",
        "Rows that kept to a budget of experts, once for each layer; their answers are lossy. "
        "PromQL: sum(rate(penstock:expert_budgeted_rows_total[1m]))",
        lambda stats: stats.budgeted_rows,
    ),
    counter(
        "expert_budget_kept_weight",
        "Share of its router's weight that the budget kept, summed over those rows. PromQL, mean: sum(rate("
        "penstock:expert_budget_kept_weight_total[5m])) / sum(rate(penstock:expert_budgeted_rows_total[5m]))",
        lambda stats: stats.kept_weight,
    ),
    counter(
        "expert_budget_steps",
        "Steps in which rows kept to a budget of experts, by budget. "
        "PromQL: sum by (budget) (rate(penstock:expert_budget_steps_total[5m]))",
        lambda stats: stats.budget_steps,
        "budget",
    ),
    *by_place(
        "rank",
        "by the rank whose requests they are of, experts by the rank that holds them",
        lambda stats: stats.by_rank,
    ),
    *by_place("layer", "by number among the MoE layers, all ranks together", lambda stats: stats.by_layer),
)


class EngineCollector:
    """The totals of all gangs, by name, at one moment; none is there while no engine answers."""

    def __init__(self, gangs: Mapping[str, EngineStats]) -> None:
        self._gangs = gangs

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its PromQL."""
        up = "1 if an engine answers. PromQL: min(penstock:engine_up)"
        yield GaugeMetricFamily(f"{PREFIX}engine_up", up, value=float(bool(self._gangs)))
        if self._gangs:
            yield from (metric.collect(self._gangs) for metric in _METRICS)


def render(gangs: Mapping[str, EngineStats]) -> bytes:
    """Return the text that /metrics answers."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(gangs))
    return generate_latest(registry)


def engine_samples(gangs: Mapping[str, EngineStats]) -> dict[str, float]:
    """Return the totals under the names they have in /metrics, all gangs together; see `flatten`."""
    return flatten(EngineCollector(gangs).collect())


def parse_samples(text: str) -> dict[str, float]:
    """Return the samples of a /metrics text, all gangs together; see `flatten`."""
    return flatten(text_string_to_metric_families(text))


def flatten(families: Iterable[Metric]) -> dict[str, float]:
    """Return {name with its labels: value}; of histograms only ``_count`` and ``_sum``.

    The label ``gang`` is left out: gangs are added up, or averaged where a sum means nothing.
    """
    values: defaultdict[str, list[float]] = defaultdict(list)
    for family in families:
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items() if name != GANG)
            values[sample.name + (f"{{{labels}}}" if labels else "")].append(sample.value)
    return {name: sum(found) / (len(found) if name in _MEANS else 1) for name, found in values.items()}
