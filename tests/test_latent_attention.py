"""Latent attention over latents as they are kept: which layers do so, by what proof, and what it computes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention

from penstock.workers import latent_attention, page_attention
from penstock.workers import runner as runners
from penstock.workers.kv_cache import PagedKVCache
from penstock.workers.latent_attention import Absorbed, absorb
from penstock.workers.page_attention import attend, attend_with, latent_options, objection
from penstock.workers.plan import Bucket, RankPlan
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import TokenSampling

from .static_steps import BLOCK, STEPS, chain, padded, prompts, request, runner_of
from .test_page_attention import LATENT, attend_by_blocks, pages_of
from .tiny_configs import settings_of

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "queries without a latent": ("deepseek_v2", {"q_lora_rank": None}),
    "halves that rotate": ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None}),
    "scores scaled for long texts": (
        "deepseek_v3",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "biases": ("glm4_moe_lite", {"attention_bias": True}),
}


@pytest.fixture(autouse=True)
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def saved(folder: Path, model_type: str, **settings: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**settings_of(model_type), **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def in_place(runner: ModelRunner) -> ModelRunner:
    runner.padded.objection = ""
    runner.padded.choose_attention()
    return runner


def logits_of(runner: ModelRunner) -> tuple[torch.Tensor, torch.Tensor]:
    """Return those of a step as it is, and of a padded one."""
    runner.step(prompts())
    plan = RankPlan(0, 1, requests=STEPS["mixed"])
    with torch.inference_mode():
        return runner._launched(plan).logits, runner.padded.run(padded(plan, runner)).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_recognised(tmp_path: Path, name: str) -> None:
    model_type, settings = VARIANTS[name]
    runner = in_place(runner_of(saved(tmp_path, model_type, **settings)))
    assert runner.padded.objection == ""
    expected, found = logits_of(runner)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert runner.cache.rows is not None
    assert runner.cache.rows.pages is not None


def test_in_bfloat16_it_differs_by_roundings(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and outputs are rounded over latents, keys and values are not: some steps of 2^-8 on the way."""
    monkeypatch.setattr(runners, "packs_weights", lambda *given: False)
    runner = ModelRunner(
        model=str(checkpoint("deepseek_v3")),
        dtype="bfloat16",
        block_size=BLOCK,
        max_model_len=64,
        kv_cache_bytes=1 << 20,
    )
    assert in_place(runner).padded.objection == ""
    assert runner.cache.pools[0].dtype == torch.bfloat16
    expected, found = (logits.float() for logits in logits_of(runner))
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_the_proof_has_room_for_roundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "packs_weights", lambda *given: False)
    monkeypatch.setattr(latent_attention, "_ROUNDINGS", 2)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "initializer_range": 0.05}
    widths = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    directory = saved(tmp_path, "deepseek_v3", **heads, **widths)
    runner = ModelRunner(
        model=str(directory), dtype="bfloat16", block_size=16, max_model_len=64, kv_cache_bytes=1 << 20
    )
    assert in_place(runner).padded.objection == ""


# --- the proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", LATENT)
def test_what_is_absorbed_is_the_weight_itself(checkpoint: Callable[[str], Path], model_type: str) -> None:
    runner = runner_of(checkpoint(model_type))
    module: Any = runner.model.model.layers[1].self_attn
    with torch.inference_mode():
        absorbed = absorb(module, 16, 8)
    assert absorbed is not None
    weight = module.kv_b_proj.weight
    assert absorbed.to_keys.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert absorbed.to_values.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    assert (absorbed.to_keys.shape, absorbed.to_values.shape) == ((4, 8, 16), (4, 12, 16))


def scaled(expand: Callable[..., Any]) -> Callable[..., Any]:
    def other(latents: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = expand(latents, positions)
        return keys, 1.02 * values

    return other


def normed(expand: Callable[..., Any]) -> Callable[..., Any]:
    return lambda latents, positions: expand(torch.nn.functional.rms_norm(latents, latents.shape[-1:]), positions)


def turned(expand: Callable[..., Any]) -> Callable[..., Any]:
    return lambda latents, positions: expand(latents, positions.flip(-1))


@pytest.mark.parametrize("other", [scaled, normed, turned])
def test_a_layer_that_expands_otherwise_gathers(
    checkpoint: Callable[[str], Path], other: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    runner = runner_of(checkpoint("deepseek_v3"))
    layer: Any = runner.model.model.layers[1].self_attn
    layer.expand_kv = other(layer.expand_kv)
    with caplog.at_level(logging.INFO):
        in_place(runner)
    assert "layer 1 makes keys and values of latents in a way of its own" in runner.padded.objection
    assert "gather padded contexts" in caplog.text
    expected, found = logits_of(runner)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert runner.cache.rows is not None
    assert runner.cache.rows.pages is None


def test_a_layer_that_attends_otherwise_gathers(checkpoint: Callable[[str], Path]) -> None:
    runner = runner_of(checkpoint("deepseek_v3"))
    layer: Any = runner.model.model.layers[0].self_attn
    forward = layer.forward

    def gated(*args: Any, **kwargs: Any) -> Any:
        """Look at what comes of keys."""
        output, *rest = forward(*args, **kwargs)
        keys, _ = layer.expand_kv(*[torch.ones(1, 1, 1, width) for width in (16, 8)])
        return output * (2 if keys.shape[1] == 4 else 1), *rest

    layer.forward = gated
    assert "layer 0 attends to latents in a way of its own" in in_place(runner).padded.objection
    assert not any(states.any() for states in runner.cache.pools)
    assert "expand_kv" not in vars(layer)


def test_latents_lie_beside_their_positions_and_count_once(checkpoint: Callable[[str], Path]) -> None:
    cache = runner_of(checkpoint("deepseek_v3")).cache
    assert cache.keeps_latents
    assert cache.widths == [(24, 16)] * 2
    slots = (cache.num_blocks + 1) * BLOCK
    assert [states.shape for states in cache.pools] == [(slots, 1, 24)] * 2
    assert all(states.is_contiguous() for states in cache.pools)
    assert sum(states.nbytes for states in cache.pools) == (cache.num_blocks + 1) * cache.block_bytes


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model_type", LATENT)
def test_replayed_steps_attend_to_latents(checkpoint: Callable[[str], Path], model_type: str) -> None:
    runner = ModelRunner(
        model=str(checkpoint(model_type)), device="cuda", block_size=16, max_model_len=64, kv_cache_bytes=1 << 20
    )
    assert runner.padded.objection == ""
    for _ in range(2):
        expected, found = logits_of(runner)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_compiled_it_reads_a_context_s_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cpu._is_avx2_supported():
        pytest.skip("torch compiles flex_attention for AVX2 alone")
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    compiled = torch.compile(attend_with, fullgraph=True, dynamic=False)
    torch.manual_seed(5)
    requests = [request(0, chain(4), TokenSampling()), request(2, [-1, 0, 0, 1], TokenSampling())]
    mask = pages_of(requests, Bucket(2, 4, 64)).mask(None)
    pool = torch.randn(49 * BLOCK, 1, 576)
    unread = torch.ones(49, dtype=torch.bool)
    for r in range(2):
        unread[mask.kv_indices[r, 0, 0, : mask.kv_num_blocks[r, 0, 0]].long()] = False
    pool.unflatten(0, (-1, BLOCK))[unread] = torch.nan
    keys = pool.transpose(0, 1)[None]
    values = keys[..., :512]
    query = torch.randn(2, 4, 4, 16 + 64)
    absorbed = Absorbed(*(torch.randn(4, 16 + 12, 512) / 16).split([16, 12], dim=1))
    with torch.inference_mode():
        found = compiled(query, keys, values, mask, None, 0.1, {}, absorbed)
    expected = attend_by_blocks(query, keys, values, mask, None, 0.1, absorbed)
    assert found.shape == (2, 4, 4, 12)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_scores_are_scaled_by_the_width_of_queries() -> None:
    torch.manual_seed(5)
    mask = pages_of(STEPS["one"], Bucket(1, 4, 64)).mask(None)
    keys = torch.randn(49 * BLOCK, 1, 24).transpose(0, 1)[None]
    absorbed = Absorbed(*torch.randn(4, 20, 16).split([8, 12], dim=1))
    query = torch.randn(1, 4, 4, 16)
    found, explicit = (attend(query, keys, keys[..., :16], mask, None, scale, absorbed) for scale in (None, 0.25))
    torch.testing.assert_close(found, explicit)


def test_kernels_are_cut_into_what_processors_hold() -> None:
    h100, small = page_attention._Gpu(132, 227 << 10), page_attention._Gpu(84, 99 << 10)
    shapes = product(
        (h100, small),
        (1, 4, 64),
        (1, 2, 4, 8),
        (16, 20, 64, 128),
        (16, 48, 64),
        (8, 1024),
        (2, 4),
        ((576, 512), (24, 16)),
    )
    for gpu, num_requests, num_rows, num_heads, block_size, most_blocks, itemsize, widths in shapes:
        if gpu is small and itemsize == 4 and widths == (576, 512):
            continue
        options = latent_options(
            num_requests=num_requests,
            num_rows=num_rows,
            num_heads=num_heads,
            block_size=block_size,
            most_blocks=most_blocks,
            widths=widths,
            itemsize=itemsize,
            gpu=gpu,
        )
        rows, slots = options["BLOCK_M"], options["BLOCK_N"]
        assert slots in (16, 32)
        assert block_size % slots == 0
        group_size = {16: 16, 20: 4, 64: 16, 128: 16}[num_heads]
        assert rows == 16 or (rows == 32 and num_rows * group_size > 16)
        assert page_attention._latent_bytes(rows, slots, widths, itemsize) <= gpu.shared_bytes
        programs = num_requests * num_heads // group_size * -(-num_rows * group_size // rows) * options["SPLIT_KV"]
        num_parts = options["SPLIT_KV"]
        assert num_parts == 1 or programs <= gpu.processors
        assert num_parts == 1 or most_blocks * block_size // num_parts >= 64
        assert num_parts == most_blocks * block_size // 64 or programs > gpu.processors / 2


def test_a_gpu_without_room_for_a_tile_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    def cache_of(dtype: torch.dtype) -> PagedKVCache:
        cache = PagedKVCache(16)
        cache.update(*(torch.zeros(1, 1, 1, width, dtype=dtype) for width in (512, 64)), 0)
        cache.note_attended(*(torch.zeros(1, 16, 1, width, dtype=dtype) for width in (192, 192, 128)))
        cache.allocate(1 << 20, torch.device("meta"))
        return cache

    assert objection(cache_of(torch.bfloat16), torch.device("cuda")) == ""
    assert "162 KiB of shared memory" in objection(cache_of(torch.float32), torch.device("cuda"))
    roomy = page_attention._Gpu(132, 227 << 10)
    monkeypatch.setattr(page_attention._Gpu, "of", lambda device: roomy)
    assert objection(cache_of(torch.float32), torch.device("cuda")) == ""
