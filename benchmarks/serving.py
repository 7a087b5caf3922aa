"""What serving costs: streams through HTTP, proxy, ingress and coordinator against the engine in one process.

The same model, configuration, prompts and closed loops of 1, 8 and 32 streams, in turns on the same machine: `penstock
serve` asked by a client that is a process of its own, and an `AsyncEngine` in a process of its own whose tokens are
only counted. One rank on one thread, so that the rank and what serves it have a core each. The demo model's steps are
so short that the cost shows; its inflated twin, which computes the same tokens, has steps of a real model's length.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import demo
from ..demo import prompts
from ..demo.inflate import inflate
from .harness import Measurement, Options, Row, Target, run
from .peer_process import PeerProcess
from .server_process import ServerProcess, serving
from .stream_peer import Job, Report, Served

DEMO = Path(demo.__file__).parent / "model"
FACTOR = 16
STREAMS = (1, 8, 32)
ROUNDS = {1: 8, 8: 3, 32: 2}
"""Requests of each stream in one measurement."""
MAX_TOKENS = 64
REPETITIONS = 7
REQUIRED_THROUGHPUT = 0.90
REQUIRED_TTFT_MS = 5.0
NAME = "demo"


def peer(*arguments: str) -> PeerProcess:
    """Return a `stream_peer` process."""
    return PeerProcess([sys.executable, "-m", f"{__package__}.stream_peer", *arguments])


def ask(process: PeerProcess, job: Job) -> Report:
    """Have a `stream_peer` run a job."""
    report = process.ask(asdict(job))
    return Report([Served(**request) for request in report["requests"]], report["wall_s"], report["cpu_s"])


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one way to the engine."""

    report: Report
    cpu_s: dict[str, float]
    """CPU seconds by role."""

    @property
    def num_tokens(self) -> int:
        """Output tokens of all requests."""
        return sum(request.num_tokens for request in self.report.requests)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the time from the first request to the last token."""
        return self.num_tokens / self.report.wall_s

    @property
    def ttft_ms(self) -> float:
        """Median over the requests."""
        return 1e3 * statistics.median(request.ttft_s for request in self.report.requests)

    @property
    def tpot_ms(self) -> float:
        """Median over the requests of the time per token after the first."""
        return 1e3 * statistics.median(
            (request.total_s - request.ttft_s) / (request.num_tokens - 1) for request in self.report.requests
        )


class Ways:
    """Both ways to the same model."""

    def __init__(self, server: ServerProcess, client: PeerProcess, engine: PeerProcess) -> None:
        self._server, self._client, self._engine = server, client, engine

    def measure(self, job: Job, way: str) -> Sample:
        """Run a job one way."""
        if way == "engine":
            report = ask(self._engine, job)
            return Sample(report, {"engine process": report.cpu_s})
        before = self._server.cpu_s()
        report = ask(self._client, job)
        used = {role: spent - before.get(role, 0.0) for role, spent in self._server.cpu_s().items()}
        return Sample(report, {**used, "client": report.cpu_s})


@contextmanager
def ways_to(model: Path) -> Iterator[Ways]:
    """Start server, client and engine for one model."""
    config = {"dtype": "float32", "device": "cpu", "num_threads": 1, "max_num_seqs": max(STREAMS)}
    flags = [word for name, value in config.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with (
        serving(["serve", str(model), "--served-model-name", NAME, *flags]) as server,
        peer("http", server.url, NAME) as client,
        peer("engine", json.dumps({"model": str(model), **config})) as engine,
    ):
        yield Ways(server, client, engine)


def job_for(streams: int, seed: int, rounds: int) -> Job:
    """Return a job over the demo model's prompts, math and extraction alike."""
    records = [record.chat() for family in ("math", "extraction") for record in prompts.load(family)]
    random.Random(seed).shuffle(records)
    count = streams * rounds
    return Job(streams, [records[i % len(records)] for i in range(count)], MAX_TOKENS)


def measure(options: Options) -> Measurement:
    """Take both ways in turns for each model and number of streams."""
    repetitions = 2 if options.quick else REPETITIONS
    rows: list[Row] = []
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"demo": DEMO}
        if not options.quick:
            models[f"demo, experts x{FACTOR}"] = inflated = Path(folder) / "inflated"
            inflate(DEMO, inflated, FACTOR)
        for name, model in models.items():
            with ways_to(model) as ways:
                for streams in STREAMS:
                    pairs = _in_turns(ways, streams, options.seed, repetitions)
                    rows += [_row(name, streams, way, [pair[way] for pair in pairs]) for way in ("engine", "http")]
                    targets += _targets(name, streams, pairs)
    return Measurement(rows, targets, "float32", 1)


def _in_turns(ways: Ways, streams: int, seed: int, repetitions: int) -> list[dict[str, Sample]]:
    """Return pairs of measurements, each way first in every other pair."""
    pairs = []
    for way in ("engine", "http"):
        ways.measure(job_for(streams, seed, 1), way)
    for i in range(repetitions):
        job = job_for(streams, seed + i, ROUNDS[streams])
        order = ("engine", "http") if i % 2 else ("http", "engine")
        pair = {way: ways.measure(job, way) for way in order}
        assert pair["engine"].num_tokens == pair["http"].num_tokens
        pairs.append(pair)
    return pairs


def _row(model: str, streams: int, way: str, samples: Sequence[Sample]) -> Row:
    tokens = sum(sample.num_tokens for sample in samples)
    cpu: dict[str, float] = {}
    for sample in samples:
        for role, spent in sample.cpu_s.items():
            cpu[role] = cpu.get(role, 0.0) + spent
    return {
        "model": model,
        "streams": streams,
        "through": way,
        "requests": sum(len(sample.report.requests) for sample in samples),
        "output_tokens": MAX_TOKENS,
        "ttft_ms": round(statistics.median(sample.ttft_ms for sample in samples), 2),
        "tpot_ms": round(statistics.median(sample.tpot_ms for sample in samples), 3),
        "tokens_per_s": round(statistics.median(sample.tokens_per_s for sample in samples), 1),
        "cpu_us_per_token": ", ".join(f"{role} {1e6 * spent / tokens:.0f}" for role, spent in sorted(cpu.items())),
    }


def _targets(model: str, streams: int, pairs: Sequence[dict[str, Sample]]) -> list[Target]:
    def median(figure: Any) -> float:
        return statistics.median(figure(pair["http"], pair["engine"]) for pair in pairs)

    if streams == 8:
        share = median(lambda http, engine: http.tokens_per_s / engine.tokens_per_s)
        name = f"{model}, 8 streams: tokens/s through HTTP over tokens/s of the engine in process"
        return [Target(name, share, at_least=REQUIRED_THROUGHPUT)]
    if streams == 1:
        added = median(lambda http, engine: http.ttft_ms - engine.ttft_ms)
        return [Target(f"{model}, 1 stream: ms of TTFT that serving adds", added, at_most=REQUIRED_TTFT_MS)]
    return []


if __name__ == "__main__":
    sys.exit(run("serving", measure))
