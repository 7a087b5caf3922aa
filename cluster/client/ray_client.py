"""A client inside the Ray cluster: a handle to the application's ingress, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError

from ..api.generation import Generation
from ..engine.backend import EngineDeadError, QueueFullError, RequestTimeoutError
from .client import Prompt
from .ray_address import checked_address
from .request_params import RequestParams


class RayClient:
    """A `Client` of the application ``app_name``. ``address``: the Ray cluster's; None for the one we are part of.

    Raises ``ValueError`` for what is no cluster's address, ``ConnectionError`` if there is no such cluster or
    application.
    """

    def __init__(self, address: str | None = None, *, app_name: str = "default") -> None:
        if not ray.is_initialized():
            address = checked_address(address)
            try:
                ray.init(address, log_to_driver=False)
            except ConnectionError as error:
                raise ConnectionError(f"address: no Ray cluster at {address}: {error}") from error
        try:
            self._handle = serve.get_app_handle(app_name)
        except Exception as error:  # Serve raises its own types when it is not running or knows no such application
            raise ConnectionError(f"app_name: no application {app_name!r} in this cluster: {error}") from error

    def generate(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Generate one output."""
        stream = self.stream(prompt, **sampling)
        for _ in stream:
            pass
        return stream.generation

    def generate_many(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Generation]:
        """Generate ``n`` outputs of each prompt, side by side; the first prompt's come first."""
        with ExitStack() as stack:  # if one fails, the others are aborted
            streams = [
                stack.enter_context(RayTextStream(self._send(prompt, params)))
                for prompt, params in _each(prompts, sampling)
            ]
            for stream in streams:
                for _ in stream:
                    pass
        return [stream.generation for stream in streams]

    def stream(self, prompt: Prompt, **sampling: Any) -> RayTextStream:
        """Generate one output piece by piece."""
        return RayTextStream(self._send(prompt, sampling))

    def stats(self) -> dict[str, float]:
        """Return the engine's metrics by name."""
        with _plain_errors():
            return self._handle.stats.remote().result()

    def models(self) -> list[str]:
        """Return the names of the models served."""
        with _plain_errors():
            return self._handle.models.remote().result()

    def close(self) -> None:
        """Nothing is held: the Ray connection belongs to the process."""

    async def agenerate(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Generate one output."""
        stream = self.astream(prompt, **sampling)
        async for _ in stream:
            pass
        return stream.generation

    async def agenerate_many(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Generation]:
        """Generate ``n`` outputs of each prompt, side by side; the first prompt's come first."""
        async with AsyncExitStack() as stack:  # if one fails, the others are aborted
            streams = [
                await stack.enter_async_context(AsyncRayTextStream(self._send(prompt, params)))
                for prompt, params in _each(prompts, sampling)
            ]
            for stream in streams:
                async for _ in stream:
                    pass
        return [stream.generation for stream in streams]

    def astream(self, prompt: Prompt, **sampling: Any) -> AsyncRayTextStream:
        """Generate one output piece by piece."""
        return AsyncRayTextStream(self._send(prompt, sampling))

    async def astats(self) -> dict[str, float]:
        """Return the engine's metrics by name."""
        with _plain_errors():
            return await self._handle.stats.remote()

    async def amodels(self) -> list[str]:
        """Return the names of the models served."""
        with _plain_errors():
            return await self._handle.models.remote()

    async def aclose(self) -> None:
        """Nothing is held."""

    def _send(self, prompt: Prompt, sampling: dict[str, Any]) -> Any:
        if RequestParams.from_kwargs(**sampling).sampling.n > 1:  # refuse before anything travels
            raise ValueError("n: one output is generated; generate_many takes more")
        return self._handle.options(stream=True).stream.remote(prompt, sampling)


def _each(prompts: Sequence[Prompt], sampling: dict[str, Any]) -> list[tuple[Prompt, dict[str, Any]]]:
    """Return a request for each output of each prompt; the outputs of a prompt share a seed."""
    params = RequestParams.from_kwargs(**sampling).sampling
    return [
        (prompt, {**sampling, "n": 1, "choice": choice.choice, "seed": choice.seed})
        for prompt in prompts
        for choice in params.with_seed().choices()
    ]


class _Answer:
    """Gathers what a stream has said."""

    def __init__(self, deltas: Any) -> None:
        self._deltas = deltas
        self._generation: Generation | None = None

    @property
    def generation(self) -> Generation:
        """The whole; raises ``RuntimeError`` until the last piece of text has been read."""
        if self._generation is None:
            raise RuntimeError("the stream has not been read to its end")
        return self._generation


class RayTextStream(_Answer):
    """A `TextStream` through Ray."""

    def __iter__(self) -> RayTextStream:
        return self

    def __next__(self) -> str:
        with _plain_errors():
            for delta in self._deltas:
                self._generation = delta.generation
                if delta.text:
                    return delta.text
        raise StopIteration

    def __enter__(self) -> RayTextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; the request is aborted if it still runs."""
        self._deltas.cancel()


class AsyncRayTextStream(_Answer):
    """An `AsyncTextStream` through Ray."""

    def __aiter__(self) -> AsyncRayTextStream:
        return self

    async def __anext__(self) -> str:
        with _plain_errors():
            async for delta in self._deltas:
                self._generation = delta.generation
                if delta.text:
                    return delta.text
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncRayTextStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop reading; the request is aborted if it still runs."""
        self._deltas.cancel()


@contextmanager
def _plain_errors() -> Any:
    """Raise the deployment's own errors instead of Ray's wrappings."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ValueError | EngineDeadError | QueueFullError | RequestTimeoutError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise EngineDeadError("the ingress is gone; send the request again") from error
