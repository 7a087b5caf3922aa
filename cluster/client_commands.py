"""The commands that ask a server: `penstock generate`, `penstock stats`, `penstock events`, `penstock bench serve`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from .. import demo
from .config import API_KEY_VARIABLE, EngineConfig
from .flags import LocalEngineFlags, SamplingFlags, given

if TYPE_CHECKING:
    from .client.client import Prompt
    from .client.http_client import HttpClient
    from .client.local_client import LocalClient

URL = "http://127.0.0.1:8000"
PROMPTS = Path(demo.__file__).parent / "model" / "prompts.jsonl"
"""Held-out prompts of the demo model; any chat model has an answer to them."""
DEFAULT_STREAMS = (1, 8, 32)
Switch = Annotated[bool, Parameter(negative=(), show_default=False)]
ApiKey = Annotated[str | None, Parameter(env_var=API_KEY_VARIABLE, show_env_var=True)]

bench = App(name="bench", help="Measure a running server.")


def generate(
    prompt: str | None = None,
    /,
    *,
    chat: Switch = False,
    system: str | None = None,
    url: str | None = None,
    model: str | None = None,
    api_key: ApiKey = None,
    local: str | None = None,
    prediction: str | None = None,
    stats: Switch = False,
    as_json: Annotated[Switch, Parameter(name="--json")] = False,
    sampling: Annotated[SamplingFlags, Parameter(name="*")] = SamplingFlags(),  # type: ignore[valid-type]  # noqa: B008
    engine: Annotated[LocalEngineFlags, Parameter(name="*")] = LocalEngineFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Continue PROMPT, or answer it with --chat, and write the text as it comes.

    Without --max-tokens a text is continued by 16 tokens, and an answer is as long as the model makes it.

    Parameters
    ----------
    prompt
        The text; standard input, less its last newline, when absent. With --chat on a terminal, absent: a
        conversation, one line a turn, until Ctrl-D.
    chat
        The prompt is a user's turn: the model's chat template is applied.
    system
        System message of the chat.
    url
        The server. [default: http://127.0.0.1:8000]
    model
        Which of the server's models; the first it lists when absent.
    api_key
        Key to send to the server.
    local
        Load this directory or Hugging Face hub id in this process instead of asking a server.
    prediction
        What the answer is likely to be, such as the text that it edits: drafts are taken from it, and change no token.
    stats
        Write what the answer took to standard error.
    as_json
        Write one JSON object when the answer is complete: text, counts, statistics.
    """
    from .client.terminal import opening

    if system is not None and not chat:
        raise ValueError("system: only with chat")
    is_conversation = chat and prompt is None and sys.stdin.isatty()
    if is_conversation and as_json:
        raise ValueError("json: not in a conversation; give the prompt as an argument or on standard input")
    params = given(sampling)
    if prediction is not None:
        params["prediction"] = prediction
    with closing(_client(url, model, api_key, local, given(engine))) as client:
        if is_conversation:
            _converse(client, system, params, stats=stats)
            return
        text = _read(prompt)
        request: Any = [*opening(system), {"role": "user", "content": text}] if chat else text
        _answer(client, request, params, stats=stats, as_json=as_json)


def _client(
    url: str | None, model: str | None, api_key: str | None, local: str | None, engine: dict[str, Any]
) -> HttpClient | LocalClient:
    if local is None:
        for name in engine:
            raise ValueError(f"{name}: only with local; a server has its own")
        return _server(url or URL, api_key, model)
    for name, value in (("url", url), ("model", model)):
        if value is not None:
            raise ValueError(f"{name}: not together with local, which asks no server")
    from .client.local_client import LocalClient

    return LocalClient(EngineConfig.from_mapping({"model": local, **engine}))


def _server(url: str, api_key: str | None, model: str | None = None) -> HttpClient:
    from .client.http_client import HttpClient

    if "://" not in url:
        raise ValueError(f"url: {url!r} names no protocol; http://{url} does")
    return HttpClient(url, model=model, api_key=api_key)


def _read(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise ValueError("prompt: missing; give it as an argument or on standard input")
    return sys.stdin.read().removesuffix("\n")


def _answer(
    client: HttpClient | LocalClient, prompt: Prompt, params: dict[str, Any], *, stats: bool, as_json: bool
) -> None:
    from .client.terminal import account, write_answer

    generation = write_answer(client, prompt, params, io.StringIO() if as_json else sys.stdout)
    if as_json:
        record = {name: value for name, value in asdict(generation).items() if value is not None}
        print(json.dumps(record, ensure_ascii=False))
    if stats:
        print(account(generation), file=sys.stderr)


def _converse(client: HttpClient | LocalClient, system: str | None, params: dict[str, Any], *, stats: bool) -> None:
    from .client.terminal import account, converse

    for generation in converse(client, _questions(), system, params, sys.stdout):
        if stats:
            print(account(generation), file=sys.stderr)


def _questions() -> Iterator[str]:
    """Yield the lines that are typed, empty ones left out, until the end of input."""
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def stats(
    *,
    url: str = URL,
    api_key: ApiKey = None,
    as_json: Annotated[Switch, Parameter(name="--json")] = False,
) -> None:
    """Show what a running server serves and how it is doing.

    Parameters
    ----------
    url
        The server.
    api_key
        Key to send to the server.
    as_json
        Write one JSON object: models, metrics by name, quantiles of the latencies.
    """
    from .client.server_stats import ServerStats

    with closing(_server(url, api_key)) as client:
        found = ServerStats.read(client)
    if as_json:
        print(json.dumps(found.as_json(), ensure_ascii=False))
        return
    lines = found.lines()
    width = max(len(what) for what, _ in lines)
    for what, figure in lines:
        print(f"{what:<{width}}  {figure}")


def events(
    *,
    url: str = URL,
    api_key: ApiKey = None,
    as_json: Annotated[Switch, Parameter(name="--json")] = False,
) -> None:
    """Show what went wrong on a running server and what was done about it, oldest first.

    Parameters
    ----------
    url
        The server.
    api_key
        Key to send to the server.
    as_json
        Write one JSON object a line, with all that is known of each event.
    """
    from .client.event_lines import event_line

    with closing(_server(url, api_key)) as client:
        found = client.events()
    for event in found:
        print(json.dumps(event, ensure_ascii=False) if as_json else event_line(event))


@bench.command(name="serve")
def bench_serve(
    *guidellm: Annotated[str, Parameter(allow_leading_hyphen=True)],
    url: str = URL,
    model: str | None = None,
    prompts: Annotated[Path, Parameter(show_default=False)] = PROMPTS,
    streams: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative=(), show_default=False)] = (),
    rate: Annotated[tuple[float, ...], Parameter(consume_multiple=True, negative=(), show_default=False)] = (),
    num_requests: int = 100,
    max_seconds: float | None = None,
    max_tokens: int | None = 128,
    temperature: float = 0.0,
    ignore_eos: Switch = False,
    seed: int = 0,
    api_key: ApiKey = None,
    output: Path | None = None,
) -> None:
    """Put load on a running server with guidellm and print latencies and throughput.

    Needs `pip install 'penstock[bench]'`.

    Parameters
    ----------
    guidellm
        More options for `guidellm run`, after a lone `--`.
    url
        The server.
    model
        Which of the server's models; the first it lists when absent.
    prompts
        JSONL whose lines have `messages` (a chat) or `prompt` (a text); the demo model's held-out prompts when absent.
    streams
        Concurrent streams; one measurement for each number. [default: 1 8 32]
    rate
        Poisson arrivals a second instead of streams; one measurement for each number.
    num_requests
        Requests of each measurement.
    max_seconds
        End of each measurement, if it comes first.
    max_tokens
        Most tokens of an answer.
    temperature
        Of sampling; 0 is greedy.
    ignore_eos
        Run every answer to max_tokens.
    seed
        Of arrivals and sampling.
    api_key
        Key to send to the server.
    output
        File for guidellm's whole report, as JSON.
    """
    from .client.bench_serve import Load, run

    load = Load(
        url=url,
        model=model,
        prompts=prompts,
        streams=streams or (() if rate else DEFAULT_STREAMS),
        rates=rate,
        num_requests=num_requests,
        max_seconds=max_seconds,
        max_tokens=max_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
        api_key=api_key,
        seed=seed,
    )
    sys.exit(run(load, output, guidellm))
