"""A rank that does on a CPU what a CUDA graph does: it records a step's operations once, and then repeats them.

The program that `test_moving_kernels` starts, with kernels interpreted. What experts leave behind is poisoned. In the
end it adds a line of what it did to the file that it is told.
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from penstock.cluster.transport.process_ranks import parent_is_gone, read_settings
from penstock.cluster.transport.rank_loop import run_rank
from penstock.kernels.device import triton_on
from penstock.workers.collectives import Collectives
from penstock.workers.expert_mover import ExpertMover
from penstock.workers.experts import Tensors
from penstock.workers.slotted_experts import SlottedExperts
from penstock.workers.static_step import StaticStep


class Recording(TorchDispatchMode):
    """torch's operations, Triton's launches and collectives, in their order, with the tensors that they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do all of it again: no line of whoever did it first runs, so nothing that it would decide anew is seen."""
        for call, args, kwargs, result in self.calls:
            again = call(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Replays:
    """How many steps were recorded, and how many replayed."""

    recorded = replayed = 0


@contextmanager
def recorded_steps() -> Iterator[Replays]:
    """Have every `StaticStep` run once, and be replayed from then on."""
    seen, current = Replays(), [None]
    run, launch, collect = StaticStep.run, InterpretedFunction.run, Collectives._run

    def as_one(call: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                call(*args, **kwargs)
            if (recording := current[0]) is not None:
                recording.calls.append((call, args, kwargs, None))

        return do

    def run_or_replay(step: Any) -> None:
        if hasattr(step, "recording"):
            seen.replayed += 1
            step.recording.replay()
            return
        seen.recorded += 1
        current[0] = step.recording = Recording()
        try:
            with current[0]:
                run(step)
        finally:
            current[0] = None

    with (
        patch.object(StaticStep, "run", run_or_replay),
        patch.object(InterpretedFunction, "run", as_one(launch)),
        patch.object(Collectives, "_run", as_one(collect)),
    ):
        yield seen


@contextmanager
def poisoned_leftovers() -> Iterator[None]:
    """Fill what experts leave, and memory for others to arrive in, with bytes that no weight has: NaN, or 255."""
    free = ExpertMover._free

    def poison(mover: ExpertMover, tensors: Tensors) -> None:
        for tensor in tensors:
            tensor.view(-1).view(torch.uint8).fill_(0xFF)
        free(mover, tensors)

    with patch.object(ExpertMover, "_free", poison):
        yield


def main() -> None:
    """Be a rank."""
    hold, num_arrived = SlottedExperts.hold, 0

    def count(experts: SlottedExperts, wanted: Any) -> list[Tensors]:
        nonlocal num_arrived
        num_arrived += sum(not isinstance(expert, int) for expert in wanted)
        return hold(experts, wanted)

    with triton_on("cpu"), poisoned_leftovers(), recorded_steps() as seen, patch.object(SlottedExperts, "hold", count):
        run_rank(read_settings(), parent_is_gone)
    said = {"recorded": seen.recorded, "replayed": seen.replayed, "arrived": num_arrived}
    with Path(sys.argv[1]).open("a") as file:
        file.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
