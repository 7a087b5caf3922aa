from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.fair_queue import FairQueue
from penstock.cluster.engine.request import Request

from .test_scheduler import make_request, make_scheduler
from .tiny_engine import GREEDY, PROMPTS


def request_of(client: str, key: int, num_prompt: int = 10, num_output: int = 5) -> Request:
    request = make_request(key, num_prompt, num_output)
    request.client = client
    return request


def queue_of(*requests: Request) -> FairQueue:
    queue = FairQueue()
    for request in requests:
        queue.add(request)
    return queue


def serve(queue: FairQueue) -> Request:
    """Admit the next request and yield all its output."""
    request = queue.next()
    queue.remove(request)
    queue.charge(request.client, num_prompt_tokens=request.num_prompt_tokens)
    queue.charge(request.client, num_output_tokens=request.max_total_tokens - request.num_prompt_tokens)
    return request


def test_one_client_is_served_in_order_of_arrival() -> None:
    queue = queue_of(*[request_of("a", key, num_prompt=1 + key % 3) for key in (2, 0, 1, 4, 3)])
    assert [request.key for request in queue] == [0, 1, 2, 3, 4]
    assert [serve(queue).key for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(queue) == 0


def test_a_client_that_floods_the_queue_delays_the_other_by_one_request() -> None:
    queue = queue_of(*[request_of("flood", key) for key in range(100)])
    assert serve(queue).client == "flood"
    queue.add(request_of("other", 100))
    assert [serve(queue).client for _ in range(2)] == ["flood", "other"], "level with it, and later"


def test_outputs_count_twice_what_prompts_do() -> None:
    queue = queue_of(
        request_of("long", 0, 1, 10), request_of("wide", 1, 20, 1), *[request_of("long", k) for k in (2, 3)]
    )
    queue.add(request_of("wide", 4))
    assert serve(queue).client == "long"  # 1 + 20
    assert serve(queue).client == "wide"  # 20 + 2
    assert serve(queue).client == "long"
    assert serve(queue).client == "wide"


def test_nobody_saves_up_a_claim() -> None:
    queue = queue_of(*[request_of("busy", key) for key in range(40)])
    for _ in range(10):
        serve(queue)
    for key in range(100, 110):
        queue.add(request_of("late", key))
    assert Counter(serve(queue).client for _ in range(10)) == {"late": 5, "busy": 5}


def test_who_comes_back_to_an_empty_queue_starts_where_it_was_left() -> None:
    queue = queue_of(request_of("a", 0), request_of("b", 1))
    for key in range(2, 30):
        serve(queue)
        if key < 28:
            queue.add(request_of("a", key))
    assert len(queue) == 0
    queue.add(request_of("b", 50))
    queue.add(request_of("a", 51))
    assert serve(queue).client == "b", "the one that was served less"
    queue.add(request_of("b", 52))
    assert serve(queue).client == "a", "but only for as long as it takes to be even"


@pytest.mark.parametrize("seed", range(5))
def test_clients_with_requests_waiting_are_served_alike(seed: int) -> None:
    rng, queue, key = random.Random(seed), FairQueue(), 0
    served: Counter[str] = Counter()
    sizes = {"a": (1, 1), "b": (60, 40), "c": (5, 90)}
    largest = max(prompt + 2 * output for prompt, output in sizes.values())
    for client, (prompt, output) in sizes.items():
        for _ in range(3):
            queue.add(request_of(client, key := key + 1, prompt, output))
    for _ in range(2000):
        request = serve(queue)
        served[request.client] += request.num_prompt_tokens + 2 * (request.max_total_tokens - request.num_prompt_tokens)
        prompt, output = sizes[request.client]
        queue.add(request_of(request.client, key := key + 1, rng.randint(1, prompt), rng.randint(1, output)))
        assert max(served.values()) - min(served[client] for client in sizes) <= 2 * largest


def test_requests_that_lost_their_kv_come_first() -> None:
    queue = queue_of(request_of("a", 5))
    lost = request_of("b", 3)
    lost.was_admitted = True
    queue.charge("b", num_output_tokens=10_000)
    queue.add(lost)
    assert queue.next() is lost
    queue.remove(lost)
    assert queue.next().key == 5


def test_clients_that_are_gone_are_forgotten() -> None:
    queue = queue_of(*[request_of("stays", key) for key in range(3)])
    for key in range(10_000):
        request = request_of(f"client {key}", 10 + key)
        queue.add(request)
        queue.remove(request)
    assert len(queue._counters) <= 4096
    assert "stays" in queue._counters
    assert serve(queue).client == "stays"


def test_the_scheduler_admits_clients_in_turn() -> None:
    scheduler = make_scheduler(max_num_seqs=4, num_blocks=100)
    flood = [request_of("flood", key) for key in range(8)]
    other = [request_of("other", key) for key in (8, 9)]
    for request in [*flood, *other]:
        scheduler.add(request)
    assert [request.key for request in scheduler.admit()] == [0, 8, 1, 9]


def test_the_engine_charges_what_comes_out(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_num_seqs=1, draft_len=0)
    sampling = replace(GREEDY, max_tokens=6)
    for number in range(3):
        engine.add_request(f"flood {number}", PROMPTS[0], sampling, client="flood")
    finished: list[str] = []
    while engine.has_requests:
        for output in engine.step():
            if output.finish_reason is not None:
                finished.append(output.request_id)
                if output.request_id == "flood 0":
                    engine.add_request("other 0", PROMPTS[0], sampling, client="other")
                    engine.add_request("other 1", PROMPTS[0], sampling, client="other")
    # "other" starts level with what "flood" has been charged for its first, so the older goes first
    assert finished == ["flood 0", "flood 1", "other 0", "flood 2", "other 1"]
