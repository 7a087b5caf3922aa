"""Prometheus metrics, under vLLM's names after the prefix ``penstock:``, each gang with its name as the label ``gang``.

All of them are counted by the engines, so that every server answers for all gangs and for all other servers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from ..engine.histogram import HistogramSnapshot
from ..engine.output import EngineStats

PREFIX = "penstock:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_GANG = "gang"
_MEANS = tuple(
    PREFIX + name
    for name in (
        *("kv_cache_usage_perc", "decode_experts_per_layer"),
        *("last_rebalance_age_seconds", "expert_load_imbalance"),
    )
)
"""What several gangs have on average; all else they have together."""


@dataclass(frozen=True, slots=True)
class _Value:
    """A gauge or counter: a number per gang or, with ``label``, several."""

    family: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    text: str
    read: Callable[[EngineStats], float | Mapping[str, float] | None]
    """None where a gang has no such thing."""
    label: str | None = None

    def collect(self, gangs: Mapping[str, EngineStats]) -> Metric:
        metric = self.family(PREFIX + self.name, self.text, labels=[_GANG, *([self.label] if self.label else [])])
        for gang, stats in gangs.items():
            value = self.read(stats)
            if isinstance(value, Mapping):
                for key, count in value.items():
                    metric.add_metric([gang, key], count)
            elif value is not None:
                metric.add_metric([gang], value)
        return metric


@dataclass(frozen=True, slots=True)
class _Distribution:
    """A histogram per gang."""

    name: str
    text: str
    read: Callable[[EngineStats], HistogramSnapshot]

    def collect(self, gangs: Mapping[str, EngineStats]) -> Metric:
        metric = HistogramMetricFamily(PREFIX + self.name, self.text, labels=[_GANG])
        for gang, stats in gangs.items():
            histogram = self.read(stats)
            metric.add_metric([gang], _buckets(histogram), histogram.total)
        return metric


def _buckets(histogram: HistogramSnapshot) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def _latency(name: str, text: str) -> _Distribution:
    """Return a histogram of seconds; ``name`` is that of ``EngineStats.latencies``."""
    query = f"histogram_quantile(0.99, sum by (le) (rate({PREFIX}{name}_seconds_bucket[5m])))"
    return _Distribution(f"{name}_seconds", f"{text} PromQL: {query}", lambda stats: stats.latencies[name])


def _gauge(
    name: str, text: str, read: Callable[[EngineStats], float | Mapping[str, float] | None], label: str | None = None
) -> _Value:
    return _Value(GaugeMetricFamily, name, text, read, label)


def _counter(
    name: str, text: str, read: Callable[[EngineStats], float | Mapping[str, float]], label: str | None = None
) -> _Value:
    return _Value(CounterMetricFamily, name, text, read, label)


def _by_place(place: str, what: str, read: Callable[[EngineStats], Mapping[str, Sequence[float]]]) -> Iterator[_Value]:
    """Yield a counter of each `LayerCounts` with the label ``place``, rank or layer; ``what``: what that is."""
    for count, text in _COUNTS.items():
        name = f"{place}_{count}"
        yield _counter(
            name,
            f"{text}, {what}. PromQL: sum by ({place}) (rate({PREFIX}{name}_total[1m]))",
            lambda stats, count=count: {str(number): n for number, n in enumerate(read(stats)[count])},  # type: ignore[misc]
            place,
        )


_COUNTS = {
    "rows": "Rows routed, once for each layer",
    "experts": "Distinct experts computed, summed over layers and steps",
    "rows_sent": "Rows sent to other ranks",
    "payload_bytes": "Bytes of rows needed of other ranks",
    "wire_bytes": "Bytes sent to other ranks, padding included",
    "budgeted_rows": "Rows that kept to a budget of experts, once for each layer",
    "weight_kept": "Share of its router's weight that the budget kept, summed over those rows",
}
_METRICS: tuple[_Value | _Distribution, ...] = (
    _gauge(
        "num_requests_running",
        "Requests in steps now. PromQL: sum(penstock:num_requests_running)",
        lambda stats: stats.num_requests_running,
    ),
    _gauge(
        "num_requests_waiting",
        "Requests in the queue. PromQL: sum(penstock:num_requests_waiting)",
        lambda stats: stats.num_requests_waiting,
    ),
    _gauge(
        "kv_cache_usage_perc",
        "Used share of the KV blocks, all ranks together; 1 is full. PromQL: max(penstock:kv_cache_usage_perc)",
        lambda stats: stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0,
    ),
    _counter(
        "num_preemptions",
        "Times a running request lost its KV to older ones, to be computed again. "
        "PromQL: sum(rate(penstock:num_preemptions_total[5m]))",
        lambda stats: stats.num_preemptions,
    ),
    _counter(
        "prompt_tokens",
        "Prompt tokens computed, each once. PromQL: sum(rate(penstock:prompt_tokens_total[1m]))",
        lambda stats: stats.num_prompt_tokens,
    ),
    _counter(
        "generation_tokens",
        "Tokens generated. PromQL: sum(rate(penstock:generation_tokens_total[1m]))",
        lambda stats: stats.num_generation_tokens,
    ),
    _counter(
        "request_success",
        "Requests ended: stop, length, abort (the client went away), timeout or error. "
        "PromQL: sum by (finished_reason) (rate(penstock:request_success_total[5m]))",
        lambda stats: stats.num_requests_finished,
        "finished_reason",
    ),
    _counter(
        "request_queue_full",
        "Requests refused because the queue was full. PromQL: sum(rate(penstock:request_queue_full_total[5m]))",
        lambda stats: stats.num_requests_refused,
    ),
    _counter(
        "unknown_request_fields",
        "Fields of request bodies that were ignored because no API we know has them. "
        "PromQL: sum by (endpoint) (increase(penstock:unknown_request_fields_total[1d]))",
        lambda stats: stats.unknown_request_fields,
        "endpoint",
    ),
    _latency("time_to_first_token", "Arrival of a request at its gang to its first token."),
    _latency(
        "inter_token_latency",
        "Between the outputs of a request; tokens that came in one step, accepted drafts among them, are one output.",
    ),
    _latency("time_per_output_token", "Mean time per token after the first, one observation a request."),
    _latency("e2e_request_latency", "Arrival of a request at its gang to its last token."),
    _latency("request_queue_time", "Arrival of a request at its gang to a place and blocks for it."),
    _latency("request_prefill_time", "From there to its first token."),
    _latency("request_decode_time", "Its first token to its last."),
    _counter(
        "engine_steps", "Steps committed. PromQL: rate(penstock:engine_steps_total[1m])", lambda stats: stats.num_steps
    ),
    _counter(
        "engine_failed_steps",
        "Steps discarded and planned again. PromQL: increase(penstock:engine_failed_steps_total[1h])",
        lambda stats: stats.num_failed_steps,
    ),
    _counter(
        "engine_step_seconds",
        "Time spent in steps. "
        "PromQL, mean step: rate(penstock:engine_step_seconds_total[1m]) / rate(penstock:engine_steps_total[1m])",
        lambda stats: stats.step_wall_s,
    ),
    _counter(
        "faults",
        "Faults by what they were: a process that died, was silent or unreachable, or a coordinator_died. "
        "PromQL: sum by (what) (increase(penstock:faults_total[1h]))",
        lambda stats: stats.events.faults,
        "what",
    ),
    _counter(
        "recoveries",
        "Recoveries by what they recovered from; resubmission is an ingress that sent its requests to another "
        "coordinator. PromQL: sum by (what) (increase(penstock:recoveries_total[1h]))",
        lambda stats: stats.events.recoveries,
        "what",
    ),
    _Distribution(
        "recovery_seconds",
        "From noticing a fault to going on. PromQL: "
        "histogram_quantile(0.5, sum by (le) (increase(penstock:recovery_seconds_bucket[1d])))",
        lambda stats: stats.events.recovery_s,
    ),
    _counter(
        "requests_replayed",
        "Requests computed again because their KV was lost with a rank or a coordinator. "
        "PromQL: sum(increase(penstock:requests_replayed_total[1h]))",
        lambda stats: stats.events.num_requests_replayed,
    ),
    _counter(
        "requests_resumed",
        "Requests that a coordinator took over in the middle of their output. "
        "PromQL: sum(increase(penstock:requests_resumed_total[1h]))",
        lambda stats: stats.num_requests_resumed,
    ),
    _counter(
        "expert_bytes_loaded",
        "Bytes of experts loaded again to replace lost ranks. "
        "PromQL: sum(increase(penstock:expert_bytes_loaded_total[1h]))",
        lambda stats: stats.events.expert_bytes_loaded,
    ),
    _gauge(
        "last_rebalance_age_seconds",
        "Since experts were last moved, or found to need no moving, or the start; only where they may move. "
        "PromQL: max(penstock:last_rebalance_age_seconds)",
        lambda stats: None if stats.balance is None else stats.balance.last_rebalance_age_s,
    ),
    _gauge(
        "expert_load_imbalance",
        "Busiest rank's rows over the mean of all, each layer by its rows, as last counted; 1 is balanced; only where "
        "experts may move. PromQL: max(penstock:expert_load_imbalance)",
        lambda stats: None if stats.balance is None else stats.balance.imbalance,
    ),
    _counter(
        "rebalances",
        "Rebalances that moved experts by what became of them: finished, timed_out or interrupted. "
        "PromQL: sum by (what) (increase(penstock:rebalances_total[1h]))",
        lambda stats: stats.events.rebalances,
        "what",
    ),
    _counter(
        "rebalance_experts",
        "Experts moved between ranks. PromQL: sum(increase(penstock:rebalance_experts_total[1h]))",
        lambda stats: stats.events.num_experts_moved,
    ),
    _counter(
        "rebalance_bytes",
        "Bytes of experts moved between ranks. PromQL: sum(rate(penstock:rebalance_bytes_total[5m]))",
        lambda stats: stats.events.expert_bytes_moved,
    ),
    _counter(
        "spec_decode_num_drafts",
        "Drafts verified. PromQL, mean accepted length: 1 + sum(rate("
        "penstock:spec_decode_num_accepted_tokens_total[1m])) / sum(rate(penstock:spec_decode_num_drafts_total[1m]))",
        lambda stats: stats.spec_decode_num_drafts,
    ),
    _counter(
        "spec_decode_num_draft_tokens",
        "Tokens drafted. PromQL, acceptance: sum(rate(penstock:spec_decode_num_accepted_tokens_total[1m])) "
        "/ sum(rate(penstock:spec_decode_num_draft_tokens_total[1m]))",
        lambda stats: stats.spec_decode_num_draft_tokens,
    ),
    _counter(
        "spec_decode_num_accepted_tokens",
        "Drafted tokens accepted. PromQL: sum(rate(penstock:spec_decode_num_accepted_tokens_total[1m]))",
        lambda stats: stats.spec_decode_num_accepted_tokens,
    ),
    _counter(
        "spec_decode_num_accepted_tokens_per_pos",
        "Drafted tokens accepted at each place in the draft. PromQL, acceptance by place: "
        "sum by (position) (rate(penstock:spec_decode_num_accepted_tokens_per_pos_total[1m])) "
        "/ scalar(sum(rate(penstock:spec_decode_num_drafts_total[1m])))",
        lambda stats: {str(i): n for i, n in enumerate(stats.spec_decode_num_accepted_tokens_per_pos)},
        "position",
    ),
    _Distribution(
        "spec_decode_draft_len",
        "Tokens drafted by each decoding request in each step, 0 where it drafted none. PromQL, mean: "
        "sum(rate(penstock:spec_decode_draft_len_sum[1m])) / sum(rate(penstock:spec_decode_draft_len_count[1m]))",
        lambda stats: stats.spec_decode_draft_len,
    ),
    _Distribution(
        "spec_decode_utility",
        "Tokens per step over the step's time relative to plain decoding, one observation a request that ended and "
        "was measured; above 1 speculation has paid. PromQL, share of requests where it has not: "
        'sum(rate(penstock:spec_decode_utility_bucket{le="1"}[5m])) '
        "/ sum(rate(penstock:spec_decode_utility_count[5m]))",
        lambda stats: stats.spec_decode_utility,
    ),
    _gauge(
        "spec_decode_phase",
        "Decoding requests by what decides their draft length: off, fixed, shadow, or cascade's baseline, test, set "
        "and disabled; at most a second old. PromQL: sum by (phase) (penstock:spec_decode_phase)",
        lambda stats: stats.spec_decode_phases,
        "phase",
    ),
    _counter(
        "decode_steps",
        "Steps without prompt rows. PromQL: rate(penstock:decode_steps_total[1m])",
        lambda stats: stats.num_decode_steps,
    ),
    _counter(
        "decode_tokens",
        "Tokens generated by decode steps. "
        "PromQL, tokens a step: rate(penstock:decode_tokens_total[1m]) / rate(penstock:decode_steps_total[1m])",
        lambda stats: stats.decode_tokens,
    ),
    _gauge(
        "decode_experts_per_layer",
        "Mean distinct experts computed per MoE layer and decode step, all ranks together, since the start. "
        "PromQL: avg(penstock:decode_experts_per_layer)",
        lambda stats: stats.decode_experts_per_layer,
    ),
    _counter(
        "decode_payload_bytes",
        "Bytes of rows that ranks needed of each other in decode steps. PromQL, bytes a token: "
        "rate(penstock:decode_payload_bytes_total[1m]) / rate(penstock:decode_tokens_total[1m])",
        lambda stats: stats.decode_payload_bytes,
    ),
    _counter(
        "expert_rows_sent",
        "Rows sent between ranks. PromQL: rate(penstock:expert_rows_sent_total[1m])",
        lambda stats: stats.rows_sent,
    ),
    _counter(
        "expert_payload_bytes",
        "Bytes of rows that ranks needed of each other. PromQL: rate(penstock:expert_payload_bytes_total[1m])",
        lambda stats: stats.payload_bytes,
    ),
    _counter(
        "expert_wire_bytes",
        "Bytes that went between ranks, padding included. "
        "PromQL, overhead: "
        "rate(penstock:expert_wire_bytes_total[1m]) / rate(penstock:expert_payload_bytes_total[1m])",
        lambda stats: stats.wire_bytes,
    ),
    _counter(
        "expert_budgeted_rows",
        "Rows that kept to a budget of experts, once for each layer; their answers are lossy. "
        "PromQL: sum(rate(penstock:expert_budgeted_rows_total[1m]))",
        lambda stats: stats.budgeted_rows,
    ),
    _counter(
        "expert_budget_kept_weight",
        "Share of its router's weight that the budget kept, summed over those rows. PromQL, mean: sum(rate("
        "penstock:expert_budget_kept_weight_total[5m])) / sum(rate(penstock:expert_budgeted_rows_total[5m]))",
        lambda stats: stats.kept_weight,
    ),
    _counter(
        "expert_budget_steps",
        "Steps in which rows kept to a budget of experts, by budget. "
        "PromQL: sum by (budget) (rate(penstock:expert_budget_steps_total[5m]))",
        lambda stats: stats.budget_steps,
        "budget",
    ),
    *_by_place(
        "rank",
        "by the rank whose requests they are of, experts by the rank that holds them",
        lambda stats: stats.by_rank,
    ),
    *_by_place("layer", "by number among the MoE layers, all ranks together", lambda stats: stats.by_layer),
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
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items() if name != _GANG)
            values[sample.name + (f"{{{labels}}}" if labels else "")].append(sample.value)
    return {name: sum(found) / (len(found) if name in _MEANS else 1) for name, found in values.items()}
