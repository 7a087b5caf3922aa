"""What requests ask to be done to logits before a token is chosen: allowed tokens, bias, penalties, late stops.

All of it depends on the text before the token alone, drafts that lead to it included, so a draft changes nothing.

Shapes: S sampled rows, N sampled rows of one request, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .plan import RankPlan, RequestPlan
from .sampling_params import LogitAdjustments


class Texts:
    """Prompt and output of the requests with penalties, kept as block tables are: cut, appended to, forgotten."""

    def __init__(self) -> None:
        self._tokens: dict[int, np.ndarray] = {}

    def update(self, plan: RankPlan, *, new_generation: bool) -> None:
        """Take in what ``plan`` says of its requests' texts."""
        if new_generation:
            self._tokens.clear()
        for request_id in plan.released:
            self._tokens.pop(request_id, None)
        for request in plan.requests:
            if request.text is not None:
                known = self._tokens.get(request.request_id, np.empty(0, dtype=np.int64))
                assert request.text.first_token <= len(known), "a request's first plan carries its whole text"
                new = np.asarray(request.text.new_tokens, dtype=np.int64)
                self._tokens[request.request_id] = np.concatenate([known[: request.text.first_token], new])

    def __getitem__(self, request_id: int) -> np.ndarray:
        return self._tokens[request_id]


def adjust(
    logits: torch.Tensor, requests: Sequence[RequestPlan], positions: Sequence[int], texts: Texts
) -> torch.Tensor:
    """Return ``logits`` [S, V] as the requests want them, in f32; as they are when none wants anything.

    ``positions[s]`` is the absolute position of the token that row s chooses.
    """
    if all(request.sampling.adjustments is None for request in requests):
        return logits
    adjusted = logits.to(torch.float32, copy=True)  # logprobs are of the raw ones
    start = 0
    for request in requests:
        stop = start + request.num_sampled_rows
        if stop > start and (wanted := request.sampling.adjustments) is not None:
            rows = adjusted[start:stop]
            _mask_and_bias(rows, wanted, positions[start:stop])
            if wanted.has_penalties:
                _penalise(rows, wanted, request, texts[request.request_id])
        start = stop
    return adjusted


def _mask_and_bias(rows: torch.Tensor, wanted: LogitAdjustments, positions: Sequence[int]) -> None:
    if wanted.allowed_token_ids:
        allowed = torch.zeros(rows.shape[-1], dtype=torch.bool, device=rows.device)
        allowed[list(wanted.allowed_token_ids)] = True
        rows.masked_fill_(~allowed, -torch.inf)
    for row, position in zip(rows, positions, strict=True):
        if position < wanted.late_from:
            row[list(wanted.late_token_ids)] = -torch.inf
    if wanted.logit_bias:
        ids, biases = zip(*wanted.logit_bias, strict=True)
        rows[:, list(ids)] += torch.tensor(biases, device=rows.device)


def _penalise(rows: torch.Tensor, wanted: LogitAdjustments, request: RequestPlan, text: np.ndarray) -> None:
    """Apply penalties to ``rows`` [N, V] in place. Only the K tokens that stand in the text or the draft change."""
    assert request.text is not None
    seen = np.zeros(rows.shape[-1], dtype=bool)
    seen[text] = True
    seen[request.token_ids[request.first_sampled_row :]] = True
    ids = np.flatnonzero(seen)
    in_output = np.bincount(text[request.text.num_prompt_tokens :], minlength=rows.shape[-1])[ids]
    in_text = np.bincount(text, minlength=rows.shape[-1])[ids]
    in_draft = np.zeros((len(rows), len(ids)), dtype=np.int64)
    for row, ancestors in enumerate(_draft_ancestors(request)):
        np.add.at(in_draft[row], np.searchsorted(ids, ancestors), 1)
    columns = torch.from_numpy(ids).to(rows.device)
    counts = torch.from_numpy(in_output + in_draft).to(rows.device)
    repeated = torch.from_numpy(in_text + in_draft > 0).to(rows.device)
    values = rows[:, columns]
    penalty = wanted.repetition_penalty
    values = torch.where(repeated, torch.where(values > 0, values / penalty, values * penalty), values)
    values -= wanted.frequency_penalty * counts
    values -= wanted.presence_penalty * (counts > 0)
    rows[:, columns] = values


def _draft_ancestors(request: RequestPlan) -> list[list[int]]:
    """Return, for each sampled row, the draft tokens on the way to it, its own included."""
    first = request.first_sampled_row
    paths: list[list[int]] = [[]]
    for row in range(first + 1, len(request.token_ids)):
        paths.append([*paths[request.parents[row] - first], request.token_ids[row]])
    return paths
