from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.plan import RankPlan, RequestPlan
from penstock.workers.rows import WIDE_ROWS, context_slots, depths, pack
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import TokenSampling

BLOCK = 4
SCRATCH = 4000
GREEDY = TokenSampling()


def plan_of(*requests: RequestPlan) -> RankPlan:
    return RankPlan(0, 0, requests=list(requests))


@st.composite
def requests_and_tables(draw: st.DrawFn) -> tuple[list[RequestPlan], dict[int, np.ndarray]]:
    """Ragged groups: chunks, chains and trees of 1 to a few more than WIDE_ROWS rows, on shuffled blocks."""
    requests: list[RequestPlan] = []
    free = draw(st.permutations(range(120)))
    tables = {}
    for key in range(draw(st.integers(1, 4))):
        committed = draw(st.integers(0, 30))
        n = draw(st.one_of(st.integers(1, 6), st.integers(WIDE_ROWS - 1, WIDE_ROWS + 3)))
        tree = draw(st.booleans())
        parents = [draw(st.integers(-1, row - 1)) if tree else row - 1 for row in range(n)]
        first = draw(st.integers(0, n))
        tokens = draw(st.lists(st.integers(0, 95), min_size=n, max_size=n))
        num_blocks = -(-(committed + n) // BLOCK) + draw(st.integers(0, 2))
        tables[key * 7] = np.asarray(free[:num_blocks], dtype=np.int64)
        free = free[num_blocks:]
        requests.append(RequestPlan(key * 7, committed, 0, [], tokens, parents, first, GREEDY))
    return requests, tables


def slot_of(table: np.ndarray, token: int) -> int:
    return int(table[token // BLOCK]) * BLOCK + token % BLOCK


@settings(max_examples=60, deadline=None)
@given(requests_and_tables(), st.sampled_from([None, 1, 3, 12]))
def test_pack_against_brute_force(case: tuple[list[RequestPlan], dict[int, np.ndarray]], window: int | None) -> None:
    requests, tables = case
    rows = pack(plan_of(*requests), tables, BLOCK, SCRATCH)
    assert rows.valid is None
    total = sum(len(r.token_ids) for r in requests)
    assert rows.valid is None

    # What every packed row is: its request, its index, its position, and the (slot, position) pairs it attends to
    token_ids, positions, write_slots, sampled, wanted = [], [], [], [], []
    for request in requests:
        table, committed = tables[request.request_id], request.committed_len
        for row, token in enumerate(request.token_ids):
            chain = [row]
            while request.parents[chain[0]] >= 0:
                chain.insert(0, request.parents[chain[0]])
            position = committed + len(chain) - 1
            if row >= request.first_sampled_row:
                sampled.append(len(token_ids))
            token_ids.append(token)
            positions.append(position)
            write_slots.append(slot_of(table, committed + row))
            seen = [(slot_of(table, token), token) for token in range(committed)]
            seen += [(slot_of(table, committed + r), committed + depth) for depth, r in enumerate(chain)]
            wanted.append({slot for slot, where in seen if window is None or position - where < window})
    assert rows.token_ids.tolist() == token_ids
    assert rows.positions.tolist() == positions
    assert rows.write_slots.tolist() == write_slots
    assert len(set(write_slots)) == total
    assert rows.sampled_rows.tolist() == sampled

    attended: dict[int, set[int]] = {}
    start = 0
    for group in rows.groups:
        r, n = group.rows.shape
        slots = rows.gather_slots[start : start + group.num_slots].reshape(r, -1)
        start += group.num_slots
        mask = group.mask(window)
        if mask is None:
            mask = torch.ones(r, 1, n, slots.shape[1], dtype=torch.bool)
        assert mask.shape == (r, 1, n, slots.shape[1])
        if group.is_whole:
            assert group.rows.flatten().tolist() == list(range(total))
        assert mask.any(dim=-1).all(), "a query that sees nothing makes NaN"
        for place, packed in zip(group.scatter.tolist(), group.packed_rows.tolist(), strict=True):
            i, j = divmod(place, n)
            assert group.rows[i, j] == packed
            visible = slots[i][mask[i, 0, j]].tolist()
            assert len(visible) == len(set(visible)), "no slot counts twice"
            assert packed not in attended
            attended[packed] = set(visible)
    assert start == len(rows.gather_slots)
    assert [attended[row] for row in range(total)] == wanted
    span = rows.gather_span
    assert span is None or list(range(span.start, span.stop)) == rows.gather_slots.tolist()
    assert (span is not None) == bool((rows.gather_slots.diff() == 1).all())


def test_wide_requests_attend_alone_and_narrow_ones_together() -> None:
    def chain(key: int, n: int) -> RequestPlan:
        return RequestPlan(key, 0, 0, [], [1] * n, list(range(-1, n - 1)), 0, GREEDY)

    sizes = [3, WIDE_ROWS + 1, 1, WIDE_ROWS, WIDE_ROWS + 40]
    tables = {key: np.arange(20) + 20 * key for key in range(len(sizes))}
    rows = pack(plan_of(*(chain(key, n) for key, n in enumerate(sizes))), tables, BLOCK, SCRATCH)
    assert [tuple(group.rows.shape) for group in rows.groups] == [
        (3, WIDE_ROWS),
        (1, WIDE_ROWS + 1),
        (1, WIDE_ROWS + 40),
    ]
    assert [len(group.packed_rows) for group in rows.groups] == [3 + 1 + WIDE_ROWS, WIDE_ROWS + 1, WIDE_ROWS + 40]


def test_contexts_of_very_different_lengths_attend_apart() -> None:
    """One long context must not have all others gathered as if they were as long."""
    tables = {key: np.arange(4000) for key in range(32)}
    requests = [
        RequestPlan(key, length, 0, [], [1], [-1], 0, GREEDY)
        for key, length in enumerate([900, 15_000, *[700] * 15, 9_000, *[40] * 14])
    ]
    rows = pack(plan_of(*requests), tables, BLOCK, 16_000)
    true = sum(request.committed_len + 1 for request in requests)
    assert true < len(rows.gather_slots) <= 2 * true
    assert [group.num_slots for group in rows.groups] == [2 * 15_001, 16 * 901, 14 * 41]
    assert sorted(rows.groups[1].packed_rows.tolist()) == [0, *range(2, 17)]
    near = [replace(request, committed_len=100 + request.committed_len % 7) for request in requests]
    assert len(pack(plan_of(*near), tables, BLOCK, 16_000).groups) == 1


def test_an_idle_rank_runs_one_padding_row_in_scratch() -> None:
    rows = pack(plan_of(), {}, BLOCK, SCRATCH)
    assert rows.valid is not None
    assert rows.valid.tolist() == [False]
    assert rows.write_slots.tolist() == rows.gather_slots.tolist() == [SCRATCH]
    assert rows.sampled_rows.tolist() == []
    assert rows.token_ids.shape == rows.positions.shape == (1,)
    (group,) = rows.groups
    assert group.mask(None) is None
    assert group.mask(5) is None
    assert group.visible.all()


def test_depths_follow_the_parents() -> None:
    assert depths([-1, 0, 0, 2, -1, 3]) == [1, 2, 2, 3, 1, 4]
    with pytest.raises(AssertionError):
        depths([-1, 1])


def test_context_slots_follow_the_table() -> None:
    assert context_slots(np.array([5, 2, 9]), 3, 7).tolist() == [15, 16, 17, 6, 7, 8, 27]
    assert context_slots(np.array([5, 2, 9]), 3, 0).tolist() == []


PROMPT = [5, 17, 60, 33, 8, 71, 11, 44, 19, 83, 27, 6, 90, 12, 55]


def runner_of(directory: Path) -> ModelRunner:
    return ModelRunner(model=str(directory), block_size=BLOCK, max_model_len=64, kv_cache_bytes=1 << 20)


def blocks(num_tokens: int) -> list[int]:
    """A request's whole table, out of order."""
    return [(7 * i + 3) % 20 for i in range(-(-num_tokens // BLOCK))]


def step(
    runner: ModelRunner, step_id: int, committed: int, tokens: list[int], parents: list[int], first: int
) -> list[int]:
    request = RequestPlan(0, committed, 0, blocks(committed + len(tokens)), tokens, parents, first, GREEDY)
    return runner.step(RankPlan(0, step_id, requests=[request])).token_ids[0]


def chain(n: int) -> list[int]:
    return list(range(-1, n - 1))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_a_tree_decides_at_every_node_as_the_plain_sequence_does(
    checkpoint: Callable[[str], Path], reference: Callable[..., list[int]], model_type: str
) -> None:
    directory = checkpoint(model_type)
    runner = runner_of(directory)
    greedy = reference(directory, PROMPT, 12, ignore_eos=True)
    assert step(runner, 0, 0, PROMPT, chain(len(PROMPT)), len(PROMPT) - 1) == greedy[:1]

    # The last token, and under it a tree whose right path is rows 2, 5, 7
    other = [(token + 1) % 96 for token in greedy]
    tokens = [greedy[0], other[1], greedy[1], 3, other[2], greedy[2], 7, greedy[3], other[4]]
    parents = [-1, 0, 0, 1, 2, 2, 4, 5, 7]
    request = RequestPlan(0, len(PROMPT), 0, blocks(len(PROMPT) + len(tokens)), tokens, parents, 0, GREEDY)
    plan = RankPlan(0, 1, requests=[request])
    with torch.inference_mode():
        runner._apply_tables(plan)
        logits = runner._forward(pack(plan, runner.cache.tables, BLOCK, runner.cache.scratch_slot))
    for row in range(len(tokens)):
        path = [row]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        text = PROMPT + [tokens[r] for r in path]
        assert int(logits[row].argmax()) == reference(directory, text, 1, ignore_eos=True)[0], (row, path)

    # The step accepts that path and compacts its KV; decoding goes on from there, plainly and with drafts
    assert runner.step(plan).token_ids == [greedy[1:5]]
    committed = len(PROMPT) + 4
    assert step(runner, 2, committed, [greedy[4]], [-1], 0) == greedy[5:6]
    # Again a path that is not a prefix, right after the first
    tree = [greedy[5], other[6], greedy[6], other[7], greedy[7]]
    assert step(runner, 3, committed + 1, tree, [-1, 0, 0, 2, 2], 0) == greedy[6:9]
    assert step(runner, 4, committed + 4, greedy[8:11], chain(3), 0) == greedy[9:12]


def test_a_rejected_draft_leaves_no_trace(
    checkpoint: Callable[[str], Path], reference: Callable[..., list[int]]
) -> None:
    directory = checkpoint("qwen3_moe")
    runner = runner_of(directory)
    greedy = reference(directory, PROMPT, 4, ignore_eos=True)
    # The prompt in two chunks, the second with the wrong drafts behind it
    assert step(runner, 0, 0, PROMPT[:9], chain(9), 9) == []
    wrong = [(greedy[0] + 1) % 96, 5, 6]
    assert step(runner, 1, 9, PROMPT[9:] + wrong, chain(len(PROMPT) - 9 + 3), len(PROMPT) - 10) == greedy[:1]
    assert step(runner, 2, len(PROMPT), greedy[:2] + wrong, chain(5), 0) == greedy[1:3]
    assert step(runner, 3, len(PROMPT) + 2, greedy[2:3], [-1], 0) == greedy[3:4]


def test_batch_mates_of_every_width_do_not_matter(
    checkpoint: Callable[[str], Path], reference: Callable[..., list[int]]
) -> None:
    directory = checkpoint("mixtral")
    runner = runner_of(directory)
    long = [(11 * i + 4) % 96 for i in range(WIDE_ROWS + 5)]
    prompts = [PROMPT, long, PROMPT[:2], long[3:]]
    requests = [
        RequestPlan(
            key, 0, 0, list(range(12 * key, 12 * key + 12)), prompt, chain(len(prompt)), len(prompt) - 1, GREEDY
        )
        for key, prompt in enumerate(prompts)
    ]
    result = runner.step(RankPlan(0, 0, requests=requests))
    assert result.token_ids == [reference(directory, prompt, 1, ignore_eos=True) for prompt in prompts]
    assert result.counts.rows == [sum(map(len, prompts))] * 2
