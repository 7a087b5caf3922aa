"""One request's text as it is generated: backend and detokenizer put together."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from ...workers.plan import Logprobs
from ...workers.sampling_params import SamplingParams
from ..engine.backend import Backend
from ..engine.output import LENGTH, STOP, PredictionDraft, RequestOutput
from ..speculation.options import AUTO, SpeculationOptions
from .chat_tokenizer import ChatTokenizer
from .generation import Generation, GenerationStats, TokenLogprob
from .token_text import LogprobReader


class RequestFailedError(RuntimeError):
    """The engine gave up on one request; its message says why. Others go on."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Newly generated text, perhaps empty. The last one, and only that, carries the ``generation``."""

    text: str
    num_tokens: int
    """Output tokens so far."""
    generation: Generation | None = None
    token_ids: list[int] = field(default_factory=list)
    """The tokens that are new, be their text shown already or not."""
    logprobs: list[TokenLogprob] | None = None
    """Of ``token_ids``, if they were asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """With the first delta, if they were asked for."""


async def stream_text(
    backend: Backend,
    tokenizer: ChatTokenizer,
    request_id: str,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    speculation: SpeculationOptions = AUTO,
    client: str = "",
) -> AsyncGenerator[TextDelta, None]:
    """Yield a request's text until it ends; close the generator to abort it.

    Draws the seed if sampling needs one and none was given. Raises what ``Backend.generate`` raises, and
    `RequestFailedError` if the request ends any other way than stop or length.
    """
    sampling = sampling.with_seed()
    text = RequestText(tokenizer, prompt_token_ids, sampling)
    outputs = backend.generate(request_id, prompt_token_ids, sampling, speculation, client)
    async with aclosing(outputs):
        async for output in outputs:
            delta = text.take(output)
            if delta.generation is not None:
                if output.finish_reason is None:
                    backend.stopped(request_id)
                break
            yield delta
        else:
            raise RequestFailedError("the engine ended the request without a finish reason")
    # only now: a stop string's request is aborted before its last text is shown
    yield delta


class RequestText:
    """Puts one request's outputs into words, whoever reads them."""

    def __init__(self, tokenizer: ChatTokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        self._tokenizer, self._prompt, self._sampling = tokenizer, prompt_token_ids, sampling
        self._arrived = self._first = self._last = time.perf_counter()
        self._num_steps = self._num_budgeted_rows = 0
        self._num_received = 0
        self._num_accepted_prediction_tokens = self._num_rejected_prediction_tokens = 0
        self._detokenizer = tokenizer.detokenizer(sampling)
        self._reader: LogprobReader | None = None
        if sampling.logprobs is not None:
            self._reader = LogprobReader(tokenizer.token_texts, skip_special_tokens=sampling.skip_special_tokens)
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] | None = None

    def take(self, output: RequestOutput) -> TextDelta:
        """Return what ``output`` adds; the ``generation`` too if it is the last that counts.

        Raises `RequestFailedError` as `stream_text` does.
        """
        if output.offset > self._num_received:
            raise RequestFailedError(f"output tokens {self._num_received} to {output.offset - 1} were lost")
        num_received = self._num_received
        known = num_received - output.offset
        token_ids = output.token_ids[known:]
        self._num_received += len(token_ids)
        if token_ids:
            self._last = time.perf_counter()
            self._first = self._first if self._num_steps else self._last
            self._num_steps += output.num_steps
            self._num_budgeted_rows += output.num_budgeted_rows
        if output.finish_reason not in (None, STOP, LENGTH):
            raise RequestFailedError(output.error or f"the request ended with {output.finish_reason}")
        is_text = output.stop_token_id is None or self._sampling.include_stop_str_in_output
        fed = token_ids if is_text else token_ids[:-1]
        text = self._detokenizer.feed(fed, finished=output.finish_reason is not None)
        num_tokens = self._detokenizer.num_tokens if self._detokenizer.stopped else self._num_received
        # a stop string may have been complete before the last of them
        fresh = token_ids[: len(token_ids) - (self._num_received - num_tokens)]
        self._token_ids += fresh
        self._count_prediction(output.prediction_drafts, num_received, num_tokens)
        logprobs = None
        if self._reader is not None and output.logprobs is not None:
            logprobs = self._reader.read(output.logprobs.cut(known, known + len(fresh)))
            self._logprobs += logprobs
        delta = TextDelta(text, num_tokens, token_ids=fresh, logprobs=logprobs)
        if self._sampling.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = self._read_prompt(output.prompt_logprobs)
            delta = replace(delta, prompt_logprobs=self._prompt_logprobs)
        reason = STOP if self._detokenizer.stopped else output.finish_reason
        return delta if reason is None else replace(delta, generation=self._generation(reason, num_tokens, output))

    def _count_prediction(self, drafts: Sequence[PredictionDraft], start: int, end: int) -> None:
        """Count the drafts of steps whose tokens begin in [start, end); what lies behind ``end`` is rejected."""
        for draft in drafts:
            if start <= draft.offset < end:
                num_accepted = min(draft.num_accepted, end - draft.offset)
                self._num_accepted_prediction_tokens += num_accepted
                self._num_rejected_prediction_tokens += draft.num_drafted - num_accepted

    def _read_prompt(self, logprobs: Logprobs | None) -> list[TokenLogprob]:
        """Return what the prompt's tokens are; the first of them has no log-probability."""
        reader = LogprobReader(self._tokenizer.token_texts, skip_special_tokens=False)
        first = reader.token(self._prompt[0], None, None, [])
        return [first, *(reader.read(logprobs) if logprobs is not None else [])]

    def _generation(self, reason: str, num_tokens: int, output: RequestOutput) -> Generation:
        seed = self._sampling.seed
        predicted = self._num_accepted_prediction_tokens, self._num_rejected_prediction_tokens
        if output.stats is not None:
            stats = GenerationStats.from_request(output.stats, seed, *predicted)
        else:
            ttft_s = self._first - self._arrived
            stats = GenerationStats(
                seed=seed,
                steps=self._num_steps,
                draft_tokens=None,
                accepted_tokens=None,
                acceptance=None,
                mean_draft_len=None,
                phase=None,
                utility=None,
                baseline_s=None,
                accepted_prediction_tokens=predicted[0],
                rejected_prediction_tokens=predicted[1],
                budgeted_rows=self._num_budgeted_rows,
                kept_weight=None,
                lossy=self._num_budgeted_rows > 0,
                tokens_per_s=_rate(num_tokens, ttft_s, self._last - self._arrived),
                ttft_s=ttft_s,
                queue_s=None,
            )
        return Generation(
            self._detokenizer.text,
            len(self._prompt),
            num_tokens,
            reason,
            stats,
            choice=self._sampling.choice,
            token_ids=self._token_ids,
            logprobs=None if self._sampling.logprobs is None else self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )


def _rate(num_tokens: int, ttft_s: float, total_s: float) -> float:
    if num_tokens > 1 and total_s > ttft_s:
        return (num_tokens - 1) / (total_s - ttft_s)
    return num_tokens / total_s if total_s > 0 else 0.0
