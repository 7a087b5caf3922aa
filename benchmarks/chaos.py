"""Faults under streaming clients: what of the streams is lost, how long they pause, what is left behind.

32 clients stream answers of the demo, greedy and seeded, without retries, from two ranks and a spare on five machines,
which are network namespaces with a Ray node each. Faults come in an order drawn from the seed, each when the gang is
whole again: processes are killed and stopped, machines die, links go down or fall silent and come back. A few come at
the end to a gang without spares, and to one without spares whose ranks both hold all experts. Every stream is compared
with the answer of a run without faults, token for token; a difference is excused where the two best tokens are closer
than float32 tells apart. After a fault that cuts streams, which only the ingress' death is, the client must get an
error, and asks again with the same seed.

Machines need root and iproute2; with ``--one-machine`` there is one, and no fault of machines. 107 faults take about
half an hour; ``--quick`` has one of each of four kinds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cluster.client.http_client import HttpClient
from ..cluster.placement_file import PlacementFile
from ..router.placement import Placement
from ..workers.loader import build, inspect
from .cluster_server import ClusterServer
from .faults import FAULTS, Fault, leftovers, schedule, spares_are_ready
from .harness import Measurement, Options, Row, Target, run
from .machines import machines, objection
from .ray_cluster import RayCluster
from .server_process import OTHER, ServerProcess, serving
from .stream_clients import DEMO, NAME, Question, StreamClient, Tally, answer_all, make_questions

NUM_RANKS, NUM_SPARES, NUM_CLIENTS = 2, 1, 32
NUM_MACHINES = 5
CPUS_OF_HEAD, CPUS_OF_RANK = 1, 2
"""By Ray's count. Every other machine has two, so that no two ranks share one, and none is on the head."""
STEP_TIMEOUT_S = 3.0
NUM_FAULTS, NUM_WITHOUT_SPARE, NUM_TWOFOLD = 107, 6, 6
QUICK = ("SIGKILL of a rank", "SIGSTOP of a rank", "SIGKILL of the coordinator", "SIGKILL of the ingress")
WITHOUT_SPARE = ("SIGKILL of a rank", "SIGSTOP of a rank", "silent link")
WAIT_S = 180.0
_POLL_S = 0.1
_TAKES_EFFECT_S = 1.0
# Ranks and spares, and the coordinator, the replica, and the ingress
_NUM_OTHERS = 3


@dataclass(slots=True)
class Found:
    """What one fault came to."""

    hit: str
    noticed_s: float | None = None
    recovery_s: float | None = None
    """Until all requests could go on."""
    whole_s: float | None = None
    """Until all ranks were there again."""
    num_replayed: int = 0
    replayed_pauses_s: list[float] = field(default_factory=list)
    """Of streams that were replayed: as many as the events say, those with the longest pauses."""
    other_pauses_s: list[float] = field(default_factory=list)
    """Of the other streams that had begun."""
    longest_pause_s: float = 0.0
    """Of any client, those whose request had brought nothing yet included."""


@dataclass(frozen=True, slots=True)
class Gang:
    """What faults are done to."""

    num_spares: int
    is_twofold: bool = False
    """Every rank holds all experts."""

    def __str__(self) -> str:
        return f"{self.num_spares} spares" + ", all experts on both ranks" * self.is_twofold


@dataclass(slots=True)
class Part:
    """All faults to one server."""

    gang: Gang
    tally: Tally = field(default_factory=Tally)
    found: defaultdict[str, list[Found]] = field(default_factory=lambda: defaultdict(list))
    is_idle: bool = False
    surplus: int = 0
    """Processes too many, or too few, before the end."""
    left: list[str] = field(default_factory=list)
    """Processes after the end, and placement groups at any time, that should not be there."""


def measure(options: Options) -> Measurement:
    """Run the schedules, and look at what is left."""
    rng = random.Random(options.seed)
    one_machine = options.given.one_machine
    if not one_machine and (reason := objection()) is not None:
        raise SystemExit(f"no machines here: {reason}; --one-machine does without")
    kinds = [fault for fault in FAULTS if not (one_machine and fault.needs_machines)]
    if options.given.only:
        kinds = [fault for fault in kinds if options.given.only in fault.name]
    elif options.quick:
        kinds = [fault for fault in kinds if fault.name in QUICK]
    planned = schedule(len(kinds) if options.quick else options.given.num_faults, kinds)
    rng.shuffle(planned)
    bare = [fault for fault in kinds if fault.name in WITHOUT_SPARE]
    given = options.given
    gangs = (
        (Gang(NUM_SPARES), planned),
        (Gang(0), schedule(0 if options.quick else given.num_without_spare, bare)),
        (Gang(0, is_twofold=True), schedule(0 if options.quick else given.num_twofold, bare)),
    )
    questions = make_questions(NUM_CLIENTS, rng)
    parts = []
    with _places(one_machine=one_machine) as cluster:
        for gang, faults in gangs:
            if faults:
                parts.append(_run_part(cluster, gang, faults, questions, options.seed))
    rows = [_row(name, part, found) for part, _ in parts for name, found in part.found.items()]
    judged = [(part.tally, *part.tally.judge(questions, wanted)) for part, wanted in parts]
    summary = _summary([tally for tally, _, _ in judged], sum(j[1] for j in judged), sum(j[2] for j in judged))
    return Measurement([*rows, summary], _targets([part for part, _ in parts], summary), "float32", 1)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-faults", type=int, default=NUM_FAULTS, help=f"with a spare ({NUM_FAULTS})")
    parser.add_argument("--num-without-spare", type=int, default=NUM_WITHOUT_SPARE, help=f"({NUM_WITHOUT_SPARE})")
    parser.add_argument("--num-twofold", type=int, default=NUM_TWOFOLD, help=f"with all experts twice ({NUM_TWOFOLD})")
    parser.add_argument("--only", default="", metavar="WORDS", help="kinds whose name has these words")
    parser.add_argument("--one-machine", action="store_true", help="no network namespaces, no faults of machines")


@contextmanager
def _places(*, one_machine: bool) -> Iterator[RayCluster | None]:
    """Have a cluster, and this process on the network of its head; None for one machine."""
    if one_machine:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="pk-", dir="/tmp"))  # Ray's socket paths must be short
    try:
        with machines(NUM_MACHINES) as made, made.inside(0):
            cluster = RayCluster(made, folder, num_head_cpus=CPUS_OF_HEAD)
            for i in range(1, NUM_MACHINES):
                cluster.join(i)
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _server(cluster: RayCluster | None, gang: Gang) -> Iterator[ServerProcess]:
    config = {"served-model-name": NAME, "expert-parallel-size": NUM_RANKS, "num-spares": gang.num_spares}
    config |= {"dtype": "float32", "device": "cpu", "num-threads": 1, "step-timeout-s": STEP_TIMEOUT_S}
    config |= {"cpus-per-rank": CPUS_OF_RANK if cluster else 0.5}
    with ExitStack() as stack:
        if gang.is_twofold:
            config["placement"] = stack.enter_context(_everywhere())
        flags = [word for name, value in config.items() for word in (f"--{name}", str(value))]
        if cluster is None:
            yield stack.enter_context(serving(["serve", str(DEMO), *flags]))
        else:
            process, _ = stack.enter_context(cluster.serving(DEMO, *flags))
            yield ClusterServer(cluster.url, process.pid, cluster)


@contextmanager
def _everywhere() -> Iterator[Path]:
    """Return a file of the placement with every expert on every rank."""
    _, config = inspect(str(DEMO))
    empty = build(config, torch.float32)
    layer = (tuple(range(NUM_RANKS)),) * empty.num_experts
    placement = Placement(empty.num_experts, NUM_RANKS, (layer,) * len(empty.expert_modules))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "placement.json"
        PlacementFile.of(placement, "balanced", config.model_type).write(path)
        yield path


def _run_part(
    cluster: RayCluster | None, gang: Gang, faults: list[Fault], questions: list[Question], seed: int
) -> tuple[Part, list[list[int]]]:
    part = Part(gang)
    with _server(cluster, gang) as server:
        wanted = asyncio.run(answer_all(server.url, questions))
        asyncio.run(_chaos(server, questions, wanted, part, faults, seed))
        part.is_idle = _becomes_idle(server)
        family = server.family()
        roles = Counter(role for role, _ in family)
        others = sum(roles[role] for role in ("coordinator", "gang", "ingress"))
        part.surplus = roles["rank"] - NUM_RANKS - gang.num_spares + others - _NUM_OTHERS
        if cluster is not None:
            part.left += ["placement group"] * (cluster.num_placement_groups() - 1)
    # On a cluster of others Ray itself stays, and Serve
    ours = [process for role, process in family if cluster is None or role not in (OTHER, "controller", "proxy")]
    part.left += leftovers(ours, 30.0)
    if cluster is not None:
        part.left += ["placement group"] * cluster.num_placement_groups()
    return part, wanted


async def _chaos(
    server: ServerProcess,
    questions: list[Question],
    wanted: list[list[int]],
    part: Part,
    faults: list[Fault],
    seed: int,
) -> None:
    clients = [StreamClient(server.url, questions, wanted, part.tally, seed + i) for i in range(NUM_CLIENTS)]
    running = [asyncio.create_task(client.run()) for client in clients]
    rng = random.Random(seed)
    for number, fault in enumerate(faults):
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        await _all_stream(clients)
        await _until(lambda: _is_whole(server, part.gang))
        started = time.monotonic()
        found = await _commit(server, fault, clients, part.gang)
        name = f"{fault.name}, on it {_WORDS[found.hit]}" if found.hit else fault.name
        part.found[name].append(found)
        print(
            f"{number + 1}/{len(faults)} {name}: longest pause {found.longest_pause_s:.1f} s, "
            f"{time.monotonic() - started:.0f} s in all; {dict(part.tally.outcomes)}",
            file=sys.stderr,
        )
    for client in clients:
        client.stopped = True
    await asyncio.gather(*running)


_WORDS = {"rank": "a rank", "coordinator": "the coordinator", "gang": "the replica", "nothing": "nothing"}


async def _commit(server: ServerProcess, fault: Fault, clients: list[StreamClient], gang: Gang) -> Found:
    """Do a fault, wait until every client's stream goes on, and have all come back."""
    for client in clients:
        client.pauses.clear()
        client.cut_s = None
        client.may_be_cut = fault.cuts_streams
    await _all_stream(clients)
    committed = await asyncio.to_thread(fault.do, server, NUM_RANKS)
    moment, wall = time.monotonic(), time.time()
    # What was on its way may still come; what is silent is noticed only after a deadline
    await asyncio.sleep(_TAKES_EFFECT_S + (STEP_TIMEOUT_S if fault.is_silent else 0.0))
    await _all_stream(clients)
    await asyncio.to_thread(committed.undo)
    await _until(lambda: _is_whole(server, gang))
    await _all_stream(clients)
    for client in clients:
        client.may_be_cut = False
    found = Found(committed.hit, longest_pause_s=max(client.pause_after(moment) for client in clients))
    if cuts := [client.cut_s for client in clients if client.cut_s is not None]:
        found.noticed_s = min(cuts) - moment
    for event in [event for event in await asyncio.to_thread(_events, server) if event["time_s"] > wall - 0.5]:
        began = event["time_s"] - (0.0 if event["kind"] == "fault" else event["duration_s"])
        found.noticed_s = min(began - wall, found.noticed_s if found.noticed_s is not None else began - wall)
        if event["kind"] == "recovery":
            found.whole_s = max(event["duration_s"], found.whole_s or 0.0)
            # A rank that the others went on without brings no request back
            if event["num_requests_replayed"] or not gang.is_twofold:
                found.recovery_s = max(event["duration_s"], found.recovery_s or 0.0)
        found.num_replayed += event["num_requests_replayed"]
    begun = sorted((c.pause_after(moment) for c in clients if c.was_streaming_at(moment)), reverse=True)
    found.replayed_pauses_s, found.other_pauses_s = begun[: found.num_replayed], begun[found.num_replayed :]
    return found


async def _all_stream(clients: Sequence[StreamClient]) -> None:
    since = time.monotonic()
    await _until(lambda: all(client.streams_since(since) for client in clients))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(_POLL_S)


def _is_whole(server: ServerProcess, gang: Gang) -> bool:
    if not spares_are_ready(server, NUM_RANKS, gang.num_spares):
        return False
    recoveries = [event for event in _events(server) if event["kind"] == "recovery"] if gang.is_twofold else []
    return not recoveries or "go on without" not in recoveries[-1]["message"]


def _events(server: ServerProcess) -> list[dict[str, Any]]:
    with suppress(Exception):  # an ingress that has just started may not answer yet
        client = HttpClient(server.url)
        try:
            return client.events()
        finally:
            client.close()
    return []


def _becomes_idle(server: ServerProcess) -> bool:
    client = HttpClient(server.url)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            stats = client.stats()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if all(stats[f"penstock:{name}"] == 0 for name in names):
                return True
            time.sleep(0.5)
        return False
    finally:
        client.close()


def _row(name: str, part: Part, found: Sequence[Found]) -> Row:
    def median(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(statistics.median(known), 2) if known else None

    return {
        "fault": name,
        "spares": part.gang.num_spares,
        "all_experts_twice": part.gang.is_twofold,
        "times": len(found),
        "noticed_s": median([one.noticed_s for one in found]),
        "recovery_s": median([one.recovery_s for one in found]),
        "whole_s": median([one.whole_s for one in found]),
        "replayed": median([one.num_replayed for one in found]),
        "pause_of_replayed_s": median([pause for one in found for pause in one.replayed_pauses_s]),
        "pause_of_others_s": median([pause for one in found for pause in one.other_pauses_s]),
        "longest_pause_s": round(max(one.longest_pause_s for one in found), 2),
    }


def _summary(tallies: Sequence[Tally], excused: int, altered: int) -> Row:
    outcomes = sum((tally.outcomes for tally in tallies), Counter())
    return {
        "fault": "all",
        "streams": outcomes.total() - outcomes["nobody listens"],
        "tokens": sum(tally.num_tokens for tally in tallies),
        "completed": outcomes["completed"],
        "lost": outcomes["lost"],
        "cut": outcomes["cut"],
        "ties_excused": excused,
        "tokens_altered": altered,
        "longest_pause_s": round(max(tally.longest_pause_s for tally in tallies), 2),
        "first_error": next((error for tally in tallies for error in tally.errors), None),
    }


def _targets(parts: Sequence[Part], summary: Row) -> list[Target]:
    left = [thing for part in parts for thing in part.left]
    targets = [
        Target("streams lost", float(summary["lost"] or 0), at_most=0),
        Target("tokens lost, altered or duplicated", float(summary["tokens_altered"] or 0), at_most=0),
        Target("KV blocks free and engine idle at the end, 1 if so", float(all(p.is_idle for p in parts)), at_least=1),
        Target("processes too many, or too few, before the end", sum(abs(p.surplus) for p in parts), at_most=0),
        Target("processes and placement groups left", len(left), at_most=0),
    ]
    for part in parts:
        for name, found in part.found.items():
            targets += _bounds(name, part.gang, found)
    return targets


def _bounds(name: str, gang: Gang, found: Sequence[Found]) -> list[Target]:
    """Return what streams of the rank that was lost, and of others, may pause at most, where that is promised."""
    replayed = [pause for one in found for pause in one.replayed_pauses_s]
    others = [pause for one in found for pause in one.other_pauses_s]
    slow = STEP_TIMEOUT_S if name.startswith(("SIGSTOP of a rank", "silent link, on it a rank")) else 0.0
    is_rank = bool(slow) or name.startswith("SIGKILL of a rank")
    if not is_rank:
        return []
    if (gang.num_spares == 0 and not gang.is_twofold) or name == "SIGKILL of a rank and the spare":
        bounds = (slow + 15.0, slow + 15.0)
    else:
        bounds = (slow + 2.0, slow + (2.0 if slow else 1.0))
    who = f"{name}, {gang}"
    return [
        Target(f"{who}: median pause of {streams}, s", statistics.median(pauses), at_most=bound)
        for streams, pauses, bound in (("the lost rank's", replayed, bounds[0]), ("others", others, bounds[1]))
        if pauses
    ]


if __name__ == "__main__":
    sys.exit(run("chaos", measure, add_options=_add_options))
