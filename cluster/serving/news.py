"""What a coordinator tells the gang that supervises it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.events import Event


@dataclass(frozen=True, slots=True)
class News:
    """What has happened since the last news."""

    vacancies: Sequence[int] = ()
    """Bundles whose worker is lost: another one is wanted there."""
    events: Sequence[Event] = ()


class Newsletter:
    """Collects news until the gang asks for them. Belongs to one event loop."""

    def __init__(self) -> None:
        self._vacancies: list[int] = []
        self._events: list[Event] = []
        self._any = asyncio.Event()

    def vacancy(self, bundle: int) -> None:
        """Tell of a worker that is lost."""
        self._vacancies.append(bundle)
        self._any.set()

    def event(self, event: Event) -> None:
        """Tell of an event."""
        self._events.append(event)
        self._any.set()

    async def next(self) -> News:
        """Wait for news."""
        await self._any.wait()
        self._any.clear()
        news = News(self._vacancies, self._events)
        self._vacancies, self._events = [], []
        return news
