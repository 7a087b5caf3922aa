"""How close the choice of a token was: float32 itself may not tell two tokens apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ..kernels.philox import gumbel
from ..workers.sampler import filter_logits
from ..workers.sampling_params import SamplingParams

EXCUSED_GAP = 1e-4


@cache
def _model(directory: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model


@torch.inference_mode()
def gap(directory: Path, text: Sequence[int], num_prompt_tokens: int, sampling: SamplingParams) -> float:
    """Return how far the best token after ``text`` lies before the next, the noise of sampling included."""
    logits = _model(directory)(torch.tensor([list(text)])).logits[:, -1]
    if sampling.temperature > 0:
        assert sampling.seed is not None
        logits = filter_logits(logits, [sampling.token_sampling(num_prompt_tokens, ())])
        logits = logits.log_softmax(dim=-1) + gumbel(sampling.seed, 0, len(text), torch.arange(logits.shape[-1]))
    best, next_best = logits[0].topk(2).values.tolist()
    return float(best - next_best)
