"""/tokenize and /detokenize, in vLLM's words."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .api_error import ApiError
from .prompts import check_vocabulary, num_chars, run_tokenizer
from .protocol import check_turn
from .request_body import body_schema, read_body
from .serving_state import ServingState, serving

router = APIRouter()


class _Request(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    model: str | None = None


class TokenizeRequest(_Request):
    """The body of POST /tokenize: a prompt or a conversation."""

    prompt: str | None = None
    messages: list[Any] | None = Field(None, description="As in a chat completion; instead of prompt.")
    add_special_tokens: bool | None = Field(None, description="By default those of a prompt are added, not of a chat.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Request):
    """The body of POST /detokenize."""

    tokens: Annotated[list[int], WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}})]


_RequestT = TypeVar("_RequestT", bound=_Request)


@router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Answer the token ids of a prompt or a conversation."""
    state, body = await _read(request, TokenizeRequest)
    if (body.prompt is None) is (body.messages is None):
        raise ApiError(400, "prompt: expected either prompt or messages", param="prompt", code="invalid_value")
    tokenizer = state.tokenizer

    def encode() -> list[int]:
        if body.prompt is not None:
            return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        check_turn(body.add_generation_prompt, body.continue_final_message)
        return tokenizer.encode_chat(
            body.messages or [],
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            add_special_tokens=bool(body.add_special_tokens),
        )

    tokens = await run_tokenizer(encode, num_chars(body.prompt or body.messages))
    texts = [tokenizer.token_texts.to_text(token) for token in tokens] if body.return_token_strs else None
    answer = {"count": len(tokens), "max_model_len": state.max_model_len, "tokens": tokens, "token_strs": texts}
    return JSONResponse(answer)


@router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """Answer the text of some token ids, special tokens written out."""
    state, body = await _read(request, DetokenizeRequest)
    check_vocabulary(state, "tokens", body.tokens)
    prompt = await run_tokenizer(
        lambda: state.tokenizer.decode(body.tokens, skip_special_tokens=False), len(body.tokens)
    )
    return JSONResponse({"prompt": prompt})


async def _read(request: Request, model: type[_RequestT]) -> tuple[ServingState, _RequestT]:
    """Return what is served and the request's body; raise 404 if it names another model."""
    state = serving(request)
    body = await read_body(request, model)
    if body.model is not None:
        state.check_model(body.model)
    return state, body
