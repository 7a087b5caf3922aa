"""A server with a key."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState

from .openai_app import NAMES, client_of, completion
from .scripted_backend import ScriptedBackend


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "sesame"},
        {"Authorization": "Basic sesame"},
        {"Authorization": b"Bearer sesam\xe9"},
        {"X-Api-Key": "sesame"},
    ],
)
async def test_without_the_key_nothing_but_health_and_metrics_answers(
    backend: ScriptedBackend, tokenizer: ChatTokenizer, headers: dict[str, Any]
) -> None:
    app = create_app(await ServingState.create(backend, tokenizer, NAMES), api_key="sesame")
    async with client_of(app, **headers) as http:
        asked = [
            await http.get("/v1/models"),
            await http.get("/version"),
            await http.get("/openapi.json"),
            await http.get("/nowhere"),
            await http.post("/tokenize", json={"prompt": "a"}),
            await http.post("/v1/completions", json={"model": NAMES[0], "prompt": "a"}),
            await http.post("/v1/chat/completions", content=b"not json"),
        ]
        for response in asked:
            assert response.status_code == 401
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert "sesame" not in response.text
            assert response.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in response.headers
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
    assert backend.started.empty()
    async with client_of(app, Authorization="Bearer sesame") as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await completion(http))["choices"][0]["text"]
