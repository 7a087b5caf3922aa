"""Serve prompts on one rank in this process and keep which experts their rows chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...router.routing_trace import RoutingTrace
from ...workers.plan import StepPlan, StepResult
from ...workers.runner import ModelRunner
from ...workers.sampling_params import SamplingParams
from ...workers.trace_recorder import TraceRecorder
from ..api.chat_tokenizer import ChatTokenizer
from ..config import EngineConfig
from ..engine.engine import Engine
from ..engine.ranks import LocalRanks, make_runner
from .client import Prompt


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one request in one step."""

    request: int
    start: int
    """Position of the first; the others follow it."""
    ids: np.ndarray
    weights: np.ndarray


class TracingRanks(LocalRanks):
    """The only rank, whose rows' experts are kept; for plans without drafts, whose rows follow one another."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__(runner)
        self._recorder = TraceRecorder(runner.info.model.num_moe_layers)
        runner.experts.dispatcher = self._recorder
        self._rows: list[_Rows] = []

    def step(self, plan: StepPlan) -> StepResult:
        """Run the step and keep its rows."""
        result = super().step(plan)
        ids, weights = (kept.numpy() for kept in self._recorder.last_step())
        start = 0
        for request in plan.ranks[0].requests:
            stop = start + len(request.token_ids)
            self._rows.append(_Rows(request.request_id, request.committed_len, ids[start:stop], weights[start:stop]))
            start = stop
        return result

    def trace(self, prompt_lens: Sequence[int]) -> RoutingTrace:
        """Return all rows; ``prompt_lens``: of each request, in the order in which the engine was given them."""
        requests = np.concatenate([np.full(len(rows.ids), rows.request, dtype=np.int32) for rows in self._rows])
        positions = np.concatenate([rows.start + np.arange(len(rows.ids), dtype=np.int32) for rows in self._rows])
        # A request that was preempted computed rows twice
        _, order = np.unique(requests.astype(np.int64) << 32 | positions, return_index=True)
        requests, positions = requests[order], positions[order]
        model = self.infos[0].model
        return RoutingTrace(
            model_type=model.model_type,
            num_experts=model.num_experts,
            ids=np.concatenate([rows.ids for rows in self._rows])[order],
            weights=np.concatenate([rows.weights for rows in self._rows])[order],
            requests=requests,
            positions=positions,
            is_prompt=positions < np.asarray(prompt_lens)[requests],
        )


def trace_routing(
    config: EngineConfig,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    on_done: Callable[[int], None] = lambda num_done: None,
) -> RoutingTrace:
    """Continue every prompt and return the choices of all rows, those of the prompts and of what was generated.

    ``sampling.max_tokens`` yields to the model's longest context. Raises ``ValueError`` naming ``data`` for a prompt
    that cannot be served.
    """
    torch.set_num_threads(config.threads_per_rank)
    tokenizer = ChatTokenizer(config.tokenizer_source, config.revision)
    ranks = TracingRanks(make_runner(config, 0))
    engine = Engine(replace(config, speculation="off"), ranks)
    prompt_lens = []
    for number, prompt in enumerate(prompts):
        try:
            token_ids = _encode(tokenizer, prompt)
            room = max(1, engine.model.max_model_len - len(token_ids))
            limit = min(sampling.max_tokens or room, room)
            engine.add_request(str(number), token_ids, replace(sampling, max_tokens=limit))
        except ValueError as error:
            raise ValueError(f"data: prompt {number + 1}: {error}") from error
        prompt_lens.append(len(token_ids))
    num_done = 0
    while engine.has_requests:
        num_done += sum(output.finish_reason is not None for output in engine.step())
        on_done(num_done)
    return ranks.trace(prompt_lens)


def _encode(tokenizer: ChatTokenizer, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
