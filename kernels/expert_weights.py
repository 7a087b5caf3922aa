"""Experts' weights as checkpoints store them, and their reading inside a product.

Whatever the format, a product reads the stored bytes and nothing else: numbers are widened in registers, between the
load and the multiplication.

Shapes: E experts, O outputs, I inputs, B x C numbers of a block, G groups of 32 inputs, N outputs and M rows of a tile,
S inputs of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

PLAIN, FP8, MXFP4 = 0, 1, 2
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The linear layers [E, O, I] of E experts; built by `plain`, `block_fp8` or `mxfp4`."""

    values: torch.Tensor
    """[E, O, I] in any strides; for mxfp4 uint8 [E, O, I / 2], the lower half of a byte first."""
    scales: torch.Tensor | None
    """fp8: f32 [E, ceil(O / B), ceil(I / C)]; mxfp4: uint8 [E, O, G], powers of two whose exponent is off by 127,
    of scales in [2^-61, 2^63]."""
    biases: torch.Tensor | None
    """[E, O]"""
    format: int = PLAIN
    block: tuple[int, int] = (1, 1)
    """(B, C)"""

    @classmethod
    def plain(cls, weights: torch.Tensor, biases: torch.Tensor | None = None) -> ExpertWeights:
        """Return ``weights`` [E, O, I] of f32 or bf16; a transposed view stays one."""
        if weights.dtype not in _FLOATS:
            raise ValueError(f"weights: {weights.dtype} is neither float32 nor bfloat16")
        return cls(weights, None, biases)

    @classmethod
    def block_fp8(
        cls, values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], biases: torch.Tensor | None = None
    ) -> ExpertWeights:
        """Return float8_e4m3fn ``values`` [E, O, I] with one factor per block, as DeepSeek-V3 and Qwen3 store them."""
        if values.dtype != torch.float8_e4m3fn:
            raise ValueError(f"values: {values.dtype} is not float8_e4m3fn")
        wanted = (len(values), -(-values.shape[1] // block[0]), -(-values.shape[2] // block[1]))
        if scales.shape != wanted:
            raise ValueError(f"scales: expected shape {list(wanted)}, got {list(scales.shape)}")
        if block[1] < 16 or block[1] & (block[1] - 1):
            raise ValueError(f"block: {block[1]} inputs are not a power of two from 16 up")
        return cls(values.contiguous(), scales.float().contiguous(), biases, FP8, block)

    @classmethod
    def mxfp4(cls, blocks: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor | None = None) -> ExpertWeights:
        """Return uint8 ``blocks`` [E, O, G, 16] with ``scales`` [E, O, G], as GPT-OSS stores them."""
        if blocks.dtype != torch.uint8 or blocks.dim() != 4 or blocks.shape[3] != 16:
            raise ValueError(f"blocks: expected uint8 [E, O, G, 16], got {blocks.dtype} {list(blocks.shape)}")
        if scales.dtype != torch.uint8 or scales.shape != blocks.shape[:3]:
            raise ValueError(
                f"scales: expected uint8 {list(blocks.shape[:3])}, got {scales.dtype} {list(scales.shape)}"
            )
        return cls(blocks.flatten(2).contiguous(), scales.contiguous(), biases, MXFP4)

    @property
    def parts(self) -> list[torch.Tensor]:
        """All that makes the experts, each [E, ..] and with an expert's numbers in one piece."""
        values = self.values if self.values.is_contiguous() else self.values.transpose(1, 2)
        return [part for part in (values, self.scales, self.biases) if part is not None]

    @property
    def num_experts(self) -> int:
        """E"""
        return len(self.values)

    @property
    def num_outputs(self) -> int:
        """O"""
        return self.values.shape[1]

    @property
    def num_inputs(self) -> int:
        """I"""
        return self.values.shape[2] * (2 if self.format == MXFP4 else 1)

    @property
    def bytes_per_expert(self) -> int:
        """What reading one expert takes."""
        parts = (self.values, self.scales, self.biases)
        return sum(part.nbytes for part in parts if part is not None) // self.num_experts

    @property
    def bytes_per_weight(self) -> float:
        """Of the numbers alone."""
        return self.values.nbytes / (self.num_experts * self.num_outputs * self.num_inputs)

    @property
    def stored(self) -> torch.Tensor:
        """What a kernel is given: the values, float8 as bytes, which every architecture can read."""
        return self.values.view(torch.uint8) if self.format == FP8 else self.values

    def dense(self) -> torch.Tensor:
        """Return [E, O, I] in f32: what the stored numbers are worth."""
        if self.format == PLAIN:
            return self.values.float()
        assert self.scales is not None
        if self.format == FP8:
            factors = self.scales.repeat_interleave(self.block[0], dim=1).repeat_interleave(self.block[1], dim=2)
            return self.values.float() * factors[:, : self.num_outputs, : self.num_inputs]
        table = torch.tensor([*_FP4, *(-value for value in _FP4)], device=self.values.device)
        codes = torch.stack([self.values & 15, self.values >> 4], dim=-1).flatten(2)
        groups = table[codes.long()].unflatten(2, (-1, 32))
        return torch.ldexp(groups, self.scales.int()[..., None] - 127).flatten(2)


@triton.jit
def _product(tile, rows, sums):
    """Return ``sums`` plus the product of ``tile``, rounded to the type of ``rows``, and those."""
    tile = tile.to(rows.dtype)
    if _INTERPRETED:  # it would multiply the bits of bfloat16
        tile, rows = tile.to(tl.float32), rows.to(tl.float32)
    return tl.dot(tile, rows, sums, input_precision="ieee")


@triton.jit
def _float8(bits):
    """Return the f32 of float8_e4m3fn ``bits``: as the highest of a f32 they are the number over 2^120."""
    return ((bits & 0x7F) << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _float4(bits):
    """Return the float4_e2m1 in the lowest ``bits``, over 2^126: its exponent and mantissa as the highest of a f32."""
    return ((bits & 7) << 22 | (bits & 8) << 28).to(tl.float32, bitcast=True)


@triton.jit
def _fp4_tile(values, exponents, outputs, is_output, first, GROUPS: tl.constexpr, STEP: tl.constexpr):
    """Return a tile of weights [N, S] in f32, over 2^63: what four bits lack in exponent is then within f32's range."""
    groups = first // 32 + tl.arange(0, STEP // 32)
    is_group = is_output[:, None] & (groups < GROUPS)[None, :]
    places = outputs[:, None] * GROUPS + groups[None, :]
    factors = (tl.load(exponents + places, mask=is_group, other=0).to(tl.int32) + 63) << 23
    factors = factors.to(tl.float32, bitcast=True)[:, :, None]
    parts = values + (places * 16)[:, :, None] + tl.arange(0, 16)[None, None, :]
    pairs = tl.load(parts, mask=is_group[:, :, None], other=0, eviction_policy="evict_first").to(tl.int32)
    both = tl.join(_float4(pairs) * factors, _float4(pairs >> 4) * factors)
    return tl.reshape(both, [outputs.shape[0], STEP])


@triton.jit
def whole(sums, FORMAT: tl.constexpr):
    """Return ``sums`` of all steps, in full."""
    return sums * 9.223372036854775808e18 if FORMAT == 2 else sums


@triton.jit
def add_product(
    sums,
    rows,
    values,
    scales,
    outputs,
    is_output,
    first,
    stride_output,
    stride_input,
    NUM_INPUTS: tl.constexpr,
    STEP: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Return ``sums`` [N, M] f32, which `whole` completes, plus the product of weights [N, S] and ``rows`` [S, M].

    ``values`` and ``scales`` point to one expert's; the weights are those of ``outputs`` [N] and S inputs from
    ``first`` on, zeros where there are no more.
    """
    if FORMAT == 2:
        sums = _product(_fp4_tile(values, scales, outputs, is_output, first, NUM_INPUTS // 32, STEP), rows, sums)
    else:
        inputs = first + tl.arange(0, STEP)
        places = outputs[:, None] * stride_output + inputs[None, :] * stride_input
        is_weight = is_output[:, None] & (inputs < NUM_INPUTS)[None, :]
        stored = tl.load(values + places, mask=is_weight, other=0, eviction_policy="evict_first")
        if FORMAT == 1:
            columns: tl.constexpr = (NUM_INPUTS + BLOCK_INPUTS - 1) // BLOCK_INPUTS
            places = outputs // BLOCK_OUTPUTS * columns + first // BLOCK_INPUTS
            factors = tl.load(scales + places, mask=is_output, other=0.0)
            sums += _product(_float8(stored.to(tl.int32)), rows, tl.zeros_like(sums)) * factors[:, None]
        else:
            sums = _product(stored, rows, sums)
    return sums
