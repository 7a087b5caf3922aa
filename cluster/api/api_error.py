"""Errors as the OpenAI API words them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

from pydantic import ValidationError

from ..engine.backend import EngineDeadError, QueueFullError, RequestTimeoutError
from .chat_tokenizer import TooLongError

_FIELD = re.compile(r"([A-Za-z_][\w.\[\]-]*): ")
_MAX_MESSAGE_CHARS = 1000
_TYPES = {408: "timeout_error", 429: "rate_limit_error"}
"""What is not the request's own fault."""

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A refusal or failure with its HTTP status; ``param`` is the request's field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        # a message may quote the request, which may be long
        if len(message) > _MAX_MESSAGE_CHARS:
            message = message[:_MAX_MESSAGE_CHARS] + " ..."
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that the client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def from_value_error(cls, error: ValueError, *, rename: dict[str, str] | None = None) -> ApiError:
        """400. The house's ``ValueError``s start with the field's name; ``rename`` maps it to the request's own."""
        message = str(error)
        match = _FIELD.match(message)
        if match is None:
            return cls(400, message)
        param = (rename or {}).get(match[1], match[1])
        code = "context_length_exceeded" if isinstance(error, TooLongError) else "invalid_value"
        return cls(400, f"{param}: {message[match.end() :]}", param=param, code=code)

    @classmethod
    def from_validation(cls, error: ValidationError) -> ApiError:
        """400 for the first thing wrong with a body."""
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            return cls(400, f"body: {message}", param="body", code="invalid_json")
        param = _path(first["loc"]) or "body"
        return cls(400, f"{param}: {message}", param=param, code="invalid_value")

    @classmethod
    def from_failure(cls, error: Exception) -> ApiError:
        """503, 429 and 408, which clients retry, if the engine cannot serve, now or in time; otherwise 500."""
        if isinstance(error, EngineDeadError):
            return cls(503, str(error), code="engine_dead", headers={"Retry-After": "1"})
        if isinstance(error, QueueFullError):
            retry_after = {"Retry-After": str(math.ceil(error.retry_after_s))}
            return cls(429, str(error), code="queue_full", headers=retry_after)
        if isinstance(error, RequestTimeoutError):
            return cls(408, str(error), code="request_timeout")
        logger.error("internal error", exc_info=error)
        # What comes from another process may be its whole traceback: that is for the log
        lines = str(error).splitlines()
        return cls(500, lines[0] if len(lines) == 1 else type(error).__name__, code="internal_error")


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
