"""One streamed chat completion as a client sees it: its tokens, or why there are none."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

COMPLETED, REFUSED, LEFT, LOST = "completed", "refused", "left", "lost"


@dataclass(slots=True)
class Answer:
    """What became of one request."""

    status: int = 0
    """0 if no answer came."""
    retry_after_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    done: bool = False
    """The stream came to its end marker."""
    ttft_s: float | None = None
    error: str | None = None
    left: bool = False
    """The client went away on purpose."""

    @property
    def outcome(self) -> str:
        """Return completed (to the last token), refused (429), left (by the client) or lost (anything else)."""
        if self.left:
            return LEFT
        if self.status == 429:
            return REFUSED
        if self.status == 200 and self.done and self.finish_reason is not None and self.error is None:
            return COMPLETED
        return LOST


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    on_event: Callable[[int], Awaitable[bool]] | None = None,
) -> Answer:
    """Stream one chat completion. ``on_event(number)`` may wait, and returns False to leave."""
    answer = Answer()
    started = time.perf_counter()
    try:
        request = {**body, "stream": True, "return_token_ids": True}
        async with session.post(f"{url}/v1/chat/completions", json=request) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = (await response.text())[:300]
                after = response.headers.get("Retry-After")
                answer.retry_after_s = float(after) if after is not None else None
                return answer
            number = 0
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                answer.ttft_s = answer.ttft_s or time.perf_counter() - started
                _take(answer, line.removeprefix(b"data: ").strip())
                number += 1
                if on_event is not None and not await on_event(number):
                    answer.left = not answer.done
                    return answer
    except (TimeoutError, aiohttp.ClientError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _take(answer: Answer, data: bytes) -> None:
    if data == b"[DONE]":
        answer.done = True
        return
    event = json.loads(data)
    if "error" in event:
        answer.error = event["error"]["message"]
        return
    for choice in event["choices"]:
        answer.token_ids += choice.get("token_ids") or []
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason
