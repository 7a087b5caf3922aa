"""A deterministic `Backend`, its tokenizer and its server: a state machine whose pace and failures a test decides."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.engine.events import Event, EventLog
from penstock.cluster.engine.histogram import Histogram
from penstock.cluster.engine.latencies import Latencies
from penstock.cluster.engine.layer_totals import LayerTotals
from penstock.cluster.engine.output import ABORT, ERROR, LENGTH, STOP, EngineStats, RequestOutput, RequestStats
from penstock.cluster.speculation.options import AUTO, SpeculationOptions
from penstock.workers.model_info import ModelInfo, RankInfo
from penstock.workers.plan import Logprobs
from penstock.workers.sampling_params import SamplingParams

MAX_MODEL_LEN = 200
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system must come first') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """Return a byte-level BPE whose tokens split characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|eos|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the water turns the wheel, the wheel turns the stone. naïve café ☕ 水車"] * 4, trainer
    )
    return tokenizer


def save_tokenizer(directory: Path, chat_template: str | None = TEMPLATE) -> ChatTokenizer:
    """Write the tokenizer as transformers does, and load it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), eos_token="<|eos|>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return ChatTokenizer(str(directory))


def scripted_logprobs(token_ids: Sequence[int], num_top: int | None) -> Logprobs | None:
    """Return log-probabilities that follow from the token: token 5 is always the likeliest."""
    if num_top is None:
        return None
    top = [5, *range(10, 30)][:num_top]
    return Logprobs(
        [[token, *top] for token in token_ids],
        [[-1.0 - token / 1024, *(-0.5 - i / 100 for i in range(num_top))] for token in token_ids],
        [2 for _ in token_ids],
    )


@dataclass
class ScriptedBackend:
    """Writes ``script`` (token ids), or ids that follow from prompt, seed and position; 1, 2, 3, 1, ... a step."""

    vocab_size: int
    script: list[int] | None = None
    stop_token_id: int | None = None
    """Ends the script as EOS would."""
    gate: asyncio.Semaphore | None = None
    """One permit a step."""
    fail_at: int | None = None
    """Step that raises ``failure`` instead."""
    failure: Exception | str = field(default_factory=lambda: EngineDeadError("rank 1 is gone"))
    """A string is the error of this one request."""
    dead: bool = False
    latencies: Latencies = field(default_factory=Latencies)
    """What it says that its requests took."""
    requests: list[SamplingParams] = field(default_factory=list)
    speculation: list[SpeculationOptions] = field(default_factory=list)
    """Of the same requests."""
    clients: list[str] = field(default_factory=list)
    """Whose they are."""
    started: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    aborted: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """Requests whose iterator was closed before its end."""
    found_stop: list[str] = field(default_factory=list)
    """Requests whose reader said that it found its stop string."""
    unknown_fields: Counter[str] = field(default_factory=Counter)
    past_events: list[Event] = field(default_factory=list)

    def token(self, prompt: Sequence[int], sampling: SamplingParams, position: int) -> int:
        noise = (sampling.seed, sampling.choice) if sampling.temperature else None
        key = f"{list(prompt)} {noise} {position}"
        return 4 + int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % (self.vocab_size - 4)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        speculation: SpeculationOptions = AUTO,
        client: str = "",
    ) -> AsyncIterator[RequestOutput]:
        if self.dead:
            raise EngineDeadError("rank 1 is gone")
        self.requests.append(sampling)
        self.speculation.append(speculation)
        self.clients.append(client)
        self.started.put_nowait(request_id)
        assert sampling.max_tokens is not None
        count = sampling.max_tokens if self.script is None else min(len(self.script), sampling.max_tokens)
        sent = steps = 0
        finished = False
        try:
            while not finished:
                if self.gate is not None:
                    await self.gate.acquire()
                if steps == self.fail_at:
                    finished = True
                    if isinstance(self.failure, Exception):
                        raise self.failure
                    yield RequestOutput(request_id, sent, [], finish_reason=ERROR, error=self.failure)
                    return
                ids = [
                    self.script[i] if self.script is not None else self.token(prompt_token_ids, sampling, i)
                    for i in range(sent, min(sent + 1 + steps % 3, count))
                ]
                steps += 1
                finished = sent + len(ids) == count
                stats = RequestStats(len(prompt_token_ids), count, steps, 2 * steps, steps, 0.25, 0.5, 1.5)
                stopped = self.stop_token_id is not None and ids[-1:] == [self.stop_token_id]
                yield RequestOutput(
                    request_id,
                    sent,
                    ids,
                    finish_reason=None if not finished else STOP if stopped else LENGTH,
                    stop_token_id=self.stop_token_id if stopped else None,
                    stats=stats if finished else None,
                    logprobs=scripted_logprobs(ids, sampling.logprobs),
                    prompt_logprobs=scripted_logprobs(prompt_token_ids[1:], sampling.prompt_logprobs)
                    if sent == 0
                    else None,
                )
                sent += len(ids)
        finally:
            if not finished:
                await asyncio.get_running_loop().run_in_executor(None, lambda: None)  # an abort may have to wait
                self.aborted.put_nowait(request_id)

    def stopped(self, request_id: str) -> None:
        self.found_stop.append(request_id)

    def count_unknown_fields(self, endpoint: str, num_fields: int) -> None:
        self.unknown_fields[endpoint] += num_fields

    async def stats(self) -> dict[str, EngineStats]:
        if self.dead:
            return {}
        fields = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
        known = {
            "num_requests_finished": {STOP: 3, ABORT: 1},
            "spec_decode_num_accepted_tokens_per_pos": [5, 2],
            "num_kv_blocks": 8,
            "num_kv_blocks_used": 2,
            "num_generation_tokens": 77,
            "unknown_request_fields": self.unknown_fields,
            "latencies": self.latencies.snapshot(),
            "spec_decode_draft_len": Histogram([0, 3]).snapshot(),
            "spec_decode_utility": Histogram([1]).snapshot(),
            "spec_decode_phases": {"fixed": 2},
            "budget_steps": {},
            "balance": None,
            "by_rank": LayerTotals(1, 1).by_rank(),
            "by_layer": LayerTotals(1, 1).by_layer(),
            "events": EventLog(self.past_events).totals(),
        }
        return {"g": EngineStats(**{**fields, **known})}  # type: ignore[arg-type]

    async def events(self) -> dict[str, list[Event]]:
        return {"g": list(self.past_events)}

    async def ranks(self) -> list[RankInfo]:
        limits = {"vocab_size": self.vocab_size, "max_model_len": MAX_MODEL_LEN, "eos_token_ids": (0,)}
        model = ModelInfo(**{**dict.fromkeys(ModelInfo.__dataclass_fields__, 0), **limits})  # type: ignore[arg-type]
        return [RankInfo(**{**dict.fromkeys(RankInfo.__dataclass_fields__, 0), "model": model})]  # type: ignore[arg-type]

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDeadError("rank 1 is gone")


class LoopbackServer(uvicorn.Server):
    """uvicorn on a free port of 127.0.0.1; ``on_started`` is called once it accepts connections."""

    def __init__(self, app: FastAPI, on_started: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        self._on_started = on_started
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def run_here(self) -> None:
        await self.serve(sockets=[self.listener])
