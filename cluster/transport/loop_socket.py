"""A ZeroMQ socket on an event loop, without a future for each message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq


class LoopSocket:
    """Calls ``take`` on the running event loop with the frames of each message that ``socket`` gets.

    Nothing waits: what cannot be sent at once raises ``zmq.Again``.
    """

    def __init__(self, socket: zmq.Socket[bytes], take: Callable[[list[bytes]], None]) -> None:
        self._socket, self._take = socket, take
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = socket.fd  # type: ignore[assignment]
        self._loop.add_reader(self._descriptor, self._drain)
        self._loop.call_soon(self._drain)

    def send(self, frames: Sequence[bytes]) -> None:
        """Send a message; raises ``zmq.ZMQError``."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        finally:
            # The descriptor tells of a change once, and sending may have been what noticed it
            if self._has_come():
                self._loop.call_soon(self._drain)

    def close(self) -> None:
        """Leave the event loop; the socket itself is its owner's to close."""
        self._loop.remove_reader(self._descriptor)

    def _drain(self) -> None:
        while not self._socket.closed and self._has_come():
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
            try:
                self._take(frames)
            except BaseException:
                self._loop.call_soon(self._drain)  # what else has come must not wait for another change
                raise

    def _has_come(self) -> bool:
        events: int = self._socket.getsockopt(zmq.EVENTS)  # type: ignore[assignment]
        return bool(events & zmq.POLLIN)
