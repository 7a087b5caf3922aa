"""The collectives of one process group, also where its backend does not reach the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from .collective_guard import CollectiveGuard


class Collectives:
    """All-to-all and sums over ``group`` (the default one when None), in place.

    ``through_host``: copy what is sent to the host and what arrives back from it. gloo needs that on a GPU, and it is
    gloo that joins ranks which share one. ``guard``: what ends collectives that never would by themselves.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        through_host: bool = False,
        guard: CollectiveGuard | None = None,
    ) -> None:
        self.group, self.through_host, self.guard = group, through_host, guard

    def all_to_all(
        self,
        inbox: torch.Tensor,
        message: torch.Tensor,
        received: Sequence[int] | None = None,
        sent: Sequence[int] | None = None,
    ) -> None:
        """Send ``sent`` rows of ``message`` to each rank, and get ``received`` rows of each into ``inbox``.

        Equal parts where counts are None.
        """
        into, out = (None if counts is None else list(counts) for counts in (received, sent))
        self._run(lambda to, of: dist.all_to_all_single(to, of, into, out, group=self.group), inbox, message)

    def begin_all_to_all(
        self, message: torch.Tensor, received: list[int], sent: list[int]
    ) -> tuple[torch.Tensor, dist.Work]:
        """Begin to send so many numbers of ``message`` to each rank; return where theirs arrive, and what waits for it.

        That may be the host's memory.
        """
        self._check()
        if self.through_host:
            message = message.cpu()
        inbox = message.new_empty(sum(received))
        work = dist.all_to_all_single(inbox, message, received, sent, group=self.group, async_op=True)
        assert work is not None, "the rank is in the group"
        return inbox, work

    def all_reduce(self, numbers: torch.Tensor) -> None:
        """Sum ``numbers`` over all ranks."""
        self._run(lambda into, _: dist.all_reduce(into, group=self.group), numbers, numbers)

    def _run(
        self, collective: Callable[[torch.Tensor, torch.Tensor], object], into: torch.Tensor, of: torch.Tensor
    ) -> None:
        self._check()
        if not self.through_host:
            collective(into, of)
            return
        sent = of.to("cpu", copy=True)
        arrived = sent if into is of else torch.empty_like(into, device="cpu")
        collective(arrived, sent)
        into.copy_(arrived)

    def _check(self) -> None:
        """Begin nothing with a group that is being aborted: that would wait for the abort, which waits for graphs."""
        if self.guard is not None:
            self.guard.check()
