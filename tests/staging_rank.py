"""A rank whose collectives go by way of the host: the program that `test_collectives` starts."""

from __future__ import annotations

from typing import Any

from penstock.cluster.transport.process_ranks import parent_is_gone, read_settings
from penstock.cluster.transport.rank_loop import run_rank
from penstock.workers import process_group
from penstock.workers.collectives import Collectives

join = process_group.join


def join_by_way_of_the_host(*given: Any, **named: Any) -> Collectives:
    """Join as ever, and take the group's memory to be out of its reach."""
    join(*given, **named)
    return Collectives(through_host=True)


if __name__ == "__main__":
    process_group.join = join_by_way_of_the_host
    run_rank(read_settings(), parent_is_gone)
