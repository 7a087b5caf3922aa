"""A rank that serves one coordinator after another: settings come one a line on standard input."""

from __future__ import annotations

import select
import sys

import msgspec

from penstock.cluster.transport.rank_loop import RankLoop, RankSettings


def another_calls() -> bool:
    """Tell whether there is another line, or no more to come."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


if __name__ == "__main__":
    loop = RankLoop()
    for line in iter(sys.stdin.buffer.readline, b""):
        loop.serve(msgspec.json.decode(line, type=RankSettings), another_calls)
