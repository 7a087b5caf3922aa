from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.workers import packed_weights
from penstock.workers.architectures import SUPPORTED
from penstock.workers.packed_weights import PackedLinear, packs_weights
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import config_of, generate

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="this CPU has no kernel for packed weights"
)


@pytest.fixture(autouse=True)
def no_bfloat16_instructions(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.fixture
def everything_packed(monkeypatch):
    monkeypatch.setattr(packed_weights, "_SMALLEST_PACKED", 1)


def _weight(*shape: int, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(5)) * scale).bfloat16()


def test_only_bfloat16_on_a_cpu_without_it_is_packed(monkeypatch):
    assert packs_weights(torch.bfloat16, CPU)
    assert not packs_weights(torch.float32, CPU)
    assert not packs_weights(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not packs_weights(torch.bfloat16, CPU)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.inference_mode()
def test_a_packed_layer_computes_the_function_of_its_weight(everything_packed, rows, has_bias):
    weight, bias = _weight(72, 96), _weight(72, scale=1.0) if has_bias else None
    layer = PackedLinear(weight, bias)
    assert layer._packed is not None
    hidden = torch.randn(rows, 96)
    expected = linear(hidden, weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(layer(hidden), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_tiny_values_lose_no_more_than_promised(everything_packed):
    weight = _weight(64, 64, scale=2.0**-16)
    recovered = PackedLinear(weight, None)(torch.eye(64)).t()
    assert (recovered - weight.float()).abs().max() <= 2.0**-25


@torch.inference_mode()
def test_values_beyond_a_half_are_kept(everything_packed):
    weight = _weight(64, 64, scale=1e5)
    torch.testing.assert_close(PackedLinear(weight, None)(torch.eye(64)).t(), weight.float(), rtol=0, atol=0)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_a_bfloat16_model_computes_the_float32_function_of_its_weights(model_type, checkpoint, everything_packed):
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
