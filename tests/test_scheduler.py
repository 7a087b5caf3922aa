from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.engine.request import Request
from penstock.cluster.engine.scheduler import Scheduler
from penstock.workers.plan import StepPlan

from .scheduler_simulator import Simulation, make_request, make_scheduler


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_ranks=st.integers(1, 3),
    num_blocks=st.integers(4, 60),
    max_num_seqs=st.integers(1, 5),
    max_rows=st.integers(1, 24),
)
def test_any_traffic_is_scheduled_soundly(
    seed: int, num_ranks: int, num_blocks: int, max_num_seqs: int, max_rows: int
) -> None:
    rng = random.Random(seed)
    simulation = Simulation(rng, num_ranks, num_blocks, max_num_seqs, max_rows)
    for _ in range(60):
        if rng.random() < 0.4:
            simulation.add()
        if simulation.live and rng.random() < 0.05:
            simulation.finish(rng.choice(list(simulation.live.values())))
        simulation.step()
    for _ in range(3000):
        if not simulation.live:
            break
        simulation.step()
    assert not simulation.live, "every request ends"
    simulation.scheduler.check_integrity()
    assert all(pool.num_used == 0 for pool in simulation.scheduler.pools)


def commit_prompt(request: Request, token: int = 7) -> None:
    request.committed_len = len(request.token_ids)
    request.token_ids.append(token)


def planned(plan: StepPlan | None, rank: int = 0) -> dict[int, list[int]]:
    assert plan is not None
    return {part.request_id: part.token_ids for part in plan.ranks[rank].requests}


def test_nothing_to_do_is_no_plan() -> None:
    scheduler = make_scheduler()
    assert scheduler.admit() == []
    assert scheduler.schedule(0, 0, {}) is None
    assert scheduler.num_running == 0


def test_a_prompt_is_computed_in_chunks_that_reassemble_it() -> None:
    scheduler = make_scheduler(max_rows=7)
    request = make_request(3, 20, 5)
    scheduler.add(request)
    scheduler.admit()
    chunks, sampled = [], []
    for step in range(3):
        plan = scheduler.schedule(0, step, {3: [9, 9]})  # drafts for a prompt are ignored until its last chunk
        assert plan is not None
        (part,) = plan.ranks[0].requests
        assert part.committed_len == len(chunks)
        sampled.append(part.first_sampled_row)
        chunks += part.token_ids[: 20 - len(chunks)]
        request.committed_len += 7
    assert chunks == request.token_ids
    assert sampled == [7, 7, 5]


def test_decoding_requests_come_before_prompts_and_keep_their_rows() -> None:
    scheduler = make_scheduler(max_rows=6)
    long, short = make_request(0, 30, 4), make_request(1, 3, 9)
    scheduler.add(long)
    scheduler.add(short)
    scheduler.admit()
    commit_prompt(short)
    plan = scheduler.schedule(0, 0, {1: [5, 6]})
    assert planned(plan) == {1: [7, 5, 6], 0: long.token_ids[:3]}
    assert list(planned(plan)) == [1, 0]


def test_drafts_of_some_do_not_take_the_rows_of_others() -> None:
    # Every decoding request gets a token out of every step while the rows suffice for one each
    scheduler = make_scheduler(max_rows=6, max_num_seqs=4)
    requests = [make_request(key, 2, 20) for key in range(4)]
    for request in requests:
        scheduler.add(request)
    scheduler.admit()
    for request in requests:
        commit_prompt(request)
    plan = scheduler.schedule(0, 0, {key: [1, 2, 3, 4, 5] for key in range(4)})
    assert sorted(planned(plan)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("left", "expected"), [(1, 0), (2, 1), (3, 2), (9, 4)])
def test_drafts_leave_room_for_the_token_after_them(left: int, expected: int) -> None:
    scheduler = make_scheduler()
    request = make_request(0, 3, 1 + left)
    scheduler.add(request)
    scheduler.admit()
    commit_prompt(request)
    assert planned(scheduler.schedule(0, 0, {0: [1, 2, 3, 4]})) == {0: [7, 1, 2, 3, 4][: 1 + expected]}


def test_admission_is_in_order_even_when_a_later_one_would_fit() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4, max_num_seqs=8)
    first, big, small = make_request(0, 10, 6), make_request(1, 20, 4), make_request(2, 2, 2)
    for request in (first, big, small):
        scheduler.add(request)
    assert scheduler.admit() == [first]
    assert scheduler.admit() == []
    assert list(scheduler.waiting) == [big, small]
    scheduler.remove(first)
    assert scheduler.admit() == [big, small]


def run_prompts(scheduler: Scheduler, *requests: Request) -> None:
    """Admit ``requests`` together and give each its first token."""
    for request in requests:
        scheduler.add(request)
    assert scheduler.admit() == list(requests)
    scheduler.schedule(0, 0, {})
    for request in requests:
        commit_prompt(request)


def test_a_joining_request_leaves_some_blocks_free() -> None:
    scheduler = make_scheduler(num_blocks=200, block_size=1)
    first, second, third = make_request(0, 100, 9), make_request(1, 99, 9), make_request(2, 1, 9)
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.admit() == [first], "one free block of 200 is less than the watermark"
    scheduler.remove(second)
    scheduler.add(third)
    assert scheduler.admit() == [third]
    alone = make_scheduler(num_blocks=200, block_size=1)
    alone.add(make_request(0, 199, 1))
    assert alone.admit(), "nobody else needs the watermark"


def test_drafts_are_shed_before_anyone_is_preempted() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4, max_rows=64)
    old, young = make_request(0, 7, 17), make_request(1, 7, 17)
    run_prompts(scheduler, old, young)
    assert scheduler.admit() == []
    # Two blocks each, two free: the first gets all its drafts, the second those that its block has room for
    plan = scheduler.schedule(0, 1, {0: [1] * 8, 1: [2] * 8})
    assert planned(plan) == {0: [7] + [1] * 8, 1: [7]}
    old.token_ids += [5]
    young.token_ids += [5]
    old.committed_len = young.committed_len = 8
    assert scheduler.admit() == []
    assert scheduler.num_preemptions == 0
    assert [len(old.blocks), len(young.blocks)] == [3, 3], "what rejected drafts had taken went to the other"
    plan = scheduler.schedule(0, 2, {0: [1] * 8, 1: [2] * 8})
    assert planned(plan) == {0: [5] + [1] * 3, 1: [5] + [2] * 3}
    assert plan is not None
    # The rank is told of the block that the other got; the first one's table is cut when it next grows
    assert [(p.first_block, len(p.new_blocks)) for p in plan.ranks[0].requests] == [(3, 0), (2, 1)]


def test_the_youngest_makes_room_and_waits_before_all_others() -> None:
    scheduler = make_scheduler(num_blocks=7, block_size=4, max_rows=64)
    requests = [make_request(key, 7, 17) for key in range(3)]
    run_prompts(scheduler, *requests)
    scheduler.add(make_request(3, 1, 1))
    for request in requests:
        request.token_ids.append(8)
        request.committed_len += 1
    assert scheduler.admit() == []
    assert [request.key for request in scheduler.waiting] == [2, 3]
    assert (requests[2].committed_len, requests[2].blocks, requests[2].num_preemptions) == (0, [], 1)
    assert [len(request.blocks) for request in requests[:2]] == [3, 3]
    plan = scheduler.schedule(0, 1, {})
    assert plan is not None
    assert plan.ranks[0].released == [2]
    scheduler.remove(requests[0])
    assert [request.key for request in scheduler.admit()] == [2]
    replay = planned(scheduler.schedule(0, 2, {}))[2]
    assert replay == requests[2].token_ids, "prompt and output are computed together"
    scheduler.check_integrity()


def test_a_preempted_request_may_go_on_elsewhere() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4, max_rows=64, num_ranks=2)
    first, other, second = make_request(0, 7, 9), make_request(1, 15, 1), make_request(2, 7, 9)
    run_prompts(scheduler, first, other, second)
    assert [first.rank, other.rank, second.rank] == [0, 1, 0]
    for request in (first, second):
        request.token_ids.append(5)
        request.committed_len += 1
    scheduler.remove(other)
    assert scheduler.admit() == [second]
    assert [first.rank, second.rank] == [0, 1]
    plan = scheduler.schedule(0, 1, {})
    assert plan is not None
    assert [rank.released for rank in plan.ranks] == [[2], [1]]
    assert planned(plan, rank=1) == {2: second.token_ids}


def test_no_more_run_than_max_num_seqs_on_each_rank() -> None:
    scheduler = make_scheduler(max_num_seqs=2, num_ranks=2)
    for key in range(6):
        scheduler.add(make_request(key, 2, 2))
    assert len(scheduler.admit()) == 4
    assert [len(running) for running in scheduler.running] == [2, 2]
    assert scheduler.num_running == 4


def test_a_rank_that_the_others_go_on_without_has_no_places() -> None:
    scheduler = make_scheduler(max_num_seqs=2, num_ranks=2)
    scheduler.add(make_request(0, 2, 2))
    scheduler.admit()
    assert scheduler.num_open == 3
    scheduler.lose_kv(1, 0)
    assert scheduler.num_open == 1
    scheduler.lose_kv(1, 50)
    assert scheduler.num_open == 3


def test_ranks_share_the_load() -> None:
    scheduler = make_scheduler(num_blocks=500, max_num_seqs=30, num_ranks=3)
    for key in range(12):
        scheduler.add(make_request(key, 5, 2))
    scheduler.admit()
    assert [len(running) for running in scheduler.running] == [4, 4, 4]
    # The next goes where the least is still to be computed
    for rank in (0, 2):
        for request in scheduler.running[rank]:
            commit_prompt(request)
    commit_prompt(scheduler.running[1][0])
    late = make_request(12, 5, 2)
    scheduler.add(late)
    scheduler.admit()
    assert late.rank == 0
    later = make_request(13, 5, 2)
    scheduler.add(later)
    scheduler.admit()
    assert later.rank == 2


def test_only_new_blocks_are_sent_and_all_of_them_after_a_discard() -> None:
    scheduler = make_scheduler(block_size=4)
    request = make_request(0, 6, 30)
    scheduler.add(request)
    scheduler.admit()

    def sent(step: int, draft: int = 0) -> tuple[int, list[int]]:
        plan = scheduler.schedule(0, step, {0: [1] * draft})
        assert plan is not None
        (part,) = plan.ranks[0].requests
        return part.first_block, part.new_blocks

    assert sent(0) == (0, request.blocks)
    assert len(request.blocks) == 2
    commit_prompt(request)
    assert sent(1) == (2, [])
    assert sent(2, draft=5) == (2, request.blocks[2:])
    assert len(request.blocks) == 3
    scheduler.forget_ranks()
    assert sent(3) == (0, request.blocks)
    assert sent(4) == (3, [])


def test_a_rank_is_told_once_of_those_that_left() -> None:
    scheduler = make_scheduler(num_ranks=2)
    requests = [make_request(key, 2, 9) for key in range(3)]
    for request in requests:
        scheduler.add(request)
    scheduler.admit()
    scheduler.schedule(0, 0, {})
    scheduler.remove(requests[0])
    plan = scheduler.schedule(0, 1, {})
    assert plan is not None
    assert [rank.released for rank in plan.ranks] == [[0], []]
    plan = scheduler.schedule(0, 2, {})
    assert plan is not None
    assert [rank.released for rank in plan.ranks] == [[], []]


def test_a_waiting_request_can_be_removed() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    requests = [make_request(key, 2, 2) for key in range(3)]
    for request in requests:
        scheduler.add(request)
    scheduler.admit()
    scheduler.remove(requests[1])
    scheduler.remove(requests[0])
    assert scheduler.admit() == [requests[2]]
    scheduler.remove(requests[2])
    scheduler.check_integrity()


def test_prompt_rows_are_those_that_the_next_step_runs() -> None:
    scheduler = make_scheduler(max_rows=16)
    decoding, long = make_request(0, 5, 8), make_request(1, 30, 8)
    scheduler.add(decoding)
    scheduler.admit()
    assert scheduler.prompt_rows() == [5]
    commit_prompt(decoding)
    assert scheduler.prompt_rows() == [0]
    scheduler.add(long)
    scheduler.admit()
    assert scheduler.prompt_rows() == [15], "the decoding request has a row"
    assert {key: len(tokens) for key, tokens in planned(scheduler.schedule(0, 0, {})).items()} == {0: 1, 1: 15}
