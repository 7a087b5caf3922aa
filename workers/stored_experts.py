"""Experts that stay on a GPU as a quantised checkpoint stores them, where the kernels there read them so.

A step of few rows costs the reading of its experts: in fp8 half of bfloat16's bytes, in mxfp4 about a quarter. A layer
is chosen before any of it is read, and then neither dequantised nor copied.

Shapes: E experts, O outputs, I inputs, F expert intermediate, B x C numbers of a block, G groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .quantization import StoredFormat

if TYPE_CHECKING:
    from ..kernels.expert_weights import ExpertWeights

_PROJECTIONS = ("gate_up_proj", "down_proj")
_SCALES = "_scales"
_MERGES = {"MergeModulelist", "Concatenate"}
"""What transformers' converter may do to weights of a layer that stays as stored: its scales then go the same way."""
_LARGEST_EXPONENT = 190
"""Of mxfp4's scales, off by 127: beyond, a product could leave f32's range."""


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """A tensor of a checkpoint that belongs to a layer of experts."""

    layer: int
    parameter: str
    """Of the experts module."""
    operations: tuple[str, ...]
    """Classes of transformers' operations that make the parameter of this and other tensors."""


@dataclass(frozen=True, slots=True)
class Storage:
    """How a rank holds a layer of experts that its checkpoint quantises."""

    format: StoredFormat
    dtype: torch.dtype
    """In which it computes."""
    objection: str = ""
    """Why it is dequantised; nothing if it stays as stored."""


def storage_of(module: Any) -> Storage | None:
    """Return what `choose_storage` found; None for an experts module that is not quantised, or not for the kernels."""
    return getattr(module, "penstock_storage", None)


def kept_storage(module: Any) -> Storage | None:
    """Return how an experts module holds its weights if it holds them as they are stored."""
    storage = storage_of(module)
    return storage if storage is not None and not storage.objection else None


def choose_storage(module: Any, tensors: Collection[tuple[ExpertTensor, StoredFormat | None]]) -> None:
    """Say how an experts ``module`` without storage, which the kernels compute, is held.

    ``tensors``: those of the checkpoint that make it, and how each is quantised.
    """
    weights = [(tensor, stored) for tensor, stored in tensors if tensor.parameter in _PROJECTIONS]
    formats = {stored for _, stored in weights if stored is not None}
    if formats:
        reason = _objection(module, weights, formats)
        module.penstock_storage = Storage(min(formats, key=str), module.down_proj.dtype, reason)


def _objection(
    module: Any, weights: Sequence[tuple[ExpertTensor, StoredFormat | None]], formats: set[StoredFormat]
) -> str:
    if len(formats) > 1 or any(stored is None for _, stored in weights):
        return "not all of a layer is stored alike"
    if any(set(tensor.operations) - _MERGES for tensor, _ in weights):
        return "transformers rearranges their weights"
    (stored,) = formats
    if stored.method == "mxfp4":
        return "" if module.is_transposed else "their layout is not GPT-OSS's"
    if module.is_transposed:
        return "their weights are transposed"
    if stored.dtype != "F8_E4M3":
        return f"their numbers are {stored.dtype}, not F8_E4M3"
    outputs, inputs = stored.block
    if inputs < 16 or inputs & (inputs - 1):
        return f"a block's {inputs} inputs are not a power of two from 16 up"
    inner_size = module.gate_up_proj.shape[1] // 2
    if inner_size % outputs and any("Concatenate" in tensor.operations for tensor, _ in weights):
        return f"a gate's {inner_size} outputs are not in whole blocks of {outputs}, as the up's behind it would need"
    return ""


def await_values(module: Any) -> None:
    """Make room in a ``module`` that stays as stored, and has no memory yet, for what its checkpoint holds."""
    storage = kept_storage(module)
    assert storage is not None
    for name in _PROJECTIONS:
        shape, dtype = module.get_parameter(name).shape, torch.float8_e4m3fn
        if storage.format.method == "mxfp4":
            num_experts, num_inputs, num_outputs = shape
            shape, dtype = torch.Size([num_experts, num_outputs, -(-num_inputs // 32), 16]), torch.uint8
        setattr(module, name, _parameter(shape, dtype))


@contextmanager
def scales_awaited(modules: Sequence[Any]) -> Iterator[None]:
    """Have the projections of ``modules`` be their scales, to be read by the weights' names; then put both in place.

    Raises ``ValueError`` naming ``model`` for scales that the kernels cannot take.
    """
    values = [(module, name, module.get_parameter(name)) for module in modules for name in _PROJECTIONS]
    for module, name, value in values:
        storage = kept_storage(module)
        assert storage is not None
        if storage.format.method == "mxfp4":
            scales = _parameter(value.shape[:-1], torch.uint8)
        else:
            num_experts, num_outputs, num_inputs = value.shape
            outputs, inputs = storage.format.block
            scales = _parameter([num_experts, -(-num_outputs // outputs), -(-num_inputs // inputs)], torch.float32)
        setattr(module, name, scales)
    yield
    for module, name, value in values:
        scales = module.get_parameter(name)
        if scales.dtype == torch.uint8 and not scales.is_meta and int(scales.max()) > _LARGEST_EXPONENT:
            raise ValueError(f"model: scales of {name} are beyond 2^{_LARGEST_EXPONENT - 127}")
        setattr(module, name, value)
        setattr(module, name + _SCALES, scales)


def stored_weights(module: Any, name: str) -> ExpertWeights:
    """Return the projection ``name`` of a ``module`` that stays as stored; it refers to the module's own weights."""
    from ..kernels.expert_weights import ExpertWeights

    storage = kept_storage(module)
    assert storage is not None
    values, scales = module.get_parameter(name), module.get_parameter(name + _SCALES)
    biases = module.get_parameter(f"{name}_bias") if module.has_bias else None
    if storage.format.method == "mxfp4":
        return ExpertWeights.mxfp4(values, scales, biases)
    return ExpertWeights.block_fp8(values, scales, storage.format.block, biases)


def _parameter(shape: Sequence[int], dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
