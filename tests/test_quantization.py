"""Quantised checkpoints give the tokens of their dequantised selves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.cluster.transport.process_ranks import ProcessRanks
from penstock.router.placement import contiguous
from penstock.workers.loader import EmptyModel, LoadedModel, build, inspect, load, resolve_dtype
from penstock.workers.quantization import dequantize_fp8
from penstock.workers.sampling_params import SamplingParams

from .quantized_checkpoints import BLOCK, FP8, Tensors, fp8_of, mxfp4_of, stacked, tensors_of, write
from .tiny_engine import config_of, generate
from .uneven_placement import owned_by_name, uneven

NUM_EXPERTS = 8

CASES = ("deepseek_v3", "minimax_m2", "qwen3_moe stacked", "gpt_oss")


@pytest.fixture(scope="module")
def quantized(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """A quantised checkpoint, and one of the same worth that is not."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(case: str) -> tuple[Path, Path]:
        if case not in made:
            target = tmp_path_factory.mktemp("quantized")
            source = checkpoint(case.split()[0])
            if case.endswith("stacked"):
                source = stacked(source, target / "stacked")
            made[case] = (mxfp4_of if case == "gpt_oss" else fp8_of)(source, target)
        return made[case]

    return make


def tokens_of(ranks: Any, config: EngineConfig, prompts: list[list[int]]) -> list[list[int]]:
    engine = Engine(config, ranks)
    tokens = generate(engine, prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    assert engine.stats().num_failed_steps == 0
    return tokens


PROMPTS = [[5, 40, 9], [*range(10, 40)], [77]]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_dequantised_model(case, quantized, checkpoint, reference):
    directory, worth = quantized(case)
    config = config_of(directory, 1)
    got = tokens_of(LocalRanks(make_runner(config, 0)), config, PROMPTS)
    assert got == [reference(worth, prompt, 20, ignore_eos=True) for prompt in PROMPTS]
    unquantised = [reference(checkpoint(case.split()[0]), prompt, 20, ignore_eos=True) for prompt in PROMPTS]
    assert got != unquantised, "quantisation must have changed the model, or nothing was tested"


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_two_ranks_give_the_tokens_of_the_dequantised_model(case, quantized, reference):
    directory, worth = quantized(case)
    config = config_of(directory, 2)
    ranks = ProcessRanks(config)
    try:
        got = tokens_of(ranks, config, PROMPTS)
    finally:
        ranks.close()
    assert got == [reference(worth, prompt, 20, ignore_eos=True) for prompt in PROMPTS]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_read_and_hold_their_halves(case, quantized):
    directory, worth = quantized(case)
    full = load_whole(worth)
    stored = tensors_of(directory)
    in_file = sum(tensor.nbytes for key, tensor in stored.items() if is_expert(key))
    assert any(tensor.itemsize == 1 for key, tensor in stored.items() if is_expert(key))
    for rank in range(2):
        path, config = inspect(str(directory))
        empty = build(config, torch.float32)
        placement = uneven(len(empty.expert_modules))
        loaded = load(path, empty, torch.device("cpu"), placement, rank)
        owned = owned_by_name(loaded, placement, rank)
        for key, tensor in loaded.model.state_dict().items():
            assert torch.equal(tensor, full[key][owned[key]] if key in owned else full[key]), key
        num_held = sum(loaded.expert_modules[layer].num_experts for layer in range(placement.num_layers))
        assert loaded.checkpoint_bytes == sum(tensor.nbytes for tensor in stored.values())
        assert loaded.bytes_read == loaded.checkpoint_bytes - in_file + in_file * num_held // (
            NUM_EXPERTS * placement.num_layers
        )


def load_whole(directory: Path) -> Tensors:
    path, config = inspect(str(directory))
    return load_one(path, build(config, torch.float32)).model.state_dict()


def load_one(path: Path, empty: EmptyModel) -> LoadedModel:
    placement = contiguous(len(empty.expert_modules), NUM_EXPERTS, 1)
    return load(path, empty, torch.device("cpu"), placement, 0)


def is_expert(key: str) -> bool:
    return ".experts." in key


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss"])
def test_weights_are_dequantised_to_the_compute_dtype(case, quantized):
    directory, worth = quantized(case)
    path, config = inspect(str(directory))
    loaded = load_one(path, build(config, torch.bfloat16))
    full = load_whole(worth)
    for module in loaded.expert_modules:
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    for key, tensor in loaded.model.state_dict().items():
        if tensor.dtype == torch.bfloat16:
            assert torch.equal(tensor, full[key].bfloat16()), key


def test_a_quantised_checkpoint_that_names_no_dtype_is_computed_in_bfloat16(quantized):
    _, config = inspect(str(quantized("gpt_oss")[0]))
    config.dtype = None
    assert resolve_dtype(config, "auto") == torch.bfloat16
    del config.quantization_config
    assert resolve_dtype(config, "auto") == torch.float32


def test_scales_of_powers_of_two_stored_in_one_byte():
    weight = torch.randn(20, 25).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 4.0, 1.0], [2.0, 0.25, 8.0]])
    expected = torch.empty(20, 25)
    for i in range(20):
        for j in range(25):
            expected[i, j] = weight[i, j].float() * scale[i // 16, j // 10]
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e8m0fnu):
        assert torch.equal(dequantize_fp8(weight, scale.to(dtype), BLOCK), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantisation 'gptq' is not supported; supported: fp8, mxfp4"),
        ({"quant_method": "bitsandbytes"}, "quantisation 'bitsandbytes'"),
        ({"quant_method": "compressed-tensors"}, "quantisation 'compressed-tensors'"),
        ({"bits": 4}, "quantisation None"),
        ({"quant_method": "fp8"}, "fp8 with weight_block_size None is not supported"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({**FP8, "weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]"),
        ({**FP8, "weight_block_size": ["all", 128]}, r"weight_block_size \['all', 128\]"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme"),
    ],
)
def test_other_quantisations_are_refused_by_name(settings, message, checkpoint, tmp_path):
    source = checkpoint("qwen3_moe")
    directory = write(source, tmp_path / "other", tensors_of(source), quantization_config=settings)
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        inspect(str(directory))


@pytest.mark.parametrize(
    ("case", "lost", "message"),
    [
        ("deepseek_v3", "down_proj.weight_scale_inv", "is float8, but the checkpoint holds no .*_scale_inv"),
        ("gpt_oss", "down_proj_scales", "holds .*down_proj_blocks, but no .*down_proj_scales"),
    ],
)
def test_weights_without_scales_are_refused_by_name(case, lost, message, quantized, tmp_path):
    source = quantized(case)[0]
    tensors = {key: tensor for key, tensor in tensors_of(source).items() if not key.endswith(lost)}
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        inspect(str(write(source, tmp_path / "lost", tensors)))


@pytest.mark.parametrize(("case", "suffix"), [("deepseek_v3", "kv_b_proj.weight_scale_inv"), ("gpt_oss", "_scales")])
def test_scales_of_another_shape_are_refused_by_name(case, suffix, quantized, tmp_path):
    source = quantized(case)[0]
    tensors = tensors_of(source)
    key = next(key for key in tensors if key.endswith(suffix))
    tensors[key] = tensors[key][..., :-1]
    with pytest.raises(ValueError, match=f"^model: {key} has shape .*, expected"):
        load_whole(write(source, tmp_path / "short", tensors))
