"""A server that is to stop: it ends what it has and refuses the rest."""

from __future__ import annotations

import asyncio

from penstock.cluster.api.admission import Admission
from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState

from .openai_app import NAMES, client_of, completion
from .scripted_backend import ScriptedBackend


async def test_a_closed_server_ends_its_requests_and_refuses_others(
    backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.gate = asyncio.Semaphore(0)
    admission = Admission()
    app = create_app(await ServingState.create(backend, tokenizer, NAMES), admission=admission)
    async with client_of(app) as http:
        answer = asyncio.create_task(completion(http))
        await backend.started.get()
        assert await admission.close(0.01) == 1, "it goes on when the time is up"
        closing = asyncio.create_task(admission.close(60.0))
        refused = await http.post("/v1/completions", json={"model": NAMES[0], "prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert refused.headers["retry-after"] == "1"
        assert "x-request-id" in refused.headers
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/metrics")).status_code == 200
        assert not closing.done()
        for _ in range(100):
            backend.gate.release()
        assert (await answer)["choices"][0]["text"]
        assert await closing == 0
