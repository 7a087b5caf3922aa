"""Prometheus metrics, under vLLM's names after the prefix ``penstock:``.

The engine's totals are read when /metrics is; what only the server can see is observed as requests end.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from ..engine.output import ABORT, ERROR, EngineStats
from .text_stream import TextDelta

PREFIX = "penstock:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5)
_LATENCY_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0)


class ServerMetrics:
    """What one server observes. It has a registry of its own: several servers may live in one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.time_to_first_token = Histogram(
            f"{PREFIX}time_to_first_token_seconds",
            "Arrival of a request to its first token. "
            "PromQL: histogram_quantile(0.99, sum by (le) (rate(penstock:time_to_first_token_seconds_bucket[5m])))",
            buckets=_TTFT_BUCKETS,
            registry=self._registry,
        )
        self.time_per_output_token = Histogram(
            f"{PREFIX}time_per_output_token_seconds",
            "Mean time per token after the first, one observation a request. "
            "PromQL: histogram_quantile(0.5, sum by (le) (rate(penstock:time_per_output_token_seconds_bucket[5m])))",
            buckets=_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self.e2e_request_latency = Histogram(
            f"{PREFIX}e2e_request_latency_seconds",
            "Arrival of a request to its last token. "
            "PromQL: histogram_quantile(0.99, sum by (le) (rate(penstock:e2e_request_latency_seconds_bucket[5m])))",
            buckets=_LATENCY_BUCKETS,
            registry=self._registry,
        )
        self.request_success = Counter(
            f"{PREFIX}request_success",
            "Requests ended, by what the client was told: stop, length, abort (it went away) or error. "
            "PromQL: sum by (finished_reason) (rate(penstock:request_success_total[5m]))",
            ["finished_reason"],
            registry=self._registry,
        )
        self.unknown_fields = Counter(
            f"{PREFIX}unknown_request_fields",
            "Fields of request bodies that were ignored because no API we know has them. "
            "PromQL: sum by (endpoint) (increase(penstock:unknown_request_fields_total[1d]))",
            ["endpoint"],
            registry=self._registry,
        )

    async def observe(self, deltas: AsyncGenerator[TextDelta, None], arrived: float) -> AsyncGenerator[TextDelta, None]:
        """Pass a request's text on and record how it went; ``arrived`` is a ``time.perf_counter()``."""
        reason: str | None = ABORT
        first = None
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    now = time.perf_counter()
                    if first is None:
                        first = now
                        self.time_to_first_token.observe(first - arrived)
                    if delta.generation is not None:
                        reason = delta.generation.finish_reason
                        self.e2e_request_latency.observe(now - arrived)
                        if delta.num_tokens > 1:
                            self.time_per_output_token.observe((now - first) / (delta.num_tokens - 1))
                    yield delta
        except ValueError:
            # before the first token it is the client's mistake and no request was served
            reason = None if first is None else ERROR
            raise
        except Exception:
            reason = ERROR
            raise
        finally:
            if reason is not None:
                self.request_success.labels(reason).inc()

    def render(self, engine: EngineStats | None) -> bytes:
        """Return the text that /metrics answers; ``engine`` is None while there is none that answers."""
        snapshot = CollectorRegistry(auto_describe=False)
        snapshot.register(EngineCollector(engine))
        return generate_latest(snapshot) + generate_latest(self._registry)


class EngineCollector:
    """The engine's totals at one moment, as metrics."""

    def __init__(self, stats: EngineStats | None) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield every metric with its PromQL."""
        stats = self._stats
        yield _gauge("engine_up", "1 if the engine answers. PromQL: min(penstock:engine_up)", float(stats is not None))
        if stats is None:
            return
        yield _gauge(
            "num_requests_running",
            "Requests in steps now. PromQL: sum(penstock:num_requests_running)",
            stats.num_requests_running,
        )
        yield _gauge(
            "num_requests_waiting",
            "Requests in the queue. PromQL: sum(penstock:num_requests_waiting)",
            stats.num_requests_waiting,
        )
        yield _gauge(
            "kv_cache_usage_perc",
            "Used share of the KV blocks, all ranks together; 1 is full. PromQL: max(penstock:kv_cache_usage_perc)",
            stats.num_kv_blocks_used / stats.num_kv_blocks if stats.num_kv_blocks else 0.0,
        )
        yield _counter(
            "prompt_tokens",
            "Prompt tokens computed. PromQL: rate(penstock:prompt_tokens_total[1m])",
            stats.num_prompt_tokens,
        )
        yield _counter(
            "generation_tokens",
            "Tokens generated. PromQL: rate(penstock:generation_tokens_total[1m])",
            stats.num_generation_tokens,
        )
        finished = CounterMetricFamily(
            f"{PREFIX}engine_requests_finished",
            "Requests ended, by what the engine did; one that a stop string ended is an abort here. "
            "PromQL: sum by (finished_reason) (rate(penstock:engine_requests_finished_total[5m]))",
            labels=["finished_reason"],
        )
        for reason, count in stats.num_requests_finished.items():
            finished.add_metric([reason], count)
        yield finished
        yield from self._steps(stats)
        yield from self._spec_decode(stats)
        yield from self._experts(stats)

    def _steps(self, stats: EngineStats) -> Iterator[Metric]:
        yield _counter(
            "engine_steps", "Steps committed. PromQL: rate(penstock:engine_steps_total[1m])", stats.num_steps
        )
        yield _counter(
            "engine_failed_steps",
            "Steps discarded and planned again. PromQL: increase(penstock:engine_failed_steps_total[1h])",
            stats.num_failed_steps,
        )
        yield _counter(
            "engine_step_seconds",
            "Time spent in steps. "
            "PromQL, mean step: rate(penstock:engine_step_seconds_total[1m]) / rate(penstock:engine_steps_total[1m])",
            stats.step_wall_s,
        )

    def _spec_decode(self, stats: EngineStats) -> Iterator[Metric]:
        yield _counter(
            "spec_decode_num_drafts",
            "Drafts verified. PromQL, mean accepted length: 1 + rate("
            "penstock:spec_decode_num_accepted_tokens_total[1m]) / rate(penstock:spec_decode_num_drafts_total[1m])",
            stats.spec_decode_num_drafts,
        )
        yield _counter(
            "spec_decode_num_draft_tokens",
            "Tokens drafted. PromQL, acceptance: rate(penstock:spec_decode_num_accepted_tokens_total[1m]) "
            "/ rate(penstock:spec_decode_num_draft_tokens_total[1m])",
            stats.spec_decode_num_draft_tokens,
        )
        yield _counter(
            "spec_decode_num_accepted_tokens",
            "Drafted tokens accepted. PromQL: rate(penstock:spec_decode_num_accepted_tokens_total[1m])",
            stats.spec_decode_num_accepted_tokens,
        )
        per_pos = CounterMetricFamily(
            f"{PREFIX}spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted at each place in the draft. PromQL, acceptance by place: "
            "sum by (position) (rate(penstock:spec_decode_num_accepted_tokens_per_pos_total[1m])) "
            "/ scalar(sum(rate(penstock:spec_decode_num_drafts_total[1m])))",
            labels=["position"],
        )
        for position, count in enumerate(stats.spec_decode_num_accepted_tokens_per_pos):
            per_pos.add_metric([str(position)], count)
        yield per_pos

    def _experts(self, stats: EngineStats) -> Iterator[Metric]:
        yield _counter(
            "decode_steps",
            "Steps without prompt rows. PromQL: rate(penstock:decode_steps_total[1m])",
            stats.num_decode_steps,
        )
        yield _counter(
            "decode_tokens",
            "Tokens generated by decode steps. "
            "PromQL, tokens a step: rate(penstock:decode_tokens_total[1m]) / rate(penstock:decode_steps_total[1m])",
            stats.decode_tokens,
        )
        yield _gauge(
            "decode_experts_per_layer",
            "Mean distinct experts computed per MoE layer and decode step, all ranks together, since the start. "
            "PromQL: avg(penstock:decode_experts_per_layer)",
            stats.decode_experts_per_layer,
        )
        yield _counter(
            "decode_payload_bytes",
            "Bytes of rows that ranks needed of each other in decode steps. PromQL, bytes a token: "
            "rate(penstock:decode_payload_bytes_total[1m]) / rate(penstock:decode_tokens_total[1m])",
            stats.decode_payload_bytes,
        )
        yield _counter(
            "expert_rows_sent",
            "Rows sent between ranks. PromQL: rate(penstock:expert_rows_sent_total[1m])",
            stats.rows_sent,
        )
        yield _counter(
            "expert_payload_bytes",
            "Bytes of rows that ranks needed of each other. PromQL: rate(penstock:expert_payload_bytes_total[1m])",
            stats.payload_bytes,
        )
        yield _counter(
            "expert_wire_bytes",
            "Bytes that went between ranks, padding included. "
            "PromQL, overhead: "
            "rate(penstock:expert_wire_bytes_total[1m]) / rate(penstock:expert_payload_bytes_total[1m])",
            stats.wire_bytes,
        )


def engine_samples(stats: EngineStats) -> dict[str, float]:
    """Return the engine's totals under the names they have in /metrics."""
    return flatten(EngineCollector(stats).collect())


def parse_samples(text: str) -> dict[str, float]:
    """Return the samples of a /metrics text."""
    return flatten(text_string_to_metric_families(text))


def flatten(families: Iterable[Metric]) -> dict[str, float]:
    """Return {name with its labels: value}; of histograms only ``_count`` and ``_sum``."""
    samples = {}
    for family in families:
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, value=value)
