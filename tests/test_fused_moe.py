from __future__ import annotations

import ctypes
import platform
import shutil

import pytest
import torch
from torch.nn.functional import linear, silu

from penstock.kernels import fused_moe as module
from penstock.kernels.fused_moe import TiledWeights, compile_kernel, fits, fused_moe, kernel

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="the kernel is compiled where it runs"
)
MARCHES = ["native", "x86-64-v3"]
"""The second has vectors of half the length, and tiles of half the size."""


@pytest.fixture(scope="module", params=MARCHES)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return compile_kernel(march=request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [[1], [3, 0, 9], [2, 70, 1], [200]])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 40), (72, 16), (32, 1100)])
def test_each_group_by_its_own_weight(library, sizes, num_outputs, num_inputs) -> None:
    weights = random(5, num_outputs, num_inputs).bfloat16()
    rows = random(sum(sizes), num_inputs, seed=1)
    experts = [3, 0, 4][: len(sizes)]
    result = TiledWeights(library, weights).multiply(rows, experts, sizes)
    parts = zip(experts, rows.split(sizes), strict=True)
    expected = torch.cat([linear(part.double(), weights[expert].double()) for expert, part in parts])
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)


def reference(
    up: torch.Tensor, down: torch.Tensor, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same layer in float64, one row and expert at a time."""
    output = torch.zeros(hidden.shape, dtype=torch.float64)
    for n, (row, ids) in enumerate(zip(hidden.double(), expert_ids.tolist(), strict=True)):
        for k, expert in enumerate(ids):
            if expert < len(up):
                gate, linear_part = (up[expert].double() @ row).chunk(2)
                output[n] += weights[n, k].double() * (down[expert].double() @ (silu(gate) * linear_part))
    return output


def layer(num_rows: int, *, hidden_size: int = 40, inner_size: int = 96, num_experts: int = 6, top_k: int = 3):
    up = (random(num_experts, 2 * inner_size, hidden_size) * 0.3).bfloat16()
    down = (random(num_experts, hidden_size, inner_size, seed=1) * 0.3).bfloat16()
    chosen = torch.Generator().manual_seed(4)
    # one id more than there are experts: "none"
    ids = torch.stack([torch.randperm(num_experts + 1, generator=chosen)[:top_k] for _ in range(num_rows)])
    return up, down, random(num_rows, hidden_size, seed=2), ids, random(num_rows, top_k, seed=3).abs()


@pytest.mark.parametrize("num_rows", [1, 2, 5, 33, 700])
def test_a_layer_of_experts(library, num_rows) -> None:
    up, down, hidden, ids, weights = layer(num_rows)
    result, num_active = fused_moe(TiledWeights(library, up), TiledWeights(library, down), hidden, ids, weights)
    torch.testing.assert_close(result.double(), reference(up, down, hidden, ids, weights), rtol=1e-5, atol=1e-4)
    assert num_active == len(set(ids.flatten().tolist()) - {len(up)})


def test_rows_without_experts_are_zero(library) -> None:
    up, down, hidden, ids, weights = layer(4)
    tiled = TiledWeights(library, up), TiledWeights(library, down)
    for none in (len(up), 1000):
        result, num_active = fused_moe(*tiled, hidden, torch.full_like(ids, none), weights)
        assert not result.any()
        assert num_active == 0
    result, num_active = fused_moe(*tiled, hidden[:0], ids[:0], weights[:0])
    assert result.shape == (0, 40)
    assert num_active == 0


def test_negative_ids_are_refused(library) -> None:
    up, down, hidden, ids, weights = layer(4)
    ids[2, 1] = -1
    with pytest.raises(IndexError, match="expert_ids"):
        fused_moe(TiledWeights(library, up), TiledWeights(library, down), hidden, ids, weights)


def test_idle_experts_are_not_read(library) -> None:
    up, down, hidden, ids, weights = layer(4)
    ids = ids % 4
    up[4:], down[4:] = torch.nan, torch.nan
    result, _ = fused_moe(TiledWeights(library, up), TiledWeights(library, down), hidden, ids, weights)
    assert torch.isfinite(result).all()


def test_a_row_depends_on_no_other_and_on_no_thread(library, threads) -> None:
    up, down, hidden, ids, weights = layer(90, num_experts=3, top_k=2)
    tiled = TiledWeights(library, up), TiledWeights(library, down)
    threads(2)
    together, _ = fused_moe(*tiled, hidden, ids, weights)
    threads(1)
    for n in range(90):
        alone, _ = fused_moe(*tiled, hidden[n : n + 1], ids[n : n + 1], weights[n : n + 1])
        assert torch.equal(alone[0], together[n])
    rows = tiled[0].multiply(hidden, [1], [90])
    threads(2)
    assert torch.equal(rows, torch.cat([tiled[0].multiply(row[None], [1], [1]) for row in hidden]))


def test_gates_far_from_zero_are_finite(library) -> None:
    inner_size = 64
    values = torch.tensor([-1e30, -500.0, -88.5, -87.0, -1e-3, 0.0, 1e-3, 1.0, 87.0, 88.5, 500.0, 1e30])
    up = torch.cat([torch.ones(1, inner_size, 1), torch.ones(1, inner_size, 1)], dim=1)
    up[:, inner_size:, 0] = 0.0
    up = torch.cat([up, torch.ones(1, 2 * inner_size, 1)], dim=2)
    up[:, :inner_size, 1] = 0.0  # the gate is a row's first number, the other factor its second
    down = torch.zeros(1, 2, inner_size)
    down[:, :, 0] = 1.0
    hidden = torch.stack([values, torch.ones(len(values))], dim=1)
    tiled = TiledWeights(library, up.bfloat16()), TiledWeights(library, down.bfloat16())
    ids, weights = torch.zeros(len(values), 1, dtype=torch.int64), torch.ones(len(values), 1)
    result, _ = fused_moe(*tiled, hidden, ids, weights)
    torch.testing.assert_close(result[:, 0], silu(values), rtol=1e-6, atol=1e-8)


def test_inner_sizes_of_broken_tiles_do_not_fit(library) -> None:
    def sizes(inner_size: int, factor: int = 2) -> bool:
        up, down = torch.zeros(1, factor * inner_size, 8), torch.zeros(1, 8, inner_size)
        return fits(TiledWeights(library, up.bfloat16()), TiledWeights(library, down.bfloat16()))

    assert sizes(96)
    assert not sizes(40)
    assert not sizes(96, factor=1)


@pytest.mark.parametrize("failure", ["no compiler", "it fails"])
def test_without_a_compiler_there_is_no_kernel(failure, monkeypatch, caplog) -> None:
    kernel.cache_clear()
    with monkeypatch.context() as patch:
        if failure == "no compiler":
            patch.setattr(shutil, "which", lambda name: None)
        else:
            patch.setattr(module, "_FLAGS", ("--no-such-flag",))
        assert kernel() is None
        assert kernel() is None
    assert len(caplog.records) == 1
    kernel.cache_clear()
    assert kernel() is not None
