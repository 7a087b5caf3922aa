"""Reading JSON bodies by hand, so that every mistake in one gets the API's own error."""

from __future__ import annotations

from typing import Any, TypeVar

import anyio.to_thread
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from .api_error import ApiError
from .serving_state import serving

BodyT = TypeVar("BodyT", bound=BaseModel)

_INLINE_BYTES = 1 << 16
"""Bodies up to this long are parsed on the event loop."""


async def read_body(request: Request, model: type[BodyT]) -> BodyT:
    """Return the request's body; raise 400, 413 or 415 naming what is wrong with it."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"Content-Type: {media_type!r} is not supported; valid: 'application/json'"
        raise ApiError(415, message, param="Content-Type", code="unsupported_media_type")
    limit = serving(request).max_body_bytes
    announced = request.headers.get("content-length", "")
    too_large = ApiError(413, f"body: longer than {limit} bytes (max_body_bytes)", param="body", code="body_too_large")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    try:
        if len(body) <= _INLINE_BYTES:
            return model.model_validate_json(bytes(body))
        return await anyio.to_thread.run_sync(model.model_validate_json, bytes(body))
    except ValidationError as error:
        raise ApiError.from_validation(error) from error


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return what an endpoint adds to its OpenAPI description for a body that `read_body` reads."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
