"""Seconds that a run may take: machines are lent for minutes, and what comes late is lost."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import psutil


def process_age_s() -> float:
    """Return the seconds since this process started, imports included."""
    return time.time() - psutil.Process().create_time()


class TimeBudget:
    """Asked before each part of a run. ``seconds``: None for any number; a part that has begun is finished."""

    def __init__(self, seconds: float | None, elapsed_s: Callable[[], float] = process_age_s) -> None:
        self._seconds, self._elapsed_s = seconds, elapsed_s
        self.left_out: list[str] = []

    def first(self, share: float) -> TimeBudget:
        """Return the budget of what comes first, which may take this share of the whole; they list what is left out."""
        part = TimeBudget(None if self._seconds is None else share * self._seconds, self._elapsed_s)
        part.left_out = self.left_out
        return part

    @property
    def is_over(self) -> bool:
        """Whether no other part is to begin."""
        return self._seconds is not None and self._elapsed_s() >= self._seconds

    def allows(self, part: str) -> bool:
        """Return whether there is time for ``part``; one for which there is none counts as left out."""
        if self.is_over:
            self.left_out.append(part)
            return False
        return True


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--budget-s``."""
    parser.add_argument(
        "--budget-s",
        type=float,
        metavar="N",
        help="begin nothing when the process is N seconds old, and list what is left",
    )
