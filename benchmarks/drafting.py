"""What drafting and control cost per step, beside the model: thread CPU time on held-out texts of the demo.

Drafters: index the token that came and propose seven more, at 8,192 tokens of context. Controllers, while serving a mix
of texts in batches: `max_draft_lens`, `draft_lens` and `observe` of one step, which ranks wait for; and `learn`, which
is called while they run the next.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.engine.engine import Engine
from ..cluster.speculation.controller import Controller
from ..cluster.speculation.drafter import DraftContext, drafter_factory
from ..cluster.speculation.output_store import OutputStore
from ..demo import prompts
from ..demo.records import FAMILIES
from .decode import DEMO
from .harness import Measurement, Options, Row, Target, quantile, run
from .policy_run import make_engine, serve
from .recorded_ranks import Job
from .speculation import QUICK_TOKENS, Bench, Cell
from .workloads import MIX

CONTEXT_LEN = 8192
NUM_STEPS = 2000
DRAFT_LEN = 7
REQUIRED_US = 50.0
DRAFTERS = ("ngram", "suffix", "prediction")
_WAITED_FOR = ("max_draft_lens", "draft_lens", "observe")
_MEANWHILE = ("learn",)


def text(num_tokens: int, seed: int) -> list[int]:
    """Return held-out records of all families, one after another."""
    tokenizer = ChatTokenizer(str(DEMO))
    records = [record.text for turn in zip(*map(prompts.load, FAMILIES), strict=True) for record in turn]
    tokens = [token for record in records[seed:] + records[:seed] for token in tokenizer.encode(record)]
    return (tokens * (num_tokens // len(tokens) + 1))[:num_tokens]


def draft_us(name: str, tokens: Sequence[int], store: OutputStore) -> list[float]:
    """Return microseconds of each step's indexing and proposal behind the first `CONTEXT_LEN` tokens."""
    context = DraftContext(CONTEXT_LEN, prediction=tokens if name == "prediction" else ())
    drafter = drafter_factory(name)(context, store)
    drafter.extend(tokens[:CONTEXT_LEN])
    drafter.propose(DRAFT_LEN)
    times = []
    for token in tokens[CONTEXT_LEN:]:
        started = time.thread_time()
        drafter.extend([token])
        drafter.propose(DRAFT_LEN)
        times.append(1e6 * (time.thread_time() - started))
    return times


class Timed:
    """A controller whose calls are timed."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self.wants_trials = controller.wants_trials
        self.calls_us: dict[str, list[float]] = {name: [] for name in (*_WAITED_FOR, *_MEANWHILE)}

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._controller, name)
        return self._timed(name, call) if name in self.calls_us else call

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.thread_time()
            answer = call(*arguments)
            self.calls_us[name].append(1e6 * (time.thread_time() - started))
            return answer

        return timed

    def steps_us(self, names: Sequence[str]) -> list[float]:
        """Return microseconds of the calls named, of each step."""
        calls = [self.calls_us[name] for name in names]
        return [sum(step) for step in zip(*calls, strict=True)]


def controlled(bench: Bench, policy: str, batch: int, jobs: Sequence[Job]) -> Timed:
    """Return a policy's controller, timed while it served ``jobs``."""
    ranks = bench.ranks(1, jobs)
    timed = Timed(make_engine(policy, bench.config, ranks, ranks.clock).controller)
    serve(Engine(bench.config, ranks, controller=timed, clock=ranks.clock), jobs, batch)
    return timed


def measure(options: Options) -> Measurement:
    """Time drafters on one text, and controllers on the mix."""
    tokens = text(CONTEXT_LEN + (NUM_STEPS // 4 if options.quick else NUM_STEPS), options.seed)
    store = OutputStore(1 << 16)
    for start in range(0, CONTEXT_LEN, 256):
        store.add(tokens[start : start + 256])
    rows: list[Row] = [_row(name, 1, draft_us(name, tokens, store)) for name in DRAFTERS]
    targets = [
        Target(f"median us of {row['what']} at {CONTEXT_LEN} tokens", float(row["median_us"]), at_most=REQUIRED_US)  # type: ignore[arg-type]
        for row in rows
    ]
    bench = Bench("ngram", options.seed, QUICK_TOKENS)
    for policy in ("cascade", "shadow"):
        for batch in (1, 16):
            cell = Cell(MIX, 128, batch, 1)
            jobs = bench.jobs(cell)
            bench.prepare(jobs)
            timed = controlled(bench, policy, batch, jobs)
            rows.append(_row(policy, batch, timed.steps_us(_WAITED_FOR)))
            rows.append(_row(f"{policy}, learning", batch, timed.steps_us(_MEANWHILE)))
    return Measurement(rows, targets, "none", 1)


def _row(what: str, batch: int, times_us: Sequence[float]) -> Row:
    return {
        "what": what,
        "requests": batch,
        "steps": len(times_us),
        "median_us": statistics.median(times_us),
        "p99_us": quantile(times_us, 0.99),
    }


if __name__ == "__main__":
    sys.exit(run("drafting", measure))
