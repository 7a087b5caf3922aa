"""Attention that holds its scores, in pieces: what those take, and that it is the same attention."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penstock.workers import attention_pieces
from penstock.workers.attention import _attend
from penstock.workers.attention_pieces import SCORE_BYTES, most_score_bytes
from penstock.workers.graph_room import GraphRoom
from penstock.workers.kv_budget import GRAPH_SHARE, gathered_slot_bytes, mask_bytes
from penstock.workers.plan import RankPlan
from penstock.workers.pool_size import pool_size_on

from .test_static_step import chain, prompts, request, runner_of

R, HEADS, N, S, D = 3, 4, 40, 700, 24
ROW_SCORES = HEADS * S


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        for storage in _storages((args, kwargs)):
            self._take(storage, 0)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            self._take(storage, storage.nbytes())
        return result

    def _take(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += num_bytes
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, storage._cdata, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.remove(key)
        self.now -= num_bytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("at_once", [1, 700, ROW_SCORES, 7 * ROW_SCORES, 2 * N * ROW_SCORES])
@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_the_whole_and_take_what_they_say(
    dtype: torch.dtype, has_sinks: bool, has_mask: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query = torch.randn(R, HEADS, N, D).to(dtype)
    key, value = torch.randn(R, HEADS, S, D).to(dtype), torch.randn(R, HEADS, S, D + 8).to(dtype)
    mask = torch.rand(R, 1, N, S) < 0.7 if has_mask else None
    sinks = torch.randn(HEADS).to(dtype) if has_sinks else None

    def attend() -> tuple[torch.Tensor, int]:
        seen = LiveBytes()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), seen:
            return _attend(query, key, value, mask, sinks, None), seen.most

    expected, whole = attend()
    monkeypatch.setattr(attention_pieces, "MOST_SCORES", at_once)
    found, most = attend()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    # Keys and values in float32, scaled, and the output, which are none of the scores'
    others = 2 * 4 * (key.numel() + value.numel()) + 4 * found.nbytes
    allowed = most_score_bytes(HEADS, S)
    assert allowed == SCORE_BYTES * max(at_once, ROW_SCORES)
    assert most <= allowed + others
    assert whole <= SCORE_BYTES * R * N * ROW_SCORES + others
    if at_once <= 7 * ROW_SCORES:
        assert most < 0.7 * whole


@pytest.mark.parametrize("at_once", [1, ROW_SCORES, 2 * ROW_SCORES, 100 * ROW_SCORES])
def test_no_piece_has_more_scores_than_one_row_or_so_many(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_pieces, "MOST_SCORES", at_once)
    seen: list[int] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        assert mask is not None
        assert mask.shape == (len(query), 1, query.shape[2], S)
        seen.append(query.shape[:3].numel() * key.shape[2])
        return query + value.sum(dim=2, keepdim=True)

    query, key, value = torch.randn(R, HEADS, N, D), torch.randn(R, HEADS, S, D), torch.randn(R, HEADS, S, D)
    found = attention_pieces.attend_in_pieces(attend, query, key, value, torch.ones(R, 1, N, S, dtype=torch.bool))
    torch.testing.assert_close(found, query + value.sum(dim=2, keepdim=True))
    assert max(seen) <= max(at_once, ROW_SCORES)
    assert sum(seen) == R * N * ROW_SCORES
    assert len(seen) <= -(-R * N * ROW_SCORES // max(at_once, ROW_SCORES)) * 2


def test_what_torch_computes_without_scores_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_pieces, "MOST_SCORES", ROW_SCORES)
    calls: list[int] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        calls.append(query.shape[2])
        return fused(query, *given, **options)

    monkeypatch.setattr("penstock.workers.attention.scaled_dot_product_attention", watched)
    query, key = torch.randn(1, HEADS, N, D), torch.randn(1, HEADS, S, D)
    with torch.no_grad():
        _attend(query, key, key, torch.ones(1, 1, N, S, dtype=torch.bool), None, None)
        assert calls == [N]
        # Values of another width than keys: none of torch's fused kernels on a CPU
        _attend(query, key, torch.randn(1, HEADS, S, D + 8), torch.ones(1, 1, N, S, dtype=torch.bool), None, None)
    assert calls[1:] == [1] * N


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss"])
def test_a_model_computes_the_same_in_pieces(
    checkpoint: Callable[[str], Path], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(checkpoint(model_type))
    cache = runner.cache
    assert cache.holds_scores
    assert cache.widens == (model_type == "deepseek_v3")
    assert cache.most_heads == runner.model.config.num_attention_heads
    plan = RankPlan(0, 1, requests=[request(0, chain(6), prompts().requests[0].sampling)])
    runner.step(prompts())
    with torch.inference_mode():
        expected = runner._launched(plan).logits
        monkeypatch.setattr(attention_pieces, "MOST_SCORES", 1)
        torch.testing.assert_close(runner._launched(plan).logits, expected, rtol=1e-4, atol=1e-5)


def test_attention_of_torchs_kernels_holds_no_scores(checkpoint: Callable[[str], Path]) -> None:
    cache = runner_of(checkpoint("qwen3_moe")).cache
    assert not cache.holds_scores
    assert not cache.widens


# --- the sum of a GPU's memory ---------------------------------------------------------------------------------------


class Memory:
    """A GPU of 80 GiB whose weights take 30, and on which the largest step takes two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 30 << 30
        answers = {
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: ((80 << 30) - self.now, 80 << 30),
            "memory_allocated": lambda device: self.now,
            "max_memory_allocated": lambda device: self.most,
            "reset_peak_memory_stats": lambda device: setattr(self, "most", self.now),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def run_largest_step(self) -> None:
        self.most = max(self.most, self.now + (2 << 30))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_all_that_a_rank_needs_is_within_its_share(
    checkpoint: Callable[[str], Path], model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, memory, longest = runner_of(checkpoint(model_type)).cache, Memory(monkeypatch), 1 << 20
    gathered = gathered_slot_bytes(cache.most_kept_numbers, cache.most_attended_numbers, 4, widens=cache.widens)
    sizes = {
        "gathered_bytes": gathered,
        "max_num_seqs": 512,
        "max_num_rows": 256,
        "max_model_len": longest,
        "utilization": 0.9,
    }

    def size(requested: int | None = None, *, replays_graphs: bool = True) -> tuple[int, GraphRoom]:
        device = torch.device("cuda", 0)
        return pool_size_on(
            device, cache, memory.run_largest_step, requested=requested, replays_graphs=replays_graphs, **sizes
        )

    pool, room = size()
    assert room.most_bytes == GRAPH_SHARE << 31
    scores = most_score_bytes(cache.most_heads, longest) if model_type == "gpt_oss" else 0
    scores += mask_bytes(256, longest, 4)
    in_layer = room.reserve_bytes - (2 << 30) - scores
    assert in_layer == gathered * (2 * pool * cache.block_size // cache.block_bytes)
    share = int(0.9 * (80 << 30)) - (30 << 30)
    assert share - 4 * cache.block_bytes <= pool + room.most_bytes + room.reserve_bytes <= share
    assert size(replays_graphs=False)[1].most_bytes == 0
    fixed, room = size(1 << 30)
    assert (fixed, room.most_bytes) == (1 << 30, None)
    assert room.reserve_bytes > (2 << 30) + scores
    assert size(1 << 30, replays_graphs=False) == (1 << 30, GraphRoom())
