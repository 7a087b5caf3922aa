"""A layer of gated experts for few rows, on a GPU: each active expert's weights are read once, all others never.

Three launches after the sort by expert (`expert_groups`): gates and ups with their activation, the second projection,
and the sums over a row's experts. Programs take a tile of one expert's weights and all of its rows, weights as the
matrix instruction's first operand: of a few rows it then wastes little, and weights go from memory to it without
passing through registers. Nothing is added by atomics: sums go in the order of inputs, then of splits, then of K, so a
row's result does not depend on the rows beside it.

Shapes: T rows, H hidden, K experts per row, P = T x K pairs, E experts held here, F expert intermediate, Z splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .expert_groups import ExpertGroups, group_by_expert, most_tiles
from .expert_tiles import LayerTiles, Tiles, block_rows, layer_tiles
from .expert_weights import FP8, ExpertWeights, add_product, whole

_COMBINED = 512
"""Hidden numbers that a program sums."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What an expert makes of its gates and ups."""

    kind: str = "silu"
    """silu: SiLU(gate) x up. clamped: GPT-OSS's (min(gate, limit) x sigmoid(alpha x gate)) x (clamped up + 1)."""
    interleaved: bool = False
    """Gates and ups alternate; else all gates come first."""
    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, projected: torch.Tensor) -> torch.Tensor:
        """Return [.., F] of ``projected`` [.., 2 F]."""
        if self.interleaved:
            gate, linear_part = projected[..., ::2], projected[..., 1::2]
        else:
            gate, linear_part = projected.chunk(2, dim=-1)
        if self.kind == "silu":
            return torch.nn.functional.silu(gate) * linear_part
        gate = gate.clamp(max=self.limit)
        return (linear_part.clamp(-self.limit, self.limit) + 1) * gate * torch.sigmoid(gate * self.alpha)


def grouped_experts(
    up: ExpertWeights,
    down: ExpertWeights,
    gate: Gate,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    tiles: LayerTiles | None = None,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's weighted sum over its experts [T, H], and how many distinct experts ran: [] int32.

    ``up`` [E, 2 F, H] and ``down`` [E, H, F] with ``hidden`` [T, H] of f32 or bf16; ``expert_ids`` [T, K], E or
    more for "none", ``weights`` [T, K]. Numbers between the projections are of ``hidden``'s type, all sums f32. The
    host waits for nothing; ``tiles`` are the table's where none are given. ``slots`` [E] int32: where in ``up`` and
    ``down`` each expert lies, by its number if None.
    """
    num_rows, top_k = expert_ids.shape
    hidden_size, inner_size = up.num_inputs, down.num_inputs
    _check(up, down, hidden, expert_ids, weights)
    output = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not num_rows:
        return output, torch.zeros((), dtype=torch.int32, device=hidden.device)
    if tiles is None:
        shared = up.block[1] if up.format == FP8 else None
        tiles = layer_tiles(hidden_size, inner_size, top_k, up.bytes_per_weight, scale_inputs=shared)
    hidden = hidden.contiguous()
    groups = group_by_expert(expert_ids, up.num_experts, block_rows(num_rows), slots)
    gated = hidden.new_empty(num_rows * top_k, inner_size)
    _project(hidden, up, gated, groups, tiles.up, gate, top_k)
    partial = hidden.new_empty(tiles.down.splits, num_rows * top_k, hidden_size, dtype=torch.float32)
    _project(gated, down, partial, groups, tiles.down, None, top_k)
    _combine[(num_rows, triton.cdiv(hidden_size, _COMBINED))](
        partial,
        expert_ids.contiguous(),
        weights.contiguous(),
        output,
        up.num_experts,
        num_rows * top_k,
        HIDDEN=hidden_size,
        TOP_K=top_k,
        SPLITS=tiles.down.splits,
        BLOCK=_COMBINED,
        num_warps=4,
    )
    return output, groups.counts[1]


def grouped_experts_reference(
    up: ExpertWeights,
    down: ExpertWeights,
    gate: Gate,
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the same in f32 by torch's operations, on the host: one active expert at a time."""
    output = torch.zeros_like(hidden, dtype=torch.float32)
    active = [expert for expert in expert_ids.unique().tolist() if expert < up.num_experts]
    for expert in active:
        row, k = (expert_ids == expert).nonzero(as_tuple=True)
        rows = hidden[row].float()
        slot = expert if slots is None else int(slots[expert])
        for part, finish in ((up, gate), (down, None)):
            rows = rows @ _one(part, slot).t()
            if part.biases is not None:
                rows += part.biases[slot].float()
            if finish is not None:
                rows = finish(rows)
        output.index_add_(0, row, rows * weights[row, k, None].float())
    return output.to(hidden.dtype), torch.tensor(len(active), dtype=torch.int32, device=hidden.device)


def _one(weights: ExpertWeights, expert: int) -> torch.Tensor:
    parts = (weights.values, weights.scales)
    values, scales = (None if part is None else part[expert : expert + 1] for part in parts)
    assert values is not None
    return ExpertWeights(values, scales, None, weights.format, weights.block).dense()[0]


def _check(
    up: ExpertWeights, down: ExpertWeights, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> None:
    assert hidden.dtype in (torch.float32, torch.bfloat16), "others lack the range of mxfp4's steps"
    assert up.num_outputs == 2 * down.num_inputs, "gates and ups for every inner number"
    assert up.num_inputs == down.num_outputs == hidden.shape[1], "rows fit their weights"
    assert up.num_experts == down.num_experts
    assert expert_ids.shape == weights.shape
    assert len(expert_ids) == len(hidden)


def _project(
    rows: torch.Tensor,
    weights: ExpertWeights,
    output: torch.Tensor,
    groups: ExpertGroups,
    tiles: Tiles,
    gate: Gate | None,
    rows_of_pair: int,
) -> None:
    """Write all active experts' products: gated ones by place in the order, others [Z, P, O] by pair.

    ``rows`` are by pair over ``rows_of_pair`` if gated, else by place in the order.
    """
    stored = weights.stored
    num_tiles = most_tiles(len(groups.order), weights.num_experts, groups.block_rows)
    _product[(num_tiles, triton.cdiv(weights.num_outputs, tiles.outputs), tiles.splits)](
        rows,
        stored,
        weights.scales,
        weights.biases,
        output,
        groups.order,
        groups.tile_expert,
        groups.tile_start,
        groups.tile_size,
        groups.counts,
        len(groups.order),
        *stored.stride(),
        NUM_OUTPUTS=weights.num_outputs,
        NUM_INPUTS=weights.num_inputs,
        TOP_K=rows_of_pair,
        GATE=0 if gate is None else 1 if gate.kind == "silu" else 2,
        INTERLEAVED=gate is not None and gate.interleaved,
        ALPHA=0.0 if gate is None else gate.alpha,
        LIMIT=0.0 if gate is None else gate.limit,
        FORMAT=weights.format,
        BLOCK_OUTPUTS=weights.block[0],
        BLOCK_INPUTS=weights.block[1],
        ROWS=groups.block_rows,
        TILE=tiles.outputs,
        STEP=tiles.inputs,
        SPLITS=tiles.splits,
        num_warps=tiles.num_warps,
        num_stages=tiles.stages(groups.block_rows),
    )


@triton.jit
def _product(
    rows,
    values,
    scales,
    biases,
    output,
    order,
    tile_expert,
    tile_start,
    tile_size,
    counts,
    num_pairs,
    stride_expert,
    stride_output,
    stride_input,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tl.load(counts):
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    place = tl.arange(0, ROWS)
    is_row = place < tl.load(tile_size + tile)
    place += tl.load(tile_start + tile)
    pair = tl.load(order + place, mask=is_row, other=0)
    outputs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_output = outputs < NUM_OUTPUTS
    if GATE and not INTERLEAVED:
        # Each gate beside its up, as they lie where they are interleaved
        outputs = outputs // 2 + outputs % 2 * (NUM_OUTPUTS // 2)
    values += expert * stride_expert
    if FORMAT == 1:
        scales += expert * (
            (NUM_OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS * ((NUM_INPUTS + BLOCK_INPUTS - 1) // BLOCK_INPUTS)
        )
    if FORMAT == 2:
        scales += expert * (NUM_OUTPUTS * (NUM_INPUTS // 32))

    source = pair // TOP_K if GATE else place
    sources = rows + source.to(tl.int64)[None, :] * NUM_INPUTS
    sums = tl.zeros([TILE, ROWS], dtype=tl.float32)
    steps: tl.constexpr = (NUM_INPUTS + STEP * SPLITS - 1) // (STEP * SPLITS)
    split = tl.program_id(2)
    for step in range(steps):
        first = (split * steps + step) * STEP
        inputs = first + tl.arange(0, STEP)[:, None]
        tile_of_rows = tl.load(sources + inputs, mask=is_row[None, :] & (inputs < NUM_INPUTS), other=0.0)
        sums = add_product(
            sums, tile_of_rows, values, scales, outputs, is_output, first, stride_output, stride_input,
            NUM_INPUTS, STEP, FORMAT, BLOCK_OUTPUTS, BLOCK_INPUTS,
        )  # fmt: skip
    sums = whole(sums, FORMAT)
    if biases is not None:
        bias = tl.load(biases + expert * NUM_OUTPUTS + outputs, mask=is_output, other=0.0).to(tl.float32)
        sums += tl.where(split == 0, bias, 0.0)[:, None]

    if GATE:
        both = tl.permute(tl.reshape(sums, [TILE // 2, 2, ROWS]), [0, 2, 1])
        gate, linear_part = tl.split(both)
        if GATE == 1:
            gated = gate * tl.sigmoid(gate) * linear_part
        else:
            gate = tl.minimum(gate, LIMIT)
            linear_part = tl.minimum(tl.maximum(linear_part, -LIMIT), LIMIT)
            gated = gate * tl.sigmoid(gate * ALPHA) * (linear_part + 1.0)
        inner = tl.program_id(1) * (TILE // 2) + tl.arange(0, TILE // 2)
        places = output + place.to(tl.int64)[None, :] * (NUM_OUTPUTS // 2) + inner[:, None]
        tl.store(places, gated.to(output.dtype.element_ty), mask=is_row[None, :] & (inner < NUM_OUTPUTS // 2)[:, None])
    else:
        places = (split * num_pairs + pair).to(tl.int64)[None, :] * NUM_OUTPUTS + outputs[:, None]
        tl.store(output + places, sums, mask=is_row[None, :] & is_output[:, None])


@triton.jit
def _combine(
    partial,
    expert_ids,
    weights,
    output,
    num_experts,
    num_pairs,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_hidden = places < HIDDEN
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        pair = row * TOP_K + k
        if tl.load(expert_ids + pair) < num_experts:
            expert_sum = tl.zeros([BLOCK], dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                from_split = partial + (split * num_pairs + pair).to(tl.int64) * HIDDEN
                expert_sum += tl.load(from_split + places, mask=is_hidden, other=0.0)
            sums += expert_sum * tl.load(weights + pair).to(tl.float32)
    tl.store(output + row.to(tl.int64) * HIDDEN + places, sums.to(output.dtype.element_ty), mask=is_hidden)
