from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from penstock.workers import experts
from penstock.workers.experts import ExpertShard

H, F, E, K = 16, 12, 6, 3


def modules(dtype: torch.dtype) -> list[Any]:
    """transformers' experts modules with random weights, computing eagerly."""
    from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    made = [
        Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K)),
        OlmoeExperts(OlmoeConfig(hidden_size=H, intermediate_size=F, num_experts=E, num_experts_per_tok=K)),
        MixtralExperts(MixtralConfig(hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)),
        # biased, transposed and interleaved
        GptOssExperts(GptOssConfig(hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)),
    ]
    generator = torch.Generator().manual_seed(2)
    for module in made:
        module.config._experts_implementation = "eager"
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.3).to(dtype)
    return made


def rows(n: int, dtype: torch.dtype, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, H, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(n)]) if n else torch.zeros(0, K).long()
    weights = torch.rand(n, K, generator=generator).to(dtype)
    return hidden, ids, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 33])
@torch.inference_mode()
def test_equals_transformers_eager_experts(dtype: torch.dtype, n: int) -> None:
    hidden, ids, weights = rows(n, dtype)
    for module in modules(dtype):
        expected = copy.deepcopy(module).float()(hidden.float(), ids, weights.float()).to(dtype)
        result, num_active = ExpertShard(module).run(hidden, ids, weights)
        assert result.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-6)
        else:  # of a sum that nearly cancels, rounding leaves little: no element says much by itself
            assert (result - expected).float().norm() < 1e-2 * expected.float().norm()
        assert num_active == len(set(ids.flatten().tolist()))


@torch.inference_mode()
def test_sentinels_contribute_nothing() -> None:
    module = modules(torch.float32)[0]
    hidden, ids, weights = rows(9, torch.float32)
    ids[0] = E
    ids[3, 1:] = E
    ids[7, 0] = E
    result, num_active = ExpertShard(module).run(hidden, ids, weights)
    zeroed = torch.where(ids == E, 0.0, weights)
    expected = module(hidden, torch.where(ids == E, 0, ids), zeroed)
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=2e-6)
    assert not result[0].any()
    assert num_active == len(set(ids.flatten().tolist()) - {E})

    nothing, num_active = ExpertShard(module).run(hidden, torch.full_like(ids, E), weights)
    assert not nothing.any()
    assert num_active == 0


@torch.inference_mode()
def test_no_rows_give_no_rows() -> None:
    for module in modules(torch.float32):
        result, num_active = ExpertShard(module).run(*rows(0, torch.float32))
        assert result.shape == (0, H)
        assert num_active == 0


@torch.inference_mode()
def test_parts_of_the_experts_sum_to_the_whole() -> None:
    # What two ranks do: each holds half, and calls the other half "none"
    whole = modules(torch.float32)[0]
    hidden, ids, weights = rows(20, torch.float32)
    total = torch.zeros_like(hidden)
    for first, last in [(0, 2), (2, E)]:
        part = copy.deepcopy(whole)
        for name, parameter in list(part.named_parameters()):
            setattr(part, name, torch.nn.Parameter(parameter[first:last]))
        part.num_experts = last - first
        mine = (ids >= first) & (ids < last)
        total += ExpertShard(part).run(hidden, torch.where(mine, ids - first, last - first), weights)[0]
    torch.testing.assert_close(total, ExpertShard(whole).run(hidden, ids, weights)[0], rtol=2e-6, atol=2e-6)


@torch.inference_mode()
def test_idle_experts_are_not_read() -> None:
    module = modules(torch.float32)[0]
    hidden, ids, weights = rows(4, torch.float32)
    ids = ids % 4
    module.gate_up_proj.data[4:] = torch.nan
    module.down_proj.data[4:] = torch.nan
    assert torch.isfinite(ExpertShard(module).run(hidden, ids, weights)[0]).all()


@torch.inference_mode()
def test_groups_of_experts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, ids, weights = rows(20, torch.float32)
    for whole, cut in zip(modules(torch.float32), modules(torch.float32), strict=True):
        expected = ExpertShard(whole).run(hidden, ids, weights)
        with monkeypatch.context() as patch:
            patch.setattr(experts, "_GROUP_ELEMENTS", 24 * 2 * F)
            shard = ExpertShard(cut)
        assert len(list(shard._groups(ids.flatten().bincount().tolist()))) > 1
        result = shard.run(hidden, ids, weights)
        torch.testing.assert_close(result[0], expected[0], rtol=2e-6, atol=2e-6)
        assert result[1] == expected[1]
