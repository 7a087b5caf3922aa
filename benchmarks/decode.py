"""Decoding on a CPU, beside transformers' `generate` and beside the memory.

The demo model inflated to a real model's experts (bfloat16, 6.3 MB each), one rank, no speculation, the same prompts
and output lengths, all in one run and in turns: our engine with one request and with eight at once; `generate` with
one, with eight one after the other, and with a batch of eight, each with the fastest of its experts implementations;
with ``--vllm PYTHON``, the interpreter of an environment that holds vLLM for CPUs, vLLM too. Times are those of whole
requests, prompts included. Expert bytes are exact counts: the distinct experts of every layer and step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# OpenMP's threads otherwise spin for milliseconds at each barrier, and where another program wants a core they spin
# against the very thread they wait for. The same for all that are compared.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch

from .. import demo
from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.config import EngineConfig
from ..cluster.engine.engine import Engine
from ..cluster.engine.ranks import LocalRanks, make_runner
from ..demo import prompts
from ..demo.inflate import inflate
from ..demo.records import FAMILIES
from ..workers.plan import StepPlan, StepResult
from ..workers.sampling_params import SamplingParams
from .harness import Measurement, Options, Row, Target, run
from .peer_process import PeerProcess

DEMO = Path(demo.__file__).parent / "model"
FACTOR = 128
THREADS = 2
BATCH = 8
MAX_TOKENS = 64
ROUNDS = 7
QUICK_ROUNDS = 3
IMPLEMENTATIONS = ("eager", "grouped_mm")
"""Of transformers' experts. batched_mm is left out, since it copies the experts of every row; the others need a GPU."""
REQUIRED_SINGLE = 1.5
REQUIRED_CONCURRENT = 3.0
REQUIRED_OF_VLLM = 1.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Some prompts served once."""

    wall_s: float
    tokens: int
    experts: int | None = None
    """Distinct experts computed, summed over layers and steps; known of our engine only."""

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of whole requests."""
        return self.tokens / self.wall_s


class CountedRanks(LocalRanks):
    """One rank in this process that adds up the experts it computes."""

    experts = 0

    def step(self, plan: StepPlan) -> StepResult:
        """Run the step and count."""
        result = super().step(plan)
        self.experts += sum(sum(rank.counts.experts) for rank in result.ranks)
        return result


class Penstock:
    """Our engine, in this process."""

    def __init__(self, model: Path) -> None:
        self._config = EngineConfig(
            model=str(model),
            dtype="bfloat16",
            device="cpu",
            num_threads=THREADS,
            draft_len=0,
            max_model_len=1024,
            kv_cache_bytes=64 << 20,
        )
        self._ranks = CountedRanks(make_runner(self._config, 0))
        info = self._ranks.infos[0]
        self.bytes_per_expert = info.expert_bytes // (info.model.num_experts * info.model.num_moe_layers)

    def serve(self, batch: list[list[int]]) -> Timing:
        """Serve all of ``batch`` at once."""
        engine = Engine(self._config, self._ranks)
        sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        self._ranks.experts = 0
        started = time.perf_counter()
        for number, prompt in enumerate(batch):
            engine.add_request(str(number), prompt, sampling)
        tokens = 0
        while engine.has_requests:
            tokens += sum(len(output.token_ids) for output in engine.step())
        return Timing(time.perf_counter() - started, tokens, self._ranks.experts)


class Transformers:
    """transformers' `generate`, in this process."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def fastest(self, batch: list[list[int]]) -> str:
        """Return the experts implementation that serves ``batch`` fastest, judged by a few tokens."""
        times = {}
        for implementation in IMPLEMENTATIONS:
            self.serve(batch, implementation, max_tokens=2)
            times[implementation] = self.serve(batch, implementation, max_tokens=8).wall_s
        return min(times, key=lambda name: times[name])

    @torch.inference_mode()
    def serve(self, batch: list[list[int]], implementation: str, max_tokens: int = MAX_TOKENS) -> Timing:
        """Serve ``batch`` as one, padded on the left."""
        self._model.set_experts_implementation(implementation)
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        started = time.perf_counter()
        self._model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, min_new_tokens=max_tokens
        )
        return Timing(time.perf_counter() - started, max_tokens * len(batch))


def vllm_peer(python: str, model: Path) -> PeerProcess:
    """Return vLLM for CPUs, in a process and an environment of its own; it answers a batch with its `Timing`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    environment.pop("PYTHONPATH", None)
    program = Path(__file__).with_name("vllm_peer.py")
    return PeerProcess([python, str(program), str(model), str(MAX_TOKENS)], environment)


def read_gb_per_s(memory: torch.Tensor) -> float:
    """Return the speed at which all threads read ``memory``, which no cache holds."""
    started = time.perf_counter()
    memory.max()
    return memory.nbytes / (time.perf_counter() - started) / 1e9


def prompt_ids() -> list[list[int]]:
    """Return one held-out prompt for each of the concurrent requests, of all families in turn."""
    tokenizer = ChatTokenizer(str(DEMO))
    records = [record for turn in zip(*map(prompts.load, FAMILIES), strict=True) for record in turn]
    return [
        tokenizer.encode_chat([{"role": "user", "content": record.messages[0].content}]) for record in records[:BATCH]
    ]


def measure(options: Options) -> Measurement:
    """Serve the same prompts in every way, round by round."""
    torch.set_num_threads(THREADS)
    batch = prompt_ids()
    memory = torch.ones(1 << 27, dtype=torch.int32)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = Path(folder) / "inflated"
        inflate(DEMO, model, FACTOR)
        ours, theirs = Penstock(model), Transformers(model)
        alone, together = theirs.fastest(batch[:1]), theirs.fastest(batch)
        ways: dict[str, Callable[[], Timing]] = {
            "penstock, 1 request": lambda: ours.serve(batch[:1]),
            f"transformers ({alone}), 1 request": lambda: theirs.serve(batch[:1], alone),
            "penstock, 8 at once": lambda: ours.serve(batch),
            f"transformers ({alone}), 8 in turn": lambda: _in_turn([theirs.serve([one], alone) for one in batch]),
            f"transformers ({together}), batch of 8": lambda: theirs.serve(batch, together),
        }
        if options.given.vllm:
            vllm = stack.enter_context(vllm_peer(options.given.vllm, model))
            ways |= {
                "vllm, 1 request": lambda: Timing(**vllm.ask(batch[:1])),
                "vllm, 8 at once": lambda: Timing(**vllm.ask(batch)),
            }
        times: dict[str, list[Timing]] = {name: [] for name in ways}
        speeds: list[float] = []
        for way in ways.values():
            way()
        for _ in range(QUICK_ROUNDS if options.quick else ROUNDS):
            speeds.append(read_gb_per_s(memory))
            for name, way in ways.items():
                times[name].append(way())
    rows = [_row(name, taken, ours.bytes_per_expert, statistics.median(speeds)) for name, taken in times.items()]
    return Measurement(rows, _targets(list(times.values())), "bfloat16", THREADS)


def _in_turn(timings: list[Timing]) -> Timing:
    return Timing(sum(t.wall_s for t in timings), sum(t.tokens for t in timings))


def _row(name: str, taken: list[Timing], bytes_per_expert: int, read_speed: float) -> Row:
    experts = taken[0].experts
    wall_s = statistics.median(t.wall_s for t in taken)
    row: Row = {
        "way": name,
        "rounds": len(taken),
        "tokens_per_s": statistics.median(t.tokens_per_s for t in taken),
        "wall_s": wall_s,
        "memory_read_gb_per_s": read_speed,
    }
    if experts is not None:
        row["expert_reads"] = experts
        row["expert_gb_per_s"] = experts * bytes_per_expert / wall_s / 1e9
        row["wall_s_at_memory_speed"] = experts * bytes_per_expert / read_speed / 1e9
    return row


def _targets(times: list[list[Timing]]) -> list[Target]:
    """Compare round by round; what is compared ran within seconds of the other."""
    single, other_single, concurrent, in_turn, batched, *vllm = times
    targets = [
        Target("1 request, over transformers", _ratio(single, other_single), REQUIRED_SINGLE),
        Target("8 at once, over transformers' 8 in turn", _ratio(concurrent, in_turn), REQUIRED_CONCURRENT),
        Target("8 at once, over transformers' batch of 8", _ratio(concurrent, batched), 1.0),
    ]
    if vllm:
        targets += [
            Target("1 request, over vLLM", _ratio(single, vllm[0]), REQUIRED_OF_VLLM),
            Target("8 at once, over vLLM", _ratio(concurrent, vllm[1]), REQUIRED_OF_VLLM),
        ]
    return targets


def _ratio(ours: list[Timing], theirs: list[Timing]) -> float:
    return statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark alone takes."""
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment that holds vLLM for CPUs")


if __name__ == "__main__":
    sys.exit(run("decode", measure, add_options=add_options))
