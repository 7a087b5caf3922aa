"""An engine in this process that streams text as a server does, for callers without an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from ..api.chat_tokenizer import ChatTokenizer
from ..api.generation import Generation
from ..api.text_stream import TextDelta
from ..calibration.gate import check_budget_profile
from ..config import EngineConfig
from ..engine.async_engine import AsyncEngine
from ..engine.engine import Engine
from ..speculation.drafter import drafter_factory
from .client import Prompt
from .llm import make_ranks
from .prompt_stream import stream_prompt


class LocalClient:
    """Loads ``config``'s model and streams answers one at a time. Close it, or use it in a ``with`` block.

    Raises ``ValueError`` naming the field for a configuration or checkpoint that cannot be served. Must be used from
    one thread, without a running event loop.
    """

    def __init__(self, config: EngineConfig) -> None:
        drafter_factory(config.drafter)  # refuse an unknown name before anything is loaded
        served = check_budget_profile(config)
        config = served.config
        self._tokenizer = ChatTokenizer(config.tokenizer_source, config.revision)
        ranks = make_ranks(config)
        try:
            engine = Engine(config, ranks, budgets=served.known)
            engine.warm_up()
        except BaseException:
            ranks.close()
            raise
        self._max_model_len = engine.model.max_model_len
        self._runner = asyncio.Runner()
        self._backend = self._runner.run(_started(engine))

    def __enter__(self) -> LocalClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(self, prompt: Prompt, **sampling: Any) -> LocalTextStream:
        """Generate one output piece by piece; arguments as in `Client.stream`."""
        deltas = stream_prompt(self._backend, self._tokenizer, self._max_model_len, prompt, sampling)
        return LocalTextStream(self._runner, deltas)

    def close(self) -> None:
        """Stop the engine and let go of the ranks."""
        self._runner.run(self._backend.close())
        self._runner.close()


class LocalTextStream:
    """A `TextStream` from an engine in this process, which steps while it is read and while nobody reads."""

    def __init__(self, runner: asyncio.Runner, deltas: AsyncGenerator[TextDelta, None]) -> None:
        self._runner = runner
        self._deltas = deltas
        self._generation: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while (delta := self._runner.run(_next(self._deltas))) is not None:
            self._generation = delta.generation
            if delta.text:
                return delta.text
        raise StopIteration

    def __enter__(self) -> LocalTextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def generation(self) -> Generation:
        """The whole; raises ``RuntimeError`` until the last piece of text has been read."""
        if self._generation is None:
            raise RuntimeError("the stream has not been read to its end")
        return self._generation

    def close(self) -> None:
        """Stop reading; the request is aborted if it still runs."""
        self._runner.run(self._deltas.aclose())


async def _started(engine: Engine) -> AsyncEngine:
    return AsyncEngine(engine)


async def _next(deltas: AsyncGenerator[TextDelta, None]) -> TextDelta | None:
    return await anext(deltas, None)
