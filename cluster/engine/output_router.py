"""Sort the outputs of a step to the coroutines that wait for them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from .backend import EngineDeadError, RequestTimeoutError
from .mailbox import Mailbox
from .output import ABORT, STOP, TIMEOUT, RequestOutput


@dataclass(slots=True)
class _Reader:
    """One live request."""

    mailbox: Mailbox = field(default_factory=Mailbox)
    num_received: int = 0
    """Tokens delivered, read or not."""
    reason: str = ABORT
    """What the request counts as if its reader leaves now."""
    failure: Exception | None = None
    """Why no more outputs will come."""
    refused: bool = False
    """The engine did not take the request."""


class OutputRouter:
    """One mailbox per live request. Delivered twice, tokens are dropped; missing ones are an error.

    Belongs to one event loop; ``deliver`` is called on it.
    """

    def __init__(self) -> None:
        self._readers: dict[str, _Reader] = {}

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Hand each output to its reader; those of readers who have gone are dropped."""
        for output in outputs:
            reader = self._readers.get(output.request_id)
            if reader is not None and reader.failure is None:
                _deliver(reader, output)

    def fail_all(self, message: str) -> None:
        """Give every reader an error: no more outputs will come."""
        for reader in self._readers.values():
            _fail(reader, EngineDeadError(message))

    def refuse(self, request_id: str, error: Exception) -> None:
        """Have the request's reader raise ``error``: it was submitted, but not taken."""
        reader = self._readers.get(request_id)
        if reader is not None and reader.failure is None:
            reader.refused = True
            _fail(reader, error)

    def stopped(self, request_id: str) -> None:
        """Have the request end as ``stop`` when its reader leaves, which has found what it looked for."""
        if request_id in self._readers:
            self._readers[request_id].reason = STOP

    async def read(
        self, request_id: str, submit: Callable[[], None], abort: Callable[[str], None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Submit a request and yield its outputs in order, each token once, several steps in one if the reader lags.

        Raises what ``submit`` raises or ``refuse`` is given, ``RequestTimeoutError`` and ``EngineDeadError``. ``abort``
        is called, with what the request counts as, when the reader leaves before the request has ended.
        """
        if request_id in self._readers:
            raise ValueError(f"request_id: {request_id!r} is in use")
        reader = self._readers[request_id] = _Reader()
        ended = True
        try:
            submit()
            ended = False
            while not ended:
                for output in await reader.mailbox.take():
                    ended = output.finish_reason is not None
                    if output.error is None:
                        yield output
                        continue
                    if output.token_ids:
                        yield replace(output, finish_reason=None, error=None)
                    raise (RequestTimeoutError if output.finish_reason == TIMEOUT else EngineDeadError)(output.error)
                if reader.failure is not None:
                    ended = reader.refused
                    raise reader.failure
        finally:
            del self._readers[request_id]
            if not ended:
                with suppress(EngineDeadError):  # then there is nothing to abort
                    abort(reader.reason)


def _deliver(reader: _Reader, output: RequestOutput) -> None:
    if output.offset > reader.num_received:
        lost = f"output tokens {reader.num_received} to {output.offset - 1} were lost"
        _fail(reader, EngineDeadError(lost))
        return
    known = reader.num_received - output.offset
    fresh = output.token_ids[known:]
    if not fresh and output.finish_reason is None:
        return
    logprobs = output.logprobs.cut(known) if output.logprobs is not None else None
    drafts = [draft for draft in output.prediction_drafts if draft.offset >= reader.num_received]
    unread = replace(output, offset=reader.num_received, token_ids=fresh, logprobs=logprobs, prediction_drafts=drafts)
    reader.mailbox.put([unread])
    reader.num_received += len(fresh)


def _fail(reader: _Reader, failure: Exception) -> None:
    reader.failure = failure
    reader.mailbox.wake()
