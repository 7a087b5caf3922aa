"""Quantised checkpoints: every tensor looks as if it had been stored in full, and is dequantised when it is read.

Those of experts can be had as they are stored as well (`stored_experts`).

Shapes: E experts, M x N a weight, B x C its blocks, G groups of 32 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .checkpoint import CheckpointReader, LazyTensor

FORMATS = {
    "fp8": "float8 weights and one factor per block of them (DeepSeek-V3, Qwen3-FP8, MiniMax-M2)",
    "mxfp4": "4-bit weights and one power of two per 32 of them (GPT-OSS)",
}
"""The values of ``quantization_config.quant_method`` that are read."""

_SCALE = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a checkpoint stores a quantised tensor."""

    method: str
    """One of `FORMATS`."""
    dtype: str
    """Of its numbers, as safetensors spells it."""
    block: tuple[int, int]
    """Outputs and inputs of a linear layer that share a scale."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A quantised tensor as the files hold it, to be read as ``values[...]`` and ``scales[...]``."""

    values: LazyTensor
    """fp8: float8 [.., M, N]; mxfp4: uint8 [E, N, G, 16] of [E, 32 G, N]."""
    scales: LazyTensor
    """fp8: [.., ceil(M / B), ceil(N / C)]; mxfp4: uint8 [E, N, G]."""


class Weights(Protocol):
    """The tensors of a checkpoint by the names that the model knows, whatever the files hold."""

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, key: str) -> list[int]:
        """Return the shape that reading ``key`` gives."""
        ...

    def lazy(self, key: str, experts: Sequence[int] | None = None) -> Any:
        """Return ``key``, or only the rows ``experts`` of its dimension 0, to be read as ``[...]``."""
        ...

    def format_of(self, key: str) -> StoredFormat | None:
        """Return how ``key`` is quantised; None if it is not."""
        ...

    def stored(self, key: str, experts: Sequence[int] | None = None) -> StoredTensor:
        """Return what `lazy` dequantises of ``key``, which is quantised; raise ``ValueError`` for misshapen scales."""
        ...


def check_quantization(config: object) -> None:
    """Raise ``ValueError`` naming the field ``model`` unless the checkpoint of ``config`` can be dequantised."""
    settings = _settings(config)
    method = settings.get("quant_method")
    if not settings or method == "mxfp4":
        return
    if method != "fp8":
        raise ValueError(f"model: quantisation {method!r} is not supported; supported: {', '.join(FORMATS)}")
    block_size = settings.get("weight_block_size")
    if not (
        isinstance(block_size, list | tuple)
        and len(block_size) == 2
        and all(type(n) is int and n > 0 for n in block_size)
    ):
        raise ValueError(f"model: fp8 with weight_block_size {block_size!r} is not supported; expected two numbers")
    if settings.get("activation_scheme", "dynamic") != "dynamic":
        raise ValueError("model: fp8 with activation_scheme other than 'dynamic' is not supported")


def is_quantized(config: object) -> bool:
    """Return whether ``config`` is that of a quantised checkpoint."""
    return bool(_settings(config))


def open_weights(reader: CheckpointReader, config: object, dtype: torch.dtype) -> Weights:
    """Return ``reader``'s tensors, those that ``config`` says are quantised dequantised to ``dtype``.

    Raises ``ValueError`` naming ``model`` for quantised weights without scales.
    """
    settings = _settings(config)
    if not settings:
        return _Plain(reader)
    if settings["quant_method"] == "mxfp4":
        return _MxFp4(reader, dtype)
    return _BlockFp8(reader, dtype, tuple(settings["weight_block_size"]))


def _settings(config: object) -> dict[str, Any]:
    settings = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, dict) else settings.to_dict()


class _Dequantized:
    """A tensor computed from its quantised numbers and their scales when it is read."""

    def __init__(self, shape: list[int], dtype: torch.dtype, compute: Any) -> None:
        self._shape, self._dtype, self._compute = shape, dtype, compute

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return {torch.bfloat16: "BF16", torch.float32: "F32"}[self._dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        assert index is Ellipsis, "loaders read whole tensors"
        return self._compute()


class _Plain:
    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def keys(self) -> list[str]:
        return self._reader.keys()

    def shape(self, key: str) -> list[int]:
        return self._reader.shape(key)

    def lazy(self, key: str, experts: Sequence[int] | None = None) -> Any:
        return LazyTensor(self._reader, key, experts)

    def format_of(self, key: str) -> StoredFormat | None:
        return None

    def stored(self, key: str, experts: Sequence[int] | None = None) -> StoredTensor:
        raise AssertionError(f"{key} is not quantised")


class _BlockFp8(_Plain):
    """``x.weight`` in float8 [.., M, N] beside ``x.weight_scale_inv`` [.., ceil(M / B), ceil(N / C)]."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype, block_size: tuple[int, int]) -> None:
        super().__init__(reader)
        self._dtype, self._block_size = dtype, block_size
        keys = set(reader.keys())
        self._scaled = {key for key in keys if key + _SCALE in keys}
        self._scales = {key + _SCALE for key in self._scaled}
        others = keys - self._scaled - self._scales  # scales may be powers of two in a byte, float8 too
        bare = [key for key in others if reader.slice(key).get_dtype().startswith("F8")]
        if bare:
            raise ValueError(f"model: {min(bare)} is float8, but the checkpoint holds no {min(bare)}{_SCALE}")

    def keys(self) -> list[str]:
        return [key for key in self._reader.keys() if key not in self._scales]  # noqa: SIM118 - a reader is no mapping

    def lazy(self, key: str, experts: Sequence[int] | None = None) -> Any:
        if key not in self._scaled:
            return super().lazy(key, experts)
        stored = self.stored(key, experts)
        return _Dequantized(
            stored.values.get_shape(),
            self._dtype,
            lambda: dequantize_fp8(stored.values[...], stored.scales[...], self._block_size).to(self._dtype),
        )

    def format_of(self, key: str) -> StoredFormat | None:
        if key not in self._scaled:
            return None
        return StoredFormat("fp8", self._reader.slice(key).get_dtype(), self._block_size)

    def stored(self, key: str, experts: Sequence[int] | None = None) -> StoredTensor:
        weight, scale = (LazyTensor(self._reader, name, experts) for name in (key, key + _SCALE))
        *_, m, n = weight.get_shape()
        wanted = [-(-m // self._block_size[0]), -(-n // self._block_size[1])]
        if scale.get_shape()[-2:] != wanted:
            raise ValueError(f"model: {key}{_SCALE} has shape {scale.get_shape()}, expected [.., {wanted}]")
        return StoredTensor(weight, scale)


class _MxFp4(_Plain):
    """``x_blocks`` uint8 [E, N, G, 16] and ``x_scales`` uint8 [E, N, G] for ``x`` [E, 32 G, N]."""

    def __init__(self, reader: CheckpointReader, dtype: torch.dtype) -> None:
        super().__init__(reader)
        self._dtype = dtype
        keys = set(reader.keys())
        self._packed = {key.removesuffix(_BLOCKS) for key in keys if key.endswith(_BLOCKS)}
        bare = [key for key in self._packed if key + _SCALES not in keys]
        if bare:
            raise ValueError(f"model: the checkpoint holds {min(bare)}{_BLOCKS}, but no {min(bare)}{_SCALES}")

    def keys(self) -> list[str]:
        parts = {key + suffix for key in self._packed for suffix in (_BLOCKS, _SCALES)}
        return [key for key in self._reader.keys() if key not in parts] + sorted(self._packed)  # noqa: SIM118

    def shape(self, key: str) -> list[int]:
        if key not in self._packed:
            return super().shape(key)
        num_experts, n, groups, num_bytes = self._reader.shape(key + _BLOCKS)
        return [num_experts, groups * num_bytes * 2, n]

    def lazy(self, key: str, experts: Sequence[int] | None = None) -> Any:
        if key not in self._packed:
            return super().lazy(key, experts)
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        stored = self.stored(key, experts)
        shape = self.shape(key)
        if experts is not None:
            shape[0] = len(experts)
        return _Dequantized(
            shape,
            self._dtype,
            lambda: convert_moe_packed_tensors(stored.values[...], stored.scales[...], dtype=self._dtype),
        )

    def format_of(self, key: str) -> StoredFormat | None:
        return StoredFormat("mxfp4", "U8", (1, 32)) if key in self._packed else None

    def stored(self, key: str, experts: Sequence[int] | None = None) -> StoredTensor:
        blocks, scales = (LazyTensor(self._reader, key + suffix, experts) for suffix in (_BLOCKS, _SCALES))
        if scales.get_shape() != blocks.get_shape()[:-1]:
            raise ValueError(
                f"model: {key}{_SCALES} has shape {scales.get_shape()}, expected {blocks.get_shape()[:-1]}"
            )
        return StoredTensor(blocks, scales)


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """Return ``weight`` [.., M, N] times its blocks' factors ``scale`` [.., ceil(M / B), ceil(N / C)] in float32.

    transformers' own refuses a last block that is not full, such as DeepSeek-V3's 576 rows in blocks of 128.
    """
    *_, m, n = weight.shape
    factors = scale.float().repeat_interleave(block_size[0], dim=-2).repeat_interleave(block_size[1], dim=-1)
    return weight.float() * factors[..., :m, :n]
