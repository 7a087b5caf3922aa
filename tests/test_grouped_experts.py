"""Experts of few rows: each kernel beside its reference, over a product of formats, types and shapes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from .triton_device import DEVICE, chosen, poisoned, random

from penstock.kernels.expert_groups import group_by_expert, group_by_expert_reference, most_tiles  # isort: skip
from penstock.kernels.expert_tiles import MEASURED, LayerTiles, Tiles, block_rows, layer_tiles
from penstock.kernels.expert_weights import ExpertWeights
from penstock.kernels.grouped_experts import Gate, grouped_experts, grouped_experts_reference
from penstock.kernels.grouped_experts import _project as project
from penstock.workers import gpu_experts as choice

pytestmark = pytest.mark.usefixtures("poisoned")
__all__ = ["poisoned"]

SILU, CLAMPED = Gate(), Gate("clamped", interleaved=True)
FORMATS = ("plain", "transposed", "fp8", "mxfp4")


def weights_of(
    kind: str, num_experts: int, outputs: int, inputs: int, dtype: torch.dtype, *, biased: bool, seed: int
) -> ExpertWeights:
    shape = (num_experts, outputs, inputs)
    biases = random(num_experts, outputs, seed=seed + 1).to(dtype) if biased else None
    if kind == "fp8":
        scales = random(num_experts, -(-outputs // 32), -(-inputs // 32), seed=seed + 2).abs() * 3e-3
        values = (random(*shape, seed=seed) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        return ExpertWeights.block_fp8(values, scales, (32, 32), biases)
    if kind == "mxfp4":
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randint(0, 256, (num_experts, outputs, inputs // 32, 16), generator=generator).byte()
        scales = torch.randint(118, 126, (num_experts, outputs, inputs // 32), generator=generator).byte()
        return ExpertWeights.mxfp4(blocks.to(DEVICE), scales.to(DEVICE), biases)
    values = (random(*shape, seed=seed) * 0.3).to(dtype)
    return ExpertWeights.plain(
        values.transpose(1, 2).contiguous().transpose(1, 2) if kind == "transposed" else values, biases
    )


def layer(
    kind: str, gate: Gate, dtype: torch.dtype, hidden_size: int, inner_size: int, num_experts: int, seed: int = 0
) -> tuple[ExpertWeights, ExpertWeights]:
    sizes = ((2 * inner_size, hidden_size), (hidden_size, inner_size))
    up, down = (
        weights_of(kind, num_experts, *size, dtype, biased=gate is CLAMPED, seed=seed + 10 * i)
        for i, size in enumerate(sizes)
    )
    return up, down


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == expected.dtype
    assert torch.isfinite(result).all()
    bound = 1e-3 if result.dtype == torch.float32 else 1e-2
    assert (result - expected).float().norm() <= bound * expected.float().norm()


@pytest.mark.parametrize(
    ("num_rows", "num_experts", "top_k", "rows"),
    [(1, 128, 8, 16), (7, 5, 3, 2), (64, 20, 2, 16), (3, 2, 2, 64)],
)
def test_pairs_are_grouped_as_a_stable_sort_does(num_rows, num_experts, top_k, rows):
    ids = chosen(num_rows, num_experts, top_k, seed=num_rows)
    ids[0, 0] = num_experts + 7  # any id from E up is none
    result = group_by_expert(ids, num_experts, rows)
    expected = group_by_expert_reference(ids, num_experts, rows)
    assert torch.equal(result.order, expected.order)
    assert torch.equal(result.counts, expected.counts)
    num_tiles = int(expected.counts[0])
    assert num_tiles <= most_tiles(ids.numel(), num_experts, rows)
    for name in ("tile_expert", "tile_start", "tile_size"):
        assert torch.equal(getattr(result, name)[:num_tiles], getattr(expected, name)[:num_tiles])


def test_no_choice_needs_more_tiles_than_are_launched():
    for num_pairs, num_experts, rows in [(8, 128, 16), (40, 3, 4), (16, 5, 64)]:
        for used in range(1, num_experts + 1):
            ids = torch.arange(num_pairs)[:, None] % used
            tiles = group_by_expert_reference(ids, num_experts, rows).counts[0]
            assert tiles <= most_tiles(num_pairs, num_experts, rows)
    worst = torch.tensor([[0] * 5 + [1] * 5 + [2] * 30])
    assert group_by_expert_reference(worst, 3, 4).counts[0] == most_tiles(40, 3, 4) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "inner_size", "gate"),
    # last tiles and last steps that are not full, experts with more rows than a tile, and splits
    [(1, 96, 64, SILU), (5, 64, 96, CLAMPED), (70, 32, 64, SILU)],
)
def test_equals_its_reference(kind, dtype, num_rows, hidden_size, inner_size, gate):
    num_experts, top_k = 3, 2
    up, down = layer(kind, gate, dtype, hidden_size, inner_size, num_experts)
    hidden = random(num_rows, hidden_size, seed=5).to(dtype)
    ids, weights = chosen(num_rows, num_experts, top_k), random(num_rows, top_k, seed=6).abs()
    tiles = LayerTiles(Tiles(128, 64 if kind != "fp8" else 32), Tiles(64, 32, splits=2))
    result, num_active = grouped_experts(up, down, gate, hidden, ids, weights, tiles)
    expected, num_expected = grouped_experts_reference(up, down, gate, hidden, ids, weights)
    assert_near(result, expected)
    assert num_active == num_expected


@pytest.mark.parametrize("kind", FORMATS)
def test_experts_lie_in_any_slot(kind):
    up, down = layer(kind, CLAMPED, torch.float32, 32, 32, 3)
    hidden, ids, weights = random(9, 32, seed=5), chosen(9, 3, 2), random(9, 2, seed=6).abs()
    lies = [2, 0, 1]
    slots = torch.tensor(lies, dtype=torch.int32, device=DEVICE)
    groups, expected_groups = (group(ids, 3, 16, slots) for group in (group_by_expert, group_by_expert_reference))
    assert torch.equal(groups.order, expected_groups.order)
    num_tiles = int(expected_groups.counts[0])
    assert torch.equal(groups.tile_expert[:num_tiles], expected_groups.tile_expert[:num_tiles])
    result, num_active = grouped_experts(up, down, CLAMPED, hidden, ids, weights, slots=slots)
    assert_near(result, grouped_experts_reference(up, down, CLAMPED, hidden, ids, weights, slots)[0])
    # Expert 0 is the one that lies in slot 2
    renamed = torch.tensor([*lies, 3], device=DEVICE)[ids]
    assert torch.equal(result, grouped_experts(up, down, CLAMPED, hidden, renamed, weights)[0])
    assert num_active == len(set(ids.flatten().tolist()) - {3})


def test_stored_numbers_are_read_exactly():
    # Every number of eight and of four bits by the identity, subnormal ones among them
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 4, 64)
    every[every & 127 == 127] = 0  # not a number
    fp8 = ExpertWeights.block_fp8(every.view(torch.float8_e4m3fn), torch.full((1, 1, 4), 0.5, device=DEVICE), (32, 16))
    blocks = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 8, 2, 16)
    exponents = torch.tensor([66, 90, 120, 126, 127, 128, 140, 190], dtype=torch.uint8, device=DEVICE)
    mxfp4 = ExpertWeights.mxfp4(blocks, exponents.view(1, 8, 1).expand(1, 8, 2).contiguous())
    for dtype in (torch.float32, torch.bfloat16):
        for stored in (fp8, mxfp4):
            rows = torch.eye(64, dtype=dtype, device=DEVICE)
            ids = torch.zeros(64, 1, dtype=torch.int64, device=DEVICE)
            output = torch.full((1, 64, stored.num_outputs), torch.nan, device=DEVICE)
            project(rows, stored, output, group_by_expert(ids, 1, 64), Tiles(16, 16 if stored is fp8 else 32), None, 1)
            assert torch.equal(output[0].t(), stored.dense()[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_depends_on_no_other(kind):
    up, down = layer(kind, SILU, torch.float32, 64, 96, 3)
    hidden, ids, weights = random(40, 64), chosen(40, 3, 2), random(40, 2, seed=1)
    together, _ = grouped_experts(up, down, SILU, hidden, ids, weights)
    for n in (0, 17, 39):
        alone, _ = grouped_experts(up, down, SILU, hidden[n : n + 1], ids[n : n + 1], weights[n : n + 1])
        if DEVICE.type == "cuda":
            assert torch.equal(alone[0], together[n])
        else:  # numpy sums a product's terms in an order of its own for each shape
            torch.testing.assert_close(alone[0], together[n], rtol=1e-6, atol=1e-5)


def test_idle_experts_are_not_read():
    up, down = layer("plain", SILU, torch.float32, 64, 32, 6)
    up.values[4:], down.values[4:] = torch.nan, torch.nan
    ids = chosen(4, 3, 2)
    ids[ids == 3] = 6
    result, num_active = grouped_experts(up, down, SILU, random(4, 64), ids, random(4, 2))
    assert torch.isfinite(result).all()
    assert num_active == len(set(ids.flatten().tolist()) - {6})


def test_rows_without_experts_are_zero():
    up, down = layer("plain", SILU, torch.float32, 32, 32, 4)
    ids = torch.full((3, 2), 4, device=DEVICE)
    result, num_active = grouped_experts(up, down, SILU, random(3, 32), ids, random(3, 2))
    assert not result.any()
    assert num_active == 0
    result, num_active = grouped_experts(up, down, SILU, random(3, 32)[:0], ids[:0], random(3, 2)[:0])
    assert result.shape == (0, 32)
    assert num_active == 0


def test_order_of_sums_does_not_depend_on_the_number_of_rows():
    """The cut is by shape; what the number of rows decides is how many of them a program takes."""
    assert [block_rows(n) for n in (1, 16, 17, 32, 33, 64, 500)] == [16, 16, 32, 32, 64, 64, 64]


@pytest.mark.parametrize(
    ("name", "hidden_size", "inner_size", "top_k", "weight_bytes"),
    [
        ("Mixtral-8x7B", 4096, 14336, 2, 2),
        ("OLMoE-1B-7B", 2048, 1024, 8, 2),
        ("Qwen3-30B-A3B", 2048, 768, 8, 2),
        ("Qwen3-30B-A3B-FP8", 2048, 768, 8, 1),
        ("DeepSeek-V2-Lite", 2048, 1408, 6, 2),
        ("GPT-OSS-20B", 2880, 2880, 4, 0.5),
    ],
)
def test_one_row_gives_every_processor_work(name, hidden_size, inner_size, top_k, weight_bytes):
    tiles = layer_tiles(hidden_size, inner_size, top_k, weight_bytes)
    for part, outputs, inputs in ((tiles.up, 2 * inner_size, hidden_size), (tiles.down, hidden_size, inner_size)):
        assert top_k * -(-outputs // part.outputs) * part.splits >= 132
        assert part.splits * part.inputs <= inputs
    assert tiles.up.splits == 1, "a gate needs its whole sum"


def test_a_measured_cut_steps_over_no_block_of_scales(monkeypatch):
    measured = LayerTiles(Tiles(64, 128), Tiles(128, 64))
    monkeypatch.setitem(MEASURED, (2048, 768, 8, 1), measured)
    assert layer_tiles(2048, 768, 8, 1, scale_inputs=128) == measured
    for tiles in (layer_tiles(2048, 768, 8, 1, scale_inputs=scale) for scale in (64, 32)):
        assert tiles != measured
    assert layer_tiles(2048, 768, 8, 1, scale_inputs=32).up.inputs == 32


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: ExpertWeights.plain(torch.zeros(1, 2, 2, dtype=torch.int32)), "weights"),
        (lambda: ExpertWeights.block_fp8(torch.zeros(1, 2, 2), torch.ones(1, 1, 1), (32, 32)), "values"),
        (
            lambda: ExpertWeights.block_fp8(
                torch.zeros(1, 40, 2).to(torch.float8_e4m3fn), torch.ones(1, 1, 1), (32, 32)
            ),
            "scales",
        ),
        (
            lambda: ExpertWeights.block_fp8(torch.zeros(1, 2, 2).to(torch.float8_e4m3fn), torch.ones(1, 1, 1), (2, 10)),
            "block",
        ),
        (lambda: ExpertWeights.mxfp4(torch.zeros(1, 2, 1, 8).byte(), torch.ones(1, 2, 1).byte()), "blocks"),
        (lambda: ExpertWeights.mxfp4(torch.zeros(1, 2, 1, 16).byte(), torch.ones(1, 2, 2).byte()), "scales"),
    ],
)
def test_other_weights_are_refused_by_name(build, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        build()


def experts_of_transformers() -> dict[str, Any]:
    from .test_experts import modules

    return dict(zip(("qwen3_moe", "olmoe", "mixtral", "gpt_oss"), modules(torch.float32), strict=True))


@torch.inference_mode()
def test_layers_of_transformers_run_as_kernels():
    gates = {}
    for name, module in experts_of_transformers().items():
        module.to(DEVICE)
        gates[name] = choice.gate_of(module)
        ids, weights = chosen(5, 6, 3), random(5, 3, seed=1).abs()
        hidden = random(5, 16, seed=2)
        result, num_active = choice.fused(module)(hidden, ids, weights)
        expected = module(hidden, ids % 6, torch.where(ids < 6, weights, 0.0))
        assert_near(result, expected)
        assert num_active == len(set(ids.flatten().tolist()) - {6})
    assert gates == {name: CLAMPED if name == "gpt_oss" else SILU for name in gates}


def test_a_gate_that_no_kernel_has_is_told_by_what_it_computes():
    module = experts_of_transformers()["qwen3_moe"]
    module.act_fn = torch.nn.GELU()
    assert choice.gate_of(module) is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there it is installed")
def test_why_torch_computes_a_layer_is_said_once(caplog):
    choice._say.cache_clear()
    with caplog.at_level(logging.INFO):
        for module in experts_of_transformers().values():
            assert choice.gpu_experts(module) is None
    assert [record.message for record in caplog.records] == [
        "experts are computed by torch, one at a time: Triton is not installed"
    ]
