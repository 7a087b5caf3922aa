"""One client for every deployment: over HTTP anywhere, or through Ray inside the cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from ..api.generation import Generation

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or the messages of a chat (each with ``role`` and ``content``)."""


class TextStream(Protocol):
    """Text as it is generated; close it to abort the request. Also a context manager, which closes."""

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def __enter__(self) -> TextStream: ...

    def __exit__(self, *exc: object) -> None: ...

    @property
    def generation(self) -> Generation:
        """The whole; raises ``RuntimeError`` until the last piece of text has been read."""
        ...

    def close(self) -> None:
        """Stop reading; the server aborts the request if it still runs."""
        ...


class AsyncTextStream(Protocol):
    """`TextStream` for asyncio."""

    def __aiter__(self) -> AsyncIterator[str]: ...

    async def __anext__(self) -> str: ...

    async def __aenter__(self) -> AsyncTextStream: ...

    async def __aexit__(self, *exc: object) -> None: ...

    @property
    def generation(self) -> Generation:
        """The whole; raises ``RuntimeError`` until the last piece of text has been read."""
        ...

    async def aclose(self) -> None:
        """Stop reading; the server aborts the request if it still runs."""
        ...


class Client(Protocol):
    """What can be asked of a deployment. Keyword arguments are the fields of `SamplingParams`, and three more.

    ``speculation``: a mapping of ``mode`` (auto, off, fixed) and ``max_draft_len``, within what the server allows;
    ``prediction``: the output that is expected, as text or in OpenAI's form, to draft from. Neither changes the output.
    ``expert_budget``: off, for exact answers of a server that has a budget of experts, or auto.

    ``max_tokens`` defaults as in the HTTP API: 16 for text and token ids, the rest of ``max_model_len`` for a chat.
    Raises ``ValueError`` naming the field the server refuses, ``EngineDeadError`` if the engine cannot serve,
    ``QueueFullError`` if too many requests wait, ``ConnectionError`` if nobody answers, or somebody who is no Penstock
    server, ``TimeoutError`` if the answer is not complete in time and ``RequestFailedError`` if the server failed.
    """

    def generate(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Generate one output."""
        ...

    def generate_many(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Generation]:
        """Generate ``n`` outputs (1 unless given) of each prompt, side by side; the first prompt's come first."""
        ...

    def stream(self, prompt: Prompt, **sampling: Any) -> TextStream:
        """Generate one output piece by piece."""
        ...

    def stats(self) -> dict[str, float]:
        """Return metrics by name, labels included (``metrics.engine_samples``)."""
        ...

    def models(self) -> list[str]:
        """Return the names of the models served."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...

    async def agenerate(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Generate one output."""
        ...

    async def agenerate_many(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Generation]:
        """Generate ``n`` outputs (1 unless given) of each prompt, side by side; the first prompt's come first."""
        ...

    def astream(self, prompt: Prompt, **sampling: Any) -> AsyncTextStream:
        """Generate one output piece by piece."""
        ...

    async def astats(self) -> dict[str, float]:
        """Return metrics by name, labels included."""
        ...

    async def amodels(self) -> list[str]:
        """Return the names of the models served."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...
