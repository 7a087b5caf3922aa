"""The response bodies of the OpenAI API, built from the openai package's own types."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any, Protocol

from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import BaseModel

from .generation import Generation


class ResponseFormat(Protocol):
    """How one request is answered: all methods return JSON."""

    def whole(self, generation: Generation) -> str:
        """Return the body of an answer that is not streamed."""
        ...

    def opening(self) -> list[str]:
        """Return the chunks that precede the text."""
        ...

    def delta(self, text: str) -> str:
        """Return a chunk of text."""
        ...

    def final(self, generation: Generation) -> str:
        """Return the chunk with the finish reason and the statistics."""
        ...

    def usage(self, generation: Generation) -> str:
        """Return the chunk that ``stream_options.include_usage`` asks for."""
        ...


class CompletionFormat:
    """Answers of /v1/completions."""

    def __init__(self, request_id: str, model: str, *, include_usage: bool) -> None:
        self._head: dict[str, Any] = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._pending_usage: dict[str, Any] = {"usage": None} if include_usage else {}
        chunk = Completion.construct(**self._head, choices=[_choice("", None)], **self._pending_usage)
        self._delta = chunk.model_dump(exclude_unset=True, warnings=False)

    def whole(self, generation: Generation) -> str:
        """Return the body of an answer that is not streamed."""
        choice = _choice(generation.text, generation.finish_reason)
        return _json(Completion.construct(**self._head, choices=[choice], **_accounts(generation)))

    def opening(self) -> list[str]:
        """Return the chunks that precede the text: none."""
        return []

    def delta(self, text: str) -> str:
        """Return a chunk of text."""
        # one for nearly every step of every stream: only the text is new
        self._delta["choices"][0]["text"] = text
        return json.dumps(self._delta, ensure_ascii=False)

    def final(self, generation: Generation) -> str:
        """Return the chunk with the finish reason and the statistics."""
        choice = _choice("", generation.finish_reason)
        return _json(
            Completion.construct(
                **self._head, choices=[choice], **self._pending_usage, penstock=asdict(generation.stats)
            )
        )

    def usage(self, generation: Generation) -> str:
        """Return the chunk that ``stream_options.include_usage`` asks for."""
        return _json(Completion.construct(**self._head, choices=[], **_accounts(generation)))


class ChatFormat:
    """Answers of /v1/chat/completions."""

    def __init__(self, request_id: str, model: str, *, include_usage: bool) -> None:
        self._head: dict[str, Any] = {"id": request_id, "created": int(time.time()), "model": model}
        self._pending_usage: dict[str, Any] = {"usage": None} if include_usage else {}
        self._delta = self._chunk(ChoiceDelta.construct(content="")).model_dump(exclude_unset=True)

    def whole(self, generation: Generation) -> str:
        """Return the body of an answer that is not streamed."""
        message = ChatCompletionMessage.construct(role="assistant", content=generation.text, refusal=None)
        choice = ChatChoice.construct(index=0, message=message, logprobs=None, finish_reason=generation.finish_reason)
        return _json(
            ChatCompletion.construct(object="chat.completion", **self._head, choices=[choice], **_accounts(generation))
        )

    def opening(self) -> list[str]:
        """Return the chunks that precede the text: the role."""
        return [_json(self._chunk(ChoiceDelta.construct(role="assistant", content="")))]

    def delta(self, text: str) -> str:
        """Return a chunk of text."""
        # one for nearly every step of every stream: only the text is new
        self._delta["choices"][0]["delta"]["content"] = text
        return json.dumps(self._delta, ensure_ascii=False)

    def final(self, generation: Generation) -> str:
        """Return the chunk with the finish reason and the statistics."""
        return _json(self._chunk(ChoiceDelta.construct(), generation))

    def usage(self, generation: Generation) -> str:
        """Return the chunk that ``stream_options.include_usage`` asks for."""
        return _json(
            ChatCompletionChunk.construct(
                object="chat.completion.chunk", **self._head, choices=[], **_accounts(generation)
            )
        )

    def _chunk(self, delta: ChoiceDelta, generation: Generation | None = None) -> ChatCompletionChunk:
        finish_reason = generation.finish_reason if generation else None
        choice = ChunkChoice.construct(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)
        extra: dict[str, Any] = {"penstock": asdict(generation.stats)} if generation else {}
        return ChatCompletionChunk.construct(
            object="chat.completion.chunk", **self._head, choices=[choice], **self._pending_usage, **extra
        )


def model_card(model_name: str, created: int, max_model_len: int) -> dict[str, Any]:
    """Return what GET /v1/models/{id} says."""
    card = Model.construct(
        id=model_name, object="model", created=created, owned_by="penstock", max_model_len=max_model_len
    )
    return card.model_dump(exclude_unset=True)


def _choice(text: str, finish_reason: str | None) -> CompletionChoice:
    return CompletionChoice.construct(index=0, text=text, logprobs=None, finish_reason=finish_reason)


def _accounts(generation: Generation) -> dict[str, Any]:
    usage = CompletionUsage(
        prompt_tokens=generation.num_prompt_tokens,
        completion_tokens=generation.num_output_tokens,
        total_tokens=generation.num_prompt_tokens + generation.num_output_tokens,
    )
    return {"usage": usage, "penstock": asdict(generation.stats)}


def _json(body: BaseModel) -> str:
    # warnings: a chunk's finish_reason is null until the last, which the completion type does not say
    return body.model_dump_json(exclude_unset=True, warnings=False)
