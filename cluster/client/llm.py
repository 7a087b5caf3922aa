"""The engine as a plain Python object: prompts in, texts out."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...workers.loader import inspect
from ...workers.sampling_params import SamplingParams
from ..api.chat_tokenizer import ChatTokenizer
from ..api.generation import Generation, TokenLogprob
from ..api.text_stream import RequestText
from ..calibration.gate import check_budget_profile
from ..config import EngineConfig
from ..engine.backend import EngineDeadError, RequestTimeoutError
from ..engine.engine import Engine
from ..engine.output import STOP, EngineStats, RequestStats
from ..engine.prompt_check import check_prompt
from ..engine.ranks import Ranks, make_runner, ranks_of
from ..speculation.drafter import drafter_factory
from ..speculation.options import SpeculationOptions
from .request_params import RequestParams

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """What one prompt came to."""

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    """All tokens generated, the one that ended the output included."""
    finish_reason: str
    """stop or length."""
    seed: int | None
    """The seed that repeats this output; None for greedy decoding."""
    stats: RequestStats
    choice: int = 0
    """Which of the prompt's outputs this is."""
    logprobs: list[TokenLogprob] | None = None
    """Of ``token_ids``, if they were asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of ``prompt_token_ids``, if they were asked for."""


def make_ranks(config: EngineConfig) -> Ranks:
    """Return the ranks of an engine without Ray: in this process for one, child processes for more."""
    if config.expert_parallel_size > 1:
        from ..transport.process_ranks import ProcessRanks  # needs zmq, which one rank does not

        # Whoever names the device has them share it, for development (workers/process_group)
        if config.device == "auto" and 0 < torch.cuda.device_count() < config.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size: {config.expert_parallel_size} is not in [1, {torch.cuda.device_count()}], the "
                "GPUs of this machine; device: cpu runs more ranks, device: cuda lets them share GPUs for development"
            )

        return ProcessRanks(config)
    torch.set_num_threads(config.threads_per_rank)
    placement = None
    if config.placement is not None:
        from ..placement_file import placement_of  # needs pydantic

        placement = placement_of(config)
    return ranks_of(make_runner(config, 0, placement))


class LLM:
    """An engine in this process, without Ray. Keyword arguments are those of `EngineConfig`.

    ``expert_parallel_size`` above 1 runs that many child processes. Raises ``ValueError`` naming the field for a
    configuration or checkpoint that cannot be served. Not thread-safe. Close it, or use it in a ``with`` block.
    """

    def __init__(self, model: str, **config: Any) -> None:
        self.config = EngineConfig.from_mapping({"model": model, **config})
        # first: a tokenizer reads config.json too, and would be blamed for it
        inspect(self.config.model, self.config.revision, self.config.max_model_len)
        self.tokenizer = ChatTokenizer(self.config.tokenizer_source, self.config.revision)
        drafter_factory(self.config.drafter)  # refuse an unknown name before anything is loaded
        served = check_budget_profile(self.config)
        self.config = served.config
        ranks = make_ranks(self.config)
        try:
            self._engine = Engine(self.config, ranks, budgets=served.known)
            self._engine.warm_up()
        except BaseException:
            ranks.close()
            raise
        self._is_closed = False

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the ranks; nothing can be generated from then on."""
        self._is_closed = True
        self._engine.ranks.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | None = None,
        *,
        speculation: Mapping[str, Any] | None = None,
        prediction: str | Mapping[str, Any] | None = None,
        expert_budget: str | None = None,
        **params: Any,
    ) -> list[Completion]:
        """Continue each prompt (text, or token ids) and return the results in order: ``n`` of each prompt in turn.

        ``params`` are fields of `SamplingParams`, unless ``sampling`` is given. ``speculation`` (``mode`` and
        ``max_draft_len``) and ``prediction`` (the output that is expected, to draft from) hold for every prompt and
        change no token. ``expert_budget``: ``off`` for exact answers where the engine has a budget. All prompts are
        checked before any is run; ``ValueError`` names the field at fault. Raises ``RequestTimeoutError`` if one takes
        longer than ``request_timeout_s``, ``EngineDeadError`` after `close`.
        """
        if self._is_closed:
            raise EngineDeadError("the engine is closed")
        if sampling is not None and params:
            raise ValueError(f"sampling: given together with {', '.join(sorted(params))}; give one or the other")
        asked = RequestParams.from_kwargs(
            speculation=speculation, prediction=prediction, expert_budget=expert_budget, **params
        )
        token_ids = [self._encode(prompt, i) for i, prompt in enumerate(_as_list(prompts))]
        return self._run(token_ids, sampling or asked.sampling, asked.encode(self.tokenizer))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: SamplingParams | None = None, **params: Any
    ) -> Completion:
        """Write the assistant's next turn of one conversation; with ``n`` above 1, return the first of them.

        Arguments are those of `generate`.
        """
        return self.generate([self.tokenizer.encode_chat(messages)], sampling, **params)[0]

    def stats(self) -> EngineStats:
        """Return the engine's totals."""
        return self._engine.stats()

    def _encode(self, prompt: Prompt, index: int) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        token_ids: list[Any] | None = list(prompt) if isinstance(prompt, Sequence) else None
        if token_ids is None or not all(isinstance(token, int) for token in token_ids):
            raise ValueError(f"prompts[{index}]: expected a string or a list of token ids")
        return token_ids

    def _run(
        self, prompts: list[list[int]], sampling: SamplingParams, speculation: SpeculationOptions
    ) -> list[Completion]:
        for prompt in prompts:
            check_prompt(self._engine.model, prompt, replace(sampling, n=1))
        speculation.check_prediction(self._engine.model.vocab_size, self._engine.model.max_model_len)
        live: dict[str, tuple[list[int], RequestText]] = {}
        done: dict[str, Completion] = {}
        try:
            for prompt in prompts:
                for choice in sampling.with_seed().choices():
                    request_id = uuid.uuid4().hex
                    self._engine.add_request(request_id, prompt, choice, speculation)
                    live[request_id] = prompt, RequestText(self.tokenizer, prompt, choice)
            while len(done) < len(live):
                for output in self._engine.step():
                    if output.error is not None:
                        raise RequestTimeoutError(output.error)
                    prompt, text = live[output.request_id]
                    generation = text.take(output).generation
                    if generation is not None:
                        stats = output.stats or self._engine.abort(output.request_id, STOP)
                        assert stats is not None
                        done[output.request_id] = _completion(prompt, generation, stats)
        finally:
            for request_id in live.keys() - done.keys():
                self._engine.abort(request_id)
        return [done[request_id] for request_id in live]


def _completion(prompt: list[int], generation: Generation, stats: RequestStats) -> Completion:
    assert generation.token_ids is not None
    return Completion(
        prompt,
        generation.text,
        generation.token_ids,
        generation.finish_reason,
        generation.stats.seed,
        # a stop string may have been complete before the last token that the engine counted
        replace(
            stats,
            num_output_tokens=generation.num_output_tokens,
            num_accepted_prediction_tokens=generation.stats.accepted_prediction_tokens,
            num_rejected_prediction_tokens=generation.stats.rejected_prediction_tokens,
        ),
        generation.choice,
        generation.logprobs,
        generation.prompt_logprobs,
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts, whether one or several were given."""
    if isinstance(prompts, str):
        return [prompts]
    # of a mapping the keys would be taken, of a set the order is anyone's
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts: expected a string, a list of token ids or a list of these, got {type(prompts)}")
    if len(prompts) and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
