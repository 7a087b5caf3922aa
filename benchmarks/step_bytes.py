"""The fewest bytes that a step must read, and how long that takes at a GPU's own copy rate: the roofline.

Each weight once, whatever the rows: all that is dense but the embeddings, of which rows read their own; of experts the
distinct ones that were counted; and of the KV pool the contexts, or as much of them as a layer's window shows, latents
where those are kept. What a step writes, and activations, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..workers.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Of one step."""

    dense: int
    experts: int
    kv: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts + self.kv

    def roofline_s(self, gb_per_s: float) -> float:
        """Return the least time that they take."""
        return self.total / gb_per_s / 1e9


class ByteCounter:
    """Counts the steps of one rank."""

    def __init__(self, runner: ModelRunner) -> None:
        info, model = runner.info, runner.model
        embeddings: Any = model.get_input_embeddings().weight
        head: Any = model.get_output_embeddings()
        is_tied = head is not None and head.weight is embeddings
        self._row_bytes = 0 if is_tied else embeddings[0].nbytes
        self._dense = info.dense_bytes - (0 if is_tied else embeddings.nbytes)
        self._per_expert = info.bytes_per_expert
        config: Any = model.config.get_text_config()
        self._windows = windows(config)
        self._kv_per_token = info.kv_block_bytes // runner.cache.block_size // len(self._windows)

    def of(self, experts: Sequence[int], contexts: Sequence[int], num_rows: int) -> StepBytes:
        """Return what a step reads: ``experts`` distinct ones per MoE layer, ``contexts`` tokens of each request."""
        seen = sum(min(tokens, window or tokens) for tokens in contexts for window in self._windows)
        return StepBytes(
            dense=self._dense + num_rows * self._row_bytes,
            experts=sum(count * size for count, size in zip(experts, self._per_expert, strict=True)),
            kv=seen * self._kv_per_token,
        )


def windows(config: Any) -> list[int | None]:
    """Return the tokens that each layer's attention sees at most; None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if window and kind == "sliding_attention" else None for kind in kinds]
