"""The engine in a thread of its own; everybody else talks to it through a queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from ...workers.model_info import RankInfo
from ...workers.sampling_params import SamplingParams
from ..speculation.options import AUTO, SpeculationOptions
from .backend import EngineDeadError
from .engine import Engine
from .events import Event
from .output import ABORT, EngineStats, RequestOutput
from .prompt_check import check_prompt
from .queue_limit import QueueLimit

logger = logging.getLogger(__name__)
T = TypeVar("T")
_IDLE_S = 2.0


class EngineThread:
    """Steps ``engine`` while it has requests. ``deliver`` is called in the thread with every step's outputs.

    With ``overlap`` that waits until the engine's ranks call `meanwhile`, which they must while they run the next step,
    or until there is no next step: then delivering holds up no rank. A first token goes out at once.

    Requests and aborts take effect between steps, in the order in which they came. A request that finds the queue full
    is refused at once; totals are those after the last step and can be read at any time.

    ``tend`` is called in the thread, between steps, when `look_after` asks for it, and every ``idle_s`` while there is
    nothing to step; it may raise ``EngineDeadError``, which ends the engine.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[RequestOutput]], None],
        *,
        overlap: bool = False,
        tend: Callable[[], object] | None = None,
        idle_s: float = _IDLE_S,
    ) -> None:
        self._engine, self._deliver, self._overlap = engine, deliver, overlap
        self._tend, self._idle_s = tend, idle_s if tend is not None else None
        self._outputs: list[RequestOutput] = []
        """Of the last step, to be delivered."""
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._death: str | None = None
        self._limit = QueueLimit(engine.config.max_queued_requests, engine.scheduler.num_open, clock=engine.clock)
        self._num_drained = 0
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="penstock-engine", daemon=True)
        self._thread.start()

    @property
    def infos(self) -> list[RankInfo]:
        """What every rank loaded."""
        return self._engine.ranks.infos

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
        client: str = "",
        *,
        output_token_ids: Sequence[int] = (),
        age_s: float = 0.0,
        was_taken: bool = False,
    ) -> None:
        """Queue a request; raises ``ValueError`` naming the field, ``QueueFullError`` or ``EngineDeadError``.

        ``output_token_ids``: what another engine has generated of it; ``age_s``: how long ago it came. With
        ``was_taken`` another engine had taken it, and it is not refused because many wait.
        """
        self.check_health()
        check_prompt(self._engine.model, prompt_token_ids, sampling)
        speculation.check_prediction(self._engine.model.vocab_size, self._engine.model.max_model_len)
        prompt, arrival_s = list(prompt_token_ids), self._engine.clock() - age_s
        output = list(output_token_ids)
        self._limit.take(always=was_taken)

        def add() -> None:
            try:
                self._engine.add_request(
                    request_id,
                    prompt,
                    sampling,
                    speculation,
                    client=client,
                    arrival_s=arrival_s,
                    output_token_ids=output,
                )
            except ValueError as error:  # all but the id was checked above, and ids are unique to their readers
                logger.error("request dropped: %s", error)
            finally:
                self._limit.seen()

        self._inbox.put(add)

    def abort(self, request_id: str, reason: str = ABORT) -> None:
        """Drop a request; unknown or finished ones are ignored. ``reason``: see ``Engine.abort``."""
        self._inbox.put(lambda: self._engine.abort(request_id, reason))

    def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        """Add to the totals what only a server sees."""
        counts = self._engine.counters.unknown_request_fields
        self._inbox.put(lambda: counts.update({endpoint: num_fields}))

    def stats(self) -> EngineStats:
        """Return the totals after the last step; raises ``EngineDeadError`` if the engine gave up."""
        self.check_health()
        return replace(self._stats, num_requests_refused=self._limit.num_refused)

    def events(self) -> list[Event]:
        """Return the faults and recoveries that are remembered, oldest first; those of a dead engine too."""
        return self._engine.events.events()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run ``function`` in the thread between two steps."""
        future: Future[T] = Future()
        if not self._thread.is_alive():
            future.set_exception(EngineDeadError(self._death or "the engine thread has ended"))
            return future

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def look_after(self) -> None:
        """Have ``tend`` called soon; if a step runs, after that."""
        self._inbox.put(self._tend_once)

    def _tend_once(self) -> None:
        if self._tend is not None and self._death is None:
            self._tend()

    def check_health(self) -> None:
        """Raise ``EngineDeadError`` if the engine gave up."""
        if self._death is not None:
            raise EngineDeadError(self._death)

    def close(self) -> None:
        """Stop after the present step and let go of the ranks."""
        self._death = self._death or "the engine is closed"
        self._inbox.put(None)
        self._thread.join()
        self._engine.ranks.close()

    def _run(self) -> None:
        while True:
            try:
                if not self._drain():
                    return
                if self._death is not None:
                    self._deliver_errors()
                    continue
                outputs = self._engine.step()
                if self._outputs:  # the step ended before the ranks had it
                    self._hand_over()
                self._outputs = outputs
                # A first token does not wait for the next plan
                if not self._overlap or any(output.offset == 0 for output in outputs):
                    self._hand_over()
            except EngineDeadError as error:
                self._die(str(error))
            except Exception as error:  # a bug of ours must not leave clients waiting for ever
                logger.exception("the engine failed")
                self._die(f"{type(error).__name__}: {error}")

    def _drain(self) -> bool:
        """Obey what has come in, waiting for it while there is nothing to step; False when told to stop."""
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                if self._engine.has_requests:
                    return True
                self._hand_over()
                command = self._next()
            if command is None:
                self._hand_over()
                return False
            command()

    def _next(self) -> Callable[[], object] | None:
        try:
            return self._inbox.get(timeout=self._idle_s)
        except queue.Empty:
            return self._tend_once

    def meanwhile(self) -> None:
        """Do what is not to hold up ranks, readers first. Called in the thread, while ranks run a step."""
        self._hand_over()
        self._engine.learn()

    def _hand_over(self) -> None:
        """Publish the totals and deliver the last step's outputs."""
        # In this order, so that whoever has the last token of a request finds it counted
        self._publish()
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            self._deliver(outputs)

    def _publish(self) -> None:
        scheduler = self._engine.scheduler
        num_drained = scheduler.num_admissions - scheduler.num_preemptions - scheduler.num_replays
        self._limit.update(len(scheduler.waiting), scheduler.num_open, num_drained - self._num_drained)
        self._num_drained = num_drained
        self._stats = self._engine.stats()

    def _die(self, message: str) -> None:
        self._death = message
        try:
            self._deliver_errors()
        except Exception:  # the readers' event loop may be gone
            logger.exception("nobody could be told that the engine failed")

    def _deliver_errors(self) -> None:
        if self._outputs:
            self._hand_over()
        self._deliver(self._engine.fail_all(self._death or ""))
