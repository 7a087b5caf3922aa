"""What a running server says of itself, read once and put so that people can read it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from ..api.metric import PREFIX
from ..api.metrics import parse_samples
from .http_client import HttpClient

Buckets = list[tuple[float, float]]
"""(upper bound, observations at or below it), ascending; the last bound is infinite."""


@dataclass(frozen=True, slots=True)
class ServerStats:
    """One reading of /v1/models and /metrics."""

    models: list[dict[str, Any]]
    """The cards of the models served."""
    samples: dict[str, float]
    """Metrics by name, labels included; of histograms ``_count`` and ``_sum``."""
    histograms: dict[str, Buckets]
    """By name."""

    @classmethod
    def read(cls, client: HttpClient) -> ServerStats:
        """Ask the server; raises what `Client` raises."""
        cards = client.model_cards()  # first: it knows a server that is not ours
        text = client.metrics_text()
        return cls(cards, parse_samples(text), _histograms(text))

    def as_json(self) -> dict[str, Any]:
        """Return what `penstock stats --json` prints."""
        quantiles = {
            name: {f"p{round(100 * share)}": quantile(buckets, share) for share in (0.5, 0.9, 0.99)}
            for name, buckets in self.histograms.items()
            if buckets[-1][1]
        }
        return {"models": self.models, "metrics": self.samples, "quantiles": quantiles}

    def lines(self) -> list[tuple[str, str]]:
        """Return (what, figure) pairs; totals are since the server started."""
        names = ", ".join(f"{card['id']} (max_model_len {card.get('max_model_len', '?')})" for card in self.models)
        budgets = dict.fromkeys(card.get("penstock", {}).get("expert_budget") for card in self.models)
        lossy = [("lossy", f"verifications keep to {budget}") for budget in budgets if budget]
        up = self.samples.get(f"{PREFIX}engine_up") == 1
        lines = [("models", names or "none"), *lossy, ("engine", "up" if up else "down: it does not answer")]
        if up:
            lines += self._engine_lines()
        return lines + [(label, self._latency(f"{PREFIX}{name}_seconds")) for label, name in _LATENCIES]

    def _engine_lines(self) -> list[tuple[str, str]]:
        value = self._value
        steps, step_s = value("engine_steps_total"), value("engine_step_seconds_total")
        decode_steps = value("decode_steps_total")
        drafted, accepted = (value(f"spec_decode_num_{which}_tokens_total") for which in ("draft", "accepted"))
        decoded = value("decode_tokens_total")
        return [
            ("requests", f"{value('num_requests_running'):.0f} running, {value('num_requests_waiting'):.0f} waiting"),
            ("requests ended", self._ended()),
            ("queue full", f"{value('request_queue_full_total'):,.0f} requests refused"),
            ("preemptions", f"{value('num_preemptions_total'):,.0f}"),
            ("KV blocks", f"{value('kv_cache_usage_perc'):.1%} used"),
            (
                "tokens",
                f"{value('prompt_tokens_total'):,.0f} prompt, {value('generation_tokens_total'):,.0f} generated",
            ),
            ("steps", f"{steps:,.0f} of {1e3 * _ratio(step_s, steps):.1f} ms on average"),
            ("failed steps", f"{value('engine_failed_steps_total'):,.0f}, each planned again"),
            ("decode steps", f"{_ratio(decoded, decode_steps):.2f} tokens a step over all requests in it"),
            ("draft tokens", f"{accepted:,.0f} of {drafted:,.0f} accepted ({_ratio(accepted, drafted):.1%})"),
            ("experts", f"{value('decode_experts_per_layer'):.1f} distinct a layer and decode step"),
            ("between ranks", f"{_ratio(value('decode_payload_bytes_total'), decoded):,.0f} bytes a decoded token"),
        ]

    def _value(self, name: str) -> float:
        return self.samples.get(f"{PREFIX}{name}", 0.0)

    def _ended(self) -> str:
        start = f'{PREFIX}request_success_total{{finished_reason="'
        counts = {
            name.removeprefix(start)[:-2]: value for name, value in self.samples.items() if name.startswith(start)
        }
        return ", ".join(f"{value:,.0f} {reason}" for reason, value in counts.items()) or "none"

    def _latency(self, name: str) -> str:
        buckets = self.histograms.get(name)
        if not buckets or not buckets[-1][1]:
            return "no observations"
        mean = self.samples[f"{name}_sum"] / self.samples[f"{name}_count"]
        p50, p99 = (quantile(buckets, share) for share in (0.5, 0.99))
        return f"mean {1e3 * mean:,.1f} ms, p50 {_milliseconds(p50)}, p99 {_milliseconds(p99)}"


_LATENCIES: Sequence[tuple[str, str]] = (
    ("time to first token", "time_to_first_token"),
    ("inter-token latency", "inter_token_latency"),
    ("time per output token", "time_per_output_token"),
    ("queue time", "request_queue_time"),
    ("request latency", "e2e_request_latency"),
)


def quantile(buckets: Buckets, share: float) -> float | None:
    """Return the estimate that PromQL's ``histogram_quantile`` makes; None if it is above the last finite bound."""
    rank = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            if math.isinf(bound):
                return None
            return low + (bound - low) * (_ratio(rank - below, count - below))
        low, below = bound, count
    return None


def _histograms(text: str) -> dict[str, Buckets]:
    found: dict[str, Buckets] = {}
    for family in text_string_to_metric_families(text):
        if family.type == "histogram":
            counts: dict[float, float] = defaultdict(float)
            for sample in family.samples:
                if sample.name.endswith("_bucket"):
                    counts[float(sample.labels["le"])] += sample.value
            found[family.name] = sorted(counts.items())
    return found


def _milliseconds(seconds: float | None) -> str:
    return "above the last bucket" if seconds is None else f"{1e3 * seconds:,.1f} ms"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
