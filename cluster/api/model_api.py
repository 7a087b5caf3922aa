"""Endpoints that say what is served: the models and the release."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import APIRouter
from openai.types import Model
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ... import __version__
from .serving_state import ServingState, serving

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Answer the served model under each of its names."""
    state = serving(request)
    return JSONResponse({"object": "list", "data": [_card(state, name) for name in state.model_names]})


@router.get("/v1/models/{model_id:path}")
async def retrieve_model(request: Request, model_id: str) -> Response:
    """Answer the model's card, or 404."""
    state = serving(request)
    state.check_model(model_id)
    return JSONResponse(_card(state, model_id))


@router.get("/version")
async def version() -> Response:
    """Answer this release."""
    return JSONResponse({"version": __version__})


def _card(state: ServingState, name: str) -> dict[str, Any]:
    card = Model.construct(
        id=name,
        object="model",
        created=state.created,
        owned_by="penstock",
        root=state.root,
        parent=None,
        max_model_len=state.max_model_len,
        permission=[_permission(state, name)],
        penstock={"expert_budget": state.expert_budget, "lossy": state.expert_budget is not None},
    )
    return card.model_dump(exclude_unset=True)


def _permission(state: ServingState, name: str) -> dict[str, Any]:
    """Return what OpenAI's older clients look for, as vLLM words it: anybody may use the model, nobody train it."""
    return {
        "id": f"modelperm-{hashlib.sha256(name.encode()).hexdigest()[:32]}",
        "object": "model_permission",
        "created": state.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
