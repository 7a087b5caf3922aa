"""What goes wrong between the HTTP client and a server, and by which error the user learns of it."""

from __future__ import annotations

import asyncio
import http.server
import json
import socketserver
import threading
from collections.abc import Callable

import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.client.http_client import HttpClient
from penstock.cluster.client.server_stats import ServerStats
from penstock.cluster.engine.backend import EngineDeadError, QueueFullError, RequestTimeoutError

from .scripted_backend import LoopbackServer, ScriptedBackend
from .served_backend import CHAT, MODEL, client, served, server

__all__ = ["client", "server"]


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ("water", {"temperature": 3}, "temperature"),
        ("water", {"frobnicate": 3}, "unknown sampling parameter frobnicate"),
        ("water", {"stop": ("",)}, "stop"),
        ("water", {"max_tokens": 10_000}, "max_tokens"),
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        ([1, "a"], {}, "prompt"),
        ([10**6], {}, "prompt"),
        ({"role": "user"}, {}, "prompt"),
        ([{"role": "bot", "content": "hi"}], {}, r"messages\[0\].role"),
    ],
)
def test_mistakes_are_value_errors_that_name_the_field(
    client: HttpClient, prompt: object, sampling: dict[str, object], field: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: client.generate(prompt, **sampling),  # type: ignore[arg-type]
        lambda: client.stream(prompt, **sampling),  # type: ignore[arg-type]
        lambda: asyncio.run(client.agenerate(prompt, **sampling)),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{field}"):
            call()


def test_unknown_model_is_a_value_error(server: LoopbackServer) -> None:
    client = HttpClient(server.url, model="nope")
    with pytest.raises(ValueError, match=r"^model: 'nope' does not exist"):
        client.generate("water")
    client.close()


def test_a_dead_engine_is_named(client: HttpClient, backend: ScriptedBackend) -> None:
    backend.dead = True
    with pytest.raises(EngineDeadError, match="rank 1 is gone"):
        client.generate("water")
    with pytest.raises(EngineDeadError, match="rank 1 is gone"):
        client.stream("water")
    assert client.stats() == pytest.approx(client.stats(), nan_ok=True)
    assert client.stats()["penstock:engine_up"] == 0.0


def test_overload_is_named_and_says_when_to_come_again(client: HttpClient, backend: ScriptedBackend) -> None:
    backend.fail_at, backend.failure = 0, QueueFullError("64 requests are waiting already", 2.3)
    with pytest.raises(QueueFullError, match="64 requests are waiting") as caught:
        client.generate("water")
    assert caught.value.retry_after_s == 3.0
    backend.failure = RequestTimeoutError("too slow")
    with pytest.raises(TimeoutError, match="too slow"):
        client.generate("water")
    backend.fail_at = 2
    with pytest.raises(TimeoutError, match="too slow"):
        list(client.stream("water", max_tokens=50))


def test_an_engine_that_dies_in_a_stream_is_named(client: HttpClient, backend: ScriptedBackend) -> None:
    backend.fail_at = 2
    stream = client.stream("water", max_tokens=50)
    pieces = []
    with pytest.raises(EngineDeadError, match="rank 1 is gone"):
        pieces.extend(stream)
    with pytest.raises(RuntimeError, match="not been read"):
        _ = stream.generation


def test_a_server_that_goes_away_is_a_connection_error(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    with served(backend, tokenizer) as server:
        client = HttpClient(server.url, max_retries=0)
        client.models()
    with pytest.raises(ConnectionError, match=server.url):
        client.generate("water")
    client.close()


def test_no_answer_in_time_is_a_timeout(server: LoopbackServer, backend: ScriptedBackend) -> None:
    backend.gate = asyncio.Semaphore(0)
    client = HttpClient(server.url, model=MODEL, timeout_s=0.2, max_retries=0)
    with pytest.raises(TimeoutError):
        client.generate("water")
    client.close()


def test_a_stream_cut_short_is_a_connection_error(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    """A proxy may end a stream cleanly before the output is complete."""

    class CutShort(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            chunk = {"id": "x", "object": "text_completion", "created": 1, "choices": [{"index": 0, "text": "a"}]}
            event = f"data: {json.dumps({**chunk, 'model': 'm'})}\n\n".encode()
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + event)

    with socketserver.TCPServer(("127.0.0.1", 0), CutShort) as server:
        threading.Thread(target=server.handle_request).start()
        client = HttpClient(f"http://127.0.0.1:{server.server_address[1]}", model="m", max_retries=0)
        with client.stream("water") as stream:
            assert next(stream) == "a"
            with pytest.raises(ConnectionError, match="before the output was complete"):
                next(stream)
        client.close()


def test_a_connection_lost_in_a_stream_is_a_connection_error() -> None:
    class Lost(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.wfile.write(head + b"ff\r\ndata: {")

    with socketserver.TCPServer(("127.0.0.1", 0), Lost) as server:
        threading.Thread(target=server.handle_request).start()
        client = HttpClient(f"http://127.0.0.1:{server.server_address[1]}", model="m", max_retries=0)
        with client.stream("water") as stream, pytest.raises(ConnectionError):
            next(stream)
        client.close()


class Foreign(http.server.BaseHTTPRequestHandler):
    """Answers every request alike, as something else would that listens on the port."""

    answer = (200, "text/html", b"")

    def do_GET(self) -> None:
        status, media_type, body = self.answer
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    "answer",
    [
        (404, "text/plain", b"Path '/v1/models' not found."),
        (404, "application/json", b'{"detail": "Not Found"}'),
        (500, "text/html", b"<h1>Oops</h1>"),
        (200, "text/html", b"<h1>Welcome</h1>"),
        (200, "application/json", b"[]"),
        (200, "application/json", b'{"data": [1]}'),
        (200, "application/json", b'{"id": "x", "choices": [], "usage": null}'),
    ],
)
def test_a_server_that_is_not_ours_is_a_connection_error(answer: tuple[int, str, bytes]) -> None:
    handler = type("Handler", (Foreign,), {"answer": answer})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        client = HttpClient(f"http://127.0.0.1:{server.server_address[1]}", max_retries=0)
        named = HttpClient(f"http://127.0.0.1:{server.server_address[1]}", max_retries=0, model="m")
        asked: list[Callable[[], object]] = [
            lambda: ServerStats.read(client),
            client.events,
            client.stats,
            client.models,
            lambda: asyncio.run(client.amodels()),
            lambda: client.generate("water"),
            lambda: named.generate("water"),
            lambda: list(named.stream(CHAT)),
        ]
        try:
            for ask in asked:
                with pytest.raises(ConnectionError):
                    ask()
        finally:
            server.shutdown()
            thread.join(30)
            client.close()
            named.close()


@pytest.mark.parametrize(
    ("metrics", "whose"),
    [
        (b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 1.0\n", "its metrics are vllm:..."),
        (b"process_open_fds 12.0\n", "it has none of our metrics"),
    ],
)
def test_metrics_of_another_program_are_no_engine_that_is_down(metrics: bytes, whose: str) -> None:
    class Kin(Foreign):
        def do_GET(self) -> None:
            models = json.dumps({"object": "list", "data": [{"id": "m", "max_model_len": 4096}]}).encode()
            is_metrics = self.path == "/metrics"
            self.answer = (200, "text/plain", metrics) if is_metrics else (200, "application/json", models)
            super().do_GET()

    with http.server.HTTPServer(("127.0.0.1", 0), Kin) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        client = HttpClient(f"http://127.0.0.1:{server.server_address[1]}", max_retries=0)
        asked: list[Callable[[], object]] = [
            lambda: ServerStats.read(client),
            client.stats,
            lambda: asyncio.run(client.astats()),
        ]
        try:
            for ask in asked:
                with pytest.raises(ConnectionError, match=f"is no Penstock server: {whose}$"):
                    ask()
            assert client.models() == ["m"]
        finally:
            server.shutdown()
            thread.join(30)
            client.close()


@pytest.mark.parametrize("address", ["water", "127.0.0.1:8000", "ftp://127.0.0.1:8000", "http://", ""])
def test_what_is_no_address_is_refused_before_it_is_asked(address: str) -> None:
    with pytest.raises(ValueError, match=r"^base_url: "):
        HttpClient(address)
