"""CUDA graphs of steps: how one is captured, and what that takes."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from .failed_capture import end_capture
from .static_step import StaticStep

_WARM_UPS = 2
"""Runs before a capture: libraries and compilers allocate and choose in their first ones."""


class Graph(Protocol):
    """What a device does once more."""

    def replay(self) -> None:
        """Have it done, behind what the device has been given before."""
        ...


class Captured(NamedTuple):
    """A step's graph."""

    graph: Graph
    grown_bytes: int
    """By which all graphs' memory has grown."""
    kept_bytes: int
    """Of that memory, which the step's answer takes for good."""


class Capturer(Protocol):
    """Makes the graphs of one device, which share their memory."""

    def rehearse(self, step: StaticStep) -> int:
        """Run ``step`` as often as it takes; return the most bytes that it needs at once."""
        ...

    def free_bytes(self) -> int:
        """Return how much memory of the device nobody has taken."""
        ...

    def capture(self, step: StaticStep) -> Captured:
        """Return the graph of ``step``, which has been rehearsed; raise what a device, a library or a model does.

        The device computes on after that.
        """
        ...

    def clear(self) -> None:
        """Share memory with none of the graphs so far."""
        ...


class CudaCapturer:
    """Captures on one GPU, in the process' only thread that uses it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    def rehearse(self, step: StaticStep) -> int:
        """Run it twice; the second run is as all that follow."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        before = 0
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                before = torch.cuda.memory_allocated(self._device)
                torch.cuda.reset_peak_memory_stats(self._device)
                step.rehearse()
        present.wait_stream(self._stream)
        return torch.cuda.max_memory_allocated(self._device) - before

    def free_bytes(self) -> int:
        """Return it without what torch keeps for later."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def capture(self, step: StaticStep) -> Captured:
        """Capture; what other threads do on the device meanwhile is no part of it, and fails nothing."""
        present = torch.cuda.current_stream(self._device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        _let_cublas_go()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # or what it gives back as it begins would hide by how much memory grows
        before = torch.cuda.memory_reserved(self._device), torch.cuda.memory_allocated(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step.run()
        except Exception:
            torch.cuda.set_stream(present)  # torch leaves the one that it captured on
            end_capture(self._pool)
            self._pool = None
            raise
        finally:
            _let_cublas_go()
        after = torch.cuda.memory_reserved(self._device), torch.cuda.memory_allocated(self._device)
        grown, kept = (max(0, now - then) for now, then in zip(after, before, strict=True))
        return Captured(graph, grown, kept)

    def clear(self) -> None:
        """Take another pool from now on."""
        self._pool = None


def _let_cublas_go() -> None:
    """Have cuBLAS take new memory to work in when it is called next.

    torch keeps 32 MiB of it for each stream, for good, and a graph holds the address. Taken before a capture it would
    be no part of the graphs' memory: whatever lets it go (torch's own graphs, of ``torch.compile``'s mode
    reduce-overhead) would give it to others, under a graph that writes there. Kept behind a capture, it would take as
    much of each pool.
    """
    torch._C._cuda_clearCublasWorkspaces()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it came of, says that a device has no memory left: torch's, CUDA's or Triton's."""
    return any(isinstance(one, torch.OutOfMemoryError) or "out of memory" in str(one).lower() for one in causes(error))


def causes(error: BaseException) -> list[BaseException]:
    """Return ``error`` and what was being handled when it was raised, the first of all last.

    Where a step fails in a capture, the capture fails in its turn.
    """
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found
