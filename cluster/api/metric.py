"""What a Prometheus metric of ours is: a number or a distribution that is read off an engine's totals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from ..engine.histogram import HistogramSnapshot
from ..engine.output import EngineStats

PREFIX = "penstock:"
GANG = "gang"
"""The label that names a gang."""
_COUNTS = {
    "rows": "Rows routed, once for each layer",
    "experts": "Distinct experts computed, summed over layers and steps",
    "rows_sent": "Rows sent to other ranks",
    "payload_bytes": "Bytes of rows needed of other ranks",
    "wire_bytes": "Bytes sent to other ranks, padding included",
    "budgeted_rows": "Rows that kept to a budget of experts, once for each layer",
    "weight_kept": "Share of its router's weight that the budget kept, summed over those rows",
}


@dataclass(frozen=True, slots=True)
class Value:
    """A gauge or counter: a number per gang or, with ``label``, several."""

    family: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    text: str
    read: Callable[[EngineStats], float | Mapping[str, float] | None]
    """None where a gang has no such thing."""
    label: str | None = None

    def collect(self, gangs: Mapping[str, EngineStats]) -> Metric:
        """Return what all gangs have of it."""
        metric = self.family(PREFIX + self.name, self.text, labels=[GANG, *([self.label] if self.label else [])])
        for gang, stats in gangs.items():
            value = self.read(stats)
            if isinstance(value, Mapping):
                for key, count in value.items():
                    metric.add_metric([gang, key], count)
            elif value is not None:
                metric.add_metric([gang], value)
        return metric


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram per gang."""

    name: str
    text: str
    read: Callable[[EngineStats], HistogramSnapshot]

    def collect(self, gangs: Mapping[str, EngineStats]) -> Metric:
        """Return what all gangs have of it."""
        metric = HistogramMetricFamily(PREFIX + self.name, self.text, labels=[GANG])
        for gang, stats in gangs.items():
            histogram = self.read(stats)
            metric.add_metric([gang], _buckets(histogram), histogram.total)
        return metric


def _buckets(histogram: HistogramSnapshot) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def latency(name: str, text: str) -> Distribution:
    """Return a histogram of seconds; ``name`` is that of ``EngineStats.latencies``."""
    query = f"histogram_quantile(0.99, sum by (le) (rate({PREFIX}{name}_seconds_bucket[5m])))"
    return Distribution(f"{name}_seconds", f"{text} PromQL: {query}", lambda stats: stats.latencies[name])


def gauge(
    name: str, text: str, read: Callable[[EngineStats], float | Mapping[str, float] | None], label: str | None = None
) -> Value:
    """Return what may rise and fall; ``label``: of the several numbers that ``read`` gives."""
    return Value(GaugeMetricFamily, name, text, read, label)


def counter(
    name: str, text: str, read: Callable[[EngineStats], float | Mapping[str, float]], label: str | None = None
) -> Value:
    """Return what only grows; ``label``: of the several numbers that ``read`` gives."""
    return Value(CounterMetricFamily, name, text, read, label)


def by_place(place: str, what: str, read: Callable[[EngineStats], Mapping[str, Sequence[float]]]) -> Iterator[Value]:
    """Yield a counter of each `LayerCounts` with the label ``place``, rank or layer; ``what``: what that is."""
    for count, text in _COUNTS.items():
        name = f"{place}_{count}"
        yield counter(
            name,
            f"{text}, {what}. PromQL: sum by ({place}) (rate({PREFIX}{name}_total[1m]))",
            lambda stats, count=count: {str(number): n for number, n in enumerate(read(stats)[count])},  # type: ignore[misc]
            place,
        )
