"""RMS norms as one operation: transformers writes them as seven, and a decoding step runs dozens of them."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import rms_norm

from ..kernels import fused_moe

Norm = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def fuse_norms(model: nn.Module, library: ctypes.CDLL | None = None) -> int:
    """Let RMS norms over float32 rows run as one operation; return how many do.

    It is torch's, wherever that changes no bit, or the kernel of ``library``, which is faster and as precise. A norm is
    known by its parts, and by what it computes for some rows: those that scale by one plus their weight, say, stay as
    they are.
    """
    return sum(_fuse(module, library) for module in model.modules())


def _fuse(module: nn.Module, library: ctypes.CDLL | None) -> bool:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # a gated norm
        return False
    weight = parameters["weight"]
    fused = _rms_norm(weight, eps) if library is None else partial(_compiled, library, weight, eps)
    rows = torch.linspace(-3, 5, 7 * weight.numel(), device=weight.device).view(7, -1)
    expected, result = module(rows), fused(rows)
    if not (torch.equal(result, expected) if library is None else torch.allclose(result, expected, 1e-6, 1e-6)):
        return False
    module.forward = fused
    return True


def _compiled(library: ctypes.CDLL, weight: torch.Tensor, eps: float, hidden_states: torch.Tensor) -> torch.Tensor:
    return fused_moe.rms_norm(library, hidden_states, weight, eps)


def _rms_norm(weight: torch.Tensor, eps: float) -> Norm:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, weight.shape, weight, eps)

    return forward
