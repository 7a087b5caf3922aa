"""What a server's answers come to, read from the openai package's objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..api.generation import Generation, GenerationStats, TokenLogprob


def read_choices(answer: Any, num_top: int) -> list[Generation]:
    """Return the outputs of an answer that was not streamed; ``num_top``: the likeliest tokens that were asked for.

    Raises ``ConnectionError`` if it is not the answer of a Penstock server.
    """
    if not getattr(answer, "choices", None):
        raise ConnectionError("the server is not Penstock: its answer has no choices")
    extra = answer.model_extra or {}
    generations = []
    for number, choice in enumerate(answer.choices):
        own = choice.model_extra or {}
        token_ids = own.get("token_ids") or []
        prompt_ids = own.get("prompt_token_ids") or extra.get("prompt_token_ids") or []
        scored = own.get("prompt_logprobs") or extra.get("prompt_logprobs")
        text = choice.text if hasattr(choice, "text") else choice.message.content
        generations.append(
            Generation(
                text or "",
                len(prompt_ids),
                len(token_ids),
                choice.finish_reason,
                _stats(own if "penstock" in own else extra),
                choice=number,
                token_ids=token_ids,
                logprobs=_logprobs(choice, num_top),
                prompt_logprobs=None if scored is None else _prompt_logprobs(prompt_ids, scored),
            )
        )
    return generations


class StreamedAnswer:
    """What the chunks of a stream of one output add up to."""

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._finish_reason: str | None = None
        self._last: Any = None

    def take(self, chunk: Any) -> str:
        """Return the chunk's text."""
        if chunk.usage is not None:
            self._last = chunk
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self._finish_reason = choice.finish_reason or self._finish_reason
        text: str = (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
        self._text.append(text)
        self._token_ids += (choice.model_extra or {}).get("token_ids") or []
        if (logprobs := _logprobs(choice, self._num_top)) is not None:
            self._logprobs = (self._logprobs or []) + logprobs
        return text

    def check_complete(self) -> None:
        """Raise ``ConnectionError`` if the stream ended too early."""
        if self._finish_reason is None or self._last is None:
            raise ConnectionError("the server ended the stream before the output was complete")

    def generation(self) -> Generation:
        """Return the whole; raise ``RuntimeError`` before it is there."""
        if self._finish_reason is None or self._last is None:
            raise RuntimeError("the stream has not been read to its end")
        usage = self._last.usage
        stats = _stats(self._last.model_extra or {})
        return Generation(
            "".join(self._text),
            usage.prompt_tokens,
            usage.completion_tokens,
            self._finish_reason,
            stats,
            token_ids=self._token_ids,
            logprobs=self._logprobs,
        )


def _stats(extra: dict[str, Any]) -> GenerationStats:
    if "penstock" not in extra:
        raise ConnectionError("the server is not Penstock: its answer has no statistics")
    return GenerationStats(**extra["penstock"])


def _logprobs(choice: Any, num_top: int) -> list[TokenLogprob] | None:
    logprobs = choice.logprobs
    if logprobs is None:
        return None
    if hasattr(logprobs, "content"):
        return [
            TokenLogprob(
                entry.token,
                entry.bytes,
                entry.logprob,
                top_logprobs=[TokenLogprob(top.token, top.bytes, top.logprob) for top in entry.top_logprobs],
            )
            for entry in logprobs.content or []
        ]
    return [
        TokenLogprob(token, None, value, text_offset=offset, top_logprobs=_likeliest(top or {}, num_top))
        for token, value, top, offset in zip(
            logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset, strict=True
        )
    ]


def _likeliest(places: dict[str, float], num_top: int) -> list[TokenLogprob]:
    """Return the ``num_top`` best of a completion's ``top_logprobs``, which has the token itself besides."""
    best = sorted(places.items(), key=lambda place: -place[1])[:num_top]
    return [TokenLogprob(token, None, value) for token, value in best]


def _prompt_logprobs(token_ids: Sequence[int], places: Sequence[dict[str, Any] | None]) -> list[TokenLogprob]:
    result = []
    for token_id, found in zip(token_ids, places, strict=True):
        entries = {
            int(key): TokenLogprob(entry["decoded_token"], None, entry["logprob"], int(key), entry["rank"])
            for key, entry in (found or {}).items()
        }
        own = entries.get(token_id)
        if own is None:
            result.append(TokenLogprob("", None, None, token_id))
            continue
        top = sorted(entries.values(), key=lambda entry: entry.rank or 0)
        result.append(TokenLogprob(own.token, None, own.logprob, token_id, own.rank, top_logprobs=top))
    return result
