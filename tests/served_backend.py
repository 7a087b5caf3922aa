"""A scripted backend behind HTTP on loopback, and a client of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.client.connect import connect
from penstock.cluster.client.http_client import HttpClient

from .scripted_backend import LoopbackServer, ScriptedBackend

MODEL = "scripted"
CHAT = [{"role": "user", "content": "turn the wheel"}]


@contextmanager
def served(backend: ScriptedBackend, tokenizer: ChatTokenizer, api_key: str | None = None) -> Iterator[LoopbackServer]:
    """Serve from another thread, as a blocking client needs."""
    started = threading.Event()
    state = asyncio.run(ServingState.create(backend, tokenizer, MODEL))
    server = LoopbackServer(create_app(state, api_key=api_key), started.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.run_here()))
    thread.start()
    try:
        assert started.wait(30)
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def server(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> Iterator[LoopbackServer]:
    with served(backend, tokenizer) as running:
        yield running


@pytest.fixture
def client(server: LoopbackServer) -> Iterator[HttpClient]:
    client = connect(server.url, max_retries=0)
    assert isinstance(client, HttpClient)
    yield client
    client.close()
