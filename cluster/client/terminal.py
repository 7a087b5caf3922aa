"""Answers on the terminal: the text on one stream as it comes, what it took on another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TextIO

from ..api.generation import Generation
from .client import Prompt, TextStream


class Streamer(Protocol):
    """What can answer here: `HttpClient`, `LocalClient`."""

    def stream(self, prompt: Prompt, **sampling: Any) -> TextStream:
        """Generate one output piece by piece."""
        ...


def write_answer(client: Streamer, prompt: Prompt, sampling: Mapping[str, Any], out: TextIO) -> Generation:
    """Write one answer to ``out`` piece by piece, end its last line, and return the whole."""
    last = ""
    with client.stream(prompt, **sampling) as stream:
        for last in stream:
            out.write(last)
            out.flush()
    if not last.endswith("\n"):
        out.write("\n")
        out.flush()
    return stream.generation


def converse(
    client: Streamer, questions: Iterable[str], system: str | None, sampling: Mapping[str, Any], out: TextIO
) -> Iterable[Generation]:
    """Answer each question as the next turn of one conversation and yield what it came to."""
    messages = opening(system)
    for question in questions:
        messages.append({"role": "user", "content": question})
        generation = write_answer(client, messages, sampling, out)
        messages.append({"role": "assistant", "content": generation.text})
        yield generation


def opening(system: str | None) -> list[dict[str, str]]:
    """Return the messages a conversation starts with."""
    return [] if system is None else [{"role": "system", "content": system}]


def account(generation: Generation) -> str:
    """Return one line about what a generation took."""
    stats = generation.stats
    parts = [
        f"{generation.num_prompt_tokens} prompt tokens",
        f"{generation.num_output_tokens} output tokens ({generation.finish_reason})",
        f"first after {1e3 * stats.ttft_s:.0f} ms",
        f"{stats.tokens_per_s:.0f} tokens/s",
    ]
    if stats.draft_tokens is not None:
        parts.append(f"{stats.accepted_tokens} of {stats.draft_tokens} draft tokens accepted")
    if predicted := stats.accepted_prediction_tokens + stats.rejected_prediction_tokens:
        parts.append(f"{stats.accepted_prediction_tokens} of {predicted} predicted ones")
    if stats.lossy:
        parts.append(f"lossy: {stats.budgeted_rows} rows kept to a budget of experts")
    if stats.seed is not None:
        parts.append(f"seed {stats.seed}")
    return ", ".join(parts)
