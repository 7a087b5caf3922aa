"""The answers of /v1/completions, built from the openai package's own types."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs

from .generation import Generation, TokenLogprob
from .response_format import AnswerOptions, accounts, own_stats, prompt_logprobs, to_json
from .text_stream import TextDelta


class CompletionFormat:
    """A `ResponseFormat`."""

    def __init__(self, options: AnswerOptions) -> None:
        self.options = options
        self._head: dict[str, Any] = {
            "id": options.request_id,
            "object": "text_completion",
            "created": options.created,
            "model": options.model,
            "system_fingerprint": options.system_fingerprint,
        }
        self._pending_usage: dict[str, Any] = {"usage": None} if options.include_usage else {}
        chunk = Completion.construct(**self._head, choices=[self._choice(0, "", None)], **self._pending_usage)
        self._delta = chunk.model_dump(exclude_unset=True, warnings=False)
        self._opened: set[int] = set()

    def whole(self, generations: Sequence[Generation]) -> str:
        """Return the body of an answer that is not streamed."""
        choices = [self._whole_choice(index, generation) for index, generation in enumerate(generations)]
        return to_json(Completion.construct(**self._head, choices=choices, **accounts(self.options, generations)))

    def opening(self) -> list[str]:
        """Return the chunks that precede the text: none."""
        return []

    def delta(self, index: int, delta: TextDelta) -> str | None:
        """Return a chunk of choice ``index``; None if there is nothing to say."""
        options = self.options
        text = delta.text
        before: Sequence[TokenLogprob] = ()
        ids: dict[str, list[int]] = {"token_ids": delta.token_ids} if options.return_token_ids else {}
        if index not in self._opened:
            self._opened.add(index)
            if options.echo:
                text, before = options.prompt(index).text + text, delta.prompt_logprobs or ()
            if options.return_token_ids:
                ids["prompt_token_ids"] = options.prompt(index).token_ids
        logprobs = self._logprobs(index, before, delta.logprobs or ())
        if not text and (logprobs is None or not logprobs["tokens"]) and not any(ids.values()):
            return None
        # one for nearly every step of every stream: little of it is new
        choice = self._delta["choices"][0]
        choice.update(index=index, text=text, logprobs=logprobs, **ids)
        chunk = json.dumps(self._delta, ensure_ascii=False)
        for name in ids:
            del choice[name]
        return chunk

    def final(self, index: int, generation: Generation) -> str:
        """Return the chunk with a choice's finish reason and statistics."""
        choice = self._choice(index, "", generation.finish_reason)
        return to_json(
            Completion.construct(
                **self._head, choices=[choice], **self._pending_usage, penstock=asdict(generation.stats)
            )
        )

    def usage(self, generations: Sequence[Generation]) -> str:
        """Return the chunk that ``stream_options.include_usage`` asks for."""
        return to_json(Completion.construct(**self._head, choices=[], **accounts(self.options, generations)))

    def _whole_choice(self, index: int, generation: Generation) -> CompletionChoice:
        options = self.options
        text = generation.text
        before: Sequence[TokenLogprob] = ()
        if options.echo:
            text, before = options.prompt(index).text + text, generation.prompt_logprobs or ()
        extra = own_stats(options, generation)
        if options.num_prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(generation.prompt_logprobs or (), options.num_prompt_logprobs)
        if options.return_token_ids:
            extra.update(token_ids=generation.token_ids, prompt_token_ids=options.prompt(index).token_ids)
        logprobs = self._logprobs(index, before, generation.logprobs or ())
        return self._choice(index, text, generation.finish_reason, logprobs, **extra)

    def _logprobs(
        self, index: int, prompt: Sequence[TokenLogprob], output: Sequence[TokenLogprob]
    ) -> dict[str, Any] | None:
        """Return what a choice says of the given tokens of its prompt, if it is shown, and of its output."""
        num_top = self.options.num_logprobs
        if num_top is None:
            return None
        tokens = [*prompt, *output]
        output_starts = len(self.options.prompt(index).text) if self.options.echo else 0
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top_logprobs(token, num_top) for token in tokens],
            "text_offset": [
                *(token.text_offset for token in prompt),
                *(output_starts + token.text_offset for token in output),
            ],
        }

    @staticmethod
    def _choice(
        index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None = None, **extra: Any
    ) -> CompletionChoice:
        shown = None if logprobs is None else Logprobs.construct(**logprobs)
        return CompletionChoice.construct(index=index, text=text, logprobs=shown, finish_reason=finish_reason, **extra)


def _top_logprobs(token: TokenLogprob, num_top: int) -> dict[str, float] | None:
    """Return the likeliest tokens and the token itself, as OpenAI does; None for a prompt's first."""
    if token.logprob is None:
        return None
    shown = {token.token: token.logprob}
    for entry in token.top_logprobs[:num_top]:
        if entry.logprob is not None:
            shown.setdefault(entry.token, entry.logprob)
    return shown
