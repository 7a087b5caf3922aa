"""Whether requests are taken: a server that is to stop refuses new ones and ends those that it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..engine.backend import EngineDeadError
from .api_error import ApiError

CLOSED = "the server is stopping; send the request again"
_OPEN_PATHS = ("/metrics", "/events")
_RETRY_AFTER_S = 1


class Admission:
    """The requests that are being answered, until `close` those that come included. Belongs to one event loop."""

    def __init__(self) -> None:
        self.is_closed = False
        self._num_live = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Answer a request; raise ``EngineDeadError`` once closed."""
        if self.is_closed:
            raise EngineDeadError(CLOSED)
        self._num_live += 1
        self._none.clear()
        try:
            yield
        finally:
            self._num_live -= 1
            if not self._num_live:
                self._none.set()

    async def close(self, timeout_s: float) -> int:
        """Take no more; return how many are left when all have ended or ``timeout_s`` has passed."""
        self.is_closed = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._none.wait()
        except TimeoutError:
            return self._num_live
        return 0


class AdmissionMiddleware:
    """Answer 503 once ``admission`` is closed, to health checks too: whoever balances load looks elsewhere."""

    def __init__(self, app: ASGIApp, admission: Admission) -> None:
        self._app, self._admission = app, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
        elif self._admission.is_closed:
            headers = {"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"}
            refusal = ApiError(503, CLOSED, code="shutting_down", headers=headers)
            await JSONResponse(refusal.body, refusal.status, headers=refusal.headers)(scope, receive, send)
        else:
            with self._admission.admitted():
                await self._app(scope, receive, send)
