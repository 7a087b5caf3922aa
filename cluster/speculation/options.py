"""What one request may say about its own speculation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODES = ("auto", "off", "fixed")
BUDGETS = ("auto", "off")
MAX_DRAFT_LEN = 64
"""The largest draft length that anything may ask for."""
_KEYS = ("mode", "max_draft_len")


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """A request's wish. It can only lower what the server allows: a server that is `off` stays off.

    Raises ``ValueError`` naming the field and its valid range.
    """

    mode: str = "auto"
    """auto: the server's controller decides; off: no drafts; fixed: always as many as `max_draft_len` says."""
    max_draft_len: int | None = None
    """Most tokens drafted in one step; the server's limit when absent."""
    prediction_token_ids: tuple[int, ...] = ()
    """Tokens of the request's `prediction` content: drafted from first, where anything is drafted."""
    expert_budget: str = "auto"
    """auto: its verifications keep to the server's budget of experts, if it has one; off: they are exact."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"speculation.mode: {self.mode!r} is not one of {', '.join(MODES)}")
        if self.expert_budget not in BUDGETS:
            raise ValueError(f"expert_budget: {self.expert_budget!r} is not one of {', '.join(BUDGETS)}")
        length = self.max_draft_len
        if length is None:
            return
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= MAX_DRAFT_LEN:
            raise ValueError(f"speculation.max_draft_len: {length!r} is not an integer in [0, {MAX_DRAFT_LEN}]")
        if self.mode == "off" and length:
            raise ValueError(f"speculation.max_draft_len: {length} is not 0, and speculation.mode is off")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SpeculationOptions:
        """Build from ``mode`` and ``max_draft_len``, null being absent; an unknown key is refused."""
        for key in values:
            if key not in _KEYS:
                raise ValueError(f"speculation: unknown key {key!r}; valid: {', '.join(_KEYS)}")
        return cls(**{key: value for key, value in values.items() if value is not None})

    def check_prediction(self, vocab_size: int, max_model_len: int) -> None:
        """Raise ``ValueError`` if the prediction is longer than any output, or not of the model's tokens."""
        if len(self.prediction_token_ids) > max_model_len:
            raise ValueError(
                f"prediction.content: {len(self.prediction_token_ids)} tokens are more than max_model_len, "
                f"{max_model_len}"
            )
        if not all(0 <= token_id < vocab_size for token_id in self.prediction_token_ids):
            raise ValueError(f"prediction.content: token ids must be in [0, {vocab_size - 1}]")

    @property
    def allows_budget(self) -> bool:
        """Whether a budget of experts may act on its verifications."""
        return self.expert_budget == "auto"

    @property
    def is_fixed(self) -> bool:
        """Whether the request overrides the controller with a length of its own."""
        return self.mode == "fixed"

    def limit(self, max_draft_len: int, num_tokens_left: int) -> int:
        """Return the most tokens it may draft now, 0 if none.

        ``max_draft_len``: the server's limit; ``num_tokens_left``: tokens it may still generate, of which every
        step yields one beside the accepted drafts.
        """
        if self.mode == "off":
            return 0
        wanted = max_draft_len if self.max_draft_len is None else min(self.max_draft_len, max_draft_len)
        return max(0, min(wanted, num_tokens_left - 1))


AUTO = SpeculationOptions()
"""Of a request that says nothing."""
