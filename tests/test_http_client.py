from __future__ import annotations

import asyncio
import http.server
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.metrics import engine_samples
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.client.connect import connect
from penstock.cluster.client.http_client import HttpClient, _all
from penstock.cluster.client.server_stats import ServerStats
from penstock.cluster.engine.backend import EngineDeadError, QueueFullError, RequestTimeoutError
from penstock.cluster.speculation.options import SpeculationOptions

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


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_address_with_and_without_v1(server: LoopbackServer, suffix: str) -> None:
    client = HttpClient(server.url + suffix)
    assert client.models() == [MODEL]
    assert client.stats()["penstock:engine_up"] == 1.0
    client.close()


def test_generate_takes_every_kind_of_prompt(
    client: HttpClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = tokenizer.encode("the stone ☕")
    for prompt in ["water", tokenizer.encode("water"), CHAT]:
        generation = client.generate(prompt, max_tokens=50)
        assert (generation.text, generation.finish_reason) == ("the stone ☕", "length")
        assert generation.num_output_tokens == len(backend.script)
        expected = tokenizer.encode_chat(CHAT) if prompt is CHAT else tokenizer.encode("water")
        assert generation.num_prompt_tokens == len(expected)
        assert generation.stats.seed == backend.requests[-1].seed


def test_every_sampling_parameter_arrives(client: HttpClient, backend: ScriptedBackend) -> None:
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 3,
        "max_tokens": 4,
        "stop": ("a", "b"),
        "stop_token_ids": (5, 6),
        "ignore_eos": True,
    }
    for prompt in ["water", CHAT]:
        client.generate(prompt, **given)
        assert {name: getattr(backend.requests[-1], name) for name in given} == given


@pytest.mark.parametrize("prompt", ["water", CHAT])
@pytest.mark.parametrize("prediction", ["the stone", {"type": "content", "content": "the stone"}])
def test_what_is_said_of_speculation_arrives(
    client: HttpClient, backend: ScriptedBackend, tokenizer: ChatTokenizer, prompt: Any, prediction: Any
) -> None:
    wish = {"mode": "fixed", "max_draft_len": 2}
    generation = client.generate(prompt, max_tokens=3, speculation=wish, prediction=prediction)
    assert backend.speculation == [SpeculationOptions("fixed", 2, tuple(tokenizer.encode("the stone")))]
    assert (generation.stats.phase, generation.stats.accepted_prediction_tokens) == ("off", 0)
    with client.stream(prompt, max_tokens=3, speculation={"mode": "off"}) as stream:
        list(stream)
    assert backend.speculation[1] == SpeculationOptions("off")
    for name, mistake in (("speculation.mode", {"speculation": {"mode": "x"}}), ("prediction", {"prediction": 5})):
        with pytest.raises(ValueError, match=f"^{name}: "):
            client.generate(prompt, **mistake)


@pytest.mark.parametrize("prompt", ["water", CHAT])
def test_stream_adds_up_to_the_generation(client: HttpClient, backend: ScriptedBackend, prompt: object) -> None:
    whole = client.generate(prompt, max_tokens=30, seed=1)  # type: ignore[arg-type]
    with client.stream(prompt, max_tokens=30, seed=1) as stream:  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="not been read"):
            _ = stream.generation
        pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.generation.text == whole.text
    assert stream.generation == whole


@pytest.mark.parametrize("prompt", ["water", CHAT])
def test_async_twins_say_the_same(client: HttpClient, prompt: object) -> None:
    whole = client.generate(prompt, max_tokens=30, seed=1)  # type: ignore[arg-type]

    async def main() -> None:
        assert await client.amodels() == [MODEL]
        assert await client.agenerate(prompt, max_tokens=30, seed=1) == whole  # type: ignore[arg-type]
        async with client.astream(prompt, max_tokens=30, seed=1) as stream:  # type: ignore[arg-type]
            pieces = [piece async for piece in stream]
        assert "".join(pieces) == whole.text
        assert stream.generation == whole
        assert await client.astats() == client.stats()
        await client.aclose()

    asyncio.run(main())


def test_a_client_outlives_an_event_loop(client: HttpClient) -> None:
    first, second = (asyncio.run(client.agenerate("water", temperature=0)) for _ in range(2))
    assert first.text == second.text


def test_stats_have_the_engines_names(client: HttpClient, backend: ScriptedBackend) -> None:
    stats = client.stats()
    expected = engine_samples(asyncio.run(backend.stats()))
    assert expected['penstock:spec_decode_num_accepted_tokens_per_pos_total{position="0"}'] == 5.0
    assert {name: stats[name] for name in expected} == expected


def test_closing_a_stream_aborts_the_request(
    client: HttpClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    aborted = threading.Event()
    backend.aborted.put_nowait = lambda _: aborted.set()  # type: ignore[method-assign]
    backend.script = tokenizer.encode("turns the wheel")
    backend.gate = asyncio.Semaphore(1)
    with client.stream("water", max_tokens=50) as stream:
        next(stream)
    assert aborted.wait(10)


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


def test_many_outputs_come_prompt_by_prompt(client: HttpClient, tokenizer: ChatTokenizer) -> None:
    texts = ["water", "the stone"]
    for prompts in (texts, [tokenizer.encode(text) for text in texts], [CHAT, CHAT], [CHAT, "water"]):
        outputs = client.generate_many(prompts, n=3, seed=5, max_tokens=9)
        assert [output.choice for output in outputs[:3]] == [0, 1, 2]
        assert len(outputs) == 6
        assert all(output.num_output_tokens == len(output.token_ids or []) == 9 for output in outputs)
        assert len({output.text for output in outputs[:3]}) == 3
        for i, prompt in enumerate(prompts):
            alone = client.generate(prompt, seed=5, max_tokens=9)  # type: ignore[arg-type]
            assert (alone.text, alone.num_prompt_tokens) == (outputs[3 * i].text, outputs[3 * i].num_prompt_tokens)
        assert asyncio.run(many_async(client, prompts)) == [(o.text, o.token_ids) for o in outputs]
    assert client.generate_many([]) == []


async def many_async(client: HttpClient, prompts: list) -> list:
    outputs = await client.agenerate_many(prompts, n=3, seed=5, max_tokens=9)
    await client._client().close()
    return [(output.text, output.token_ids) for output in outputs]


async def test_of_requests_side_by_side_one_that_is_refused_aborts_the_others() -> None:
    sent, aborted = asyncio.Event(), asyncio.Event()

    async def unanswered() -> None:
        sent.set()
        try:
            await asyncio.Event().wait()
        finally:
            aborted.set()

    async def refused() -> None:
        await sent.wait()
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        await _all([unanswered(), refused()])
    await asyncio.wait_for(aborted.wait(), 10)


def test_one_output_is_one(client: HttpClient) -> None:
    for call in (client.generate, client.stream):
        with pytest.raises(ValueError, match=r"^n: one output"):
            call("water", n=2)
    with pytest.raises(ValueError, match=r"^choice: not a field"):
        client.generate("water", choice=1)


@pytest.mark.parametrize("prompt", ["water", CHAT])
def test_logprobs_come_as_words(client: HttpClient, tokenizer: ChatTokenizer, prompt: object) -> None:
    asked = {"max_tokens": 9, "seed": 2, "logprobs": 2}
    whole = client.generate(prompt, **asked, prompt_logprobs=1)  # type: ignore[arg-type]
    assert whole.token_ids is not None
    assert whole.logprobs is not None
    assert [entry.token for entry in whole.logprobs] == [tokenizer.token_texts.to_text(i) for i in whole.token_ids]
    assert [entry.logprob for entry in whole.logprobs] == [-1.0 - i / 1024 for i in whole.token_ids]
    assert [[top.logprob for top in entry.top_logprobs] for entry in whole.logprobs] == [[-0.5, -0.51]] * 9
    assert whole.prompt_logprobs is not None
    first, *others = whole.prompt_logprobs
    assert first.logprob is None
    assert all(entry.logprob == -1.0 - (entry.token_id or 0) / 1024 for entry in others)
    with client.stream(prompt, **asked) as stream:  # type: ignore[arg-type]
        for _ in stream:
            pass
    assert stream.generation.logprobs == whole.logprobs


def test_the_key_is_sent(backend: ScriptedBackend, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(backend, tokenizer, api_key="sesame") as server:
        monkeypatch.delenv("PENSTOCK_API_KEY", raising=False)
        stranger = HttpClient(server.url, max_retries=0)
        with pytest.raises(PermissionError, match="API key"):
            stranger.models()
        assert stranger.stats()["penstock:engine_up"] == 1.0
        given = HttpClient(server.url, api_key="sesame")
        assert given.models() == [MODEL]
        monkeypatch.setenv("PENSTOCK_API_KEY", "sesame")
        found = HttpClient(server.url)
        assert found.generate("water", max_tokens=2).num_output_tokens == 2
        for client in (stranger, given, found):
            client.close()
