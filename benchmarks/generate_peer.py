"""transformers' `generate` over the very weights of one of our ranks: static cache, compiled where it is on a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .random_model import share_weights
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Generated:
    """One batch."""

    steps_s: list[float]
    """From each output token's logits to the next one's."""
    wall_s: float
    """Prompt and all."""
    token_ids: list[list[int]]


class GeneratePeer:
    """``config``: one that no other model uses. Experts and attention are those that transformers chooses by itself."""

    def __init__(self, config: PreTrainedConfig, owner: PreTrainedModel, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(config, dtype=owner.dtype)
        share_weights(owner, self._model)
        self._model.eval()
        self._model.requires_grad_(False)
        self._device = device

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generated:
        """Serve ``prompts`` as one batch, greedily, padded on the left; each gets ``num_tokens``."""
        from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self._device)
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self._device
        )
        watch = Stopwatch(self._device)

        class Mark(LogitsProcessor):
            def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
                watch.mark()
                return scores

        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=num_tokens,
            cache_implementation="static",
            compile_config=CompileConfig(dynamic=False),  # else code for one batch would make the next one's general
            pad_token_id=0,
            eos_token_id=None,
        )
        started = time.perf_counter()
        output = self._model.generate(
            ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList([Mark()])
        )
        token_ids = output[:, longest:].tolist()
        return Generated(watch.intervals_s(), time.perf_counter() - started, token_ids)
