from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from penstock.kernels.fused_moe import kernel
from penstock.workers.norms import fuse_norms


class ScalesByOnePlus(nn.Module):
    """A norm with an RMS norm's parts and another function, as Gemma's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


@pytest.mark.parametrize("size", [16, 130, 2048])
@torch.inference_mode()
def test_a_fused_norm_changes_no_bit(size: int) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    generator = torch.Generator().manual_seed(5)
    fused, plain = (Qwen3MoeRMSNorm(size, eps=1e-5) for _ in range(2))
    plain.weight.data = fused.weight.data = torch.rand(size, generator=generator) + 0.5
    assert fuse_norms(nn.Sequential(fused)) == 1
    for n in (1, 2, 33):
        rows = 9 * torch.randn(1, n, size, generator=generator)
        assert torch.equal(fused(rows), plain(rows))


@torch.inference_mode()
def test_what_computes_something_else_stays() -> None:
    other = ScalesByOnePlus(16)
    model = nn.Sequential(other, nn.LayerNorm(16), nn.Linear(16, 16))
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    expected = model(rows)
    assert fuse_norms(model) == 0
    assert torch.equal(model(rows), expected)


@pytest.mark.parametrize("size", [16, 130, 2048])
@pytest.mark.parametrize("num_rows", [1, 3, 1000])
@torch.inference_mode()
def test_a_compiled_norm_is_as_precise(size: int, num_rows: int) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    library = kernel()
    if library is None:
        pytest.skip("the kernel is compiled where it runs")
    generator = torch.Generator().manual_seed(5)
    norm = Qwen3MoeRMSNorm(size, eps=1e-5)
    norm.weight.data = torch.rand(size, generator=generator) + 0.5
    rows = torch.randn(num_rows, 2, size, generator=generator) * 3
    expected = copy.deepcopy(norm).double()(rows.double()).float()
    assert fuse_norms(nn.Sequential(norm), library) == 1
    torch.testing.assert_close(norm(rows), expected, rtol=1e-6, atol=1e-6)
    strided = rows.transpose(0, 1)
    torch.testing.assert_close(norm(strided), expected.transpose(0, 1), rtol=1e-6, atol=1e-6)
    assert fuse_norms(nn.Sequential(ScalesByOnePlus(size)), library) == 0
