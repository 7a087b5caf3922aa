"""What tests need that are a coordinator to a rank's loop; a bare GPU machine lacks what that is made of."""

from __future__ import annotations

import pytest

pytest.importorskip("msgspec", exc_type=ImportError)
pytest.importorskip("zmq", exc_type=ImportError)

from penstock.benchmarks.echo_rank import EchoRunner, answer
from penstock.cluster.transport.messages import Close, Done, Failed, Loaded, Ping, Pong, Regroup, Run
from penstock.cluster.transport.rank_loop import RankLoop, RankSettings
from penstock.cluster.transport.step_plane import CoordinatorPlane

__all__ = [
    "Close",
    "CoordinatorPlane",
    "Done",
    "EchoRunner",
    "Failed",
    "Loaded",
    "Ping",
    "Pong",
    "RankLoop",
    "RankSettings",
    "Regroup",
    "Run",
    "answer",
]
