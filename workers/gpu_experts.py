"""Which of a model's experts layers run as our kernels on a GPU, and why the others do not.

Shapes: N rows, F expert intermediate.
"""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.device import has_triton
from .stored_experts import Storage, kept_storage, storage_of, stored_weights

if TYPE_CHECKING:
    from ..kernels.expert_weights import ExpertWeights
    from ..kernels.grouped_experts import Gate

logger = logging.getLogger(__name__)


GpuExperts = partial[tuple[torch.Tensor, torch.Tensor]]
"""`kernels.grouped_experts` over the module's own weights: its first two arguments, each an `ExpertWeights`."""


def runs_kernels(device: torch.device) -> bool:
    """Whether experts on ``device`` that are not quantised run as kernels where those can compute them."""
    return device.type == "cuda"


def gpu_experts(module: Any) -> GpuExperts | None:
    """Return the layer of experts as one operation, or None, and a line in the log, where torch computes it.

    The number of distinct experts that it returns is on the device.
    """
    # What stays as stored was found fit for the kernels before it was loaded
    reason = "" if kept_storage(module) else objection(module, module.get_parameter("down_proj").device)
    _say(reason, storage_of(module))
    return None if reason else fused(module)


def objection(module: Any, device: torch.device) -> str:
    """Return why the kernels cannot compute ``module`` on ``device``; nothing if they can.

    What a module holds does not matter: it may have no memory yet.
    """
    if not has_triton(device):
        return "Triton is not installed"
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return "they are not two projections around a gate"
    if gate_of(module) is None:
        return "their gate is none of the kernels'"
    return ""


def fused(module: Any) -> GpuExperts:
    """Return the kernels over the weights of ``module``, to which nothing objects."""
    from ..kernels.expert_weights import ExpertWeights
    from ..kernels.grouped_experts import grouped_experts

    def projection(name: str) -> ExpertWeights:
        if kept_storage(module):
            return stored_weights(module, name)
        weights = module.get_parameter(name)
        biases = module.get_parameter(f"{name}_bias") if module.has_bias else None
        return ExpertWeights.plain(weights.transpose(1, 2) if module.is_transposed else weights, biases)

    gate = gate_of(module)
    assert gate is not None
    return partial(grouped_experts, projection("gate_up_proj"), projection("down_proj"), gate)


def gate_of(module: Any) -> Gate | None:
    """Return the kernels' gate that computes what the module's does.

    Experts name their gates in many ways; what it computes tells.
    """
    from ..kernels.grouped_experts import Gate

    near = torch.linspace(-9, 7, 48).view(3, -1)
    inner = torch.cat([near, 100 * near])  # a gate may clamp what is large
    expected = module._apply_gate(inner)
    numbers = {
        name: getattr(module, name) for name in ("alpha", "limit") if isinstance(getattr(module, name, 0), float)
    }
    for interleaved in (False, True):
        for kind in ("silu", "clamped"):
            gate = Gate(kind, interleaved, **(numbers if kind == "clamped" else {}))
            if torch.allclose(gate(inner), expected, rtol=1e-6, atol=1e-6):
                return gate
    return None


@cache
def _say(reason: str, storage: Storage | None) -> None:
    """Once for each reason: layers of a model rarely differ."""
    if reason:
        logger.warning("experts are computed by torch, one at a time: %s", reason)
        return
    held = ""
    if storage is not None:
        method, why = storage.format.method, storage.objection
        held = f"; {method} is dequantised: {why}" if why else f"; they stay {method} as stored"
    logger.info("experts are computed by Triton kernels, which read those that a step needs%s", held)
