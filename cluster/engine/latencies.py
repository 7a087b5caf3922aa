"""How long requests take, under vLLM's names."""

from __future__ import annotations

from .histogram import Histogram, HistogramSnapshot
from .request import Request

_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5)
_REQUEST_S = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0)


class Latencies:
    """Histograms of seconds. A request that is aborted or fails counts only in what it had got to."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_FIRST_TOKEN_S)
        self.inter_token_latency = Histogram(_TOKEN_S)
        self.time_per_output_token = Histogram(_TOKEN_S)
        self.request_queue_time = Histogram(_REQUEST_S)
        self.request_prefill_time = Histogram(_REQUEST_S)
        self.request_decode_time = Histogram(_REQUEST_S)
        self.e2e_request_latency = Histogram(_REQUEST_S)

    def admitted(self, request: Request, now: float) -> None:
        """Count a request that leaves the queue for the first time."""
        self.request_queue_time.observe(now - request.arrival_s)

    def tokens(self, request: Request, now: float) -> None:
        """Count the output that a request gets at ``now``, before it takes note of it."""
        if request.last_token_s is not None:
            self.inter_token_latency.observe(now - request.last_token_s)
            return
        assert request.admitted_s is not None
        self.time_to_first_token.observe(now - request.arrival_s)
        self.request_prefill_time.observe(now - request.admitted_s)

    def finished(self, request: Request, now: float) -> None:
        """Count a request that has got all it wanted, which may be no token at all."""
        self.e2e_request_latency.observe(now - request.arrival_s)
        if request.first_token_s is None or request.last_token_s is None:
            return
        decode_s = request.last_token_s - request.first_token_s
        self.request_decode_time.observe(decode_s)
        if request.num_output_tokens > 1:
            self.time_per_output_token.observe(decode_s / (request.num_output_tokens - 1))

    def snapshot(self) -> dict[str, HistogramSnapshot]:
        """Return all of them by name."""
        return {name: histogram.snapshot() for name, histogram in vars(self).items()}
