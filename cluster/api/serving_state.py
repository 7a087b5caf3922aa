"""What the endpoints need of the engine they serve."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.requests import Request

from ... import __version__
from ...router.expert_budget import ExpertBudget
from ..engine.backend import Backend
from .api_error import ApiError
from .chat_tokenizer import ChatTokenizer

_BODY_BYTES_PER_TOKEN = 64
_LEAST_BODY_BYTES, _MOST_BODY_BYTES = 4 << 20, 32 << 20


@dataclass(frozen=True, slots=True)
class ServingState:
    """Set as ``app.state.serving`` once the engine runs; until then the endpoints answer 503."""

    backend: Backend
    tokenizer: ChatTokenizer
    model_names: tuple[str, ...]
    """All of them are the one model; the first is its own."""
    root: str
    """Where the model was loaded from."""
    max_model_len: int
    vocab_size: int
    """Of the model: ids from here on are refused."""
    eos_token_ids: tuple[int, ...]
    system_fingerprint: str
    max_body_bytes: int
    """Longer request bodies are refused unread."""
    expert_budget: str | None
    """The budgets of experts that verifications may keep to, so that answers may be lossy; None for exact answers."""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    async def create(
        cls,
        backend: Backend,
        tokenizer: ChatTokenizer,
        model_names: str | Sequence[str],
        root: str | None = None,
        budgets: Sequence[ExpertBudget] = (),
        max_body_bytes: int | None = None,
    ) -> ServingState:
        """Ask the backend's ranks for the model's limits; ``max_body_bytes`` follows from them when None."""
        names = (model_names,) if isinstance(model_names, str) else tuple(model_names)
        ranks = await backend.ranks()
        model = ranks[0].model
        root = root or names[0]
        acting = [str(budget) for budget in budgets if not budget.is_void(model.num_experts, len(ranks))]
        lossy = " or ".join(acting) or None
        return cls(
            backend,
            tokenizer,
            names,
            root,
            model.max_model_len,
            model.vocab_size,
            tuple(model.eos_token_ids),
            _fingerprint(root, str(model), str(len(ranks)), *filter(None, [lossy])),
            max_body_bytes or default_max_body_bytes(model.max_model_len),
            lossy,
        )

    def check_model(self, name: str) -> None:
        """Raise 404 for a name that is not served."""
        if name not in self.model_names:
            valid = " or ".join(map(repr, self.model_names))
            message = f"model: {name!r} does not exist; valid: {valid}"
            raise ApiError(404, message, param="model", code="model_not_found")


def default_max_body_bytes(max_model_len: int) -> int:
    """Return room for any text that fits, and for a batch of prompts where contexts are short.

    English takes 4 bytes a token, Chinese in JSON's escapes 10. Parsing holds up all else, for some 10 ms a MiB of text
    and 60 of brackets.
    """
    return min(max(_BODY_BYTES_PER_TOKEN * max_model_len, _LEAST_BODY_BYTES), _MOST_BODY_BYTES)


def serving(request: Request) -> ServingState:
    """Return the state of the request's application; raise 503 while there is none."""
    state: ServingState | None = request.app.state.serving
    if state is None:
        raise ApiError(503, "the engine is still starting", code="engine_starting", headers={"Retry-After": "1"})
    return state


def _fingerprint(*what: str) -> str:
    """Return a name for all that decides which tokens a seed gives: release, model, type, ranks and budget."""
    return f"fp_{hashlib.sha256(repr((__version__, *what)).encode()).hexdigest()[:10]}"
