"""One request's text as it is generated: backend and detokenizer put together."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from ...workers.sampling_params import SamplingParams
from ..engine.backend import Backend
from ..engine.output import LENGTH, STOP
from .chat_tokenizer import ChatTokenizer
from .generation import Generation, GenerationStats


class RequestFailedError(RuntimeError):
    """The engine gave up on one request; its message says why. Others go on."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Newly generated text, perhaps empty. The last one, and only that, carries the ``generation``."""

    text: str
    num_tokens: int
    """Output tokens so far."""
    generation: Generation | None = None


async def stream_text(
    backend: Backend,
    tokenizer: ChatTokenizer,
    request_id: str,
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
) -> AsyncGenerator[TextDelta, None]:
    """Yield a request's text until it ends; close the generator to abort it.

    Draws the seed if sampling needs one and none was given. Raises what ``Backend.generate`` raises, and
    `RequestFailedError` if the request ends any other way than stop or length.
    """
    if sampling.seed is None and sampling.temperature > 0:
        sampling = replace(sampling, seed=secrets.randbits(63))
    arrived = time.perf_counter()
    first = last = arrived
    num_steps = 0
    num_received = 0
    detokenizer = tokenizer.detokenizer(sampling.stop)
    outputs = backend.generate(request_id, prompt_token_ids, sampling)
    async with aclosing(outputs):
        async for output in outputs:
            token_ids = output.token_ids[max(num_received - output.offset, 0) :]
            if output.offset > num_received:
                raise RequestFailedError(f"output tokens {num_received} to {output.offset - 1} were lost")
            num_received += len(token_ids)
            if token_ids:
                last = time.perf_counter()
                first = first if num_steps else last
                num_steps += output.num_steps
            if output.finish_reason not in (None, STOP, LENGTH):
                raise RequestFailedError(output.error or f"the request ended with {output.finish_reason}")
            if output.stop_token_id is not None:
                token_ids = token_ids[:-1]
            text = detokenizer.feed(token_ids, finished=output.finish_reason is not None)
            if detokenizer.stopped:
                finish_reason, num_tokens = STOP, detokenizer.num_tokens
                backend.stopped(request_id)
            elif output.finish_reason is not None:
                finish_reason, num_tokens = output.finish_reason, num_received
            else:
                yield TextDelta(text, num_received)
                continue
            stats = (
                GenerationStats.from_request(output.stats, sampling.seed)
                if output.stats is not None
                else GenerationStats(
                    seed=sampling.seed,
                    steps=num_steps,
                    draft_tokens=None,
                    accepted_tokens=None,
                    acceptance=None,
                    tokens_per_s=_rate(num_tokens, first - arrived, last - arrived),
                    ttft_s=first - arrived,
                    queue_s=None,
                )
            )
            generation = Generation(detokenizer.text, len(prompt_token_ids), num_tokens, finish_reason, stats)
            break
        else:
            raise RequestFailedError("the engine ended the request without a finish reason")
    # only now: a stop string's request is aborted before its last text is shown
    yield TextDelta(text, num_tokens, generation)


def _rate(num_tokens: int, ttft_s: float, total_s: float) -> float:
    if num_tokens > 1 and total_s > ttft_s:
        return (num_tokens - 1) / (total_s - ttft_s)
    return num_tokens / total_s if total_s > 0 else 0.0
