from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from penstock.workers.kv_budget import (
    DEFAULT_BYTES,
    fixed_pool_bytes,
    gathered_slot_bytes,
    gpu_pool_bytes,
    mask_bytes,
    pool_bytes_beside,
)
from penstock.workers.rows import largest_step
from penstock.workers.runner import ModelRunner

GIB = 1 << 30


def test_a_fixed_pool_is_what_was_asked_for_if_that_is_there() -> None:
    assert fixed_pool_bytes(None, GIB) == DEFAULT_BYTES == 256 << 20
    assert fixed_pool_bytes(GIB, GIB) == GIB
    with pytest.raises(ValueError, match=rf"^kv_cache_bytes: {GIB + 1} is not in \[1, {GIB}\]"):
        fixed_pool_bytes(GIB + 1, GIB)
    with pytest.raises(ValueError, match=r"^kv_cache_bytes: "):
        fixed_pool_bytes(None, 1000)


def test_a_gpus_pool_is_its_share_less_what_is_used_and_needed() -> None:
    # 80 GiB, of which weights and other processes hold 30; a step needs 2
    assert gpu_pool_bytes(total=80 * GIB, free=50 * GIB, activation_bytes=2 * GIB, utilization=0.9) == 40 * GIB
    assert gpu_pool_bytes(total=80 * GIB, free=50 * GIB, activation_bytes=0, utilization=1.0) == 50 * GIB
    assert gpu_pool_bytes(total=80 * GIB, free=50 * GIB, activation_bytes=2 * GIB, utilization=0.5) == 8 * GIB


@pytest.mark.parametrize("activation_gib", [10, 11])
def test_a_gpu_without_room_for_kv_is_refused(activation_gib: int) -> None:
    with pytest.raises(ValueError, match=r"^gpu_memory_utilization: 0\.5 of \d+ bytes leaves none for KV"):
        gpu_pool_bytes(total=80 * GIB, free=50 * GIB, activation_bytes=activation_gib * GIB, utilization=0.5)


@pytest.mark.parametrize("most_gathered", [100, 1000, 5000, 100_000])
def test_what_a_pool_holds_can_be_gathered_beside_it(most_gathered: int) -> None:
    slot, gathered, there = 700, 300, 1_000_000
    pool = pool_bytes_beside(there, slot_bytes=slot, gathered_bytes=gathered, most_gathered=most_gathered)

    def needed(num_bytes: int) -> int:
        return num_bytes + min(2 * num_bytes // slot, most_gathered) * gathered  # as much padding as contexts

    assert needed(pool) <= there < needed(pool + 2 * slot), "and not a slot less than there is room for"


def test_a_slot_that_is_gathered_has_keys_and_values_for_every_head(checkpoint: Callable[[str], Path]) -> None:
    """Shared ones as often as they are shared, and latents expanded."""
    for model_type in ("qwen3_moe", "deepseek_v3"):
        runner = ModelRunner(model=str(checkpoint(model_type)), block_size=4, max_model_len=32, kv_cache_bytes=1 << 20)
        config, cache = runner.model.config, runner.cache
        heads = config.num_attention_heads
        if model_type == "qwen3_moe":
            kept, attended = 2 * config.num_key_value_heads * config.head_dim, 2 * heads * config.head_dim
        else:
            kept = config.kv_lora_rank + config.qk_rope_head_dim
            attended = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        assert (cache.most_kept_numbers, cache.most_attended_numbers) == (kept, attended)
        assert gathered_slot_bytes(kept, attended, 4) == 4 * (kept + attended) + mask_bytes(32, 1, 4)
        assert gathered_slot_bytes(kept, attended, 4, widens=True) > 4 * (kept + 3 * attended)


def test_a_pool_larger_than_the_machine_is_refused_before_it_is_taken(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"^kv_cache_bytes: "):
        ModelRunner(model=str(checkpoint("qwen3_moe")), device="cpu", kv_cache_bytes=2 * psutil.virtual_memory().total)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_largest_step_samples_every_row_and_reaches_no_expert(
    checkpoint: Callable[[str], Path], model_type: str
) -> None:
    runner = ModelRunner(model=str(checkpoint(model_type)), device="cpu", kv_cache_bytes=1 << 20)
    runner.cache._pools = {}
    seen: list[tuple[int, ...]] = []
    handle = runner.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: seen.append(tuple(logits.shape[:-1]))
    )
    with torch.inference_mode():
        runner._forward(largest_step(40, 2, runner.cache.block_size))
    handle.remove()
    assert seen == [(1, 40)]
    counts = runner.experts.finish()
    assert counts.rows == counts.experts == [0] * runner.info.model.num_moe_layers


@pytest.mark.gpu
def test_the_pool_fills_its_share_of_a_gpu(checkpoint: Callable[[str], Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    runner = ModelRunner(model=str(checkpoint("qwen3_moe")), device="cuda", gpu_memory_utilization=0.5)
    free, total = torch.cuda.mem_get_info()
    assert 0.4 < 1 - free / total <= 0.55
    assert runner.info.num_kv_blocks * runner.info.kv_block_bytes > 0.3 * total
