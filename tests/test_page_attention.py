"""Attention that reads the pool's blocks in place, in steps padded to buckets."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.router.expert_budget import ExpertBudget
from penstock.workers import page_attention
from penstock.workers.attention import attend_with_sinks
from penstock.workers.context_pages import ContextPages
from penstock.workers.kv_cache import PagedKVCache
from penstock.workers.latent_attention import Absorbed, into_latents, out_of_latents
from penstock.workers.page_attention import attend, attend_with, kernel_options, objection
from penstock.workers.plan import Bucket, RankPlan, RequestPlan
from penstock.workers.rows import context_slots
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import TokenSampling
from penstock.workers.static_rows import StaticRows

from .static_steps import BLOCK, CONTEXT, STEPS, TREE, Padded, blocks, chain, outputs_of, padded, prompts, request
from .static_steps import runner_of as make
from .tiny_engine import GREEDY, config_of

WINDOW = 12
KEPT = ("qwen3_moe", "gpt_oss", "mimo_v2_flash", "gemma4_text")
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1")


@pytest.fixture(autouse=True)
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled flex_attention compiles itself with a backend that compiles nothing, unless told otherwise."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def attend_by_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    sinks: torch.Tensor | None,
    scaling: float | None,
    absorbed: Absorbed | None = None,
) -> torch.Tensor:
    """`page_attention.attend` as kernels compute it: what is not in a listed block is not read.

    Uncompiled flex_attention never looks at the lists: it computes all scores, and hides.
    """
    if absorbed is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        latents = attend_by_blocks(into_latents(query, absorbed), keys, values, mask, sinks, scaling)
        return out_of_latents(latents, absorbed)
    output = query.new_zeros(*query.shape[:-1], values.shape[-1])
    rows = torch.arange(query.shape[2])[:, None]
    for r, number in enumerate(mask.kv_num_blocks[:, 0, 0].tolist()):
        listed = mask.kv_indices[r, 0, 0, :number].long()
        slots = (listed[:, None] * mask.BLOCK_SIZE[1] + torch.arange(mask.BLOCK_SIZE[1])).flatten()
        seen = mask.mask_mod(torch.tensor(r), torch.tensor(0), rows, slots[None])
        context = query[r : r + 1], keys[:, :, slots], values[:, :, slots], seen[None, None]
        if not number:
            continue
        if sinks is not None:
            output[r] = attend_with_sinks(*context, sinks, scaling)[0]
        else:
            output[r] = scaled_dot_product_attention(*context, scale=scaling, enable_gqa=True)[0]
    return output


@pytest.fixture(scope="module")
def runner_for(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelRunner]:
    made: dict[str, ModelRunner] = {}

    def get(model_type: str) -> ModelRunner:
        if model_type not in made:
            made[model_type] = make(checkpoint(model_type))
            made[model_type].padded.objection = ""
            made[model_type].padded.choose_attention()
            assert made[model_type].padded.objection == ""
        return made[model_type]

    return get


def forget_the_rest(runner: ModelRunner, requests: list[RequestPlan]) -> None:
    """Poison every block that holds nothing of a context."""
    kept = torch.zeros(runner.cache.num_blocks + 1, dtype=torch.bool)
    for part in requests:
        table = runner.cache.tables[part.request_id]
        kept[context_slots(table, BLOCK, part.committed_len + len(part.token_ids)) // BLOCK] = True
    for states in runner.cache.pools:
        states.unflatten(0, (-1, BLOCK))[~kept] = torch.nan


@pytest.mark.parametrize("budget", [None, "experts=4,scope=request"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model_type", [*KEPT, *LATENT])
def test_a_step_over_pages_is_the_step(
    runner_for: Callable[[str], ModelRunner],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    step: str,
    budget: str | None,
) -> None:
    runner = runner_for(model_type)
    for states in runner.cache.pools:
        states.zero_()
    runner.step(prompts())
    requests = [
        replace(part, first_budgeted_row=0 if budget and len(part.token_ids) > 1 else None) for part in STEPS[step]
    ]
    acts = any(part.first_budgeted_row is not None for part in requests)
    plan = RankPlan(0, 1, requests=requests, budget=ExpertBudget.parse(budget) if budget and acts else None)
    with torch.inference_mode():
        launched, replayed = runner._launched(plan), runner.padded.run(padded(plan, runner))
        monkeypatch.setattr(page_attention, "attend", attend_by_blocks)
        forget_the_rest(runner, requests)
        by_blocks = runner.padded.run(padded(plan, runner))
    for found in (replayed, by_blocks):
        torch.testing.assert_close(found.logits, launched.logits, rtol=1e-4, atol=1e-5)
        assert found.counts.experts == launched.counts.experts
    assert runner.cache.rows is not None
    assert runner.cache.rows.pages is not None
    # Last, since they move an accepted path's KV
    assert runner.step(padded(plan, runner)).token_ids == runner.step(plan).token_ids


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3"])
def test_an_engine_publishes_the_same_tokens(checkpoint: Callable[[str], Path], model_type: str) -> None:
    config = config_of(checkpoint(model_type))
    runner = make_runner(config, 0)
    ranks = LocalRanks(runner)
    runner.padded.objection = ""
    runner.padded.choose_attention()
    assert runner.padded.objection == ""
    expected, _ = outputs_of(config, ranks, 3, GREEDY)
    found, watched = outputs_of(config, Padded(ranks), 3, GREEDY)
    assert found == expected
    assert sum(rank.bucket is not None for plan in watched.plans for rank in plan.ranks) > 10


# --- the blocks that are read ----------------------------------------------------------------------------------------


def tables_of(requests: list[RequestPlan]) -> dict[int, np.ndarray]:
    return {part.request_id: np.array(blocks(part.request_id)) for part in requests}


def pages_of(requests: list[RequestPlan], bucket: Bucket, block_size: int = BLOCK) -> ContextPages:
    rows = StaticRows(bucket, block_size, 48 * block_size, torch.device("cpu"), most_blocks=64)
    rows.fill(RankPlan(0, 1, requests=requests, bucket=bucket), tables_of(requests))
    pages = rows.layout().pages
    assert pages is not None
    return pages


def test_no_more_blocks_are_read_than_a_context_has() -> None:
    pages = pages_of(STEPS["mixed"], Bucket(4, 8, 64))
    lengths = [CONTEXT[0] + 4, CONTEXT[1] + 1, CONTEXT[2] + len(TREE)]
    expected = [blocks(key)[: -(-length // BLOCK)] for key, length in enumerate(lengths)]
    mask = pages.mask(None)
    numbers = mask.kv_num_blocks.flatten().tolist()
    assert numbers == [7, 3, 9, 0]
    assert [mask.kv_indices[r, 0, 0, :number].tolist() for r, number in enumerate(numbers)] == [*expected, []]
    # The first row sees WINDOW tokens, itself among them
    first = [max(0, committed - WINDOW + 1) // BLOCK for committed in CONTEXT.values()]
    near = pages.mask(WINDOW)
    numbers = near.kv_num_blocks.flatten().tolist()
    assert numbers == [7 - 2, 3, 9 - 4, 0]
    assert [near.kv_indices[r, 0, 0, :number].tolist() for r, number in enumerate(numbers)] == [
        *(table[start:] for table, start in zip(expected, first, strict=True)),
        [],
    ]
    assert pages.mask(WINDOW) is near
    assert pages.mask(None) is mask


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_compiled_it_reads_those_blocks_alone_and_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cpu._is_avx2_supported():
        pytest.skip("torch compiles flex_attention for AVX2 alone")
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    compiled = torch.compile(attend_with, fullgraph=True, dynamic=False)
    torch.manual_seed(5)
    pools = torch.randn(2, 49 * BLOCK, 2, 8)
    steps = [
        [request(0, chain(4), TokenSampling()), request(2, [-1, 0, 0, 1], TokenSampling())],
        [request(1, chain(2), TokenSampling())],
    ]
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for requests, longest in zip(steps, (64, 32), strict=True):
        pages = pages_of(requests, Bucket(2, 4, longest))
        query = torch.randn(1, 4, 8, 8)[0].unflatten(1, (2, 4)).transpose(0, 1)
        for window in (None, WINDOW):
            mask = pages.mask(window)
            read = [mask.kv_indices[r, 0, 0, : mask.kv_num_blocks[r, 0, 0]] for r in range(2)]
            unread = torch.ones(49, dtype=torch.bool)
            unread[torch.cat(read).long()] = False
            poisoned = pools.clone()
            poisoned.unflatten(1, (-1, BLOCK))[:, unread] = torch.nan
            keys, values = (states.transpose(0, 1)[None] for states in poisoned)
            with torch.inference_mode():
                found = compiled(query, keys, values, mask, None, 0.3, {})
            torch.testing.assert_close(found, attend_by_blocks(query, keys, values, mask, None, 0.3))
    assert counters["unique_graphs"] == before + 1


# --- who reads them --------------------------------------------------------------------------------------------------


def cache_of(heads: int, width: int, dtype: torch.dtype = torch.float32, block_size: int = 16) -> PagedKVCache:
    cache = PagedKVCache(block_size)
    states = torch.zeros(1, heads, 1, width, dtype=dtype)
    kept = cache.update(states, states.clone(), 0)
    cache.note_attended(states, *kept)
    return cache


def test_what_the_kernels_cannot_read_is_gathered(checkpoint: Callable[[str], Path]) -> None:
    cuda = torch.device("cuda")
    cache = cache_of(2, 16)
    cache.allocate(1 << 20, torch.device("meta"))
    assert objection(cache, cuda) == ""
    assert "Triton" in objection(cache, torch.device("cpu"))
    narrow = cache_of(2, 8)
    narrow.allocate(1 << 20, torch.device("meta"))
    assert "8 numbers" in objection(narrow, cuda)
    small = cache_of(2, 16, block_size=8)
    small.allocate(1 << 20, torch.device("meta"))
    assert "block_size is 8" in objection(small, cuda)
    large = cache_of(128, 256, torch.bfloat16)
    large.allocate(1 << 34, torch.device("meta"))
    assert "32 bits" in objection(large, cuda)
    for model_type in KEPT:
        assert make(checkpoint(model_type)).cache.attends_to_what_it_keeps
    expanding = cache_of(2, 16)
    expanding.attends_to_what_it_keeps = False
    expanding.allocate(1 << 20, torch.device("meta"))
    assert "makes keys and values" in objection(expanding, cuda)


def test_the_choice_is_logged_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        page_attention.say("")
        page_attention.say("Triton is not installed")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert all(message.startswith("attention: ") for message in caplog.messages)
    assert "Triton is not installed" in caplog.messages[1]


def test_kernels_are_cut_into_tiles_that_blocks_divide_into() -> None:
    shapes = product(
        (1, 2, 4, 8), (1, 2, 3, 5, 7, 8, 16, 32), (16, 32, 48, 64), ((64, 64), (192, 128), (256, 256)), (2, 4)
    )
    for num_rows, group_size, block_size, widths, itemsize in shapes:
        options: Any = kernel_options(
            num_rows=num_rows, group_size=group_size, block_size=block_size, widths=widths, itemsize=itemsize
        )
        assert options["BLOCK_N"] in (16, 32)
        assert block_size % options["BLOCK_N"] == 0
        rows = options["BLOCK_M"]
        assert rows in (16, 32, 64, 128)
        assert (4 if itemsize == 4 and rows == 16 else 2) <= options["num_warps"] <= 8
        if group_size in (3, 5, 7):
            assert rows == 16  # of a head
        else:
            assert rows % group_size == 0
            assert rows <= max(16, num_rows * group_size)
        loaded = rows * widths[0] + options["num_stages"] * options["BLOCK_N"] * sum(widths)
        assert loaded * itemsize <= 96 << 10


# --- on a GPU --------------------------------------------------------------------------------------------------------


def test_attention_that_cannot_be_compiled_gathers(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("no such template")

    monkeypatch.setattr(page_attention, "attend", fails)
    runner = make(checkpoint("qwen3_moe"))
    runner.step(prompts())
    runner.padded.objection = ""
    runner.padded.choose_attention()
    assert runner.padded.objection == "no such template"
    assert "gather padded contexts, for torch's dense attention: no such template" in caplog.text
    plan = RankPlan(0, 1, requests=STEPS["plain"])
    assert runner.step(padded(plan, runner)).token_ids == runner.step(plan).token_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("num_heads", [8, 6])
def test_a_replayed_graph_reads_the_blocks_of_its_inputs(num_heads: int, has_sinks: bool) -> None:
    bucket, block_size = Bucket(4, 8, 64), 16
    rows = StaticRows(bucket, block_size, 48 * block_size, torch.device("cuda"), most_blocks=64)
    torch.manual_seed(5)
    pools = torch.randn(2, 49 * block_size, 2, 64)
    query = torch.randn(num_heads, bucket.total_rows, 64).unflatten(1, (4, 8)).transpose(0, 1)
    sinks = torch.randn(num_heads) if has_sinks else None
    on_gpu = query.cuda(), *(states.cuda().transpose(0, 1)[None] for states in pools)
    sinks_on_gpu = None if sinks is None else sinks.cuda()

    def run() -> list[torch.Tensor]:
        pages = rows.layout().pages
        assert pages is not None
        return [attend(*on_gpu, pages.mask(window), sinks_on_gpu, None) for window in (None, WINDOW)]

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for requests in (STEPS["mixed"], STEPS["one"]):
            rows.fill(RankPlan(0, 1, requests=requests, bucket=bucket), tables_of(requests))
            graph.replay()
            pages = pages_of(requests, bucket, block_size)
            keys, values = (states.transpose(0, 1)[None] for states in pools)
            for output, window in zip(found, (None, WINDOW), strict=True):
                expected = attend_by_blocks(query, keys, values, pages.mask(window), sinks, None)
                for r, part in enumerate(requests):
                    n = len(part.token_ids)
                    torch.testing.assert_close(output[r, :, :n].cpu(), expected[r, :, :n], rtol=1e-4, atol=1e-4)
