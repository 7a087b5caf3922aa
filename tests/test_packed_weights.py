from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.kernels.fused_moe import kernel
from penstock.workers import packed_weights
from penstock.workers.architectures import SUPPORTED
from penstock.workers.experts import ExpertShard
from penstock.workers.packed_weights import PackedLinear, packs_weights
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import config_of, generate

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this CPU has no kernel for packed weights"
)


@pytest.fixture(autouse=True)
def no_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.fixture
def everything_packed(monkeypatch):
    monkeypatch.setattr(packed_weights, "_SMALLEST_PACKED", 1)


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(packed_weights, "kernel", lambda: None)


@pytest.fixture(params=["compiled", "fbgemm"])
def packing(request, monkeypatch):
    if request.param == "fbgemm":
        monkeypatch.setattr(packed_weights, "kernel", lambda: None)
    elif kernel() is None:
        pytest.skip("the kernel is compiled where it runs")
    return request.param


def _weight(*shape: int, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(5)) * scale).bfloat16()


def test_only_bfloat16_on_a_cpu_without_amx_is_packed(monkeypatch):
    assert packs_weights(torch.bfloat16, CPU)
    assert not packs_weights(torch.float32, CPU)
    assert not packs_weights(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not packs_weights(torch.bfloat16, CPU)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.inference_mode()
def test_a_packed_layer_computes_the_function_of_its_weight(everything_packed, packing, rows, has_bias):
    weight, bias = _weight(72, 96), _weight(72, scale=1.0) if has_bias else None
    layer = PackedLinear(weight, bias)
    assert (layer._packed is not None, layer._tiled is not None) == (packing == "fbgemm", packing == "compiled")
    hidden = torch.randn(2, rows, 96)
    expected = linear(hidden, weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_tiny_values_lose_no_more_than_promised(everything_packed, without_compiler):
    weight = _weight(64, 64, scale=2.0**-16)
    recovered = PackedLinear(weight, None)(torch.eye(64)).t()
    assert (recovered - weight.float()).abs().max() <= 2.0**-25


@torch.inference_mode()
def test_values_beyond_a_half_are_kept(everything_packed, packing):
    weight = _weight(64, 64, scale=1e5)
    torch.testing.assert_close(PackedLinear(weight, None)(torch.eye(64)).t(), weight.float(), rtol=0, atol=0)


def _experts(act: str, inner_size: int) -> Any:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=48, moe_intermediate_size=inner_size, num_experts=6, num_experts_per_tok=3, hidden_act=act
    )
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config)
    for seed, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(seed)
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.3).bfloat16()
    return module


@pytest.mark.parametrize(
    ("act", "inner_size", "is_fused"), [("silu", 64, True), ("gelu", 64, False), ("silu", 56, False)]
)
@torch.inference_mode()
def test_experts_are_one_operation_where_that_computes_the_same(packing, act, inner_size, is_fused):
    module = _experts(act, inner_size)
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(20, 48, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(20)])
    weights = torch.rand(20, 3, generator=generator)
    expected = copy.deepcopy(module).float()(hidden, ids, weights)
    shard = ExpertShard(module)
    assert (shard._fused is not None) == (is_fused and packing == "compiled")
    result, num_active = shard.run(hidden, ids, weights)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)
    assert num_active == len(set(ids.flatten().tolist()))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_bfloat16_model_computes_the_float32_function_of_its_weights(
    model_type, checkpoint, everything_packed, packing
):
    from transformers import AutoModelForCausalLM

    directory = checkpoint(model_type)
    config = config_of(directory, dtype="bfloat16", max_model_len=64, kv_cache_bytes=1 << 20)
    ranks = LocalRanks(make_runner(config, 0))
    assert ranks.infos[0].model.dtype == "bfloat16"
    prompt = [5, 17, 40, 3, 88, 21]
    (tokens,) = generate(Engine(config, ranks), [prompt], SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).float().eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        expected = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=10**6
        )
    assert tokens == expected[0, len(prompt) :].tolist()
