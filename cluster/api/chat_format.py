"""The answers of /v1/chat/completions, in the shapes of the openai package's own types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as ChatChoice

from .generation import Generation, TokenLogprob
from .response_format import AnswerOptions, accounts, own_stats, prompt_logprobs, to_json
from .text_stream import TextDelta


class ChatFormat:
    """A `ResponseFormat`."""

    def __init__(self, options: AnswerOptions) -> None:
        self.options = options
        self._head: dict[str, Any] = {
            "id": options.request_id,
            "created": options.created,
            "model": options.model,
            "system_fingerprint": options.system_fingerprint,
        }
        self._pending_usage: dict[str, Any] = {"usage": None} if options.include_usage else {}
        self._delta = self._chunk(0, {"content": ""})

    def whole(self, generations: Sequence[Generation]) -> str:
        """Return the body of an answer that is not streamed."""
        options = self.options
        extra: dict[str, Any] = {}
        if options.num_prompt_logprobs is not None:
            tokens = generations[0].prompt_logprobs or ()
            extra["prompt_logprobs"] = prompt_logprobs(tokens, options.num_prompt_logprobs)
        if options.return_token_ids:
            extra["prompt_token_ids"] = options.prompts[0].token_ids
        choices = [self._whole_choice(index, generation) for index, generation in enumerate(generations)]
        body = {"object": "chat.completion", **self._head, "choices": choices, **accounts(options, generations)}
        return to_json(ChatCompletion.construct(**body, **extra))

    def opening(self) -> list[str]:
        """Return the chunks that precede the text: each choice's role."""
        delta = {"role": "assistant", "content": ""}
        chunks = [self._chunk(index, delta) for index in range(self.options.num_choices)]
        if self.options.return_token_ids:
            chunks[0]["prompt_token_ids"] = self.options.prompts[0].token_ids
        return [_to_json(chunk) for chunk in chunks]

    def delta(self, index: int, delta: TextDelta) -> str | None:
        """Return a chunk of choice ``index``; None if there is nothing to say."""
        if not delta.text and not delta.logprobs and not (self.options.return_token_ids and delta.token_ids):
            return None
        # one for nearly every step of every stream: little of it is new
        choice = self._delta["choices"][0]
        choice["index"] = index
        choice["delta"]["content"] = delta.text
        choice["logprobs"] = self._logprobs(delta.logprobs)
        if self.options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return _to_json(self._delta)

    def final(self, index: int, generation: Generation) -> str:
        """Return the chunk with a choice's finish reason and statistics."""
        return _to_json(self._chunk(index, {}, generation))

    def usage(self, generations: Sequence[Generation]) -> str:
        """Return the chunk that ``stream_options.include_usage`` asks for."""
        return to_json(
            ChatCompletionChunk.construct(
                object="chat.completion.chunk", **self._head, choices=[], **accounts(self.options, generations)
            )
        )

    def _whole_choice(self, index: int, generation: Generation) -> ChatChoice:
        extra = own_stats(self.options, generation)
        if self.options.return_token_ids:
            extra["token_ids"] = generation.token_ids
        return ChatChoice.construct(
            index=index,
            message=ChatCompletionMessage.construct(role="assistant", content=generation.text, refusal=None),
            logprobs=self._logprobs(generation.logprobs),
            finish_reason=generation.finish_reason,
            **extra,
        )

    def _chunk(self, index: int, delta: dict[str, str], generation: Generation | None = None) -> dict[str, Any]:
        """Return a `ChatCompletionChunk` as a mapping: the first token waits for what the type costs to build."""
        finish_reason = generation.finish_reason if generation else None
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        extra: dict[str, Any] = {"penstock": asdict(generation.stats)} if generation else {}
        return {
            "object": "chat.completion.chunk",
            **self._head,
            "choices": [choice],
            **self._pending_usage,
            **extra,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if self.options.num_logprobs is None or tokens is None:
            return None
        num_top = self.options.num_logprobs
        content = [
            {**_entry(token), "top_logprobs": [_entry(top) for top in token.top_logprobs[:num_top]]} for token in tokens
        ]
        return {"content": content, "refusal": None}


def _to_json(chunk: dict[str, Any]) -> str:
    return json.dumps(chunk, ensure_ascii=False)


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes}
