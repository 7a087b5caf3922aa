"""One policy serving one workload: a closed loop of requests over given ranks, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..cluster.config import EngineConfig
from ..cluster.engine.budget import EngineBudget
from ..cluster.engine.engine import Engine
from ..cluster.engine.ranks import Ranks
from ..cluster.speculation.batch import Batch
from ..cluster.speculation.controller import Controller, RequestReport
from ..cluster.speculation.observation import ShadowTrial, StepObservation
from ..cluster.speculation.proposal import Proposal
from .recorded_ranks import Job

FIXED = tuple(f"fixed {length}" for length in range(1, 8))
TABLE = "table"
POLICIES = ("off", *FIXED, TABLE, "cascade", "shadow")


class TableController:
    """One draft length per batch size, fitted beforehand: what engines with a table by batch do.

    ``lengths``: by number of decoding requests; a number in between takes the next smaller one's.
    """

    wants_trials = False

    def __init__(self, lengths: dict[int, int]) -> None:
        self._lengths = lengths

    def rests(self, batch: Batch) -> bool:
        """Whether no request may draft."""
        return not batch.may_draft

    def max_draft_lens(self, batch: Batch) -> list[int]:
        """Return the table's length for the batch, within each request's limit."""
        if not batch.requests:
            return []
        size = max((n for n in self._lengths if n <= len(batch.requests)), default=min(self._lengths))
        return [min(self._lengths[size], request.max_draft_len) for request in batch.requests]

    def draft_lens(self, batch: Batch, proposals: Sequence[Proposal]) -> list[int]:
        """Return the lengths of the proposals: all of them are verified."""
        return [len(proposal) for proposal in proposals]

    def budget_level(self) -> int:
        """Return the most lenient level: nothing is learned of budgets."""
        return 0

    def reach(self, key: int, proposal: Proposal, length: int) -> list[float]:
        """Return what the drafter's evidence says: nothing is learned here."""
        return proposal.reach(length)

    def observe(self, step: StepObservation) -> None:
        """Nothing is learned."""

    def learn(self, trials: Sequence[ShadowTrial]) -> None:
        """Nothing is learned."""

    def forget(self, key: int) -> None:
        """Nothing is kept."""

    def report(self, key: int) -> RequestReport:
        """Return nothing of interest."""
        return RequestReport(TABLE, 0)


@dataclass(slots=True)
class PolicyRun:
    """What one policy made of some requests."""

    num_tokens: int = 0
    time_s: float = 0.0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_budgeted_steps: int = 0
    outputs: dict[tuple[str, int, str], list[int]] = field(default_factory=dict)
    """By name of the request."""

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second, prompts' steps included."""
        return self.num_tokens / self.time_s


@dataclass(frozen=True, slots=True)
class TracedStep:
    """One step of a request that ran alone."""

    time_s: float
    num_tokens: int
    report: RequestReport
    """What the controller said before the step, which is what it did in it."""
    num_drafted: int
    utility: float | None
    """Of the request up to and with this step."""


def make_engine(
    policy: str,
    config: EngineConfig,
    ranks: Ranks,
    clock: Callable[[], float],
    lengths: dict[int, int] | None = None,
    budgets: Sequence[EngineBudget] = (),
) -> Engine:
    """Return an engine under ``policy``, a name of `POLICIES`; ``lengths``: the table's; ``budgets``: see `Engine`."""
    controller: Controller | None = None
    if policy == TABLE:
        assert lengths is not None
        controller = TableController(lengths)
    elif policy.startswith("fixed "):
        config = replace(config, speculation="fixed", draft_len=int(policy.removeprefix("fixed ")))
    else:
        config = replace(config, speculation=policy)
    return Engine(config, ranks, controller=controller, budgets=budgets, clock=clock)


def serve(engine: Engine, jobs: Sequence[Job], batch_size: int) -> PolicyRun:
    """Serve ``jobs`` in order, ``batch_size`` at once, each followed by the next; time is the engine's clock."""
    run, waiting, started = PolicyRun(), list(reversed(jobs)), engine.clock()
    names: dict[str, tuple[str, int, str]] = {}
    while waiting or engine.has_requests:
        while waiting and len(names) < batch_size:
            job = waiting.pop()
            request_id = "-".join(map(str, job.name))
            names[request_id] = job.name
            engine.add_request(request_id, job.prompt, job.sampling)
        for output in engine.step():
            assert output.error is None, output.error
            run.outputs.setdefault(names[output.request_id], []).extend(output.token_ids)
            run.num_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                assert output.stats is not None
                run.num_drafted += output.stats.num_draft_tokens
                run.num_accepted += output.stats.num_accepted_tokens
                del names[output.request_id]
    run.time_s = engine.clock() - started
    run.num_steps = engine.counters.num_steps
    run.num_budgeted_steps = sum(engine.counters.budget_steps.values())
    return run


def trace(engine: Engine, job: Job) -> Iterator[TracedStep]:
    """Serve one request alone, step by step, from the first after its prompt on."""
    engine.add_request("traced", job.prompt, job.sampling)
    key = 0
    while not any(output.token_ids for output in engine.step()):
        pass
    while engine.has_requests:
        before, started = engine.controller.report(key), engine.clock()
        drafted = engine.counters.num_draft_tokens
        outputs = engine.step()
        if not engine.has_requests:
            return  # the report of a request that ended is gone
        yield TracedStep(
            time_s=engine.clock() - started,
            num_tokens=sum(len(output.token_ids) for output in outputs),
            report=before,
            num_drafted=engine.counters.num_draft_tokens - drafted,
            utility=engine.controller.report(key).utility,
        )
