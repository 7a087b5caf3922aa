"""What models of `gpu_decode` need of a GPU's memory: which of them fit is decided by this, and so is the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..workers.config_file import load_config
from ..workers.loader import EmptyModel, build
from ..workers.model_config import num_experts_per_tok
from .harness import Row
from .inflated_decode import FACTOR
from .inflated_decode import NAME as INFLATED
from .model_shapes import SHAPES

DTYPE = torch.bfloat16
SPARE_BYTES = 8 << 30
"""For KV, activations and captured graphs, beside the weights."""


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """One model's bytes, in bfloat16."""

    name: str
    weight_bytes: int

    @property
    def free_bytes(self) -> int:
        """That must be free before it is made."""
        return self.weight_bytes + SPARE_BYTES

    def objection(self, free_bytes: int) -> str | None:
        """Return why the model cannot be measured beside ``free_bytes`` of memory; None if it can."""
        if self.free_bytes <= free_bytes:
            return None
        return f"left out, since it needs {self.free_bytes / 1e9:.0f} GB and {free_bytes / 1e9:.0f} are free"


def needs_of(name: str, demo: Path) -> ModelNeeds:
    """Return what the model of that name needs; ``demo``: the demo model's directory."""
    shape = next((shape for shape in SHAPES if shape.name == name), None)
    num_parameters = _num_parameters(_inflated(demo)) if shape is None else shape.num_parameters
    return ModelNeeds(name, num_parameters * DTYPE.itemsize)


def rows(demo: Path, batch: int) -> Iterator[Row]:
    """Yield what each model needs, the smallest first.

    ``peer_copies_gb``: experts that transformers' ``batched_mm`` copies in a layer of a step of ``batch`` rows.
    """
    found = sorted((needs_of(name, demo) for name in (INFLATED, *(shape.name for shape in SHAPES))), key=_size)
    for needs in found:
        shape = next((shape for shape in SHAPES if shape.name == needs.name), None)
        empty = _inflated(demo) if shape is None else build(shape.config(), DTYPE)
        experts = empty.expert_modules[0]
        expert_bytes = sum(part.numel() for part in experts.parameters()) * DTYPE.itemsize // empty.num_experts
        copies = batch * num_experts_per_tok(empty.config.get_text_config()) * expert_bytes
        yield {
            "part": "needs",
            "model": needs.name,
            "stored_as": str(DTYPE).removeprefix("torch."),
            "weights_gb": round(needs.weight_bytes / 1e9, 1),
            "free_gb": round(needs.free_bytes / 1e9, 1),
            "batch": batch,
            "peer_copies_gb": round(copies / 1e9, 1),
        }


def _size(needs: ModelNeeds) -> int:
    return needs.weight_bytes


def _inflated(demo: Path) -> EmptyModel:
    config = load_config(demo)
    config.moe_intermediate_size *= FACTOR
    return build(config, DTYPE)


def _num_parameters(empty: EmptyModel) -> int:
    return sum(parameter.numel() for parameter in empty.model.parameters())
