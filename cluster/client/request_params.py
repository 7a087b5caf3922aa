"""The keyword arguments of a request: fields of `SamplingParams`, and what may be said of its verifications."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...workers.sampling_params import SamplingParams
from ..api.chat_tokenizer import ChatTokenizer
from ..api.prediction import encode_prediction, prediction_text
from ..speculation.options import SpeculationOptions


@dataclass(frozen=True, slots=True)
class RequestParams:
    """What a request asks for besides its prompt."""

    sampling: SamplingParams
    speculation: SpeculationOptions
    """Less the tokens of ``prediction``, which only a tokenizer knows."""
    prediction: str

    @classmethod
    def from_kwargs(
        cls,
        *,
        speculation: Mapping[str, Any] | None = None,
        prediction: str | Mapping[str, Any] | None = None,
        expert_budget: str | None = None,
        **sampling: Any,
    ) -> RequestParams:
        """Check them all; ``ValueError`` names the field.

        ``speculation``: ``mode`` and ``max_draft_len`` (`SpeculationOptions`); ``prediction``: the output that is
        expected, as text or in OpenAI's form; ``expert_budget``: ``auto`` or ``off``.
        """
        if speculation is not None and not isinstance(speculation, Mapping):
            raise ValueError(f"speculation: expected a mapping of mode and max_draft_len, got {speculation!r}")
        if prediction is not None and not isinstance(prediction, str | Mapping):
            raise ValueError(f"prediction: expected text or a mapping of type and content, got {prediction!r}")
        text = prediction_text(prediction) if isinstance(prediction, Mapping) else prediction or ""
        options = SpeculationOptions.from_mapping(speculation or {})
        if expert_budget is not None:
            options = replace(options, expert_budget=expert_budget)
        return cls(SamplingParams.from_kwargs(**sampling), options, text)

    def encode(self, tokenizer: ChatTokenizer, max_model_len: int | None = None) -> SpeculationOptions:
        """Return the speculation options with the prediction's tokens."""
        prediction = encode_prediction(tokenizer, self.prediction, max_model_len)
        return replace(self.speculation, prediction_token_ids=prediction)
